"""
What a sync writes that nothing of ours has asked for: who else changed it, and what of it.

Pure. One sync may write a chain more than once, in stages: it counts as what it was found to be first.
"""

from collections.abc import Iterable
from typing import Final

from kubeproxy_py import drift
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.iptables.plan import Batch
from kubeproxy_py.model import IPFamily, Tables

# A flush makes thousands drift; the first few tell what happened.
_NAMED_CHAINS: Final = 10
# While a family cannot be written, chains come and go without end. A large cluster has as many, and
# their names take some 15 MB.
_MAX_ASKED_FOR: Final = 100_000


class Repairs:
    """What was put right since this was last told."""

    def __init__(self) -> None:
        # A built-in chain stands for a jump of ours in it.
        self._kinds: dict[ChainId, drift.Kind] = {}
        #: Chains that we ourselves have to change; None: too many to remember.
        self.asked_for: frozenset[ChainId] | None = frozenset()

    def ask_for(self, chains: frozenset[ChainId]) -> None:
        """Let what is written of *chains* from now on be our own change, of any if they are too many."""
        if self.asked_for is not None:
            asked_for = self.asked_for | chains
            self.asked_for = asked_for if len(asked_for) <= _MAX_ASKED_FOR else None

    def note(self, batches: Iterable[Batch], *, live: Tables, desired: Tables) -> None:
        """Note what *batches* change of *live*, before they do, but for what was asked for."""
        for section in (section for batch in batches for section in batch.sections):
            table = section.table
            for jump in section.insert:
                self._kinds.setdefault(ChainId(table, jump.builtin), "jump_removed")
            for chain in {*section.write, *section.delete}:
                found = ChainId(table, chain)
                if not self._is_asked_for(found) and found not in self._kinds:
                    has, wants = (tables.get(table, {}).get(chain) for tables in (live, desired))
                    self._kinds[found] = drift.kind_of(has, wants)

    def _is_asked_for(self, chain: ChainId) -> bool:
        return self.asked_for is None or chain in self.asked_for

    def forget(self) -> None:
        """Let nothing have been noted."""
        self._kinds.clear()

    def take(
        self, family: IPFamily, culprits: tuple[drift.Culprit, ...]
    ) -> tuple[drift.Repair, ...]:
        """Return what was noted, by table and kind; all that was asked for is done as well."""
        found: dict[tuple[str, drift.Kind], list[str]] = {}
        for (table, chain), kind in self._kinds.items():
            found.setdefault((table, kind), []).append(chain)
        self.forget()
        self.asked_for = frozenset()
        return tuple(
            drift.Repair(
                family=family,
                table=table,
                kind=kind,
                count=len(names),
                chains=tuple(sorted(names)[:_NAMED_CHAINS]),
                culprits=culprits,
            )
            for (table, kind), names in found.items()
        )
