"""
Packets and bytes of Services: whose an entry of the connection table is, and totals that only grow.

Pure. The kernel counts for each connection and tells of it twice: a look lists those that are alive,
an event says what one had counted when it ended. Both come at any time and in any order, so what was
counted of each living connection is kept, and only the difference is added.
"""

import socket
import struct
from collections.abc import Collection, Hashable, Iterable
from typing import Final, Generic, TypeVar

from kubeproxy_py.model import IPFamily, Protocol, ServicePort, ServicePortName

#: Both directions of a connection, as the metrics' label has them.
TO_SERVICE: Final = "to_service"
FROM_SERVICE: Final = "from_service"

Counts = tuple[int, int, int, int]
"""Packets and bytes of a connection to the Service, and then from it."""

_NUMBERS: Final[dict[Protocol, int]] = {
    "tcp": socket.IPPROTO_TCP,
    "udp": socket.IPPROTO_UDP,
    "sctp": socket.IPPROTO_SCTP,
}

# A connection that no look finds has ended, and its event comes within a minute or two: so often the
# kernel looks for entries that have expired, which it lists no more. Or the event was lost.
_FORGET_S: Final = 600.0


class Fronts:
    """Where the ServicePorts of one family are reached."""

    def __init__(
        self,
        family: IPFamily,
        ports: Iterable[ServicePort],
        local_addresses: Collection[str] = (),
        namespaces: Collection[str] = (),
    ) -> None:
        """Take *ports* of these namespaces (none: all); their node ports are on *local_addresses*."""
        number = family.socket_family
        self._is_v4 = family is IPFamily.V4
        self._addresses: dict[tuple[int, bytes, bytes], ServicePortName] = {}
        self._node_ports: dict[tuple[int, bytes], ServicePortName] = {}
        self._local = frozenset(socket.inet_pton(number, ip) for ip in local_addresses)
        for port in ports:
            name = port.name
            if namespaces and name.namespace not in namespaces:
                continue
            protocol = _NUMBERS[name.protocol]
            on_wire = port.port.to_bytes(2, "big")
            for ip in (port.cluster_ip, *port.lb_vips, *port.external_ips):
                self._addresses.setdefault((protocol, on_wire, socket.inet_pton(number, ip)), name)
            if port.node_port:
                self._node_ports[protocol, port.node_port.to_bytes(2, "big")] = name

    def find(self, protocol: int, port: bytes, destination: bytes) -> ServicePortName | None:
        """Return whose a connection to *destination* is; None: no Service's."""
        found = self._addresses.get((protocol, port, destination))
        if found is not None:
            return found
        found = self._node_ports.get((protocol, port))
        if found is not None and (
            destination in self._local
            # All of 127.0.0.0/8 is this host, whatever addresses the loopback device lists.
            or (self._is_v4 and destination[0] == 127)
        ):
            return found
        return None


Owner = TypeVar("Owner", bound=Hashable)
_NOTHING: Final[Counts] = (0, 0, 0, 0)
# What is kept of a connection: half of what four numbers would take.
_KEPT: Final = struct.Struct("=4Q")


class FlowLedger(Generic[Owner]):
    """What connections have counted since they were last seen, by owner.

    A look is ``begin``, ``see`` for each entry, ``finish``; ``end`` may come in between. The first
    complete look counts nothing: what there was before is somebody else's. It is what totals of a
    process before this one go on from (``standing``).
    """

    def __init__(self, room: int) -> None:
        """Keep at most *room* living connections; others count when they end."""
        self._room = room
        #: False: nothing is counted yet.
        self.has_begun = False
        #: What the connections that the last look found and that are kept had counted.
        self.standing: dict[Owner, Counts] = {}
        #: Connections that the last look found and for which there was no room.
        self.untracked = 0
        self._more: dict[Owner, Counts] = {}
        self._live: dict[Hashable, bytes] = {}
        # Known, and in no look any more, with the time at which one first missed them.
        self._missing: dict[Hashable, tuple[bytes, float]] = {}
        # Of the look that is under way: those that it has not found yet, those that ended since it
        # began, what those found have counted.
        self._unseen: dict[Hashable, bytes] = {}
        self._ended: set[Hashable] | None = None
        self._seen: dict[Owner, list[int]] = {}
        self._refused = 0

    def __len__(self) -> int:
        return len(self._live) + len(self._unseen) + len(self._missing)

    def begin(self) -> None:
        """Begin a look; one that was not finished is void."""
        # Usually nothing is left of the one before, and nothing is copied.
        live, self._live = self._live, {}
        live.update(self._unseen)
        self._unseen = live
        self._ended = set()
        self._seen = {}
        self._refused = 0

    def see(self, key: Hashable, owner: Owner, now: Counts) -> None:
        """Take in what the look says of a living connection."""
        # Read before the event came, and handed in afterwards.
        if self._ended is None or key in self._ended:
            return
        before, kept = self._take(key), _KEPT.pack(*now)
        if before is None and len(self) >= self._room:
            self._refused += 1
            return
        self._live[key] = kept
        if before != kept and (before is not None or self.has_begun):
            self._add(owner, before, now)
        sums = self._seen.setdefault(owner, [0, 0, 0, 0])
        sums[0] += now[0]
        sums[1] += now[1]
        sums[2] += now[2]
        sums[3] += now[3]

    def end(self, key: Hashable, owner: Owner, last: Counts) -> None:
        """Take in what a connection that has ended had counted."""
        before = self._take(key)
        if self._ended is not None:
            self._ended.add(key)
        if self.has_begun:
            self._add(owner, before, last)

    def finish(self, now: float, *, is_complete: bool) -> None:
        """End a look, which has found all connections if it *is_complete*; *now* is in seconds."""
        self._ended = None
        unseen, self._unseen = self._unseen, {}
        if not is_complete:
            self._live.update(unseen)
            return
        for key, counts in unseen.items():
            self._missing[key] = (counts, now)
        for key in [key for key, (_, at) in self._missing.items() if now - at >= _FORGET_S]:
            del self._missing[key]
        self.has_begun = True
        self.standing = {
            owner: (sums[0], sums[1], sums[2], sums[3]) for owner, sums in self._seen.items()
        }
        self.untracked = self._refused

    def take(self) -> dict[Owner, Counts]:
        """Return what was counted since this was last asked."""
        taken, self._more = self._more, {}
        return taken

    def _take(self, key: Hashable) -> bytes | None:
        """Return what is known of a connection, and forget it."""
        found = self._unseen.pop(key, None)
        if found is None:
            found = self._live.pop(key, None)
        if found is None and key in self._missing:
            found, _ = self._missing.pop(key)
        return found

    def _add(self, owner: Owner, kept: bytes | None, now: Counts) -> None:
        before = _NOTHING if kept is None else _KEPT.unpack(kept)
        more = self._more.get(owner, _NOTHING)
        self._more[owner] = (
            more[0] + _progress(before[0], now[0]),
            more[1] + _progress(before[1], now[1]),
            more[2] + _progress(before[2], now[2]),
            more[3] + _progress(before[3], now[3]),
        )


def _progress(before: int, now: int) -> int:
    # Less than before: somebody has set it back (conntrack -L -z), and it counts from zero again.
    return now - before if now >= before else now
