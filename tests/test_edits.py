"""Edits and other versions of messages: nothing is deleted, and one branch is the current one."""

import random
import time

import pytest

from app.bot import BotError
from tests.conftest import PASSWORD, SHARED_SESSIONS, create_other_client
from tests.helpers.bots import (
    ASYNC,
    STREAM,
    each_way,
    join_deltas,
    read_events,
    wait_for_end,
    wait_for_text,
)
from tests.helpers.data import add_conversations, count_messages, execute, get_answer, get_ids, get_texts
from tests.helpers.server import run_all, run_concurrently, run_in_background, wait_until

IN_PROGRESS = "The reply to this message is in progress: stop it first"


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


def test_edit_with_other_text_adds_a_question_and_a_reply_in_place_of_what_followed(
    ada, bot, conversation_id, messages
):
    bot.steps = ["New reply"]
    response = ada.edit_message(conversation_id, messages[2]["id"], "Edited")
    assert response.status_code == 200
    question, reply = response.json
    assert [list(message) for message in response.json] == [["id", "sender", "text", "created_at"]] * 2
    assert (question["sender"], question["text"]) == ("user", "Edited")
    assert (reply["sender"], reply["text"]) == ("bot", "New reply")
    assert messages[5]["id"] < question["id"] < reply["id"]
    assert list_current(ada, conversation_id) == [*messages[:2], question, reply]
    assert [ada.get_message(conversation_id, message["id"]).json for message in messages] == messages


def test_edit_with_same_text_adds_a_reply(ada, bot, conversation_id, messages):
    bot.steps = ["New reply"]
    question, reply = ada.edit_message(conversation_id, messages[2]["id"], "Second").json
    assert question == messages[2]
    assert (reply["id"] > messages[5]["id"], reply["text"]) == (True, "New reply")
    assert list_current(ada, conversation_id) == [*messages[:3], reply]


@pytest.mark.parametrize("text", ["Edited", "Second"], ids=["other text", "same text"])
def test_edit_gives_bot_the_history_before_the_message(ada, bot, conversation_id, messages, text):
    ada.edit_message(conversation_id, messages[2]["id"], text)
    assert bot.histories[-1] == [("user", "First"), ("bot", "Hello there."), ("user", text)]


def test_edited_out_messages_are_not_found_by_searches(ada, conversation_id, messages):
    ada.edit_message(conversation_id, messages[2]["id"], "Edited")
    for q, count in {"Second": 0, "Third": 0, "Edited": 1, "First": 1}.items():
        assert len(ada.list_conversations(q=q)) == count
        assert len(ada.get("/api/messages", query_string={"q": q}).json) == count


def test_send_after_edit_follows_the_new_branch(ada, bot, conversation_id, messages):
    edited = ada.edit_message(conversation_id, messages[0]["id"], "Edited").json
    sent = ada.send_message(conversation_id, "Next").json
    assert list_current(ada, conversation_id) == edited + sent
    assert bot.histories[-1] == [("user", "Edited"), ("bot", "Hello there."), ("user", "Next")]


@each_way
def test_edit_may_be_asked_for_in_each_way(ada, bot, conversation_id, messages, headers):
    bot.steps = ["New ", "reply"]
    response = ada.edit_message(conversation_id, messages[2]["id"], "Edited", headers=headers)
    assert response.status_code == (202 if headers == ASYNC else 200)
    exchange = wait_for_end(ada, conversation_id)[2:]
    assert get_texts(exchange) == ["Edited", "New reply"]
    if headers == STREAM:
        (start, started, _), *_, (done, ended, _) = events = read_events(response)
        assert (start, started[1]["text"], started[1]["status"]) == ("start", "", "in_progress")
        assert (join_deltas(events), done, ended) == ("New reply", "done", exchange)
    elif headers == ASYNC:
        assert response.headers["Preference-Applied"] == "respond-async"
        assert response.json == [exchange[0], {**exchange[1], "text": "", "status": "in_progress"}]
    else:
        assert response.json == exchange


