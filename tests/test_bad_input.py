"""What is refused, and how: bodies, fields, ids, paths, methods, origins; and the headers that every answer has."""

import itertools
import json
import random
import re

import pytest

from tests.conftest import PASSWORD

TALK = "/api/conversations/1"
ENDPOINTS = [
    ("POST", "/api/signup", {"username": "eve", "password": PASSWORD}),
    ("POST", "/api/login", {"username": "ada", "password": PASSWORD}),
    ("POST", "/api/conversations", {"name": "New"}),
    ("PUT", TALK, {"name": "New"}),
    ("POST", f"{TALK}/messages", {"text": "Hello"}),
    ("PUT", "/api/password", {"current_password": PASSWORD, "new_password": PASSWORD}),
    ("DELETE", "/api/account", {"password": PASSWORD}),
]
FIELDS = [(method, path, body, field) for method, path, body in ENDPOINTS for field in body]
LONGEST = {"username": 80, "name": 255, "text": 100_000}
WRITES = [*ENDPOINTS[:-1], ("DELETE", TALK, None), ("POST", "/api/logout/1", None), ENDPOINTS[-1]]  # in this order
KNOWN = "http://localhost:3000"
DEEP = "[" * 5000 + "]" * 5000
LONG_NUMBER = "1" * 5000


@pytest.fixture
def ada(ada):
    """Ada, whose user_id and only conversation are 1."""
    ada.create("Talk")
    return ada


def send_raw(client, method, path, data, **kwargs):
    return client.open(path, method=method, data=data, **{"content_type": "application/json", **kwargs})


def refusal(response):
    """Return the status and the sentence of an error, once it is sure that it looks as every error does."""
    assert response.content_type == "application/json"
    assert list(response.json) == ["error"]
    assert isinstance(response.json["error"], str)
    assert response.json["error"].strip()
    return response.status_code, response.json["error"]


def everything(client):
    """Return all that a write could have changed and that can be seen."""
    return client.get("/api/conversations").json, client.get("/api/users/status").json


def of_every_kind(make_app, **headers):
    """Return answers of every status that there is, each to a request with `headers`."""
    app = make_app(LOGIN_RATE_LIMIT="1 per minute", PROPAGATE_EXCEPTIONS=False)
    ada = app.test_client()
    ada.signup("ada")
    ada.login("ada")
    talk = ada.create("Talk")
    ada.environ_base.update({f"HTTP_{name.upper()}": value for name, value in headers.items()})
    app.extensions["bot"] = lambda history: 1 / 0
    crash = ada.send(talk)
    answers = [
        ada.get("/api/test"),
        ada.get("/api/conversations"),
        ada.post("/api/conversations", json={"name": "New"}),
        ada.delete(f"/api/conversations/{talk}"),
        ada.options("/api/conversations", headers={"Access-Control-Request-Method": "PUT"}),
        ada.post("/api/conversations", json={}),
        app.test_client().get("/api/conversations", environ_base=ada.environ_base),
        ada.post("/api/logout/2"),
        ada.delete(f"/api/conversations/{talk}"),
        ada.get("/nowhere"),
        ada.patch("/api/conversations"),
        send_raw(ada, "POST", "/api/login", b" " * (2**20 + 1)),
        ada.post("/api/conversations"),
        ada.login("ada", "wrong"),
        ada.login("ada", "wrong"),
        crash,
    ]
    return {f"{n}: {answer.status_code}": answer for n, answer in enumerate(answers)}


# Bodies


