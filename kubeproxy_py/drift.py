"""
Who changed our rules, where to look for it, and when: arithmetic on times that are passed in.

Somebody's change is looked at without delay, unless it is the same chains again and again: then two
programs fight, each undoing what the other does, and looking ever less often is all that one of them
can do about it.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Final, Literal

import msgspec

from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.model import IPFamily

Kind = Literal[
    "chain_added", "chain_removed", "chain_flushed", "jump_removed",
    "rule_added", "rule_removed", "rule_changed",
]  # fmt: skip

#: Reading one chain takes 2 ms and reading everything 1.5 s at 5,000 Services: what touches more
#: chains than this is a flush or a restore, after which there is less to read.
MAX_CHAINS: Final = 50
# Looks in a row that nobody is made to wait for: somebody who tries things out, or a program that
# sets itself up. A fight uses them up within seconds.
_FREE_LOOKS: Final = 20
_FIRST_WAIT_S: Final = 1.0
# Who leaves us alone for that long does not fight, or so slowly that undoing it costs nothing.
_QUIET_S: Final = 5.0
#: Names that one log line has room for.
MAX_CULPRITS: Final = 5
# Stands for looking at everything.
_EVERYTHING: Final = ChainId("", "")


class Culprit(msgspec.Struct, frozen=True):
    """Who committed a change, as the kernel tells it."""

    process: str  # at most 15 bytes of it
    pid: int | None  # as seen from the host, even in a container
    parent: str = ""  # who started it; "" if it was gone before it could be asked


class Suspicion(msgspec.Struct, frozen=True):
    """Somebody else changed what may be ours."""

    family: IPFamily
    culprit: Culprit | None  # None: the kernel does not tell
    #: None: may be any. One without a name: one of that table that has another name now.
    chains: frozenset[ChainId] | None


class Look(msgspec.Struct, frozen=True):
    """What to look at now."""

    chains: frozenset[ChainId] | None  # None: everything
    culprits: tuple[Culprit, ...]


class Repair(msgspec.Struct, frozen=True):
    """Chains of one table that were put right after the same kind of change."""

    family: IPFamily
    table: str
    kind: Kind
    count: int
    chains: tuple[str, ...]  # the first few
    culprits: tuple[Culprit, ...]


class Contest(msgspec.Struct, frozen=True):
    """Somebody undoes what we write, again and again."""

    chains: frozenset[ChainId] | None
    culprits: tuple[Culprit, ...]
    wait_s: float


def kind_of(found: tuple[str, ...] | None, wanted: tuple[str, ...] | None) -> Kind:
    """Tell what was done to a chain that should have *wanted* and has *found*; None: no chain."""
    if wanted is None:
        return "chain_added"
    if found is None:
        return "chain_removed"
    if not found:
        return "chain_flushed"
    missing, foreign = Counter(wanted) - Counter(found), Counter(found) - Counter(wanted)
    if missing and not foreign:
        return "rule_removed"
    if foreign and not missing:
        return "rule_added"
    return "rule_changed"


class _Record(msgspec.Struct):
    """How often a chain had to be looked at."""

    looks: int = 0
    looked_at: float = float("-inf")
    is_told: bool = False
    culprits: tuple[Culprit, ...] = ()

    def wait_s(self, longest_s: float) -> float:
        if self.looks < _FREE_LOOKS:
            return 0.0
        # Bounded, so that a fight that lasts for days does not overflow the power.
        return min(_FIRST_WAIT_S * 2.0 ** min(self.looks - _FREE_LOOKS, 30), longest_s)


class Suspects:
    """What others touched in one family and nobody has looked at yet."""

    def __init__(self, longest_wait_s: float) -> None:
        self._longest_wait_s = longest_wait_s
        self._waiting: dict[ChainId, set[Culprit]] = {}
        self._records: dict[ChainId, _Record] = {}

    def add(self, suspicion: Suspicion, now: float) -> None:
        """Take note of *suspicion*, and forget how it was where it has been quiet since."""
        for key in (_EVERYTHING,) if suspicion.chains is None else suspicion.chains:
            record = self._records.get(key)
            if record and self._is_over(record, now):
                del self._records[key]
            culprits = self._waiting.setdefault(key, set())
            if suspicion.culprit is not None and len(culprits) < MAX_CULPRITS:
                culprits.add(suspicion.culprit)

    def due_at(self) -> float:
        """Return when something should be looked at; infinity: nothing waits."""
        return min(map(self._due_at, self._waiting), default=float("inf"))

    def take(self, now: float) -> Look | None:
        """Return what is to be looked at *now*, if there is anything."""
        due = [key for key in self._waiting if self._due_at(key) <= now]
        if not due:
            return None
        # Who looks at everything sees the rest as well.
        is_everything = _EVERYTHING in due or len(due) > MAX_CHAINS
        taken = list(self._waiting) if is_everything else due
        culprits = set().union(*(self._waiting.pop(key) for key in taken))
        for key in taken:
            self._records.setdefault(key, _Record()).looks += 1
        return Look(None if is_everything else frozenset(taken), _some(culprits))

    def finished(self, look: Look, now: float, *, has_repaired: bool) -> Contest | None:
        """Note when *look* was over; return a contest that has begun, once for each."""
        keys = [_EVERYTHING] if look.chains is None else list(look.chains)
        begun = False
        wait_s = 0.0
        for key in keys:
            record = self._records.setdefault(key, _Record())
            record.looked_at = now
            record.culprits = look.culprits or record.culprits
            wait_s = max(wait_s, record.wait_s(self._longest_wait_s))
            if has_repaired and not record.is_told and record.looks >= _FREE_LOOKS:
                record.is_told = begun = True
        self._forget_quiet(now)
        return Contest(look.chains, look.culprits, wait_s) if begun else None

    def contested(self, now: float) -> tuple[Contest, ...]:
        """Return the contests that have begun and are not over *now*."""
        return tuple(
            Contest(
                None if key == _EVERYTHING else frozenset([key]),
                record.culprits,
                record.wait_s(self._longest_wait_s),
            )
            for key, record in sorted(self._records.items())
            if record.is_told and not self._is_over(record, now)
        )

    def _is_over(self, record: _Record, now: float) -> bool:
        quiet_s = _QUIET_S + 2 * record.wait_s(self._longest_wait_s)
        return now - record.looked_at > quiet_s

    def _due_at(self, key: ChainId) -> float:
        record = self._records.get(key)
        return record.looked_at + record.wait_s(self._longest_wait_s) if record else float("-inf")

    def _forget_quiet(self, now: float) -> None:
        # Else every chain that was ever touched would be remembered.
        limit = _QUIET_S + 2 * self._longest_wait_s
        for key in [key for key, rec in self._records.items() if now - rec.looked_at > limit]:
            del self._records[key]


def _some(culprits: Iterable[Culprit]) -> tuple[Culprit, ...]:
    ordered = sorted(culprits, key=lambda culprit: (culprit.process, culprit.pid or 0))
    return tuple(ordered[:MAX_CULPRITS])


def told(culprits: Collection[Culprit]) -> dict[str, object]:
    """Return who did it, as a log line has it."""
    return {
        "process": ", ".join(dict.fromkeys(who.process for who in culprits)) or "unknown",
        "pid": [who.pid for who in culprits],
        "parent": ", ".join(dict.fromkeys(who.parent for who in culprits if who.parent)) or None,
    }
