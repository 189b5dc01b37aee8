"""Fields of the body, headers and parameters of the query string, or 400; the rules for usernames and passwords."""

import re
import unicodedata

import orjson
from flask import abort, current_app, request
from werkzeug.datastructures import MIMEAccept
from werkzeug.routing import BaseConverter

from app.database import MAX_ID

MAX_USERNAME_LENGTH = 80
MAX_PASSWORD_LENGTH = 1024
# Letters, symbols and marks (the last two are variation selectors) that look blank, though they are neither white
# space nor control or format characters.
BLANK_CHARACTERS = re.compile(
    "[\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\u034f\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)


def get_json():
    """Return the body, a JSON object, as a dict; abort with 400 or 415 if it is missing or invalid."""
    if not request.is_json:
        abort(415, "Content-Type must be application/json")
    try:
        body = orjson.loads(request.get_data().removeprefix(b"\xef\xbb\xbf"))  # a byte-order mark
    except orjson.JSONDecodeError as error:
        abort(400, f"The body must be valid JSON: {error}")
    if not isinstance(body, dict):
        abort(400, "The body must be a JSON object")
    return body


def get_string(name, max_length, min_length=1):
    """Return a string of the body; abort with 400 if it is missing, blank, or not within the bounds in characters."""
    return get_checked(name, check_string, max_length, min_length)


def get_checked(name, check, *bounds):
    """Return what a check returns for a string of the body; abort with 400 if it is missing or invalid."""
    value = get_json().get(name)
    if not isinstance(value, str):
        abort(400, f"{name} must be a string")
    return abort_if_invalid(check, name, value, *bounds)


def abort_if_invalid(check, *args):
    """Return what a check returns; abort with 400 if it raises ValueError."""
    try:
        return check(*args)
    except ValueError as error:
        abort(400, str(error))


def get_bool(name):
    """Return a boolean of the body; abort with 400 if it is missing or invalid."""
    value = get_json().get(name)
    if not isinstance(value, bool):
        abort(400, f"{name} must be true or false")
    return value


def get_id(name):
    """Return an id of the body; abort with 400 if it is missing or invalid."""
    value = get_json().get(name)
    if type(value) not in (int, float) or value % 1 or not 1 <= value <= MAX_ID:  # in JSON, 5.0 is an integer, too
        abort(400, f"{name} must be an integer from 1 to {MAX_ID}")
    return int(value)


def get_str_arg(name, max_length):
    """Return a parameter of the query string, or None if it is missing or empty; abort with 400 if it is invalid."""
    value = request.args.get(name)
    return abort_if_invalid(check_string, name, value, max_length) if value else None


def get_choice_arg(name, *choices):
    """Return a parameter of the query string, or None if it is missing or empty; abort with 400 if it is no choice."""
    value = request.args.get(name)
    if value and value not in choices:
        abort(400, f"{name} must be {' or '.join(choices)}")
    return value or None


def check_string(name, value, max_length, min_length=1):
    """Return a string. Raises ValueError if it is blank, has a NUL, or not the right length in characters."""
    if not min_length <= len(value) <= max_length or is_blank(value):
        raise ValueError(f"{name} must be {min_length} to {max_length} characters long and not blank")
    if "\0" in value:
        raise ValueError(f"{name} must not contain NUL")
    return value


def check_username(name, value):
    """Return a username in NFKC. Raises ValueError if it is invalid."""
    username = unicodedata.normalize("NFKC", check_string(name, value, MAX_USERNAME_LENGTH))
    check_string(name, username, MAX_USERNAME_LENGTH)
    if username != username.strip() or any(is_invisible(character) for character in username if character != " "):
        raise ValueError(f"{name} must not begin or end with a space or contain invisible characters")
    return username


def check_new_password(name, value):
    """Return a new password in NFKC. Raises ValueError if that, or what was typed, is invalid."""
    min_length = current_app.config["PASSWORD_MIN_LENGTH"]
    check_string(name, value, MAX_PASSWORD_LENGTH, min_length)
    return check_string(name, unicodedata.normalize("NFKC", value), MAX_PASSWORD_LENGTH, min_length)


def is_blank(value):
    """Return whether a text has nothing visible: only white space, control, format and blank-looking characters."""
    return all(is_invisible(character) for character in set(value))


def is_invisible(character):
    """Return whether a character has no visible form: categories C* and Z*, and the blank-looking ones."""
    return unicodedata.category(character)[0] in "CZ" or BLANK_CHARACTERS.match(character) is not None


def get_int_arg(name, minimum=1, maximum=MAX_ID):
    """Return an integer of the query string, or None if it is missing; abort with 400 if it is not within bounds."""
    value = request.args.get(name)
    if value is None:
        return None
    if not re.fullmatch("[0-9]{1,19}", value) or not minimum <= int(value) <= maximum:
        abort(400, f"{name} must be an integer from {minimum} to {maximum}")
    return int(value)


def get_idempotency_key():
    """Return the request's Idempotency-Key, or None; abort with 400 if it is invalid."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not re.fullmatch("[!-~]{1,255}", key):
        abort(400, "Idempotency-Key must be 1 to 255 visible ASCII characters")
    return key


def get_last_event_id(reply_id):
    """Return the Last-Event-ID of a resumed stream as (number of characters received, whether the end was received).

    (None, False) without that header, or if it belongs to another reply.
    """
    match = re.fullmatch(r"([0-9]{1,19}) ([0-9]{1,9})( end)?", request.headers.get("Last-Event-ID", ""))
    if match and int(match[1]) == reply_id:
        return int(match[2]), bool(match[3])
    return None, False


def prefers_async():
    """Return whether the client asks for an answer at once, by `Prefer: respond-async` (RFC 7240)."""
    preferences = ",".join(request.headers.getlist("Prefer")).split(",")
    return any(preference.partition(";")[0].strip().lower() == "respond-async" for preference in preferences)


def wants_stream():
    """Return whether the client prefers server-sent events to JSON; if equally, the one that it lists first."""
    accept = MIMEAccept([(value.partition(";")[0].strip(), quality) for value, quality in request.accept_mimetypes])
    stream, json = accept["text/event-stream"], accept["application/json"]
    if stream != json:
        return stream > json
    return -1 < accept.find("text/event-stream") < accept.find("application/json")


class IdConverter(BaseConverter):
    """An id in a path: a positive integer below 2^63 without leading zeros."""

    regex = "[1-9][0-9]{0,18}"

    def to_python(self, value):
        id = int(value)
        if id > MAX_ID:
            abort(404)  # for ValidationError, Werkzeug may answer 405
        return id
