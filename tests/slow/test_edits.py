"""Edits that follow one another as fast as they can, while clients follow the replies."""

import pytest

from tests.conftest import SHARED_SESSIONS, create_other_client
from tests.helpers.bots import Gate, read_events
from tests.helpers.server import run_in_background


@pytest.fixture
def app(make_app, bot):
    return make_app(bot, **SHARED_SESSIONS)


def test_follow_at_any_time_of_an_edit_succeeds(ada, conversation_id, other_process):
    _, (message, _), _ = (ada.send_message(conversation_id).json for _ in range(3))
    clients = [create_other_client(ada), create_other_client(ada), create_other_client(other_process)]
    is_over = Gate()

    def follow(client):
        """Follow the edited message's reply again and again; return the statuses."""
        statuses = set()
        while not is_over.is_set():
            response = client.follow_reply(conversation_id, message["id"])
            statuses.add(response.status_code)
            if response.status_code == 200:
                assert read_events(response)[-1][0] in ("done", "error")
        return statuses

    with run_in_background(*(lambda client=client: follow(client) for client in clients)) as followers:
        try:
            for number in range(30):
                assert ada.edit_message(conversation_id, message["id"], f"Edited {number}").status_code == 200
        finally:
            is_over.set()
    for follower in followers:
        assert follower.result() <= {200, 404, 502}  # the next edit may delete a reply just before it is read
