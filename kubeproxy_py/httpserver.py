"""
Serves small HTTP/1.1 answers on any number of sockets: health, readiness, metrics.

The event loop lives in one thread and never leaves this module: callers see plain functions that
take a Request and return a Response. Nothing here knows what is served. The invariant it guards:
whatever clients do, memory, descriptors and threads stay bounded, and one client's slowness is
nobody else's.
"""

import asyncio
import contextlib
import email.utils
import errno
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import h11
import msgspec
import structlog

from kubeproxy_py.errors import KubeProxyError
from kubeproxy_py.model import IPFamily

log = structlog.get_logger()

_T = TypeVar("_T")

PLAIN_TEXT: Final = ("Content-Type", "text/plain; charset=utf-8")
NOSNIFF: Final = ("X-Content-Type-Options", "nosniff")

_RETRY_S: Final = 5.0  # kube-proxy's own interval for a port that is taken
_READ_BYTES: Final = 64 * 1024
# As much as the kernel allows (net.core.somaxconn), as in Go: a burst must not have to retransmit.
_BACKLOG: Final = 4096
# As many requests may be answered at once. An answer takes a millisecond; a scrape of /metrics some.
_WORKERS: Final = 8
# Out of descriptors or memory, accept() fails at once and again: Go waits up to a second, too.
_ACCEPT_PAUSE_S: Final = 1.0
# After a refusal, what the client still sends is read and dropped for so long: closing on top of
# unread data makes the kernel send a reset, which can overtake the answer. Go's server does this.
_LINGER_S: Final = 0.5
_RESET: Final = struct.pack("ii", 1, 0)  # struct linger: on, for no time
_NO_IPV6: Final = frozenset(
    {errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EADDRNOTAVAIL, errno.ENOPROTOOPT}
)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One request. ``path`` is decoded; ``headers`` have lower-case names."""

    method: str
    path: str
    query: Mapping[str, str] = MappingProxyType({})  # of a repeated name the last value
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes = b""


class Response(msgspec.Struct, frozen=True):
    """One answer. Without a Content-Type it goes out as plain text."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


App = Callable[[Request], Response]

#: Whether the client of a connection may ask at all. Called in the event loop: must not block.
Admits = Callable[[socket.socket], bool]


def _everybody(_client: socket.socket) -> bool:
    return True


class Limits(NamedTuple):
    """What a client may use up. kube-proxy has no such limits; these are far from normal use."""

    connections: int = 256
    """Open at once, all ports together. One more closes the one that has been waiting longest."""

    header_bytes: int = 64 * 1024
    """Request line and headers, beyond which the answer is 431."""

    body_bytes: int = 64 * 1024
    """A body, beyond which the answer is 413. Nobody needs one, but for the log level."""

    request_s: float = 10.0
    """For a whole request to arrive, once the connection is open or the first byte is there."""

    idle_s: float = 120.0
    """Between two requests: longer than the usual scrape interval of up to a minute."""

    write_s: float = 30.0
    """For the client to take a whole answer."""


NOT_FOUND: Final = Response(404, b"404 page not found\n", (PLAIN_TEXT, NOSNIFF))


def bind(host: str, port: int) -> socket.socket:
    """
    Return a listening socket for an address, as Go's network "tcp" does.

    The unspecified address of either family, or "", means all addresses of both families if the
    kernel has IPv6. Raises OSError.
    """
    if host in {"", "0.0.0.0", "::"}:  # noqa: S104 - asked for by the configuration
        try:
            return _listen(socket.AF_INET6, ("::", port), v6_only=False)
        except OSError as error:
            if error.errno not in _NO_IPV6:
                raise
        return _listen(socket.AF_INET, ("0.0.0.0", port))  # noqa: S104 - as above
    family, *_, sockaddr = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    )[0]
    return _listen(family, sockaddr)


def bind_family(address: str, port: int, family: IPFamily) -> socket.socket:
    """
    Return a listening socket of strictly one family, as Go's networks "tcp4" and "tcp6" do.

    So the wildcards of both families can have the same port. Raises OSError.
    """
    if family is IPFamily.V4:
        return _listen(socket.AF_INET, (address, port))
    return _listen(socket.AF_INET6, (address, port))


