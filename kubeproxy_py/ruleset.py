"""
The desired state of one family: the union of all ServicePorts' Fragments and the fixed chains.

Pure, and a fold: whatever the order of changes, the result is what building from nothing gives
(tests/unit/test_ruleset.py). A change of k Services costs k Fragments and the shared chains they
have entries in. The chains touched since the last sync are remembered for the planner.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import msgspec

from kubeproxy_py import dispatch, rules, urgency
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.model import PortKey, ServiceName, ServicePortName, ServiceState, Tables

_TABLES: Final = (rules.FILTER, rules.NAT, rules.MANGLE)


class HealthCheck(msgspec.Struct, frozen=True):
    """What a Service's health check node port answers."""

    port: int
    #: Distinct IPs of ready endpoints on this node, over all ports of the Service.
    local_endpoints: int


class _Service(msgspec.Struct, frozen=True, gc=False):
    """What is kept of a Service. Its rules are where they are used: in tables and dispatch."""

    state: ServiceState | None = None
    #: The names of its own chains, in the order in which they were built.
    chains: tuple[str, ...] = ()
    #: How many of its ports lack endpoints here for internal and external traffic.
    lacking: tuple[int, int] = (0, 0)
    health_check: HealthCheck | None = None


_NO_SERVICE: Final = _Service()


