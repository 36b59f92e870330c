"""
What is lost when a kind of rule is lost: damage done to a Scenario's rules, on purpose.

A table of scenarios proves something only if it fails once the rules are wrong. A *class* is what
stays of a rule without names, addresses and numbers; each class that ``rules.py`` writes, but for
those in NOTHING_LOST, must be missed by some scenario when it is taken away.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from kubeproxy_py.iptables import chains
from kubeproxy_py.iptables.chains import Tables
from kubeproxy_py.model import IPFamily
from tests.support import flows, scenario
from tests.support.scenario import Rules, Scenario
from tests.support.scenarios import ALL, SCENARIOS

#: (table, chain, rule) → the rule to have instead; None: none.
Edit = Callable[[str, str, str], str | None]

_IP: Final = r"(?:\d+(?:\.\d+){3}|(?=[0-9a-f]*:[0-9a-f:]*)[0-9a-f:]+)"
_WITHOUT: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (re.compile(r"-[A-Z2-7]{16}\b"), "-*"),  # hashes of chains
    (re.compile(r"\bdefault/web(?::\w+)?"), "*"),
    (re.compile(rf"(?<= -[sd] ){_IP}/(?:32|128)\b"), "IP"),
    (re.compile(rf"(?<= -[sd] ){_IP}/\d+"), "CIDR"),
    (re.compile(rf"(?<=> )(?:{_IP}|\[{_IP}\]):\d+"), "IP:PORT"),
    (re.compile(rf"(?<=--to-destination )(?:{_IP}|\[{_IP}\]):\d+"), "IP:PORT"),
    (re.compile(r"-([mp]) (?:tcp|udp|sctp)\b"), r"-\1 PROTOCOL"),
    (re.compile(r"(--dport|--seconds|--probability|--mask) \S+"), r"\1 N"),
    (re.compile(r"(?<=mark )0x[1-9]\d*/0x0\b"), "MARK/0"),
    (re.compile(r"(?<=mark )0x[1-9]\d*/0x[1-9]\d*"), "MARK/MARK"),
    (re.compile(r"icmp6?-port"), "icmp-port"),
)

#: Classes that may be missing without a packet's fate being another, and why.
NOTHING_LOST: Final[Mapping[str, str]] = {
    'nat KUBE-FW-* -m comment --comment "other traffic to * will be dropped by KUBE-PROXY-FIREWALL"':
        "a comment for people",
    'nat KUBE-NODEPORTS -d CIDR -p PROTOCOL -m comment --comment "*" -m PROTOCOL --dport N'
    " -m nfacct --nfacct-name localhost_nps_accepted_pkts -j KUBE-EXT-*":
        "counts; the rule behind it does the same without counting",
    "nat KUBE-POSTROUTING -j MARK --set-xmark MARK/0":
        "clears the mark for a packet that an overlay lets through here a second time",
    "filter OUTPUT -j KUBE-FIREWALL":
        "what it drops comes back by lo, and is dropped in INPUT",
}  # fmt: skip


def rule_class(table: str, chain: str, rule: str) -> str:
    """Return what a rule has in common with its like, e.g. ``nat KUBE-SEP-* -s IP ... -j ...``."""
    text = f"{table} {chain} {rule}"
    for pattern, stand_in in _WITHOUT:
        text = pattern.sub(stand_in, text)
    return text


def classes(tables: Tables) -> set[str]:
    """Return the classes of all rules of ours: in our chains, and the jumps to them."""
    return {rule_class(*where) for where in _own_rules(tables)}


def _own_rules(tables: Tables) -> Iterator[tuple[str, str, str]]:
    for table, found in tables.items():
        for chain, texts in found.items():
            for text in texts:
                if chain not in chains.BUILTIN or "KUBE-" in text:
                    yield table, chain, text


def edited(tables: Tables, edit: Edit) -> Tables:
    """Return *tables* with *edit* applied to every rule."""
    return {
        table: {
            chain: tuple(new for text in texts if (new := edit(table, chain, text)) is not None)
            for chain, texts in found.items()
        }
        for table, found in tables.items()
    }


def without(unwanted: str) -> Edit:
    """Return the edit that takes a class away."""
    return lambda table, chain, rule: None if rule_class(table, chain, rule) == unwanted else rule


def _replace(pattern: str, replacement: str) -> Edit:
    found = re.compile(pattern)
    return lambda _table, _chain, rule: found.sub(replacement, rule)


#: Rules that are there and say something else, by what went wrong.
MISTAKES: Final[Mapping[str, Edit]] = {
    "DROP where REJECT is meant": _replace(r"REJECT --reject-with \S+", "DROP"),
    "REJECT where DROP is meant": _replace(
        r'("[^"]*(?:no local endpoints|not accepted by)[^"]*".*)-j DROP', r"\1-j REJECT"
    ),
    "an affinity that is not remembered": _replace(r"-m recent --set .*--rsource ", ""),
    "an affinity that is not looked up": lambda _table, _chain, rule: (
        None if "--rcheck" in rule else rule
    ),
    "a masquerade mark that is another one": _replace(
        r"-j MARK --set-xmark 0x4000/0x4000", "-j MARK --set-xmark 0x8000/0x8000"
    ),
    "local pods taken for strangers": _replace(r"! (-[si] \S+) ", r"\1 "),
    "a DNAT to another port": _replace(r"(--to-destination \S+:80)\b", r"\g<1>80"),
}


def damages() -> dict[str, Edit]:
    """Return every edit that some scenario must notice, by what it does."""
    present = {
        found for case in ALL for found in classes(scenario.build(case).tables)
    } - NOTHING_LOST.keys()
    lost = {f"without {name}": without(name) for name in sorted(present)}
    return {**lost, **MISTAKES}


def noticing(edit: Edit, family: IPFamily) -> Iterator[tuple[Scenario, Rules]]:
    """Yield the scenarios that fail on the tracer, of *family* first, with their damaged rules."""
    for case in (*SCENARIOS[family].values(), *ALL):
        rules = scenario.build(case)
        tables = edited(rules.tables, edit)
        if tables != rules.tables and flows.trace_all(case, tables):
            yield case, Rules((scenario.render(tables),), tables)
