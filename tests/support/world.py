"""A Syncer with all that is around it, on a fake kernel, and what it did to that."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import msgspec
import pytest

from kubeproxy_py import conntrack
from kubeproxy_py.errors import IptablesError
from kubeproxy_py.iptables import chains
from kubeproxy_py.iptables.plan import Batch
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily, ServiceName, Tables
from kubeproxy_py.rules import Layout
from kubeproxy_py.ruleset import HealthCheck, Ruleset
from kubeproxy_py.store import Store
from kubeproxy_py.sync import Effects, Syncer
from kubeproxy_py.sync_log import SyncResult
from tests.support import states
from tests.support.fake_iptables import FakeIptables

V4 = IPFamily.V4
OPTIONS = states.golden_options(V4)
Json = dict[str, Any]


class World:
    """One family's Syncer."""

    def __init__(
        self,
        metrics: Metrics,
        kernel: FakeIptables | None = None,
        *,
        max_batch_rules: int | None = None,
        layout: Layout = "flat",
    ) -> None:
        self.metrics = metrics
        self.kernel = kernel or FakeIptables()
        self.now = 0.0
        self.prepared = 0
        self.health_checks: list[dict[ServiceName, HealthCheck]] = []
        self.frontends: list[conntrack.Frontends] = []
        self.quarantined: list[tuple[ServiceName, str]] = []
        self.released = 0
        self.beats = 0
        #: How many batches were surrounded by what reads their chains' counters.
        self.surrounded = 0
        self.node_port_addresses: tuple[str, ...] | None = None
        self.nudged = 0
        self.store = Store(
            node_name="node1",
            families=[V4],
            metrics=metrics,
            report=lambda problem: None,
            changed=self._nudge,
            node_changed=lambda node: None,
            clock=lambda: 0.0,
        )
        self.ruleset = Ruleset(msgspec.structs.replace(OPTIONS, layout=layout))
        self.syncer = Syncer(
            V4,
            store=self.store,
            ruleset=self.ruleset,
            kernel=self.kernel,
            max_batch_rules=max_batch_rules,
            effects=Effects(
                node_port_addresses=lambda: self.node_port_addresses,
                prepare=self._prepare,
                publish_health_checks=self.health_checks.append,
                clean_conntrack=lambda build: self.frontends.append(build()),
                report_quarantined=lambda name, reason: self.quarantined.append((name, reason)),
                release_memory=self._release,
                beat=self._beat,
                writing=self._writing,
            ),
            metrics=metrics,
            clock=lambda: self.now,
            wall_clock=lambda: 100.0,
        )

    def _nudge(self, _family: IPFamily) -> None:
        self.nudged += 1

    def _prepare(self) -> None:
        self.prepared += 1

    def _beat(self) -> None:
        self.beats += 1

    def _writing(self, _batch: Batch) -> AbstractContextManager[None]:
        self.surrounded += 1
        return contextlib.nullcontext()

    def _release(self) -> None:
        self.released += 1

    def put(self, *items: Json) -> None:
        for item in items:
            self.store.upsert(item["kind"], states.decode(item))

    def listed(self, *items: Json) -> None:
        """List all objects there are, which takes every kind."""
        for kind in ("Node", "Service", "EndpointSlice"):
            self.store.replace(
                kind,
                [states.decode(item) for item in items if item["kind"] == kind],
            )

    def sync(self) -> SyncResult | None:
        return self.syncer.sync()

    def fail(self, error: IptablesError, **options: Any) -> None:
        """Sync once, with the kernel failing, also when it is asked again after a look at it."""
        for _ in range(2):
            self.kernel.fail_restore(error, **options)
        with pytest.raises(type(error)):
            self.sync()
        self.kernel.fail_no_more()

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(
            f"kubeproxy_{name}", {"ip_family": "IPv4", **labels}
        )

    def own(self) -> Tables:
        return own(self.kernel.tables)


def own(tables: Tables) -> Tables:
    """Return the chains that are ours."""
    return {
        table: {chain: texts for chain, texts in by_name.items() if chains.is_ours(table, chain)}
        for table, by_name in tables.items()
    }


def desired(*items: Json) -> Tables:
    """Return the chains that *items* need, built from nothing."""
    ruleset = Ruleset(OPTIONS)
    ruleset.apply(states.service_states(items, V4))
    return own(ruleset.tables)
