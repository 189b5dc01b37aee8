"""The bot: a conversation's history in, chunks of the reply out. No Flask, no database.

A bot is called as `bot(history, user_id=..., conversation_id=...)`. The history is a list of (sender, text), oldest
first, with the user's new message last; the result is any iterable of strings. The history may begin with a message of
the bot, and have several messages of the user in a row: see fit_history(). A bot raises BotError or one of its
subclasses when it fails. If the iterable has a method `cancel()`, another thread may call it at any time, even after
the end, to end a blocked `next()`; a method `close()` is called by the thread that iterates.
"""

import re
import time

HELP = """This bot is simulated. It understands these commands:
/slow 5 replies for five seconds, one word a second: to be stopped, or reloaded in between
/long 500 replies with 500 words at once
/fail fails before the first word
/drop 10 fails after ten words
/truncate 10 is cut off after ten words, as a model is at its token limit
/help shows this list"""
COMMAND = re.compile(r"/(slow|long|fail|drop|truncate|help)(?:\s+([1-9][0-9]{0,3}))?(?!\S)")
MAX_QUOTE_LENGTH = 80


class BotError(Exception):
    """The bot failed. The message is for the log and contains no text of a conversation; clients get the sentence."""

    status = 502
    sentence = "The bot failed to answer"


class BotTimeout(BotError):
    """The model produced nothing for BOT_TIMEOUT seconds, or within BOT_MAX_SECONDS."""

    status = 504
    sentence = "The bot took too long to answer"


class BotBusy(BotError):
    """The model is busy; a retry after `retry_after` seconds may succeed."""

    sentence = "The bot is busy, try again later"

    def __init__(self, message, retry_after):
        super().__init__(message)
        self.retry_after = retry_after


class BotRefused(BotError):
    """The model refuses to answer the message."""

    status = 422
    sentence = "The bot refuses to answer this message"


class BotTruncated(BotError):
    """The model ended the reply at a limit. Raised after the last chunk: the reply is not failed, but truncated."""


class BotMessageTooLong(BotError):
    """The new message alone does not fit the model's context."""

    status = 413
    sentence = "The message is too long for the bot"


def create_bot(config):
    """Return the bot for a configuration: an OpenAI-compatible model if BOT_MODEL is set, else the simulated bot."""
    if not config["BOT_MODEL"]:
        return simulated_bot
    from app.openai_bot import OpenAIBot  # takes memory that the simulated bot does not need

    return OpenAIBot(config)


def simulated_bot(history, user_id=None, conversation_id=None):
    """Yield a reply word by word, always the same one for the same history."""
    text = history[-1][1].strip()
    command = COMMAND.match(text)
    if command and command[1] != "help":
        yield from run_command(command[1], int(command[2] or 10))
    else:
        earlier = [message for sender, message in history[:-1] if sender == "user"]
        reply = HELP if command else canned_reply(text, earlier[-1] if earlier else "")
        yield from re.findall(r"\S+\s*", reply)


def run_command(name, count):
    """Yield `count` words, or fail, as a command of the simulated bot demands."""
    if name == "fail":
        raise BotError("simulated failure")
    for number in range(1, count + 1):
        if name == "slow":
            time.sleep(1)
        yield f"{number} "
    if name == "drop":
        raise BotError("simulated failure after some words")
    if name == "truncate":
        raise BotTruncated("simulated token limit")


def canned_reply(text, previous):
    """Return a reply to a text that quotes it and the user's previous message."""
    if text.endswith("?"):
        reply = f"You ask: {quote(text)} A real model would know; this bot is simulated. Try /help."
    elif re.match(r"(hi|hello|hey|good (morning|day|evening))\b", text, re.IGNORECASE):
        reply = "Hello! What is on your mind?"
    else:
        reply = f"You say: {quote(text)} Tell me more."
    return f"{reply} Before that you wrote: {quote(previous)}" if previous else reply


def quote(text):
    """Return at most MAX_QUOTE_LENGTH characters of a text in quotes, with an ellipsis if it was longer."""
    return f"“{text}”" if len(text) <= MAX_QUOTE_LENGTH else f"“{text[: MAX_QUOTE_LENGTH - 1]}…”"


def fit_history(history, max_chars):
    """Return the latest whole exchanges of a history within `max_chars` characters, but always the new message.

    The result begins with the user and alternates: consecutive messages of one sender are joined by a blank line.
    """
    exchanges = split_into_exchanges(history)
    new_sender, new_text = history[-1]
    if not exchanges or len(exchanges[-1]["user"]) > max_chars:
        return [(new_sender, new_text)]
    first, remaining = len(exchanges), max_chars
    while first and (remaining := remaining - sum(map(len, exchanges[first - 1].values()))) >= 0:
        first -= 1
    return [message for exchange in exchanges[first:] for message in exchange.items()]


def split_into_exchanges(history):
    """Return the exchanges of a history, each a dict of the user's text and, if there is one, the bot's text."""
    exchanges = []
    for sender, text in history:
        if not text.strip():
            continue
        if sender == "user" and (not exchanges or "bot" in exchanges[-1]):
            exchanges.append({"user": text})
        elif exchanges:
            previous = exchanges[-1].get(sender)
            exchanges[-1][sender] = f"{previous}\n\n{text}" if previous else text
    return exchanges
