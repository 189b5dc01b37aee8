"""A bot that asks a model through the OpenAI API, which most model servers offer.

http.client with orjson takes 12 us of CPU for a chunk. The openai package takes 30 times that, and 40 MB and
half a second to be imported.
"""

import base64
import os
import ssl
import time
import weakref
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from queue import Empty, SimpleQueue
from socket import SHUT_RDWR
from threading import Lock, Thread
from urllib.parse import quote, unquote, urlsplit
from urllib.request import BaseHandler, OpenerDirector, Request, getproxies, proxy_bypass

import orjson

from app.bot import BotError, BotMessageTooLong, BotTimeout, fit_history
from app.openai_protocol import Completion, ContextExceeded, iter_events, parse_error, skip_thinking

BLOCK_BYTES = 65_536
BLOCKS_PER_SWITCH = 64  # after so many, other threads run; greenlets would not by themselves
FINISH_TIMEOUT = 3  # seconds of silence after a finish reason that end the reply
ERROR_TIMEOUT = 3  # seconds for the body of an error response
DRAIN_TIMEOUT, MAX_DRAIN_BLOCKS = 1, 8  # for the end of a response after the end of its reply
IDLE_TIMEOUT, MAX_IDLE_CONNECTIONS = 30, 20
ROLES = {"user": "user", "bot": "assistant"}


class OpenAIBot:
    """A bot whose replies a model writes."""

    def __init__(self, config):
        self.server = ModelServer(config["OPENAI_BASE_URL"], config["OPENAI_API_KEY"], config["BOT_TIMEOUT"])
        self.options = {**config["BOT_OPTIONS"], "model": config["BOT_MODEL"], "stream": True}
        self.system_prompt = config["BOT_SYSTEM_PROMPT"]
        self.max_chars = config["BOT_HISTORY_CHARS"]

    def __call__(self, history, user_id=None, conversation_id=None):
        """Return the reply to a history as an iterator."""
        return ReplyStream(self, history)

    def encode_request(self, history):
        """Return the body of a request."""
        messages = [{"role": ROLES[sender], "content": text} for sender, text in history]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return orjson.dumps({**self.options, "messages": messages})


