"""
Whose connections a rule's counter counts, and totals that only grow.

Pure. The nat table is asked once for each connection, by its first packet, so the counter of the rule
that chooses an endpoint counts connections. A rule in filter that refuses is asked by every packet that
is refused. Counters begin anew when their chain is written: whoever writes one says so before and
afterwards (``Ledger.touch``, ``release``), and nothing is counted twice or lost.

What is known of rules is read from their text, so it holds for kube-proxy's rules as for ours.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final, Generic, Literal, NamedTuple, TypeVar, cast

from kubeproxy_py import rules
from kubeproxy_py.model import Chains, Protocol, ServicePortName, Tables

Kind = Literal["connections", "refused", "packets", "bytes"]
#: Why packets were refused.
Reason = Literal["no_endpoints", "no_local_endpoints", "source_ranges"]

#: Packets that each rule of a chain has matched, by chain.
Counts = Mapping[str, tuple[int, ...]]

_ENDPOINT: Final = "KUBE-SEP-"
_CHOOSES: Final = ("KUBE-SVC-", "KUBE-SVL-")
# A ServicePort's chains; behind the hash, the number of a group of endpoints.
_OF_PORT: Final = re.compile(r"KUBE-(?:SVC|SVL|EXT|FW)-([A-Z2-7]{16})(?:-[0-9a-f]{2})?$")
# Names have a slash and no blank; no other comment of kube-proxy's begins so.
_NAMED: Final = re.compile(r'--comment "([^/" ]+/[^" ]+)(?: ([^"]*))?"')
_TARGET: Final = re.compile(r" -j (\S+)(?: --to-destination (\S+))?$")
_PROTOCOL: Final = re.compile(r"-p (tcp|udp|sctp) ")
_REASONS: Final[tuple[tuple[str, Reason], ...]] = (
    ("has no endpoints", "no_endpoints"),
    ("has no local endpoints", "no_local_endpoints"),
    ("traffic not accepted by", "source_ranges"),
)

# An exported series that had no traffic for so long gives way to one that has some.
_IDLE_S: Final = 600.0


class Series(NamedTuple):
    """What is counted for itself."""

    kind: Kind
    port: ServicePortName
    detail: str  # endpoint's address of connections, reason of what was refused, direction of bytes


class _Meter(NamedTuple):
    """A rule whose counter counts: its place in its chain, from the end where negative."""

    position: int
    series: Series

    @property
    def rules(self) -> int:
        """The number of rules that its chain has at least."""
        return self.position + 1 if self.position >= 0 else -self.position


class Index:
    """Which rules count for whom. Built from rules as text, a part at a time."""

    def __init__(self, namespaces: Collection[str] = ()) -> None:
        """Look at Services of these namespaces only; none: all."""
        self._namespaces = frozenset(namespaces)
        #: By chain. An endpoint's chain is in nat, all others in filter.
        self.meters: dict[str, tuple[_Meter, ...]] = {}
        self._ports: dict[str, str] = {}  # by hash: "namespace/name:port"

    def learn(self, tables: Tables, *, but: Collection[str] = ()) -> bool:
        """
        Take in chains of these tables, in the place of what was known of them, except *but*.

        Return whether all endpoints among them are known by name. In large clusters their rules do not
        say it, and the rule that does may stand in a chain that is not among these.
        """
        nat = tables.get(rules.NAT, {})
        self._learn_ports(nat)
        owners = dict(_owners(nat))
        # One value for all endpoints of a ServicePort: it is kept for each of them.
        ports: dict[tuple[str, str], ServicePortName | None] = {}
        is_complete = True
        for chain, texts in nat.items():
            if chain.startswith(_ENDPOINT) and chain not in but:
                text, protocol, address = self._endpoint(texts, owners.get(chain, ""))
                is_complete = is_complete and bool(text)
                if (text, protocol) not in ports:
                    ports[text, protocol] = self._parse_port(text, protocol)
                port = ports[text, protocol]
                self._keep(
                    chain, (_Meter(-1, Series("connections", port, address)),) if port else ()
                )
        for chain, texts in tables.get(rules.FILTER, {}).items():
            if chain not in but:
                self._keep(chain, tuple(self._refusals(texts)))
        return is_complete

    def forget(self, tables: Mapping[str, Iterable[str]]) -> None:
        """Forget chains that are gone, by table."""
        for chain in tables.get(rules.NAT, ()):
            if chain.startswith(_ENDPOINT):
                self.meters.pop(chain, None)
            elif chain.startswith(_CHOOSES) and (own := _OF_PORT.match(chain)):
                self._ports.pop(own[1], None)
        for chain in tables.get(rules.FILTER, ()):
            self.meters.pop(chain, None)

    def chains(self) -> dict[str, list[str]]:
        """Return the chains with a counter that counts, by table."""
        found: dict[str, list[str]] = {rules.NAT: [], rules.FILTER: []}
        for chain in self.meters:
            found[table_of(chain)].append(chain)
        return found

    def ports(self) -> dict[ServicePortName, int]:
        """Return the ServicePorts that are counted, and how many endpoints each has."""
        found: dict[ServicePortName, int] = {}
        for meters in self.meters.values():
            for _, series in meters:
                is_endpoint = series.kind == "connections"
                found[series.port] = found.get(series.port, 0) + is_endpoint
        return found

    def _keep(self, chain: str, meters: tuple[_Meter, ...]) -> None:
        if meters:
            self.meters[chain] = meters
        else:
            self.meters.pop(chain, None)

    def _learn_ports(self, nat: Chains) -> None:
        for chain, texts in nat.items():
            if chain.startswith(_ENDPOINT):
                continue
            own = _OF_PORT.match(chain)
            for text in texts:
                named = _NAMED.search(text)
                if named is None:
                    continue
                if own is not None:
                    # The rule for what does not come from pods.
                    self._ports.setdefault(own[1], named[1])
                    break
                target = _TARGET.search(text)
                reached = target and _OF_PORT.match(target[1])
                if reached:
                    self._ports[reached[1]] = named[1]

    def _endpoint(self, texts: tuple[str, ...], owner: str) -> tuple[str, str, str]:
        """Return ServicePort ("": not known), protocol and address of an endpoint's chain."""
        last = texts[-1] if texts else ""
        target, protocol, named = _TARGET.search(last), _PROTOCOL.search(last), _NAMED.search(last)
        text = named[1] if named else self._ports.get(owner, "")
        if target is None or target[1] != "DNAT" or protocol is None:
            return "", "", ""
        return text, protocol[1], target[2] or ""

    def _refusals(self, texts: tuple[str, ...]) -> Iterator[_Meter]:
        for position, text in enumerate(texts):
            named, protocol = _NAMED.search(text), _PROTOCOL.search(text)
            if named is None or protocol is None:
                continue
            said = named[2] or ""
            reason = next((reason for words, reason in _REASONS if said.startswith(words)), None)
            port = self._parse_port(named[1], protocol[1])
            if reason is not None and port is not None:
                yield _Meter(position, Series("refused", port, reason))

    def _parse_port(self, text: str, protocol: str) -> ServicePortName | None:
        namespace, slash, rest = text.partition("/")
        if not slash or (self._namespaces and namespace not in self._namespaces):
            return None
        name, _, port = rest.partition(":")
        return ServicePortName(namespace, name, port, cast("Protocol", protocol))


