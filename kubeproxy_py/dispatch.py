"""
Dispatch entries of all ServicePorts → the chains they share.

Pure. Flat: each shared chain holds the entries of all ServicePorts one after the other, as kube-proxy
writes them. A layout is told what changed and answers which chains have other rules now; that is all
the rest of the program knows of it.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from kubeproxy_py import rules
from kubeproxy_py.model import ServicePortName


class ChainId(NamedTuple):
    """A chain in a table."""

    table: str
    chain: str


NAT_SERVICES: Final = ChainId(rules.NAT, rules.SERVICES)

#: The chains shared by all ServicePorts; they exist also when they are empty.
SHARED: Final = (
    ChainId(rules.FILTER, rules.SERVICES),
    ChainId(rules.FILTER, rules.EXTERNAL_SERVICES),
    ChainId(rules.FILTER, rules.NODE_PORTS),
    ChainId(rules.FILTER, rules.PROXY_FIREWALL),
    NAT_SERVICES,
    ChainId(rules.NAT, rules.NODE_PORTS),
)


class FlatDispatch:
    """kube-proxy's layout: one chain, one rule after the other, sorted by ServicePort."""

    def __init__(self) -> None:
        self._tail: tuple[str, ...] = ()
        self._rules: dict[ChainId, dict[ServicePortName, tuple[str, ...]]] = {
            chain: {} for chain in SHARED
        }
        self._changed: set[ChainId] = set(SHARED)

    def set_tail(self, tail: tuple[str, ...]) -> None:
        """Let *tail*, the node-port jumps, be the last rules of nat KUBE-SERVICES."""
        if tail != self._tail:
            self._tail = tail
            self._changed.add(NAT_SERVICES)

    def replace(self, name: ServicePortName, entries: Sequence[rules.Entry]) -> None:
        """Let *entries* be all there is of *name*; none removes it."""
        for chain, by_port in self._rules.items():
            wanted = tuple(entry.rule for entry in entries if entry[:2] == chain)
            if wanted == by_port.get(name, ()):
                continue
            if wanted:
                by_port[name] = wanted
            else:
                del by_port[name]
            self._changed.add(chain)

    def take_changed(self) -> dict[ChainId, tuple[str, ...]]:
        """Return the rules of every chain that changed since this was last called."""
        changed = {chain: self._compose(chain) for chain in sorted(self._changed)}
        self._changed = set()
        return changed

    def _compose(self, chain: ChainId) -> tuple[str, ...]:
        by_port = self._rules[chain]
        composed = [rule for name in sorted(by_port) for rule in by_port[name]]
        if chain == NAT_SERVICES:
            composed += self._tail
        return tuple(composed)