@pytest.mark.parametrize(("method", "path", "body"), ENDPOINTS)
def test_a_body_that_is_no_json_object_is_refused(ada, method, path, body):
    before = everything(ada)
    good = json.dumps(body)
    bodies = [
        *("", " ", "[]", f"[{good}]", '"x"', "5", "true", "null", "{", "}", good[:-1], f"{good}x", f"{good}{good}"),
        *(f"{good},", good.replace('"', "'"), good.replace("}", ",}"), f"/**/{good}", f"\ufeff{good}", f"{good}\0"),
        *(good.encode("utf-16"), good.encode("utf-32"), good.replace("e", "\xe9").encode("latin-1"), b"\xff", b"\x80"),
        *("NaN", "1e999", DEEP, LONG_NUMBER, "[" * 5000, '{"a":' * 5000),
    ]
    for value in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "01", "1.", DEEP, LONG_NUMBER, f"-{LONG_NUMBER}"):
        bodies += [json.dumps({**body, "unknown": "?"}).replace('"?"', value)]
        bodies += [json.dumps({**body, field: "?"}).replace('"?"', value) for field in body]
    for surrogate in (r'"\ud800"', r'"\udc00"', r'"a\udfffb"', r'"\udc00\ud800"', b'"\xed\xa0\x80"'.decode("latin-1")):
        bodies += [json.dumps({**body, field: "?"}).replace('"?"', surrogate).encode("latin-1") for field in body]
        bodies += [json.dumps({**body, "unknown": "?"}).replace('"?"', surrogate).encode("latin-1")]
        bodies += [good.replace("{", f"{{{surrogate}: 1, ").encode("latin-1")]
    for bad in bodies:
        status, said = refusal(send_raw(ada, method, path, bad))
        assert status == 400, (bad[:80], said)
    assert everything(ada) == before


def test_a_field_that_is_not_what_it_should_be_is_named(ada):
    before = everything(ada)
    for method, path, body, field in FIELDS:
        bad = [None, 0, 5, -1.5, 2**70, True, False, [], ["a"], [body[field]], {}, {"a": "b"}, {field: "a"}]
        bad += ["", " ", "\t\n\u3000", "\0", "a\0b", "a" * (LONGEST.get(field, 1024) + 1), "a" * 1_000_000]
        without = {name: value for name, value in body.items() if name != field}
        for wrong in [without, *({**body, field: value} for value in bad)]:
            status, said = refusal(send_raw(ada, method, path, json.dumps(wrong)))
            assert (status, said.split()[0]) == (400, field), (method, path, str(wrong)[:80])
    assert everything(ada) == before


def test_a_body_of_another_type_is_refused(ada):
    before = everything(ada)
    types = [
        None,
        "",
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
    ]
    for method, path, body in ENDPOINTS:
        for content_type in types:
            response = send_raw(ada, method, path, json.dumps(body), content_type=content_type)
            assert refusal(response) == (415, "Content-Type must be application/json"), (method, path, content_type)
        assert refusal(ada.open(path, method=method))[0] == 415
        assert refusal(ada.open(path, method=method, data=body))[0] == 415
    assert everything(ada) == before


def test_json_by_any_spelling_is_read(ada):
    body = b' {"name":"New","unknown":[1e300]}\r\n'
    for content_type in ("application/json", "application/json; charset=utf-8", "Application/JSON"):
        response = send_raw(ada, "POST", "/api/conversations", body, content_type=content_type)
        assert (response.status_code, response.json["name"]) == (201, "New")


def test_a_body_over_one_mebibyte_is_refused(ada):
    for method, path, body in WRITES:
        ada.login("ada")
        before = everything(ada)
        padded = json.dumps(body).ljust(2**20 + 1).encode()
        assert refusal(send_raw(ada, method, path, padded)) == (413, "The body must be at most 1 MiB")
        assert everything(ada) == before
        assert send_raw(ada, method, path, padded[:-1]).status_code in (200, 201, 204), (method, path)


# Paths


def test_an_id_that_is_none_is_not_found(ada):
    before = everything(ada)
    ids = [*("0", "-1", "+1", "007", "01", "1.0", "1e0", "0x1", "abc", "\u0661", "\uff11", "²", "%00", "1%00", "1%20")]
    ids += ["2147483648", "9223372036854775807", "9223372036854775808", "18446744073709551617", "9" * 400, "1,2", "1;1"]
    for number in ids:
        for method, path, body in [write for write in WRITES if TALK in write[1]]:
            response = ada.open(path.replace("1", number), method=method, json=body)
            assert refusal(response)[0] == 404, (number, method, path)
    assert everything(ada) == before


