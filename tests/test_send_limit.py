"""SEND_RATE_LIMIT: how many replies a user may have begun."""

import re

import pytest

from tests.conftest import create_logged_in_client
from tests.helpers.bots import KEY, each_way


@pytest.fixture
def limited(make_app):
    """A client with the session of ada, who may send two messages an hour."""
    return create_logged_in_client(make_app(SEND_RATE_LIMIT="2 per hour; 300 per day"), "ada")


@each_way
def test_send_beyond_the_limit_returns_429_and_stores_nothing(limited, headers):
    id = limited.create_conversation()
    assert [limited.send_message(id, headers=headers).status_code < 300 for _ in range(2)] == [True, True]
    refused = limited.send_message(id, headers=headers)
    assert refused.status_code == 429
    assert re.fullmatch(r"You may send 2 messages per hour: try again in (59|60) minutes", refused.json["error"])
    assert 3500 < int(refused.headers["Retry-After"]) <= 3600
    assert len(limited.list_messages(id)) == 4


def test_limit_counts_each_user(make_app):
    app = make_app(SEND_RATE_LIMIT="1 per hour")
    for name in ("ada", "bob"):
        client = create_logged_in_client(app, name)
        id = client.create_conversation()
        assert [client.send_message(id).status_code for _ in range(2)] == [201, 429]


def test_edits_regenerated_replies_and_titles_count(make_app):
    client = create_logged_in_client(make_app(SEND_RATE_LIMIT="4 per hour"), "ada")
    id = client.create_conversation()
    message_id = client.send_message(id).json[0]["id"]
    title_url = f"/api/conversations/{id}/title"
    statuses = [client.edit_message(id, message_id, text).status_code for text in ("Hello", "Hi")]
    assert [*statuses, client.post(title_url).status_code] == [200, 200, 200]
    statuses = [client.edit_message(id, message_id, text).status_code for text in ("Hello", "Hi")]
    assert [*statuses, client.post(title_url).status_code] == [429, 429, 429]


def test_replays_and_refused_requests_are_free(limited):
    id = limited.create_conversation()
    message_id = limited.send_message(id, headers=KEY).json[0]["id"]
    for _ in range(3):
        assert limited.send_message(id, headers=KEY).headers["Idempotent-Replayed"] == "true"
        assert limited.send_message(id, "Another text", headers=KEY).status_code == 409
        assert limited.send_message(id, " ").status_code == 400
        assert limited.send_message(99).status_code == 404
        assert limited.edit_message(id, message_id + 1, "Hi").status_code == 409
        assert limited.post(f"/api/conversations/{limited.create_conversation()}/title").status_code == 409
    assert limited.send_message(id).status_code == 201


def test_repeat_of_a_failed_send_counts(limited):
    id = limited.create_conversation()
    statuses = [limited.send_message(id, "/fail", headers=KEY).status_code for _ in range(3)]
    assert statuses == [502, 502, 429]
