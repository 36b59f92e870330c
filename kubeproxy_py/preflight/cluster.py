"""
What is wrong, or worth knowing, between this host, the API server and the cluster's objects.

Pure: facts and configuration → findings. The daemon's own judgement is used where it has one: which
addresses are refused (``external``), which node ports collide (``node_ports``), what is doubtful
(``options.doubts``).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from kubeproxy_py import addresses, external, node_ports, options
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.errors import ConfigError
from kubeproxy_py.model import IPFamily, ServiceName
from kubeproxy_py.preflight.facts import ApiFacts, ClusterFacts, HostFacts
from kubeproxy_py.preflight.findings import Finding, Severity

# EndpointSlices became discovery.k8s.io/v1 in this release.
_OLDEST: Final = (1, 21)
_VERSION: Final = re.compile(r"v(\d+)\.(\d+)")
# Far above what the Date header (whole seconds) and a slow answer can make of equal clocks.
_SKEW_S: Final = 30.0
# What runs without; everything else that is asked for is needed.
_OPTIONAL: Final = frozenset({"create events"})


def judge_api(api: ApiFacts) -> Iterator[Finding]:
    """Yield whether the API server is there and lets us in."""
    if api.config_failure:
        yield Finding("api-config", "error", api.config_failure)
        return
    yield Finding("api-config", "ok", api.server)
    if api.failure:
        hint = (
            "; KUBERNETES_SERVICE_HOST is a cluster IP unless somebody has set it otherwise, and "
            "leads nowhere before a proxy runs"
            if api.is_in_cluster
            else ""
        )
        yield Finding("api-reachable", "error", api.failure + hint)
        return
    yield Finding("api-reachable", "ok", f"{api.server} answers")
    found = _VERSION.match(api.version)
    if found is None:
        yield Finding("api-version", "info", f"{api.version!r} is no version")
    else:
        is_old = (int(found[1]), int(found[2])) < _OLDEST
        yield Finding("api-version", "error" if is_old else "ok", api.version)
    yield from _permissions(api)
    yield from _clock(api)


def _permissions(api: ApiFacts) -> Iterator[Finding]:
    if api.permissions_failure:
        yield Finding("unchecked", "info", f"permissions: {api.permissions_failure}")
    missing = [what for what, is_allowed in api.permissions.items() if not is_allowed]
    needed = [what for what in missing if what not in _OPTIONAL]
    if needed:
        yield Finding("api-permissions", "error", f"not allowed: {', '.join(needed)}")
    if len(missing) > len(needed):
        yield Finding(
            "api-permissions", "warning", "not allowed: create events; nobody will see any"
        )
    if api.permissions and not missing:
        yield Finding("api-permissions", "ok", ", ".join(api.permissions))
    if api.listing_failure:
        yield Finding("api-reachable", "error", api.listing_failure)


def _clock(api: ApiFacts) -> Iterator[Finding]:
    ahead = api.clock_ahead_s
    if ahead is None:
        return
    if abs(ahead) < _SKEW_S:
        yield Finding("clock", "ok", f"within {_SKEW_S:.0f} s of the API server's")
    else:
        which = "ahead of" if ahead > 0 else "behind"
        yield Finding(
            "clock", "warning", f"the API server's is {abs(ahead):.0f} s {which} this host's"
        )


def judge_doubts(
    config: KubeProxyConfiguration,
    ips: options.NodeIPs,
    pod_cidrs: Sequence[str],
    families: Sequence[IPFamily],
) -> Iterator[Finding]:
    """Yield what `run` would warn of, or refuse to start with, on this node."""
    try:
        doubts = options.doubts(config, ips, pod_cidrs, families)
    except ConfigError as error:
        yield Finding("config", "error", str(error))
        return
    for text in doubts:
        if not config.node_port_addresses and text.startswith("nodePortAddresses"):
            # The default of nearly every cluster.
            yield Finding("node-port-addresses", "info", "unset: on all addresses of this host")
        else:
            yield Finding("config-doubts", "warning", text)
    if config.node_port_addresses:
        yield Finding("node-port-addresses", "ok", ", ".join(config.node_port_addresses))


def judge(
    cluster: ClusterFacts,
    host: HostFacts,
    api: ApiFacts | None,
    config: KubeProxyConfiguration,
    ips: options.NodeIPs,
) -> Iterator[Finding]:
    """Yield what the cluster's objects come to on this host."""
    yield from _node(cluster, host)
    yield from _cluster_cidr(cluster, host, config)
    yield from _objects(cluster)
    if api is not None:
        yield from _api_cluster_ip(cluster, api)
    yield from _external(cluster, api, ips)
    yield from _node_ports(cluster, host, config, ips)


