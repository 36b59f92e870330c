"""
Which chains are not called any more what they were: the kernel tells only in which tables there are any.

Pure.
"""

from collections.abc import Collection, Iterator

from kubeproxy_py import drift
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.iptables import chains


def find(tables: Collection[str], known: chains.Tables, there: Collection[ChainId]) -> set[ChainId]:
    """Return the chains of *tables* by whose names *known* differs from what is *there*.

    With those that lead to them, whose rules follow a chain to its new name; unless there are more
    than can be looked at one by one anyway.
    """
    found: set[ChainId] = set()
    for table in tables:
        old = known.get(table, {})
        names = {name for where, name in there if where == table}
        lost = old.keys() - names
        came = {name for name in names - old.keys() if chains.is_ours(table, name)}
        found |= {ChainId(table, name) for name in lost | came}
        if len(found) <= drift.MAX_CHAINS:
            found |= {ChainId(table, name) for name in _leading_to(lost, old)}
    return found


def _leading_to(names: Collection[str], found: chains.Chains) -> Iterator[str]:
    """Yield the chains of *found* with a rule that leads to one of *names*."""
    ends = tuple(f" -j {name}" for name in names)
    for chain, texts in found.items():
        if ends and any(f" {text}".endswith(ends) for text in texts):
            yield chain
