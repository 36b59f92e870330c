"""What kube-proxy itself does to the tables, as far as a node that changes hands depends on it."""

from collections.abc import Callable, Collection
from typing import Final

from kubeproxy_py import rules
from kubeproxy_py.model import Tables

#: The chains of its nat that kube-proxy takes for a Service's, and deletes if it knows no such one.
_PREFIXES: Final = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-FW-", "KUBE-EXT-")


def prepare(live: Tables) -> str:
    """Return an input for what it makes before its first sync: canaries, chains and jumps to them."""
    lines: list[str] = []
    for table in (rules.MANGLE, rules.NAT, rules.FILTER):
        there = live.get(table, {})
        ours = [jump for jump in rules.JUMPS if jump.table == table]
        # Declared only where they are missing: declaring empties.
        wanted = {rules.CANARY, *(jump.rule.rpartition(" ")[2] for jump in ours)}
        lines.append(f"*{table}")
        lines += [f":{name} - [0:0]" for name in sorted(wanted - there.keys())]
        lines += [
            f"-I {jump.builtin} {jump.rule}"
            for jump in ours
            if jump.rule not in there.get(jump.builtin, ())
        ]
        lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines)


def first_sync(wanted: Tables, live: Tables) -> str:
    """Return the input of its first sync: all chains anew, and stale ones of nat go.

    *wanted* are its chains; it makes its canaries by other means.
    """
    return _render(wanted, live, lambda _name: True)


def partial_sync(wanted: Tables, live: Tables, changed: Collection[str]) -> str:
    """Return the input of a later sync: shared chains anew, and of Services' chains those *changed*."""
    return _render(wanted, live, lambda name: name in changed or not name.startswith(_PREFIXES))


def _render(wanted: Tables, live: Tables, is_written: Callable[[str], bool]) -> str:
    lines: list[str] = []
    for table in ("filter", "nat"):
        chains = {
            name: texts
            for name, texts in wanted[table].items()
            if not name.endswith("-CANARY") and is_written(name)
        }
        stale = sorted(
            name
            for name in live[table]
            if table == "nat" and name.startswith(_PREFIXES) and name not in wanted[table]
        )
        lines.append(f"*{table}")
        lines += [f":{name} - [0:0]" for name in (*chains, *stale)]
        lines += [f"-A {name} {text}" for name, texts in chains.items() for text in texts]
        lines += [f"-X {name}" for name in stale]
        lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines)
