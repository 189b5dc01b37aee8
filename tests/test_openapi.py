"""The API described (app/openapi.json) and the API as it is: that they cannot drift apart."""

import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from importlib.util import find_spec
from itertools import count
from urllib.parse import urlencode, urlsplit

import pytest

from app.bot import BotTimeout
from app.routes import PAGE
from app.routes.auth import PASSWORD_LENGTH, USERNAME_LENGTH
from app.routes.chat import MESSAGES, NAME_LENGTH, PAUSE, TEXT_LENGTH
from app.sql import MAX_ID
from tests.conftest import PASSWORD, Client
from tests.serving import PATIENCE, ROOT, free_port
from tests.test_browsers import FLAGS

FILE = ROOT / "app" / "openapi.json"
DOCUMENT = json.loads(FILE.read_text())
METHODS = ("get", "put", "post", "delete", "patch")
TOLD_HEADERS = {"Allow", "ETag", "Idempotent-Replayed", "Link", "Location", "Retry-After", "Set-Cookie", "X-Request-ID"}
SQLITE_ONLY = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


def resolved(node):
    """Return what a $ref refers to; anything else as it is."""
    while "$ref" in node:
        found = DOCUMENT
        for key in node["$ref"].removeprefix("#/").split("/"):
            found = found[key]
        node = found
    return node


class Operation:
    """A method of a path, as described."""

    def __init__(self, path, method):
        described = DOCUMENT["paths"][path][method]
        self.path, self.method = path, method.upper()
        self.label = f"{self.method} {path}"
        self.secured = "security" in described
        self.parameters = [
            resolved(parameter)
            for parameter in [*DOCUMENT["paths"][path].get("parameters", ()), *described.get("parameters", ())]
        ]
        self.body = described.get("requestBody", {"content": {}})["content"].get("application/json")
        self.responses = {int(status): resolved(response) for status, response in described["responses"].items()}

    def url(self, **values):
        """Return the path and query string with the parameters of those names, ids being 1 by default."""
        named = {parameter["name"] for parameter in self.parameters if parameter["in"] == "query"}
        query = urlencode({name: value for name, value in values.items() if name in named})
        path = re.sub(r"\{(\w+)\}", lambda name: str(values.get(name[1], 1)), self.path)
        return f"{path}?{query}" if query else path

    def good_body(self):
        return next(iter(self.body["examples"].values()))["value"] if self.body else None

    def fields(self):
        """Return the schemas of the body's fields, by name."""
        properties = resolved(self.body["schema"])["properties"] if self.body else {}
        return {name: resolved(schema) for name, schema in properties.items()}


OPERATIONS = [
    Operation(path, method) for path, item in DOCUMENT["paths"].items() for method in item if method in METHODS
]
WRITES = [operation for operation in OPERATIONS if operation.method != "GET"]
each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)


def operation_of(method, path):
    """Return the operation that a request is meant for, or None."""
    for operation in OPERATIONS:
        if operation.method == method and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", operation.path), path):
            return operation
    return None


@pytest.fixture
def assert_valid():
    """A function that asserts that a value is what a schema of the document says."""
    validation = pytest.importorskip("jsonschema_rs", reason="jsonschema_rs (it comes with schemathesis) is missing")
    validators = {}

    def check(value, schema):
        name = json.dumps(schema)
        if name not in validators:
            whole = {**schema, "components": DOCUMENT["components"]}
            validators[name] = validation.Draft202012Validator(whole, validate_formats=True)
        errors = [error.message for error in validators[name].iter_errors(value)]
        assert not errors, (value, errors)

    return check


def assert_header_valid(assert_valid, text, header):
    schema = header["schema"]
    assert_valid(int(text) if schema["type"] == "integer" else text, schema)


def server_sent(body):
    """Return the events of a stream as (name, data)."""
    return re.findall(r"^event: (\w+)\ndata: (.*)\n\n", body, re.MULTILINE)


def assert_stream_valid(assert_valid, body):
    schemas = {"delta": "Delta", "done": "MessagePair", "error": "Error"}
    events = server_sent(body)
    assert [name for name, _ in events] == ["delta"] * (len(events) - 1) + [events[-1][0]]
    assert events[-1][0] in ("done", "error")
    for name, data in events:
        assert_valid({"event": name, "data": data}, {"$ref": "#/components/schemas/StreamEvent"})
        assert_valid(json.loads(data), {"$ref": f"#/components/schemas/{schemas[name]}"})


