"""
A ``preview.Preview`` as text for people: Service by Service, and the sum of it.

Pure.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from kubeproxy_py.preview import Action, ChainChange, Preview, ServiceChange

#: Colours a text by the sign it stands for: "+", "-" or "~".
Paint = Callable[[str, str], str]

_SIGNS: Final[dict[Action, str]] = {"create": "+", "delete": "-", "change": "~"}
# Endpoints that one line has room for.
_NAMED: Final = 4


def plain(text: str, _sign: str) -> str:
    """Return *text* as it is."""
    return text


def changes_text(found: Preview, paint: Paint = plain, *, has_rules: bool = True) -> str:
    """Render what changes, by Service; without the rules, one line for each."""
    lines = [f"{found.ip_family}, iptables-{found.backend}"]
    for change in found.changes:
        lines.append(paint(f"{_SIGNS[change.action]} {_headline(change)}", _SIGNS[change.action]))
        if has_rules:
            for chain in change.chains:
                lines += _chain_lines(chain, paint)
    return "\n".join(lines)


def summary_text(found: Preview) -> str:
    """Render how much changes, in one line."""
    if not found.changes:
        return f"{found.ip_family}: nothing to change ({_count(found.services, 'Service')})"
    services = [change for change in found.changes if change.service]
    kinds = ", ".join(
        f"{sum(change.action == action for change in services)} {word}"
        for action, word in (("create", "new"), ("change", "changed"), ("delete", "gone"))
    )
    return (
        f"{found.ip_family}: {kinds} (of {_count(found.services, 'Service')});"
        f" {_count(found.chains_written, 'chain')} to write, {found.chains_deleted} to delete;"
        f" {_count(found.rules_added, 'rule')} added, {found.rules_removed} removed;"
        f" {_count(found.restores, 'restore')}"
    )


def _headline(change: ServiceChange) -> str:
    name = change.service or "shared by all, or of no Service that can be told"
    facts = [_count(len({(chain.table, chain.chain) for chain in change.chains}), "chain")]
    for sign, endpoints in (("+", change.endpoints_added), ("-", change.endpoints_removed)):
        if endpoints:
            facts.append(f"endpoints {_named(sign, endpoints)}")
    return f"{name} ({'; '.join(facts)})"


def _named(sign: str, endpoints: Sequence[str]) -> str:
    shown = " ".join(f"{sign}{endpoint}" for endpoint in endpoints[:_NAMED])
    left = len(endpoints) - _NAMED
    return f"{shown} and {left} more" if left > 0 else shown


def _chain_lines(chain: ChainChange, paint: Paint) -> Iterator[str]:
    sign = _SIGNS[chain.action]
    yield paint(f"    {sign} {chain.table} {chain.chain}", sign)
    yield from _rule_lines("-", chain.removed, paint)
    yield from _rule_lines("+", chain.added, paint)


def _rule_lines(sign: str, texts: Iterable[str], paint: Paint) -> Iterator[str]:
    for text in texts:
        yield paint(f"        {sign} {text}", sign)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
