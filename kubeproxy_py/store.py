"""
The only mutable cluster state: API objects in, changed Services out, per IP family.

It must not know what rules are made of it. The invariant it guards: what ``take`` has handed out so
far, one over the other, is what the objects put in so far mean; a change is handed out at least once
after it was put in, and nothing is handed out before Services and EndpointSlices were listed completely.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final

import msgspec

from kubeproxy_py import external, objects, records, snapshot
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import (
    IPFamily,
    Kind,
    Node,
    PortKey,
    Problem,
    ServiceName,
    ServicePort,
    ServiceState,
)

Report = Callable[[Problem], None]

# How many Services are put together while the lock is held: less than a millisecond's work, so that
# a sync or a watch never waits for whoever wants to read all of them.
_STATES_AT_ONCE: Final = 50
# Of a Service, kept until its changes are taken, which may be never where a family cannot be written.
# More slices than that are more than 10,000 endpoints.
_MAX_TRIGGERS: Final = 100
# Names that changed and that no Service has (any more), likewise: a megabyte of them.
_MAX_STRAYS: Final = 10_000


_SAFETY_ALONE: Final = external.Policy()


def _say_nothing(_refusal: external.Refusal) -> None:
    pass


class Changes(msgspec.Struct, frozen=True):
    """What changed for one family since the last time; None: the Service is gone."""

    services: dict[ServiceName, ServiceState | None]
    #: All there is, so that what is not in ``services`` is gone.
    is_everything: bool
    zone: str
    #: Unix times at which the changes in it were triggered, for the programming latency.
    trigger_times: tuple[float, ...]
    #: Endpoints of a UDP port changed: stale conntrack entries may exist.
    has_udp: bool
    #: From a state file, because the API has not been heard yet.
    is_restored: bool = False


class _Family:
    """One family's half of the store."""

    def __init__(self, policy: external.Policy) -> None:
        self.ports: dict[ServiceName, dict[PortKey, ServicePort]] = {}
        self.exposure = external.Exposure(policy)
        self.slices: dict[ServiceName, dict[str, records.SliceRecord]] = {}
        self.dirty: dict[ServiceName, None] = {}
        self.dirty_services = 0
        self.triggers: dict[ServiceName, list[float]] = {}
        self.has_udp = False
        # The first taking is always of everything.
        self.is_everything_due = True

    def state(self, name: ServiceName) -> ServiceState | None:
        ports = self.ports.get(name)
        if ports is None:
            return None
        slices = self.slices.get(name, {})
        return ServiceState(
            self.exposure.admit(name, ports),
            records.merge_slices([slices[key] for key in sorted(slices)]),
        )

    def peek(self, name: ServiceName) -> ServiceState | None:
        """Return what was handed out of *name*, or will be, without judging addresses anew."""
        ports = self.ports.get(name)
        if ports is None:
            return None
        slices = self.slices.get(name, {})
        return ServiceState(
            self.exposure.without_refused(name, ports),
            records.merge_slices([slices[key] for key in sorted(slices)]),
        )

    def mark(self, name: ServiceName) -> None:
        """Let *name* be handed out; everything, where too many names would have to be remembered."""
        if self.is_everything_due:
            return
        self.dirty[name] = None
        if len(self.dirty) > len(self.ports) + _MAX_STRAYS:
            self.demand_everything()

    def demand_everything(self) -> None:
        """Let everything be handed out."""
        self.is_everything_due = True
        self.dirty = {}

    def put_ports(self, name: ServiceName, ports: dict[PortKey, ServicePort] | None) -> None:
        # Others may have claimed what is, or was, this one's cluster IP.
        for other in self.exposure.replace(name, self.ports.get(name), ports):
            self.mark(other)
        if ports is None:
            del self.ports[name]
            self.exposure.forget(name)
        else:
            self.ports[name] = ports
        self.mark(name)

    def judge_api(self) -> None:
        """Let those who claim an API server's address be judged by where these are now."""
        found = frozenset(
            external.ApiAddress(ep.ip, ep.port)
            for record in self.slices.get(external.API_SERVICE, {}).values()
            for endpoints in record.endpoints.values()
            for ep in endpoints
        )
        for other in self.exposure.replace_api(found):
            self.mark(other)