class Witness(Client):
    """A client that holds every answer against the document; `seen` is what answers there were, with the body."""

    def open(self, *args, **kwargs):
        response = super().open(*args, buffered=True, **kwargs)
        request, status = response.request, response.status_code
        operation = operation_of(request.method, request.path)
        if operation is None:
            described = DOCUMENT["components"]["responses"][{404: "NotFound", 405: "MethodNotAllowed"}[status]]
        else:
            assert status in operation.responses, (operation.label, status, response.text)
            described = operation.responses[status]
            self.seen.append((operation.label, status, response.text))
        content = described.get("content", {})
        if response.data or content:
            schema = content[response.mimetype]["schema"]
            if response.mimetype == "application/json":
                self.assert_valid(response.json, schema)
            else:
                assert_stream_valid(self.assert_valid, response.text)
        headers = {name: resolved(header) for name, header in described["headers"].items()}
        assert TOLD_HEADERS & set(response.headers.keys()) <= set(headers), (operation.label, status)
        for name, header in headers.items():
            assert name in response.headers or not header.get("required"), (operation.label, status, name)
            for text in response.headers.getlist(name):
                assert_header_valid(self.assert_valid, text, header)
        return response


@pytest.fixture
def walk(make_app, assert_valid, tmp_path):
    """A function that walks through the whole API, errors included; returns the answers: (operation, status, body)."""
    Witness.seen, Witness.assert_valid = [], staticmethod(assert_valid)

    def someone(app, username="ada"):
        app.test_client_class = Witness
        client = app.test_client()
        client.signup(username)
        client.login(username)
        return client

    def go():
        app = make_app(SECRET_KEY="secret", LOGIN_RATE_LIMIT="1000 per minute", SIGNUP_RATE_LIMIT="1000 per minute")
        ada, bob = someone(app), someone(app, "bob")
        nobody = app.test_client()
        talk_well(app, ada)
        go_wrong(ada, bob, nobody)
        be_throttled(someone(make_app(LOGIN_RATE_LIMIT="1 per minute", SIGNUP_RATE_LIMIT="1 per minute"), "carol"))
        ada.put("/api/password", json={"current_password": PASSWORD, "new_password": "battery staple"})
        cookie = ada.session_cookie
        ada.logout()
        bob.delete("/api/account", json={"password": PASSWORD})
        for url in (f"postgresql://chat@127.0.0.1:{free_port()}/chat", f"sqlite:///{tmp_path / 'empty.db'}"):
            same = {"SECRET_KEY": "secret", "SESSIONS_VALID_FROM": "2026-01-01T00:00:00Z"}
            lose_database(make_app(DATABASE_URL=url, **same), cookie)
        return Witness.seen

    return go


def talk_well(app, ada):
    ada.get("/api/test")
    ada.get("/api/current_user")
    first, second = ada.create("First talk"), ada.create("Second talk")
    ada.put(f"/api/conversations/{second}", json={"name": "A better name"})
    for text in ("Hello", "Can machines think?"):
        ada.send(first, text)
    for _ in range(2):
        ada.send(first, "Once", headers={"Idempotency-Key": "once"})
        ada.send(first, "Twice", headers={"Idempotency-Key": "twice", "Accept": "text/event-stream"})
    ada.send(first, "Other", headers={"Idempotency-Key": "once"})
    for command in ("/drop 3", "/fail", "Hello"):
        ada.send(first, command, headers={"Accept": "text/event-stream"})
    ada.send(first, "/fail")
    bot = app.extensions["bot"]
    app.extensions["bot"] = silent
    ada.send(first)
    app.extensions["bot"] = bot
    for operation in OPERATIONS:
        if 304 in operation.responses:
            for values in ({}, {"limit": 1}, {"limit": 1, "before": MAX_ID, "after": 0, "messages": 1, "q": "talk"}):
                answer = ada.get(operation.url(**values))
                ada.get(operation.url(**values), headers={"If-None-Match": answer.headers["ETag"]})
    ada.delete(f"/api/conversations/{second}")


