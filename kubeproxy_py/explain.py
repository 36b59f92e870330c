"""
Walks a packet through chains and says what becomes of it, and which rules decide that.

Pure: the same rules, packet and facts give the same answer, for desired rules and for live ones. At
every random choice the walk goes both ways, so the probabilities are exact and sum to 1. A foreign
rule that is not understood is taken as one that does not match, and is named in ``Trace.warnings``.

The way of a packet, as in the kernel:

    in ─▶ PREROUTING ─▶ local? ──▶ INPUT ─▶ a process here ─▶ OUTPUT ─▶ POSTROUTING ─▶ out
                          └─▶ FORWARD ─▶ POSTROUTING ─▶ out      (or by lo to PREROUTING again)

nat is asked only for the first packet of a connection, and once for each half of its translation.
"""

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Final, Literal

import msgspec

from kubeproxy_py import rules
from kubeproxy_py.explain_match import (
    UNKNOWN_INTERFACE,
    CtState,
    Facts,
    Packet,
    Rule,
    Seen,
    parse_rule,
)
from kubeproxy_py.iptables.chains import Chains, Tables

__all__ = [
    "POLICY",
    "UNKNOWN_INTERFACE",
    "CtState",
    "Facts",
    "Outcome",
    "Packet",
    "Step",
    "Trace",
    "Unknown",
    "Verdict",
    "trace",
    "with_jumps",
]

Verdict = Literal["delivered", "accepted", "rejected", "dropped"]
#: The end of the way; "accept": the end of the table; None: the next rule.
_Decision = Verdict | Literal["accept"] | None

#: Tables in the order in which a hook asks them.
_TABLES_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "PREROUTING": ("raw", "mangle", "nat"),
    "INPUT": ("mangle", "filter", "nat"),
    "FORWARD": ("mangle", "filter"),
    "OUTPUT": ("raw", "mangle", "nat", "filter"),
    "POSTROUTING": ("mangle", "nat"),
}
#: Stands for a rule at the end of a built-in chain; no rule can be this text.
POLICY: Final = "policy"
#: Targets that look at a packet and let it go on.
_ONLOOKERS: Final = frozenset({"", "LOG", "NFLOG", "TRACE"})


class Step(msgspec.Struct, frozen=True):
    """A rule that took the packet."""

    table: str
    hook: str
    chain: str
    rule: str  # as iptables-save prints it, or POLICY
    effect: str  # e.g. "jump KUBE-SERVICES", "mark 0x4000", "dnat 10.0.1.7:8080", "accept"
    depth: int = 0  # how many chains led here from the built-in one


class Unknown(msgspec.Struct, frozen=True):
    """A rule that might have matched, but uses what is not known here."""

    table: str
    chain: str
    rule: str
    word: str  # the match or target concerned


class Outcome(msgspec.Struct, frozen=True):
    """One thing that can become of the packet, and the likeliest way to it."""

    probability: Fraction
    #: "delivered": its destination was rewritten (DNAT) and it passed; "accepted": passed as it was.
    verdict: Verdict
    destination: str
    port: int
    is_masqueraded: bool
    #: What decided: table, chain and comment of the rule.
    reason: str
    dnat_rule: Step | None
    #: The rule that asked for masquerading (its mark), or did it.
    masquerade_rule: Step | None
    #: What dropped or rejected it, or the last that accepted it in a filter table.
    verdict_rule: Step | None
    path: tuple[Step, ...]


class Trace(msgspec.Struct, frozen=True):
    """Everything that can become of a packet; the outcomes' probabilities sum to 1."""

    packet: Packet
    outcomes: tuple[Outcome, ...]
    warnings: tuple[Unknown, ...]


def trace(
    tables: Tables,
    packet: Packet,
    facts: Facts,
    policies: Mapping[tuple[str, str], str] | None = None,
) -> Trace:
    """Walk *packet* through *tables*, in which built-in chains hold the jumps to others.

    *policies* are those of built-in chains, by (table, chain); what is not named accepts.
    """
    walker = _Walker(tables, facts, policies or {})
    outcomes = _merge(walker.outcomes(packet))
    return Trace(packet, outcomes, tuple(walker.unknown))


