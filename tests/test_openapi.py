"""The API description (app/openapi.yaml) and the program: neither may change without the other."""

import json
import re
from functools import cache
from io import BytesIO
from itertools import count
from urllib.parse import urlencode

import pytest
import yaml

from app.bot import BotBusy, BotError, BotMessageTooLong, BotRefused, BotTimeout
from app.database import MAX_ID
from app.replies import SILENCE_INTERVAL
from tests.conftest import PASSWORD, SHARED_SESSIONS, Client, on_sqlite
from tests.helpers.bots import ASYNC, KEY, STREAM, read_events
from tests.helpers.data import execute
from tests.helpers.server import ROOT, find_free_port, parse_events

DOCUMENT = yaml.safe_load((ROOT / "app" / "openapi.yaml").read_text(encoding="utf-8"))
COMPONENTS = DOCUMENT["components"]
METHODS = ("get", "put", "patch", "post", "delete")
MAX_BODY_SIZE = 2**21
EVENT_STREAM = "text/event-stream"
DESCRIBED_HEADERS = {
    *("Allow", "ETag", "Idempotent-Replayed", "Link", "Location", "Preference-Applied", "Retry-After", "Set-Cookie"),
}
EVENT_SCHEMAS = {"start": "Exchange", "delta": "Delta", "done": "Exchange", "error": "ApiError"}


def resolve(node):
    """Return the component that a $ref names; any other node as it is."""
    while "$ref" in node:
        kind, name = node["$ref"].removeprefix("#/components/").split("/")
        node = COMPONENTS[kind][name]
    return node


class Operation:
    """A method of a path, as described."""

    def __init__(self, path, method):
        item = DOCUMENT["paths"][path]
        operation = item[method]
        self.id, self.path, self.method = operation["operationId"], path, method.upper()
        self.label = f"{self.method} {path}"
        self.requires_login = operation.get("security", DOCUMENT["security"]) != []
        self.parameters = [resolve(node) for node in item.get("parameters", []) + operation.get("parameters", [])]
        self.body = resolve(operation.get("requestBody", {})).get("content", {}).get("application/json")
        self.responses = {int(status): resolve(response) for status, response in operation["responses"].items()}

    def __repr__(self):
        return self.label

    def url(self, **values):
        """Return the path and the query string with these values of parameters; ids are 1 by default."""
        names = {parameter["name"] for parameter in self.parameters if parameter["in"] == "query"}
        query = urlencode({name: value for name, value in values.items() if name in names})
        path = re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], 1)), self.path)
        return f"{path}?{query}" if query else path

    def fields(self):
        """Return the schemas of the body's fields by name."""
        return resolve(self.body["schema"])["properties"] if self.body else {}


OPERATIONS = [
    Operation(path, method) for path, item in DOCUMENT["paths"].items() for method in item if method in METHODS
]
WRITES = [operation for operation in OPERATIONS if operation.method != "GET"]
CREDENTIALS = COMPONENTS["requestBodies"]["Credentials"]["content"]["application/json"]["example"]
each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=repr)


