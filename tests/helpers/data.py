"""Rows that would take too many requests, pages of lists, and what responses hold."""

import re
from datetime import UTC, datetime, timedelta
from urllib.parse import urljoin

from sqlalchemy import func, insert, select, update

from app import db
from app.models import Conversation, Message

SET_PARENTS = """UPDATE message SET parent_id = (SELECT max(before.id) FROM message AS before
                 WHERE before.conversation_id = message.conversation_id AND before.id < message.id)
                 WHERE parent_id IS NULL"""


def add_conversations(app, client, count, messages=0):
    """Add conversations of the client's user, each with so many messages on one branch; return their ids."""
    now = datetime.now(UTC)
    with app.app_context():
        statement = insert(Conversation).returning(Conversation.id, sort_by_parameter_order=True)
        rows = [
            {
                "name": f"Conversation {n}",
                "user_id": client.user_id,
                "created_at": now - timedelta(microseconds=count - n),
            }
            for n in range(count)
        ]
        ids = db.session.scalars(statement, rows).all()
        if messages:
            senders = ["bot" if n % 2 else "user" for n in range(messages)]
            texts = [{"sender": sender, "text": f"Text {n}", "created_at": now} for n, sender in enumerate(senders)]
            db.session.execute(insert(Message), [{**row, "conversation_id": id} for id in ids for row in texts])
            db.session.execute(db.text(SET_PARENTS))
        db.session.commit()
    return ids


def execute(app, statement, **parameters):
    """Execute an SQL statement in a transaction and return its rows as tuples, if it returns any."""
    with app.app_context(), db.engine.begin() as connection:
        result = connection.execute(db.text(statement), parameters)
        return [tuple(row) for row in result] if result.returns_rows else None


def count_messages(app):
    """Return the number of messages of all users, in all versions."""
    with app.app_context():
        return db.session.scalar(select(func.count(Message.id)))


def age_heartbeats(app, seconds):
    """Let the replies in progress look as if their process had been killed some seconds ago."""
    with app.app_context():
        for id, heartbeat_at in db.session.execute(select(Message.id, Message.heartbeat_at)).all():
            if heartbeat_at:
                aged = heartbeat_at - timedelta(seconds=seconds)
                db.session.execute(update(Message).where(Message.id == id).values(heartbeat_at=aged))
        db.session.commit()


def add_abandoned_exchange(app, conversation_id, text="One ", seconds=31):
    """Add a question and a reply in progress to an empty conversation, as a process leaves them that was killed."""
    with app.app_context():
        question = Message(conversation_id=conversation_id, sender="user", text="Killed")
        heartbeat_at = datetime.now(UTC) - timedelta(seconds=seconds)
        reply = Message(sender="bot", text=text, status="in_progress", heartbeat_at=heartbeat_at, parent=question)
        reply.conversation_id = conversation_id
        db.session.add_all([question, reply])
        db.session.commit()
        return question.id, reply.id


def get_answer(response):
    """Return the status and the JSON of a response."""
    return response.status_code, response.json


def get_texts(messages):
    """Return the texts of messages."""
    return [message["text"] for message in messages]


def get_items(response):
    """Return the items of a page of any list."""
    assert response.status_code == 200, response.json
    return response.json if isinstance(response.json, list) else response.json["users"]


def get_ids(items):
    """Return the ids of conversations, messages or users."""
    return [item["user_id"] if "user_id" in item else item["id"] for item in items]


def get_next_url(response):
    """Return the URL of the next page from the Link of a page, or None."""
    link = response.headers.get("Link")
    return link and urljoin(response.request.url, re.fullmatch('<([^<>"]+)>; rel="next"', link)[1])


def read_pages(client, url, after_each_page=None, **parameters):
    """Follow the links from page to page and return each page's items."""
    pages = []
    response = client.get(url, query_string=parameters)
    while True:
        pages.append(get_items(response))
        if after_each_page:
            after_each_page(pages[-1])
        if not (next_url := get_next_url(response)):
            return pages
        response = client.get(next_url)