def silent(history):
    raise BotTimeout("silent")
    yield


def go_wrong(ada, bob, nobody):
    nobody.signup("ada")
    nobody.signup(" ada")
    nobody.login("ada", "wrong")
    ada.post(f"/api/logout/{bob.user_id}")
    ada.put("/api/password", json={"current_password": "wrong", "new_password": PASSWORD})
    ada.delete("/api/account", json={"password": "wrong"})
    ada.send(1, headers={"Idempotency-Key": "not visible"})
    ada.send(1, " ")
    for query in ("before=1", "messages=1001", "q="):
        ada.get(f"/api/conversations?{query}")
    ada.get("/api/users/status?after=1")
    ada.get("/api/nothing")
    for operation in OPERATIONS:
        ada.patch(operation.url())
        send = {"method": operation.method, "json": operation.good_body()}
        if 404 in operation.responses:
            for number in (0, 99, MAX_ID + 1):
                ada.open(operation.url(conversation_id=number, user_id=0), **send)
        if operation.secured:
            nobody.open(operation.url(), **send)
        if 400 in operation.responses and operation.method == "GET":
            ada.get(operation.url(limit=0, messages=-1))
    for operation in WRITES:
        ada.open(operation.url(), method=operation.method, data=b"x" * (2**20 + 1))
        ada.open(operation.url(), method=operation.method, headers={"Origin": "https://evil.example"})
        broken = {"data": "{", "environ_overrides": {"CONTENT_LENGTH": "2"}, "content_type": "application/json"}
        ada.open(operation.url(), method=operation.method, **broken)
        if operation.body:
            ada.open(operation.url(), method=operation.method, data={"name": "form"})
            for body in ([], {}, *({**operation.good_body(), name: "\t"} for name in operation.fields())):
                ada.open(operation.url(), method=operation.method, json=body)


def be_throttled(carol):
    carol.signup("carol")
    for _ in range(2):
        carol.login("carol", "wrong")
    carol.put("/api/password", json={"current_password": "wrong", "new_password": PASSWORD})
    carol.delete("/api/account", json={"password": "wrong"})


def lose_database(app, session_cookie):
    app.test_client_class = Witness
    client = app.test_client()
    for operation in OPERATIONS:
        client.set_cookie("session", session_cookie)
        client.open(operation.url(), method=operation.method, json=operation.good_body())


def test_the_document_is_neat():
    assert FILE.read_text() == json.dumps(DOCUMENT, indent=2, ensure_ascii=False) + "\n"
    assert DOCUMENT["openapi"].startswith("3.1.")
    assert DOCUMENT["info"]["title"] == "AI Chatbot Backend"
    assert len(
        {item["operationId"] for path in DOCUMENT["paths"].values() for item in path.values() if "operationId" in item}
    ) == len(OPERATIONS)


def test_its_parts_are_all_there_and_all_used():
    text = FILE.read_text()
    used = set(re.findall(r'"\$ref": "#/components/(\w+)/(\w+)"', text))
    used |= {("securitySchemes", "session"), ("responses", "MethodNotAllowed")}  # the latter may be any path's answer
    assert used == {(kind, name) for kind, parts in DOCUMENT["components"].items() for name in parts}


def test_it_is_valid_openapi():
    package = pytest.importorskip("openapi_spec_validator", reason="openapi-spec-validator is not installed")
    package.validate(DOCUMENT, cls=package.OpenAPIV31SpecValidator)


def test_every_route_is_described_and_nothing_else(app):
    routes = set()
    for rule in app.url_map.iter_rules():
        if rule.endpoint != "index" and not rule.endpoint.startswith("swagger_ui."):
            path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
            routes |= {f"{method} {path}" for method in rule.methods - {"HEAD", "OPTIONS"}}
    assert routes == {operation.label for operation in OPERATIONS}


@each_operation
def test_its_path_parameters_are_described(operation):
    described = [parameter["name"] for parameter in operation.parameters if parameter["in"] == "path"]
    assert described == re.findall(r"\{(\w+)\}", operation.path)


