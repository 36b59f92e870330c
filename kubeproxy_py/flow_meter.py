"""
What connections to Services have counted, from the kernel's connection table: each is told when it
ends, and the living are looked at when somebody scrapes. On a thread of its own.

Only connections whose destination was rewritten are asked for, and the kernel does the sorting. A
scrape asks for a look and waits for it; nothing else waits for this thread.
"""

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Final

import structlog

from kubeproxy_py import ctnetlink, netlink
from kubeproxy_py.flows import FROM_SERVICE, TO_SERVICE, Counts, FlowLedger, Fronts
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily, ServicePort, ServicePortName
from kubeproxy_py.traffic import Series

log = structlog.get_logger()

# Living connections that are kept: 55 MB, measured. A node has a few thousand; above this, reading
# them all takes a second of CPU, which is more than their progress is worth.
_ROOM: Final = 200_000
# How often a table that changes under the dump is read again.
_ATTEMPTS: Final = 5
# During a look, events are read in between: so many entries take a few milliseconds, and the
# socket has room for the events of half a second and more.
_ENTRIES_BETWEEN_EVENTS: Final = 500
# Services that are new are asked for when an unknown address is met, at most so often. The entry of
# a connection that ended stays for ten seconds at least, so none ends before its Service is known.
_FRONTS_INTERVAL_S: Final = 1.0
# Far above what a look takes (1 s of CPU for 200,000 connections); a kernel that hangs must not stop the
# other numbers for ever.
_LOOK_DEADLINE_S: Final = 60.0
_STOP_S: Final = 1.0
# After a failure that nobody foresaw.
_PAUSE_S: Final = 1.0
# At the most this many events in a row, so that a look is begun in between however many come.
_EVENTS_AT_ONCE: Final = 10_000

Owner = tuple[IPFamily, ServicePortName]

# A classic BPF program (linux/filter.h) on the socket of events: what does not tell of a rewritten
# destination is dropped before it takes any room. SKF_AD_NLATTR finds an attribute.
_SO_ATTACH_FILTER: Final = 26
_NLATTR: Final = 0xFFFFF000 + 12
_INSTRUCTION: Final = struct.Struct("=HBBI")
_PROGRAM: Final = b"".join(
    _INSTRUCTION.pack(*instruction)
    for instruction in (
        (0x00, 0, 0, 16 + 4),  # ld #20: attributes begin behind both headers
        (0x01, 0, 0, ctnetlink.CTA_STATUS),  # ldx #CTA_STATUS
        (0x20, 0, 0, _NLATTR),  # ld [nlattr]: where it is, or 0
        (0x15, 3, 0, 0),  # jeq #0, accept
        (0x07, 0, 0, 0),  # tax
        (0x40, 0, 0, 4),  # ld [x + 4]: its value
        (0x45, 0, 1, ctnetlink.IPS_DST_NAT),  # jset #IPS_DST_NAT, accept, drop
        (0x06, 0, 0, 0xFFFFFFFF),  # accept: ret #-1
        (0x06, 0, 0, 0),  # drop: ret #0
    )
)


def connect() -> netlink.NetlinkSocket:
    """Open a socket that asks for living connections."""
    return netlink.NetlinkSocket(netlink.connect(netlink.NETLINK_NETFILTER), "connections")


def connect_events() -> netlink.NetlinkSocket:
    """Open a socket that is told of connections that end, and never waits for one."""
    raw = netlink.connect(netlink.NETLINK_NETFILTER, (ctnetlink.GROUP_DESTROY,))
    _filter_by_kernel(raw.fileno())
    os.set_blocking(raw.fileno(), False)
    return netlink.NetlinkSocket(raw, "connections that end")


def _filter_by_kernel(descriptor: int) -> None:
    program = ctypes.create_string_buffer(_PROGRAM, len(_PROGRAM))
    count = len(_PROGRAM) // _INSTRUCTION.size
    value = struct.pack("@HP", count, ctypes.addressof(program))
    with socket.socket(fileno=os.dup(descriptor)) as sock, contextlib.suppress(OSError):
        # What the kernel does not sort out, the addresses of Services do.
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, value)