def _listen(family: int, sockaddr: Any, *, v6_only: bool = True) -> socket.socket:
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        # A restarted daemon must get its port though old connections linger in TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6_only))
        sock.bind(sockaddr)
        sock.listen(_BACKLOG)
        stack.pop_all()
    return sock


def split_address(text: str) -> tuple[str, int]:
    """Split ``HOST:PORT`` or ``[HOST]:PORT``. Raises KubeProxyError."""
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise KubeProxyError(f"cannot listen on {text!r}: not an address with a port")
    return host.removeprefix("[").removesuffix("]"), int(port)


class HttpServer:
    """All listening sockets and connections of the process. Start before use; stop ends them all."""

    def __init__(self, limits: Limits = Limits()) -> None:  # noqa: B008 - immutable
        self._limits = limits
        self._lock = threading.Lock()
        # Guarded by the lock: both None before the start and after the stop.
        self._engine: _Engine | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        with self._lock:
            self._engine = _Engine(self._limits)
            # A daemon: a process that fails to stop the server must still be able to exit.
            self._thread = threading.Thread(
                target=self._engine.loop.run_forever, name="http", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Close every socket and end the threads, as soon as the apps that run now have returned."""
        with self._lock:
            engine, self._engine = self._engine, None
            thread, self._thread = self._thread, None
            if engine is None or thread is None:
                return
            asyncio.run_coroutine_threadsafe(engine.shut(), engine.loop).result()
            engine.loop.call_soon_threadsafe(engine.loop.stop)
            thread.join()
            engine.loop.close()
            engine.executor.shutdown()

    def listen(self, sock: socket.socket, app: App, *, admits: Admits = _everybody) -> "Listener":
        """
        Serve *app* on a listening socket, which belongs to the server from now on.

        A connection that *admits* says no to is closed without an answer. Raises KubeProxyError if the
        server does not run.
        """

        async def listen(engine: _Engine) -> Listener:
            return Listener(self, engine, app, sock, admits)

        try:
            return self.run(listen)
        except KubeProxyError:
            sock.close()
            raise

    def serve_address(
        self,
        address: str,
        app: App,
        *,
        name: str,
        hard_fail: bool = False,
        retry_s: float = _RETRY_S,
    ) -> "Listener":
        """
        Serve *app* on ``HOST:PORT``, now or, if the port is taken, as soon as it is free.

        Args:
            address: ``bind`` says what an unspecified one means.
            app: what answers.
            name: which server this is, for the log.
            hard_fail: raise KubeProxyError if it cannot be served now.
            retry_s: how often to try otherwise.
        """
        host, port = split_address(address)

        def attempt() -> socket.socket | None:
            try:
                sock = bind(host, port)
            except OSError as error:
                log.error(  # noqa: TRY400 - the cause is another program; our stack says nothing
                    "http.listen_failed", server=name, address=address, error=reason(error)
                )
                if hard_fail:
                    raise KubeProxyError(
                        f"cannot listen on {address} for {name}: {reason(error)}"
                    ) from error
                return None
            log.info("http.listening", server=name, address=address)
            return sock

        sock = attempt()
        if sock is not None:
            return self.listen(sock, app)

        async def listen_later(engine: _Engine) -> Listener:
            listener = Listener(self, engine, app, None)
            listener.retry(attempt, retry_s)
            return listener

        return self.run(listen_later)

    def run(self, work: "Callable[[_Engine], Coroutine[Any, Any, _T]]") -> _T:
        """Run *work*, which must not wait for clients, in the event loop; return what it returns."""
        with self._lock:
            if self._engine is None:
                raise KubeProxyError("cannot listen: the HTTP server does not run")
            future = asyncio.run_coroutine_threadsafe(work(self._engine), self._engine.loop)
            return future.result()


class _Engine:
    """What the event loop's thread owns: the listeners, the connections, the workers."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(_log_loop_error)
        self.executor = ThreadPoolExecutor(_WORKERS, thread_name_prefix="http-app")
        self.listeners: set[Listener] = set()
        self.open = 0
        # Connections on which nothing has to be answered at the moment, longest first.
        self.waiting: dict[_Connection, None] = {}

    def make_room(self) -> bool:
        """Tell whether one more connection may be open, after closing an old one if need be."""
        if self.open < self.limits.connections:
            return True
        # Whoever only holds connections must not keep the load balancer's health check out.
        oldest = next(iter(self.waiting), None)
        if oldest is None:
            return False
        del self.waiting[oldest]
        oldest.cancel()
        return True

    async def shut(self) -> None:
        await asyncio.gather(*[listener.shut() for listener in self.listeners])


class Listener:
    """One listening socket, or the standing wish for one. All methods but close are the server's."""

    def __init__(
        self,
        server: HttpServer,
        engine: _Engine,
        app: App,
        sock: socket.socket | None,
        admits: Admits = _everybody,
    ) -> None:
        """Belong to *engine*'s thread; serve *sock* at once if there is one."""
        self._server = server
        self._engine = engine
        self._app = app
        self._admits = admits
        self._sock: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._connections: set[_Connection] = set()
        engine.listeners.add(self)
        if sock is not None:
            self._open(sock)

    def close(self) -> None:
        """Free the port and close its connections, before this returns. May be called again."""

        async def shut(_engine: _Engine) -> None:
            await self.shut()

        # A server that has stopped has closed everything.
        with contextlib.suppress(KubeProxyError):
            self._server.run(shut)

    def retry(self, attempt: Callable[[], socket.socket | None], retry_s: float) -> None:
        """Try every *retry_s* seconds until *attempt* gives a socket."""

        def again() -> None:
            sock = attempt()
            if sock is None:
                self.retry(attempt, retry_s)
            else:
                self._open(sock)

        self._timer = self._engine.loop.call_later(retry_s, again)

    async def shut(self) -> None:
        self._engine.listeners.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._sock is not None:
            self._engine.loop.remove_reader(self._sock)
            self._sock.close()
            self._sock = None
        tasks = [connection.cancel() for connection in self._connections]
        await asyncio.gather(*tasks, return_exceptions=True)

    def _open(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._engine.loop.add_reader(sock, self._accept)

    def _accept(self) -> None:
        # One at a time: a connection that had to make room is gone before the next comes in.
        assert self._sock is not None
        try:
            client, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return  # the client has already left
        except OSError as error:
            log.error(  # noqa: TRY400 - the error says it all
                "http.accept_failed", error=reason(error), pause_s=_ACCEPT_PAUSE_S
            )
            self._engine.loop.remove_reader(self._sock)
            self._timer = self._engine.loop.call_later(_ACCEPT_PAUSE_S, self._open, self._sock)
            return
        if not self._admits(client) or not self._engine.make_room():
            client.close()
            return
        client.setblocking(False)
        connection = _Connection(client, self._engine, self._app)
        self._connections.add(connection)
        connection.start(on_end=self._connections.discard)


class _Connection:
    """One client's connection: request, answer, and so on until either side ends it."""

    def __init__(self, sock: socket.socket, engine: _Engine, app: App) -> None:
        self._sock = sock
        self._engine = engine
        self._loop = engine.loop
        self._limits = engine.limits
        self._app = app
        self._http = h11.Connection(
            h11.SERVER, max_incomplete_event_size=engine.limits.header_bytes
        )

    def start(self, on_end: "Callable[[_Connection], None]") -> None:
        def ended(_task: asyncio.Task[None]) -> None:
            # Here and not in the task: one that is cancelled before its first step runs nothing.
            self._sock.close()
            self._engine.open -= 1
            on_end(self)

        self._engine.open += 1
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(ended)

    def cancel(self) -> asyncio.Task[None]:
        self._task.cancel()
        return self._task

    async def _run(self) -> None:
        # OSError: the client has gone, or (TimeoutError) is too slow. Nobody needs to know.
        with contextlib.suppress(OSError):
            is_idle = False
            while await self._exchange(is_idle=is_idle):
                is_idle = True

    async def _exchange(self, *, is_idle: bool) -> bool:
        """Answer one request; tell whether there may be another. Raises OSError."""
        self._engine.waiting[self] = None
        try:
            request = await self._receive(is_idle=is_idle)
        except h11.RemoteProtocolError as error:
            await self._refuse(error.error_status_hint)
            return False
        finally:
            self._engine.waiting.pop(self, None)
        if request is None:
            return False
        response = await self._loop.run_in_executor(self._engine.executor, self._answer, request)
        await self._send(self._render(request, response))
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    async def _receive(self, *, is_idle: bool) -> Request | None:
        """Read one request; None if the client has none. Raises OSError, h11.RemoteProtocolError."""
        head: h11.Request | None = None
        body = b""
        is_idle = is_idle and not self._http.trailing_data[0]
        wait_s = self._limits.idle_s if is_idle else self._limits.request_s
        async with asyncio.timeout(wait_s) as timeout:
            while True:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    if self._http.they_are_waiting_for_100_continue:
                        go_on = h11.InformationalResponse(status_code=100, headers=[])
                        await self._send(self._http.send(go_on) or b"")
                    data = await self._loop.sock_recv(self._sock, _READ_BYTES)
                    if not data:
                        return None
                    if is_idle:
                        is_idle = False
                        timeout.reschedule(self._loop.time() + self._limits.request_s)
                    self._http.receive_data(data)
                elif isinstance(event, h11.Request):
                    head = event
                elif isinstance(event, h11.Data):
                    body += event.data
                    if len(body) > self._limits.body_bytes:
                        raise h11.RemoteProtocolError("body too long", error_status_hint=413)
                elif isinstance(event, h11.EndOfMessage):
                    assert head is not None
                    return _request(head, body)
                else:
                    return None

    def _answer(self, request: Request) -> Response:
        try:
            return self._app(request)
        except Exception:
            log.exception("http.app_failed", method=request.method, path=request.path)
            return Response(500, b"500 internal server error\n", (PLAIN_TEXT, NOSNIFF))

    def _render(self, request: Request, response: Response) -> bytes:
        # In the order of Go's server: the app's own, Date, length, and last a type it had to guess.
        headers = [
            *response.headers,
            ("Date", email.utils.formatdate(usegmt=True)),
            ("Content-Length", str(len(response.body))),
        ]
        if not any(name == "Content-Type" for name, _ in headers):
            headers.append(PLAIN_TEXT)
        head = h11.Response(
            status_code=response.status,
            reason=HTTPStatus(response.status).phrase.encode(),
            headers=headers,
        )
        parts = [self._http.send(head)]
        if request.method != "HEAD":
            parts.append(self._http.send(h11.Data(data=response.body)))
        parts.append(self._http.send(h11.EndOfMessage()))
        return b"".join(part or b"" for part in parts)

    async def _send(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._limits.write_s):
                await self._loop.sock_sendall(self._sock, data)
        except TimeoutError:
            # Reset it: after a normal close the kernel would keep what the client does not read.
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            raise

    async def _refuse(self, status: int) -> None:
        """Answer what is not acceptable HTTP as Go's server does, and let the client read it."""
        text = f"{status} {HTTPStatus(status).phrase}"
        await self._send(
            f"HTTP/1.1 {text}\r\nContent-Type: text/plain; charset=utf-8\r\n"
            f"Connection: close\r\n\r\n{text}".encode()
        )
        self._sock.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(_LINGER_S):
            while await self._loop.sock_recv(self._sock, _READ_BYTES):
                pass


def _request(head: h11.Request, body: bytes) -> Request:
    method = head.method.decode("ascii")
    if method == "CONNECT":
        # To h11 an answer would open a tunnel; and no app has one to offer.
        raise h11.RemoteProtocolError("no tunnels here", error_status_hint=501)
    target = head.target.decode("ascii")
    if target.startswith("/"):
        path, _, query = target.partition("?")
    else:
        # As proxies ask: http://host/path?query
        try:
            parts = urlsplit(target)
        except ValueError as error:
            raise h11.RemoteProtocolError(str(error)) from error
        path, query = parts.path, parts.query
    headers: dict[str, str] = {}
    for raw_name, raw_value in head.headers:
        name, value = raw_name.decode("ascii"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return Request(
        method=method,
        path=unquote(path),
        query=dict(parse_qsl(query, keep_blank_values=True)),
        headers=headers,
        body=body,
    )


def reason(error: OSError) -> str:
    """Return what went wrong, without Python's number in front."""
    return error.strerror or str(error)


def _log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    log.error("http.loop_failed", message=context["message"], exc_info=context.get("exception"))