def with_jumps(tables: Tables) -> Tables:
    """Return desired *tables* with built-in chains that lead to them, as on a host with no others."""
    complete: Tables = {table: dict(found) for table, found in tables.items()}
    # The planner makes it where it is missing; its rules are there only with localhost node ports.
    complete.setdefault(rules.FILTER, {}).setdefault(rules.FIREWALL, ())
    for table, builtin, rule in rules.JUMPS:
        found = complete.setdefault(table, {})
        found[builtin] = (rule, *found.get(builtin, ()))
    return complete


def _merge(outcomes: Iterator[Outcome]) -> tuple[Outcome, ...]:
    """Join outcomes that differ only in their path, which becomes the likeliest one's."""
    groups: dict[tuple[object, ...], list[Outcome]] = {}
    for outcome in outcomes:
        kind = (outcome.verdict, outcome.destination, outcome.port, outcome.is_masqueraded)
        groups.setdefault((*kind, outcome.reason), []).append(outcome)
    return tuple(
        group[0]
        if len(group) == 1
        else msgspec.structs.replace(
            max(group, key=lambda outcome: outcome.probability),
            probability=sum((outcome.probability for outcome in group), Fraction(0)),
        )
        for group in groups.values()
    )


class _Path(msgspec.Struct, frozen=True):
    """A path as its last step and what was before, so that branches share what they have in common."""

    step: Step
    before: "_Path | None"

    def steps(self) -> tuple[Step, ...]:
        found = []
        path: _Path | None = self
        while path is not None:
            found.append(path.step)
            path = path.before
        return tuple(reversed(found))


class _Branch(msgspec.Struct):
    """One way of the packet so far; random choices fork it."""

    weight: Fraction
    seen: Seen
    hook: str
    #: Tables that this hook has yet to ask; the first is being asked.
    tables: tuple[str, ...]
    #: Chains on the way from the built-in one, each with the index of its next rule.
    frames: tuple[tuple[str, int], ...] = ()
    path: _Path | None = None
    is_translated: bool = False  # nat has been asked: conntrack remembers for all that follows
    dnat_rule: Step | None = None
    mark_rule: Step | None = None
    masquerade_rule: Step | None = None
    verdict_rule: Step | None = None

    @property
    def table(self) -> str:
        return self.tables[0]

    @property
    def chain(self) -> str:
        return self.frames[-1][0]

    def step(self, rule: str, effect: str) -> Step:
        step = Step(self.table, self.hook, self.chain, rule, effect, len(self.frames) - 1)
        self.path = _Path(step, self.path)
        return step

    def replace_packet(self, **fields: str | int) -> None:
        packet = msgspec.structs.replace(self.seen.packet, **fields)
        self.seen = msgspec.structs.replace(self.seen, packet=packet)


