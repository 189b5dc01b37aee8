"""The bot: a conversation's history in, pieces of reply out. It knows no HTTP of ours and no database.

A bot is a function from a history, a list of (sender, text) with the oldest first and the user's new
message last, to an iterator of pieces of text. It raises BotError when it cannot go on.
"""

import re
import time
from queue import Empty, SimpleQueue
from threading import Thread

REPLY_LENGTH = 100_000  # characters, after which a model that does not come to an end is cut off
HELP = """I am simulated, for rehearsing a front end:
/slow 5 takes five seconds, piece by piece;
/long 500 is 500 words;
/fail fails as a model would;
/drop 10 breaks off after ten words;
/help says this."""


class BotError(Exception):
    """The bot failed, and how: for the log, not for people."""


class BotTimeout(BotError):
    """The bot was silent for too long."""


def make_bot(settings):
    """Return the bot that the settings, a mapping, choose: the simulated one unless BOT_MODEL names a model."""
    return openai_bot(settings) if settings["BOT_MODEL"] else simulated_bot


def simulated_bot(history):
    """Reply without a model, and without chance: the same history always gets the same reply."""
    said = history[-1][1].strip()
    command = re.fullmatch(r"/(slow|long|fail|drop|help)(?: +([1-9][0-9]{0,3}))?", said)
    name, number = (command[1], int(command[2] or 10)) if command else ("", 0)
    if name == "fail":
        raise BotError("asked to fail")
    if name == "help":
        yield from words(HELP)
    elif name:
        for count in range(1, number + 1):
            if name == "slow":
                time.sleep(1)
            yield f"{count} "
        if name == "drop":
            raise BotError("asked to break off")
    else:
        yield from words(small_talk(said, [text for sender, text in history[:-1] if sender == "user"]))


def small_talk(said, before):
    """Return a sentence or two on what was `said`, after what the user said `before`."""
    subject = said if len(said) <= 80 else f"{said[:79]}…"
    if said.endswith("?"):
        reply = f"You ask: “{subject}” A real model would know; I am simulated. Try /help."
    elif re.match(r"(hi|hello|hey|good (morning|day|evening))\b", said, re.IGNORECASE):
        reply = "Hello! What would you like to talk about?"
    else:
        reply = f"You say: “{subject}” Tell me more."
    return f"{reply} Before that you said: “{before[-1][:80]}”" if before else reply


def words(text):
    """Split into words, each with the blanks that follow it."""
    return re.findall(r"\S+\s*", text)


def openai_bot(settings):
    """Return a bot that asks a model by the OpenAI protocol, which most servers of models speak."""
    import openai

    timeout = settings["BOT_TIMEOUT"]
    client = openai.OpenAI(
        base_url=settings["OPENAI_BASE_URL"],
        api_key=settings["OPENAI_API_KEY"] or "none",  # a model at home wants no key, the client wants one
        timeout=timeout,
        max_retries=0,
    )
    nonsense = (ValueError, TypeError, AttributeError, RecursionError)  # chunks that are no JSON, or not as agreed
    prompt = [{"role": "system", "content": settings["BOT_PROMPT"]}] if settings["BOT_PROMPT"] else []
    roles = {"user": "user", "bot": "assistant"}

    def bot(history):
        messages = prompt + [{"role": roles[sender], "content": text} for sender, text in history]
        finished, left, heard = False, REPLY_LENGTH, time.monotonic()
        try:
            with client.chat.completions.create(model=settings["BOT_MODEL"], messages=messages, stream=True) as chunks:
                for chunk in chunks:
                    for choice in chunk.choices or ():
                        finished = finished or choice.finish_reason is not None
                        if piece := clean((choice.delta and choice.delta.content) or "")[:left]:
                            left -= len(piece)
                            yield piece
                            heard = time.monotonic()
                    if not left:
                        return
                    if time.monotonic() - heard > timeout:
                        raise BotTimeout(f"the model said nothing for {timeout} s")
        except openai.APITimeoutError as error:
            raise BotTimeout(f"the model was silent for {timeout} s") from error
        except (openai.OpenAIError, *nonsense) as error:
            reason = " ".join(str(error).split()).replace(client.api_key, "[key]")  # some servers repeat it
            raise BotError(f"the model failed: {reason}") from error
        if not finished:
            raise BotError("the model broke off")

    return bot


def clean(text):
    """Leave out what a database cannot hold: NUL, and halves of surrogate pairs."""
    return text.replace("\0", "").encode("utf-8", "ignore").decode()


def with_pauses(pieces, seconds):
    """Yield the pieces as they come, and None whenever that many seconds passed without one."""
    queue = SimpleQueue()
    wanted = True

    def pump():
        try:
            for piece in pieces:
                queue.put(piece)
                if not wanted:
                    break
            queue.put(StopIteration())
        except Exception as error:
            queue.put(error)
        finally:
            pieces.close()

    Thread(target=pump, daemon=True).start()
    try:
        while True:
            try:
                piece = queue.get(timeout=seconds)
            except Empty:
                piece = None
            if isinstance(piece, StopIteration):
                return
            if isinstance(piece, Exception):
                raise piece
            yield piece
    finally:
        wanted = False
