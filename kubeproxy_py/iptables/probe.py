"""
What the kernel and the programs of one family can do: written, read back and compared before all else.

Rules are written to a chain that nothing leads to, so no packet ever meets them, and the chain is
removed again. A crash in between leaves it to the next look at the kernel: its name is one of ours.
The invariant: what reads back with another meaning than it was written with is never used. (Versions
of iptables-nft that do not know each other's way to write a mark match have turned "drop what is
marked" into "drop everything": kubernetes/kubernetes#112477.)
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Protocol

import msgspec

from kubeproxy_py import rules
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.errors import BatchRejected, IptablesError, LockTimeout
from kubeproxy_py.iptables.chains import PROBE
from kubeproxy_py.model import IPFamily


class Capability(msgspec.Struct, frozen=True, kw_only=True):
    """Something that our rules need of the kernel and of iptables."""

    name: str
    #: What becomes of Services without it.
    consequence: str
    #: Without it, no Service can be programmed at all.
    is_required: bool = False
    table: str = rules.MANGLE
    v4: str
    v6: str = ""  # "" where it reads as for IPv4

    def rule(self, family: IPFamily) -> str:
        return self.v6 if self.v6 and family is IPFamily.V6 else self.v4


_NOTHING: Final = "no Service can be programmed"

#: Matches are tried in mangle, where there is little else: legacy reads and writes whole tables.
CAPABILITIES: Final = (
    Capability(
        name="comment", is_required=True, consequence=_NOTHING,
        v4='-m comment --comment "kubernetes probe" -j RETURN',
    ),
    Capability(
        name="conntrack", is_required=True, consequence=_NOTHING,
        v4="-m conntrack --ctstate RELATED,ESTABLISHED -j RETURN",
    ),
    Capability(
        name="mark", is_required=True, consequence=_NOTHING,
        v4="-m mark ! --mark 0x4000/0x4000 -j RETURN",
    ),
    Capability(
        name="addrtype", is_required=True, consequence=_NOTHING,
        v4="-m addrtype --dst-type LOCAL -j RETURN",
    ),
    Capability(
        name="MARK", is_required=True, consequence=_NOTHING,
        v4="-j MARK --set-xmark 0x4000/0x4000",
    ),
    Capability(
        name="DNAT", is_required=True, consequence=_NOTHING, table=rules.NAT,
        v4="-p tcp -m tcp -j DNAT --to-destination 192.0.2.1:80",
        v6="-p tcp -m tcp -j DNAT --to-destination [2001:db8::1]:80",
    ),
    Capability(
        name="MASQUERADE", is_required=True, consequence=_NOTHING, table=rules.NAT,
        v4="-j MASQUERADE",
    ),
    Capability(
        name="random-fully", table=rules.NAT,
        consequence="source ports of masqueraded connections are not chosen at random",
        v4="-j MASQUERADE --random-fully",
    ),
    Capability(
        name="statistic",
        consequence="all connections to a Service go to one of its endpoints",
        v4="-m statistic --mode random --probability 0.50000000000 -j RETURN",
    ),
    Capability(
        name="recent",
        consequence="clients do not stay with an endpoint where sessionAffinity asks for it",
        v4=f"-m recent --rcheck --seconds 10 --reap --name {PROBE} --mask 255.255.255.255 --rsource -j RETURN",
        v6=f"-m recent --rcheck --seconds 10 --reap --name {PROBE} --mask {':'.join(['ffff'] * 8)} --rsource -j RETURN",
    ),
    Capability(
        name="sctp",
        consequence="SCTP ports of Services are not programmed",
        v4="-p sctp -m sctp --dport 80 -j RETURN",
    ),
    Capability(
        name="REJECT", table=rules.FILTER,
        consequence="clients of a Service without endpoints wait instead of being refused",
        v4="-j REJECT --reject-with icmp-port-unreachable",
        v6="-j REJECT --reject-with icmp6-port-unreachable",
    ),
    Capability(
        name="nfacct",
        consequence="packets that are dropped as invalid, or come to node ports on loopback, are not counted",
        v4=f"-m nfacct --nfacct-name {rules.INVALID_DROPPED_COUNTER} -j RETURN",
    ),
)  # fmt: skip

# "!" before an option negates it; quoted text is one value.
_WORD: Final = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')
_ALL_BITS: Final = 0xFFFFFFFF
# The kernel keeps a probability in 31 bits.
_PRECISION: Final = 6


class Findings(msgspec.Struct, frozen=True):
    """What a probe of one family has found."""

    family: IPFamily
    #: By name of the capability: in whose words it was refused.
    missing: dict[str, str] = msgspec.field(default_factory=dict)
    #: By name of the capability: what was written, and what it reads back as.
    garbled: dict[str, tuple[str, str]] = msgspec.field(default_factory=dict)

    def has(self, name: str) -> bool:
        return name not in self.missing and name not in self.garbled

    @property
    def lacks(self) -> frozenset[str]:
        return frozenset(self.missing) | frozenset(self.garbled)

    @property
    def refusal(self) -> str:
        """Return why nothing may be written; "" if rules may be."""
        for name, (written, read) in self.garbled.items():
            return (
                f"iptables reads `{written}` back as `{read}` ({name}): another version of it may "
                "have changed the rules of this host, or this one is broken"
            )
        for capability in CAPABILITIES:
            if capability.is_required and capability.name in self.missing:
                said = self.missing[capability.name]
                return f"{capability.consequence} without {capability.name}: {said}"
        return ""


class Kernel(Protocol):
    """What a probe needs of ``runner.Iptables``."""

    @property
    def family(self) -> IPFamily: ...
    def restore(self, text: str) -> None: ...
    def read_chain(self, chain: ChainId) -> tuple[str, ...] | None: ...


def probe(kernel: Kernel, known_missing: Mapping[str, str] | None = None) -> Findings:
    """
    Find out what *kernel* can do, and leave nothing behind.

    Args:
        kernel: one family's.
        known_missing: by name, what need not be tried, and why.

    Raises:
        IptablesError: it could not be found out; LockTimeout where the lock was held.
    """
    missing = dict(known_missing or {})
    left = {found.name: found for found in CAPABILITIES if found.name not in missing}
    try:
        _write(kernel, left, missing)
        garbled = _compare(kernel, left)
    except LockTimeout:
        # The next attempt begins with the same chain; removing it now would mean to wait again.
        raise
    except IptablesError:
        kernel.restore(_removal(left.values()))
        raise
    kernel.restore(_removal(left.values()))
    return Findings(kernel.family, missing, garbled)


def _write(kernel: Kernel, left: dict[str, Capability], missing: dict[str, str]) -> None:
    """Write what is *left*; what is refused goes from there to *missing*."""
    while left:
        text, owners = _render(kernel.family, left.values())
        try:
            kernel.restore(text)
        except BatchRejected as error:
            refused = {owners[line] for line in error.lines if line in owners}
            if not refused:
                # No line is named that could be the one: each for itself, then.
                refused = set(_refused_alone(kernel, left, missing))
                if not refused:
                    raise
            for name in refused:
                missing.setdefault(name, error.reason)
                del left[name]
        else:
            return


def _refused_alone(
    kernel: Kernel, left: Mapping[str, Capability], missing: dict[str, str]
) -> Iterator[str]:
    for name, capability in left.items():
        try:
            kernel.restore(_render(kernel.family, [capability])[0])
        except BatchRejected as error:
            missing[name] = error.reason
            yield name


def _render(family: IPFamily, tried: Iterable[Capability]) -> tuple[str, dict[int, str]]:
    """Return a restore input, and by number of its line whom that is about."""
    lines: list[str] = []
    owners: dict[int, str] = {}
    wanted = list(tried)
    for table in dict.fromkeys(capability.table for capability in wanted):
        lines += [f"*{table}", f":{PROBE} - [0:0]"]
        for capability in wanted:
            if capability.table == table:
                lines.append(f"-A {PROBE} {capability.rule(family)}")
                owners[len(lines)] = capability.name
        lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines), owners


def _removal(written: Iterable[Capability]) -> str:
    tables = dict.fromkeys(capability.table for capability in written)
    return "".join(f"*{table}\n:{PROBE} - [0:0]\n-X {PROBE}\nCOMMIT\n" for table in tables)


def _compare(kernel: Kernel, written: Mapping[str, Capability]) -> dict[str, tuple[str, str]]:
    """Return what reads back with another meaning."""
    garbled: dict[str, tuple[str, str]] = {}
    for table in dict.fromkeys(capability.table for capability in written.values()):
        here = [capability for capability in written.values() if capability.table == table]
        found = kernel.read_chain(ChainId(table, PROBE))
        if found is None:
            raise IptablesError(f"cannot read back chain {PROBE}, which was written to {table}")
        # Where rules are lost, those behind are out of step as well; the first is told.
        texts = [*found, *[""] * len(here)]
        for capability, text in zip(here, texts, strict=False):
            wanted = capability.rule(kernel.family)
            if not means_the_same(wanted, text):
                garbled[capability.name] = wanted, text
    return garbled


def means_the_same(written: str, read: str) -> bool:
    """Tell whether all that *written* asks for is in *read*, whatever the spelling.

    What is read may say more, such as defaults: a rule can only get narrower by that.
    """
    return _options(written) <= _options(read)


def _options(text: str) -> set[tuple[bool, str, object]]:
    """Return the options of a rule, each with whether it is negated and its value."""
    found: list[tuple[bool, str, list[str]]] = []
    is_negated = False
    for word in _WORD.findall(text):
        if word == "!":
            is_negated = True
        elif word.startswith("-"):
            found.append((is_negated, word, []))
            is_negated = False
        elif found:
            found[-1][2].append(word)
    return {(negated, option, _value(" ".join(words))) for negated, option, words in found}


def _value(text: str) -> object:
    """Return what a value means: marks with and without a mask, numbers of any base."""
    number, _, mask = text.partition("/")
    try:
        return int(number, 0), int(mask, 0) if mask else _ALL_BITS
    except ValueError:
        pass
    try:
        return round(float(text), _PRECISION)
    except ValueError:
        return text.strip('"')
