"""A request for every status that the API returns."""

from app.bot import BotBusy, BotError, BotMessageTooLong, BotTimeout

BOT_ERRORS = {
    "crash": RuntimeError("the cause"),
    "fail": BotError("the cause"),
    "busy": BotBusy("the cause", 7),
    "silent": BotTimeout("the cause"),
    "too long": BotMessageTooLong("the cause"),
}
STATUSES = [200, 302, 304, 201, 202, 200, 204, 200, 400, 401, 403, 404, 405, 413, 413, 415, 401, 429]
STATUSES += [500, 502, 503, 504]


def failing_bot(history, **kwargs):
    """A bot that raises the error that the message names, or else repeats the message."""
    text = history[-1][1]
    if text in BOT_ERRORS:
        raise BOT_ERRORS[text]
    return [text]


def request_every_status(app, **headers):
    """Return the responses of an app with the bot above and a LOGIN_RATE_LIMIT of 1; their statuses are STATUSES.

    `headers` are sent with each request; in their names `_` stands for `-`.
    """
    client = app.test_client()
    client.signup("ada")
    client.login("ada")
    path = f"/api/conversations/{client.create_conversation()}"
    etag = client.get(path).headers["ETag"]
    other_client = app.test_client()
    for each in (client, other_client):
        each.environ_base.update({f"HTTP_{name.upper()}": value for name, value in headers.items()})
    return [
        client.get("/api/conversations"),
        client.get("/"),
        client.get(path, headers={"If-None-Match": etag}),
        client.post("/api/conversations", json={"name": "New"}),
        client.post(f"{path}/messages", json={"text": "Hello"}, headers={"Prefer": "respond-async"}),
        client.post(f"{path}/messages", json={"text": "Hello"}, headers={"Accept": "text/event-stream"}, buffered=True),
        client.delete("/api/conversations/2"),
        client.options(path, headers={"Access-Control-Request-Method": "PUT"}),
        client.post("/api/conversations", json={}),
        other_client.get("/api/conversations"),
        client.post("/api/logout/2"),
        client.get("/unknown"),
        client.delete("/api/conversations"),
        client.post("/api/login", data=b" " * (2**21 + 1), content_type="application/json"),
        client.post(f"{path}/messages", json={"text": "too long"}),
        client.post("/api/conversations"),
        client.login("ada", "wrong"),
        client.login("ada", "wrong"),
        *(client.post(f"{path}/messages", json={"text": text}) for text in ("crash", "fail", "busy", "silent")),
    ]
