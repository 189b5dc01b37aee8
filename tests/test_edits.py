"""Edits and other versions of messages: nothing is deleted, and one branch is the current one."""

import random
import time
from functools import partial

import pytest

from app.bot import BotError
from tests.conftest import PASSWORD, SHARED_SESSIONS, create_other_client
from tests.helpers.bots import ASYNC, STREAM, each_way, join_deltas, read_events, wait_for_end, wait_for_text
from tests.helpers.data import add_conversations, count_messages, execute, get_answer, get_ids, get_texts
from tests.helpers.server import run_all, run_concurrently, run_in_background


@pytest.fixture
def app(make_app, bot):
    return make_app(bot, **SHARED_SESSIONS)


@pytest.fixture
def messages(ada, conversation_id):
    """The messages of a conversation with three exchanges."""
    for text in ("First", "Second", "Third"):
        ada.send_message(conversation_id, text)
    return ada.list_messages(conversation_id)


def list_current(client, conversation_id, **parameters):
    """Return the current messages, as three calls show them."""
    path = f"/api/conversations/{conversation_id}"
    messages = client.get(path, query_string=parameters).json["messages"]
    assert client.get(f"{path}/messages", query_string={"limit": 100, **parameters}).json == messages
    if not parameters:
        assert client.list_conversations()[0]["messages"] == messages
    return messages


# Edits


@pytest.mark.parametrize("text", ["Edited", "Second"], ids=["other text", "same text"])
@each_way
def test_edit_adds_a_reply_and_a_question_if_its_text_is_another_in_place_of_what_followed(
    ada, bot, conversation_id, messages, headers, text
):
    bot.steps = ["New ", "reply"]
    response = ada.edit_message(conversation_id, messages[2]["id"], text, headers=headers)
    *before, question, reply = wait_for_end(ada, conversation_id)
    if text == "Second":
        assert question == messages[2]
    else:
        assert (question["id"] > messages[5]["id"], question["sender"], question["text"]) == (True, "user", text)
    assert (reply["id"] > messages[5]["id"], reply["sender"], reply["text"]) == (True, "bot", "New reply")
    assert list_current(ada, conversation_id) == [*before, question, reply] == [*messages[:2], question, reply]
    assert [ada.get_message(conversation_id, message["id"]).json for message in messages] == messages
    assert bot.histories[-1] == [("user", "First"), ("bot", "Hello there."), ("user", text)]
    started = [question, {**reply, "text": "", "status": "in_progress"}]
    if headers == STREAM:
        events = read_events(response)
        assert (events[0][:2], join_deltas(events)) == (("start", started), "New reply")
        assert (response.status_code, events[-1][:2]) == (200, ("done", [question, reply]))
    else:
        assert get_answer(response) == ((202, started) if headers == ASYNC else (200, [question, reply]))


def test_edit_of_message_of_bot_returns_409(ada, bot, conversation_id, messages):
    before = ada.observe()
    response = ada.edit_message(conversation_id, messages[3]["id"], "Edited")
    sentence = "Only a message of the user can be edited: edit the one that this message replies to"
    assert get_answer(response) == (409, {"error": sentence})
    assert (ada.observe(), len(bot.histories)) == (before, 3)


def test_send_after_edit_follows_the_new_branch(ada, bot, conversation_id, messages):
    edited = ada.edit_message(conversation_id, messages[0]["id"], "Edited").json
    sent = ada.send_message(conversation_id, "Next").json
    assert list_current(ada, conversation_id) == edited + sent
    assert bot.histories[-1] == [("user", "Edited"), ("bot", "Hello there."), ("user", "Next")]