def _node(cluster: ClusterFacts, host: HostFacts) -> Iterator[Finding]:
    name, node = cluster.node_name, cluster.node
    if node is None:
        severity: Severity = "info" if cluster.are_files else "error"
        yield Finding("node-object", severity, f"there is no Node {name!r}")
    elif not node.ips:
        yield Finding("node-object", "warning", f"Node {name!r} has no IPs")
    elif host.addresses and host.addresses.isdisjoint(node.ips):
        found = f"Node {name!r} has {', '.join(node.ips)}, none of which is on this host"
        yield Finding("node-object", "warning", found)
    else:
        yield Finding("node-object", "ok", f"{name}: {', '.join(node.ips)}")


def _cluster_cidr(
    cluster: ClusterFacts, host: HostFacts, config: KubeProxyConfiguration
) -> Iterator[Finding]:
    mode = config.detect_local_mode
    pods = cluster.node.pod_cidrs if cluster.node else ()
    if mode == "BridgeInterface":
        name = config.detect_local.bridge_interface
        is_there = name in host.interfaces
        found = f"bridge {name!r} is {'there' if is_there else 'not there'}"
        yield Finding("cluster-cidr", "ok" if is_there else "warning", found)
    elif mode == "InterfaceNamePrefix":
        prefix = config.detect_local.interface_name_prefix
        count = sum(name.startswith(prefix) for name in host.interfaces)
        found = f"{count} interfaces are called {prefix}..."
        # A node without pods has none.
        yield Finding("cluster-cidr", "ok" if count else "info", found)
    elif mode == "NodeCIDR":
        if pods:
            yield Finding("cluster-cidr", "ok", f"the Node's podCIDRs: {', '.join(pods)}")
        else:
            found = f"Node {cluster.node_name!r} has no podCIDRs, and the mode is NodeCIDR"
            yield Finding("cluster-cidr", "error", found)
    elif not config.cluster_cidrs:
        found = "clusterCIDR is not set: no traffic is known to come from pods"
        yield Finding("cluster-cidr", "warning", found)
    else:
        yield _within(config.cluster_cidrs, pods)


def _within(cluster_cidrs: Sequence[str], pods: Sequence[str]) -> Finding:
    wide = [cidr for text in cluster_cidrs if (cidr := addresses.parse_cidr(text.strip()))]
    families = {addresses.family_of(cidr) for cidr in wide}
    outside = [
        cidr
        for text in pods
        if (cidr := addresses.parse_cidr(text)) is not None
        and addresses.family_of(cidr) in families
        and not any(addresses.contains(other, cidr.partition("/")[0]) for other in wide)
    ]
    shown = ", ".join(wide)
    if outside:
        found = f"the Node's pods are in {', '.join(outside)}, outside of clusterCIDR {shown}"
        return Finding("cluster-cidr", "warning", found)
    return Finding("cluster-cidr", "ok", shown)


