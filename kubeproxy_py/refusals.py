"""Whose rules the kernel refused: by the lines it names, or by trying halves where it names none."""

from collections.abc import Callable, Collection
from typing import Final

from kubeproxy_py import rules
from kubeproxy_py.errors import BatchRejected
from kubeproxy_py.iptables import plan
from kubeproxy_py.model import ServiceName
from kubeproxy_py.ruleset import Ruleset

# All that a Service's own chains jump to besides each other.
_COMMON: Final = rules.MARK_MASQ


def accused(
    error: BatchRejected, ruleset: Ruleset, restore: Callable[[plan.Batch], None]
) -> set[ServiceName]:
    """Return the Services to blame for *error*, none if it is not for any of them.

    Args:
        error: what the kernel or the program said.
        ruleset: what the batch was made of.
        restore: writes a batch, or raises BatchRejected; what it writes stays, and is harmless:
            chains that nothing leads to yet, or that are there already.

    Raises:
        IptablesError: whatever else *restore* raises.
    """
    named = {owner for line in error.refused() if (owner := _owner(line, ruleset)) is not None}
    return named or _by_halves(error.batch, ruleset, restore)


def _owner(line: str, ruleset: Ruleset) -> ServiceName | None:
    """Return whose rule or chain *line* of a restore input is about."""
    verb, _, rest = line.partition(" ")
    chain, _, rule = rest.partition(" ")
    if verb.startswith(":"):
        chain, rule = verb[1:], ""
    return ruleset.owner(chain, rule)


def _by_halves(
    batch: str, ruleset: Ruleset, restore: Callable[[plan.Batch], None]
) -> set[ServiceName]:
    declared = {line[1:].split(" ")[0] for line in batch.splitlines() if line[:1] == ":"}
    if _is_refused([], ruleset, restore):
        # The kernel refuses whatever it is given, for lack of memory say: no Service is to blame.
        return set()
    refused: set[ServiceName] = set()
    # Legacy never names a line that the kernel refuses, and exchanges a whole table for each trial:
    # each Service for itself would take nearly two hours at 10,000 of them (0.66 s each).
    waiting = [[group for group in ruleset.groups() if not declared.isdisjoint(group)]]
    while waiting:
        tried = waiting.pop()
        if not tried or not _is_refused(tried, ruleset, restore):
            continue
        if len(tried) > 1:
            middle = len(tried) // 2
            waiting += [tried[middle:], tried[:middle]]
            continue
        owner = ruleset.owner(tried[0][0], "")
        if owner is not None:
            refused.add(owner)
    return refused


def _is_refused(
    groups: Collection[tuple[str, ...]], ruleset: Ruleset, restore: Callable[[plan.Batch], None]
) -> bool:
    """Tell whether the kernel refuses the chains of these Services, given nothing besides."""
    wanted = ruleset.tables[rules.NAT]
    names = (_COMMON, *(chain for group in groups for chain in group))
    try:
        restore(plan.Batch((plan.Section(rules.NAT, {chain: wanted[chain] for chain in names}),)))
    except BatchRejected:
        return True
    return False
