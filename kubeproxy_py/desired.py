"""
Objects from files or the API and stated facts → the rules a node would have, without a daemon.

What ``render`` and ``plan`` share. The same store, options and ruleset as in the daemon, filled once.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

import kubeproxy_py
from kubeproxy_py import api, manifests, objects, options, records, watch
from kubeproxy_py.errors import ApiUnavailable
from kubeproxy_py.flags import HostFacts, Settings
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily, Node, Problem
from kubeproxy_py.ruleset import Ruleset
from kubeproxy_py.store import Store

# A list of 10,000 Services takes a second or two; a minute is a server that does not answer.
_LIST_LIMIT_S: Final = 60.0


def load(settings: Settings, node_name: str, report: Callable[[Problem], None]) -> Store:
    """Fill a store once, for all families, from files or the API server.

    Raises:
        ConfigError: a path cannot be read, or no API server is named.
        ApiUnavailable: the API server did not list everything in time.
    """
    store = Store(
        node_name=node_name,
        families=tuple(IPFamily),
        metrics=Metrics(CollectorRegistry()),
        report=report,
        changed=lambda _family: None,
        node_changed=lambda _node: None,
        policy=options.external_policy(settings.config, settings.external_ips_allow),
    )
    if settings.manifests:
        _load_files(settings, store, report)
    else:
        _load_from_api(settings, store, node_name, report)
    return store


def _load_files(settings: Settings, store: Store, report: Callable[[Problem], None]) -> None:
    loaded = manifests.load([Path(path) for path in settings.manifests])
    for problem in loaded.problems:
        report(problem)
    for kind, found in loaded.objects.items():
        store.replace(kind, found)


def _load_from_api(
    settings: Settings, store: Store, node_name: str, report: Callable[[Problem], None]
) -> None:
    """List with the daemon's own watchers, and stop them when they have listed."""
    counted = Metrics(CollectorRegistry())
    connection = api.connect(
        kubeconfig=settings.config.client_connection.kubeconfig,
        master=settings.master,
        user_agent=f"kubeproxy-py/{kubeproxy_py.__version__}",
        metrics=counted,
    )
    stop = threading.Event()
    threads = [
        threading.Thread(
            target=watch.Watcher(
                kind, connection, store, report, counted, stop=stop, node_name=node_name
            ).run,
            daemon=True,
        )
        for kind in objects.TYPES
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _LIST_LIMIT_S
    is_complete = False
    while not is_complete and time.monotonic() < deadline:
        stop.wait(0.01)
        is_complete = all(store.has_listed(kind) for kind in objects.TYPES)
    stop.set()
    connection.close()
    for thread in threads:
        thread.join(1.0)
    if not is_complete:
        raise ApiUnavailable(
            f"cannot list objects from {connection.server} within {_LIST_LIMIT_S:.0f} s"
        )


def build(
    settings: Settings, store: Store, facts: HostFacts, node_name: str, family: IPFamily
) -> Ruleset:
    """Build all rules of *family*. What is not stated is taken from the Node object, if there is one."""
    node = store.node
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
        options.rules_options(
            settings.config,
            family,
            known,
            node_port_addresses=served,
            layout=settings.dispatch,
        )
    )
    changes = store.take(family)
    assert changes is not None
    states = {name: state for name, state in changes.services.items() if state is not None}
    ruleset.apply(states)
    return ruleset


def _zone(labels: Mapping[str, str], node: Node | None) -> str:
    if records.ZONE_LABEL in labels:
        return labels[records.ZONE_LABEL]
    return node.zone if node else ""


def _local_addresses(facts: HostFacts, ips: options.NodeIPs, family: IPFamily) -> Sequence[str]:
    """Return the stated addresses; without any, the node's own are the best guess."""
    stated = [cidr.partition("/")[0] for _, cidr in facts.interface_addresses]
    return stated or [ips.by_family[family]]
