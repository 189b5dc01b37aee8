"""Invalid bodies, fields and ids: what is refused, and that nothing changes then."""

import json
import random
from io import BytesIO
from itertools import product

import pytest

from app import create_app, db
from tests.conftest import CHEAP_HASH, DATABASES, PASSWORD, Client, create_logged_in_client, create_postgresql_database
from tests.conftest import migrate as migrate_database

CONVERSATION = "/api/conversations/1"
ENDPOINTS = {
    "signup": ("POST", "/api/signup", {"username": "eve", "password": PASSWORD}),
    "login": ("POST", "/api/login", {"username": "ada", "password": PASSWORD}),
    "create": ("POST", "/api/conversations", {"name": "New"}),
    "rename": ("PUT", CONVERSATION, {"name": "New"}),
    "rename with PATCH": ("PATCH", CONVERSATION, {"name": "New"}),
    "send": ("POST", f"{CONVERSATION}/messages", {"text": "Hello"}),
    "edit": ("PUT", f"{CONVERSATION}/messages/1", {"text": "Hello"}),
    "change password": ("PUT", "/api/password", {"current_password": PASSWORD, "new_password": PASSWORD}),
    "delete account": ("DELETE", "/api/account", {"password": PASSWORD}),
}
MAX_LENGTHS = {"username": 80, "name": 255, "text": 100_000}
FIELDS = [(*endpoint, field) for endpoint in ENDPOINTS.values() for field in endpoint[2]]
USERNAME_ENDPOINTS = ["/api/signup", "/api/login"]

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
    *(
        "",
        " ",
        "\t\n\r",
        "\u00a0",
        "\u2003\u3000",
        "\u2028\u2029",
        "\x01\x1f\x7f\x85",
        "\0",
        "\u200b\u200d\u2060",
        "\ufeff",
    ),
    *("\u00ad", "\u202e\u202c", "\u115f\u1160", "\u17b4\u17b5", "\u2800", "\u3164\uffa0", "\ufe0f", "\u034f\u180b"),
    *("\U000e0100", "\U000e0041\U000e007f", "\ue000", "\ufffe", "\U0010ffff"),
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


@pytest.fixture(scope="module", params=DATABASES)
def shared_client(request, tmp_path_factory):
    """A client with the session of ada, who has conversation 1, for requests that change nothing."""
    if request.param == "sqlite":
        yield from create_shared_client(f"sqlite:///{tmp_path_factory.mktemp('validation') / 'chat.db'}")
    else:
        with create_postgresql_database() as url:
            yield from create_shared_client(url)


def create_shared_client(url):
    migrate_database(url)
    app = create_app({"DATABASE_URL": url, "PASSWORD_HASH_METHOD": CHEAP_HASH})
    app.test_client_class = Client
    client = create_logged_in_client(app, "ada")
    client.send_message(client.create_conversation())
    client.observed = client.observe()
    yield client
    app.extensions["replies"].shutdown(timeout=0)
    with app.app_context():
        db.engine.dispose()


@pytest.fixture
def unchanged(shared_client):
    """The shared client; after the test, nothing that it can see may have changed."""
    yield shared_client
    assert shared_client.observe() == shared_client.observed


# Bodies


def test_body_that_is_not_json_returns_400(unchanged):
    for body in NOT_JSON:
        error = get_error(send_raw(unchanged, *ENDPOINTS["create"][:2], body))
        assert error.startswith("The body must be valid JSON"), body[:20]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_body_that_is_not_an_object_returns_400(unchanged, endpoint):
    method, path, _ = ENDPOINTS[endpoint]
    for body in NOT_AN_OBJECT:
        assert get_error(send_raw(unchanged, method, path, body)) == "The body must be a JSON object", body


@pytest.mark.parametrize("field", ["name", "unknown"])
def test_value_that_is_not_json_returns_400(unchanged, field):
    for value in NOT_JSON_VALUES:
        body = f'{{"name": "New", "{field}": {value}}}'
        error = get_error(send_raw(unchanged, *ENDPOINTS["create"][:2], body))
        assert error.startswith("The body must be valid JSON"), value[:20]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_surrogate_returns_400_on_every_endpoint(unchanged, endpoint):
    method, path, body = ENDPOINTS[endpoint]
    for field in body:
        data = json.dumps({**body, field: "\ud800"})
        assert get_error(send_raw(unchanged, method, path, data)).startswith("The body must be valid JSON")


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_body_of_another_content_type_returns_415(unchanged, endpoint):
    method, path, body = ENDPOINTS[endpoint]
    for content_type in NOT_JSON_TYPES:
        response = send_raw(unchanged, method, path, json.dumps(body), content_type=content_type)
        assert (response.status_code, response.json) == (415, {"error": "Content-Type must be application/json"})


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
@pytest.mark.parametrize("body", [b' {"name":"New","unknown":[1e300]}\r\n', b'\xef\xbb\xbf{"name": "New"}'])
def test_json_in_any_spelling_is_accepted(ada, content_type, body):
    response = send_raw(ada, "POST", "/api/conversations", body, content_type=content_type)
    assert (response.status_code, response.json["name"]) == (201, "New")


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_body_above_2_mib_returns_413_and_one_of_2_mib_is_accepted(ada, endpoint):
    method, path, body = ENDPOINTS[endpoint]
    ada.send_message(ada.create_conversation())
    before = ada.observe()
    data = json.dumps(body).ljust(2**21 + 1).encode()
    response = send_raw(ada, method, path, data)
    assert (response.status_code, response.json) == (413, {"error": "The body must be at most 2 MiB"})
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
    environ = {
        "CONTENT_LENGTH": "",
        "CONTENT_TYPE": "application/json",
        "HTTP_TRANSFER_ENCODING": "chunked",
        "wsgi.input_terminated": True,
    }
    stream = BytesIO(NEW.ljust(size).encode())
    response = ada.post("/api/conversations", input_stream=stream, environ_overrides=environ)
    assert response.status_code == status
    assert len(ada.list_conversations()) == (status == 201)


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/api/conversations"), ("POST", "/api/logout/1"), ("DELETE", CONVERSATION)]
)
def test_body_shorter_than_its_length_returns_400(unchanged, method, path):
    environ = {"CONTENT_LENGTH": str(len(NEW) + 1)}
    response = send_raw(unchanged, method, path, NEW, environ_overrides=environ)
    assert get_error(response) == "Incomplete request body"


