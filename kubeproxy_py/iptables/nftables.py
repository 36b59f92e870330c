"""
What the kernel itself tells of the chains and rules of iptables' nft tables, by netlink.

iptables-nft shows nothing of a chain in which one rule was written by `nft` in words that iptables does
not have. Such a rule is read here as where it leads, which is all that matters to whoever looks for a
jump or for the users of a chain; a jump of ours is read as the rule that it is. Nothing is written but
the removal of rules that were named.
"""

import errno
import re
import struct
from collections.abc import Callable, Collection, Iterator
from typing import Final, NamedTuple, TypeVar

from kubeproxy_py import netlink, rules
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.model import IPFamily

_T = TypeVar("_T")
Opener = Callable[[], netlink.RawSocket]

#: What a rule reads as that only `nft` can show, followed by where it leads; iptables has no such match.
OPAQUE: Final = "-m nft"

# linux/netfilter/nfnetlink.h and nf_tables.h.
_GETTABLE, _GETCHAIN, _GETRULE, _DELRULE = 10 << 8 | 1, 10 << 8 | 4, 10 << 8 | 7, 10 << 8 | 8
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_POLICY = 1, 3, 5
_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE, _RULE_EXPRESSIONS = 1, 2, 3, 4
_EXPR_NAME, _EXPR_DATA = 1, 2
_IMMEDIATE_DATA: Final = 2
_DATA_VERDICT: Final = 2
_VERDICT_CODE, _VERDICT_CHAIN = 1, 2
_VERDICTS: Final = {0: " -j DROP", 1: " -j ACCEPT", -3: " -j ", -4: " -g ", -5: " -j RETURN"}
_POLICIES: Final = {0: "DROP", 1: "ACCEPT"}
_NFGENMSG_BYTES: Final = 4
# What errors say that the kernel was asked for.
_SUBJECT: Final = "chains of nft"
# A batch is for one subsystem, in network byte order.
_OF_NFTABLES: Final = struct.pack(">BBH", 0, 0, 10)
_TABLES: Final = (rules.NAT, rules.FILTER, rules.MANGLE)
# Whoever writes rules while they are listed spoils the list; nobody does all the time.
_ATTEMPTS: Final = 20
# A kernel without nf_tables, or without the family in it, has nothing there.
_NO_NFTABLES: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.EAFNOSUPPORT})
_COMMENT: Final = re.compile(r'--comment "?([^"]+)"?')


def connect() -> netlink.RawSocket:
    """Open a socket that speaks with nf_tables in this network namespace."""
    return netlink.connect(netlink.NETLINK_NETFILTER)


class Chain(NamedTuple):
    """A chain as the kernel has it."""

    policy: str  # "": none, it is not a built-in one
    rules: tuple[str, ...]


class _Rule(NamedTuple):
    handle: bytes
    text: str


def has_table(family: IPFamily, name: str, opener: Opener = connect) -> bool:
    """Tell whether there is a table of that *name*, whoever made it.

    Raises:
        OSError: the kernel does not tell.
    """
    try:
        with netlink.NetlinkSocket(opener(), f"nft table {name}") as sock:
            sock.request(_GETTABLE, _head(family, name))
    except OSError as error:
        if error.errno == errno.ENOENT or error.errno in _NO_NFTABLES:
            return False
        raise
    return True


def chain_names(family: IPFamily, opener: Opener = connect) -> set[ChainId]:
    """Return all chains of nat, filter and mangle.

    Raises:
        OSError: the kernel does not tell.
    """
    try:
        return _undisturbed(lambda: set(_names(family, opener)))
    except OSError as error:
        if error.errno in _NO_NFTABLES:
            return set()
        raise


def read_chain(family: IPFamily, chain: ChainId, opener: Opener = connect) -> Chain | None:
    """Return what can be told of one chain that iptables does not show; None: there is none.

    Raises:
        OSError: the kernel does not tell.
    """
    with netlink.NetlinkSocket(opener(), _SUBJECT) as sock:
        name = netlink.attribute(_CHAIN_NAME, _text(chain.chain))
        try:
            answers = sock.request(_GETCHAIN, _head(family, chain.table) + name)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
    parts = dict(netlink.attributes(memoryview(answers[0])[_NFGENMSG_BYTES:])) if answers else {}
    policy = int.from_bytes(parts.get(_CHAIN_POLICY, b"\xff"), "big")
    return Chain(
        _POLICIES.get(policy, ""), tuple(rule.text for rule in _read_rules(family, chain, opener))
    )