class Store:
    """Objects in, immutable changes out. All methods may be called from any thread."""

    def __init__(
        self,
        *,
        node_name: str,
        families: Collection[IPFamily],
        metrics: Metrics,
        report: Report,
        changed: Callable[[IPFamily], None],
        node_changed: Callable[[Node], None],
        policy: external.Policy = _SAFETY_ALONE,
        refused: Callable[[external.Refusal], None] = _say_nothing,
        selects: Callable[[Mapping[str, str]], bool] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Call *changed* when a family has something to sync, outside the lock.

        *refused* is called, outside the lock as well, with each external address that *policy* came
        to keep out of what is handed out. *selects* is asked about the labels of each Service.
        """
        self._node_name = node_name
        self._metrics = metrics
        self._report = report
        self._changed = changed
        self._node_changed = node_changed
        self._refused = refused
        self._selects = selects
        # Changes triggered before this process looked are nobody's latency.
        self._started = clock()

        self._lock = threading.Lock()
        # Guarded by the lock:
        self._families = {family: _Family(policy) for family in families}
        self._selected: set[ServiceName] = set()
        self._slice_owners: dict[tuple[str, str], tuple[IPFamily, ServiceName]] = {}
        self._listed: set[Kind] = set()
        self._node: Node | None = None
        self._zone = ""
        # Stands in until Services and EndpointSlices have been listed; never mixed with what is.
        self._restored: snapshot.Snapshot | None = None

    # In ------------------------------------------------------------------------------------------

    def replace(self, kind: Kind, objects: Iterable[objects.Object]) -> None:
        """Take *objects*, which are at hand, as all there are of *kind*."""
        seen = set()
        for obj in objects:
            seen.add((obj.metadata.namespace, obj.metadata.name))
            self.upsert(kind, obj)
        with self._lock:
            known: Iterable[tuple[str, str]]
            if kind == "Service":
                known = {name for family in self._families.values() for name in family.ports}
            else:
                known = self._slice_owners if kind == "EndpointSlice" else ()
            gone = [key for key in known if tuple(key) not in seen]
        for namespace, name in gone:
            self.delete(kind, namespace, name)
        self.listed(kind)

    def listed(self, kind: Kind) -> None:
        """Take note that all objects of *kind* there are have now been given."""
        with self._lock:
            was_synced = self._is_synced()
            self._listed.add(kind)
            if self._is_synced():
                self._restored = None
            families = tuple(self._families) if self._is_synced() and not was_synced else ()
        self._notify(families)

    def restore(self, last: snapshot.Snapshot) -> bool:
        """Let *last* stand in for what has not been listed; False: everything has been by now."""
        with self._lock:
            if self._is_synced():
                return False
            self._restored = last
            families = tuple(self._families)
        self._upsert_node(last.state.node, is_restored=True)
        self._notify(families)
        return True

    def upsert(self, kind: Kind, obj: objects.Object) -> None:  # noqa: ARG002 - the Sink's signature
        """Add *obj* or put it in the place of its predecessor."""
        if isinstance(obj, objects.Service):
            self._upsert_service(obj)
        elif isinstance(obj, objects.EndpointSlice):
            self._upsert_slice(obj)
        elif obj.metadata.name == self._node_name:
            self._upsert_node(records.node_record(obj))

    def delete(self, kind: Kind, namespace: str, name: str) -> None:
        """Remove the object; one that is not known is no error."""
        if kind == "Service":
            with self._lock:
                self._selected.discard(ServiceName(namespace, name))
            self._put_service(records.ServiceRecord(ServiceName(namespace, name), {}))
        elif kind == "EndpointSlice":
            self._put_slice((namespace, name), None)
        # A Node that is deleted keeps its last verdict, as kube-proxy's does: the process will be
        # gone before the rules could matter, and if not, the API was wrong.

    def _upsert_service(self, service: objects.Service) -> None:
        record = records.service_record(service)
        for problem in record.problems:
            self._report(problem)
        if self._selects is not None:
            # Of all labels, this is what is kept.
            is_selected = self._selects(service.metadata.labels or {})
            with self._lock:
                (self._selected.add if is_selected else self._selected.discard)(record.name)
        self._put_service(record)

    def _put_service(self, record: records.ServiceRecord) -> None:
        nudged = []
        with self._lock:
            for family, half in self._families.items():
                self._metrics.service_changes.inc()
                ports = record.ports.get(family)
                if ports == half.ports.get(record.name):
                    continue
                half.put_ports(record.name, ports)
                half.dirty_services += 1
                self._metrics.service_changes_pending.set(half.dirty_services)
                nudged.append(family)
            if not self._is_synced():
                nudged = []
        self._notify(nudged)

    def _upsert_slice(self, eps: objects.EndpointSlice) -> None:
        record, problems = records.slice_record(eps, node_name=self._node_name)
        for problem in problems:
            self._report(problem)
        if record is not None and record.family not in self._families:
            record = None
        self._put_slice((eps.metadata.namespace, eps.metadata.name), record)

    def _put_slice(self, key: tuple[str, str], record: records.SliceRecord | None) -> None:
        nudged: set[IPFamily] = set()
        with self._lock:
            owner = self._slice_owners.get(key)
            if owner is None and record is None:
                return
            self._metrics.endpoint_changes.inc()
            if owner is not None and (record is None or owner != (record.family, record.service)):
                # Gone, or it has been given to another Service: that one must not keep it.
                family, service = owner
                self._drop_slice(family, service, key)
                nudged.add(family)
            if record is not None:
                half = self._families[record.family]
                slices = half.slices.setdefault(record.service, {})
                old = slices.get(key[1])
                if old != record:
                    slices[key[1]] = record
                    self._slice_owners[key] = (record.family, record.service)
                    self._mark_endpoints(half, record.service, old, record)
                    nudged.add(record.family)
            if nudged:
                self._metrics.endpoint_changes_pending.inc()
            if not self._is_synced():
                nudged.clear()
        self._notify(nudged)

    def _drop_slice(self, family: IPFamily, service: ServiceName, key: tuple[str, str]) -> None:
        half = self._families[family]
        slices = half.slices[service]
        old = slices.pop(key[1])
        if not slices:
            del half.slices[service]
        del self._slice_owners[key]
        # A slice that is deleted tells no time: when its Service's endpoints went is not known.
        half.triggers.pop(service, None)
        self._mark_endpoints(half, service, old, None)

    def _mark_endpoints(
        self,
        half: _Family,
        service: ServiceName,
        old: records.SliceRecord | None,
        new: records.SliceRecord | None,
    ) -> None:
        half.mark(service)
        if service == external.API_SERVICE:
            half.judge_api()
        half.has_udp = half.has_udp or any(
            record is not None and record.has_udp for record in (old, new)
        )
        if new is not None and new.trigger_time is not None and new.trigger_time > self._started:
            times = half.triggers.setdefault(service, [])
            if len(times) < _MAX_TRIGGERS:
                times.append(new.trigger_time)

    def _upsert_node(self, node: Node, *, is_restored: bool = False) -> None:
        with self._lock:
            # What the API server has told is newer than any file, even that there is none, and also
            # while it has not told everything.
            is_told = self._node is not None or "Node" in self._listed
            if node == self._node or (is_restored and is_told):
                return
            self._node = node
            families: tuple[IPFamily, ...] = ()
            if node.zone != self._zone:
                self._zone = node.zone
                families = tuple(self._families)
                for half in self._families.values():
                    half.demand_everything()
        self._node_changed(node)
        self._notify(families)

    def _notify(self, families: Iterable[IPFamily]) -> None:
        for family in families:
            self._changed(family)

    # Out -----------------------------------------------------------------------------------------

    @property
    def is_synced(self) -> bool:
        """Tell whether Services and EndpointSlices have both been listed completely."""
        with self._lock:
            return self._is_synced()

    @property
    def families(self) -> tuple[IPFamily, ...]:
        return tuple(self._families)

    def has_listed(self, kind: Kind) -> bool:
        """Tell whether *kind* has been listed completely."""
        with self._lock:
            return kind in self._listed

    def _is_synced(self) -> bool:
        return {"Service", "EndpointSlice"} <= self._listed

    @property
    def node(self) -> Node | None:
        """Return the own Node, or None as long as it was never seen."""
        with self._lock:
            return self._node

    @property
    def restored_at(self) -> float | None:
        """Return when (Unix time) the state that stands in was current; None: there is none."""
        with self._lock:
            return None if self._restored is None else self._restored.saved_at

    def take_restored(self, family: IPFamily) -> Changes | None:
        """Hand out the state that stands in, as everything there is; None: there is none."""
        with self._lock:
            if self._restored is None:
                return None
            services = self._restored.state.services.get(family, {})
            return Changes(
                services={**services},
                is_everything=True,
                zone=self._zone,
                trigger_times=(),
                has_udp=False,
                is_restored=True,
            )

    def demand_everything(self, family: IPFamily) -> None:
        """Let the next taking be of everything, whether it changed or not."""
        with self._lock:
            self._families[family].demand_everything()

    def names(self, family: IPFamily) -> list[ServiceName]:
        """Return the names of all Services of *family*."""
        with self._lock:
            return list(self._families[family].ports)

    def settled(
        self, family: IPFamily, names: Iterable[ServiceName]
    ) -> dict[ServiceName, ServiceState | None]:
        """Return those of *names* of which everything was handed out; None: the Service is gone."""
        with self._lock:
            half = self._families[family]
            if half.is_everything_due:
                return {}
            return {name: half.peek(name) for name in names if name not in half.dirty}

    def states(self, family: IPFamily) -> Iterator[ServiceState]:
        """Yield all Services of *family*; others may change some meanwhile, so each is true by itself."""
        with self._lock:
            names = sorted(self._families[family].ports)
        for first in range(0, len(names), _STATES_AT_ONCE):
            with self._lock:
                half = self._families[family]
                found = [half.peek(name) for name in names[first : first + _STATES_AT_ONCE]]
            yield from (state for state in found if state is not None)

    def take(self, family: IPFamily) -> Changes | None:
        """Hand out what changed since the last time; None before everything was listed."""
        with self._lock:
            if not self._is_synced():
                return None
            half = self._families[family]
            names = half.ports if half.is_everything_due else half.dirty
            changes = Changes(
                {name: half.state(name) for name in names},
                half.is_everything_due,
                self._zone,
                tuple(time for times in half.triggers.values() for time in times),
                half.has_udp,
            )
            half.dirty = {}
            half.dirty_services = 0
            half.triggers = {}
            half.has_udp = False
            half.is_everything_due = False
            self._metrics.service_changes_pending.set(0)
            self._metrics.endpoint_changes_pending.set(0)
            refused = half.exposure.take_news()
            for reason, count in half.exposure.services_by_reason().items():
                self._metrics.shadowing_services.labels(family.value, reason).set(count)
        for refusal in refused:
            self._refused(refusal)
        return changes

    def selected(self) -> frozenset[ServiceName] | None:
        """Return the Services that *selects* has chosen by their labels; None: not all are listed."""
        with self._lock:
            return frozenset(self._selected) if self._is_synced() else None

    def refusals(self) -> tuple[external.Refusal, ...]:
        """Return the external addresses that are kept out of what was handed out, sorted."""
        with self._lock:
            return tuple(
                refusal
                for half in self._families.values()
                for _, refusals in sorted(half.exposure.refusals.items())
                for refusal in refusals
            )

    def service_ports(self, family: IPFamily) -> dict[ServiceName, dict[PortKey, ServicePort]]:
        """Return the ports of all Services, as they were handed out or will be."""
        with self._lock:
            half = self._families[family]
            return {
                name: half.exposure.without_refused(name, ports)
                for name, ports in half.ports.items()
            }