def test_nobody_logs_out_by_an_id_that_is_none(ada):
    for number in ("0", "-1", "01", "1.0", "abc", "\u0661", "9223372036854775808", "9" * 400):
        assert refusal(ada.post(f"/api/logout/{number}"))[0] == 404, number
    assert ada.is_logged_in()


def test_an_unknown_path_is_not_found(ada):
    for path in (
        "/nowhere",
        "/api",
        "/api/",
        "/API/test",
        "/api/test/",
        "/api//test",
        f"{TALK}/",
        "/api/logout",
        "/😀",
    ):
        for method in ("GET", "POST", "DELETE"):
            assert refusal(ada.open(path, method=method)) == (404, "Not found"), path


def test_a_wrong_method_is_told_the_right_ones(ada):
    for method, path, allowed in [
        ("GET", "/api/signup", {"POST"}),
        ("GET", "/api/login", {"POST"}),
        ("GET", "/api/logout/1", {"POST"}),
        ("POST", "/api/test", {"GET"}),
        ("POST", "/api/users/status", {"GET"}),
        ("DELETE", "/api/conversations", {"GET", "POST"}),
        ("PATCH", TALK, {"PUT", "DELETE"}),
        ("PUT", f"{TALK}/messages", {"POST"}),
    ]:
        response = ada.open(path, method=method)
        assert refusal(response) == (405, "Method not allowed")
        told = set(response.headers["Allow"].split(", "))
        assert allowed <= told
        assert method not in told


# Errors


def test_every_error_is_one_sentence_of_json(make_app):
    answers = of_every_kind(make_app)
    statuses = [answer.status_code for answer in answers.values()]
    assert statuses == [200, 200, 201, 204, 200, 400, 401, 403, 404, 404, 405, 413, 415, 401, 429, 500]
    for answer in answers.values():
        if answer.status_code >= 400:
            refusal(answer)


def test_a_crash_tells_its_cause_to_the_log_only(make_app, caplog):
    app = make_app(PROPAGATE_EXCEPTIONS=False)
    ada = app.test_client()
    ada.signup("ada")
    ada.login("ada")

    def bot(history):
        raise RuntimeError("the cause")
        yield

    app.extensions["bot"] = bot
    response = ada.send(ada.create())
    assert refusal(response) == (500, "Internal server error")
    assert "the cause" not in f"{response.text} {response.headers}"
    assert "RuntimeError: the cause" in caplog.text


def test_nothing_that_is_sent_crashes_the_server(app, ada):
    chance = random.Random(7)
    characters = 'aA0 \t\n\0\x7f\x85\xa0é"\\/<>&%;{}[]\u0301\u200b\u202e\u2028\ufeff\uffff😀\U0010ffff'

    def anything(depth=3):
        kind = chance.randrange(8 if depth else 5)
        if kind < 3:
            return "".join(chance.choices(characters, k=chance.choice((0, 1, 2, 10, 80, 300))))
        if kind == 3:
            return chance.choice((None, True, False, 0, -1, 0.1, 1e300, 2**31, 2**63, 2**64, -(2**63)))
        if kind == 4:
            return "".join(chance.choices("ab \u0301ﷺﬀ", k=80))
        if kind < 7:
            return [anything(depth - 1) for _ in range(chance.randrange(4))]
        return {str(anything(0)): anything(depth - 1) for _ in range(chance.randrange(4))}

    seen = set()
    for _ in range(15):
        for method, path, body, field in FIELDS:
            bad = {**body, field: anything()}
            response = send_raw(ada, method, path, json.dumps(bad))
            assert response.status_code < 500, (method, path, bad)
            seen.add(response.status_code)
    assert seen >= {200, 201, 400, 401}


# Origins


def test_a_page_of_an_unknown_origin_writes_nothing(ada):
    before = everything(ada)
    origins = [
        *(
            "https://evil.example",
            "null",
            "",
            "http://localhost:3001",
            "https://localhost:3000",
            "http://localhost:30000",
        ),
        *(
            "http://localhost.evil.example",
            "http://localhost:3000.evil.example",
            "http://evil.example/http://localhost",
        ),
        *("https://localhost", "http://user@localhost", "http://127.0.0.1:3000", f"{KNOWN}, {KNOWN}", "file://", "*"),
    ]
    for (method, path, body), origin in itertools.product(WRITES, origins):
        response = ada.open(path, method=method, json=body, headers={"Origin": origin})
        assert refusal(response) == (403, "Origin not allowed"), (method, path, origin)
        assert "Set-Cookie" not in response.headers
    assert everything(ada) == before


