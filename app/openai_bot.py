"""A bot that asks a model through the OpenAI API, which most model servers offer.

urllib3 takes about 10 us of CPU for a chunk; the openai package takes twenty times that, and 30 MB and half a second to
be imported.
"""

import itertools
import re
import ssl
import time
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from ipaddress import ip_address, ip_network
from socket import SHUT_RDWR
from threading import Event, Lock, Thread
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import orjson
import urllib3
from urllib3.exceptions import ConnectTimeoutError, HTTPError, ReadTimeoutError

from app.bot import BotError, BotMessageTooLong, BotTimeout, fit_history
from app.openai_protocol import Completion, ContextExceeded, EventParser, parse_error, skip_thinking
from config import ConfigError

BLOCK_BYTES = 65_536
BLOCKS_PER_SWITCH = 64  # after so many, other threads run; greenlets would not by themselves
CONNECT_TIMEOUT = 10  # seconds for each address of a host, or a third of BOT_TIMEOUT
FINISH_TIMEOUT = 3  # seconds of silence after a finish reason that end the reply
ERROR_TIMEOUT = 3  # seconds for the body of an error response
DRAIN_TIMEOUT = 1  # seconds for the end of a response after the end of its reply
REQUEST_OPTIONS = {"preload_content": False, "decode_content": True, "redirect": False, "retries": False}
ROLES = {"user": "user", "bot": "assistant"}
TITLE_PROMPT = (
    "Name this conversation in its language, in at most six words, without quotes. Answer with the name only."
)

current_reply = ContextVar("current_reply")


class OpenAIBot:
    """A bot whose replies a model writes. Raises ConfigError if the environment names a proxy that cannot be used."""

    def __init__(self, config):
        url = urlsplit(config["OPENAI_BASE_URL"])
        self.url = create_url(url)
        self.headers = create_headers(url, config["OPENAI_API_KEY"])
        self.pool_manager = create_pool_manager(url)
        self.timeout = config["BOT_TIMEOUT"]
        self.options = {**config["BOT_OPTIONS"], "model": config["BOT_MODEL"], "stream": True}
        system_prompt = config["BOT_SYSTEM_PROMPT"]
        self.system_messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.max_chars = config["BOT_HISTORY_CHARS"]

    def __call__(self, history, user_id=None, conversation_id=None):
        """Return the reply to a history as an iterable."""
        return ModelReply(self, history)

    def create_title(self, history):
        """Return a title of a conversation in one line. Raises BotError if there is none."""
        question = "\n\n".join(f"{ROLES[sender]}: {text}" for sender, text in history)[: self.max_chars]
        reply = ModelReply(self, [("user", f"{TITLE_PROMPT}\n\n{question}")], has_total_timeout=True)
        text = re.sub(r"(?im)^[\W_]*title:", "", "".join(reply))
        lines = ["".join(filter(str.isprintable, line)) for line in text.splitlines()]
        lines = [re.sub(r"^[\s#>*_`\"'“”„«»-]+|[\s*_`\"'“”«».]+$", "", line) for line in lines]
        if not any(lines):
            raise BotError("the model gave no title")
        return next(filter(None, lines))

    def encode_request(self, history):
        """Return the body of a request."""
        messages = [{"role": ROLES[sender], "content": text} for sender, text in history]
        return orjson.dumps({**self.options, "messages": self.system_messages + messages})


