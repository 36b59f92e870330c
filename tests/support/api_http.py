"""
HTTP/1.1 for the tests' API server: one connection, read and written by its own thread.

Own code and no ``http.server``, because a test must be able to hold, slow down, cut in half and
spoil what goes over the wire. Knows nothing of Kubernetes.
"""

import contextlib
import dataclasses
import email.message
import http
import http.client
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator

_MAX_BODY = 32 << 20  # etcd refuses objects far smaller; this only stops a runaway client
# The size of Go's net/http buffer: a response that does not fit goes out chunked, without a length.
_CHUNKED_ABOVE = 2048
_CHUNK = 64 << 10  # large enough that 10,000 objects are a few hundred writes
_TRICKLE_TICK_S = 0.05  # a piece every tick: slow for the client, many pieces per second for us


class BadRequest(Exception):
    """What arrived is no HTTP/1.1 request; the connection is given up."""


@dataclasses.dataclass(slots=True)
class Request:
    """One request as it arrived."""

    method: str
    target: str  # path and query, as sent
    path: str
    query: dict[str, str]
    headers: email.message.Message  # names compare without case
    body: bytes
    client: str  # "IP:port": equal for requests of one connection
    time: float  # time.monotonic() at arrival
    # What the API makes of it:
    verb: str = ""  # list, watch, get, create, update, patch, delete; "" for other paths
    resource: str = ""  # plural name; "" for other paths

    @property
    def is_keepalive(self) -> bool:
        return (self.headers.get("Connection") or "").lower() != "close"


@dataclasses.dataclass(frozen=True, slots=True)
class Response:
    """A complete answer (watches write to their connection instead)."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str = "application/json"


class Valve:
    """What all connections pass through; faults that concern all bytes are set here."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # Guarded by _changed:
        self._is_frozen = False
        self._bytes_per_second: float | None = None

    def freeze(self) -> None:
        with self._changed:
            self._is_frozen = True

    def thaw(self) -> None:
        with self._changed:
            self._is_frozen = False
            self._changed.notify_all()

    def trickle(self, bytes_per_second: float | None) -> None:
        with self._changed:
            self._bytes_per_second = bytes_per_second
            self._changed.notify_all()

    def wake(self) -> None:
        """Let those who wait look again whether their connection is still open."""
        with self._changed:
            self._changed.notify_all()

    def wait_thawed(self, is_closed: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_frozen or is_closed())

    def portions(self, data: bytes, is_closed: Callable[[], bool]) -> Iterator[bytes]:
        """Yield *data* in pieces, each when it may be sent; stops when the connection is closed."""
        rest = memoryview(data)
        while rest:
            self.wait_thawed(is_closed)
            if is_closed():
                return
            with self._changed:
                speed = self._bytes_per_second
                size = len(rest) if speed is None else max(1, int(speed * _TRICKLE_TICK_S))
                if speed is not None:
                    self._changed.wait(timeout=size / speed)
            yield bytes(rest[:size]) if size < len(rest) else bytes(rest)
            rest = rest[size:]


class Connection:
    """One accepted connection. Only ``close`` may be called from other threads."""

    def __init__(self, sock: socket.socket, client: str, valve: Valve) -> None:
        """Take over *sock*; ``release`` gives it back to the kernel."""
        self.client = client
        self._sock = sock
        self._reader = sock.makefile("rb")
        self._valve = valve
        self._is_closed = threading.Event()

    @property
    def is_closed(self) -> bool:
        return self._is_closed.is_set()

    @property
    def has_client_certificate(self) -> bool:
        return isinstance(self._sock, ssl.SSLSocket) and bool(self._sock.getpeercert())

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        """Cut the connection; its thread notices at once, whatever it waits for."""
        self._is_closed.set()
        # Not SSLSocket.shutdown, which also takes the TLS state away under a thread that is reading.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        self._valve.wake()

    def release(self) -> None:
        """Close the file descriptor; only for the thread that owns the connection."""
        self.close()
        self._reader.close()
        self._sock.close()

    def handshake(self) -> None:
        if isinstance(self._sock, ssl.SSLSocket):
            self._sock.do_handshake()

    def is_hung_up(self) -> bool:
        """Return whether the client has closed its side; call only when there is something to read."""
        try:
            return not self._reader.peek(1)
        except OSError:
            return True

    def read_request(self) -> Request | None:
        """Wait for a request; None when the client is done. Raises BadRequest, OSError."""
        line = self._reader.readline(65537)
        self._valve.wait_thawed(lambda: self.is_closed)
        if not line or self.is_closed:
            return None
        parts = line.decode("latin-1").split()
        if len(parts) != 3 or parts[2] != "HTTP/1.1":
            raise BadRequest(f"cannot read request line {line[:200]!r}")
        try:
            headers = http.client.parse_headers(self._reader)
        except http.client.HTTPException as error:
            raise BadRequest(f"cannot read headers: {error}") from error
        length = headers.get("Content-Length") or "0"
        if not length.isdigit() or int(length) > _MAX_BODY or "Transfer-Encoding" in headers:
            raise BadRequest("cannot read a body without a usable Content-Length")
        body = self._reader.read(int(length))
        if len(body) < int(length):
            return None
        self._valve.wait_thawed(lambda: self.is_closed)
        split = urllib.parse.urlsplit(parts[1])
        return Request(
            method=parts[0],
            target=parts[1],
            path=urllib.parse.unquote(split.path),
            query=dict(urllib.parse.parse_qsl(split.query, keep_blank_values=True)),
            headers=headers,
            body=body,
            client=self.client,
            time=time.monotonic(),
        )

    def send(self, data: bytes) -> None:
        """Write bytes as they are. Raises OSError when the connection is gone."""
        for portion in self._valve.portions(data, lambda: self.is_closed):
            self._sock.sendall(portion)
        if self.is_closed:
            raise ConnectionAbortedError("cannot send: the connection was cut")

    def send_response(self, response: Response, *, is_half: bool = False) -> None:
        """Write a complete answer, or (*is_half*) its head and the first half of its body."""
        if len(response.body) > _CHUNKED_ABOVE:
            framing = ("Transfer-Encoding", "chunked")
            pieces = [
                chunk(response.body[start : start + _CHUNK])
                for start in range(0, len(response.body), _CHUNK)
            ]
            wire = b"".join([*pieces, LAST_CHUNK])
        else:
            framing = ("Content-Length", str(len(response.body)))
            wire = response.body
        headers = (("Content-Type", response.content_type), framing, *response.headers)
        head = _head(response.status, headers)
        self.send(head + (wire[: len(wire) // 2] if is_half else wire))

    def start_stream(self) -> None:
        """Write the head of a stream of chunks, which ``chunk`` makes and LAST_CHUNK ends."""
        self.send(
            _head(200, (("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")))
        )


LAST_CHUNK = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """Frame *data*, which must not be empty: an empty chunk would end the stream."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _head(status: int, headers: tuple[tuple[str, str], ...]) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
        "Cache-Control: no-cache, private",
        *(f"{name}: {value}" for name, value in headers),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
