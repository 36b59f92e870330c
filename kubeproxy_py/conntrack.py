"""
Remove conntrack entries that send UDP packets to endpoints that are gone.

A UDP flow that never falls silent keeps its entry, and so its endpoint, for ever; TCP notices by
itself and is never touched. The whole table is compared with the whole state of all UDP services,
so that it does not matter what changed, and a restart with nothing changed removes nothing.

Never part of a rule sync: a sync asks, and a thread of its own does the work afterwards.
"""

import errno
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final

import msgspec
import structlog

from kubeproxy_py import ctnetlink, netlink
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily, ServiceState

log = structlog.get_logger()

Address = tuple[str, int]
"""An IP address in canonical text, and a port."""

_Packed = tuple[bytes, bytes]
"""An address and a port as they are on the wire."""

# How often a table that changes under the dump is read again, as kube-proxy does. Entries found
# stale on the way are already deleted, so giving up loses little.
_ATTEMPTS: Final = 5
# Deletions sent at once. Each may be refused with an answer of about 1 KiB of socket buffer.
_DELETE_BATCH: Final = 256


class Frontends(msgspec.Struct, frozen=True):
    """Where UDP services of one family are reached, and the endpoints that may answer there.

    Only ServicePorts with a serving endpoint are in it. Clearing the entries of the others would
    let packets pass unchanged in the meantime and leave entries without NAT that stick.
    """

    services: dict[Address, frozenset[Address]]
    node_ports: dict[int, frozenset[Address]]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one reconciliation did."""

    deleted: int
    failed: int  # deletions that the kernel refused
    seconds: float
    complete: bool  # False: the table changed under every attempt to read it


def frontends(services: Iterable[ServiceState]) -> Frontends:
    """Return the front ends of all UDP ServicePorts that have a serving endpoint.

    Only the serving condition counts: kube-proxy keeps entries to endpoints that are not ready or
    terminating, and to those that topology or traffic policy would not choose for a new flow.
    """
    addresses: dict[Address, frozenset[Address]] = {}
    node_ports: dict[int, frozenset[Address]] = {}
    for state in services:
        for key, port in state.ports.items():
            if key.protocol != "udp":
                continue
            serving = frozenset(
                (ep.ip, ep.port) for ep in state.endpoints.get(key, ()) if ep.serving
            )
            if not serving:
                continue
            # Two services may claim one external IP: whichever the rules choose, it may answer.
            for ip in (port.cluster_ip, *port.lb_vips, *port.external_ips):
                front = (ip, port.port)
                addresses[front] = addresses.get(front, frozenset()) | serving
            if port.node_port:
                node_ports[port.node_port] = node_ports.get(port.node_port, frozenset()) | serving
    return Frontends(services=addresses, node_ports=node_ports)


def connect() -> netlink.NetlinkSocket:
    """Open a socket to the conntrack table of this thread's network namespace."""
    return netlink.NetlinkSocket(netlink.connect(netlink.NETLINK_NETFILTER), "conntrack entries")


