"""
The address plan of all packet tests and of the demo, as data.

Nothing here touches a network. The plan follows the addresses that kube-proxy's own tests use, and
each IPv6 address repeats its IPv4 twin's digits, so that a failing test is read without a table.

    outside  203.0.113.2, .130           the world: clients that are no part of the cluster
       │ 203.0.113.1
    gateway ── routes Service, external and load balancer addresses to node, pod addresses to their node
       │ 192.168.0.1
       ├─────────────────────────────┐
    node 192.168.0.2, .3 (alternate)  node2 192.168.0.4
       │ cni0 10.180.1.1              │ cni0 10.180.2.1
    pod1.. 10.180.1.11..             remote1.. 10.180.2.11..
"""

import dataclasses
import ipaddress
from typing import Final

from kubeproxy_py.model import IPFamily

_FIRST_POD: Final = {IPFamily.V4: 11, IPFamily.V6: 0x11}  # so that both families print as 11
MAX_PODS: Final = 9  # a tenth would print as 20 in IPv4 and 1a in IPv6


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AddressPlan:
    """Who has which address, in one family. CIDRs are canonical text; addresses have no prefix."""

    family: IPFamily
    host_bits: int  # 32 or 128: the prefix length of a single address

    # Addresses that exist only in rules. All are routed to ``node``.
    service_cidr: str
    external_ip_cidr: str
    load_balancer_cidrs: tuple[str, ...]

    # The network that gateway and nodes share.
    node_cidr: str
    gateway: str
    node: str
    node_alternate: str  # a second address of node, on the same interface
    node2: str

    # The world behind the gateway.
    outside_cidr: str
    outside_gateway: str
    outside: str
    outside_blocked: str  # a second client, not inside outside_allowed_cidr
    outside_allowed_cidr: str  # for loadBalancerSourceRanges

    # Pods.
    cluster_cidr: str
    pod_cidr: str  # of node
    pod_gateway: str  # node's address on its bridge
    node2_pod_cidr: str
    node2_pod_gateway: str

    # Ready-made addresses for Services of tests.
    cluster_ip: str
    external_ip: str
    lb_vip: str
    loopback: str

    def local_pod(self, number: int) -> str:
        """Return the address of the pod *number* (from 1) on node."""
        return self._pod(self.pod_cidr, number)

    def remote_pod(self, number: int) -> str:
        """Return the address of the pod *number* (from 1) on node2."""
        return self._pod(self.node2_pod_cidr, number)

    def prefixed(self, address: str, cidr: str) -> str:
        """Return *address* with the prefix length of *cidr*, as ``ip address add`` takes it."""
        return f"{address}/{ipaddress.ip_network(cidr).prefixlen}"

    def _pod(self, cidr: str, number: int) -> str:
        if not 1 <= number <= MAX_PODS:
            raise ValueError(f"cannot number a pod {number}: 1 to {MAX_PODS} are planned")
        return str(ipaddress.ip_network(cidr)[_FIRST_POD[self.family] + number - 1])


V4: Final = AddressPlan(
    family=IPFamily.V4,
    host_bits=32,
    service_cidr="172.30.0.0/16",
    external_ip_cidr="192.168.99.0/24",
    load_balancer_cidrs=("1.2.3.0/24", "5.6.7.0/24"),
    node_cidr="192.168.0.0/24",
    gateway="192.168.0.1",
    node="192.168.0.2",
    node_alternate="192.168.0.3",
    node2="192.168.0.4",
    outside_cidr="203.0.113.0/24",
    outside_gateway="203.0.113.1",
    outside="203.0.113.2",
    outside_blocked="203.0.113.130",
    outside_allowed_cidr="203.0.113.0/25",
    cluster_cidr="10.180.0.0/16",
    pod_cidr="10.180.1.0/24",
    pod_gateway="10.180.1.1",
    node2_pod_cidr="10.180.2.0/24",
    node2_pod_gateway="10.180.2.1",
    cluster_ip="172.30.0.41",
    external_ip="192.168.99.22",
    lb_vip="1.2.3.4",
    loopback="127.0.0.1",
)

V6: Final = AddressPlan(
    family=IPFamily.V6,
    host_bits=128,
    service_cidr="fd00:172:30::/108",
    external_ip_cidr="fd00:192:168:99::/64",
    load_balancer_cidrs=("fd00:1:2:3::/64", "fd00:5:6:7::/64"),
    node_cidr="fd00:192:168::/64",
    gateway="fd00:192:168::1",
    node="fd00:192:168::2",
    node_alternate="fd00:192:168::3",
    node2="fd00:192:168::4",
    outside_cidr="fd00:203:0:113::/64",
    outside_gateway="fd00:203:0:113::1",
    outside="fd00:203:0:113::2",
    outside_blocked="fd00:203:0:113:8000::130",
    outside_allowed_cidr="fd00:203:0:113::/65",
    cluster_cidr="fd00:10:180::/56",
    pod_cidr="fd00:10:180:1::/64",
    pod_gateway="fd00:10:180:1::1",
    node2_pod_cidr="fd00:10:180:2::/64",
    node2_pod_gateway="fd00:10:180:2::1",
    cluster_ip="fd00:172:30::41",
    external_ip="fd00:192:168:99::22",
    lb_vip="fd00:1:2:3::4",
    loopback="::1",
)

PLANS: Final = {IPFamily.V4: V4, IPFamily.V6: V6}