@pytest.mark.parametrize("text", ["Edited", "Second"], ids=["other text", "same text"])
@pytest.mark.parametrize(("steps", "reply_text"), [([BotError("down")], ""), (["New ", BotError("cut")], "New ")])
@each_way
def test_edit_whose_reply_fails_is_kept(ada, bot, conversation_id, messages, headers, steps, reply_text, text):
    bot.steps = steps
    response = ada.edit_message(conversation_id, messages[2]["id"], text, headers=headers)
    assert response.status_code == (202 if headers == ASYNC else 200 if reply_text else 502)
    *before, question, reply = wait_for_end(ada, conversation_id)
    assert (before, question["text"], reply["text"]) == (messages[:2], text, reply_text)
    assert (reply["status"], reply["error"]) == ("failed", "The bot failed to answer")
    bot.steps = ["New reply"]
    again = ada.edit_message(conversation_id, question["id"], text).json
    assert list_current(ada, conversation_id) == [*messages[:2], question, again[1]]
    assert get_ids(ada.list_versions(conversation_id, reply["id"]).json)[-2:] == [reply["id"], again[1]["id"]]


# Edits while a reply is in progress


@pytest.fixture(params=["send", "edit"])
def slow_exchange(request, ada, bot, gate, conversation_id, messages):
    """The messages of an exchange in progress, whose reply waits for the gate."""
    bot.scripts = {"Slow": ["Slow ", gate.wait, "reply"]}
    if request.param == "send":
        return ada.send_message(conversation_id, "Slow", headers=ASYNC).json
    return ada.edit_message(conversation_id, messages[2]["id"], "Slow", headers=ASYNC).json


@each_way
def test_edit_with_same_text_joins_the_reply_in_progress(
    ada, bot, gate, conversation_id, slow_exchange, second_client, headers
):
    edit = [conversation_id, slow_exchange[0]["id"], "Slow"]
    with run_in_background(lambda: second_client.edit_message(*edit, headers=headers)) as [joining]:
        if headers == ASYNC:
            assert get_ids(joining.result().json) == get_ids(slow_exchange)
        time.sleep(0.3)  # it has joined
        gate.set()
    exchange = wait_for_end(ada, conversation_id)[-2:]
    assert (get_texts(exchange), get_ids(exchange)) == (["Slow", "Slow reply"], get_ids(slow_exchange))
    if headers == STREAM:
        assert read_events(joining.result())[-1][:2] == ("done", exchange)
        assert join_deltas(read_events(joining.result())) == "Slow reply"
    elif headers == {}:
        assert get_answer(joining.result()) == (200, exchange)
    assert bot.texts.count("Slow") == 1


def test_edit_with_other_text_while_reply_is_in_progress_returns_409(
    ada, bot, gate, conversation_id, slow_exchange, second_client
):
    response = second_client.edit_message(conversation_id, slow_exchange[0]["id"], "Other")
    assert get_answer(response) == (409, {"error": "The reply to this message is in progress: stop it first"})
    gate.set()
    assert get_texts(wait_for_end(ada, conversation_id)[-2:]) == ["Slow", "Slow reply"]


def test_edit_of_an_earlier_message_lets_a_later_reply_go_on(ada, gate, conversation_id, slow_exchange, messages):
    edited = ada.edit_message(conversation_id, messages[0]["id"], "Edited").json
    gate.set()
    event, exchange, _ = read_events(ada.follow_reply(conversation_id, slow_exchange[1]["id"]))[-1]
    assert (event, get_texts(exchange)) == ("done", ["Slow", "Slow reply"])
    assert list_current(ada, conversation_id) == edited


def test_concurrent_edits_with_different_texts_are_versions(ada, conversation_id, messages, second_client):
    edit = (conversation_id, messages[2]["id"])
    exchanges = run_all(
        lambda: ada.edit_message(*edit, "One").json, lambda: second_client.edit_message(*edit, "Two").json
    )
    exchanges.sort(key=get_ids)
    assert list_current(ada, conversation_id) == [*messages[:2], *exchanges[1]]
    assert ada.list_versions(*edit).json == [messages[2], exchanges[0][0], exchanges[1][0]]


def test_concurrent_regenerations_ask_bot_once(ada, bot, gate, conversation_id, messages, other_process):
    bot.steps = [gate.wait, "New reply"]
    clients = [create_other_client(client) for client in (ada, other_process) for _ in range(3)]

    def regenerate(client):
        return client.edit_message(conversation_id, messages[4]["id"], "Third", headers=ASYNC).json

    regenerate(ada)
    exchanges = run_concurrently(6, lambda number: regenerate(clients[number]))
    gate.set()
    assert [get_ids(exchange) for exchange in exchanges] == [get_ids(wait_for_end(ada, conversation_id)[4:])] * 6
    assert bot.texts.count("Third") == 2