@SQLITE_ONLY
def test_the_document_is_served_as_it_is(client):
    answer = client.get("/api/openapi.json", buffered=True)
    assert (answer.json, answer.mimetype) == (DOCUMENT, "application/json")


def test_every_answer_is_described_and_every_described_answer_is_given(walk):
    given = {(operation, status) for operation, status, _ in walk()}
    assert given == {(operation.label, status) for operation in OPERATIONS for status in operation.responses}


@SQLITE_ONLY
def test_every_described_error_is_one_that_is_given(walk):
    given = {json.loads(body)["error"] for _, status, body in walk() if status >= 400}
    responses = [response for operation in OPERATIONS for response in operation.responses.values()]
    responses.append(resolved({"$ref": "#/components/responses/NotFound"}))
    for response in responses:
        for example in response.get("content", {}).get("application/json", {"examples": {}})["examples"].values():
            if "error" in example["value"]:
                assert example["value"]["error"] in given


@each_operation
def test_the_examples_of_a_request_are_accepted(operation, app, client):
    if operation.path != "/api/signup":
        client.signup("ada")
        if operation.path != "/api/login":
            client.login("ada")
            client.send(client.create())
    url = operation.url(**{parameter["name"]: parameter["example"] for parameter in operation.parameters})
    headers = {
        parameter["name"]: parameter["example"] for parameter in operation.parameters if parameter["in"] == "header"
    }
    for example in (operation.body or {"examples": {"": {"value": None}}})["examples"].values():
        headers.pop("Idempotency-Key" if example["value"] == {"text": "Can machines think?"} else "", None)
        answer = client.open(url, method=operation.method, json=example["value"], headers=headers, buffered=True)
        assert answer.status_code < 300, answer.text


@each_operation
def test_the_examples_of_an_operation_are_as_described(operation, assert_valid):
    for parameter in operation.parameters:
        assert_valid(parameter["example"], parameter["schema"])
    for example in operation.body["examples"].values() if operation.body else ():
        assert_valid(example["value"], operation.body["schema"])
    for response in operation.responses.values():
        for media, content in response.get("content", {}).items():
            assert content["examples"]
            for example in content["examples"].values():
                if media == "text/event-stream":
                    assert_stream_valid(assert_valid, example["value"])
                else:
                    assert_valid(example["value"], content["schema"])
        for header in map(resolved, response["headers"].values()):
            assert_header_valid(assert_valid, str(header["example"]), header)


def test_the_bounds_are_the_program_s(app):
    schemas, parameters = DOCUMENT["components"]["schemas"], DOCUMENT["components"]["parameters"]
    lengths = {"Username": USERNAME_LENGTH, "Password": PASSWORD_LENGTH, "Name": NAME_LENGTH, "Text": TEXT_LENGTH}
    for name, length in lengths.items():
        assert (schemas[name]["minLength"], schemas[name]["maxLength"]) == (1, length)
        assert schemas[name]["description"].startswith(f"1 to {length:,} characters")
    highest = {"Limit": PAGE, "LimitMessages": PAGE, "NewestMessages": MESSAGES}
    for name, parameter in parameters.items():
        schema = parameter["schema"]
        if schema["type"] == "integer":
            assert schema["maximum"] == highest.get(name, MAX_ID)
    assert parameters["Search"]["schema"] == {k: v for k, v in schemas["Name"].items() if k != "description"}
    assert f"every {PAUSE} seconds" in FILE.read_text()
    assert "larger than 1 MiB" in DOCUMENT["components"]["responses"]["TooLarge"]["description"]
    assert app.config["MAX_CONTENT_LENGTH"] == 2**20
    assert app.config["SESSION_COOKIE_NAME"] == DOCUMENT["components"]["securitySchemes"]["session"]["name"]