class _Walker:
    """One question to the rules: made once and thrown away."""

    def __init__(
        self, tables: Tables, facts: Facts, policies: Mapping[tuple[str, str], str]
    ) -> None:
        self._tables = tables
        self._facts = facts
        self._policies = policies
        self._pending: list[_Branch] = []
        #: In the order found, each once.
        self.unknown: dict[Unknown, None] = {}

    def outcomes(self, packet: Packet) -> Iterator[Outcome]:
        hook = "PREROUTING" if packet.in_interface else "OUTPUT"
        seen = Seen(packet, self._facts)
        first = _Branch(Fraction(1), seen, hook, ())
        self._enter(first, hook)
        self._pending.append(first)
        while self._pending:
            yield self._follow(self._pending.pop())

    # From hook to hook ---------------------------------------------------------------------------

    def _enter(self, branch: _Branch, hook: str) -> None:
        branch.hook = hook
        packet = branch.seen.packet
        if not packet.in_interface:
            # Where it leaves follows from where it goes, which OUTPUT may change.
            if self._facts.is_local(packet.destination):
                branch.replace_packet(out_interface="lo")
            elif packet.out_interface == "lo":
                branch.replace_packet(out_interface="")
        branch.tables = tuple(
            table
            for table in _TABLES_OF[hook]
            if table != rules.NAT or (packet.ctstate == "NEW" and not branch.is_translated)
        )
        branch.frames = ((hook, 0),)

    def _next_table(self, branch: _Branch) -> bool:
        """Go on to the next table or hook; tell whether there is one."""
        branch.tables = branch.tables[1:]
        branch.frames = ((branch.hook, 0),)
        if branch.tables:
            return True
        packet = branch.seen.packet
        is_for_here = self._facts.is_local(packet.destination)
        if branch.hook == "PREROUTING":
            self._enter(branch, "INPUT" if is_for_here else "FORWARD")
            return True
        if branch.hook in {"FORWARD", "OUTPUT"}:
            self._enter(branch, "POSTROUTING")
            return True
        if branch.hook == "POSTROUTING" and not packet.in_interface and is_for_here:
            # It comes back by lo, its translation chosen. What address MASQUERADE gave it is not
            # known here; it is one of this host's, as the one it has is.
            branch.is_translated = True
            branch.replace_packet(in_interface="lo", out_interface="")
            self._enter(branch, "PREROUTING")
            return True
        return False

    def _follow(self, branch: _Branch) -> Outcome:
        """Take *branch* to its end; what it forks on the way is pending then."""
        while True:
            verdict = self._ask_table(branch)
            if verdict is not None:
                return _outcome(branch, verdict)
            if not self._next_table(branch):
                return _outcome(branch, "delivered" if branch.dnat_rule else "accepted")

    # Through one table ---------------------------------------------------------------------------

    def _ask_table(self, branch: _Branch) -> Verdict | None:
        """Return what the table decides: an end of the way, or None to go on after it."""
        chains = self._tables.get(branch.table, {})
        while branch.frames:
            chain, index = branch.frames[-1]
            texts = chains.get(chain, ())
            if index >= len(texts):
                branch.frames = branch.frames[:-1]
                continue
            branch.frames = (*branch.frames[:-1], (chain, index + 1))
            if not self._takes(branch, chains, texts[index]):
                continue
            decided = self._apply(branch, chains, texts[index])
            if decided == "accept":
                return None
            if decided is not None:
                return decided
        policy = self._policies.get((branch.table, branch.hook), "ACCEPT")
        if policy == "DROP":
            branch.frames = ((branch.hook, 0),)
            branch.verdict_rule = branch.step(POLICY, "drop")
            return "dropped"
        return None

    def _takes(self, branch: _Branch, chains: Chains, text: str) -> bool:
        """Tell whether the rule takes the packet; leave a branch for the chance that it does not."""
        rule = parse_rule(text)
        answer, word = rule.judge(branch.seen)
        if answer is False:
            return False
        if answer is True:
            word = self._unknown_target(branch, chains, rule)
        if word:
            self.unknown[Unknown(branch.table, branch.chain, text, word)] = None
            return False
        if rule.chance < 1:
            # Before this branch records anything: the other one does not know of the rule.
            if rule.chance == 0:
                return False
            other = msgspec.structs.replace(branch, weight=branch.weight * (1 - rule.chance))
            self._pending.append(other)
            branch.weight *= rule.chance
        return True

    def _unknown_target(self, branch: _Branch, chains: Chains, rule: Rule) -> str:
        flag = "-g" if rule.is_goto else "-j"
        if rule.target in chains:
            # The kernel refuses loops; rules from elsewhere may have them.
            is_loop = any(chain == rule.target for chain, _ in branch.frames)
            return f"{flag} {rule.target} (a loop)" if is_loop else ""
        is_known = rule.target in _ONLOOKERS or rule.target in _EFFECTS
        return "" if is_known and not rule.is_goto else f"{flag} {rule.target}"

    def _apply(self, branch: _Branch, chains: Chains, text: str) -> _Decision:
        rule = parse_rule(text)
        if rule.target in chains:
            branch.step(text, f"{'goto' if rule.is_goto else 'jump'} {rule.target}")
            # After a goto the chain's end is this one's end, too.
            kept = branch.frames[:-1] if rule.is_goto else branch.frames
            branch.frames = (*kept, (rule.target, 0))
            return None
        if rule.target in _ONLOOKERS:
            branch.step(text, rule.target.lower() or "count")
            return None
        return _EFFECTS[rule.target](branch, rule, text)