# Versions


@pytest.fixture
def tree(ada, bot, conversation_id, messages):
    """The messages of several branches by names: Q is a question, R a reply, and a number their version.

    `Q1 R1 Q2 R2 Q3 R3`, an edit of the first question `Q1b R1b Q2b R2b`, and a regenerated first reply `R1c`.
    """
    tree = dict(zip(["Q1", "R1", "Q2", "R2", "Q3", "R3"], messages, strict=True))
    tree["Q1b"], tree["R1b"] = ada.edit_message(conversation_id, messages[0]["id"], "Edited").json
    tree["Q2b"], tree["R2b"] = ada.send_message(conversation_id, "After the edit").json
    bot.steps = ["Regenerated"]
    _, tree["R1c"] = ada.edit_message(conversation_id, messages[0]["id"], "First").json
    assert ada.list_messages(conversation_id) == [tree["Q1"], tree["R1c"]]
    return tree


@pytest.mark.parametrize("message_id", [None, "1", True, 0, 2**63])
def test_current_with_invalid_id_returns_400(ada, conversation_id, messages, message_id):
    response = ada.show_branch(conversation_id, message_id)
    assert get_answer(response) == (400, {"error": f"message_id must be an integer from 1 to {2**63 - 1}"})
    assert ada.list_messages(conversation_id) == messages


FIRST_BRANCH, EDITED_BRANCH = "Q1 R1 Q2 R2 Q3 R3", "Q1b R1b Q2b R2b"
TREE = {  # by the name of a message: the branch that shows it, and its versions
    "Q1": ("Q1 R1c", "Q1 Q1b"),
    "R1": (FIRST_BRANCH, "R1 R1c"),
    "Q2": (FIRST_BRANCH, "Q2"),
    "R3": (FIRST_BRANCH, "R3"),
    "R1c": ("Q1 R1c", "R1 R1c"),
    "Q1b": (EDITED_BRANCH, "Q1 Q1b"),
    "R1b": (EDITED_BRANCH, "R1b"),
    "R2b": (EDITED_BRANCH, "R2b"),
}


@pytest.mark.parametrize(("name", "branch", "versions"), [(name, *row) for name, row in TREE.items()])
def test_current_shows_the_branch_of_a_message_and_versions_are_listed_oldest_first(
    ada, conversation_id, other_process, tree, name, branch, versions
):
    branch, versions = ([tree[each] for each in names.split()] for names in (branch, versions))
    for before in ("R1c", "R3", "R2b"):
        ada.show_branch(conversation_id, tree[before]["id"])
        response = other_process.show_branch(conversation_id, tree[name]["id"])
        assert (response.status_code, response.json["messages"]) == (200, branch), before
        assert ada.get(f"/api/conversations/{conversation_id}").json == response.json, before
        assert list_current(ada, conversation_id) == branch, before
        assert get_answer(ada.list_versions(conversation_id, tree[name]["id"])) == (200, versions), before


def test_messages_name_their_versions_if_asked(ada, conversation_id, tree):
    questions, replies = get_ids([tree["Q1"], tree["Q1b"]]), get_ids([tree["R1"], tree["R1c"]])
    ada.show_branch(conversation_id, tree["R3"]["id"])
    plain = [tree[name] for name in FIRST_BRANCH.split()]
    shown = [{**tree["Q1"], "versions": questions}, {**tree["R1"], "versions": replies}, *plain[2:]]
    assert list_current(ada, conversation_id, versions=1) == shown
    assert list_current(ada, conversation_id, versions=0) == plain
    path = f"/api/conversations/{conversation_id}"
    response = ada.put(f"{path}/current?versions=1", json={"message_id": tree["Q1b"]["id"]})
    assert response.json["messages"][0] == {**tree["Q1b"], "versions": questions}
    assert ada.get(f"{path}?versions=2").status_code == 400


