"""
Clients in namespaces: real connections, and in one word what became of each.

Every call is bounded by a deadline and opens its socket in the namespace it is told; nothing here
needs the main thread. Servers stand in servers.py.
"""

import collections
import contextlib
import errno
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final, Literal, NamedTuple, Self

from kubeproxy_py.model import Protocol
from tests.support import sctp, servers
from tests.support.background import Background, Rest
from tests.support.netns import Namespace

Kind = Literal["answered", "refused", "timeout", "unreachable", "reset"]

_DEFAULT_TIMEOUT_S: Final = 2.0  # long enough for one lost SYN, which is sent again after 1 s
_POLL_S: Final = 0.01  # how often wait_until looks
# From linux/in.h, in6.h and errqueue.h; the socket module names them only in newer Pythons.
_IP_RECVERR: Final = 11
_IPV6_RECVERR: Final = 25
_EXTENDED_ERROR: Final = struct.Struct("=IBBBxII")  # errno, origin, type, code, info, data
_ORIGINS: Final = {2: "ICMP", 3: "ICMPv6"}
_KINDS: Final[dict[int, Kind]] = {
    errno.ECONNREFUSED: "refused",
    errno.ETIMEDOUT: "timeout",
    # A rule in OUTPUT drops a datagram under the sender's eyes. Only the sender on the same host
    # can see the difference, and what a test asks is whether there was an answer.
    errno.EPERM: "timeout",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.EACCES: "unreachable",  # ICMPv6 administratively prohibited
    errno.ENOPROTOOPT: "unreachable",  # ICMP protocol unreachable
    errno.EPROTO: "unreachable",  # the same in ICMPv6: unknown next header
    errno.ECONNRESET: "reset",
    errno.EPIPE: "reset",
}


class Outcome(NamedTuple):
    """What became of one attempt.

    ``refused`` has two causes, told apart by ``cause``: ``RST`` (the destination has no such port)
    or e.g. ``ICMP 3/3 from 192.168.0.2`` (a REJECT rule, or a UDP port nobody listens on).
    ``reset`` is a connection that was established and then broken.
    """

    kind: Kind
    seconds: float
    server: str = ""
    client_ip: str = ""  # the client's address as the server saw it
    client_port: int = 0
    server_ip: str = ""  # the server's own address
    server_port: int = 0
    cause: str = ""

    @property
    def is_answered(self) -> bool:
        return self.kind == "answered"


class Conversation:
    """One TCP connection that stays open, to be asked again and again."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over the connected socket *sock*."""
        self._sock = sock

    def ask(self, *, timeout_s: float = _DEFAULT_TIMEOUT_S, is_last: bool = False) -> Outcome:
        """Ask who is at the other end; with *is_last* the server closes afterwards."""
        started = time.monotonic()
        try:
            self._sock.settimeout(timeout_s)
            self._sock.sendall(servers.BYE if is_last else servers.ASK)
            line = b""
            while not line.endswith(b"\n"):
                self._sock.settimeout(_remaining(started, timeout_s))
                data = self._sock.recv(4096)
                if not data:
                    return Outcome("reset", time.monotonic() - started, cause="closed by server")
                line += data
        except OSError as error:
            return _failure(self._sock, error, started)
        return _answered(line, started)

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def connect(
    ns: Namespace,
    dst: str,
    port: int,
    protocol: Protocol = "tcp",
    *,
    source_ip: str = "",
    source_port: int = 0,
    timeout_s: float = _DEFAULT_TIMEOUT_S,
) -> Outcome:
    """Ask once, over a new connection, who answers at *dst*.

    A given *source_port* makes UDP datagrams one flow, as for stale entries in the connection
    table. TCP from the host whose OUTPUT rules reject it is refused only after about a second: the
    kernel cannot take the ICMP error while connect() holds the socket, and sends SYN again.
    """
    source = (source_ip or ("::" if ":" in dst else "0.0.0.0"), source_port)
    started = time.monotonic()
    if protocol == "sctp":
        return _send_init(ns, dst, port, source, timeout_s)
    if protocol == "udp":
        return _send_datagram(ns, dst, port, source, timeout_s)
    opened = _open_tcp(ns, dst, port, source, timeout_s)
    if isinstance(opened, Outcome):
        return opened
    with Conversation(opened) as conversation:
        outcome = conversation.ask(timeout_s=_remaining(started, timeout_s), is_last=True)
    return outcome._replace(seconds=time.monotonic() - started)


