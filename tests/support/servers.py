"""
Servers that tell who they are, in any number of namespaces, on one thread.

Protocol: a client sends a line. ``ask`` is answered by one line of JSON (an Answer) and the
connection stays; ``bye`` is answered the same way, then the server closes. UDP answers every
datagram; SCTP answers an INIT with an ABORT whose reason is the Answer (sctp.py).

All sockets belong to the one thread; other threads send it commands.
"""

import collections
import contextlib
import json
import queue
import selectors
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from types import TracebackType
from typing import Final, NamedTuple, Self

from tests.support import sctp
from tests.support.netns import Namespace

ASK: Final = b"ask\n"
BYE: Final = b"bye\n"
_COMMAND_TIMEOUT_S: Final = 10.0  # far above the milliseconds a command takes
_IPV4_HEADER_UNIT: Final = 4  # the header length field counts 32-bit words


class Answer(NamedTuple):
    """What a server says of itself and of the packet it received."""

    server: str
    client_ip: str  # the source address as the server sees it
    client_port: int
    server_ip: str  # the destination address as the server sees it
    server_port: int


def render_answer(answer: Answer) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def parse_answer(line: bytes) -> Answer:
    return Answer(*json.loads(line))


class Servers:
    """All servers of a test. Use it in a ``with`` block, which closes them all."""

    def __init__(self) -> None:
        """Hold no socket and no thread yet; entering the ``with`` block starts both."""
        self._selector = selectors.DefaultSelector()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._bell, self._ear = socket.socketpair()
        self._ear.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="servers", daemon=True)
        self._is_stopping = False
        self._failure: Exception | None = None  # what ended the thread before its time
        # Only the thread touches what follows.
        self._sockets: dict[str, set[socket.socket]] = collections.defaultdict(set)
        self._requests: dict[socket.socket, bytes] = {}

    def serve(
        self,
        ns: Namespace,
        *,
        name: str = "",
        tcp: Sequence[int] = (),
        udp: Sequence[int] = (),
        sctp: Sequence[int] = (),
        ips: Sequence[str] = (),
    ) -> None:
        """Serve these ports in *ns*; when this returns, connections are accepted.

        Args:
            ns: where to serve.
            name: what the server calls itself; the namespace's name by default.
            tcp: TCP ports.
            udp: UDP ports.
            sctp: SCTP ports.
            ips: the addresses to serve on; all the namespace's own by default.
        """
        self._call(
            lambda: self._open(
                ns, name or ns.name, {"tcp": tcp, "udp": udp, "sctp": sctp}, list(ips)
            )
        )

    def stop(self, name: str) -> None:
        """Close everything that the server *name* listens on, and its connections."""
        self._call(lambda: self._close_all(name))

    def _call(self, action: Callable[[], None]) -> None:
        done: Future[None] = Future()

        def command() -> None:
            try:
                action()
            except Exception as error:  # noqa: BLE001 - the caller's thread raises it
                done.set_exception(error)
            else:
                done.set_result(None)

        self._commands.put(command)
        self._bell.send(b"!")
        try:
            done.result(timeout=_COMMAND_TIMEOUT_S)
        except FutureTimeout:
            raise AssertionError("the servers' thread does not answer") from self._failure

    def _run(self) -> None:
        try:
            self._run_until_stopped()
        except Exception as error:  # noqa: BLE001 - raised by the next command, and there is one
            self._failure = error

    def _run_until_stopped(self) -> None:
        self._selector.register(self._ear, selectors.EVENT_READ, self._obey)
        while not self._is_stopping:
            for key, _events in self._selector.select():
                # A command or an earlier event of the same round may have closed it.
                if key.fileobj in self._selector.get_map():
                    key.data()

    def _obey(self) -> None:
        self._ear.recv(4096)
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()

    def _open(
        self, ns: Namespace, name: str, ports: dict[str, Sequence[int]], ips: list[str]
    ) -> None:
        for ip in ips or list(ns.addresses.values()):
            for protocol, numbers in ports.items():
                if protocol == "sctp" and numbers:
                    sock = _open_socket(ns, ip, socket.SOCK_RAW, 0)
                    self._add(name, sock, self._on_sctp(name, sock, ip, frozenset(numbers)))
                    continue
                for port in numbers:
                    if protocol == "tcp":
                        sock = _open_socket(ns, ip, socket.SOCK_STREAM, port)
                        self._add(name, sock, self._on_tcp_listener(name, sock))
                    else:
                        sock = _open_socket(ns, ip, socket.SOCK_DGRAM, port)
                        self._add(name, sock, self._on_udp(name, sock))

    def _add(self, name: str, sock: socket.socket, action: Callable[[], None]) -> None:
        self._sockets[name].add(sock)
        self._selector.register(sock, selectors.EVENT_READ, action)

    def _close(self, name: str, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        self._sockets[name].discard(sock)
        self._requests.pop(sock, None)
        sock.close()

    def _close_all(self, name: str) -> None:
        for sock in list(self._sockets.pop(name, ())):
            self._close(name, sock)

    def _on_tcp_listener(self, name: str, listener: socket.socket) -> Callable[[], None]:
        def accept() -> None:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                sock, _peer = listener.accept()
                sock.setblocking(False)
                self._requests[sock] = b""
                self._add(name, sock, self._on_tcp_connection(name, sock))

        return accept

    def _on_tcp_connection(self, name: str, sock: socket.socket) -> Callable[[], None]:
        def read() -> None:
            try:
                data = sock.recv(4096)
                *lines, rest = (self._requests[sock] + data).split(b"\n")
                self._requests[sock] = rest
                for _line in lines:
                    # A line is far smaller than a socket's buffer: it never blocks in a test.
                    sock.sendall(render_answer(_answer(name, sock, sock.getpeername())))
            except BlockingIOError:
                return
            except OSError:
                self._close(name, sock)
                return
            if not data or BYE.strip() in lines:
                self._close(name, sock)

        return read

    def _on_udp(self, name: str, sock: socket.socket) -> Callable[[], None]:
        def read() -> None:
            with contextlib.suppress(OSError):
                _data, peer = sock.recvfrom(4096)
                sock.sendto(render_answer(_answer(name, sock, peer)), peer)

        return read

    def _on_sctp(
        self, name: str, sock: socket.socket, ip: str, ports: frozenset[int]
    ) -> Callable[[], None]:
        def read() -> None:
            # A raw socket sees every SCTP packet that comes to this address.
            with contextlib.suppress(OSError):
                data, peer = sock.recvfrom(4096)
                packet = sctp.parse(strip_ip_header(sock, data))
                if not packet or packet.initiate_tag is None:
                    return
                if packet.destination_port not in ports:
                    return
                answer = Answer(name, peer[0], packet.source_port, ip, packet.destination_port)
                sock.sendto(sctp.render_abort(packet, render_answer(answer)), (peer[0], 0))

        return read

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        def stop() -> None:
            for name in list(self._sockets):
                self._close_all(name)
            self._is_stopping = True

        try:
            self._call(stop)
            self._thread.join(timeout=_COMMAND_TIMEOUT_S)
        finally:
            self._bell.close()
            self._ear.close()
            self._selector.close()


def strip_ip_header(sock: socket.socket, data: bytes) -> bytes:
    """Return the payload of what a raw socket received: only IPv4 hands out the header with it."""
    if sock.family == socket.AF_INET6:
        return data
    return data[(data[0] & 0x0F) * _IPV4_HEADER_UNIT :]


def family_of(ip: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


def _open_socket(ns: Namespace, ip: str, kind: socket.SocketKind, port: int) -> socket.socket:
    protocol = sctp.PROTOCOL if kind == socket.SOCK_RAW else 0
    with ns.entered():
        sock = socket.socket(family_of(ip), kind, protocol)
    try:
        sock.setblocking(False)
        if kind == socket.SOCK_STREAM:
            # Its old connections linger after a stop; a new start must not fail because of them.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((ip, port))
        if kind == socket.SOCK_STREAM:
            sock.listen(1024)  # more than any test opens at once
    except OSError:
        sock.close()
        raise
    return sock


def _answer(name: str, sock: socket.socket, peer: tuple[str, int]) -> Answer:
    own = sock.getsockname()
    return Answer(name, peer[0], peer[1], own[0], own[1])