@pytest.mark.parametrize("origin", [None, "http://localhost", KNOWN])
def test_a_page_of_a_known_origin_writes(ada, origin):
    for method, path, body in WRITES:
        ada.login("ada")
        response = ada.open(path, method=method, json=body, headers={"Origin": origin} if origin else {})
        assert response.status_code in (200, 201, 204), (method, path)


def test_the_server_s_own_origin_is_the_one_it_is_reached_by(ada):
    own = {"Origin": "https://chat.example.com"}
    body = {"username": "ada", "password": PASSWORD}
    assert ada.post("/api/login", json=body, headers=own, base_url="https://chat.example.com").status_code == 200
    assert refusal(ada.post("/api/login", json=body, headers=own))[0] == 403


def test_the_origins_that_may_write_are_a_setting(make_app):
    client = make_app(CORS_ORIGINS="https://one.example,https://two.example:8443").test_client()
    origins = ["https://one.example", "https://two.example:8443", "https://two.example", KNOWN]
    body = {"username": "nobody", "password": PASSWORD}
    statuses = [client.post("/api/login", json=body, headers={"Origin": origin}).status_code for origin in origins]
    assert statuses == [401, 401, 403, 403]


def test_a_page_of_a_known_origin_reads_every_answer(make_app):
    for name, answer in of_every_kind(make_app, origin=KNOWN).items():
        assert answer.headers["Access-Control-Allow-Origin"] == KNOWN, name
        assert answer.headers["Access-Control-Allow-Credentials"] == "true", name


def test_a_page_of_an_unknown_origin_reads_no_answer(make_app):
    answers = of_every_kind(make_app, origin="https://evil.example")
    assert [answer.status_code for answer in answers.values()][:4] == [200, 200, 403, 403]
    for name, answer in answers.items():
        assert not [header for header, _ in answer.headers if header.startswith("Access-Control")], name


def test_a_preflight_lets_a_known_origin_pass(client):
    for method, path, _ in WRITES:
        asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": "content-type"}
        response = client.options(path, headers={"Origin": KNOWN, **asked})
        assert response.status_code == 200
        assert response.headers["Access-Control-Allow-Origin"] == KNOWN
        assert response.headers["Access-Control-Allow-Credentials"] == "true"
        assert method in response.headers["Access-Control-Allow-Methods"]
        assert response.headers["Access-Control-Allow-Headers"] == "content-type"
        assert response.headers["Access-Control-Max-Age"] == "600"


# Headers


@pytest.mark.parametrize("headers", [{}, {"origin": KNOWN}])
def test_every_answer_says_how_it_is_to_be_kept(make_app, headers):
    answers = of_every_kind(make_app, **headers)
    for name, answer in answers.items():
        assert "Origin" in answer.vary, name
        assert answer.headers["X-Content-Type-Options"] == "nosniff", name
        kept = "private, no-cache" if "ETag" in answer.headers else "no-store"
        assert answer.headers["Cache-Control"] == kept, name
    assert len({answer.headers["X-Request-ID"] for answer in answers.values()}) == len(answers)


def test_an_answer_bears_the_request_id_that_a_proxy_gave(make_app, caplog):
    for answer in of_every_kind(make_app, x_request_id="abc-1.2_3").values():
        assert answer.headers["X-Request-ID"] == "abc-1.2_3"
    assert "abc-1.2_3" in caplog.text


def test_a_request_id_that_is_none_is_replaced(client):
    for given in ("", " ", "a b", "a" * 65, "é", "<script>", "a;b"):
        made = client.get("/api/test", headers={"X-Request-ID": given}).headers["X-Request-ID"]
        assert re.fullmatch("[0-9a-f]{16}", made), given
