"""JSON, conditional responses, links to the next page, and server-sent events."""

import hashlib
from urllib.parse import urlencode

import orjson
from flask import current_app, request
from flask.json.provider import JSONProvider

SLICE_BYTES = 65_536


class OrjsonProvider(JSONProvider):
    """JSON exactly as RFC 8259 defines it: no NaN, no lone surrogates."""

    def dumps(self, obj, **kwargs):
        return orjson.dumps(obj).decode()

    def loads(self, s, **kwargs):
        return orjson.loads(s)

    def response(self, *args, **kwargs):
        [obj] = args or [kwargs]
        body = orjson.dumps(obj)  # as bytes: a list may have 100 MB
        # In slices: a slow reader must take each of them within the server's time-out.
        slices = [body[start : start + SLICE_BYTES] for start in range(0, len(body), SLICE_BYTES)]
        return current_app.response_class(slices, mimetype="application/json")


def hash_version(version):
    """Return a hash of a value that changes whenever a response does, as its ETag."""
    return hashlib.blake2b(orjson.dumps(version), digest_size=16).hexdigest()


def is_not_modified(etag):
    """Return whether the client has the response with this ETag already."""
    suffixes = ("", "-gzip", "-br", "-zstd", "-deflate")  # that proxies such as Apache add
    return any(request.if_none_match.contains_weak(etag + suffix) for suffix in suffixes)


def conditional_response(body, etag, next_page=None):
    """Return a JSON response that the client may keep, but must revalidate, or 304 without a body if it has it.

    `next_page`: the parameters that the URL of the next page has in place of this one's, if there is one.
    """
    response = current_app.json.response(body) if not is_not_modified(etag) else current_app.response_class(status=304)
    response.set_etag(etag)
    response.headers["Cache-Control"] = "private, no-cache"
    if next_page:
        response.headers["Link"] = f'<?{urlencode({**request.args, **next_page})}>; rel="next"'
    return response


def format_event(name, data, id=None):
    """Return a server-sent event with JSON data."""
    id_line = b"" if id is None else b"id: %b\n" % str(id).encode()
    return b"%bevent: %b\ndata: %b\n\n" % (id_line, name.encode(), orjson.dumps(data))


def event_stream(events):
    """Return a response of server-sent events, which proxies neither cache nor buffer."""
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}
    return current_app.response_class(events, mimetype="text/event-stream", headers=headers)