@each_operation
def test_the_bounds_of_a_request_are_where_they_are_described(operation, ada):
    ada.create()
    number = count()

    def status(**values):
        body = operation.body and {**operation.good_body(), "username": f"user {next(number)}", **values}
        headers = {name: value for name, value in values.items() if name == "Idempotency-Key"}
        return ada.open(operation.url(**values), method=operation.method, json=body, headers=headers).status_code

    for parameter in operation.parameters:
        schema, name, lone = parameter["schema"], parameter["name"], parameter["in"] == "path"
        needed = {"limit": 1} if name in ("after", "before") else {}
        if schema["type"] == "integer":
            assert status(**{**needed, name: schema["minimum"]}) != 400
            assert status(**{**needed, name: schema["maximum"]}) != 400
            for value in (schema["minimum"] - 1, schema["maximum"] + 1):
                assert status(**{**needed, name: value}) == (404 if lone else 400)
        elif "maxLength" in schema:
            assert status(**{name: "x" * schema["maxLength"]}) != 400
            assert status(**{name: "x" * (schema["maxLength"] + 1)}) == 400
            assert status(**{name: ""}) == 400
    for name, schema in operation.fields().items():
        assert status(**{name: "x" * (schema["maxLength"] + 1)}) == 400
        assert status(**{name: ""}) == 400
        assert status(**{name: "x" * schema["maxLength"]}) != 400
        assert status(**{name: "😀" * schema["maxLength"]}) != 400


ODD = [chr(code) for code in range(0x3100) if unicodedata.category(chr(code)) in ("Cc", "Zl", "Zp", "Zs")]
ODD += ["\u200b", "\ufeff", "😀"]


@SQLITE_ONLY
@pytest.mark.parametrize(("path", "field"), [("/api/conversations", "name"), ("/api/login", "username")])
def test_blanks_and_control_characters_are_refused_where_it_is_described(ada, assert_valid, path, field):
    operation = operation_of("POST", path)
    pattern = re.compile(operation.fields()[field]["pattern"])
    for text in [form.format(odd) for odd in ODD for form in ("{}", "{}a", "a{}", "a{}a")]:
        answer = ada.post(path, json={**operation.good_body(), field: text})
        assert (answer.status_code != 400) == bool(pattern.fullmatch(text)), (text, answer.text)


def test_the_readme_s_table_of_endpoints_agrees():
    """Any path that needs the database may answer 503, too, which the table leaves out."""
    rows = re.findall(r"^\| *`([A-Z]+ /\S+)` *\|([^|]+)\|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {row: sorted(map(int, re.findall(r"\b\d{3}\b", statuses))) for row, statuses in rows} == {
        operation.label: sorted(set(operation.responses) - {503}) for operation in OPERATIONS
    }


