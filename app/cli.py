"""Commands: `flask users`, `flask demo` and `flask prune`."""

import sys
import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import click
from flask.cli import AppGroup, with_appcontext
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from app import db
from app.bot import BotError, simulated_bot
from app.database import database_now, format_timestamp
from app.errors import database_error_message, get_reason
from app.models import Conversation, Message, User
from app.security import hash_password
from app.validation import check_new_password, check_username

DEMO_PASSWORD = "demo password"
DEMO = {  # user: conversations with their texts of the user, and the status of the last reply
    "charles": [
        ("The analytical engine", ["Hello", "Can a machine compose music?", "I think it might"]),
        ("Notes", ["Note G is about the Bernoulli numbers"]),
    ],
    "alan": [("Can machines think?", ["Good morning", "Can you play the imitation game?"])],
    "barbara": [
        ("A first draft", []),
        ("A reply that failed", ["Hello"], "failed"),
        ("A reply that was stopped", ["Hello"], "stopped"),
        ("A reply cut short", ["Hello"], "truncated"),
        ("A reply in progress", ["Hello"], "in_progress"),  # "failed" soon, as no process generates it
    ],
}
USER_EXISTS, USER_UNKNOWN = "Username already exists", "Username does not exist"
LINE = "{:>6}  {:<8}  {:<27}  {:>13}  {:>8}  {:>9}  {}"
HEADINGS = ("ID", "STATUS", "LAST LOGIN", "CONVERSATIONS", "MESSAGES", "LAST 24 H", "USERNAME")
PRUNE_BATCH_SIZE = 20  # conversations that are deleted in one transaction
PRUNE_PAUSE = 0.05  # seconds between two of them, in which other transactions can write


def init_app(app):
    """Register the commands."""
    for command in (demo, users, prune):
        app.cli.add_command(command)


class Command(click.Command):
    """A command that reports in one line that the database cannot be used, or that a name is taken."""

    def invoke(self, context):
        """Run the command. Raises ClickException for an error of the database."""
        sys.stdout.reconfigure(errors="backslashreplace")  # the console may lack characters of a name
        try:
            return super().invoke(context)
        except IntegrityError:
            raise click.ClickException(USER_EXISTS) from None
        except SQLAlchemyError as error:
            if message := database_error_message(error):
                raise click.ClickException(f"{message} ({get_reason(error)})") from error
            raise


users = AppGroup("users", help="List and manage the users.")
users.command_class = Command


@users.command("list")
def list_users():
    """List the users, who has logged in and not out since, and how much they have written."""
    is_new = Message.created_at >= datetime.now(UTC) - timedelta(days=1)
    counts = (func.count(Conversation.id.distinct()), func.count(Message.id), func.count(Message.id).filter(is_new))
    query = select(User, *counts).outerjoin(User.conversations).outerjoin(Conversation.messages)
    rows = db.session.execute(query.group_by(User.id).order_by(User.id))
    click.echo(LINE.format(*HEADINGS))
    for user, *numbers in rows:
        status = "Disabled" if user.is_disabled else "Online" if user.is_logged_in else "Offline"
        last_login = format_timestamp(user.last_login) if user.last_login else "never"
        click.echo(LINE.format(user.user_id, status, last_login, *numbers, user.username))


@users.command("add")
@click.argument("name")
def add_user(name):
    """Add a user. The password is asked for, or is the first line of the standard input."""
    username = check_value(check_username, "username", name)
    if User.get_by_username(username):
        raise click.ClickException(USER_EXISTS)
    db.session.close()  # holds no connection while it waits for input
    user = User(username=username, password_hash=hash_password(read_password()))
    db.session.add(user)
    finish("Added", user)


@users.command("set-password")
@click.argument("name")
def set_password(name):
    """Set a user's password, and end all sessions of the user."""
    user = get_user(name)
    finish("Changed the password of", user.end_session(password_hash=hash_password(read_password())))


@users.command("delete")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete_user(name, yes):
    """Delete a user with all conversations."""
    user = get_user(name)
    if not yes:
        click.confirm(f"Delete {user.username} with all conversations?", abort=True)
    db.session.delete(user)
    finish("Deleted", user)


@users.command("disable")
@click.argument("name")
def disable_user(name):
    """Refuse a user's logins, and end all sessions of the user."""
    finish("Disabled", get_user(name).end_session(is_disabled=True))


@users.command("enable")
@click.argument("name")
def enable_user(name):
    """Accept a disabled user's logins again."""
    finish("Enabled", get_user(name).update_if(is_disabled=False))


def get_user(name):
    """Return the user of a name. Raises ClickException if there is none."""
    user = User.get_by_username(check_value(check_username, "username", name))
    db.session.close()  # holds no connection while it waits for input
    if user is None:
        raise click.ClickException(USER_UNKNOWN)
    return user


def finish(action, user):
    """Commit, and print what was done. Raises ClickException without a user: another process has deleted it."""
    if user is None:
        raise click.ClickException(USER_UNKNOWN)
    db.session.commit()
    click.echo(f"{action} {user.username}")


def read_password():
    """Return a new password: typed twice at a terminal, else the first line of the standard input."""
    try:
        if sys.stdin.isatty():
            password = click.prompt("Password", hide_input=True, confirmation_prompt=True)
        else:
            password = sys.stdin.readline().rstrip("\r\n")
        password.encode()
    except UnicodeError:
        raise click.ClickException(f"password must be text in {sys.stdin.encoding}") from None
    return check_value(check_new_password, "password", password)


def check_value(check, *args):
    """Return what a check of app/validation.py returns. Raises ClickException if the value is invalid."""
    try:
        return check(*args)
    except ValueError as error:
        raise click.ClickException(str(error)) from None


@click.command(cls=Command)
@with_appcontext
def demo():
    """Add some users and conversations, for a front end to show."""
    password_hash = hash_password(DEMO_PASSWORD)
    for username, conversations in DEMO.items():
        user = User(username=username, password_hash=password_hash)
        user.conversations = [create_conversation(*conversation) for conversation in conversations]
        db.session.add(user)
    db.session.commit()
    click.echo(f"Log in as {', '.join(DEMO)}; the password is: {DEMO_PASSWORD}")


def create_conversation(name, texts, last_status="complete"):
    """Return a conversation in which a user has sent these texts, with the replies of the simulated bot."""
    history = []
    for text in texts:
        history += [("user", text), ("bot", "".join(simulated_bot([*history, ("user", text)])))]
    now = datetime.now(UTC)
    messages = [Message(sender=sender, text=text, created_at=now) for sender, text in history]
    for parent, message in pairwise(messages):
        message.parent = parent
    if messages:
        messages[-1].status = last_status
        messages[-1].error = BotError.sentence if last_status == "failed" else None
        messages[-1].heartbeat_at = database_now() if last_status == "in_progress" else None
    return Conversation(name=name, messages=messages)


@click.command(cls=Command)
@click.option("--before", required=True, type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ"]), help="In UTC.")
@with_appcontext
def prune(before):
    """Delete the conversations that have not changed since a date."""
    before = before.replace(tzinfo=UTC)
    if before > datetime.now(UTC):
        raise click.BadParameter("must not be in the future", param_hint="--before")
    total = 0
    while count := Conversation.prune(before, PRUNE_BATCH_SIZE):
        total += count
        time.sleep(PRUNE_PAUSE)
    click.echo(f"Deleted {total} conversation{'' if total == 1 else 's'}")
