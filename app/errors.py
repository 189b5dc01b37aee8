"""Error handlers: every error is answered as {"error": "<sentence>"}."""

from flask import current_app
from sqlalchemy import exc
from sqlalchemy.orm.exc import StaleDataError
from werkzeug.exceptions import HTTPException, InternalServerError, NotFound, ServiceUnavailable, default_exceptions

from app.bot import BotBusy, BotError
from app.database import format_traceback, is_missing_table

RETRY_AFTER = 2  # seconds after which clients may try again when the database or the server is busy
ERROR_MESSAGES = {
    401: "Login required",
    404: "Not found",
    405: "Method not allowed",
    413: "The body must be at most 2 MiB",
    500: "Internal server error",
}
DATABASE_UNAVAILABLE = (
    exc.OperationalError,
    exc.InterfaceError,
    exc.InternalError,
    exc.NotSupportedError,  # app/postgresql.py refuses the database's encoding
    exc.TimeoutError,
)


def init_app(app):
    """Register the error handlers."""
    app.register_error_handler(HTTPException, http_error_response)
    app.register_error_handler(exc.SQLAlchemyError, handle_error)
    app.register_error_handler(BotError, handle_error)


def handle_error(error):
    """Return the response for an exception of the database or the bot."""
    log_database_error(error)
    return http_error_response(to_http_exception(error))


def http_error_response(error):
    """Return {"error": sentence} with the status and the headers (Allow, Retry-After) of an HTTPException."""
    response = error.get_response()
    response.data = current_app.json.dumps({"error": error_message(error)})
    response.mimetype = "application/json"
    return response


def error_message(error):
    """Return the sentence that clients get for an HTTPException."""
    default = type(error).description
    return error.description if error.description != default else ERROR_MESSAGES.get(error.code, default)


def to_http_exception(error):
    """Return the HTTPException that clients get for any exception; for a bug it is a 500."""
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, BotBusy):
        return ServiceUnavailable(error.sentence, retry_after=error.retry_after)
    if isinstance(error, BotError):
        return default_exceptions[error.status](error.sentence)
    if isinstance(error, StaleDataError):  # another request deleted the conversation just before
        return NotFound("Conversation not found")
    if isinstance(error, exc.SQLAlchemyError) and database_error_message(error):
        return database_unavailable()
    return InternalServerError()


def log_database_error(error):
    """Log an exception of the database: why it cannot be used, or where the exception was raised if it is a bug."""
    if not isinstance(error, exc.SQLAlchemyError) or isinstance(error, StaleDataError):
        return
    if message := database_error_message(error):
        current_app.logger.error("%s (%s)", message, get_reason(error))
    else:
        current_app.logger.error("Exception in a request: %s", format_traceback(error))


def database_unavailable():
    """Return the HTTPException of a request that the database cannot answer now."""
    return ServiceUnavailable("The database is unavailable, try again later", retry_after=RETRY_AFTER)


def get_reason(error):
    """Return what the driver says of a database error, in one line."""
    return " ".join(str(getattr(error, "orig", error)).split())


def database_error_message(error):
    """Return what the log and the commands say of a database that cannot be used; None if the error is a bug."""
    if isinstance(error, exc.DBAPIError) and is_missing_table(error):
        return "The database lacks its tables: run python -m flask db upgrade"
    # A plain DatabaseError is SQLite's for a file that is not a database.
    if isinstance(error, DATABASE_UNAVAILABLE) or type(error) is exc.DatabaseError:
        return "The database of DATABASE_URL cannot be used"
    return None
