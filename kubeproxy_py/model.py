"""
The vocabulary: what the daemon knows of the cluster, as immutable values.

Nothing here reads the world, logs or counts. Field names are Kubernetes' own words;
rules for how API objects become these records stand in ``records.py``.
"""

import enum
import socket
from typing import Literal, NamedTuple

import msgspec

Protocol = Literal["tcp", "udp", "sctp"]
Kind = Literal["Service", "EndpointSlice", "Node"]

#: Chain name -> rules, each a rule's text as iptables-save prints it, without "-A CHAIN ".
Chains = dict[str, tuple[str, ...]]
#: Table name -> chains.
Tables = dict[str, Chains]


class IPFamily(enum.Enum):
    """An IP family; the value is how Kubernetes spells it (addressType, ipFamilies, metric labels)."""

    V4 = "IPv4"
    V6 = "IPv6"

    @property
    def socket_family(self) -> socket.AddressFamily:
        """Return the kernel's number of it."""
        return socket.AF_INET if self is IPFamily.V4 else socket.AF_INET6


class ServiceName(NamedTuple):
    """The identity of a Service: its namespace and name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class PortKey(NamedTuple):
    """What joins a Service's port to EndpointSlice ports: name ("" if unnamed) and protocol."""

    name: str
    protocol: Protocol


class ServicePortName(NamedTuple):
    """The identity of one port of one Service."""

    namespace: str
    name: str
    port: str  # "" when the port has no name
    protocol: Protocol

    def __str__(self) -> str:
        # The protocol is not part of it: kube-proxy's comments and hashes rely on that.
        suffix = f":{self.port}" if self.port else ""
        return f"{self.namespace}/{self.name}{suffix}"


class ServicePort(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One port of one Service in one IP family, as the rules need it.

    Addresses and CIDRs are canonical text. Two equal records mean that nothing has to be synced.
    """

    name: ServicePortName
    cluster_ip: str
    port: int
    node_port: int = 0  # 0: none
    external_ips: tuple[str, ...] = ()
    lb_vips: tuple[str, ...] = ()
    source_ranges: tuple[str, ...] = ()  # empty: everybody may use the load balancer VIPs
    is_external_local: bool = False  # externalTrafficPolicy: Local, where it applies
    is_internal_local: bool = False  # internalTrafficPolicy: Local
    health_check_node_port: int = 0  # 0: none
    affinity_timeout_s: int | None = None  # None: no session affinity
    is_externally_accessible: bool = False  # has a node port, VIP or external IP, refused or not

    @property
    def uses_cluster_endpoints(self) -> bool:
        return not self.is_internal_local or self.is_externally_accessible

    @property
    def uses_local_endpoints(self) -> bool:
        return self.is_internal_local or (self.is_external_local and self.is_externally_accessible)


class Endpoint(msgspec.Struct, frozen=True, gc=False):
    """One endpoint of one ServicePort."""

    ip: str
    port: int
    is_local: bool = False
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    zone_hints: frozenset[str] = frozenset()
    node_hints: frozenset[str] = frozenset()

    @property
    def address(self) -> str:
        """``IP:port``, or ``[IP]:port`` for IPv6: sort key, DNAT target and part of chain hashes."""
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


class ServiceState(msgspec.Struct, frozen=True, gc=False):
    """All that one family's rules need of one Service.

    ``endpoints`` lists are sorted by ``Endpoint.address``, bytewise, without duplicates.
    """

    ports: dict[PortKey, ServicePort]
    endpoints: dict[PortKey, tuple[Endpoint, ...]]


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of this node that rules, health and start-up depend on."""

    name: str  # lower case
    ips: tuple[str, ...] = ()  # InternalIPs then ExternalIPs, in the order of status.addresses
    pod_cidrs: tuple[str, ...] = ()
    zone: str = ""  # label topology.kubernetes.io/zone
    is_eligible: bool = True  # neither being deleted nor tainted by the cluster autoscaler


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Something in an input that is left out, named so that a person finds it."""

    kind: str  # Service, EndpointSlice, Node, Pod, Endpoints, or "File"
    namespace: str = ""
    name: str = ""  # object's name, or the file's path
    field: str = ""  # e.g. spec.ports[1].port
    message: str

    def __str__(self) -> str:
        where = f"{self.namespace}/{self.name}" if self.namespace else self.name
        at = f" {self.field}:" if self.field else ""
        return f"{self.kind} {where!r}:{at} {self.message}"
