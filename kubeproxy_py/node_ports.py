"""
Which node ports take the traffic of a local process.

Pure. A node port is a rule, not a socket: the kernel rewrites the packet before it looks for who
listens. Whoever listens on that port of this host gets nothing any more, without an error anywhere.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

import msgspec

from kubeproxy_py import addresses
from kubeproxy_py.model import (
    IPFamily,
    PortKey,
    Protocol,
    ServiceName,
    ServicePort,
    ServicePortName,
)

_WILDCARDS: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared with, not bound to


Ports = Mapping[PortKey, ServicePort]


class Listener(NamedTuple):
    """A socket that takes what comes to a port."""

    protocol: Protocol
    family: IPFamily
    address: str
    port: int
    inode: int
    is_dual: bool = False  # an IPv6 wildcard that takes IPv4 as well

    def takes(self, family: IPFamily) -> bool:
        return family is self.family or self.is_dual


class Collision(msgspec.Struct, frozen=True, order=True):
    """A node port on which a local process listens, in vain."""

    port: ServicePortName
    node_port: int
    address: str
    inode: int


class Reach(NamedTuple):
    """On which of this host's addresses node ports of one family are served."""

    addresses: tuple[str, ...] | None  # None: on all but loopback
    loopback: bool  # with None: on loopback as well

    def hits(self, address: str) -> bool:
        if address in _WILDCARDS:
            return True
        if self.addresses is not None:
            return address in self.addresses
        return self.loopback or not addresses.is_loopback(address)


def collisions(
    services: Mapping[ServiceName, Ports],
    listeners: Iterable[Listener],
    family: IPFamily,
    reach: Reach,
) -> Iterator[Collision]:
    """Yield the node ports of one family that take what a local process waits for."""
    by_port: dict[tuple[Protocol, int], list[Listener]] = {}
    for listener in listeners:
        if listener.takes(family) and reach.hits(listener.address):
            by_port.setdefault((listener.protocol, listener.port), []).append(listener)
    for ports in services.values():
        for port in ports.values():
            # Several processes may share a port; one of them tells what it is about.
            for listener in by_port.get((port.name.protocol, port.node_port), ())[:1]:
                yield Collision(port.name, port.node_port, listener.address, listener.inode)
