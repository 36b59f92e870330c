"""
Spellings: what chains read back as, where that differs from how they were written.

Other versions of iptables print some rules in another way than the one that ours are written in.
"""

from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.iptables import chains, probe


class Echoes:
    """Chains that read back otherwise than they were written.

    Other versions of iptables print some rules in another way than the one that ours are written
    in. Such a chain would look foreign at every look, and be written again for ever.
    """

    def __init__(self) -> None:
        self._written: dict[ChainId, tuple[str, ...]] = {}
        self._read: dict[ChainId, tuple[str, ...]] = {}

    def learn(self, live: chains.Tables, desired: chains.Tables) -> None:
        """Remember what differs in *live*, read just after *desired* was written; forget the rest.

        *desired* is everything: a chain that is not wanted any more has no spelling, or those of all
        Services that ever were would be remembered.
        """
        gone = [name for name in self._read if name.chain not in desired.get(name.table, {})]
        for name in gone:
            del self._read[name], self._written[name]
        for table, wanted in desired.items():
            for chain, texts in wanted.items():
                found = live.get(table, {}).get(chain)
                # Another program may have changed something between our writing and this look. What
                # was learned of it would never be repaired, so only another spelling will do.
                if found is not None and found != texts and _means_the_same(texts, found):
                    self._written[ChainId(table, chain)] = texts
                    self._read[ChainId(table, chain)] = found

    def undo(self, live: chains.Tables) -> None:
        """Put in *live* what was written in the place of what it is known to be read as."""
        for chain, found in self._read.items():
            if live.get(chain.table, {}).get(chain.chain) == found:
                live[chain.table][chain.chain] = self._written[chain]


def _means_the_same(written: tuple[str, ...], read: tuple[str, ...]) -> bool:
    return len(written) == len(read) and all(
        ours == theirs
        or (probe.means_the_same(ours, theirs) and probe.means_the_same(theirs, ours))
        for ours, theirs in zip(written, read, strict=True)
    )