@contextlib.contextmanager
def conversation(
    ns: Namespace,
    dst: str,
    port: int,
    *,
    source_ip: str = "",
    timeout_s: float = _DEFAULT_TIMEOUT_S,
) -> Iterator[Conversation]:
    """Open a TCP connection that lasts as long as the block. Raises AssertionError if it fails."""
    source = (source_ip or ("::" if ":" in dst else "0.0.0.0"), 0)
    opened = _open_tcp(ns, dst, port, source, timeout_s)
    if isinstance(opened, Outcome):
        message = f"cannot connect from {ns.name} to {dst} port {port}: {opened}"
        raise AssertionError(message)  # noqa: TRY004 - the network failed, not the caller
    with Conversation(opened) as talk:
        yield talk


def shares(
    ns: Namespace,
    dst: str,
    port: int,
    n: int,
    *,
    protocol: Protocol = "tcp",
    concurrency: int = 1,
    timeout_s: float = _DEFAULT_TIMEOUT_S,
) -> collections.Counter[str]:
    """Connect *n* times; return how many each server answered.

    What was not answered is counted under its kind in parentheses, e.g. ``(timeout)``.
    """

    def once(_number: int) -> str:
        outcome = connect(ns, dst, port, protocol, timeout_s=timeout_s)
        return outcome.server if outcome.is_answered else f"({outcome.kind})"

    if concurrency == 1:
        return collections.Counter(map(once, range(n)))
    with ThreadPoolExecutor(concurrency) as pool:
        return collections.Counter(pool.map(once, range(n)))


class Tick(NamedTuple):
    """One attempt of a Ticker."""

    started_at: float  # time.monotonic()
    outcome: Outcome