def remove_rules(
    family: IPFamily, chain: ChainId, texts: Collection[str], opener: Opener = connect
) -> None:
    """Remove the rules of a chain that ``read_chain`` gives as one of *texts*; all or none.

    By their handles: iptables compares rule by rule, and fails at the first one that it cannot show.

    Raises:
        OSError: the kernel refused, or another program was faster.
    """
    handles = [rule.handle for rule in _read_rules(family, chain, opener) if rule.text in texts]
    if not handles:
        return
    name = netlink.attribute(_RULE_CHAIN, _text(chain.chain))
    head = _head(family, chain.table) + name
    with netlink.NetlinkSocket(opener(), _SUBJECT) as sock:
        sock.request_batch(
            begin=(_BATCH_BEGIN, _OF_NFTABLES),
            messages=[
                (_DELRULE, head + netlink.attribute(_RULE_HANDLE, handle)) for handle in handles
            ],
            end=(_BATCH_END, _OF_NFTABLES),
        )


def _undisturbed(look: Callable[[], _T]) -> _T:
    """Return what *look* finds while nobody writes."""
    for _ in range(_ATTEMPTS):
        try:
            return look()
        except OSError as error:
            if error.errno != errno.EINTR:
                raise
    raise OSError(errno.EINTR, "they change all the time")


def _names(family: IPFamily, opener: Opener) -> Iterator[ChainId]:
    with netlink.NetlinkSocket(opener(), _SUBJECT) as sock:
        # A struct nfgenmsg with the family; version and resource id are 0.
        for _, _, payload in sock.dump(_GETCHAIN, bytes((family.socket_family, 0, 0, 0))):
            table = chain = ""
            # What follows the name is of no interest, and there may be 60,000 of these.
            for kind, value in netlink.attributes(payload[_NFGENMSG_BYTES:]):
                if kind == _CHAIN_TABLE:
                    table = bytes(value[:-1]).decode(errors="replace")
                elif kind == _CHAIN_NAME:
                    chain = bytes(value[:-1]).decode(errors="replace")
                    break
            if payload[0] == family.socket_family and table in _TABLES:
                yield ChainId(table, chain)


def _read_rules(family: IPFamily, chain: ChainId, opener: Opener) -> list[_Rule]:
    request = _head(family, chain.table) + netlink.attribute(_RULE_CHAIN, _text(chain.chain))

    def look() -> list[_Rule]:
        with netlink.NetlinkSocket(opener(), _SUBJECT) as sock:
            return [_rule(chain, payload) for _, _, payload in sock.dump(_GETRULE, request)]

    return _undisturbed(look)


def _rule(chain: ChainId, payload: memoryview) -> _Rule:
    parts = dict(netlink.attributes(payload[_NFGENMSG_BYTES:]))
    leads = _leads(parts.get(_RULE_EXPRESSIONS, memoryview(b"")))
    ours = (jump.rule for jump in rules.JUMPS if _is_jump(jump, chain, leads, bytes(payload)))
    return _Rule(bytes(parts.get(_RULE_HANDLE, b"")), next(ours, f"{OPAQUE}{leads}"))


def _is_jump(jump: rules.Jump, chain: ChainId, leads: str, content: bytes) -> bool:
    # Nobody else has a rule with our comment that leads from there to our chain. What else it says is
    # not compared: that would be reading rules in the kernel's words.
    comment = _COMMENT.search(jump.rule)
    return (
        (jump.table, jump.builtin) == chain
        and f" {jump.rule}".rpartition(" -j ")[2] == leads.removeprefix(" -j ")
        and (comment is None or comment.group(1).encode() in content)
    )


def _leads(expressions: memoryview) -> str:
    """Return where a rule leads that has these *expressions*, as iptables says it; "": on."""
    for _, expression in netlink.attributes(expressions):
        parts = dict(netlink.attributes(expression))
        if bytes(parts.get(_EXPR_NAME, b"")) != b"immediate\0":
            continue
        data = _within(_within(parts, _EXPR_DATA), _IMMEDIATE_DATA)
        verdict = _within(data, _DATA_VERDICT)
        if _VERDICT_CODE in verdict:
            code = int.from_bytes(verdict[_VERDICT_CODE], "big", signed=True)
            name = bytes(verdict.get(_VERDICT_CHAIN, b"")).rstrip(b"\0")
            return _VERDICTS.get(code, "") + name.decode(errors="replace")
    return ""


def _within(parts: dict[int, memoryview], kind: int) -> dict[int, memoryview]:
    return dict(netlink.attributes(parts.get(kind, memoryview(b""))))


def _head(family: IPFamily, table: str) -> bytes:
    # Tables, chains and rules have the table's name in the same attribute.
    return bytes((family.socket_family, 0, 0, 0)) + netlink.attribute(_RULE_TABLE, _text(table))


def _text(name: str) -> bytes:
    return name.encode() + b"\0"
