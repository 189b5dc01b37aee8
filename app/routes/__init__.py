"""What all routes share: the JSON they read and write, ids, the Origin guard, headers, errors, the request log."""

import logging
import re
import secrets
import time
from urllib.parse import quote

import orjson
from flask import abort, current_app, g, request
from flask.json.provider import JSONProvider
from sqlalchemy import exc
from sqlalchemy.orm.exc import StaleDataError
from werkzeug.exceptions import HTTPException, NotFound, ServiceUnavailable
from werkzeug.routing import BaseConverter, ValidationError

from app import login_manager
from app.sql import lacks_schema

CLIENT_TIMEOUT = 30  # seconds without a byte from or to a client
RETRY_AFTER = 2  # seconds after which to try again when the database is away
UNAVAILABLE = "The database is unavailable, try again"
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
    """An id in a path: a whole number from 1 to 2^63-1, written in the one usual way."""

    regex = "[1-9][0-9]{0,18}"

    def to_python(self, value):
        if int(value) >= 2**63:
            raise ValidationError
        return int(value)


def init_app(app):
    """Give the application what all its routes share."""
    app.json = OrjsonProvider(app)
    app.url_map.converters["id"] = IdConverter
    app.url_map.merge_slashes = False
    login_manager.unauthorized_handler(lambda: abort(401))
    app.before_request(start)
    app.before_request(guard_origin)
    app.before_request(read_body)
    app.after_request(finish)
    app.register_error_handler(HTTPException, http_error)
    app.register_error_handler(StaleDataError, lambda error: http_error(NotFound()))
    for kind in (exc.OperationalError, exc.InterfaceError, exc.InternalError, exc.ProgrammingError, exc.TimeoutError):
        app.register_error_handler(kind, database_error)


def start():
    """Note when the request came in, and what it is to be called."""
    g.started = time.perf_counter()
    given = request.headers.get("X-Request-ID", "")
    g.request_id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else secrets.token_hex(8)


def guard_origin():
    """Refuse a write that a page of an unknown origin makes a browser send. Without an Origin it is no browser."""
    origin = request.headers.get("Origin")
    if origin is None or request.method in ("GET", "HEAD", "OPTIONS"):
        return
    if origin != request.host_url.rstrip("/") and origin not in current_app.config["CORS_ORIGINS"]:
        abort(403, "Origin not allowed")


def read_body():
    """Read the whole body before anything else happens, so that a slow client holds no database connection."""
    connection = request.environ.get("gunicorn.socket")
    if connection:
        connection.settimeout(CLIENT_TIMEOUT)
    if request.method not in ("GET", "HEAD", "OPTIONS"):
        request.get_data()


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
    if isinstance(error, exc.DBAPIError) and lacks_schema(error):
        reason = "The database lacks its tables: run python -m flask db upgrade"
    elif isinstance(error, exc.ProgrammingError):
        raise error
    else:
        reason = UNAVAILABLE
    current_app.logger.error("%s (%s)", reason, str(getattr(error, "orig", error)).strip())
    return http_error(ServiceUnavailable(reason, retry_after=RETRY_AFTER))


def finish(response):
    """Add the headers that every answer has, and log the request in one line."""
    headers = response.headers
    headers["X-Request-ID"] = g.request_id
    headers["X-Content-Type-Options"] = "nosniff"
    headers.setdefault("Cache-Control", "no-store")
    response.vary.add("Origin")
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