class Ticker(Background):
    """Connects again and again.

    One attempt follows the other: while one waits for an answer, no other is started.
    """

    def __init__(
        self,
        ns: Namespace,
        dst: str,
        port: int,
        protocol: Protocol = "tcp",
        *,
        interval_s: float = 0.005,
        timeout_s: float = 1.0,
        max_ticks: int = 100_000,
    ) -> None:
        """Prepare; nothing is sent before the block is entered.

        Args:
            ns: where the client is.
            dst: whom to connect to.
            port: on which port.
            protocol: over what.
            interval_s: pause between two attempts.
            timeout_s: when an attempt counts as failed. Below one second, so that a lost packet
                is seen as a failure instead of being repaired by TCP's first retransmission.
            max_ticks: a bound for tests that hang: the thread ends after so many attempts.
        """
        super().__init__(self._tick, name=f"ticker {dst}")
        self._connect: Callable[[], Outcome] = lambda: connect(
            ns, dst, port, protocol, timeout_s=timeout_s
        )
        self._interval_s = interval_s
        self._max_ticks = max_ticks
        self._changed = threading.Condition()
        # Guarded by _changed:
        self._ticks: list[Tick] = []

    @property
    def ticks(self) -> list[Tick]:
        with self._changed:
            return list(self._ticks)

    @property
    def failures(self) -> list[Tick]:
        return [tick for tick in self.ticks if not tick.outcome.is_answered]

    def since(self, moment: float) -> list[Tick]:
        """Return the attempts begun at or after *moment* (time.monotonic())."""
        return [tick for tick in self.ticks if tick.started_at >= moment]

    def wait_for(self, condition: Callable[[list[Tick]], bool], *, timeout_s: float = 10.0) -> None:
        """Wait until *condition* holds for the ticks so far.

        Raises:
            AssertionError: it did not hold in time.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not condition(list(self._ticks)):
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise AssertionError(
                        f"the wanted did not happen within {timeout_s} s;"
                        f" last attempts: {self._ticks[-3:]}"
                    )

    def wait_for_ticks(self, n: int, *, timeout_s: float = 10.0) -> None:
        """Wait until *n* further attempts have been begun and ended."""
        now = time.monotonic()
        self.wait_for(
            lambda ticks: sum(tick.started_at >= now for tick in ticks) >= n, timeout_s=timeout_s
        )

    def _tick(self, rest: Rest) -> None:
        for _ in range(self._max_ticks):
            started_at = time.monotonic()
            outcome = self._connect()
            with self._changed:
                self._ticks.append(Tick(started_at, outcome))
                self._changed.notify_all()
            if rest(self._interval_s):
                return


def wait_until(
    condition: Callable[[], bool], *, timeout_s: float = 10.0, what: str = "the condition"
) -> float:
    """Wait until *condition* holds; return the seconds it took.

    Raises:
        AssertionError: it did not hold in time.
    """
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise AssertionError(f"{what} did not come true within {timeout_s} s")
        time.sleep(_POLL_S)
    return time.monotonic() - started


def _open_tcp(
    ns: Namespace, dst: str, port: int, source: tuple[str, int], timeout_s: float
) -> socket.socket | Outcome:
    started = time.monotonic()
    sock = _open_client(ns, dst, socket.SOCK_STREAM)
    try:
        if source[1]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.settimeout(timeout_s)
        sock.bind(source)
        sock.connect((dst, port))
    except OSError as error:
        with sock:
            return _failure(sock, error, started)
    return sock


def _send_datagram(
    ns: Namespace, dst: str, port: int, source: tuple[str, int], timeout_s: float
) -> Outcome:
    started = time.monotonic()
    with _open_client(ns, dst, socket.SOCK_DGRAM) as sock:
        try:
            sock.settimeout(timeout_s)
            sock.bind(source)
            # Connected, so that ICMP errors come back as errors of this socket.
            sock.connect((dst, port))
            sock.send(servers.BYE)
            line = sock.recv(4096)
        except OSError as error:
            return _failure(sock, error, started)
    return _answered(line, started)


def _send_init(
    ns: Namespace, dst: str, port: int, source: tuple[str, int], timeout_s: float
) -> Outcome:
    started = time.monotonic()
    source_port = source[1] or random.randint(49152, 65535)
    tag = random.randint(1, 2**32 - 1)  # names this attempt; 0 is not allowed
    with _open_client(ns, dst, socket.SOCK_RAW) as sock:
        try:
            sock.bind((source[0], 0))
            sock.connect((dst, 0))
            sock.send(sctp.render_init(source_port, port, tag))
            while True:
                sock.settimeout(_remaining(started, timeout_s))
                packet = sctp.parse(servers.strip_ip_header(sock, sock.recv(4096)))
                if packet and packet.tag == tag and packet.reason is not None:
                    return _answered(packet.reason, started)
        except OSError as error:
            return _failure(sock, error, started)


def _open_client(ns: Namespace, dst: str, kind: socket.SocketKind) -> socket.socket:
    protocol = sctp.PROTOCOL if kind == socket.SOCK_RAW else 0
    with ns.entered():
        sock = socket.socket(servers.family_of(dst), kind, protocol)
    # Keeps ICMP errors with their type and sender, for Outcome.cause.
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
    return sock


def _answered(line: bytes, started: float) -> Outcome:
    answer = servers.parse_answer(line)
    return Outcome("answered", time.monotonic() - started, *answer)


def _failure(sock: socket.socket, error: OSError, started: float) -> Outcome:
    """Return the Outcome for *error*; raise it again if it is one of the test's own making."""
    seconds = time.monotonic() - started
    if isinstance(error, TimeoutError):
        return Outcome("timeout", seconds, cause="no answer")
    if error.errno is None or error.errno not in _KINDS:
        raise error
    cause = _icmp_cause(sock)
    if not cause and sock.type == socket.SOCK_STREAM and error.errno == errno.ECONNREFUSED:
        cause = "RST"
    return Outcome(_KINDS[error.errno], seconds, cause=cause or errno.errorcode[error.errno])


def _icmp_cause(sock: socket.socket) -> str:
    """Return which ICMP error the kernel has kept for *sock*, "" if none."""
    # With a timeout, Python would ask an empty queue again and again until the time is over.
    sock.setblocking(False)
    try:
        _data, ancillary, _flags, _peer = sock.recvmsg(512, 512, socket.MSG_ERRQUEUE)
    except OSError:
        return ""
    for level, kind, data in ancillary:
        if (level, kind) not in (
            (socket.IPPROTO_IP, _IP_RECVERR),
            (socket.IPPROTO_IPV6, _IPV6_RECVERR),
        ):
            continue
        _errno, origin, icmp_type, code, _info, _data2 = _EXTENDED_ERROR.unpack_from(data)
        if origin in _ORIGINS:
            # The sender's socket address follows.
            rest = data[_EXTENDED_ERROR.size :]
            if level == socket.IPPROTO_IP:
                sender = socket.inet_ntop(socket.AF_INET, rest[4:8])
            else:
                sender = socket.inet_ntop(socket.AF_INET6, rest[8:24])
            return f"{_ORIGINS[origin]} {icmp_type}/{code} from {sender}"
    return ""


def _remaining(started: float, timeout_s: float) -> float:
    """Return what is left of *timeout_s* since *started*, never zero: that means "do not block"."""
    return max(0.001, started + timeout_s - time.monotonic())
