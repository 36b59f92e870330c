"""
Compares, a few Services at a time, the rules there should be with those that building from nothing gives.

The promise that both are the same is held by property tests; this looks whether it holds in the field.
It changes nothing. Whoever finds a difference has found a bug of ours, not of anybody else.
"""

import time
from collections.abc import Callable, Collection, Iterator
from typing import Final

from kubeproxy_py.model import IPFamily, ServiceName
from kubeproxy_py.ruleset import Ruleset
from kubeproxy_py.store import Store

# One look every ten seconds (sync_loop) so takes a two-thousandth of a core. 10,000 Services with five
# endpoints each are all looked at within the hour.
_BUDGET_S: Final = 0.005


class Auditor:
    """Goes round all Services of one family, by name."""

    def __init__(
        self, family: IPFamily, store: Store, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._family = family
        self._store = store
        self._clock = clock
        self._names: Iterator[ServiceName] = iter(())
        #: Services compared so far, and how many of them differed.
        self.compared = 0
        self.differed = 0

    def look(
        self, ruleset: Ruleset, *, ignored: Collection[ServiceName]
    ) -> tuple[ServiceName, ...]:
        """Compare the next few Services; return those whose rules differ.

        Args:
            ruleset: what is desired; nobody may change it meanwhile.
            ignored: Services that are not as the store has them, for a good reason.
        """
        deadline = self._clock() + _BUDGET_S
        found: list[ServiceName] = []
        is_new_round = False
        while self._clock() < deadline:
            name = next(self._names, None)
            if name is None:
                if is_new_round:
                    break  # all there are, in one look
                is_new_round = True
                # What the one has and the other has not differs, too.
                self._names = iter(sorted({*self._store.names(self._family), *ruleset.names()}))
                continue
            # What has changed and was not taken yet differs, and rightly so.
            for settled, state in self._store.settled(self._family, [name]).items():
                if settled not in ignored:
                    self.compared += 1
                    if not ruleset.holds(settled, state):
                        found.append(settled)
        self.differed += len(found)
        return tuple(found)