def table_of(chain: str) -> str:
    """Return the table in which *chain* has a counter that counts."""
    return rules.NAT if chain.startswith(_ENDPOINT) else rules.FILTER


def _owners(nat: Chains) -> Iterator[tuple[str, str]]:
    """Yield endpoints' chains and the hash of the ServicePort whose chain leads to them."""
    for chain, texts in nat.items():
        own = _OF_PORT.match(chain)
        if own is not None:
            for text in texts:
                target = text.rpartition(" -j ")[2] if " -j " in text else text.removeprefix("-j ")
                if target.startswith(_ENDPOINT):
                    yield target, own[1]


class Written(NamedTuple):
    """What was written to the kernel: chains with their rules, and chains that are gone, by table."""

    tables: Tables
    deleted: dict[str, tuple[str, ...]]

    @property
    def counted(self) -> list[str]:
        """The chains among them that may have counted."""
        return [
            chain
            for table in (self.tables, self.deleted)
            for name in (rules.NAT, rules.FILTER)
            for chain in table.get(name, ())
            if table_of(chain) == name
        ]


class Ledger:
    """What was counted since the last look, from counters that begin anew.

    A look takes time: ``begin`` it, read the kernel, and hand in what was read with ``fold``. Chains
    that were written meanwhile are left out of it. Whoever writes chains says so (``touch``), hands in
    what they had counted until then (``take``), and says that they are written (``release``).
    """

    def __init__(self, namespaces: Collection[str] = ()) -> None:
        self.index = Index(namespaces)
        #: False: the index must learn from all rules there are, with the next look.
        self.has_names = False
        # What counters stood at, by chain: as many as the chain has meters.
        self._last: dict[str, tuple[int, ...]] = {}
        # Written by us and not read since, so that all they count is new. What a chain of somebody
        # else's writing, or of a process before this one, stands at when it is first seen, is not.
        self._fresh: set[str] = set()
        # Being written; and written, or being so, since the look began.
        self._held: set[str] = set()
        self._touched: set[str] = set()

    def begin(self) -> None:
        """Begin a look."""
        self._touched = set(self._held)

    @property
    def touched(self) -> Collection[str]:
        """The chains that were written, or are being written, since the look began."""
        return self._touched

    def fold(self, counts: Counts) -> Counter[Series]:
        """End a look: return what was counted since the last one.

        Chains that *counts* does not have are gone.
        """
        found: Counter[Series] = Counter()
        for chain in self._last.keys() - counts.keys() - self._touched:
            del self._last[chain]
        for chain, now in counts.items():
            if chain not in self._touched:
                self._take(chain, now, found)
        self._touched = set()
        return found

    def standing(self) -> Counter[Series]:
        """Return what the counters stood at when they were last read."""
        found: Counter[Series] = Counter()
        for chain, values in self._last.items():
            for meter, value in zip(self.index.meters.get(chain, ()), values, strict=False):
                found[meter.series] += value
        return found

    def touch(self, chains: Collection[str]) -> None:
        """Say that *chains* are about to be written."""
        self._held.update(chains)
        self._touched.update(chains)

    def take(self, counts: Counts) -> Counter[Series]:
        """Return what chains that are about to be written have counted until now."""
        found: Counter[Series] = Counter()
        for chain, now in counts.items():
            self._take(chain, now, found)
        return found

    def release(self, chains: Collection[str], written: Written | None) -> None:
        """Say that *chains* have been written, and how (None: nothing was written)."""
        self._held.difference_update(chains)
        if written is None:
            return
        self._touched.update(chains)
        for chain in chains:
            self._last.pop(chain, None)
        self._fresh.update(chains)
        self._fresh.difference_update(*written.deleted.values())
        self.index.forget(written.deleted)
        if not self.index.learn(written.tables):
            self.has_names = False

    def _take(self, chain: str, now: tuple[int, ...], found: Counter[Series]) -> None:
        meters = self.index.meters.get(chain, ())
        if not meters or len(now) < meters[-1].rules:
            return  # somebody else has changed the chain
        values = tuple([now[meter.position] for meter in meters])
        before = self._last.get(chain, values)
        if chain in self._fresh:
            self._fresh.discard(chain)
            before = (0,) * len(values)
        self._last[chain] = values
        for meter, value, last in zip(meters, values, before, strict=False):
            # Less than before: somebody else has set it back.
            more = value - last if value >= last else value
            if more:
                found[meter.series] += more


