"""What happens around every request: id, origin check, body limits, headers, request log."""

import logging
import re
import secrets
import time
from functools import partial
from urllib.parse import quote

import orjson
from flask import abort, current_app, g, has_app_context, request
from flask.logging import default_handler
from werkzeug.exceptions import RequestEntityTooLarge

from app.database import SAFE_METHODS

CONTENT_SECURITY_POLICY = "default-src 'none'; frame-ancestors 'none'"
HSTS_MAX_AGE = 31536000  # seconds: a year

MAX_CORS_HEADERS_LENGTH = 1000  # characters of Access-Control-Request-Headers: Flask-CORS takes 5 ms for 1,000 names
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Vary": "Origin, Cookie",
}

logger = logging.getLogger("app.requests")


class TextFormatter(logging.Formatter):
    """A line of text for each record, with the id of the request that it belongs to."""

    default_msec_format = None

    def format(self, record):
        record.request_id = get_request_id(record)
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """A JSON object in one line for each record."""

    def format(self, record):
        fields = {
            "time": self.formatTime(record, self.datefmt),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": get_request_id(record),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(fields).decode()


def create_formatter(log_format):
    """Return the formatter of LOG_FORMAT, for the application's log and the server's."""
    formatter_class = JsonFormatter if log_format == "json" else TextFormatter
    return formatter_class("%(asctime)s %(levelname)s [%(request_id)s] %(message)s", TIME_FORMAT)


def init_app(app):
    """Register the hooks, and set the format of the log."""
    app.before_request(before_request)
    app.after_request(after_request)
    app.logger.setLevel(logging.INFO)
    for handler in (default_handler, logging.lastResort):  # the application's log, and that of the libraries
        handler.setFormatter(create_formatter(app.config["LOG_FORMAT"]))


def get_request_id(record):
    """Return the id of the request that a log record belongs to, or "-"."""
    return getattr(record, "request_id", None) or (g.get("request_id", "-") if has_app_context() else "-")


def begin_request():
    """Note when the request began, and give it an id: the client's, or a new one."""
    if "request_id" not in g:
        g.started_at = time.perf_counter()
        request_id = request.headers.get("X-Request-ID", "")
        g.log_fields = {}  # a stream may add to them
        g.request_id = request_id if re.fullmatch(r"[\w.-]{1,64}", request_id, re.ASCII) else secrets.token_hex(8)


def before_request():
    """Begin the request; admit only a write of an allowed origin whose body is complete."""
    begin_request()
    if len(request.headers.get("Access-Control-Request-Headers", "")) > MAX_CORS_HEADERS_LENGTH:
        del request.environ["HTTP_ACCESS_CONTROL_REQUEST_HEADERS"]
    if request.method not in SAFE_METHODS:
        check_origin()
        read_body()


def check_origin():
    """Abort with 403 if a page of another origin, which CORS_ORIGINS does not list, makes a browser send a write."""
    origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
    if origin is None and site == "cross-site":
        abort(403, "Origin required for a cross-site request")
    if origin is None or site == "same-origin":  # a page cannot set that header, and a script that can has no cookie
        return
    default_port = ":443" if request.scheme == "https" else ":80"
    own_origin = f"{request.scheme}://{request.headers.get('Host', '').lower().removesuffix(default_port)}"
    if origin.lower() not in (own_origin, *current_app.config["CORS_ORIGINS"]):
        abort(403, f"Origin not allowed: add {origin[:255]} to CORS_ORIGINS")


def read_body():
    """Read the whole body before the view runs, so that a slow client holds no database connection.

    Aborts with 413 for a body beyond MAX_CONTENT_LENGTH, 415 for a compressed one, and 400 for an incomplete one.
    """
    if request.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        abort(415, "The body must not be compressed")
    try:
        size = len(request.get_data())
        # Werkzeug silently cuts a chunked body at the limit.
        is_full = request.content_length is None and size == request.max_content_length
        if is_full and request.environ["wsgi.input"].read(1):
            raise RequestEntityTooLarge
    except RequestEntityTooLarge:
        raise
    except Exception:  # gunicorn has several kinds for malformed chunks
        size = -1
    if size < (request.content_length or 0):
        abort(400, "Incomplete request body")


def after_request(response):
    """Add the headers that every response has, and log the request; a stream is logged when it ends."""
    begin_request()  # before_request() does not run if the session cannot be opened
    headers = response.headers
    headers.extend(HEADERS)
    headers.add("X-Request-ID", g.request_id)
    headers.setdefault("Content-Security-Policy", CONTENT_SECURITY_POLICY)
    headers.setdefault("Cache-Control", "no-store")
    if request.is_secure:
        headers["Strict-Transport-Security"] = f"max-age={HSTS_MAX_AGE}"
    if request.endpoint == "auth.health":
        return response
    g.log_fields.update(
        method=request.method,
        path=quote(request.path),
        status=response.status_code,
        user_id=g.get("user_id"),
        address=request.remote_addr,
    )
    log = partial(log_request, g.log_fields, g.started_at, g.request_id)
    response.call_on_close(log) if response.is_streamed else log()
    return response


def log_request(fields, started_at, request_id):
    """Log a request: method, path, status, milliseconds, user's id, address; of a stream, the characters, too."""
    fields["duration_ms"] = round((time.perf_counter() - started_at) * 1000, 1)
    text = "{method} {path} {status} {duration_ms:.1f} ms user={user} from {address}"
    text = text.format(**fields, user=fields["user_id"] or "-")
    if "characters" in fields:
        text += f" characters={fields['characters']}"
    logger.info("%s", text, extra={"fields": fields, "request_id": request_id})