@pytest.mark.parametrize("text", ["Edited", "Second"], ids=["other text", "same text"])
@pytest.mark.parametrize(("steps", "reply_text"), [([BotError("down")], ""), (["New ", BotError("cut")], "New ")])
@each_way
def test_edit_whose_reply_fails_is_kept(ada, bot, conversation_id, messages, headers, steps, reply_text, text):
    bot.steps = steps
    response = ada.edit_message(conversation_id, messages[2]["id"], text, headers=headers)
    assert response.status_code == (502 if headers != ASYNC and not reply_text else 202 if headers == ASYNC else 200)
    *before, question, reply = wait_for_end(ada, conversation_id)
    assert (before, question["text"], reply["text"]) == (messages[:2], text, reply_text)
    assert (reply["status"], reply["error"]) == ("failed", "The bot failed to answer")
    bot.steps = ["New reply"]
    again = ada.edit_message(conversation_id, question["id"], text).json
    assert again[0] == question
    assert list_current(ada, conversation_id) == [*messages[:2], *again]
    ids = get_ids(ada.list_versions(conversation_id, reply["id"]).json)
    assert ids[-2:] == [reply["id"], again[1]["id"]]


def test_edit_of_message_of_bot_returns_409(ada, bot, conversation_id, messages):
    version = ada.get("/api/conversations").headers["ETag"]
    response = ada.edit_message(conversation_id, messages[3]["id"], "Edited")
    sentence = "Only a message of the user can be edited: edit the one that this message replies to"
    assert get_answer(response) == (409, {"error": sentence})
    assert ada.list_messages(conversation_id) == messages
    assert ada.get("/api/conversations").headers["ETag"] == version
    assert len(bot.histories) == 3


def test_edit_in_an_archived_conversation_brings_it_back(ada, conversation_id, messages):
    ada.patch(f"/api/conversations/{conversation_id}", json={"archived": True})
    ada.edit_message(conversation_id, messages[0]["id"], "Edited")
    assert ada.list_conversations(archived="false")[0]["id"] == conversation_id


# Edits while a reply is in progress


@pytest.fixture(params=[False, True], ids=["sent", "edited"])
def slow_exchange(request, ada, bot, gate, conversation_id, messages):
    """The messages of an exchange in progress, whose reply waits for the gate, sent or edited."""
    bot.scripts = {"Slow": ["Slow ", gate.wait, "reply"]}
    if request.param:
        return ada.edit_message(conversation_id, messages[2]["id"], "Slow", headers=ASYNC).json
    return ada.send_message(conversation_id, "Slow", headers=ASYNC).json


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
    assert get_answer(response) == (409, {"error": IN_PROGRESS})
    gate.set()
    assert get_texts(wait_for_end(ada, conversation_id)[-2:]) == ["Slow", "Slow reply"]


def test_edit_of_an_earlier_message_lets_a_later_reply_go_on(ada, bot, gate, conversation_id, slow_exchange, messages):
    edited = ada.edit_message(conversation_id, messages[0]["id"], "Edited").json
    gate.set()
    follow = ada.follow_reply(conversation_id, slow_exchange[1]["id"])
    assert read_events(follow)[-1][0] == "done"
    assert ada.get_message(conversation_id, slow_exchange[1]["id"]).json["text"] == "Slow reply"
    assert list_current(ada, conversation_id) == edited


def test_edit_of_a_conversation_that_is_deleted_meanwhile_returns_404(ada, bot, gate, conversation_id, messages):
    bot.scripts = {"Edited": [gate.wait, "New reply"]}
    editor = create_other_client(ada)
    with run_in_background(lambda: editor.edit_message(conversation_id, messages[2]["id"], "Edited")) as [editing]:
        wait_until(lambda: "Edited" in bot.texts)
        assert ada.delete(f"/api/conversations/{conversation_id}").status_code == 204
        gate.set()
    assert get_answer(editing.result()) == (404, {"error": "Conversation not found"})