def find_operation(method, path):
    """Return the operation of a request, or None."""
    matches = (each for each in OPERATIONS if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", each.path), path))
    return next((operation for operation in matches if operation.method == method), None)


@cache
def create_validator(schema):
    """Return the validator of a schema of the document, which is given as JSON."""
    library = pytest.importorskip("jsonschema_rs", reason="jsonschema_rs, which schemathesis installs, is missing")
    return library.Draft202012Validator({**json.loads(schema), "components": COMPONENTS}, validate_formats=True)


def assert_valid(value, schema):
    """Assert that a value matches a schema of the document."""
    errors = [error.message for error in create_validator(json.dumps(schema)).iter_errors(value)]
    assert not errors, (value, errors)


def assert_valid_events(text):
    """Assert that the data of each server-sent event matches the schema of its kind."""
    events = list(parse_events(BytesIO(text.encode())))
    assert events
    for name, data, _ in events:
        assert_valid(data, {"$ref": f"#/components/schemas/{EVENT_SCHEMAS[name]}"})


class ValidatingClient(Client):
    """A client that compares every response with the document; `seen` has the label, status and text of each."""

    def open(self, *args, **kwargs):
        response = super().open(*args, **{**kwargs, "buffered": True})
        operation = find_operation(response.request.method, response.request.path)
        description = self.find_response(operation, response)
        self.seen.append((operation and operation.label, response.status_code, response.text))
        content, headers = description.get("content", {}), description.get("headers", {})
        if response.mimetype == EVENT_STREAM:
            assert_valid_events(response.text)
            headers = {"Idempotent-Replayed": COMPONENTS["headers"]["IdempotentReplayed"]}
        elif response.data or content:
            assert_valid(response.json, content[response.mimetype]["schema"])
        self.assert_valid_headers(response.headers, headers)
        return response

    def find_response(self, operation, response):
        """Return the description of a response."""
        status = response.status_code
        if operation is None:
            return COMPONENTS["responses"][{404: "NotFound", 405: "MethodNotAllowed"}[status]]
        if response.mimetype == EVENT_STREAM:  # the stream of a reply is described at the endpoint `events`
            assert operation.id in ("sendMessage", "editMessage", "followReply")
            operation = next(operation for operation in OPERATIONS if operation.id == "followReply")
        assert status in operation.responses, (operation.label, status, response.text)
        return operation.responses[status]

    def assert_valid_headers(self, headers, descriptions):
        """Assert that headers are as described, and that no header which clients need is undescribed."""
        assert re.fullmatch(r"[\w.-]{1,64}", headers["X-Request-ID"])
        assert DESCRIBED_HEADERS & set(headers.keys()) <= set(descriptions)
        for name, header in descriptions.items():
            header = resolve(header)
            assert name in headers or not header.get("required"), name
            for text in headers.getlist(name):
                assert_valid(int(text) if header["schema"]["type"] == "integer" else text, header["schema"])


def get_example(operation):
    """Return the example of an operation's request body, or None."""
    return operation.body and operation.body["example"]


def open_operation(client, operation, **values):
    """Send a valid request for an operation."""
    body = get_example(operation)
    if body and "message_id" in body:
        body = {"message_id": values.get("message_id", 1)}
    return client.open(operation.url(**values), method=operation.method, json=body)


@pytest.fixture
def create_client(make_app):
    """A function that returns a ValidatingClient of an app with these settings."""
    ValidatingClient.seen = []

    def create_client(app=None, username=None, **settings):
        limits = {"LOGIN_RATE_LIMIT": "1000 per minute", "SIGNUP_RATE_LIMIT": "1000 per minute"}
        app = app or make_app(**limits | settings)
        app.test_client_class = ValidatingClient
        client = app.test_client()
        if username:
            client.signup(username)
            client.login(username)
        return client

    return create_client


def provoke_responses(create_client):
    """Provoke every described response; return the label, status and text of each."""
    client = create_client(username="ada")
    other_client = create_client(client.application, "bob")
    anonymous_client = create_client(client.application)
    exercise_success(client)
    exercise_streams(client)
    exercise_edits(client)
    exercise_bot_errors(create_client)
    exercise_refusals(client, other_client, anonymous_client)
    exercise_invalid_requests(client, anonymous_client)
    exercise_limits(create_client)
    exercise_end(client, other_client)
    exercise_missing_database(create_client)
    return ValidatingClient.seen


def exercise_success(client):
    """Call every operation successfully, except those that end the session, with and without If-None-Match."""
    first, second = client.create_conversation("First"), client.create_conversation("Second")
    client.put(f"/api/conversations/{second}", json={"name": "Renamed"})
    client.patch(f"/api/conversations/{second}", json={"name": "Renamed again", "archived": True})
    client.post(f"/api/conversations/{second}/title")
    for text in ("Hello", "Can machines think?"):
        client.send_message(first, text)
    for text in ("Once", "Once", "Other"):
        client.send_message(first, text, headers=KEY)
    client.post(f"/api/conversations/{first}/title")
    pages = (
        {},
        {"limit": 1, "q": "hello", "archived": "false"},
        {"limit": 1, "before": MAX_ID, "after": 0, "messages": 1, "versions": 1, "q": "machines"},
    )
    urls = [operation.url(**page) for operation in OPERATIONS if operation.method == "GET" for page in pages]
    for url in urls:
        if etag := client.get(url).headers.get("ETag"):
            client.get(url, headers={"If-None-Match": etag})
    client.get("/api/conversations?order=recent&limit=1")
    client.delete(f"/api/conversations/{second}")


def exercise_streams(client):
    """Send and follow replies without waiting for them as a whole, and stop one."""
    conversation_id = client.create_conversation()
    messages = f"/api/conversations/{conversation_id}/messages"
    for text in ("Hello", "/drop 3", "/fail"):
        client.send_message(conversation_id, text, headers=STREAM)
    _, reply = client.send_message(conversation_id, "/slow 30", headers=ASYNC).json
    for _ in range(2):
        client.post(f"{messages}/{reply['id']}/stop")
    events = client.get(f"{messages}/{reply['id']}/events")
    _, _, last_event_id = read_events(events)[-1]
    client.get(f"{messages}/{reply['id']}/events", headers={"Last-Event-ID": last_event_id})
    client.get(f"/api/conversations/{conversation_id}")


def exercise_edits(client):
    """Edit messages, regenerate replies, and show versions."""
    conversation_id = client.create_conversation("Edits")
    messages = f"/api/conversations/{conversation_id}/messages"
    message, reply = client.send_message(conversation_id, "Hello").json
    client.put(f"{messages}/{reply['id']}", json={"text": "Hello"})
    for headers in ({}, STREAM, ASYNC):
        client.put(f"{messages}/{message['id']}", json={"text": f"Hello {headers}"}, headers=headers)
    for _ in range(2):
        client.put(f"{messages}/{message['id']}", json={"text": "Once"}, headers=KEY)
    client.put(f"/api/conversations/{conversation_id}/current?versions=1", json={"message_id": message["id"]})
    for path in (f"{messages}?versions=1", f"{messages}/{message['id']}/versions"):
        assert len(client.get(path).json) > 1
    message, _ = client.send_message(conversation_id, "/slow 30", headers=ASYNC).json
    client.put(f"{messages}/{message['id']}", json={"text": "Hello"})
    client.delete(f"/api/conversations/{conversation_id}")


BOT_ERRORS = {
    "fail": BotError("broken"),
    "busy": BotBusy("busy", retry_after=3),
    "long": BotMessageTooLong("too long"),
    "timeout": BotTimeout("silent"),
    "refuse": BotRefused("refused"),
}


def scripted_bot(history, **ids):
    """Raise the error that the message names, or reply."""
    _, text = history[-1]
    if text in BOT_ERRORS:
        raise BOT_ERRORS[text]
    yield "Hello!"


def exercise_bot_errors(create_client):
    """Send and edit messages that make the bot fail before its first chunk."""
    client = create_client(username="carol", bot=scripted_bot)
    conversation_id = client.create_conversation("Errors")
    message, _ = client.send_message(conversation_id, "Hello").json
    for text in BOT_ERRORS:
        client.send_message(conversation_id, text)
        client.put(f"/api/conversations/{conversation_id}/messages/{message['id']}", json={"text": text})
    client.get(f"/api/conversations/{conversation_id}/messages?versions=1")
    client.get("/api/messages?q=fail")


def exercise_refusals(client, other_client, anonymous_client):
    """Send requests whose user or whose input is not acceptable."""
    for username in ("ada", " ada", "disabled"):
        anonymous_client.signup(username)
    anonymous_client.login("ada", "wrong")
    execute(client.application, """UPDATE "user" SET is_disabled = true WHERE username = 'disabled'""")
    anonymous_client.login("disabled")
    client.post(f"/api/logout/{other_client.user_id}")
    client.put("/api/password", json={"current_password": "wrong", "new_password": PASSWORD})
    client.delete("/api/account", json={"password": "wrong"})
    client.send_message(1, "Hello", headers={"Idempotency-Key": "not visible"})
    for query in ("before=1", "messages=1001", "order=oldest", "cursor=invalid"):
        client.get(f"/api/conversations?{query}")
    for path in ("/api/users/status?after=1", "/api/messages", "/api/nothing"):
        client.get(path)


def exercise_invalid_requests(client, anonymous_client):
    """Send requests to every operation that are wrong whatever the operation is."""
    for operation in OPERATIONS:
        client.open(operation.url(), method="PROPFIND")
        if operation.requires_login:
            open_operation(anonymous_client, operation)
        if 404 in operation.responses:
            for number in (0, 99, MAX_ID + 1):
                open_operation(client, operation, conversation_id=number, user_id=0)
        if "{message_id}" in operation.path:
            open_operation(client, operation, message_id=99)
        if 400 in operation.responses and operation.method == "GET":
            client.get(operation.url(limit=0, messages=-1))
    for operation in WRITES:
        url, method = operation.url(), operation.method
        client.open(url, method=method, data=b"x" * (MAX_BODY_SIZE + 1))
        client.open(url, method=method, headers={"Origin": "https://evil.example"})
        environ = {"CONTENT_LENGTH": "2", "wsgi.input_terminated": True}  # gunicorn's environment of an incomplete body
        client.open(url, method=method, data="{", content_type="application/json", environ_overrides=environ)
        if operation.body:
            client.open(url, method=method, json={}, headers={"Content-Encoding": "gzip"})
            client.open(url, method=method, data={"name": "form"})
            example = get_example(operation)
            for body in ([], {}, *({**example, name: "\t"} for name in operation.fields())):
                client.open(url, method=method, json=body)


def exercise_limits(create_client):
    """Exceed the rate limits and the number of replies in progress."""
    client = create_client(username="dave", LOGIN_RATE_LIMIT="1 per minute", SIGNUP_RATE_LIMIT="1 per minute")
    client.signup("dave")
    for _ in range(2):
        client.login("dave", "wrong")
    client.put("/api/password", json={"current_password": "wrong", "new_password": PASSWORD})
    client.delete("/api/account", json={"password": "wrong"})
    create_client(SIGNUP="closed").signup("eve")
    client = create_client(username="erin", MAX_CONCURRENT_REPLIES=1)
    conversation_id = client.create_conversation("Limits")
    message, _ = client.send_message(conversation_id, "Hello").json
    _, reply = client.send_message(conversation_id, "/slow 30", headers=ASYNC).json
    client.send_message(conversation_id, "Hello")
    client.put(f"/api/conversations/{conversation_id}/messages/{message['id']}", json={"text": "Hello"})
    client.post(f"/api/conversations/{conversation_id}/title")
    client.post(f"/api/conversations/{conversation_id}/messages/{reply['id']}/stop")


def exercise_end(client, other_client):
    """Change the password, log out, and delete an account."""
    client.put("/api/password", json={"current_password": PASSWORD, "new_password": "battery staple"})
    client.logout()
    other_client.delete("/api/account", json={"password": PASSWORD})


def exercise_missing_database(create_client):
    """Call every operation with a valid session cookie and without a database."""
    session = create_client(username="frank", **SHARED_SESSIONS).session_cookie
    client = create_client(DATABASE_URL=f"postgresql://chat@127.0.0.1:{find_free_port()}/chat", **SHARED_SESSIONS)
    for operation in OPERATIONS:
        client.set_cookie("chatbot_session", session)
        open_operation(client, operation, q="Hello")


def test_document_is_valid_openapi():
    library = pytest.importorskip("openapi_spec_validator", reason="openapi-spec-validator is not installed")
    library.validate(DOCUMENT, cls=library.OpenAPIV31SpecValidator)


def test_every_route_is_described_and_no_other(app):
    routes = set()
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        if path.startswith("/api/") and not path.startswith("/api/docs"):
            routes |= {f"{method} {path}" for method in rule.methods - {"HEAD", "OPTIONS"}}
    assert routes == {operation.label for operation in OPERATIONS}


def test_get_openapi_json_returns_the_document(client):
    response = client.get("/api/openapi.json")
    assert (response.mimetype, response.json) == ("application/json", DOCUMENT)


def test_responses_and_their_errors_are_exactly_those_described(create_client):
    responses = provoke_responses(create_client)
    seen = {(label, status) for label, status, _ in responses if label}
    described = {(operation.label, status) for operation in OPERATIONS for status in operation.responses}
    assert seen == described | {(operation.label, 200) for operation in OPERATIONS if operation.id == "sendMessage"}
    errors = {json.loads(text)["error"] for _, status, text in responses if status >= 400}
    descriptions = [response for operation in OPERATIONS for response in operation.responses.values()]
    contents = [response.get("content", {}) for response in [*descriptions, *COMPONENTS["responses"].values()]]
    examples = [content.get("application/json", {}).get("example") for content in contents]
    assert {example["error"] for example in examples if isinstance(example, dict) and "error" in example} <= errors


@on_sqlite
def test_request_examples_are_accepted(create_client):
    client = create_client()
    for operation in OPERATIONS:
        values = {"q": "Hello"}
        if operation.id != "signup":
            client.signup(**CREDENTIALS)
        if operation.requires_login:
            client.login(**CREDENTIALS)
            values |= {"user_id": client.user_id, "conversation_id": client.create_conversation("Conversation")}
            values["message_id"] = client.send_message(values["conversation_id"], "Hello").json[0]["id"]
        response = open_operation(client, operation, **values)
        assert response.status_code < 300, (operation, response.text)
        execute(client.application, 'DELETE FROM "user"')


@each_operation
def test_examples_match_their_schemas(operation):
    if operation.body:
        assert_valid(operation.body["example"], operation.body["schema"])
    for response in operation.responses.values():
        for media_type, content in response.get("content", {}).items():
            if media_type == EVENT_STREAM:
                assert_valid_events(content["example"])
            elif "example" in content:
                assert_valid(content["example"], content["schema"])


def test_document_states_the_cookie_and_the_limits_of_the_program(app):
    assert app.config["MAX_CONTENT_LENGTH"] == MAX_BODY_SIZE
    assert app.config["SESSION_COOKIE_NAME"] == COMPONENTS["securitySchemes"]["session"]["name"]
    assert f"every {SILENCE_INTERVAL} seconds" in yaml.dump(DOCUMENT, width=1000)


@on_sqlite
def test_integer_parameters_are_limited_as_described(create_client):
    client = create_client(username="ada")
    parameters = [(operation, parameter) for operation in OPERATIONS for parameter in operation.parameters]
    for operation, parameter in parameters:
        schema, name = parameter["schema"], parameter["name"]
        if schema["type"] != "integer":
            continue
        refusal = 404 if parameter["in"] == "path" else 400
        values = {"conversation_id": client.create_conversation(), "q": "Hello"}
        if name in ("after", "before"):
            values["limit"] = 1
        minimum, maximum = schema["minimum"], schema["maximum"]
        for value, is_valid in ((minimum, True), (maximum, True), (minimum - 1, False), (maximum + 1, False)):
            status = open_operation(client, operation, **{**values, name: value}).status_code
            assert status != 400 if is_valid else status == refusal, (operation, name, value)
            client.login("ada")


@on_sqlite
def test_strings_are_limited_as_described(create_client):
    app = create_client().application
    numbers = count()

    def get_status(operation, name, value):
        client = create_client(app, f"user {next(numbers)}")
        conversation_id = client.create_conversation("Conversation")
        ids = {"conversation_id": conversation_id, "message_id": client.send_message(conversation_id).json[0]["id"]}
        body = get_example(operation)
        if body and "username" in body:
            body = {**body, "username": f"new user {next(numbers)}"}
        body = {**body, name: value} if name in operation.fields() else body
        headers = {name: value} if name == "Idempotency-Key" else {}
        url = operation.url(**{**ids, "q": "Hello", name: value})
        return client.open(url, method=operation.method, json=body, headers=headers).status_code

    for operation in OPERATIONS:
        strings = {parameter["name"]: parameter["schema"] for parameter in operation.parameters} | operation.fields()
        for name, schema in strings.items():
            if "maxLength" in schema:
                assert get_status(operation, name, "x" * schema["maxLength"]) != 400, (operation, name)
                assert get_status(operation, name, "x" * (schema["maxLength"] + 1)) == 400, (operation, name)
                assert "minLength" not in schema or get_status(operation, name, "") == 400, (operation, name)