# What a schema cannot say is left out: a name that is taken or changed by NFKC, `before` and `after` without `limit`.
# Schemathesis logs in anew when a 401 shows that it has logged itself out. The password is none that it could guess, so
# that it never deletes its account. Every other send asks for a stream.
SCHEMATHESIS = """
[[operations]]
include-name = "POST /api/signup"
checks.positive_data_acceptance.expected-statuses = ["201", "400"]
"""
HOOKS = """
import itertools, os, unicodedata
import requests
import schemathesis

API = os.environ["API"]
number = itertools.count()


@schemathesis.auth()
class Session:
    def get(self, case, ctx):
        answer = requests.post(f"{API}/api/login", json={"username": "fuzzer", "password": os.environ["PASSWORD"]})
        return answer.cookies["session"]

    def set(self, case, data, ctx):
        case.cookies = {**(case.cookies or {}), "session": data}


@schemathesis.hook
def filter_body(ctx, body):
    name = body.get("username") if isinstance(body, dict) else None
    return not isinstance(name, str) or unicodedata.is_normalized("NFKC", name)


@schemathesis.hook
def before_call(ctx, case, kwargs):
    if case.query and {"before", "after"} & set(case.query):
        case.query.setdefault("limit", 1)
    if case.operation.label.endswith("/messages") and case.method == "POST" and next(number) % 2:
        case.headers["Accept"] = "text/event-stream"
"""


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("schemathesis"), reason="schemathesis is not installed")
def test_the_served_program_is_as_described_whatever_it_is_sent(serve, tmp_path):
    server = serve(LOGIN_RATE_LIMIT="1000000 per second", SIGNUP_RATE_LIMIT="1000000 per second")
    api, password = f"http://127.0.0.1:{server.port}", "none that anybody guesses"
    with server.client() as client:
        client.signup("fuzzer", password)
    (tmp_path / "hooks.py").write_text(HOOKS)
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS)
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
    options = ["--checks=all", "--max-examples=15", "--seed=1", "--continue-on-failure", "--no-color", "--warnings=off"]
    run = subprocess.run(
        [*command, f"{api}/api/openapi.json", *options],
        cwd=tmp_path,
        env={
            **os.environ,
            "SCHEMATHESIS_HOOKS": "hooks",
            "PYTHONPATH": str(tmp_path),
            "API": api,
            "PASSWORD": password,
        },
        capture_output=True,
        text=True,
        timeout=10 * PATIENCE,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Traceback" not in server.output
    assert not re.search(r"INFO [A-Z]+ \S+ 5\d\d ", server.output)


@SQLITE_ONLY
def test_a_read_with_if_match_is_answered_as_described(ada):
    for operation in OPERATIONS:
        if 304 in operation.responses and ada.create():
            answer = ada.get(operation.url(), headers={"If-Match": '"another"'}, buffered=True)
            assert answer.status_code == 200, operation.label


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@SQLITE_ONLY
def test_the_documentation_asks_no_other_machine(serve, tmp_path):
    server = serve()
    host = f"http://chat.example.com:{server.port}"  # at localhost, Swagger UI has no badge of a validator
    rules = "MAP chat.example.com 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    folder, log = tmp_path / "chromium", tmp_path / "log.json"
    options = [f"--user-data-dir={folder}", f"--host-resolver-rules={rules}", f"--log-net-log={log}"]
    page = subprocess.run(
        ["chromium", *FLAGS, *options, "--virtual-time-budget=10000", "--dump-dom", f"{host}/"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=2 * PATIENCE,
        check=True,
    ).stdout
    for path in DOCUMENT["paths"]:
        for item in DOCUMENT["paths"][path].values():
            assert "operationId" not in item or f'id="operations-{item["tags"][0]}-{item["operationId"]}"' in page
    linked = {urlsplit(address).netloc for address in re.findall(r' (?:src|href)="((?!data:)[^"]*)"', page)}
    assert linked == {""}
    asked = set(re.findall(r'"url":"https?://([^/"]*)', log.read_text()))
    own_business = {name for name in asked if re.search(r"\.(google|googleapis|gstatic)\.com$", name)}
    assert asked - own_business == {urlsplit(host).netloc}


def npm(folder, *arguments):
    return subprocess.run(
        ["npm", *arguments], cwd=folder, capture_output=True, text=True, timeout=5 * PATIENCE, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="session")
def typescript(tmp_path_factory):
    """The folder of a copy of the typed client, next to a copy of the document, with its packages installed."""
    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("node and npm are not installed")
    root = tmp_path_factory.mktemp("typescript")
    folder = root / "tests" / "typescript"
    ignored = shutil.ignore_patterns("node_modules", "schema.d.ts", "*.js", "package-lock.json")
    shutil.copytree(ROOT / "tests" / "typescript", folder, ignore=ignored)
    (root / "app").mkdir()
    installed = npm(folder, "install", "--no-audit", "--no-fund")
    assert installed.returncode == 0, installed.stderr
    return folder


def compiled(folder, text):
    """Generate the types of a document and compile the client by them; return what the compiler says."""
    (folder.parent.parent / "app" / "openapi.json").write_text(text)
    generated = npm(folder, "run", "generate")
    assert generated.returncode == 0, generated.stderr
    return npm(folder, "run", "--silent", "compile").stdout


@pytest.mark.slow
def test_a_client_typed_by_the_document_compiles_and_works(typescript, serve):
    assert compiled(typescript, FILE.read_text()) == ""
    env = {**os.environ, "API": f"http://127.0.0.1:{serve().port}"}
    run = subprocess.run(
        ["node", "client.js"], cwd=typescript, env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (run.stdout, run.returncode) == ("signed up, chatted, logged out\n", 0), run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"sender": {', '"speaker": {'),
        ('"/api/logout/{user_id}": {', '"/api/logout/{id}": {'),
        ('"name": "before"', '"name": "until"'),
        ('"const": "delta"', '"const": "piece"'),
    ],
)
def test_a_change_that_breaks_clients_breaks_the_compilation(typescript, old, new):
    text = FILE.read_text()
    assert old in text
    assert "error TS" in compiled(typescript, text.replace(old, new))