Key = TypeVar("Key", bound=tuple[object, ...])


class Board(Generic[Key]):
    """Totals by key for as many keys as there is room, and one total for all others.

    No total ever falls. A key that had to wait begins at zero when it gets its place, because what it
    had before is in the total of the others.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self.totals: dict[Key, int] = {}
        self.others = 0
        self._active_at: dict[Key, float] = {}

    def add(self, more: Mapping[Key, int], now: float) -> None:
        """Count *more*; *now* is a time in seconds."""
        waiting = sorted((key for key in more if key not in self.totals), key=lambda k: -more[k])
        for key in waiting:
            if len(self.totals) >= self._room and not self._make_room(now):
                break
            self.totals[key] = 0
            self._active_at[key] = now
        for key, amount in more.items():
            if key in self.totals:
                self.totals[key] += amount
                self._active_at[key] = now
            else:
                self.others += amount

    def keep(self, present: Collection[Key]) -> None:
        """End what is not *present*; show the others with zero if there is room for all of them."""
        for key in [key for key in self.totals if key not in present]:
            self._end(key)
        if len(present) <= self._room:
            for key in present:
                self.totals.setdefault(key, 0)

    def resume(self, totals: Mapping[Key, int], others: int, now: float) -> None:
        """Go on from totals of another process."""
        for key, total in list(totals.items())[: self._room]:
            self.totals[key] = total
            self._active_at[key] = now
        self.others = others

    def _make_room(self, now: float) -> bool:
        """End what was idle for longest, or never had any traffic, if that is long enough."""
        idlest = min(self.totals, key=self._was_active_at)
        if now - self._was_active_at(idlest) < _IDLE_S:
            return False
        self._end(idlest)
        return True

    def _was_active_at(self, key: Key) -> float:
        return self._active_at.get(key, float("-inf"))

    def _end(self, key: Key) -> None:
        del self.totals[key]
        self._active_at.pop(key, None)
