"""Invalid bodies, fields and ids: what is refused, and that nothing changes then."""

import json
from io import BytesIO
from itertools import product

import pytest

from tests.conftest import PASSWORD, WRITES
from tests.helpers.data import get_answer

CONVERSATION = "/api/conversations/1"
ENDPOINTS = [write for write in WRITES if write[2]]
MAX_LENGTHS = {"username": 80, "name": 255, "text": 100_000}
FIELDS = [(*endpoint, field) for endpoint in ENDPOINTS for field in endpoint[2]]

NEW = '{"name": "New"}'
DEEP = "[" * 5000 + "]" * 5000
LONG_NUMBER = "1" * 5000
NOT_JSON = [
    *("", " ", "{", "}", NEW[:-1], f"{NEW}x", NEW * 2, f"{NEW},", NEW.replace('"', "'"), NEW.replace("}", ",}")),
    *(f"/**/{NEW}", f"{NEW}\0", f"\ufeff\ufeff{NEW}", "NaN", "1e999", DEEP, "[" * 5000, '{"a":' * 5000),
    *(NEW.encode("utf-16"), NEW.encode("utf-32"), NEW.replace("e", "é").encode("latin-1"), b"\xff", b"\x80"),
]
NOT_AN_OBJECT = ["[]", f"[{NEW}]", '"x"', '"name"', "5", "true", "null"]
NOT_JSON_TYPES = [
    *(None, "", "text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x")
]
NOT_JSON_VALUES = [
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "01", "1.", DEEP, LONG_NUMBER, f"-{LONG_NUMBER}"),
    *(r'"\ud800"', r'"\udc00"', r'"a\udfffb"', r'"\udc00\ud800"', '"\t"', r'"\x41"', r'"\u00"'),
]
NOT_A_STRING = [None, 0, 5, -1.5, 2**70, True, False, [], ["a"], {}, {"a": "b"}]
BLANK = [
    *("", " ", "\t\n\r", "\u00a0", "\u2003\u3000", "\u2028\u2029", "\x01\x1f\x7f\x85", "\0", "\u200b\u200d\u2060"),
    *("\ufeff", "\u00ad", "\u202e\u202c", "\u115f\u1160", "\u17b4\u17b5", "\u2800", "\u3164\uffa0", "\ufe0f"),
    *("\u034f\u180b", "\U000e0100", "\U000e0041\U000e007f", "\ue000", "\ufffe", "\U0010ffff"),
]
INVALID_USERNAMES = [
    *(f"a{character}b" for character in "\0\x01\b\n\x1f\x7f\x85\u00ad\u200b\u200d\u2028\u202e\ufeff\ufe0f\u034f\ue000"),
    *(username for blank in " \t\n\u00a0\u2003\u3000\u200b\ufe0f" for username in (f"{blank}ada", f"ada{blank}")),
    *("a\u3164b", "a\uffa0b", "a\u115fb", "a\u2800b", "a\U000e0100b", "\u00a8", "ﬀ" * 41, "ﷺ" * 5),
]
INVALID_IDS = ["0", "-1", "+1", "01", "1.0", "1e0", "abc", "\u0661", "%00", "1%20", "1,2", str(2**63), "9" * 400]


def send_raw(client, method, path, data, **kwargs):
    return client.open(path, method=method, data=data, **{"content_type": "application/json", **kwargs})


def get_error(response):
    """Return the sentence of a response that is a well-formed 400."""
    assert response.status_code == 400, response.text[:200]
    assert list(response.json) == ["error"]
    return response.json["error"]


@pytest.fixture
def unchanged(ada):
    """A client with the session of ada, who has conversation 1; after the test, nothing may have changed for her."""
    ada.send_message(ada.create_conversation())
    before = ada.observe()
    yield ada
    assert ada.observe() == before


# Bodies


def test_body_that_is_not_json_returns_400(unchanged):
    values = product(("name", "unknown"), NOT_JSON_VALUES)
    for body in (*NOT_JSON, *(f'{{"name": "New", "{field}": {value}}}' for field, value in values)):
        error = get_error(send_raw(unchanged, "POST", "/api/conversations", body))
        assert error.startswith("The body must be valid JSON"), body[:50]


def test_body_that_is_not_an_object_returns_400(unchanged):
    for (method, path, _), body in product(ENDPOINTS, NOT_AN_OBJECT):
        error = get_error(send_raw(unchanged, method, path, body))
        assert error == "The body must be a JSON object", (method, path, body)


