"""
Traffic of Services as metrics: looks at the kernel's counters when somebody scrapes, on a thread of its
own.

A sync never waits for a look: what it does to counters it leaves in a queue. Nobody scrapes: nothing is
read.
"""

import collections
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from typing import Final, Literal

import structlog
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from kubeproxy_py import flows, rules, traffic, traffic_state
from kubeproxy_py.errors import IptablesError
from kubeproxy_py.flow_meter import FlowMeter
from kubeproxy_py.iptables import plan
from kubeproxy_py.iptables.counters import Counters, Counts
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily, ServiceName, ServicePortName, Tables
from kubeproxy_py.traffic import Board, Ledger, Series, Written

log = structlog.get_logger()

Detail = Literal["service", "endpoint"]
_Key = tuple[ServicePortName, str]

# A scrape waits so long for fresh numbers and then takes the last ones: Prometheus gives up after 10 s,
# and each scrape that waits has one of the server's few threads.
_DEADLINE_S: Final = 1.0
# However many scrape, looks take at most this share of the time, and at most one a second is made.
_SHARE: Final = 0.1
_INTERVAL_S: Final = 1.0
# Numbers of a thread that hangs are none: after so long, better no series than one that stands still.
_STALE_S: Final = 300.0
_STOP_S: Final = 1.0

_LABELS: Final = ("namespace", "service", "port", "protocol", "ip_family")
#: What stands for all that has no series of its own. No Service's namespace is empty.
OTHERS: Final = ServicePortName("", "other", "", "tcp")

CONNECTIONS: Final = "kubeproxy_service_connections"
REFUSED: Final = "kubeproxy_service_refused_packets"
ENDPOINT_CONNECTIONS: Final = "kubeproxy_endpoint_connections"
PACKETS: Final = "kubeproxy_service_packets"
BYTES: Final = "kubeproxy_service_bytes"
_METRICS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    CONNECTIONS: ("[ALPHA] Connections that were given an endpoint of this Service", ()),
    REFUSED: ("[ALPHA] Packets to this Service that were refused or dropped", ("reason",)),
    ENDPOINT_CONNECTIONS: ("[ALPHA] Connections that were given this endpoint", ("endpoint",)),
    PACKETS: ("[ALPHA] Packets of connections to this Service", ("direction",)),
    BYTES: ("[ALPHA] Bytes of these packets, IP headers included", ("direction",)),
}
_OF_FLOWS: Final = (PACKETS, BYTES)


