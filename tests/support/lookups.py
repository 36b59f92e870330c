"""
A small walker through the shared chains: which Service's chain a packet comes to, past how many rules.

It understands no more than the rules there, and nothing of the tracer (``kubeproxy_py.explain``), which
can therefore be wrong without being believed.
"""

import functools
import ipaddress
import re
from typing import Final, NamedTuple

from kubeproxy_py import rules
from kubeproxy_py.dispatch import tree_depth
from kubeproxy_py.model import Chains, Protocol, Tables
from tests.support import fake_iptables

_COMMENT: Final = re.compile(r'-m comment --comment "[^"]*" ')
_DESTINATION: Final = re.compile(r"(! )?-d (\S+)")
_PROTOCOL: Final = re.compile(r"(?:^| )-p (\w+)")
_PORTS: Final = re.compile(r" --dport (\d+)(?::(\d+))?")


class Packet(NamedTuple):
    """What the rules of shared chains look at."""

    destination: str
    port: int
    protocol: Protocol = "tcp"
    is_local: bool = False  # the destination is an address of the node


class Lookup(NamedTuple):
    """What a packet found."""

    target: str | None  # a Service's chain, or REJECT or DROP; None: nothing is for it
    rules: int  # looked at
    chains: int  # entered


def look_up(tables: Tables, table: str, chain: str, packet: Packet) -> Lookup:
    """Walk *packet* through *chain* of *table* and the chains it shares with all Services."""
    target, passed, entered = _walk(tables[table], chain, packet)
    return Lookup(target, passed, entered)


def shared_rules(tables: Tables, table: str, chain: str) -> list[str]:
    """Return the rules of *chain* as if it were flat: those of its tree in the places of the jumps."""
    found: list[str] = []
    for rule in tables[table].get(chain, ()):
        to = fake_iptables.target(rule)
        if to is not None and tree_depth(to) is not None:
            found += shared_rules(tables, table, to)
        else:
            found.append(rule)
    return found


def _walk(chains: Chains, chain: str, packet: Packet) -> tuple[str | None, int, int]:
    passed, entered = 0, 1
    for text in chains[chain]:
        passed += 1
        rule = _parse(text)
        if not rule.takes(packet):
            continue
        if tree_depth(rule.target) is None and rule.target != rules.NODE_PORTS:
            return rule.target, passed, entered
        found, more_rules, more_chains = _walk(chains, rule.target, packet)
        passed, entered = passed + more_rules, entered + more_chains
        if found is not None:
            return found, passed, entered
    return None, passed, entered


class _Rule(NamedTuple):
    destinations: tuple[int, int] | None
    is_negated: bool
    protocol: str | None
    ports: tuple[int, int] | None
    needs_local: bool
    target: str

    def takes(self, packet: Packet) -> bool:
        if self.destinations is not None:
            first, last = self.destinations
            if (first <= _number(packet.destination) <= last) == self.is_negated:
                return False
        if self.protocol not in {None, packet.protocol}:
            return False
        if self.ports is not None and not self.ports[0] <= packet.port <= self.ports[1]:
            return False
        return packet.is_local or not self.needs_local


@functools.lru_cache(maxsize=1 << 17)
def _number(address: str) -> int:
    return int(ipaddress.ip_address(address))


@functools.lru_cache(maxsize=1 << 17)
def _parse(text: str) -> _Rule:
    bare = _COMMENT.sub("", text)
    destination, protocol, ports = (
        pattern.search(bare) for pattern in (_DESTINATION, _PROTOCOL, _PORTS)
    )
    network = ipaddress.ip_network(destination[2]) if destination else None
    target = fake_iptables.target(text)
    assert target is not None, f"cannot walk a rule without a target: {text}"
    return _Rule(
        (int(network[0]), int(network[-1])) if network else None,
        bool(destination and destination[1]),
        protocol[1] if protocol else None,
        (int(ports[1]), int(ports[2] or ports[1])) if ports else None,
        "--dst-type LOCAL" in bare,
        target,
    )