def reconcile(
    family: IPFamily,
    wanted: Frontends,
    *,
    local_addresses: Collection[str] | None = None,
    opener: Callable[[], netlink.NetlinkSocket] = connect,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Delete the UDP entries of *family* whose endpoint is not among those *wanted*.

    With *local_addresses* (of this host) a node port counts only on these. Without them it counts
    on any destination, as in kube-proxy, which so also cuts flows to that port of other hosts.

    Raises:
        OSError: netlink refused to list entries (EPERM without CAP_NET_ADMIN).
    """
    started = clock()
    tally = _Tally()
    is_complete = True
    if wanted.services or wanted.node_ports:
        matcher = _Matcher(family, wanted, local_addresses)
        with opener() as lister, opener() as deleter:
            # any() stops at the first attempt that was not disturbed.
            is_complete = any(
                _pass(matcher, _entries(lister, family), deleter, tally) for _ in range(_ATTEMPTS)
            )
    return Outcome(
        deleted=tally.deleted,
        failed=tally.failed,
        seconds=clock() - started,
        complete=is_complete,
    )


class _Tally(msgspec.Struct):
    deleted: int = 0
    failed: int = 0


def _pass(
    matcher: "_Matcher",
    entries: Iterator[memoryview],
    deleter: netlink.NetlinkSocket,
    tally: _Tally,
) -> bool:
    # Reads the table once and deletes while it is read, so that what is kept in memory does not
    # grow with the table. Returns whether the table held still meanwhile.
    batch: list[bytes] = []

    def flush() -> None:
        results = deleter.request_all(ctnetlink.DELETE, batch)
        batch.clear()
        deleted = results.count(0)
        tally.deleted += deleted
        # ENOENT: the entry timed out meanwhile, which is as good.
        tally.failed += len(results) - deleted - results.count(errno.ENOENT)

    is_interrupted = False
    try:
        for entry in matcher.stale(entries):
            batch.append(_deletion(entry))
            if len(batch) == _DELETE_BATCH:
                flush()
    except netlink.NetlinkError as error:
        if error.errno != errno.EINTR:
            raise
        is_interrupted = True
    flush()
    return not is_interrupted


def _entries(lister: netlink.NetlinkSocket, family: IPFamily) -> Iterator[memoryview]:
    # Yields the payload of each entry; of UDP ones only, where the kernel can tell (Linux 5.8).
    # Older ones ignore the filter or refuse it, so nobody may rely on it.
    generic = ctnetlink.generic_header(family)
    udp_only = ctnetlink.only_protocol(socket.IPPROTO_UDP)
    try:
        for _, _, payload in lister.dump(ctnetlink.GET, generic + udp_only):
            yield payload
    except netlink.NetlinkError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    else:
        return
    for _, _, payload in lister.dump(ctnetlink.GET, generic):
        yield payload


def _deletion(entry: memoryview) -> bytes:
    # The kernel looks up the tuples in their zone. It then compares the id, which spares most
    # entries that took the place of this one since it was listed (not those that got its memory,
    # too). A request without tuples would clear the whole table; matched entries have both.
    parts = [bytes(entry[:4])]
    for kind, value in netlink.attributes(entry[4:]):
        if kind in (ctnetlink.CTA_TUPLE_ORIG, ctnetlink.CTA_TUPLE_REPLY):
            parts.append(netlink.nested(kind, bytes(value)))
        elif kind in (ctnetlink.CTA_ID, ctnetlink.CTA_ZONE):
            parts.append(netlink.attribute(kind, bytes(value)))
    return b"".join(parts)


class _Matcher:
    """Tells stale entries from the rest, in about a microsecond each."""

    def __init__(
        self, family: IPFamily, wanted: Frontends, local_addresses: Collection[str] | None
    ) -> None:
        self._family = family
        self._services = {
            self._pack(front): frozenset(map(self._pack, endpoints))
            for front, endpoints in wanted.services.items()
        }
        self._node_ports = {
            port.to_bytes(2, "big"): frozenset(map(self._pack, endpoints))
            for port, endpoints in wanted.node_ports.items()
        }
        self._local = (
            None
            if local_addresses is None
            else frozenset(socket.inet_pton(family.socket_family, ip) for ip in local_addresses)
        )

    def stale(self, entries: Iterable[memoryview]) -> Iterator[memoryview]:
        """Yield those of *entries* that are UDP and lead to an endpoint that is not wanted."""
        services = self._services
        node_ports = self._node_ports
        layout = ctnetlink.LAYOUTS[self._family]
        unpack = layout.fields.unpack_from
        size = layout.fields.size
        original_head, proto_head, reply_head = layout.original, layout.proto, layout.reply
        for entry in entries:
            if len(entry) < size:
                continue
            original, destination, proto, number, port, reply, source, source_port = unpack(entry)
            if original == original_head and reply == reply_head and proto == proto_head:
                if number != socket.IPPROTO_UDP:
                    continue
            else:
                parsed = ctnetlink.parse_ends(entry)
                if parsed is None or parsed.protocol != socket.IPPROTO_UDP:
                    continue
                _, destination, port, source, source_port = parsed
            endpoints = services.get((destination, port))
            if endpoints is None:
                endpoints = node_ports.get(port)
                if endpoints is None or not self._is_local(destination):
                    continue
            if (source, source_port) not in endpoints:
                yield entry

    def _pack(self, address: Address) -> _Packed:
        ip, port = address
        return socket.inet_pton(self._family.socket_family, ip), port.to_bytes(2, "big")

    def _is_local(self, destination: bytes) -> bool:
        if self._local is None or destination in self._local:
            return True
        # All of 127.0.0.0/8 is this host, whatever addresses the loopback device lists.
        return self._family is IPFamily.V4 and destination[0] == 127


class Reconciler:
    """Reconciles on a thread of its own, each family at most once at a time."""

    def __init__(
        self,
        metrics: Metrics,
        run: Callable[[IPFamily, Frontends], Outcome] = reconcile,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Use *run* for the work; in production ``reconcile`` with this host's addresses."""
        self._metrics = metrics
        self._run_once = run
        self._wall_clock = wall_clock
        self._thread = threading.Thread(target=self._run, name="conntrack", daemon=True)
        self._is_refused = False  # and said so
        #: When (Unix time) and how each family's last run ended. Replaced as a whole: others read it.
        self.last: Mapping[IPFamily, tuple[float, Outcome | str]] = {}
        self._changed = threading.Condition()
        # Guarded by _changed:
        self._wanted: dict[IPFamily, Callable[[], Frontends]] = {}
        self._is_stopping = False

    def request(self, family: IPFamily, build: Callable[[], Frontends]) -> None:
        """Ask for a reconciliation with what *build* returns; it is called on the thread.

        *build* describes what the kernel's rules say already. With later state, packets would meet
        the old rules once more and bring back the entries that were deleted.

        Requests that wait are replaced by later ones of their family. A request during a run means
        one more run after it, because the run may have passed the entries concerned.
        """
        with self._changed:
            self._wanted[family] = build
            self._changed.notify()

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """Drop what waits and wait for a run to end.

        Deleting half is no harm, so the end of the process need not wait for millions of entries:
        after *timeout_s* the thread is left to it.
        """
        with self._changed:
            self._is_stopping = True
            self._wanted.clear()
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._is_stopping)
                if self._is_stopping:
                    return
                family = next(iter(self._wanted))
                build = self._wanted.pop(family)
            try:
                outcome = self._run_once(family, build())
                self._record(family, outcome)
                self._keep(family, outcome)
            except OSError as error:
                self._keep(family, str(error))
                self._metrics.conntrack_failures.labels(family.value).inc()
                if error.errno in (errno.EPERM, errno.EACCES):
                    self._warn_of_refusal(error)
                else:
                    log.exception("conntrack.failed", ip_family=family.value)
            except Exception as error:
                self._keep(family, str(error))
                # Whatever it is, the rules are right without this; the next change asks again.
                self._metrics.conntrack_failures.labels(family.value).inc()
                log.exception("conntrack.failed", ip_family=family.value)

    def _keep(self, family: IPFamily, ended: Outcome | str) -> None:
        self.last = {**self.last, family: (self._wall_clock(), ended)}

    def _warn_of_refusal(self, error: OSError) -> None:
        # Said once: it stays so for the life of the process, and every change of a UDP endpoint
        # would repeat it.
        if not self._is_refused:
            self._is_refused = True
            log.warning(
                "conntrack.refused",
                error=str(error),
                needed="CAP_NET_ADMIN",
                consequence="UDP flows to removed endpoints last until they fall silent",
            )

    def _record(self, family: IPFamily, outcome: Outcome) -> None:
        labels = (family.value,)
        self._metrics.conntrack_sync_duration.labels(*labels).observe(outcome.seconds)
        self._metrics.conntrack_deleted_entries.labels(*labels).inc(outcome.deleted)
        write = log.info if outcome.deleted or outcome.failed else log.debug
        if outcome.failed or not outcome.complete:
            write = log.warning
        write(
            "conntrack.reconciled",
            ip_family=family.value,
            deleted=outcome.deleted,
            failed=outcome.failed,
            complete=outcome.complete,
            duration_s=round(outcome.seconds, 3),
        )
