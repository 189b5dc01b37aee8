"""Commands: `flask demo`, `flask users` and `flask prune`."""

import time
from datetime import UTC, datetime
from itertools import pairwise

import click
import orjson
from flask.cli import with_appcontext
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from app import db
from app.bot import simulated_bot
from app.database import database_now
from app.errors import database_error_message, get_reason
from app.models import Conversation, Message, User
from app.security import hash_password

DEMO_PASSWORD = "demo password"
DEMO = {
    "charles": {
        "The analytical engine": ["Hello", "Can a machine compose music?", "I think it might"],
        "Notes": ["Note G is about the Bernoulli numbers"],
    },
    "alan": {"Can machines think?": ["Good morning", "Can you play the imitation game?"]},
    "barbara": {"A first draft": []},
}
DEMO_STATUSES = {
    "A reply that failed": "failed",
    "A reply that was stopped": "stopped",
    "A reply cut short": "truncated",
    "A reply in progress": "in_progress",  # "failed" after HEARTBEAT_TIMEOUT, as no process generates it
}
PRUNE_BATCH_SIZE = 20  # conversations that are deleted in one transaction
PRUNE_PAUSE = 0.05  # seconds between two of them, in which other transactions can write


def init_app(app):
    """Register the commands."""
    for command in (demo, users, prune):
        app.cli.add_command(command)


@click.command()
@with_appcontext
def demo():
    """Add some users and conversations, for a front end to show."""
    password_hash = hash_password(DEMO_PASSWORD)
    demo_users = []
    for username, conversations in DEMO.items():
        user = User(username=username, password_hash=password_hash)
        user.conversations = [create_conversation(name, texts) for name, texts in conversations.items()]
        demo_users.append(user)
    demo_users[-1].conversations += [
        create_conversation(name, ["Hello"], status) for name, status in DEMO_STATUSES.items()
    ]
    db.session.add_all(demo_users)
    try:
        db.session.commit()
    except IntegrityError:
        raise click.ClickException("the demo's users exist already") from None
    except SQLAlchemyError as error:
        raise to_click_exception(error) from error
    click.echo(f"Log in as {', '.join(DEMO)}; the password is: {DEMO_PASSWORD}")


def create_conversation(name, texts, last_status="complete"):
    """Return a conversation in which a user has sent these texts, with the replies of the simulated bot."""
    history = []
    for text in texts:
        history.append(("user", text))
        history.append(("bot", "".join(simulated_bot(history))))
    now = datetime.now(UTC)
    messages = [Message(sender=sender, text=text, created_at=now) for sender, text in history]
    for parent, message in pairwise(messages):
        message.parent = parent
    if messages:
        messages[-1].status = last_status
        messages[-1].heartbeat_at = database_now() if last_status == "in_progress" else None
    return Conversation(name=name, messages=messages)


@click.command()
@with_appcontext
def users():
    """List the users, and who has logged in and not out since."""
    try:
        rows, _ = User.list_status(valid_from=datetime(1970, 1, 1, tzinfo=UTC))
    except SQLAlchemyError as error:
        raise to_click_exception(error) from error
    for user in orjson.loads(rows):
        last_login = user["last_login"] or "never"
        click.echo(f"{user['user_id']:>6}  {user['status']:<7}  {last_login:<27}  {user['username']}")


@click.command()
@click.option("--before", required=True, type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ"]), help="In UTC.")
@with_appcontext
def prune(before):
    """Delete the conversations that have not changed since a date."""
    before = before.replace(tzinfo=UTC)
    if before > datetime.now(UTC):
        raise click.BadParameter("must not be in the future", param_hint="--before")
    count = 0
    try:
        while deleted := Conversation.prune(before, PRUNE_BATCH_SIZE):
            count += deleted
            time.sleep(PRUNE_PAUSE)
    except SQLAlchemyError as error:
        raise to_click_exception(error) from error
    click.echo(f"Deleted {count} conversation{'' if count == 1 else 's'}")


def to_click_exception(error):
    """Return the error message of the command line for a database error; raise the error if it is a bug."""
    if message := database_error_message(error):
        return click.ClickException(f"{message} ({get_reason(error)})")
    raise error