def test_concurrent_edits_with_different_texts_are_versions(
    ada, bot, other_bot, gate, conversation_id, messages, second_client
):
    exchanges = run_all(
        lambda: ada.edit_message(conversation_id, messages[2]["id"], "One").json,
        lambda: second_client.edit_message(conversation_id, messages[2]["id"], "Two").json,
    )
    last = max(exchanges, key=lambda exchange: exchange[0]["id"])
    assert list_current(ada, conversation_id) == [*messages[:2], *last]
    questions = [messages[2], *sorted((exchange[0] for exchange in exchanges), key=lambda question: question["id"])]
    assert ada.list_versions(conversation_id, messages[2]["id"]).json == questions


def test_concurrent_regenerations_ask_bot_once(ada, bot, gate, conversation_id, messages, other_process):
    bot.steps = [gate.wait, "New reply"]
    ada.edit_message(conversation_id, messages[4]["id"], "Third", headers=ASYNC)
    clients = [create_other_client(client) for client in (ada, other_process) for _ in range(3)]
    exchanges = run_concurrently(
        6, lambda number: clients[number].edit_message(conversation_id, messages[4]["id"], "Third", headers=ASYNC).json
    )
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


BRANCHES = {  # by the message that is to be shown
    "Q1": "Q1 R1c",
    "R1": "Q1 R1 Q2 R2 Q3 R3",
    "Q2": "Q1 R1 Q2 R2 Q3 R3",
    "R3": "Q1 R1 Q2 R2 Q3 R3",
    "R1c": "Q1 R1c",
    "Q1b": "Q1b R1b Q2b R2b",
    "R1b": "Q1b R1b Q2b R2b",
    "R2b": "Q1b R1b Q2b R2b",
}


@pytest.mark.parametrize("name", BRANCHES)
def test_current_shows_the_branch_of_a_message(ada, conversation_id, other_process, tree, name):
    branch = [tree[each] for each in BRANCHES[name].split()]
    for before in ("R1c", "R3", "R2b"):
        ada.show_branch(conversation_id, tree[before]["id"])
        response = other_process.show_branch(conversation_id, tree[name]["id"])
        assert (response.status_code, response.json["messages"]) == (200, branch), before
        assert ada.get(f"/api/conversations/{conversation_id}").json == response.json, before
        assert list_current(ada, conversation_id) == branch, before


@pytest.mark.parametrize(
    "body", [{}, {"message_id": "1"}, {"message_id": True}, {"message_id": 0}, {"message_id": 2**63}]
)
def test_current_with_invalid_id_returns_400(ada, conversation_id, messages, body):
    response = ada.put(f"/api/conversations/{conversation_id}/current", json=body)
    assert get_answer(response) == (400, {"error": f"message_id must be an integer from 1 to {2**63 - 1}"})
    assert ada.list_messages(conversation_id) == messages


VERSIONS = {"Q1": "Q1 Q1b", "Q1b": "Q1 Q1b", "R1": "R1 R1c", "R1c": "R1 R1c", "Q2": "Q2", "R1b": "R1b", "R2b": "R2b"}


@pytest.mark.parametrize("name", VERSIONS)
def test_versions_are_listed_oldest_first(ada, conversation_id, tree, name):
    response = ada.list_versions(conversation_id, tree[name]["id"])
    assert get_answer(response) == (200, [tree[each] for each in VERSIONS[name].split()])


def test_messages_name_their_versions_if_asked(ada, conversation_id, tree):
    questions, replies = ([tree[name]["id"] for name in names] for names in (("Q1", "Q1b"), ("R1", "R1c")))
    shown = [{**tree["Q1"], "versions": questions}, {**tree["R1"], "versions": replies}]
    ada.show_branch(conversation_id, tree["R3"]["id"])
    assert list_current(ada, conversation_id, versions=1)[:2] == shown
    assert list_current(ada, conversation_id, versions=1)[2:] == [tree[name] for name in ("Q2", "R2", "Q3", "R3")]
    assert list_current(ada, conversation_id, versions=0)[:2] == [tree["Q1"], tree["R1"]]
    path = f"/api/conversations/{conversation_id}/current?versions=1"
    response = ada.put(path, json={"message_id": tree["Q1b"]["id"]})
    assert response.json["messages"][0] == {**tree["Q1b"], "versions": questions}
    assert ada.get(f"/api/conversations/{conversation_id}?versions=2").status_code == 400


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
    with run_in_background(lambda: create_other_client(second_client).follow_reply(conversation_id, reply["id"])) as [
        following
    ]:
        stopped = second_client.stop_reply(conversation_id, reply["id"]).json
    assert read_events(following.result())[-1][:2] == ("done", [messages[4], stopped])
    assert list_current(ada, conversation_id) == messages


