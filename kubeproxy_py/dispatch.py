"""
Dispatch entries of all ServicePorts → the chains they share.

Pure. Where a chain has few entries, or ``--dispatch=flat`` asks for it, they stand one after the other
as kube-proxy writes them. Where it has many, they become a tree of chains (``trees``): every packet
passes KUBE-SERVICES, also those that go to no Service, and must not pay for ten thousand of them.

The rest of the program is told which chains have other rules now, and knows nothing else of it.
"""

import base64
import functools
import hashlib
import ipaddress
import re
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from kubeproxy_py import addresses, rules, trees
from kubeproxy_py.model import Chains, IPFamily, Protocol, ServicePortName, Tables


class ChainId(NamedTuple):
    """A chain in a table."""

    table: str
    chain: str


NAT_SERVICES: Final = ChainId(rules.NAT, rules.SERVICES)

# What the names of a tree's chains begin with. In nat these are prefixes of kube-proxy's own: should
# it take this node over, it knows such chains for stale ones and deletes them. Chains that it left
# behind would go on referring to Services' chains, and the kernel would refuse to delete those.
# KUBE-SVL is free for the look-up of addresses: whoever counts KUBE-SVC- chains counts Services.
_PREFIXES: Final = {
    ChainId(rules.FILTER, rules.SERVICES): "KUBE-SVL",
    ChainId(rules.FILTER, rules.EXTERNAL_SERVICES): "KUBE-EXT",
    ChainId(rules.FILTER, rules.NODE_PORTS): "KUBE-SVL",
    ChainId(rules.FILTER, rules.PROXY_FIREWALL): "KUBE-FW",
    NAT_SERVICES: "KUBE-SVL",
    ChainId(rules.NAT, rules.NODE_PORTS): "KUBE-EXT",
}
#: The chains shared by all ServicePorts; they exist also when they are empty.
SHARED: Final = tuple(_PREFIXES)

# A chain with so few entries stays as flat as kube-proxy's: there, a tree saves a packet half a
# microsecond (docs/performance.md), and people find their way in a flat chain more easily.
_SPLIT_ABOVE: Final = 64
# A tree becomes flat again only well below, so that one Service more or less does not matter; from here
# down it saves nothing.
_JOIN_BELOW: Final = 32

_TREE_CHAIN: Final = re.compile(
    r"KUBE-(?:SVC|SVL|EXT|FW)-"
    r"(?:\d+\.\d+\.\d+\.\d+|6-[A-Z2-7]{12}|NP-(?:tcp|udp|sctp)-\d+)-(\d+)"
)
_PROTOCOLS: Final[tuple[Protocol, ...]] = ("tcp", "udp", "sctp")
_ADDRESS_BITS: Final = {family: addresses.HOST_PREFIX[family] for family in IPFamily}
# Four bits for the protocol, because a rule can match on ports only together with one.
_PORT_BITS: Final = 4 + 16


def tree_depth(chain: str) -> int | None:
    """Return how long a prefix a tree's chain answers for; None for the name of any other chain."""
    found = _TREE_CHAIN.fullmatch(chain)
    return int(found.group(1)) if found else None


class Dispatch:
    """The shared chains of one family."""

    def __init__(self, family: IPFamily, layout: rules.Layout = "flat") -> None:
        self._tail: tuple[str, ...] = ()
        self._shared = {
            chain: _Shared(chain.chain, prefix, family, layout)
            for chain, prefix in _PREFIXES.items()
        }
        self._changed: set[ChainId] = set(SHARED)

    def set_tail(self, tail: tuple[str, ...]) -> None:
        """Let *tail*, the node-port jumps, be the last rules of nat KUBE-SERVICES."""
        if tail != self._tail:
            self._tail = tail
            self._changed.add(NAT_SERVICES)

    def replace(self, name: ServicePortName, entries: Sequence[rules.Entry]) -> None:
        """Let *entries* be all there is of *name*; none removes it."""
        by_chain: dict[tuple[str, str], list[rules.Entry]] = {}
        for entry in entries:
            by_chain.setdefault((entry.table, entry.chain), []).append(entry)
        for chain, shared in self._shared.items():
            # Most have an entry in one of these chains, and no more.
            if chain not in by_chain and name not in shared.entries:
                continue
            if shared.replace(name, tuple(by_chain.get(chain, ()))):
                self._changed.add(chain)

    def owner(self, rule: str) -> ServicePortName | None:
        """Return whose *rule* this is, or None. Looks through all there is."""
        for shared in self._shared.values():
            for name, entries in shared.entries.items():
                if any(entry.rule == rule for entry in entries):
                    return name
        return None

    def leads_to(self, entry: rules.Entry, tables: Tables) -> bool:
        """Tell whether *tables* have the rule of *entry* where its packets come by."""
        chain = ChainId(*entry[:2])
        return self._shared[chain].leads_to(entry, tables.get(chain.table, {}))

    def take_changed(self) -> dict[ChainId, tuple[str, ...] | None]:
        """Return the rules of every chain that changed since this was last called; None: gone."""
        changed: dict[ChainId, tuple[str, ...] | None] = {}
        for chain in sorted(self._changed):
            for name, texts in self._shared[chain].take_changed():
                changed[ChainId(chain.table, name)] = texts
            if chain == NAT_SERVICES:
                changed[chain] = (*(changed[chain] or ()), *self._tail)
        self._changed = set()
        return changed

    def trees(self) -> tuple[ChainId, ...]:
        """Return the shared chains that are trees now."""
        return tuple(chain for chain, shared in self._shared.items() if shared.is_split)


