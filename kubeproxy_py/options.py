"""
Configuration and facts of the node → what the rules of each family depend on.

Pure: the facts are passed in, whether they were learned from this host and the API or given on a
command line. Raises ConfigError for a configuration that cannot work on this node.
"""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from kubeproxy_py import addresses, external, rules
from kubeproxy_py.config import KubeProxyConfiguration, allows_service_external_ips
from kubeproxy_py.errors import ConfigError
from kubeproxy_py.model import IPFamily

PRIMARY: Final = "primary"
_LOOPBACK: Final = {IPFamily.V4: "127.0.0.1", IPFamily.V6: "::1"}
# What the kernel accepts as an interface's name, less what would need quoting in a rule.
_INTERFACE: Final = re.compile(r"[^\s/\"'\\!+]{1,15}", re.ASCII)
_MAX_PREFIX: Final = 14


class NodeIPs(msgspec.Struct, frozen=True):
    """This node's addresses as kube-proxy understands them: one a family, one family first."""

    primary: IPFamily
    by_family: dict[IPFamily, str]

    @property
    def is_known(self) -> bool:
        """Tell whether the primary address is more than the loopback of last resort."""
        return not addresses.is_loopback(self.by_family[self.primary])


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of this node beside the configuration."""

    node_name: str
    node_ips: NodeIPs
    zone: str = ""
    pod_cidrs: tuple[str, ...] = ()
    has_nfacct: bool = False
    has_random_fully: bool = True
    lacks: frozenset[str] = frozenset()
    conntrack_is_liberal: bool = False


def node_ips(bind_address: str, ips: Sequence[str]) -> NodeIPs:
    """Choose the node's addresses from the Node's *ips* and the configured bind address."""
    by_family = dict(_LOOPBACK)
    primary = IPFamily.V4
    if ips:
        primary = addresses.family_of(ips[0])
        for ip in reversed(ips):
            by_family[addresses.family_of(ip)] = ip
    bound = addresses.parse_ip(bind_address)
    if bound is not None and not ipaddress.ip_address(bound).is_unspecified:
        primary = addresses.family_of(bound)
        by_family[primary] = bound
    return NodeIPs(primary, by_family)


def node_port_cidrs(
    config: KubeProxyConfiguration, ips: NodeIPs
) -> dict[IPFamily, tuple[str, ...] | None]:
    """Return where node ports are served, by family; None: on all local addresses.

    ``primary`` is the node's own address; a family in which that is not known is served everywhere.
    """
    listed = _listed_node_port_cidrs(config, ips)
    result: dict[IPFamily, tuple[str, ...] | None] = {}
    for family in IPFamily:
        cidrs = tuple(cidr for cidr in listed if addresses.family_of(cidr) is family)
        is_everywhere = not cidrs or any(map(addresses.is_zero_cidr, cidrs))
        result[family] = None if is_everywhere else cidrs
    return result


def _listed_node_port_cidrs(config: KubeProxyConfiguration, ips: NodeIPs) -> list[str]:
    """Return nodePortAddresses with ``primary`` resolved; empty if that is not known."""
    listed: list[str] = []
    for text in config.node_port_addresses:
        if text == PRIMARY:
            listed += [
                f"{ip}/{addresses.HOST_PREFIX[family]}"
                for family, ip in ips.by_family.items()
                if not addresses.is_loopback(ip)
            ]
        elif (cidr := addresses.parse_cidr(text)) is not None:
            listed.append(cidr)
    return listed


def served_addresses(
    cidrs: tuple[str, ...] | None, local: Sequence[str], *, allows_loopback: bool
) -> tuple[str, ...] | None:
    """Return which *local* addresses have node ports; None: all, by the kernel's judgement.

    IPv6 has no route_localnet, so its loopback can never have them; callers pass False for it.
    """
    if cidrs is None:
        return None
    return tuple(
        sorted(
            {
                ip
                for ip in local
                if any(addresses.contains(cidr, ip) for cidr in cidrs)
                and (allows_loopback or not addresses.is_loopback(ip))
            }
        )
    )


def local_detector(
    config: KubeProxyConfiguration, family: IPFamily, pod_cidrs: Sequence[str]
) -> rules.LocalDetector | None:
    """Return how traffic of local pods is recognised, or None if it cannot be in this family."""
    mode = config.detect_local_mode
    if mode in {"BridgeInterface", "InterfaceNamePrefix"}:
        is_prefix = mode == "InterfaceNamePrefix"
        detect = config.detect_local
        name = detect.interface_name_prefix if is_prefix else detect.bridge_interface
        # The plus sign counts: iptables refuses more than 15 characters with it.
        if not _INTERFACE.fullmatch(name) or (is_prefix and len(name) > _MAX_PREFIX):
            field = "interfaceNamePrefix" if is_prefix else "bridgeInterface"
            raise ConfigError(f"cannot use detectLocal.{field} {name!r}: no interface is called so")
        return rules.LocalDetector("-i", f"{name}+" if is_prefix else name)
    cidrs = pod_cidrs if mode == "NodeCIDR" else config.cluster_cidrs
    for text in cidrs:
        cidr = addresses.parse_cidr(text.strip())
        if cidr is not None and addresses.family_of(cidr) is family:
            return rules.LocalDetector("-s", cidr)
    return None


def external_policy(config: KubeProxyConfiguration, allowed: tuple[str, ...]) -> external.Policy:
    """Return which external addresses of Services are served: of *allowed* CIDRs, if there are any."""
    return external.Policy(allows_external_ips=allows_service_external_ips(config), allowed=allowed)


def has_localhost_node_ports(
    config: KubeProxyConfiguration, cidrs: Mapping[IPFamily, tuple[str, ...] | None]
) -> bool:
    """Tell whether node ports are served on IPv4 loopback: configured, and among the addresses."""
    v4 = cidrs[IPFamily.V4]
    return config.iptables.localhost_node_ports and (
        v4 is None
        or any(
            addresses.is_loopback(cidr.partition("/")[0]) or addresses.contains(cidr, "127.0.0.0")
            for cidr in v4
        )
    )


def rules_options(
    config: KubeProxyConfiguration,
    family: IPFamily,
    facts: Facts,
    *,
    node_port_addresses: tuple[str, ...] | None,
    layout: rules.Layout = "flat",
) -> rules.Options:
    """Put together all that the rules of *family* depend on."""
    cidrs = node_port_cidrs(config, facts.node_ips)
    return rules.Options(
        family=family,
        node_name=facts.node_name,
        zone=facts.zone,
        node_ip=facts.node_ips.by_family[family],
        local_detector=local_detector(config, family, facts.pod_cidrs),
        masquerade_all=config.iptables.masquerade_all,
        masquerade_bit=config.iptables.masquerade_bit,
        has_random_fully=facts.has_random_fully,
        localhost_node_ports=family is IPFamily.V4 and has_localhost_node_ports(config, cidrs),
        has_nfacct=facts.has_nfacct,
        lacks=facts.lacks,
        drops_invalid=not facts.conntrack_is_liberal,
        node_port_addresses=node_port_addresses,
        layout=layout,
    )


def doubts(
    config: KubeProxyConfiguration,
    ips: NodeIPs,
    pod_cidrs: Sequence[str],
    families: Sequence[IPFamily],
) -> list[str]:
    """Return what is incomplete or suspicious in a configuration that works all the same.

    Raises ConfigError for what kube-proxy refuses to start with.
    """
    said: list[str] = []
    primary = ips.primary
    other = IPFamily.V6 if primary is IPFamily.V4 else IPFamily.V4
    is_dual = len(families) > 1
    # As resolved: "primary" on a node whose IP is not known comes to no restriction at all.
    node_port_families = _families(_listed_node_port_cidrs(config, ips))
    cluster, pods = _families(config.cluster_cidrs), _families(pod_cidrs)
    if not node_port_families:
        said.append(
            "nodePortAddresses is unset; NodePort connections will be accepted on all local IPs. "
            "Consider using `--nodeport-addresses primary`"
        )
    elif node_port_families == {primary} and any(len(found) > 1 for found in (cluster, pods)):
        said.append(
            "cluster appears to be dual-stack but nodePortAddresses contains only "
            f"{primary.value} addresses; NodePort connections will be accepted on all local "
            f"{other.value} IPs"
        )
    elif primary not in node_port_families:
        said.append(
            f"cluster appears to be {primary.value}-primary but nodePortAddresses contains only "
            f"{other.value} addresses; NodePort connections will be accepted on all local "
            f"{primary.value} IPs"
        )
    kind = f"{primary.value}-primary" if is_dual else f"{primary.value}-only"
    for found, name, mode in (
        (cluster, "clusterCIDRs", "ClusterCIDR"),
        (pods, "node.spec.podCIDRs", "NodeCIDR"),
    ):
        if found != {other}:
            continue
        text = f"cluster is {kind} but {name} contains only {other.value} addresses"
        is_fatal = config.detect_local_mode == mode and (mode == "NodeCIDR" or not is_dual)
        if is_fatal:
            raise ConfigError(f"kube-proxy configuration is incorrect: {text}")
        said.append(text)
    if not is_dual:
        for name, text in (
            ("healthzBindAddress", config.healthz_bind_address),
            ("metricsBindAddress", config.metrics_bind_address),
        ):
            ip = addresses.parse_ip(text.rpartition(":")[0].strip("[]"))
            if (
                ip is not None
                and addresses.family_of(ip) is other
                and (not ipaddress.ip_address(ip).is_unspecified)
            ):
                said.append(f"cluster is {kind} but {name} is {other.value}")
    return said


def _families(cidrs: Sequence[str]) -> set[IPFamily]:
    parsed = (addresses.parse_cidr(text.strip()) for text in cidrs)
    return {addresses.family_of(cidr) for cidr in parsed if cidr is not None}
