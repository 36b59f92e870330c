"""
What counts connections to Services, put together as ``--traffic-metrics`` asks.

Counting is for people: where the kernel does not tell of connections, rules are counted without them,
and where nothing is asked for, nothing here is built.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec
import structlog

from kubeproxy_py import flow_meter, host, traffic_meter, traffic_state
from kubeproxy_py.flags import Traffic
from kubeproxy_py.iptables import counters, runner
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily
from kubeproxy_py.store import Store

log = structlog.get_logger()


class TrafficCounting(msgspec.Struct, frozen=True, kw_only=True):
    """A meter for each family, one for the flows of all, and what shows their totals; all running."""

    meters: Mapping[IPFamily, traffic_meter.FamilyMeter]
    collector: traffic_meter.TrafficCollector
    #: None: packets and bytes of connections are not counted.
    flow_meter: flow_meter.FlowMeter | None

    def outdate(self) -> None:
        """Say that Services may have changed. Cheap; from any thread."""
        if self.flow_meter is not None:
            self.flow_meter.outdate()

    def stop(self) -> None:
        """End the threads; the collector leaves its totals on disk."""
        self.collector.stop()
        if self.flow_meter is not None:
            self.flow_meter.stop()


def start(
    asked: Traffic,
    kernels: Mapping[IPFamily, runner.Iptables],
    store: Store,
    metrics: Metrics,
    *,
    has_accounting: bool,
) -> TrafficCounting:
    """
    Begin to count, and show totals on the registry of *metrics*.

    Args:
        asked: what is counted, and how finely it is shown.
        kernels: whose rules are counted.
        store: knows the Services.
        metrics: how looks go.
        has_accounting: the kernel counts packets and bytes of each connection.
    """
    flows = _start_flow_meter(kernels, store, metrics, asked.namespaces) if has_accounting else None
    collector = traffic_meter.TrafficCollector(
        detail=asked.detail,
        max_series=asked.max_series,
        state=traffic_state.StateFile(Path(asked.state_file) if asked.state_file else None),
        flow_meter=flows,
        choose=store.selected if asked.selects else None,
    )
    meters = {
        family: traffic_meter.FamilyMeter(
            family,
            counters.of(kernel.backend, family),
            kernel.save,
            metrics=metrics,
            namespaces=asked.namespaces,
            wake=collector.wake,
            release_memory=host.release_memory,
        )
        for family, kernel in kernels.items()
    }
    for family, meter in meters.items():
        collector.add(family, meter)
    metrics.registry.register(collector)
    collector.start()
    return TrafficCounting(meters=meters, collector=collector, flow_meter=flows)


def _start_flow_meter(
    families: Collection[IPFamily], store: Store, metrics: Metrics, namespaces: Collection[str]
) -> flow_meter.FlowMeter | None:
    meter = flow_meter.FlowMeter(
        lambda family: [
            port for ports in store.service_ports(family).values() for port in ports.values()
        ],
        host.addresses_of,
        families=tuple(families),
        metrics=metrics,
        is_ready=lambda: store.is_synced,
        namespaces=namespaces,
    )
    try:
        meter.start()
    except OSError as error:
        log.warning("traffic.flows_unavailable", error=str(error))
        return None
    return meter