class ReplyStream:
    """An iterator over the chunks of a reply.

    A thread reads the model's response into a queue, so that no state of the network can hold up the iteration.
    """

    def __init__(self, bot, history):
        self._bot = bot
        self._history = history
        self._connection = ModelConnection(bot.server)
        self._completion = Completion()
        self._items = SimpleQueue()  # texts, of which an empty one is a sign of life only, and finally an exception
        self._end = None
        Thread(target=self._produce, daemon=True).start()

    def __iter__(self):
        return self

    def __next__(self):
        text = ""
        while not text:
            if self._end:
                raise self._end
            text = self._receive()
        return text

    def cancel(self):
        """End the reply, unless it has ended, and close the connection; any thread may do so."""
        if not self._end:
            self._items.put(StopIteration())  # before the error that aborting causes
            self._connection.abort()

    def close(self):
        """End the reply, as for a generator."""
        self.cancel()

    def _receive(self):
        """Wait for a sign of life and return all text that has arrived."""
        completion = self._completion
        may_finish = completion.is_finished and not completion.may_continue
        timeout = FINISH_TIMEOUT if may_finish else self._bot.server.timeout
        try:
            items = [self._items.get(timeout=timeout)]
        except Empty:
            if completion.is_finished:
                self._connection.abort()  # the thread ends the reply
                return ""
            self.cancel()
            items = [BotTimeout(f"no text from the model for {timeout} s")]
        while isinstance(items[-1], str) and not self._items.empty():
            items.append(self._items.get())
        if not isinstance(items[-1], str):
            self._end = items.pop()
        return "".join(items)

    def _produce(self):
        """Put the texts of the reply into the queue, and finally the exception that ends the iteration."""
        end = StopIteration()
        try:
            for text in self._read_reply():
                self._items.put(text)
        except TimeoutError:
            end = BotTimeout(f"no data from the model for {self._bot.server.timeout} s")
        except (OSError, HTTPException, ValueError) as error:
            end = BotError(f"the connection to the model failed: {type(error).__name__}")
        except Exception as error:
            end = error
        self._items.put(end)
        self._connection.release()

    def _read_reply(self):
        """Yield the texts of the reply; ask with half the history as often as the context is exceeded."""
        history = fit_history(self._history, self._bot.max_chars)
        while True:
            try:
                yield from skip_thinking(self._read_response(self._bot.encode_request(history)))
                return
            except ContextExceeded as error:
                length = sum(len(text) for _, text in history)
                if length == len(self._history[-1][1]):
                    raise BotMessageTooLong(str(error)) from None
            self._connection.release()
            history = fit_history(self._history, length // 2)

    def _read_response(self, body):
        """Send a request and yield the texts of its response; an empty one stands for reasoning."""
        response = self._connection.send(body)
        if not 200 <= response.status < 300:
            raise parse_error(response.status, self._connection.read_error(), response.headers["Retry-After"])
        self._completion = completion = Completion()
        try:
            for data in iter_events(self._connection.iter_blocks()):
                text = completion.receive(data)
                if text is not None:
                    yield text
                if completion.is_over:
                    break
        except ContextExceeded:
            if not completion.has_text:
                raise
            if not completion.is_finished:
                completion.finish_reason = "length"
        except (OSError, HTTPException, BotError):
            if not completion.is_finished:
                raise
        completion.check_end()


class Response(HTTPResponse):
    """A response that skips the informational ones before it, such as 103 Early Hints."""

    def begin(self):
        """Read the head."""
        super().begin()
        while self.status < 200:
            self.headers = None  # else nothing is read
            super().begin()


class ModelRequest(Request):
    """A request to the model server on an open connection."""

    def __init__(self, server, connection, body):
        super().__init__(server.url, body, server.headers, method="POST")
        self.target, self.connection = server.target, connection


class ModelHandler(BaseHandler):
    """Sends a ModelRequest. It belongs to urllib only because OpenTelemetry can instrument that, unlike http.client."""

    def default_open(self, request):
        """Return the response, of which the head has been read."""
        request.connection.request(request.get_method(), request.target, request.data, request.headers)
        return request.connection.getresponse()


opener = OpenerDirector()
opener.add_handler(ModelHandler())


class ModelConnection:
    """A connection to the model server for one request and its response, which another thread can abort.

    After `release()` it can send another request.
    """

    def __init__(self, server):
        self._server = server
        self._lock = Lock()
        self._http_connection = self._socket = self._response = None
        self._is_aborted = False

    def send(self, body):
        """Send a request and return the response, of which the head has been read."""
        idle = self._server.take_idle_connection()
        try:
            return self._send(idle or self._server.create_connection(), body)
        except (ConnectionError, ssl.SSLError):
            if not idle:
                raise
        idle.close()  # the server had closed it already
        return self._send(self._server.create_connection(), body)

    def _send(self, connection, body):
        self._http_connection = connection
        connection.response_class = Response
        if connection.sock is None:
            connection.connect()
        with self._lock:
            self._socket = connection.sock  # the connection forgets it when the server wants to close it
            if self._is_aborted:
                raise ConnectionAbortedError
        self._response = opener.open(ModelRequest(self._server, connection, body))
        return self._response

    def iter_blocks(self):
        """Yield the body of the response in blocks, as they arrive."""
        count = 0
        while block := self._response.read1(BLOCK_BYTES):
            yield block
            if count % BLOCKS_PER_SWITCH == 0:
                time.sleep(0)
            count += 1

    def read_error(self):
        """Return the body of an error response, as far as it arrives in a short time."""
        seconds = min(ERROR_TIMEOUT, self._server.timeout / 2)
        body, deadline = b"", time.monotonic() + seconds
        with suppress(OSError, HTTPException):
            self._socket.settimeout(seconds / 2)
            for block in self.iter_blocks():
                body += block
                if len(body) > BLOCK_BYTES or time.monotonic() > deadline:
                    break
        return body

    def abort(self):
        """Shut down the connection, which wakes the thread that uses it."""
        with self._lock:
            self._is_aborted = True
            if self._socket:
                with suppress(OSError):
                    self._socket.shutdown(SHUT_RDWR)

    def release(self):
        """Keep the connection for another request if the rest of the response is short, else close it."""
        if self._response:
            self._drain()
        with self._lock:
            self._socket = None
        connection, response = self._http_connection, self._response
        self._http_connection = self._response = None
        if response and response.isclosed() and connection.sock and not self._is_aborted:
            self._server.keep_idle_connection(connection)
        elif connection:
            connection.close()
            if response:
                response.close()

    def _drain(self):
        """Read the rest of the response, within narrow limits."""
        with suppress(OSError, HTTPException):
            self._socket.settimeout(DRAIN_TIMEOUT)
            for _ in range(MAX_DRAIN_BLOCKS):
                if self._response.isclosed():
                    break
                self._response.read1(BLOCK_BYTES)


class ModelServer:
    """The address of a model server, and idle connections to it.

    Raises ValueError for a setting or an environment variable that cannot be used.
    """

    def __init__(self, base_url, api_key, timeout):
        self.idle_connections = []  # (connection, the time it became idle)
        weakref.finalize(self, close_connections, self.idle_connections)
        self.timeout = timeout
        url = urlsplit(base_url)
        self._host, self._port = url.hostname, url.port or (443 if url.scheme == "https" else 80)
        self._context = create_ssl_context() if url.scheme == "https" else None
        self._proxy, self._proxy_headers = find_proxy(url)
        self.target = quote(f"{url.path.rstrip('/')}/chat/completions", safe="/%:@!$&'()*+,;=")
        if url.query:
            self.target += f"?{quote(url.query, safe='/%:@!$&()*+,;=?')}"
        self.url = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{self.target}"
        self.headers = create_headers(url, api_key)
        if self._proxy and not self._context:
            self.target = self.url
            self.headers.update(self._proxy_headers)

    def create_connection(self):
        """Return a connection that is not open yet."""
        address = (self._proxy.hostname, self._proxy.port or 80) if self._proxy else (self._host, self._port)
        if not self._context:
            return HTTPConnection(*address, timeout=self.timeout)
        connection = HTTPSConnection(*address, timeout=self.timeout, context=self._context)
        if self._proxy:
            connection.set_tunnel(self._host, self._port, self._proxy_headers)
        return connection

    def take_idle_connection(self):
        """Return an open connection, which the server may have closed in the meantime, or None."""
        with suppress(IndexError):
            while True:
                connection, idle_since = self.idle_connections.pop()
                if time.monotonic() - idle_since < IDLE_TIMEOUT:
                    connection.sock.settimeout(self.timeout)
                    return connection
                connection.close()
        return None

    def keep_idle_connection(self, connection):
        """Keep an open connection for the next request."""
        if len(self.idle_connections) < MAX_IDLE_CONNECTIONS:
            self.idle_connections.append((connection, time.monotonic()))
        else:
            connection.close()


def close_connections(idle_connections):
    """Close idle connections."""
    for connection, _ in idle_connections:
        connection.close()


def create_headers(url, api_key):
    """Return the headers of every request; a username in the URL goes before the key."""
    headers = {
        "Accept": "text/event-stream, application/json",
        "Content-Type": "application/json",
        "User-Agent": "ai-chatbot-backend",
    }
    if url.username is not None:
        return {**headers, "Authorization": basic_auth(url)}
    return {**headers, "Authorization": f"Bearer {api_key}"} if api_key else headers


def basic_auth(url):
    """Return the credentials of a URL as the value of a header."""
    credentials = f"{unquote(url.username)}:{unquote(url.password or '')}".encode()
    return f"Basic {base64.b64encode(credentials).decode()}"


def find_proxy(url):
    """Return the URL of the proxy that the environment names for a URL, or None, and the headers for that proxy."""
    proxies = getproxies()
    name = url.scheme if proxies.get(url.scheme) else "all"
    if not proxies.get(name) or proxy_bypass(url.netloc.rpartition("@")[2]):
        return None, {}
    proxy = proxies[name] if "://" in proxies[name] else f"http://{proxies[name]}"
    try:
        proxy = urlsplit(proxy)
        is_usable = proxy.scheme == "http" and proxy.hostname and proxy.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        raise ValueError(f"{name.upper()}_PROXY must be the http:// URL of a proxy")
    return proxy, {"Proxy-Authorization": basic_auth(proxy)} if proxy.username is not None else {}


def create_ssl_context():
    """Return the context for TLS, with the certificates that SSL_CERT_FILE and SSL_CERT_DIR name, if they are set."""
    try:
        context = ssl.create_default_context()
    except OSError:
        raise ValueError("SSLKEYLOGFILE must name a file that can be written") from None
    context.set_alpn_protocols(["http/1.1"])
    if file := os.environ.get("SSL_CERT_FILE"):
        try:
            context.load_verify_locations(file)
        except OSError:
            raise ValueError("SSL_CERT_FILE must name a file of certificates in PEM format") from None
    folders = os.environ.get("SSL_CERT_DIR", "").split(os.pathsep)
    if any(folders) and not any(Path(folder).is_dir() for folder in folders if folder):
        raise ValueError("SSL_CERT_DIR must name a directory of certificates")
    return context