# Fields


@pytest.mark.parametrize(("method", "path", "body", "field"), FIELDS)
def test_field_that_is_not_a_string_returns_400_that_names_it(unchanged, method, path, body, field):
    without = {name: value for name, value in body.items() if name != field}
    for body in (without, *({**body, field: value} for value in NOT_A_STRING)):
        error = get_error(send_raw(unchanged, method, path, json.dumps(body)))
        assert error in (f"{field} must be a string", "name or archived is required"), body


@pytest.mark.parametrize(("method", "path", "body", "field"), FIELDS)
def test_field_out_of_bounds_returns_400_that_names_field_and_rule(unchanged, method, path, body, field):
    max_length = MAX_LENGTHS.get(field, 1024)
    for value in ("", " ", "\u200b", "\0", "😀" * (max_length + 1)):
        data = json.dumps({**body, field: value}, ensure_ascii=False)
        error = get_error(send_raw(unchanged, method, path, data))
        assert error == f"{field} must be 1 to {max_length} characters long and not blank", value[:5]
    error = get_error(send_raw(unchanged, method, path, json.dumps({**body, field: "a\0b"})))
    assert error.startswith(f"{field} must not contain {'' if field == 'username' else 'NUL'}")


@pytest.mark.parametrize("endpoint", ["create", "send", "signup"])
def test_field_with_nothing_visible_returns_400(unchanged, endpoint):
    method, path, body = ENDPOINTS[endpoint]
    for value, field in product(BLANK, body):
        response = unchanged.open(path, method=method, json={**body, field: value})
        assert get_error(response).startswith(field), ascii(value)


@pytest.mark.parametrize("path", USERNAME_ENDPOINTS)
def test_username_that_could_look_like_another_or_is_too_long_after_nfkc_returns_400(unchanged, path):
    for username in INVALID_USERNAMES:
        response = unchanged.post(path, json={"username": username, "password": PASSWORD})
        assert get_error(response).startswith("username must "), ascii(username)


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
    body = {"text": "Hello"} if method == "PUT" else None
    for id in INVALID_IDS:
        response = unchanged.open(path.format(id), method=method, json=body)
        assert (response.status_code, list(response.json)) == (404, ["error"]), id


# Anything


class RandomValues:
    """Random values of JSON with characters that programs trip over."""

    CHARACTERS = 'aA0 \t\n\0\x7f\x85\xa0é"\\/<>&%;{}[]\u0301\u200b\u202e\u2028\ufeff\uffff😀\U0010ffff'
    SCALARS = [None, True, False, 0, -1, 0.1, 1e300, 2**31, 2**63, 2**64, -(2**63)]

    def __init__(self, seed):
        self.random = random.Random(seed)

    def create(self, depth=3):
        """Return a value nested at most so deep."""
        kind = self.random.randrange(8 if depth else 5)
        if kind < 3:
            return self.create_string()
        if kind == 3:
            return self.random.choice(self.SCALARS)
        if kind == 4:
            return "".join(self.random.choices("ab \u0301ﷺﬀ", k=80))
        values = [self.create(depth - 1) for _ in range(self.random.randrange(4))]
        return values if kind < 7 else {self.create_string(): value for value in values}

    def create_string(self):
        return "".join(self.random.choices(self.CHARACTERS, k=self.random.choice((0, 1, 2, 10, 80, 300))))


def test_random_values_of_fields_are_no_server_errors(ada):
    values = RandomValues(seed=7)
    ada.send_message(ada.create_conversation())
    statuses = set()
    for method, path, body, field in FIELDS * 15:
        body = {**body, field: values.create()}
        response = send_raw(ada, method, path, json.dumps(body))
        assert response.status_code < 500, (method, path, body)
        statuses.add(response.status_code)
    assert statuses >= {200, 201, 400, 401}


def test_blank_value_costs_one_look_at_each_different_character(client, monkeypatch):
    looks = []
    monkeypatch.setattr("app.validation.is_invisible", lambda character: looks.append(character) or True)
    for username in (" \t" * 40, " " * 1_000_000):
        assert client.signup(username).status_code == 400
    assert sorted(looks) == ["\t", " "]