class ModelReply:
    """An iterable of the chunks of a reply, which another thread may cancel.

    A second thread ends the reply at its deadline, whatever the connection is doing.
    """

    def __init__(self, bot, history, has_total_timeout=False):
        self.bot = bot
        self.history = history
        self.has_total_timeout = has_total_timeout  # else each sign of life begins the time again
        self.deadline = time.monotonic() + bot.timeout
        self.is_over = Event()
        self.is_cancelled = self.is_late = False
        self.lock = Lock()
        self.sock = None  # of the connection, see ConnectionOfReply

    def __iter__(self):
        """Yield the chunks. Raises BotError."""
        current_reply.set(self)
        Thread(target=self.watch, daemon=True).start()
        try:
            yield from self.read_reply()
        except (HTTPError, OSError, ValueError, BotError) as error:
            failure = self.to_bot_error(error)
        else:
            failure = None
        finally:
            self.is_over.set()
        if failure and not self.is_cancelled:
            raise failure  # not above: the error of the connection, which may quote the response, is not its context

    def to_bot_error(self, error):
        """Return the BotError for an exception; that of a connection is judged by its cause."""
        is_timeout = isinstance(error, ConnectTimeoutError | ReadTimeoutError | TimeoutError)
        if self.is_late or (is_timeout and not isinstance(error.__cause__, ConnectionError)):
            return BotTimeout(f"no text from the model for {self.bot.timeout} s")
        if isinstance(error, BotError):
            return error
        causes = [cause for cause in (error.__cause__, *error.args) if isinstance(cause, Exception)]
        return BotError(f"the connection to the model failed: {type((causes or [error])[0]).__name__}")

    def watch(self):
        """Shut the connection down at the deadline."""
        while not self.is_over.wait(max(0, self.deadline - time.monotonic())):
            if time.monotonic() >= self.deadline:
                self.is_late = True
                return self.shut_down()

    def cancel(self):
        """End the reply, unless it has ended; any thread may do so."""
        self.is_cancelled = True
        self.shut_down()

    def shut_down(self):
        """Shut the connection down, which wakes the thread that reads from it."""
        with self.lock:
            self.is_over.set()
            if self.sock:
                with suppress(OSError):
                    self.sock.shutdown(SHUT_RDWR)

    def use(self, sock):
        """Use the socket of a connection, or None. Raises ConnectionAbortedError if the reply was cancelled."""
        with self.lock:
            self.sock = sock
            if self.is_over.is_set():
                raise ConnectionAbortedError

    def read_reply(self):
        """Yield the texts of the reply; ask with half the history as often as the context is exceeded."""
        history = fit_history(self.history, self.bot.max_chars)
        while True:
            try:
                yield from skip_thinking(self.read_response(self.bot.encode_request(history)))
                return
            except ContextExceeded as error:
                length = sum(len(text) for _, text in history)
                if length == len(self.history[-1][1]):
                    raise BotMessageTooLong(str(error)) from None
            history = fit_history(self.history, length // 2)

    def read_response(self, body):
        """Send a request and yield the texts of its response, of each block together; "" stands for reasoning."""
        self.completion, self.parser = Completion(), EventParser()
        with self.open(body) as response:
            try:
                yield from self.read_blocks(response)
            except ContextExceeded:
                if not any(self.completion.texts):
                    raise
                self.completion.finish_reason = self.completion.finish_reason or "length"
            except (HTTPError, OSError, BotError):
                if not self.completion.is_finished:
                    raise
        self.completion.check_end()

    @contextmanager
    def open(self, body):
        """Yield the response to a request, of which the head has been read. Raises BotError for an error response."""
        timeout = urllib3.Timeout(connect=min(CONNECT_TIMEOUT, self.bot.timeout / 3), read=self.bot.timeout)
        request = {"body": body, "headers": self.bot.headers, "timeout": timeout, **REQUEST_OPTIONS}
        response = self.bot.pool_manager.urlopen("POST", self.bot.url, **request)
        try:
            if not 200 <= response.status < 300:
                raise parse_error(response.status, self.read_error(response), response.headers)
            yield response
            with suppress(HTTPError, OSError):
                self.sock.settimeout(DRAIN_TIMEOUT)
                response.read1(BLOCK_BYTES)  # at the end of the response, its connection can be used again
        finally:
            with self.lock:
                self.sock = None
            response.close()

    def read_blocks(self, response):
        """Yield the texts of the blocks of a response, which are what has arrived since the one before."""
        for count in itertools.count(1):
            self.sock.settimeout(max(0.001, self.deadline - time.monotonic()))
            block = response.read1(BLOCK_BYTES)
            yield from self.receive(block)
            if self.completion.is_done or not block:
                return
            if count % BLOCKS_PER_SWITCH == 0:
                time.sleep(0)

    def receive(self, block):
        """Yield the text of a block, if there is any. Raises BotError after the text before an error."""
        error, was_finished = None, self.completion.is_finished
        try:
            for name, data in self.parser.feed(block):
                self.completion.receive(name, data)
        except BotError as caught:
            error = caught
        text, is_finished = self.completion.take_text(), self.completion.is_finished
        if (text is not None or is_finished > was_finished) and not self.has_total_timeout:
            self.deadline = time.monotonic() + (FINISH_TIMEOUT if is_finished else self.bot.timeout)
        if text is not None:
            yield text
        if error:
            raise error

    def read_error(self, response):
        """Return the body of an error response, as far as it arrives in a short time."""
        seconds = min(ERROR_TIMEOUT, self.bot.timeout / 2)
        body, deadline = b"", time.monotonic() + seconds
        with suppress(HTTPError, OSError):
            self.sock.settimeout(seconds)
            while len(body) < BLOCK_BYTES and time.monotonic() < deadline and (block := response.read1(BLOCK_BYTES)):
                body += block
        return body


class ConnectionOfReply:
    """A connection that gives its socket to the reply of the thread, before the head of the response is read."""

    def connect(self):
        super().connect()
        current_reply.get().use(self.sock)

    def request(self, *args, **kwargs):
        current_reply.get().use(self.sock)
        super().request(*args, **kwargs)


def create_pool_manager(url):
    """Return the connections to a server, or to the proxy that the environment names. Raises ConfigError."""
    options = {"maxsize": 20, "ssl_context": ssl.create_default_context() if url.scheme == "https" else None}
    if proxy := find_proxy(url):
        headers = urllib3.make_headers(proxy_basic_auth=proxy.auth and unquote(proxy.auth))
        manager = urllib3.ProxyManager(proxy._replace(auth=None).url, proxy_headers=headers, **options)
    else:
        manager = urllib3.PoolManager(**options)
    pool = manager.connection_from_url(create_url(url))
    pool.ConnectionCls = type("Connection", (ConnectionOfReply, pool.ConnectionCls), {})
    return manager


def find_proxy(url):
    """Return the parsed URL of the proxy that the environment names for a URL, or None. Raises ConfigError."""
    proxies = getproxies()
    name = url.scheme if proxies.get(url.scheme) else "all"
    if not proxies.get(name) or is_proxy_bypassed(url, proxies.get("no", "")):
        return None
    try:
        proxy = urllib3.util.parse_url(proxies[name] if "://" in proxies[name] else f"http://{proxies[name]}")
    except urllib3.exceptions.LocationParseError:
        proxy = urllib3.util.Url()
    if proxy.scheme not in ("http", "https") or not proxy.host or proxy.port == 0:
        raise ConfigError(f"{name.upper()}_PROXY must be the http:// URL of a proxy")
    return proxy


def is_proxy_bypassed(url, no_proxy):
    """Return whether NO_PROXY lists a host, by its name, its address, or the network of its address."""
    for network in no_proxy.split(","):
        with suppress(ValueError):
            if ip_address(url.hostname) in ip_network(network.strip(), strict=False):
                return True
    return bool(proxy_bypass(url.netloc.rpartition("@")[2]))


def create_url(url):
    """Return the URL of a request, without credentials."""
    path = quote(f"{url.path.rstrip('/')}/chat/completions", safe="/%:@!$&'()*+,;=")
    query = f"?{quote(url.query, safe='/%:@!$&()*+,;=?')}" if url.query else ""
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{path}{query}"


def create_headers(url, api_key):
    """Return the headers of every request; a username in the URL goes before the key."""
    headers = {
        "Accept": "text/event-stream, application/json",
        "Content-Type": "application/json",
        "User-Agent": "ai-chatbot-backend",
    }
    if url.username is not None:
        return headers | urllib3.make_headers(basic_auth=f"{unquote(url.username)}:{unquote(url.password or '')}")
    return {**headers, "Authorization": f"Bearer {api_key}"} if api_key else headers
