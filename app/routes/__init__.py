"""What all routes share: the JSON they read and write, ids, the Origin guard, headers, errors, the request log."""

import logging
import re
import secrets
import time
from pathlib import Path
from urllib.parse import quote, urlencode

import orjson
from flask import abort, current_app, g, redirect, request
from flask.json.provider import JSONProvider
from sqlalchemy import exc
from werkzeug.exceptions import HTTPException, ServiceUnavailable
from werkzeug.routing import BaseConverter

from app import login_manager
from app.sql import lacks_schema

CLIENT_TIMEOUT = 30  # seconds without a byte from or to a client
PAGE = 100  # at most so many items on a page
RETRY_AFTER = 2  # seconds after which to try again when the database is away
AWAY = (exc.OperationalError, exc.InterfaceError, exc.InternalError, exc.TimeoutError)  # or locked, full, read-only
SENTENCES = {
    401: "Login required",
    404: "Not found",
    405: "Method not allowed",
    413: "The body must be at most 1 MiB",
    500: "Internal server error",
}
log = logging.getLogger("app.requests")


class OrjsonProvider(JSONProvider):
    """JSON exactly as RFC 8259 has it: no NaN, no lone surrogates, no endless nesting; fast."""

    def dumps(self, obj, **kwargs):
        return orjson.dumps(obj).decode()

    def loads(self, s, **kwargs):
        return orjson.loads(s)

    def response(self, *args, **kwargs):
        body = orjson.dumps(self._prepare_response_obj(args, kwargs))
        return current_app.response_class(body, mimetype="application/json")


class IdConverter(BaseConverter):
    """An id in a path: a whole number below 10^18, written in the one usual way."""

    regex = "[1-9][0-9]{0,17}"

    def to_python(self, value):
        return int(value)


def init_app(app):
    """Give the application what all its routes share."""
    app.json = OrjsonProvider(app)
    app.url_map.converters["id"] = IdConverter
    app.url_map.merge_slashes = False
    login_manager.unauthorized_handler(lambda: abort(401))
    app.before_request(begin)
    app.after_request(finish)
    app.register_error_handler(HTTPException, http_error)
    app.register_error_handler(exc.SQLAlchemyError, database_error)
    app.add_url_rule("/", "index", lambda: redirect("/api/docs/"))
    description = orjson.Fragment(Path(app.root_path, "openapi.json").read_bytes())
    app.add_url_rule("/api/openapi.json", "openapi", lambda: revalidated(description))


def begin():
    """Name the request, and let in what changes something only with a known origin and a whole body."""
    environ = request.environ
    g.started = time.perf_counter()
    given = environ.get("HTTP_X_REQUEST_ID", "")
    g.request_id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else secrets.token_hex(8)
    if environ["REQUEST_METHOD"] not in ("GET", "HEAD", "OPTIONS"):
        lose_patience()
        guard_origin()
        read_body()


def lose_patience():
    """Hang up on a client that neither sends nor takes a byte for CLIENT_TIMEOUT."""
    if connection := request.environ.get("gunicorn.socket"):
        connection.settimeout(CLIENT_TIMEOUT)


def guard_origin():
    """Refuse a write that a page of an unknown origin makes a browser send. Without an Origin it is no browser."""
    origin = request.environ.get("HTTP_ORIGIN")
    if origin is not None and origin not in (request.host_url.rstrip("/"), *current_app.config["CORS_ORIGINS"]):
        abort(403, "Origin not allowed")


def read_body():
    """Read the whole body before anything else happens, so that a slow client holds no database connection."""
    try:
        size = len(request.get_data())
        # Werkzeug cuts a chunked body off at the limit without a word, and takes what came of one that broke off.
        too_long = size == current_app.config["MAX_CONTENT_LENGTH"] and request.environ["wsgi.input"].read(1)
    except HTTPException:
        raise
    except Exception as error:  # gunicorn's, each of a kind of its own, for chunks that are none
        abort(400, f"The body cannot be read: {type(error).__name__}")
    if too_long:
        abort(413)
    if size < (request.content_length or 0):
        abort(400, "The body broke off")