def test_edit_of_a_message_that_is_not_current_shows_its_branch(ada, conversation_id, tree):
    edited = ada.edit_message(conversation_id, tree["Q2"]["id"], "Edited").json
    assert list_current(ada, conversation_id) == [tree["Q1"], tree["R1"], *edited]
    regenerated = ada.edit_message(conversation_id, tree["Q2b"]["id"], "After the edit").json
    assert list_current(ada, conversation_id) == [tree["Q1b"], tree["R1b"], *regenerated]


def test_current_prefers_a_reply_with_a_text_to_a_newer_one_without(ada, bot, conversation_id, messages):
    bot.steps = [BotError("down")]
    ada.edit_message(conversation_id, messages[4]["id"], "Third")
    failed = ada.list_messages(conversation_id)[5]
    assert ada.show_branch(conversation_id, messages[4]["id"]).json["messages"] == messages
    assert ada.show_branch(conversation_id, failed["id"]).json["messages"] == [*messages[:5], failed]


def test_reply_beside_the_branch_can_be_followed_and_stopped(ada, bot, gate, conversation_id, messages, second_client):
    bot.steps = ["New ", gate.wait]
    _, reply = ada.edit_message(conversation_id, messages[4]["id"], "Third", headers=ASYNC).json
    wait_for_text(ada, conversation_id, reply["id"], "New ")
    ada.show_branch(conversation_id, messages[5]["id"])
    follower = create_other_client(second_client)
    with run_in_background(lambda: follower.follow_reply(conversation_id, reply["id"])) as [following]:
        stopped = second_client.stop_reply(conversation_id, reply["id"]).json
    assert read_events(following.result())[-1][:2] == ("done", [messages[4], stopped])
    assert list_current(ada, conversation_id) == messages


# Trees of many messages


def read_path(app, conversation_id):
    """Return the ids of the current messages; they must be one path from the first message on, ending in a reply."""
    query = "SELECT id, parent_id, sender FROM message WHERE conversation_id = :id AND is_current ORDER BY id"
    ids, parents, senders = zip(*execute(app, query, id=conversation_id), strict=True)
    assert (parents, senders) == ((None, *ids[:-1]), ("user", "bot") * (len(ids) // 2))
    return list(ids)


def test_100_random_operations_in_two_processes_always_leave_one_path(app, ada, bot, conversation_id, other_process):
    bot.scripts = {"fail": [BotError("down")], "cut": ["One ", BotError("cut")]}
    ids = get_ids(ada.send_message(conversation_id, "First").json)

    def operate(number):
        """Make 50 random changes; note new messages."""
        client, choices = create_other_client((ada, other_process)[number]), random.Random(number)
        for _ in range(50):
            message, headers = (conversation_id, choices.choice(ids)), choices.choice([{}, STREAM, ASYNC])
            text = choices.choice(["Hello", "Tea", "fail", "cut"])
            texts = (text, text, client.get_message(*message).json["text"] or text)
            send = partial(client.send_message, conversation_id, text, headers=headers)
            edits = [partial(client.edit_message, *message, each, headers=headers) for each in texts]
            show, stop = partial(client.show_branch, *message), partial(client.stop_reply, *message)
            response = choices.choice([send, *edits, show, show, stop])()
            assert response.status_code in (200, 201, 202, 409, 502), response.text
            ids.extend(set(read_path(app, conversation_id)) - set(ids))

    run_concurrently(2, operate)
    assert get_ids(wait_for_end(ada, conversation_id)) == read_path(app, conversation_id)


@pytest.mark.parametrize("path", ["/api/conversations/{0}", "/api/account"])
def test_branch_of_1500_messages_with_versions_is_left_shown_and_deleted(app, ada, path):
    [id] = add_conversations(app, ada, 1, messages=1500)
    columns = "conversation_id, sender, text, created_at, parent_id"
    execute(app, f"INSERT INTO message ({columns}, is_current) SELECT {columns}, false FROM message")
    messages = ada.list_messages(id)
    edited = ada.edit_message(id, messages[0]["id"], "Edited").json
    assert ada.list_messages(id) == edited
    assert ada.show_branch(id, messages[-1]["id"]).json["messages"] == messages
    assert read_path(app, id) == get_ids(messages)
    assert count_messages(app) == 3002
    assert ada.delete(path.format(id), json={"password": PASSWORD}).status_code == 204
    assert count_messages(app) == 0