class _Shared:
    """One shared chain, flat or as a tree."""

    def __init__(self, name: str, prefix: str, family: IPFamily, layout: rules.Layout) -> None:
        self._name = name
        self._layout = layout
        self._family = family
        #: What each ServicePort that has something here wants to have here.
        self.entries: dict[ServicePortName, tuple[rules.Entry, ...]] = {}
        self._count = 0
        self.is_split = layout == "tree"
        self._by_address = trees.Tree(
            _ADDRESS_BITS[family], functools.partial(_address_jump, prefix, family)
        )
        self._by_port = trees.Tree(_PORT_BITS, functools.partial(_port_jump, prefix))
        self._spellings = (
            (self._by_address, functools.partial(_address_chain, prefix, family)),
            (self._by_port, functools.partial(_port_chain, prefix)),
        )

    def replace(self, name: ServicePortName, entries: tuple[rules.Entry, ...]) -> bool:
        """Return whether this changed anything."""
        old = self.entries.get(name, ())
        if old == entries:
            return False
        if entries:
            self.entries[name] = entries
        else:
            del self.entries[name]
        self._count += len(entries) - len(old)
        if self.is_split:
            self._plant(name, old, entries)
        self._choose()
        return True

    def leads_to(self, entry: rules.Entry, chains: Chains) -> bool:
        """Tell whether *chains* have the rule of *entry*, and the jumps to where it is."""
        wanted = entry.rule
        (key,) = _by_key((entry,))
        tree, spell = self._spellings[0 if entry.address else 1]
        # From the longest prefix to the root: whoever has it must be jumped to by a shorter one.
        for prefix, jump in tree.ways(_place(key)):
            if wanted in chains.get(spell(prefix), ()):
                wanted = jump
        return wanted in chains.get(self._name, ())

    def take_changed(self) -> Iterator[tuple[str, tuple[str, ...] | None]]:
        """Yield the names and rules of changed chains; the root always, and last."""
        for tree, spell in self._spellings:
            for prefix, texts in tree.take_changed().items():
                yield spell(prefix), texts
        if self.is_split:
            # What goes by address first: it is decided by less, and is more often asked for.
            yield self._name, (*self._by_address.root_rules(), *self._by_port.root_rules())
        else:
            yield (
                self._name,
                tuple(entry.rule for name in sorted(self.entries) for entry in self.entries[name]),
            )

    def _choose(self) -> None:
        if self._layout != "auto":
            return
        if not self.is_split and self._count > _SPLIT_ABOVE:
            self.is_split = True
            for name, entries in self.entries.items():
                self._plant(name, (), entries)
        elif self.is_split and self._count < _JOIN_BELOW:
            self.is_split = False
            for name, entries in self.entries.items():
                self._plant(name, entries, ())

    def _plant(
        self,
        name: ServicePortName,
        old: tuple[rules.Entry, ...],
        new: tuple[rules.Entry, ...],
    ) -> None:
        """Bring what *name* has in the trees from *old* to *new*."""
        before, after = _by_key(old), _by_key(new)
        for key in dict.fromkeys((*before, *after)):
            texts = after.get(key, ())
            if before.get(key, ()) == texts:
                continue
            tree = self._by_address if key[0] else self._by_port
            tree.replace(_place(key), name, texts)


_Key = tuple[str, Protocol, int]


def _place(key: _Key) -> int:
    """Return where in its tree *key* is."""
    address, protocol, port = key
    return addresses.to_int(address) if address else _PROTOCOLS.index(protocol) << 16 | port


def _by_key(entries: tuple[rules.Entry, ...]) -> dict[_Key, tuple[str, ...]]:
    """Return the rules by what a tree finds them by."""
    keyed: dict[_Key, tuple[str, ...]] = {}
    for entry in entries:
        # Several ports at one address share a leaf, so the port is no part of an address's key.
        key: _Key = (entry.address, "tcp", 0) if entry.address else ("", entry.protocol, entry.port)
        keyed[key] = (*keyed.get(key, ()), entry.rule)
    return keyed


def _address(family: IPFamily, prefix: trees.Prefix) -> str:
    kind = ipaddress.IPv4Address if family is IPFamily.V4 else ipaddress.IPv6Address
    return str(kind(prefix.value))


def _address_chain(name: str, family: IPFamily, prefix: trees.Prefix) -> str:
    address = _address(family, prefix)
    if family is IPFamily.V6:
        # Too long for a chain's name (28 characters); the jump to it shows the prefix.
        digest = hashlib.sha256(f"{address}/{prefix.length}".encode()).digest()
        address = f"6-{base64.b32encode(digest)[:12].decode()}"
    return f"{name}-{address}-{prefix.length}"


def _address_jump(name: str, family: IPFamily, prefix: trees.Prefix) -> str:
    chain = _address_chain(name, family, prefix)
    return f"-d {_address(family, prefix)}/{prefix.length} -j {chain}"


def _port_chain(name: str, prefix: trees.Prefix) -> str:
    return f"{name}-NP-{_protocol(prefix)}-{prefix.value & 0xFFFF}-{prefix.length}"


def _port_jump(name: str, prefix: trees.Prefix) -> str:
    protocol, chain = _protocol(prefix), _port_chain(name, prefix)
    first = prefix.value & 0xFFFF
    last = first + (1 << (_PORT_BITS - prefix.length)) - 1
    if prefix.length == _PORT_BITS - 16:
        return f"-p {protocol} -j {chain}"
    ports = f"{first}:{last}" if last > first else str(first)
    return f"-p {protocol} -m {protocol} --dport {ports} -j {chain}"


def _protocol(prefix: trees.Prefix) -> Protocol:
    return _PROTOCOLS[prefix.value >> 16]