# Trees of many messages


def read_path(app, conversation_id):
    """Return the current messages as rows of (id, parent's id, sender)."""
    query = "SELECT id, parent_id, sender FROM message WHERE conversation_id = :id AND is_current ORDER BY id"
    return execute(app, query, id=conversation_id)


def is_path(rows):
    """Return whether messages are one path from the first message on, ending in a reply."""
    ids = [id for id, _, _ in rows]
    parents, senders = [parent for _, parent, _ in rows], [sender for _, _, sender in rows]
    return parents == [None, *ids[:-1]] and senders == ["user", "bot"] * (len(rows) // 2)


def test_100_random_operations_in_two_processes_always_leave_one_path(app, ada, bot, conversation_id, other_process):
    bot.scripts = {"fail": [BotError("down")], "cut": ["One ", BotError("cut")]}
    ids = get_ids(ada.send_message(conversation_id, "First").json)
    texts = ["Hello", "Tea", "fail", "cut"]

    def operate(number):
        """Make 50 random changes; note new messages and what the current ones are."""
        client, choices, paths = create_other_client((ada, other_process)[number]), random.Random(number), []
        for _ in range(50):
            headers = choices.choice([{}, STREAM, ASYNC])
            message_id, text = choices.choice(ids), choices.choice(texts)
            operation = choices.choice(["send", "edit", "edit", "regenerate", "current", "current", "stop"])
            if operation == "send":
                response = client.send_message(conversation_id, text, headers=headers)
            elif operation == "current":
                response = client.show_branch(conversation_id, message_id)
            elif operation == "stop":
                response = client.stop_reply(conversation_id, message_id)
            else:
                stored = client.get_message(conversation_id, message_id).json["text"]
                text = stored or text if operation == "regenerate" else text
                response = client.edit_message(conversation_id, message_id, text, headers=headers)
            assert response.status_code in (200, 201, 202, 409, 502), response.text
            paths.append(read_path(app, conversation_id))
            ids.extend({id for id, _, _ in paths[-1]} - set(ids))
        return paths

    paths = [path for paths in run_concurrently(2, operate) for path in paths]
    assert len(paths) == 100
    assert all(map(is_path, paths))
    assert get_ids(wait_for_end(ada, conversation_id)) == [id for id, _, _ in read_path(app, conversation_id)]


@pytest.fixture
def long_conversation_id(app, ada):
    """The id of a conversation of 1,500 messages, each of which has another version."""
    [id] = add_conversations(app, ada, 1, messages=1500)
    columns = "conversation_id, sender, text, created_at, parent_id"
    execute(app, f"INSERT INTO message ({columns}, is_current) SELECT {columns}, false FROM message")
    return id


def test_current_shows_and_leaves_a_branch_of_1500_messages(app, ada, long_conversation_id):
    messages = ada.list_messages(long_conversation_id)
    edited = ada.edit_message(long_conversation_id, messages[0]["id"], "Edited").json
    assert ada.list_messages(long_conversation_id) == edited
    shown = ada.show_branch(long_conversation_id, messages[-1]["id"]).json["messages"]
    assert shown == messages
    assert is_path(read_path(app, long_conversation_id))


@pytest.mark.parametrize("path", ["/api/conversations/{0}", "/api/account"])
def test_deletion_of_1500_messages_with_versions_leaves_nothing(app, ada, long_conversation_id, path):
    assert count_messages(app) == 3000
    assert ada.delete(path.format(long_conversation_id), json={"password": PASSWORD}).status_code == 204
    assert count_messages(app) == 0
