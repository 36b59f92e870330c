"""
Connections per second of each ServicePort, from one look at a node's rules to the next.

Pure. Everything is learned from the rules themselves, so it is the same whether this program or the
real kube-proxy wrote them.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final, Literal, NamedTuple

from kubeproxy_py.model import ServicePortName, Tables
from kubeproxy_py.traffic import Counts, Index, Ledger, Series

Sort = Literal["rate", "total", "refused", "endpoints", "name"]
SORTS: Final[tuple[Sort, ...]] = ("rate", "total", "refused", "endpoints", "name")


class Row(NamedTuple):
    """One ServicePort, both families together."""

    port: ServicePortName
    per_s: float  # new connections
    total: int  # since the rules were last written
    endpoints: int  # of the family that has more of them
    refused_per_s: float  # packets
    refused: int
    share: float  # of all new connections; 0 to 1


class View(NamedTuple):
    """What one look found."""

    seconds: float  # since the last look; 0: this is the first, and there are no rates
    rows: tuple[Row, ...]

    @property
    def per_s(self) -> float:
        return sum(row.per_s for row in self.rows)


class FamilyWatch:
    """One family's rules, look by look: ``learn`` the rules, read the counters, ``fold`` them."""

    def __init__(self, namespaces: Collection[str] = ()) -> None:
        self._namespaces = namespaces
        self._ledger = Ledger()
        self.more: Counter[Series] = Counter()

    def learn(self, tables: Tables) -> Mapping[str, Collection[str]]:
        """Take these for all rules there are; return the chains whose counters are needed."""
        self._ledger.index = Index(self._namespaces)
        self._ledger.index.learn(tables)
        return self._ledger.index.chains()

    def fold(self, counts: Counts) -> None:
        self._ledger.begin()
        self.more = self._ledger.fold(counts)

    @property
    def standing(self) -> Counter[Series]:
        return self._ledger.standing()

    @property
    def ports(self) -> dict[ServicePortName, int]:
        return self._ledger.index.ports()


def view(families: Iterable[FamilyWatch], seconds: float, sort: Sort) -> View:
    """Return what has happened in *seconds* (0: there was no look before)."""
    endpoints: dict[ServicePortName, int] = {}
    more: Counter[tuple[str, ServicePortName]] = Counter()
    total: Counter[tuple[str, ServicePortName]] = Counter()
    for family in families:
        for port, number in family.ports.items():
            endpoints[port] = max(number, endpoints.get(port, 0))
        for counted, into in ((family.more, more), (family.standing, total)):
            for series, amount in counted.items():
                into[series.kind, series.port] += amount
    everything = sum(more["connections", port] for port in endpoints)
    rows = [
        Row(
            port,
            more["connections", port] / seconds if seconds else 0.0,
            total["connections", port],
            number,
            more["refused", port] / seconds if seconds else 0.0,
            total["refused", port],
            more["connections", port] / everything if everything else 0.0,
        )
        for port, number in endpoints.items()
    ]
    rows.sort(key=lambda row: (*_ranks(row, sort), row.port))
    return View(seconds, tuple(rows))


def _ranks(row: Row, sort: Sort) -> tuple[float, ...]:
    ranks: dict[Sort, tuple[float, ...]] = {
        "rate": (-row.per_s, -row.total),
        "total": (-row.total,),
        "refused": (-row.refused_per_s, -row.refused),
        "endpoints": (-row.endpoints,),
        "name": (),
    }
    return ranks[sort]


def as_json(found: View) -> dict[str, Any]:
    """Return *found* for scripts."""
    return {
        "seconds": round(found.seconds, 3),
        "connectionsPerSecond": round(found.per_s, 3),
        "services": [
            {
                "namespace": row.port.namespace,
                "service": row.port.name,
                "port": row.port.port,
                "protocol": row.port.protocol,
                "connectionsPerSecond": round(row.per_s, 3),
                "connections": row.total,
                "share": round(row.share, 4),
                "endpoints": row.endpoints,
                "refusedPacketsPerSecond": round(row.refused_per_s, 3),
                "refusedPackets": row.refused,
            }
            for row in found.rows
        ],
    }