class FamilyMeter:
    """The counters of one family's Services.

    The ledger is the looking thread's alone. What a sync does to counters it only puts in a queue, in
    this order: which chains it is about to write; what these have counted; that they are written. A
    look that reads such a chain in between finds it in the queue and leaves it out.
    """

    def __init__(
        self,
        family: IPFamily,
        counters: Counters,
        save: Callable[[], Tables],
        *,
        metrics: Metrics,
        namespaces: Collection[str] = (),
        wake: Callable[[], None] = lambda: None,
        release_memory: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Read *counters*; *save* gives all rules, from which the first look learns whose they are.

        *wake* is called when there is something for ``drain``, *release_memory* when much was read.
        """
        self._family = family
        self._counters = counters
        self._save = save
        self._metrics = metrics
        self._wake = wake
        self._release_memory = release_memory
        self._clock = clock
        self._queue: collections.deque[Callable[[], None]] = collections.deque()
        # Only the syncing thread's: the chains it has written, which therefore count from zero.
        self._own: set[str] = set()
        # Only the looking thread's; the other one asks which chains the index has, which never blocks.
        self._ledger = Ledger(namespaces)
        self._taken: Counter[Series] = Counter()

    def look(self) -> bool:
        """Read all counters, and take in what they have counted; return whether that was possible."""
        started = self._clock()
        ledger = self._ledger
        try:
            self.drain()
            ledger.begin()
            if not ledger.has_names:
                self._learn_names()
            counts = self._read(ledger.index.chains())
        except (OSError, IptablesError) as error:
            self._tell_failure(error)
            return False
        self.drain()
        self._taken += ledger.fold(counts)
        seconds = self._clock() - started
        self._metrics.traffic_look_duration.labels(self._family.value).observe(seconds)
        return True

    def drain(self) -> None:
        """Take in what syncs have done."""
        while self._queue:
            self._queue.popleft()()

    def take(self) -> tuple[Counter[Series], Counter[Series], dict[ServicePortName, int]]:
        """Return what was counted since this was last asked, where counters stand, and for whom."""
        taken, self._taken = self._taken, Counter()
        return taken, self._ledger.standing(), self._ledger.index.ports()

    @contextlib.contextmanager
    def writing(self, batch: plan.Batch) -> Iterator[None]:
        """Take what chains have counted before *batch*, which the block writes, begins them anew."""
        written = _written(batch)
        chains = written.counted
        self._queue.append(lambda: self._ledger.touch(chains))
        try:
            counts = self._read(self._counting(chains))
        except OSError as error:
            # What they have counted since the last look is lost; the rules come first.
            self._tell_failure(error)
        else:
            self._queue.append(lambda: self._take(counts))
        done: Written | None = None
        try:
            yield
            done = written
            self._own.update(chains)
            self._own.difference_update(*written.deleted.values())
        finally:
            self._queue.append(lambda: self._ledger.release(chains, done))
            self._wake()

    def _counting(self, chains: Collection[str]) -> dict[str, list[str]]:
        """Return those of *chains* that there are already, by table."""
        meters, found = self._ledger.index.meters, dict[str, list[str]]()
        for chain in chains:
            if chain in meters or chain in self._own:
                found.setdefault(traffic.table_of(chain), []).append(chain)
        return found

    def _take(self, counts: Counts) -> None:
        self._taken += self._ledger.take(counts)

    def _learn_names(self) -> None:
        tables = self._save()
        # What was written meanwhile is not in these.
        self.drain()
        self._ledger.index.learn(tables, but=self._ledger.touched)
        self._ledger.has_names = True
        del tables
        self._release_memory()

    def _read(self, chains: Mapping[str, Collection[str]]) -> Counts:
        counts: Counts = {}
        for table, names in chains.items():
            counts |= self._counters.read(table, names)
        return counts

    def _tell_failure(self, error: Exception) -> None:
        self._metrics.traffic_failures.labels(self._family.value).inc()
        log.info("traffic.look_failed", ip_family=self._family.value, error=str(error))


def _written(batch: plan.Batch) -> Written:
    tables: Tables = {}
    deleted: dict[str, tuple[str, ...]] = {}
    for section in batch.sections:
        if section.table in (rules.NAT, rules.FILTER):
            tables.setdefault(section.table, {}).update(section.write)
            deleted[section.table] = (*deleted.get(section.table, ()), *section.delete)
            for chain in section.delete:
                tables[section.table].pop(chain, None)
    return Written(tables, deleted)


class _Totals:
    """One family's boards, by metric."""

    def __init__(
        self,
        meter: FamilyMeter,
        room: int,
        detail: Detail,
        saved: Mapping[str, traffic_state.Board],
        family: IPFamily,
        flow_meter: FlowMeter | None,
    ) -> None:
        """Go on from what was *saved*, with the first update."""
        self.meter = meter
        self._family = family
        self._flow_meter = flow_meter
        self.boards: dict[str, Board[_Key]] = {
            metric: Board(room)
            for metric in _METRICS
            if (metric != ENDPOINT_CONNECTIONS or detail == "endpoint")
            and (metric not in _OF_FLOWS or flow_meter is not None)
        }
        self._saved = {metric: saved[metric] for metric in self.boards.keys() & saved.keys()}
        self._standing: dict[str, Counter[_Key]] = {}

    def update(self, now: float, shown: Container[ServiceName] | None) -> None:
        """Take what the meter has for the Services *shown* (None: all); *now* is in seconds."""
        taken, standing, ports = self.meter.take()
        boards = self.boards
        if self._flow_meter is not None and self._flow_meter.has_begun:
            taken_of_flows, standing_of_flows = self._flow_meter.take(self._family)
            taken, standing = taken + taken_of_flows, standing + standing_of_flows
        else:
            # What was saved of them is kept as it is until it is known what it goes on from.
            boards = {metric: board for metric, board in boards.items() if metric not in _OF_FLOWS}
        if shown is not None:
            taken, standing = _only(taken, shown), _only(standing, shown)
            ports = {port: number for port, number in ports.items() if _service(port) in shown}
        more = self._by_metric(taken)
        self._standing = self._by_metric(standing)
        for metric, board in boards.items():
            if metric in self._saved:
                saved = self._saved.pop(metric)
                standing_before = self._standing[metric] - more[metric]
                _resume(board, saved, standing_before, more[metric], now)
            board.add(more[metric], now)
            if metric in _OF_FLOWS:
                directions = (flows.TO_SERVICE, flows.FROM_SERVICE)
                board.keep({(port, direction) for port in ports for direction in directions})
            elif metric == CONNECTIONS:
                board.keep({(port, "") for port in ports})
            elif metric == REFUSED:
                refusing = {key for key in board.totals if key[0] in ports}
                board.keep(refusing | self._standing[metric].keys())
            else:
                board.keep(self._standing[metric].keys())

    def snapshot(self) -> dict[str, traffic_state.Board]:
        """Return what is to be saved."""
        return self._saved | {
            metric: traffic_state.Board(
                tuple(
                    traffic_state.Total(*key[0], key[1], total, self._standing[metric][key])
                    for key, total in board.totals.items()
                ),
                board.others,
            )
            for metric, board in self.boards.items()
            if metric not in self._saved
        }

    @staticmethod
    def _by_metric(counted: Counter[Series]) -> dict[str, Counter[_Key]]:
        found: dict[str, Counter[_Key]] = {metric: Counter() for metric in _METRICS}
        for series, amount in counted.items():
            if series.kind == "packets":
                found[PACKETS][series.port, series.detail] += amount
            elif series.kind == "bytes":
                found[BYTES][series.port, series.detail] += amount
            elif series.kind == "refused":
                found[REFUSED][series.port, series.detail] += amount
            else:
                found[CONNECTIONS][series.port, ""] += amount
                found[ENDPOINT_CONNECTIONS][series.port, series.detail] += amount
        return found


def _only(counted: Counter[Series], shown: Container[ServiceName]) -> Counter[Series]:
    return Counter(
        {series: amount for series, amount in counted.items() if _service(series.port) in shown}
    )


def _service(port: ServicePortName) -> ServiceName:
    return ServiceName(port.namespace, port.name)


def _resume(
    board: Board[_Key],
    saved: traffic_state.Board,
    standing: Counter[_Key],
    more: Counter[_Key],
    now: float,
) -> None:
    """Let *board* go on from *saved*, and add to *more* what was counted while nobody looked."""
    totals: dict[_Key, int] = {}
    for each in saved.totals:
        port = ServicePortName(each.namespace, each.service, each.port, each.protocol)
        key = (port, each.detail)
        totals[key] = each.total
        # Less than it was: chains were written meanwhile, and nobody knows what they had counted.
        more[key] += max(0, standing[key] - each.standing)
    board.resume(totals, saved.others, now)


class TrafficCollector(Collector):
    """Shows the totals of all families; looks first, if it is time."""

    def __init__(
        self,
        *,
        detail: Detail,
        max_series: int,
        state: traffic_state.StateFile,
        flow_meter: FlowMeter | None = None,
        choose: Callable[[], Container[ServiceName] | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        deadline_s: float = _DEADLINE_S,
    ) -> None:
        """Show packets and bytes as well if there is a *flow_meter*, which is another's to stop.

        Of all Services that are counted, those that *choose* returns at each look (None: not known
        yet, and nobody looks).
        """
        self._detail: Detail = detail
        self._max_series = max_series
        self._state = state
        self._flow_meter = flow_meter
        self._choose = choose
        self._clock = clock
        self._deadline_s = deadline_s
        self._families: dict[IPFamily, _Totals] = {}  # complete before start()
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._is_asked = False
        self._has_writes = False
        self._is_stopping = False
        self._answered_at = float("-inf")
        self._due_at = float("-inf")
        self._looked_at = float("-inf")
        self._shown: list[CounterMetricFamily] = []
        # Only the thread's: what this process, or else the last one, leaves to the next.
        self._kept = state.read().boards

    def add(self, family: IPFamily, meter: FamilyMeter) -> None:
        """Show what *meter*, which is to call ``wake``, counts as well. Before ``start``."""
        self._families[family] = _Totals(
            meter,
            self._max_series,
            self._detail,
            self._kept.get(family.value, {}),
            family,
            self._flow_meter,
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(_STOP_S)

    def wake(self) -> None:
        """Say that a meter has something to drain. Cheap; from any thread."""
        with self._changed:
            self._has_writes = True
            self._changed.notify_all()

    def collect(self) -> Iterator[CounterMetricFamily]:
        asked_at = self._clock()
        with self._changed:
            if asked_at >= self._due_at:
                self._is_asked = True
                self._changed.notify_all()
                self._changed.wait_for(
                    lambda: self._answered_at >= asked_at or self._is_stopping, self._deadline_s
                )
            is_stale = asked_at - self._looked_at > _STALE_S
            shown = [] if is_stale else self._shown
        yield from shown

    def describe(self) -> Iterator[CounterMetricFamily]:
        # Without this, registering would look.
        for name, (text, labels) in _METRICS.items():
            yield CounterMetricFamily(name, text, labels=[*_LABELS, *labels])

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_asked or self._has_writes or self._is_stopping
                )
                if self._is_stopping:
                    return
                is_asked, self._is_asked, self._has_writes = self._is_asked, False, False
            try:
                for totals in self._families.values():
                    totals.meter.drain()
                if is_asked:
                    self._look()
            except Exception:
                # Numbers are no reason to end: the rules are right without them.
                log.exception("traffic.failed")

    def _look(self) -> None:
        started = self._clock()
        shown = self._choose() if self._choose is not None else None
        looked: dict[IPFamily, _Totals] = {}
        if self._choose is None or shown is not None:
            if self._flow_meter is not None:
                self._flow_meter.look()
            # All, even if one fails: each has its own counters.
            looked = {
                family: totals for family, totals in self._families.items() if totals.meter.look()
            }
        for family, totals in looked.items():
            totals.update(self._clock(), shown)
            self._kept[family.value] = totals.snapshot()
        exposed = list(self._exposed())
        if looked:
            self._state.write(self._kept)
        with self._changed:
            self._answered_at = self._clock()
            took_s = self._answered_at - started
            self._due_at = started + max(_INTERVAL_S, took_s / _SHARE)
            if looked:
                self._looked_at = self._answered_at
            self._shown = exposed
            self._changed.notify_all()

    def _exposed(self) -> Iterator[CounterMetricFamily]:
        for name, (text, labels) in _METRICS.items():
            metric = CounterMetricFamily(name, text, labels=[*_LABELS, *labels])
            for family, totals in self._families.items():
                board = totals.boards.get(name)
                if board is None:
                    continue
                for (port, detail), total in board.totals.items():
                    metric.add_metric(_label_values(port, family, detail, labels), total)
                if board.others:
                    metric.add_metric(_label_values(OTHERS, family, "", labels), board.others)
            yield metric


def _label_values(
    port: ServicePortName, family: IPFamily, detail: str, labels: Collection[str]
) -> list[str]:
    protocol = "" if port is OTHERS else port.protocol
    values = [port.namespace, port.name, port.port, protocol, family.value]
    return [*values, detail] if labels else values
