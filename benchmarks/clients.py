"""The measuring side: TCP connections out of one namespace, and objects written to the API server."""

import http.client
import json
import select
import socket
import struct
import time
import urllib.parse
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

from tests.support.background import Background, Rest
from tests.support.netns import Namespace

Json = dict[str, Any]

# Entering a namespace costs more than opening a socket, so sockets are opened in stock.
_STOCK: Final = 100
# Closing with RST leaves no TIME_WAIT: tens of thousands of connections do not run out of ports.
_CLOSE_WITH_RST: Final = struct.pack("ii", 1, 0)
# After two lost SYNs (3 s) a connect fails, so that a broken rule ends a benchmark.
_SYN_RETRIES: Final = 1
_ANSWER_S: Final = 0.2  # an accepted connection is answered within a millisecond on an idle machine


class Client:
    """Connects from one namespace."""

    def __init__(self, ns: Namespace) -> None:
        """Open nothing yet; ``close`` (or ``with``) closes what is left over."""
        self._ns = ns
        self._stock: list[socket.socket] = []

    def close(self) -> None:
        for sock in self._stock:
            sock.close()
        self._stock.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def ask(self, ip: str, port: int, *, patience_s: float) -> str:
        """Return the address that answers, "" if the connection is not there in time."""
        with self._socket() as sock:
            sock.setblocking(False)
            try:
                if sock.connect_ex((ip, port)):
                    poll = select.poll()
                    poll.register(sock, select.POLLOUT)
                    if not poll.poll(patience_s * 1000):
                        return ""
                sock.settimeout(_ANSWER_S)
                return sock.recv(64).decode()
            except OSError:
                return ""

    def wait(
        self,
        ip: str,
        is_wanted: Callable[[str], bool],
        *,
        port: int = 80,
        patience_s: float = 0.005,
        interval_s: float = 0.0005,
        limit_s: float = 60.0,
    ) -> float:
        """Connect again and again until *is_wanted* of the answering address; return when.

        Args:
            ip: whom to connect to.
            is_wanted: told the address that answered, "" if none did.
            port: on which port.
            patience_s: how long one attempt waits for the handshake. Without a rule for *ip* there
                is no answer at all, so this is the resolution of the figure.
            interval_s: pause between attempts, so that they do not take a core from what is measured.
            limit_s: when to give up.

        Returns:
            The time (time.perf_counter()) at which the wanted answer was there.

        Raises:
            TimeoutError: it was not there within *limit_s*.
        """
        started = time.perf_counter()
        while not is_wanted(self.ask(ip, port, patience_s=patience_s)):
            if time.perf_counter() - started > limit_s:
                raise TimeoutError(f"cannot see the change at {ip} port {port} within {limit_s} s")
            time.sleep(interval_s)
        return time.perf_counter()

    def connect_seconds(self, ip: str, port: int, n: int) -> list[float]:
        """Return how long each of *n* connects took, one after the other."""
        spent = []
        for _ in range(n):
            with self._socket() as sock:
                started = time.perf_counter_ns()
                sock.connect((ip, port))
                spent.append((time.perf_counter_ns() - started) / 1e9)
        return spent

    def _socket(self) -> socket.socket:
        if not self._stock:
            with self._ns.entered():
                self._stock = [socket.socket() for _ in range(_STOCK)]
        sock = self._stock.pop()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_WITH_RST)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, _SYN_RETRIES)
        return sock


class Api:
    """One connection to the API server. For one thread at a time."""

    def __init__(self, ns: Namespace, url: str) -> None:
        """Connect from *ns*, where the server listens on loopback."""
        where = urllib.parse.urlsplit(url)
        self._connection = http.client.HTTPConnection(
            str(where.hostname), int(where.port or 80), timeout=30
        )
        with ns.entered():
            self._connection.connect()
        # A new connection would be opened in the namespace of the host.
        self._connection.auto_open = False

    def close(self) -> None:
        self._connection.close()

    def create(self, obj: Json) -> None:
        self._send("POST", _collection(obj), obj)

    def replace(self, obj: Json) -> None:
        self._send("PUT", f"{_collection(obj)}/{obj['metadata']['name']}", obj)

    def delete(self, obj: Json) -> None:
        self._send("DELETE", f"{_collection(obj)}/{obj['metadata']['name']}", None)

    def _send(self, method: str, path: str, obj: Json | None) -> None:
        body = None if obj is None else json.dumps(obj)
        self._connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status >= http.HTTPStatus.BAD_REQUEST:
            raise RuntimeError(f"cannot {method} {path}: {answer.status} {text[:300]!r}")


def _collection(obj: Json) -> str:
    namespace = obj["metadata"].get("namespace", "default")
    if obj["kind"] == "Service":
        return f"/api/v1/namespaces/{namespace}/services"
    return f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"


class Churn(Background):
    """Calls *step* at a steady *rate* per second."""

    def __init__(self, rate: float, step: Callable[[], None]) -> None:
        """Prepare; the first step is taken when the block is entered."""
        super().__init__(self._repeat, name="churn")
        self._rate = rate
        self._step = step
        self.steps = 0

    def _repeat(self, rest: Rest) -> None:
        started = time.monotonic()
        # Against the clock, not with a fixed pause: late steps are made up for.
        while not rest(max(0.0, started + self.steps / self._rate - time.monotonic())):
            self._step()
            self.steps += 1
