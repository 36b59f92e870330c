"""
The text of one rule → what it asks of a packet and what it does to it.

Pure. It understands the matches and targets that kube-proxy writes and the plain ones of others.
What it does not understand it says so of: an answer is yes, no, or "cannot be told", never a guess.
"""

import functools
import ipaddress
import re
from collections.abc import Callable, Collection, Mapping
from fractions import Fraction
from typing import Final, Literal, NamedTuple

import msgspec

CtState = Literal["NEW", "ESTABLISHED", "RELATED", "INVALID", "UNTRACKED"]

#: The in-interface of a packet that came from outside by an interface nobody stated.
UNKNOWN_INTERFACE: Final = "?"


class Packet(msgspec.Struct, frozen=True, kw_only=True):
    """A packet as it begins its way through a host. Addresses are canonical text."""

    source: str
    destination: str
    protocol: str = "tcp"
    source_port: int = 0  # 0: not stated
    destination_port: int = 0
    in_interface: str = ""  # "": generated on this host; UNKNOWN_INTERFACE: arrived somewhere
    out_interface: str = ""  # "": not stated
    ctstate: CtState = "NEW"
    mark: int = 0


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What rules ask of the host."""

    #: Addresses of its interfaces; 127.0.0.0/8 and ::1 are local without being named.
    local_addresses: frozenset[str] = frozenset()
    #: Lists of ``-m recent`` by name: the addresses in each that have not expired.
    recent: Mapping[str, Collection[str]] = {}

    def is_local(self, ip: str) -> bool:
        """Tell whether the host takes packets to *ip* as its own."""
        return ip in self.local_addresses or _address(ip).is_loopback


class Seen(msgspec.Struct, frozen=True):
    """A packet as a rule sees it on its way: as it is by then, and what conntrack has noted."""

    packet: Packet
    facts: Facts
    is_dnated: bool = False
    is_snated: bool = False


#: True, False, or None: cannot be told.
Answer = bool | None
Check = Callable[[Seen], Answer]


class Condition(NamedTuple):
    """One thing a rule asks of a packet, and its words in the rule."""

    text: str
    check: Check
    is_negated: bool = False

    def holds(self, seen: Seen) -> Answer:
        answer = self.check(seen)
        return None if answer is None else answer != self.is_negated


class Destination(NamedTuple):
    """Where NAT sends something; "" and 0 leave the address or port as it is."""

    ip: str
    port: int


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """A rule, understood as far as it can be."""

    conditions: tuple[Condition, ...]
    #: Share of the packets that pass all conditions that the rule takes.
    chance: Fraction
    target: str  # "": the rule only counts
    is_goto: bool
    comment: str
    #: Arguments of matches by option as written: "-s", "! -s", "--dport".
    values: Mapping[str, str]
    change_mark: Callable[[int], int] | None
    nat_to: Destination

    def judge(self, seen: Seen) -> tuple[Answer, str]:
        """Tell whether all conditions hold, and in which words it cannot be told."""
        unknown: list[str] = []
        for condition in self.conditions:
            answer = condition.holds(seen)
            if answer is False:
                return False, ""
            if answer is None:
                unknown.append(condition.text)
        return (None, " ".join(unknown)) if unknown else (True, "")


@functools.lru_cache(maxsize=1 << 15)  # the shared chains of a big node, which every packet passes
def parse_rule(text: str) -> Rule:
    """Parse a rule as ``iptables-save`` prints it, without ``-A CHAIN``."""
    return _Parser(text).parse()


# Words -------------------------------------------------------------------------------------------

_WORD: Final = re.compile(r'"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<bare>\S+)')


class _Word(NamedTuple):
    text: str
    is_quoted: bool

    @property
    def begins_option(self) -> bool:
        return not self.is_quoted and (self.text == "!" or self.text.startswith("-"))


def _words(text: str) -> list[_Word]:
    return [
        _Word(found["bare"], False)
        if found["quoted"] is None
        else _Word(re.sub(r"\\(.)", r"\1", found["quoted"]), True)
        for found in _WORD.finditer(text)
    ]


class _Parser:
    """Reads one rule from left to right; made once and thrown away."""

    def __init__(self, text: str) -> None:
        self._words = _words(text)
        self._at = 0
        self._conditions: list[Condition] = []
        self._values: dict[str, str] = {}
        self._chance = Fraction(1)
        self._target = ""
        self._is_goto = False
        self._comment = ""
        self._change_mark: Callable[[int], int] | None = None
        self._nat_to = Destination("", 0)

    def parse(self) -> Rule:
        module = ""
        is_negated = False
        while self._at < len(self._words):
            option = self._take()
            if option == "!":
                is_negated = True
                continue
            if option == "-m":
                module = self._take()
                self._module(module)
            elif option in {"-j", "-g"}:
                self._target, self._is_goto = self._take(), option == "-g"
                self._target_options()
            elif option in _HEADER:
                argument = self._take()
                self._add(option, argument, _HEADER[option], is_negated=is_negated)
            else:
                self._module_option(module, option, is_negated=is_negated)
            is_negated = False
        return Rule(
            conditions=tuple(self._conditions),
            chance=self._chance,
            target=self._target,
            is_goto=self._is_goto,
            comment=self._comment,
            values=self._values,
            change_mark=self._change_mark,
            nat_to=self._nat_to,
        )

    def _take(self) -> str:
        """Return the next word; "" where the rule ends too early, which no check accepts."""
        word = self._words[self._at].text if self._at < len(self._words) else ""
        self._at += 1
        return word

    def _take_arguments(self) -> list[str]:
        """Return the words up to the next option: what one of unknown arity may have."""
        taken = []
        while self._at < len(self._words) and not self._words[self._at].begins_option:
            taken.append(self._take())
        return taken

    def _add(
        self, option: str, argument: str, make: Callable[[str], Check], *, is_negated: bool
    ) -> None:
        text = f"{'! ' if is_negated else ''}{option} {argument}"
        try:
            check = make(argument)
        except ValueError:
            check = _cannot_tell
        self._conditions.append(Condition(text, check, is_negated))
        self._values[f"{'! ' if is_negated else ''}{option}"] = argument

    def _unknown(self, text: str) -> None:
        self._conditions.append(Condition(text, _cannot_tell))

    # Matches

    def _module(self, name: str) -> None:
        if name == "recent":
            self._recent()
        elif name == "statistic":
            self._statistic()
        elif name not in _MODULES:
            self._unknown(f"-m {name}")

    def _module_option(self, module: str, option: str, *, is_negated: bool) -> None:
        make = _MODULES.get(module, {}).get(option)
        if make is None:
            arguments = self._take_arguments()
            # Of an unknown module the name has been noted already.
            if module in _MODULES or not module:
                words = ["-m", module] if module else []
                negation = ["!"] if is_negated else []
                self._unknown(" ".join([*words, *negation, option, *arguments]))
            return
        argument = self._take()
        if module == "comment":
            self._comment = argument
        else:
            self._add(option, argument, make, is_negated=is_negated)

    def _options(self) -> list[tuple[bool, str, list[str]]]:
        """Take what follows up to the next -m, -j or -g, as (is negated, option, arguments)."""
        found = []
        while self._at < len(self._words) and self._words[self._at].text not in _NEW_PART:
            is_negated = self._words[self._at].text == "!"
            self._at += is_negated
            option = self._take()
            found.append((is_negated, option, self._take_arguments()))
        return found

    def _recent(self) -> None:
        """Read all of ``-m recent``: its options mean something only together."""
        options = self._options()
        by_name = {option: arguments for _, option, arguments in options}
        said = " ".join(" ".join([option, *arguments]) for _, option, arguments in options)
        text = f"-m recent {said}"
        actions = [
            (option, is_negated) for is_negated, option, _ in options if option in _RECENT_ACTIONS
        ]
        if len(actions) != 1 or by_name.keys() - _RECENT_ACTIONS - _RECENT_DETAILS:
            self._unknown(text)
            return
        action, is_negated = actions[0]
        name = " ".join(by_name.get("--name", ["DEFAULT"]))
        by_destination = "--rdest" in by_name
        try:
            prefix = _prefix_length(*by_name.get("--mask", ()))
        except ValueError:
            self._unknown(text)
            return
        check = _always if action == "--set" else _in_recent(name, prefix, by_destination)
        self._conditions.append(Condition(text, check, is_negated))

    def _statistic(self) -> None:
        options = self._options()
        by_name = {option: arguments for _, option, arguments in options}
        mode, probability = by_name.get("--mode"), by_name.get("--probability", [])
        if mode == ["random"] and len(by_name) == len(probability) + 1 == 2:
            chance = _probability(probability[0])
            is_negated = any(negated for negated, _, _ in options)
            self._chance *= 1 - chance if is_negated else chance
        else:
            said = " ".join(" ".join([option, *arguments]) for _, option, arguments in options)
            self._unknown(f"-m statistic {said}")

    # Targets

    def _target_options(self) -> None:
        options = [(option, " ".join(arguments)) for _, option, arguments in self._options()]
        try:
            if self._target == "MARK":
                (name, argument), *_ = options
                self._change_mark = _MARK_CHANGES[name](*_value_and_mask(argument))
            elif self._target in {"DNAT", "SNAT"}:
                wanted = "--to-destination" if self._target == "DNAT" else "--to-source"
                self._nat_to = _nat_to(dict(options)[wanted])
        except (ValueError, KeyError):
            said = " ".join(" ".join(filter(None, option)) for option in options)
            self._unknown(f"-j {self._target} {said}".rstrip())


# Checks ------------------------------------------------------------------------------------------


def _cannot_tell(_: Seen) -> Answer:
    return None


def _always(_: Seen) -> Answer:
    return True


@functools.lru_cache(maxsize=1024)  # a packet has two, asked for by every rule of a chain
def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(text)


def _source(argument: str) -> Check:
    network = ipaddress.ip_network(argument)
    return lambda seen: _address(seen.packet.source) in network


def _destination(argument: str) -> Check:
    network = ipaddress.ip_network(argument)
    return lambda seen: _address(seen.packet.destination) in network


def _interface(argument: str, name: Callable[[Seen], str], unknown: str) -> Check:
    prefix = argument[:-1] if argument.endswith("+") else None

    def check(seen: Seen) -> Answer:
        found = name(seen)
        if found == unknown:
            return None
        return found == argument if prefix is None else found.startswith(prefix)

    return check


def _in_interface(argument: str) -> Check:
    # A packet generated here has none: the kernel compares with an empty name.
    return _interface(argument, lambda seen: seen.packet.in_interface, UNKNOWN_INTERFACE)


def _out_interface(argument: str) -> Check:
    return _interface(argument, lambda seen: seen.packet.out_interface, "")


_PROTOCOL_NUMBERS: Final = {"1": "icmp", "6": "tcp", "17": "udp", "58": "ipv6-icmp", "132": "sctp"}


def _protocol(argument: str) -> Check:
    wanted = _PROTOCOL_NUMBERS.get(argument, argument)
    if wanted in {"all", "0"}:
        return _always
    return lambda seen: seen.packet.protocol == wanted


def _ports(argument: str) -> list[range]:
    """Parse ``80``, ``80:90``, ``:90``, ``80:`` and comma-separated lists of them."""
    ranges = []
    for item in argument.split(","):
        low, colon, high = item.partition(":")
        first = int(low) if low or not colon else 0
        last = int(high or 65535) if colon else first
        ranges.append(range(first, last + 1))
    return ranges


def _destination_port(argument: str) -> Check:
    ranges = _ports(argument)
    return lambda seen: any(seen.packet.destination_port in ports for ports in ranges)


def _source_port(argument: str) -> Check:
    ranges = _ports(argument)

    def check(seen: Seen) -> Answer:
        if not seen.packet.source_port:
            return None
        return any(seen.packet.source_port in ports for ports in ranges)

    return check


def _either_port(argument: str) -> Check:
    source, destination = _source_port(argument), _destination_port(argument)
    return lambda seen: destination(seen) or source(seen)


_CTSTATES: Final = frozenset({"NEW", "ESTABLISHED", "RELATED", "INVALID", "UNTRACKED"})


def _ctstate(argument: str) -> Check:
    wanted = frozenset(argument.split(","))
    if wanted - _CTSTATES - {"DNAT", "SNAT"}:
        raise ValueError

    def check(seen: Seen) -> Answer:
        return (
            seen.packet.ctstate in wanted
            or (seen.is_dnated and "DNAT" in wanted)
            or (seen.is_snated and "SNAT" in wanted)
        )

    return check


def _mark(argument: str) -> Check:
    value, mask = _value_and_mask(argument)
    return lambda seen: seen.packet.mark & mask == value


def _address_type(argument: str, ip: Callable[[Seen], str]) -> Check:
    if argument != "LOCAL":
        raise ValueError  # others follow from routes, which are not known here
    return lambda seen: seen.facts.is_local(ip(seen))


def _source_type(argument: str) -> Check:
    return _address_type(argument, lambda seen: seen.packet.source)


def _destination_type(argument: str) -> Check:
    return _address_type(argument, lambda seen: seen.packet.destination)


def _in_recent(name: str, prefix: int | None, by_destination: bool) -> Check:
    def check(seen: Seen) -> Answer:
        ip = seen.packet.destination if by_destination else seen.packet.source
        length = _address(ip).max_prefixlen if prefix is None else prefix
        network = ipaddress.ip_network((ip, length), strict=False)
        # The kernel masks an address before it looks for it and before it adds it.
        return any(_address(known) in network for known in seen.facts.recent.get(name, ()))

    return check


_HEADER: Final[Mapping[str, Callable[[str], Check]]] = {
    "-s": _source,
    "-d": _destination,
    "-i": _in_interface,
    "-o": _out_interface,
    "-p": _protocol,
}

_PORT_OPTIONS: Final = {"--dport": _destination_port, "--sport": _source_port}

_MODULES: Final[Mapping[str, Mapping[str, Callable[[str], Check]]]] = {
    "tcp": _PORT_OPTIONS,
    "udp": _PORT_OPTIONS,
    "sctp": _PORT_OPTIONS,
    "multiport": {
        "--dports": _destination_port,
        "--sports": _source_port,
        "--ports": _either_port,
    },
    "conntrack": {"--ctstate": _ctstate},
    "state": {"--state": _ctstate},
    "mark": {"--mark": _mark},
    "addrtype": {"--src-type": _source_type, "--dst-type": _destination_type},
    # A counter in the kernel; as a match it always holds.
    "nfacct": {"--nfacct-name": lambda _: _always},
    "comment": {"--comment": lambda _: _always},
}

_NEW_PART: Final = frozenset({"-m", "-j", "-g"})
_RECENT_ACTIONS: Final = frozenset({"--rcheck", "--update", "--set"})
# What has expired is not in the given lists, so the times need no looking at.
_RECENT_DETAILS: Final = frozenset(
    {"--name", "--seconds", "--reap", "--mask", "--rsource", "--rdest"}
)


# Values ------------------------------------------------------------------------------------------

#: A mark has 32 bits.
_ALL_BITS: Final = 0xFFFFFFFF
# The kernel keeps a probability as a 31-bit fixed-point number and compares 31 random bits with it.
_PROBABILITY_ONE: Final = 1 << 31


def _value_and_mask(argument: str) -> tuple[int, int]:
    value, slash, mask = argument.partition("/")
    return int(value, 0), int(mask, 0) if slash else _ALL_BITS


def _probability(text: str) -> Fraction:
    return Fraction(round(float(text) * _PROBABILITY_ONE), _PROBABILITY_ONE)


def _prefix_length(mask: str = "") -> int | None:
    """Return the length of a netmask's prefix, None for no mask. Raises ValueError for holes in it."""
    if not mask:
        return None
    bits = int(_address(mask))
    width = _address(mask).max_prefixlen
    length = bits.bit_count()
    if bits != ((1 << length) - 1) << (width - length):
        raise ValueError
    return length


_MARK_CHANGES: Final[Mapping[str, Callable[[int, int], Callable[[int], int]]]] = {
    "--set-xmark": lambda value, mask: lambda mark: (mark & ~mask) ^ value,
    "--set-mark": lambda value, mask: lambda mark: (mark & ~mask) | value,
    "--or-mark": lambda value, _: lambda mark: mark | value,
    "--and-mark": lambda value, _: lambda mark: mark & value,
    "--xor-mark": lambda value, _: lambda mark: mark ^ value,
}

_NAT_TO: Final = re.compile(r"(?:\[(?P<v6>[^]]*)\]|(?P<ip>[^:]*))(?::(?P<port>\d+))?")


def _nat_to(argument: str) -> Destination:
    """Parse ``IP``, ``IP:PORT``, ``[IP]:PORT`` or ``:PORT``. Raises ValueError for ranges."""
    found = _NAT_TO.fullmatch(argument)
    if found is None:
        # A bare IPv6 address.
        return Destination(str(ipaddress.IPv6Address(argument)), 0)
    ip = found["v6"] or found["ip"]
    return Destination(str(_address(ip)) if ip else "", int(found["port"] or 0))