class Ruleset:
    """Desired chains, by table."""

    def __init__(self, options: rules.Options) -> None:
        self.options = options
        #: Everything we want to be there, including chains without rules.
        self.tables: Tables = {table: {} for table in _TABLES}
        #: Chains that changed since ``take_touched``, by table: pairs would be as many objects more.
        self._touched: dict[str, set[str]] = {table: set() for table in _TABLES}
        self._services: dict[ServiceName, _Service] = {}
        self._dispatch = dispatch.Dispatch(options.family, options.layout)
        self._rule_counts: dict[str, int] = dict.fromkeys(_TABLES, 0)
        self._endpoints = 0
        self._lacking = (0, 0)
        self._health_checks: dict[ServiceName, HealthCheck] = {}
        self._udp: dict[ServiceName, ServiceState] = {}
        self._apply_options()
        self._apply_dispatch()

    # Changing ------------------------------------------------------------------------------------

    def apply(self, states: Mapping[ServiceName, ServiceState | None]) -> None:
        """Let *states* be what is known of these Services; None: gone.

        Where the cluster becomes a large one by it, or is one no more, all Services are built anew:
        what rules say of endpoints must not depend on history.
        """
        self._endpoints += sum(
            _endpoint_count(state) - _endpoint_count(self.state(name))
            for name, state in states.items()
        )
        # Before anything is built, so that nothing is built twice.
        is_large = self._endpoints > rules.LARGE_CLUSTER_ENDPOINTS
        if is_large != self.options.is_large:
            self.options = msgspec.structs.replace(self.options, is_large=is_large)
            states = {**self.states(), **states}
        for name, state in states.items():
            self._replace(name, state)
        self._apply_dispatch()

    def rebuild(self, options: rules.Options, states: Mapping[ServiceName, ServiceState]) -> None:
        """Let *options* hold, and *states* be all Services there are.

        Whether the cluster is a large one follows from *states*, whatever *options* say.
        """
        self.options = msgspec.structs.replace(options, is_large=self.options.is_large)
        self._apply_options()
        gone = dict.fromkeys(name for name in self._services if name not in states)
        self.apply({**gone, **states})

    def set_node_port_addresses(self, addresses: tuple[str, ...]) -> None:
        """Let node ports be served on these local addresses."""
        self.options = msgspec.structs.replace(self.options, node_port_addresses=addresses)
        self._dispatch.set_tail(rules.node_port_jumps(self.options))
        self._apply_dispatch()

    def _apply_options(self) -> None:
        for table, chains in rules.fixed_chains(self.options).items():
            for chain, texts in chains.items():
                self._set(table, chain, texts)
        self._dispatch.set_tail(rules.node_port_jumps(self.options))

    def _apply_dispatch(self) -> None:
        for chain, texts in self._dispatch.take_changed().items():
            if texts is not None:
                self._set(*chain, texts)
            else:
                self._drop(*chain)

    def _replace(self, name: ServiceName, state: ServiceState | None) -> None:
        old = self._services.get(name, _NO_SERVICE)
        fragments = {} if state is None else self._build(state)
        chains = {
            chain: texts
            for fragment in fragments.values()
            for chain, texts in fragment.chains.items()
        }
        new = _NO_SERVICE
        if state is not None:
            # Names that were known are kept as they are, so that each is in memory once.
            known = {chain: chain for chain in old.chains}
            new = self._services[name] = _Service(
                state,
                tuple(known.get(chain, chain) for chain in chains) if known else tuple(chains),
                (
                    sum(fragment.lacks_internal for fragment in fragments.values()),
                    sum(fragment.lacks_external for fragment in fragments.values()),
                ),
                _health_check(state),
            )
        else:
            self._services.pop(name, None)
        if new.health_check is not None:
            self._health_checks[name] = new.health_check
        else:
            self._health_checks.pop(name, None)
        if state is not None and any(key.protocol == "udp" for key in state.ports):
            self._udp[name] = state
        else:
            self._udp.pop(name, None)
        internal, external = (
            total + now - was
            for total, now, was in zip(self._lacking, new.lacking, old.lacking, strict=True)
        )
        self._lacking = (internal, external)
        for chain in old.chains:
            if chain not in chains:
                self._drop(rules.NAT, chain)
        for chain in new.chains:
            self._set(rules.NAT, chain, chains[chain])
        for key, fragment in fragments.items():
            self._dispatch.replace(_port_name(name, key), fragment.entries)
        for key in () if old.state is None else old.state.ports:
            if key not in fragments:
                self._dispatch.replace(_port_name(name, key), ())

    def _build(self, state: ServiceState) -> dict[PortKey, rules.Fragment]:
        return {
            key: rules.build(port, state.endpoints.get(key, ()), self.options)
            for key, port in state.ports.items()
        }

    def _set(self, table: str, chain: str, texts: tuple[str, ...]) -> None:
        chains = self.tables[table]
        old = chains.get(chain)
        if old != texts:
            chains[chain] = texts
            self._rule_counts[table] += len(texts) - len(old or ())
            self._touched[table].add(chain)

    def _drop(self, table: str, chain: str) -> None:
        # A tree's chain may have come and gone between two looks.
        old = self.tables[table].pop(chain, ())
        self._rule_counts[table] -= len(old)
        self._touched[table].add(chain)

    # Asking --------------------------------------------------------------------------------------

    def take_touched(self) -> frozenset[ChainId]:
        """Return the chains that changed, or went, since this was last called."""
        touched = frozenset(
            ChainId(table, chain) for table, chains in self._touched.items() for chain in chains
        )
        for chains in self._touched.values():
            chains.clear()
        return touched

    def groups(self, names: Iterable[ServiceName] | None = None) -> Iterator[tuple[str, ...]]:
        """Yield the nat chains of each Service (of *names*, or all), the most important first.

        Chains of one group refer to each other and therefore change in one batch.
        """
        wanted = self._services if names is None else [n for n in names if n in self._services]

        def rank(name: ServiceName) -> tuple[bool, ServiceName]:
            return not urgency.is_essential(name, self.state(name)), name

        for name in sorted(wanted, key=rank):
            yield self._services[name].chains

    def state(self, name: ServiceName) -> ServiceState | None:
        """Return the state that *name* has rules for; None: it has none."""
        return self._services.get(name, _NO_SERVICE).state

    def states(self) -> dict[ServiceName, ServiceState | None]:
        """Return the states of all Services that have rules, or could have some."""
        return {name: service.state for name, service in self._services.items()}

    def names(self) -> Iterable[ServiceName]:
        """Return the Services that have rules, or could have some."""
        return self._services.keys()

    def holds(self, name: ServiceName, state: ServiceState | None) -> bool:
        """Tell whether what is there of *name* is what building *state* from nothing gives."""
        known = self._services.get(name, _NO_SERVICE)
        if state is None or known.state != state:
            return state is None and known is _NO_SERVICE
        fragments = self._build(state).values()
        wanted = {
            chain: texts for fragment in fragments for chain, texts in fragment.chains.items()
        }
        nat = self.tables[rules.NAT]
        return (
            known.chains == tuple(wanted)
            and all(nat.get(chain) == texts for chain, texts in wanted.items())
            and all(
                self._dispatch.leads_to(entry, self.tables)
                for fragment in fragments
                for entry in fragment.entries
            )
        )

    def owner(self, chain: str, rule: str) -> ServiceName | None:
        """Return whose *rule* in *chain* is, or None if it is nobody's in particular.

        Looks through all there is: it is asked for what the kernel refused, which is rare.
        """
        for name, service in self._services.items():
            if chain in service.chains:
                return name
        port = self._dispatch.owner(rule)
        return None if port is None else ServiceName(port.namespace, port.name)

    def owners(self) -> dict[str, ServiceName]:
        """Return whose each nat chain of a Service's own is."""
        return {chain: name for name, service in self._services.items() for chain in service.chains}

    @property
    def is_large(self) -> bool:
        """Tell whether kube-proxy would call this a large cluster."""
        return self.options.is_large

    @property
    def service_count(self) -> int:
        return len(self._services)

    @property
    def endpoint_count(self) -> int:
        """Endpoints, counted once for every ServicePort that has them."""
        return self._endpoints

    def rule_count(self, table: str) -> int:
        """Return how many rules of ours *table* has, without the jumps from built-in chains."""
        return self._rule_counts[table]

    def trees(self) -> tuple[ChainId, ...]:
        """Return the shared chains that are trees of chains now."""
        return self._dispatch.trees()

    def lacking_local(self) -> tuple[int, int]:
        """Count ServicePorts whose (internal, external) Local policy finds no endpoint here."""
        return self._lacking

    def health_checks(self) -> dict[ServiceName, HealthCheck]:
        """Return the health checks of the Services that have a node port for them."""
        return dict(self._health_checks)

    def udp_services(self) -> list[ServiceState]:
        """Return the Services that have a UDP port, for conntrack."""
        return list(self._udp.values())


def _endpoint_count(state: ServiceState | None) -> int:
    """Count endpoints, once for every ServicePort that has them."""
    if state is None:
        return 0
    return sum(len(state.endpoints.get(key, ())) for key in state.ports)


def _health_check(state: ServiceState) -> HealthCheck | None:
    port = max((port.health_check_node_port for port in state.ports.values()), default=0)
    if not port:
        return None
    local_ready = {
        ep.ip
        for endpoints in state.endpoints.values()
        for ep in endpoints
        if ep.is_local and ep.ready
    }
    return HealthCheck(port, len(local_ready))


def _port_name(name: ServiceName, key: PortKey) -> ServicePortName:
    return ServicePortName(name.namespace, name.name, key.name, key.protocol)
