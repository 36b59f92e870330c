"""Chains and rules of nft as the kernel describes them."""

import errno
import struct

import pytest

from kubeproxy_py import netlink, rules
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.iptables import nftables
from kubeproxy_py.model import IPFamily
from tests.unit.test_netlink import DONE, DUMP_INTR, ScriptedSocket, answer, message

V4 = IPFamily.V4
NEWCHAIN, NEWRULE = 0xA03, 0xA06
INPUT = ChainId("filter", "INPUT")
#: The bytes of this are what a chain's and a rule's messages begin with.
HEAD = bytes((2, 0, 0, 0))


def text(kind, value):
    return netlink.attribute(kind, value.encode() + b"\0")


def number(kind, value):
    return netlink.attribute(kind, struct.pack(">i", value))


def leads(code, chain=""):
    parts = [number(1, code), *([text(2, chain)] if chain else [])]
    data = netlink.nested(2, netlink.nested(2, *parts))
    return expression("immediate", number(1, 0), data)


def expression(name, *data):
    return netlink.nested(1, text(1, name), netlink.nested(2, *data))


def commented(comment):
    return expression(
        "match", text(1, "comment"), netlink.attribute(3, comment.encode() + bytes(9))
    )


def rule(*expressions, handle=7):
    given = netlink.attribute(3, struct.pack(">Q", handle))
    return message(
        NEWRULE,
        HEAD + text(1, "filter") + text(2, "INPUT") + given + netlink.nested(4, *expressions),
    )


def chain(*rest, name="INPUT", table="filter", family=2):
    return message(
        NEWCHAIN, bytes((family, 0, 0, 0)) + text(1, table) + text(3, name) + b"".join(rest)
    )


class Kernel:
    """Answers each connection with the next of *scripts*."""

    def __init__(self, *scripts):
        self.sockets = [ScriptedSocket(*script) for script in scripts]
        self.opened = []

    def __call__(self):
        self.opened.append(self.sockets.pop(0))
        return self.opened[-1]


def read(*found, policy=b""):
    kernel = Kernel([chain(policy) + answer(0)], [b"".join(found), message(DONE, bytes(4))])
    return nftables.read_chain(V4, INPUT, kernel)


@pytest.mark.parametrize(
    ("expressions", "wanted"),
    [
        ([leads(-3, "OTHERS")], "-m nft -j OTHERS"),
        ([leads(-4, "OTHERS")], "-m nft -g OTHERS"),
        ([expression("ct"), leads(1)], "-m nft -j ACCEPT"),
        ([leads(0)], "-m nft -j DROP"),
        ([leads(-5)], "-m nft -j RETURN"),
        ([expression("counter")], "-m nft"),
        ([expression("immediate", number(1, 1))], "-m nft"),
    ],
    ids=["jump", "goto", "accept", "drop", "return", "goes on", "no verdict"],
)
def test_of_a_rule_is_told_where_it_leads(expressions, wanted):
    assert read(rule(*expressions)).rules == (wanted,)


@pytest.mark.parametrize("jump", [jump for jump in rules.JUMPS if jump[:2] == INPUT])
def test_a_jump_of_ours_reads_as_the_rule_that_it_is(jump):
    comment = jump.rule.partition('--comment "')[2].partition('"')[0]
    found = rule(*([commented(comment)] if comment else []), leads(-3, jump.rule.split()[-1]))

    assert read(found).rules == (jump.rule,)


@pytest.mark.parametrize(
    "expressions",
    [
        [leads(-3, rules.NODE_PORTS)],
        [commented("somebody's"), leads(-3, rules.NODE_PORTS)],
        [commented("kubernetes health check service ports"), leads(-4, rules.NODE_PORTS)],
        [commented("kubernetes health check service ports"), leads(-3, rules.SERVICES)],
    ],
    ids=["no comment", "another comment", "goto", "elsewhere"],
)
def test_what_only_resembles_a_jump_of_ours_is_somebody_elses(expressions):
    [found] = read(rule(*expressions)).rules

    assert found.startswith("-m nft -")


@pytest.mark.parametrize(("policy", "wanted"), [(0, "DROP"), (1, "ACCEPT"), (None, "")])
def test_a_chain_has_its_policy(policy, wanted):
    told = b"" if policy is None else number(5, policy)

    assert read(policy=told) == nftables.Chain(wanted, ())


def test_a_chain_that_is_not_there_is_none():
    assert nftables.read_chain(V4, INPUT, Kernel([answer(errno.ENOENT)])) is None


def test_a_kernel_that_does_not_tell_is_an_error():
    with pytest.raises(OSError, match="Operation not permitted"):
        nftables.read_chain(V4, INPUT, Kernel([answer(errno.EPERM)]))


def test_rules_that_are_written_meanwhile_are_read_again():
    disturbed = [message(DONE, bytes(4), flags=DUMP_INTR)]
    kernel = Kernel([chain() + answer(0)], disturbed, [rule(leads(1)), message(DONE, bytes(4))])

    assert nftables.read_chain(V4, INPUT, kernel).rules == ("-m nft -j ACCEPT",)


def test_rules_that_are_written_all_the_time_are_an_error():
    disturbed = [[message(DONE, bytes(4), flags=DUMP_INTR)]] * 20

    with pytest.raises(OSError, match="they change all the time"):
        nftables.read_chain(V4, INPUT, Kernel([chain() + answer(0)], *disturbed))


def test_only_what_was_named_is_removed():
    found = [rule(leads(1), handle=7), rule(leads(0), handle=8), message(DONE, bytes(4))]
    kernel = Kernel([b"".join(found)], [answer(0, seq=2)])
    nftables.remove_rules(V4, INPUT, ["-m nft -j DROP"], kernel)
    [sent] = kernel.opened[1].sent

    assert struct.pack(">Q", 8) in sent
    assert struct.pack(">Q", 7) not in sent


def test_nothing_to_remove_is_not_asked_for():
    kernel = Kernel([rule(leads(1)) + message(DONE, bytes(4))])
    nftables.remove_rules(V4, INPUT, ["-m nft -j DROP"], kernel)

    assert kernel.sockets == []


def test_names_are_those_of_the_family_and_of_our_tables():
    others = chain(table="raw") + chain(family=10)
    names = chain() + chain(name="KUBE-SERVICES", table="nat") + others + message(DONE, bytes(4))

    assert nftables.chain_names(V4, Kernel([names])) == {INPUT, ChainId("nat", "KUBE-SERVICES")}


def test_a_kernel_without_nf_tables_has_no_chains():
    assert nftables.chain_names(V4, Kernel([answer(errno.EOPNOTSUPP)])) == set()
