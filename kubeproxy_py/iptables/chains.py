"""
Chains and rules as ``iptables-save`` text: reading them, and which of them are ours.

Pure. A rule is its text without ``-A CHAIN``; a chain is a tuple of rules; equality is text equality.
The tables are shared with the CNI plugin, the kubelet and the node's administrator: ``is_ours`` is
the only judge of what may be written or deleted.
"""

from collections.abc import Iterable
from typing import Final

from kubeproxy_py import dispatch, rules
from kubeproxy_py.errors import IptablesError
from kubeproxy_py.model import Chains, Tables

__all__ = ["BUILTIN", "PROBE", "TABLES", "Chains", "Tables", "is_ours", "parse_save"]

#: Where it is tried what the kernel can do; left behind only by a crash.
PROBE: Final = "KUBE-PROXY-PROBE"
_EXACT: Final = {
    "filter": frozenset(
        {
            "KUBE-SERVICES",
            "KUBE-EXTERNAL-SERVICES",
            "KUBE-FORWARD",
            "KUBE-NODEPORTS",
            "KUBE-PROXY-FIREWALL",
            "KUBE-PROXY-CANARY",
            PROBE,
        }
    ),
    "nat": frozenset(
        {
            "KUBE-SERVICES",
            "KUBE-NODEPORTS",
            "KUBE-POSTROUTING",
            "KUBE-MARK-MASQ",
            "KUBE-PROXY-CANARY",
            PROBE,
        }
    ),
    "mangle": frozenset({"KUBE-PROXY-CANARY", PROBE}),
}
#: Those that may have chains of ours.
TABLES: Final = frozenset(_EXACT)
BUILTIN: Final = frozenset({"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"})


def is_ours(table: str, chain: str) -> bool:
    """Tell whether kube-proxy (and so we) own *chain*; KUBE-FIREWALL is shared with the kubelet."""
    if chain in _EXACT.get(table, ()):
        return True
    if table == "nat":
        # Those of our trees begin as a ServicePort's do.
        return chain.startswith(rules.PORT_CHAIN_PREFIXES)
    return table == "filter" and dispatch.tree_depth(chain) is not None


def count_ours(tables: Tables) -> int:
    """Return how many chains are ours."""
    return sum(is_ours(table, chain) for table, found in tables.items() for chain in found)


class _Reading:
    """One table, chain by chain: each is complete when the next begins."""

    def __init__(self, table: str, known: Chains) -> None:
        self.table = table
        self._known = known
        self._chains: Chains = {}
        self._chain = ""
        self._texts: list[str] = []

    def declare(self, chain: str) -> None:
        self._chains[chain] = ()

    def add(self, chain: str, rule: str) -> None:
        if chain != self._chain:
            self._close()
            # Where the program was killed, a name may be cut off; such a table has no COMMIT.
            self._chain, self._texts = chain, list(self._chains.get(chain, ()))
        self._texts.append(rule)

    def end(self) -> Chains:
        self._close()
        return self._chains

    def _close(self) -> None:
        if self._texts:
            found, known = tuple(self._texts), self._known.get(self._chain)
            self._chains[self._chain] = known if known == found else found
        self._texts = []


def parse_save(
    lines: Iterable[str],
    policies: dict[tuple[str, str], str] | None = None,
    known: Tables | None = None,
    unshown: set[str] | None = None,
) -> Tables:
    """Parse the output of ``iptables-save`` (any number of tables, with or without counters).

    Args:
        lines: the output.
        policies: receives those of built-in chains by (table, chain).
        known: what is probably in it: chains that are the same are returned as they are here, so that
            a big node's rules are never in memory twice.
        unshown: receives the tables of ours that the program does not show, though they are there.

    Raises:
        IptablesError: for such a table, where nobody asks for them: what is in it is not known.
    """
    tables: Tables = {}
    reading = _Reading("", {})
    for line in lines:
        if line.startswith("["):
            # Counters (iptables-save -c): [packets:bytes] -A CHAIN ...
            line = line.partition("] ")[2]  # noqa: PLW2901 - the rest is the line
        if line.startswith("-A "):
            _, chain, *rest = line.rstrip("\n").split(" ", 2)
            rule = rest[0] if rest else ""
            if "--nfacct-name  " in rule:
                # iptables (1.8.9 at least) prints two spaces here.
                rule = rule.replace("--nfacct-name  ", "--nfacct-name ")
            reading.add(chain, rule)
        elif line.startswith(":"):
            chain, policy, *_ = (*line[1:].split(" "), "")
            reading.declare(chain)
            if policies is not None and policy in {"ACCEPT", "DROP"}:
                policies[reading.table, chain] = policy
        elif line.startswith("*"):
            table = line[1:].strip()
            reading = _Reading(table, (known or {}).get(table, {}))
        elif line.startswith("COMMIT"):
            tables[reading.table] = reading.end()
        elif "is incompatible" in line and (found := [t for t in _EXACT if f"`{t}'" in line]):
            # Rules that only `nft` can show stand in iptables' own table; in raw, say, they are
            # nothing to us.
            if unshown is None:
                said = line.strip().removeprefix("# ")
                raise IptablesError(f"cannot read live rules: {said}")
            unshown.update(found)
    return tables