def json_body():
    """Return the body, a JSON object, as a dict; or abort with 400 or 415."""
    if not request.is_json:
        abort(415, "Content-Type must be application/json")
    try:
        body = orjson.loads(request.get_data())
    except orjson.JSONDecodeError as error:
        abort(400, f"The body must be valid JSON: {error}")
    if not isinstance(body, dict):
        abort(400, "The body must be a JSON object")
    return body


def string_field(name, shortest, longest):
    """Return a field of the body, a string of so many characters; or abort with 400."""
    value = json_body().get(name)
    if not isinstance(value, str):
        abort(400, f"{name} must be a string")
    if not value.strip() or not shortest <= len(value) <= longest:
        abort(400, f"{name} must be {shortest} to {longest} characters long and not blank")
    if "\0" in value:
        abort(400, f"{name} must not contain NUL")
    return value


def text_parameter(name, longest):
    """Return a parameter of the query string, not blank; None if it is not there; or abort with 400."""
    value = request.args.get(name)
    if value is not None and ("\0" in value or not value.strip() or len(value) > longest):
        abort(400, f"{name} must be 1 to {longest} characters long, not blank and without NUL")
    return value


def number_parameter(name, low, high):
    """Return a whole number of the query string; None if it is not there; or abort with 400."""
    value = request.args.get(name)
    if value is None:
        return None
    if not re.fullmatch("[0-9]{1,19}", value) or not low <= int(value) <= high:
        abort(400, f"{name} must be a whole number from {low} to {high}")
    return int(value)


def revalidated(answer, **following):
    """Answer a GET with an ETag, or with 304 if the client has this answer already.

    `following`, if there is more to read, is the parameter that the next page's address has in place of this one's.
    """
    response = current_app.json.response(answer)
    response.add_etag()
    response.headers["Cache-Control"] = "private, no-cache"  # keep it, but ask each time
    if following:
        address = f"{request.base_url}?{urlencode({**request.args, **following})}"
        response.headers["Link"] = f'<{address}>; rel="next"'
    if "HTTP_IF_NONE_MATCH" in request.environ:
        response.make_conditional({**request.environ, "HTTP_IF_MATCH": ""})  # If-Match is for writes
    return response


def http_error(error):
    """Answer {"error": sentence} with the status and the headers (Allow, Retry-After) of the error."""
    response = error.get_response()
    response.data = orjson.dumps({"error": sentence(error)})
    response.mimetype = "application/json"
    return response


def sentence(error):
    """Return what to tell people of an HTTPException."""
    stock = type(error).description
    return error.description if error.description != stock else SENTENCES.get(error.code, stock)


def database_error(error):
    """Answer 503 when the database is away, locked, full or read-only; the log says what it is."""
    return http_error(unavailable(error))


def unavailable(error):
    """Return the HTTPException that tells people of a database error; the log has the cause. Raises what is a bug."""
    reason = trouble(error)
    current_app.logger.error("%s (%s)", reason, " ".join(str(getattr(error, "orig", error)).split()))
    return ServiceUnavailable(reason, retry_after=RETRY_AFTER)


def trouble(error):
    """Return a sentence on a database error. Raises what is a bug."""
    if isinstance(error, exc.DBAPIError) and lacks_schema(error):
        return "The database lacks its tables: run python -m flask db upgrade"
    if isinstance(error, AWAY) or type(error) is exc.DatabaseError:  # the latter for a file that is no database
        return "The database is unavailable, try again"
    raise error


def finish(response):
    """Add the headers that every answer has, and log the request in one line."""
    headers = response.headers
    if len(headers.get("Content-Length", "")) > 5:  # more than what the network's buffers take at once
        lose_patience()
    headers.add("X-Request-ID", g.request_id)
    headers.add("X-Content-Type-Options", "nosniff")
    headers.add("Vary", "Origin, Cookie")
    if "Cache-Control" not in headers:
        headers.add("Cache-Control", "no-store")
    log.info(
        "%s %s %d %.1f ms user=%s id=%s",
        request.method,
        quote(request.path),
        response.status_code,
        (time.perf_counter() - g.started) * 1000,
        g.get("user_id", "-"),
        g.request_id,
    )
    return response