# What targets do --------------------------------------------------------------------------------


def _accept(branch: _Branch, _: Rule, text: str) -> _Decision:
    step = branch.step(text, "accept")
    if branch.table == rules.FILTER:
        branch.verdict_rule = step
    return "accept"


def _drop(branch: _Branch, _: Rule, text: str) -> _Decision:
    branch.verdict_rule = branch.step(text, "drop")
    return "dropped"


def _reject(branch: _Branch, _: Rule, text: str) -> _Decision:
    branch.verdict_rule = branch.step(text, "reject")
    return "rejected"


def _return(branch: _Branch, _: Rule, text: str) -> _Decision:
    branch.step(text, "return")
    branch.frames = branch.frames[:-1]
    return None


def _set_mark(branch: _Branch, rule: Rule, text: str) -> _Decision:
    assert rule.change_mark is not None  # the parser takes no MARK without one
    old = branch.seen.packet.mark
    mark = rule.change_mark(old)
    # Whoever jumped here wanted the mark: that rule, not this one, says why.
    caller = branch.path.step if branch.path is not None else None
    step = branch.step(text, f"mark {mark:#x}")
    if mark & ~old:
        is_called = caller is not None and caller.effect == f"jump {branch.chain}"
        branch.mark_rule = caller if is_called else step
    branch.replace_packet(mark=mark)
    return None


def _dnat(branch: _Branch, rule: Rule, text: str) -> _Decision:
    packet = branch.seen.packet
    ip = rule.nat_to.ip or packet.destination
    port = rule.nat_to.port or packet.destination_port
    branch.dnat_rule = branch.step(text, f"dnat {_address_text(ip, port)}")
    # conntrack notes only what makes a difference.
    if (ip, port) != (packet.destination, packet.destination_port):
        branch.seen = msgspec.structs.replace(branch.seen, is_dnated=True)
    branch.replace_packet(destination=ip, destination_port=port)
    return "accept"


def _snat(branch: _Branch, rule: Rule, text: str) -> _Decision:
    branch.masquerade_rule = branch.step(text, f"snat {rule.nat_to.ip}")
    branch.seen = msgspec.structs.replace(branch.seen, is_snated=True)
    branch.replace_packet(source=rule.nat_to.ip or branch.seen.packet.source)
    return "accept"


def _masquerade(branch: _Branch, _: Rule, text: str) -> _Decision:
    step = branch.step(text, "masquerade")
    # Only in this chain does the mark mean it; a CNI plugin's own rule has its own reasons.
    asked_by = branch.mark_rule if branch.chain == rules.POSTROUTING else None
    branch.masquerade_rule = asked_by or step
    branch.seen = msgspec.structs.replace(branch.seen, is_snated=True)
    return "accept"


_EFFECTS: Final[Mapping[str, Callable[[_Branch, Rule, str], _Decision]]] = {
    "ACCEPT": _accept,
    "DROP": _drop,
    "REJECT": _reject,
    "RETURN": _return,
    "MARK": _set_mark,
    "DNAT": _dnat,
    "SNAT": _snat,
    "MASQUERADE": _masquerade,
}


def _outcome(branch: _Branch, verdict: Verdict) -> Outcome:
    packet = branch.seen.packet
    return Outcome(
        probability=branch.weight,
        verdict=verdict,
        destination=packet.destination,
        port=packet.destination_port,
        is_masqueraded=branch.masquerade_rule is not None,
        reason=_reason(branch, verdict),
        dnat_rule=branch.dnat_rule,
        masquerade_rule=branch.masquerade_rule,
        verdict_rule=branch.verdict_rule,
        path=branch.path.steps() if branch.path else (),
    )


def _reason(branch: _Branch, verdict: Verdict) -> str:
    decisive = branch.dnat_rule if verdict == "delivered" else branch.verdict_rule
    if decisive is None:
        return "no rule changes its destination or refuses it"
    where = f"{decisive.table} {decisive.chain}"
    if decisive.rule == POLICY:
        return f"policy of {where}"
    comment = parse_rule(decisive.rule).comment
    return f"{where}: {comment}" if comment else where


def _address_text(ip: str, port: int) -> str:
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
