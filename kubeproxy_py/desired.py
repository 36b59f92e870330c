"""
Objects from files and stated facts → the rules a node would have, without a daemon.

What ``render`` and ``plan`` share. The same store, options and ruleset as in the daemon, filled once.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry

from kubeproxy_py import config, manifests, options, records
from kubeproxy_py.flags import HostFacts, Settings
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily, Node, Problem
from kubeproxy_py.ruleset import Ruleset
from kubeproxy_py.store import Store


def load(
    settings: Settings, node_name: str, report: Callable[[Problem], None]
) -> tuple[Store, Node | None]:
    """Read the manifests into a store; return it and the own Node, if there is one.

    Raises ConfigError if a path cannot be read.
    """
    loaded = manifests.load([Path(path) for path in settings.manifests])
    for problem in loaded.problems:
        report(problem)
    store = Store(
        node_name=node_name,
        families=tuple(IPFamily),
        metrics=Metrics(CollectorRegistry()),
        report=report,
        changed=lambda _family: None,
        node_changed=lambda _node: None,
        allow_external_ips=config.allows_service_external_ips(settings.config),
    )
    for kind, found in loaded.objects.items():
        store.replace(kind, found)
    return store, store.node


def build(
    settings: Settings,
    facts: HostFacts,
    node_name: str,
    family: IPFamily,
    report: Callable[[Problem], None],
) -> Ruleset:
    """Build all rules of *family*. What is not stated is taken from the Node object, if there is one."""
    store, node = load(settings, node_name, report)
    ips = options.node_ips(
        settings.config.bind_address, facts.node_ips or (node.ips if node else ())
    )
    zone = _zone(facts.topology_labels, node)
    known = options.Facts(
        node_name=node_name,
        node_ips=ips,
        zone=zone,
        pod_cidrs=node.pod_cidrs if node else (),
        has_nfacct=facts.nfacct,
        has_random_fully=facts.random_fully,
        conntrack_is_liberal=facts.conntrack_tcp_be_liberal
        or settings.config.conntrack.tcp_be_liberal,
    )
    cidrs = options.node_port_cidrs(settings.config, ips)
    allows_loopback = family is IPFamily.V4 and options.has_localhost_node_ports(
        settings.config, cidrs
    )
    served = options.served_addresses(
        cidrs[family], _local_addresses(facts, ips, family), allows_loopback=allows_loopback
    )
    ruleset = Ruleset(
        options.rules_options(settings.config, family, known, node_port_addresses=served)
    )
    changes = store.take(family)
    assert changes is not None
    states = {name: state for name, state in changes.services.items() if state is not None}
    ruleset.apply(states)
    if ruleset.is_large:
        large = options.with_scale(ruleset.options, is_large=True)
        ruleset.rebuild(large, states)
    return ruleset


def _zone(labels: Mapping[str, str], node: Node | None) -> str:
    if records.ZONE_LABEL in labels:
        return labels[records.ZONE_LABEL]
    return node.zone if node else ""


def _local_addresses(facts: HostFacts, ips: options.NodeIPs, family: IPFamily) -> Sequence[str]:
    """Return the stated addresses; without any, the node's own are the best guess."""
    stated = [cidr.partition("/")[0] for _, cidr in facts.interface_addresses]
    return stated or [ips.by_family[family]]
