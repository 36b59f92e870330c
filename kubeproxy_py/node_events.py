"""
What is worth an Event on the Node, in words.

Pure. The same thing happening again must give the same words, because the recorder counts what repeats
and posts what is new: so no times, no process ids and no running numbers.
"""

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from kubeproxy_py import drift
from kubeproxy_py.model import IPFamily

# Enough to tell what was touched; a flush touches thousands.
_NAMED_CHAINS: Final = 3

_DONE: Final[dict[drift.Kind, str]] = {
    "chain_added": "added chains",
    "chain_removed": "removed chains",
    "chain_flushed": "flushed chains",
    "jump_removed": "removed our jumps from chains",
    "rule_added": "added rules to chains",
    "rule_removed": "removed rules from chains",
    "rule_changed": "changed rules of chains",
}


class NodeEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One Event, but for whose it is and when."""

    event_type: Literal["Normal", "Warning"]
    reason: str
    action: str
    note: str


#: As kube-proxy posts it.
STARTING: Final = NodeEvent(
    event_type="Normal", reason="Starting", action="StartKubeProxy", note=""
)


def adopted(family: IPFamily, *, found: int, written: int, deleted: int) -> NodeEvent:
    """Tell that rules were found at the start that were not all as they should be."""
    return NodeEvent(
        event_type="Normal",
        reason="RulesAdopted",
        action="Sync",
        note=f"{family.value}: of {found} chains of kube-proxy's, or of an earlier run, that were found"
        f" at the start, those that were right were left alone; {written} were written,"
        f" {deleted} deleted",
    )


def repaired(repair: drift.Repair) -> NodeEvent:
    """Tell that others had changed our rules, and that they are right again."""
    return NodeEvent(
        event_type="Warning",
        reason="RulesRepaired",
        action="Sync",
        note=f"{repair.family.value}: {_who(repair.culprits)} {_DONE[repair.kind]} in {repair.table}:"
        f" {_named(repair.chains, repair.count)}; they are as they should be again",
    )


def contested(family: IPFamily, contest: drift.Contest) -> NodeEvent:
    """Tell that somebody undoes what we write again and again."""
    chains = tuple(f"{table}/{chain}" for table, chain in sorted(contest.chains or ()))
    what = _named(chains, len(chains)) if chains else "our chains"
    return NodeEvent(
        event_type="Warning",
        reason="RulesContested",
        action="Sync",
        note=f"{family.value}: {_who(contest.culprits)} changes {what} again and again: repairs come"
        " ever less often; stop one of the two",
    )


def mixed(family: IPFamily, backend: str, *, is_met: bool | None) -> NodeEvent:
    """Tell that rules stand in the backend that is not used, and whether packets meet them.

    With None for *is_met*, nobody knows.
    """
    met = {
        True: "packets pass them as well, though nobody keeps them up to date",
        False: "harmless",
        None: "whether packets pass them as well cannot be seen",
    }[is_met]
    return NodeEvent(
        event_type="Warning",
        reason="BackendsMixed",
        action="Sync",
        note=f"{family.value}: rules of kube-proxy's stand in {backend} tables, which are not used here"
        f" ({met}): kubeproxy-py cleanup --backend={backend} removes them",
    )


def _who(culprits: Iterable[drift.Culprit]) -> str:
    return ", ".join(dict.fromkeys(who.process for who in culprits)) or "an unknown process"


def _named(names: tuple[str, ...], count: int) -> str:
    shown = names[:_NAMED_CHAINS]
    left = count - len(shown)
    return f"{', '.join(shown)} and others" if left > 0 else ", ".join(shown)