class FlowMeter:
    """Packets and bytes of all Services, of all families."""

    def __init__(
        self,
        ports: Callable[[IPFamily], Iterable[ServicePort]],
        local_addresses: Callable[[IPFamily], Collection[str]],
        *,
        families: Collection[IPFamily],
        metrics: Metrics,
        is_ready: Callable[[], bool] = lambda: True,
        namespaces: Collection[str] = (),
        room: int = _ROOM,
        opener: Callable[[], netlink.NetlinkSocket] = connect,
        events_opener: Callable[[], netlink.NetlinkSocket] = connect_events,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Count for *ports*, of these namespaces (none: all), once these are known (*is_ready*)."""
        self._ports = ports
        self._local_addresses = local_addresses
        self._families = {int(family.socket_family): family for family in families}
        self._metrics = metrics
        self._is_ready = is_ready
        self._namespaces = frozenset(namespaces)
        self._room = room
        self._open = opener
        self._open_events = events_opener
        self._clock = clock
        self._thread = threading.Thread(target=self._run, name="flows", daemon=True)
        self._wake = -1
        # Only the thread's:
        self._events: netlink.NetlinkSocket | None = None
        self._ledger: FlowLedger[Owner] = FlowLedger(room)
        self._fronts: dict[int, Fronts] = {}
        self._local: dict[IPFamily, frozenset[str]] = {}
        self._built_at = float("-inf")
        self._entries = 0
        self._is_full = False  # and said so
        # Set by anybody, cleared by the thread.
        self._is_outdated = True
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._asked = 0
        self._answered = 0
        self._has_looked = False  # the last time that it was asked
        self._has_begun = False
        self._taken: dict[IPFamily, Counter[Series]] = {family: Counter() for family in families}
        self._standing: dict[IPFamily, Counter[Series]] = {family: Counter() for family in families}
        self._is_stopping = False

    def start(self) -> None:
        """Begin; connections that end after the return of this are counted once one has looked.

        Raises:
            OSError: the kernel does not tell of connections. Nothing is running then.
        """
        self._events = self._open_events()
        try:
            self._wake = os.eventfd(0)
        except BaseException:
            self._events.close()
            raise
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a look that takes long is left to the end of the process."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join(_STOP_S)
        with self._changed:
            if self._wake >= 0 and not self._thread.is_alive():
                os.close(self._wake)
                self._wake = -1

    def outdate(self) -> None:
        """Say that Services or their addresses may have changed. Cheap; from any thread."""
        self._is_outdated = True

    def look(self, timeout_s: float = _LOOK_DEADLINE_S) -> bool:
        """Look at all living connections, on the thread, and wait; return whether it was possible."""
        with self._changed:
            if self._is_stopping:
                return False
            self._asked += 1
            asked = self._asked
            os.eventfd_write(self._wake, 1)
            is_over = self._changed.wait_for(
                lambda: self._answered >= asked or self._is_stopping, timeout_s
            )
            return is_over and self._has_looked and not self._is_stopping

    @property
    def has_begun(self) -> bool:
        """Tell whether anything is counted yet: not before the first look."""
        with self._changed:
            return self._has_begun

    def take(self, family: IPFamily) -> tuple[Counter[Series], Counter[Series]]:
        """Return what was counted up to the last look since this was last asked, and where
        connections stood then.
        """
        with self._changed:
            taken, self._taken[family] = self._taken[family], Counter()
            return taken, self._standing[family]

    # The thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        assert self._events is not None
        poller = select.poll()
        poller.register(self._events, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        try:
            while not self._is_stopping:
                ready = {descriptor for descriptor, _ in poller.poll()}
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                for work in (self._drain, self._answer):
                    try:
                        work()
                    except Exception:
                        # Numbers are no reason to end: the rules are right without them.
                        log.exception("traffic.failed")
                        self._metrics.flow_failures.inc()
                        self._pause()
        finally:
            self._events.close()

    def _pause(self) -> None:
        # What fails may fail again at once, and would do nothing else, for ever.
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopping, _PAUSE_S)

    def _drain(self) -> None:
        """Take in what connections have ended."""
        assert self._events is not None
        for _ in range(_EVENTS_AT_ONCE):
            try:
                self._events.each_event(self._end)
            except netlink.NetlinkError as error:
                if error.errno == errno.EAGAIN:
                    return
                if error.errno != errno.ENOBUFS:
                    raise
                # What these had counted since the last look is lost. No look could find them now;
                # the next one finds that they are gone.
                self._metrics.flow_events_lost.inc()

    def _answer(self) -> None:
        with self._changed:
            asked = self._asked
            if asked == self._answered or self._is_stopping:
                return
        has_looked = False
        try:
            has_looked = self._look()
        finally:
            with self._changed:
                self._answered = asked
                self._has_looked = has_looked
                self._changed.notify_all()

    def _look(self) -> bool:
        # Connections whose Service is not known yet would later be taken for new ones.
        if not self._is_ready():
            return False
        started = self._clock()
        try:
            self._follow_addresses()
            if not any(self._read_all() for _ in range(_ATTEMPTS)):
                raise netlink.NetlinkError(errno.EINTR, "connections")
        except OSError as error:
            self._metrics.flow_failures.inc()
            log.info("traffic.flow_look_failed", error=str(error))
            return False
        ledger = self._ledger
        with self._changed:
            self._has_begun = ledger.has_begun
            for (family, port), counts in ledger.take().items():
                self._taken[family].update(_by_series(port, counts))
            self._standing = {family: Counter() for family in self._standing}
            for (family, port), counts in ledger.standing.items():
                self._standing[family].update(_by_series(port, counts))
        self._metrics.flows.labels("tracked").set(len(ledger))
        self._metrics.flows.labels("untracked").set(ledger.untracked)
        self._metrics.flow_look_duration.observe(self._clock() - started)
        if bool(ledger.untracked) != self._is_full:
            self._is_full = not self._is_full
            if self._is_full:
                log.warning(
                    "traffic.flows_untracked",
                    tracked=len(ledger),
                    untracked=ledger.untracked,
                    consequence="packets and bytes of these are counted when they end",
                )
        return True

    def _read_all(self) -> bool:
        """Read all living connections once; return whether the table held still meanwhile."""
        ledger = self._ledger
        request = ctnetlink.generic_header(None) + ctnetlink.only_status(ctnetlink.IPS_DST_NAT)
        is_complete = False
        ledger.begin()
        try:
            with self._open() as sock:
                (read,) = sock.dump_each(ctnetlink.GET, [request], self._see)
                is_complete = read is not None
        finally:
            ledger.finish(self._clock(), is_complete=is_complete)
        return is_complete

    def _see(self, buffer: bytearray, begin: int, end: int) -> None:
        self._entries += 1
        if self._entries % _ENTRIES_BETWEEN_EVENTS == 0:
            self._drain()
        found = self._parse(buffer, begin, end)
        if found is not None:
            self._ledger.see(*found)

    def _end(self, buffer: bytearray, begin: int, end: int) -> None:
        found = self._parse(buffer, begin, end)
        if found is not None:
            self._ledger.end(*found)

    def _parse(self, buffer: bytearray, begin: int, end: int) -> tuple[int, Owner, Counts] | None:
        """Return what connection it is, whose, and what it has counted; None: not a Service's."""
        family = self._families.get(buffer[begin]) if end - begin >= 4 else None
        if family is None:
            return None
        ends = ctnetlink.parse_destination(buffer, begin, end, ctnetlink.LAYOUTS[family])
        if ends is None:
            return None
        name = self._find(buffer[begin], *ends)
        if name is None:
            return None
        counts = ctnetlink.parse_counts(buffer, begin, end)
        if counts is None:
            return None
        return ctnetlink.parse_identity(buffer, begin, end), (family, name), counts

    def _find(
        self, number: int, protocol: int, port: bytes, destination: bytes
    ) -> ServicePortName | None:
        fronts = self._fronts.get(number)
        found = fronts.find(protocol, port, destination) if fronts else None
        if found is None and self._is_outdated:
            if self._clock() - self._built_at < _FRONTS_INTERVAL_S:
                return None
            self._build_fronts()
            found = self._fronts[number].find(protocol, port, destination)
        return found

    def _follow_addresses(self) -> None:
        local = {
            family: frozenset(self._local_addresses(family)) for family in self._families.values()
        }
        if local != self._local:
            self._local = local
            self._is_outdated = True
        if self._is_outdated:
            self._build_fronts()

    def _build_fronts(self) -> None:
        # Before asking: what changes meanwhile is asked for again.
        self._is_outdated = False
        self._fronts = {
            number: Fronts(
                family, self._ports(family), self._local.get(family, ()), self._namespaces
            )
            for number, family in self._families.items()
        }
        self._built_at = self._clock()


def _by_series(port: ServicePortName, counts: Counts) -> dict[Series, int]:
    packets, octets, reply_packets, reply_octets = counts
    return {
        Series("packets", port, TO_SERVICE): packets,
        Series("bytes", port, TO_SERVICE): octets,
        Series("packets", port, FROM_SERVICE): reply_packets,
        Series("bytes", port, FROM_SERVICE): reply_octets,
    }
