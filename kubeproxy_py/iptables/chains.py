"""
Chains and rules as ``iptables-save`` text: reading them, and which of them are ours.

Pure. A rule is its text without ``-A CHAIN``; a chain is a tuple of rules; equality is text equality.
The tables are shared with the CNI plugin, the kubelet and the node's administrator: ``is_ours`` is
the only judge of what may be written or deleted.
"""

from collections.abc import Iterable
from typing import Final

from kubeproxy_py import dispatch
from kubeproxy_py.errors import IptablesError
from kubeproxy_py.model import Chains, Tables

__all__ = ["BUILTIN", "PROBE", "Chains", "Tables", "is_ours", "parse_save"]

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
# In nat every chain of one ServicePort begins so, and those of our trees as well.
_PREFIXES: Final = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-FW-", "KUBE-EXT-")
BUILTIN: Final = frozenset({"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"})


def is_ours(table: str, chain: str) -> bool:
    """Tell whether kube-proxy (and so we) own *chain*; KUBE-FIREWALL is shared with the kubelet."""
    if chain in _EXACT.get(table, ()):
        return True
    if table == "nat":
        return chain.startswith(_PREFIXES)
    return table == "filter" and dispatch.tree_depth(chain) is not None


def count_ours(tables: Tables) -> int:
    """Return how many chains are ours."""
    return sum(is_ours(table, chain) for table, found in tables.items() for chain in found)


def parse_save(lines: Iterable[str], policies: dict[tuple[str, str], str] | None = None) -> Tables:
    """Parse the output of ``iptables-save`` (any number of tables, with or without counters).

    *policies*, if given, receives those of built-in chains by (table, chain).

    Raises IptablesError for a table of ours that the program could not show: what is in it is not
    known.
    """
    tables: Tables = {}
    rules: dict[str, list[str]] = {}
    table = ""
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
            # Where the program was killed, a name may be cut off; such a table has no COMMIT.
            rules.setdefault(chain, []).append(rule)
        elif line.startswith(":"):
            chain, policy, *_ = (*line[1:].split(" "), "")
            rules[chain] = []
            if policies is not None and policy in {"ACCEPT", "DROP"}:
                policies[table, chain] = policy
        elif line.startswith("*"):
            table, rules = line[1:].strip(), {}
        elif line.startswith("COMMIT"):
            tables[table] = {chain: tuple(texts) for chain, texts in rules.items()}
        elif "is incompatible" in line and any(f"`{ours}'" in line for ours in _EXACT):
            # Rules that only `nft` can show stand in iptables' own table; in raw, say, they are
            # nothing to us.
            said = line.strip().removeprefix("# ")
            raise IptablesError(f"cannot read live rules: {said}")
    return tables