def test_body_of_another_content_type_returns_415(unchanged):
    for (method, path, body), content_type in product(ENDPOINTS, NOT_JSON_TYPES):
        response = send_raw(unchanged, method, path, json.dumps(body), content_type=content_type)
        assert get_answer(response) == (415, {"error": "Content-Type must be application/json"}), (method, path)


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
@pytest.mark.parametrize("body", [b' {"name":"New","unknown":[1e300]}\r\n', b'\xef\xbb\xbf{"name": "New"}'])
def test_json_in_any_spelling_is_accepted(ada, content_type, body):
    response = send_raw(ada, "POST", "/api/conversations", body, content_type=content_type)
    assert (response.status_code, response.json["name"]) == (201, "New")


@pytest.mark.parametrize(("method", "path", "body"), ENDPOINTS)
def test_body_above_2_mib_returns_413_and_one_of_2_mib_is_accepted(ada, method, path, body):
    ada.send_message(ada.create_conversation())
    before = ada.observe()
    data = json.dumps(body).ljust(2**21 + 1).encode()
    assert get_answer(send_raw(ada, method, path, data)) == (413, {"error": "The body must be at most 2 MiB"})
    assert ada.observe() == before
    assert send_raw(ada, method, path, data[:-1]).status_code in (200, 201, 204)


class BodyStream(BytesIO):
    """The input stream of a complete body, which a development server's client does not end."""

    def read(self, size=-1):
        assert self.tell() < len(self.getvalue()), "a read beyond the end waits for ever"
        return super().read(size)


def test_body_of_exactly_2_mib_is_not_read_beyond_its_end(ada):
    stream = BodyStream(NEW.ljust(2**21).encode())
    response = ada.post("/api/conversations", input_stream=stream, content_type="application/json")
    assert response.status_code == 201


@pytest.mark.parametrize(("size", "status"), [(2**21, 201), (2**21 + 1, 413)])
def test_chunked_body_is_limited_to_2_mib(ada, size, status):
    environ = {"CONTENT_LENGTH": "", "HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
    environ["CONTENT_TYPE"] = "application/json"
    stream = BytesIO(NEW.ljust(size).encode())
    response = ada.post("/api/conversations", input_stream=stream, environ_overrides=environ)
    assert response.status_code == status
    assert len(ada.list_conversations()) == (status == 201)


def test_body_shorter_than_its_length_returns_400(unchanged):
    environ = {"CONTENT_LENGTH": str(len(NEW) + 1)}
    for method, path in (("POST", "/api/conversations"), ("POST", "/api/logout/1"), ("DELETE", CONVERSATION)):
        response = send_raw(unchanged, method, path, NEW, environ_overrides=environ)
        assert get_error(response) == "Incomplete request body", (method, path)


# Fields


def test_field_that_is_not_a_string_returns_400_that_names_it(unchanged):
    for method, path, body, field in FIELDS:
        without = {name: value for name, value in body.items() if name != field}
        for invalid in (without, *({**body, field: value} for value in NOT_A_STRING)):
            error = get_error(send_raw(unchanged, method, path, json.dumps(invalid)))
            assert error in (f"{field} must be a string", "name or archived is required"), invalid


def test_field_that_is_blank_or_too_long_or_has_a_nul_returns_400_that_names_field_and_rule(unchanged):
    for method, path, body, field in FIELDS:
        max_length = MAX_LENGTHS.get(field, 1024)
        for value in (*BLANK, "😀" * (max_length + 1)):
            data = json.dumps({**body, field: value}, ensure_ascii=False)
            error = get_error(send_raw(unchanged, method, path, data))
            assert error == f"{field} must be 1 to {max_length} characters long and not blank", ascii(value[:5])
        error = get_error(send_raw(unchanged, method, path, json.dumps({**body, field: "a\0b"})))
        assert error.startswith(f"{field} must not contain {'' if field == 'username' else 'NUL'}")


def test_username_that_could_look_like_another_or_is_too_long_after_nfkc_returns_400(unchanged):
    for path, username in product(("/api/signup", "/api/login"), INVALID_USERNAMES):
        response = unchanged.post(path, json={"username": username, "password": PASSWORD})
        assert get_error(response).startswith("username must "), (path, ascii(username))


# Ids


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/logout/{}"),
        ("GET", "/api/conversations/{}"),
        ("GET", f"{CONVERSATION}/messages/{{}}"),
        ("PUT", f"{CONVERSATION}/messages/{{}}"),
        ("GET", f"{CONVERSATION}/messages/{{}}/events"),
        ("POST", f"{CONVERSATION}/messages/{{}}/stop"),
    ],
)
def test_invalid_id_returns_404(unchanged, method, path):
    for id in INVALID_IDS:
        response = unchanged.open(path.format(id), method=method, json={"text": "Hello"} if method == "PUT" else None)
        assert (response.status_code, [*response.json]) == (404, ["error"]), id