def _objects(cluster: ClusterFacts) -> Iterator[Finding]:
    topic = "manifests" if cluster.are_files else "objects"
    # On the command line somebody is here who can mend files; `render` and `plan` refuse them.
    severity: Severity = "error" if cluster.are_files else "warning"
    for problem in cluster.problems:
        yield Finding(topic, severity, str(problem))
    if not cluster.problems:
        services = {name for by_name in cluster.services.values() for name in by_name}
        yield Finding(topic, "ok", f"{len(services)} Services, nothing invalid")


def _api_cluster_ip(cluster: ClusterFacts, api: ApiFacts) -> Iterator[Finding]:
    owners = {
        port.cluster_ip: name
        for by_name in cluster.services.values()
        for name, state in by_name.items()
        for port in state.ports.values()
    }
    for address in api.addresses:
        if address.ip in owners:
            found = (
                f"{api.server} is {address.ip}, the cluster IP of Service '{owners[address.ip]}'"
            )
            yield Finding("api-cluster-ip", "error", found)
            return
    yield Finding("api-cluster-ip", "ok", f"{api.server} is no cluster IP")


def _external(
    cluster: ClusterFacts, api: ApiFacts | None, ips: options.NodeIPs
) -> Iterator[Finding]:
    for refusal in cluster.refusals:
        yield Finding("external-addresses", "warning", str(refusal))
    if not cluster.refusals:
        yield Finding("external-addresses", "ok", "none is refused")
    known = [ip for ip in ips.by_family.values() if not addresses.is_loopback(ip)]
    shadows = {
        shadow
        for by_name in cluster.services.values()
        for shadow in external.shadows(
            {name: state.ports for name, state in by_name.items()},
            node_ips=frozenset([*known, *(cluster.node.ips if cluster.node else ())]),
            api=api.addresses if api else (),
        )
    }
    for shadow in sorted(shadows, key=lambda found: (found.service, found.field, found.ip)):
        whose = "the Node's own" if shadow.doubt == "node_address" else "the API server's"
        # The first is practice on small clusters; the second may cut this host off.
        severity: Severity = "info" if shadow.doubt == "node_address" else "warning"
        found = f"Service '{shadow.service}': {shadow.field}: {shadow.ip} is {whose}"
        yield Finding("shadowed-addresses", severity, found)
    if not shadows:
        yield Finding("shadowed-addresses", "ok", "none")


def _node_ports(
    cluster: ClusterFacts, host: HostFacts, config: KubeProxyConfiguration, ips: options.NodeIPs
) -> Iterator[Finding]:
    cidrs = options.node_port_cidrs(config, ips)
    found: dict[tuple[object, int], node_ports.Collision] = {}
    for family, by_name in cluster.services.items():
        on_loopback = family is IPFamily.V4 and options.has_localhost_node_ports(config, cidrs)
        served = options.served_addresses(
            cidrs[family],
            [ip for ip in host.addresses if addresses.family_of(ip) is family],
            allows_loopback=on_loopback,
        )
        services: Mapping[ServiceName, node_ports.Ports] = {
            name: state.ports for name, state in by_name.items()
        }
        reach = node_ports.Reach(served, on_loopback)
        for collision in node_ports.collisions(services, host.listeners, family, reach):
            found[collision.port, collision.node_port] = collision
    for collision in sorted(found.values()):
        pid, program = host.owners.get(collision.inode, (0, ""))
        who = f"{program} (pid {pid})" if pid else "a process that cannot be seen"
        text = (
            f"node port {collision.node_port}/{collision.port.protocol.upper()} of Service "
            f"'{collision.port}': {who} listens on {collision.address}"
        )
        yield Finding("node-port-listeners", "warning", text)
    if not found:
        yield Finding("node-port-listeners", "ok", "nobody listens on a node port")


def node_ports_of(cluster: ClusterFacts) -> set[int]:
    """Return all node ports that Services have."""
    return {
        port.node_port
        for by_name in cluster.services.values()
        for state in by_name.values()
        for port in state.ports.values()
        if port.node_port
    }
