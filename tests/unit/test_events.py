"""What messages of nftables say, as a kernel sent them (6.18, iptables 1.8.9, nft 1.0.6)."""

import struct

import pytest

from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.drift import MAX_CHAINS, Culprit
from kubeproxy_py.iptables import events
from kubeproxy_py.model import IPFamily

V4, V6 = IPFamily.V4, IPFamily.V6
NEWTABLE, DELTABLE, NEWCHAIN, DELCHAIN, NEWRULE, DELRULE = (
    10 << 8 | kind for kind in (0, 2, 3, 5, 6, 8)
)
CREATE, EXCLUSIVE, APPEND = 0x400, 0x200, 0x800
HANDLE = (2, b"\0\0\0\0\0\0\0\1")
HOOK = (4, bytes.fromhex("080001000000000008000200ffffff9c"))


def message(*attributes, family=2, generation=7):
    """Build a payload: struct nfgenmsg, then attributes."""
    data = struct.pack(">BBH", family, 0, generation)
    for kind, value in attributes:
        data += struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
    return memoryview(data)


def rule(table, chain, family=2):
    return message(
        (1, table.encode() + b"\0"), (2, chain.encode() + b"\0"), (4, bytes(392)), family=family
    )


def chain(table, name, *more):
    return message((1, table.encode() + b"\0"), (3, name.encode() + b"\0"), HANDLE, *more)


def noted(kind, payload, flags=0):
    touched = {}
    events.note(touched, kind, flags, payload)
    return touched


def test_rules_of_ours_are_told_with_their_chain():
    wanted = {V4: {ChainId("nat", "KUBE-SERVICES")}}

    assert noted(NEWRULE, rule("nat", "KUBE-SERVICES"), CREATE | APPEND) == wanted
    assert noted(DELRULE, rule("nat", "KUBE-SERVICES")) == wanted


def test_the_family_is_that_of_the_message():
    assert noted(DELRULE, rule("filter", "KUBE-FORWARD", family=10)) == {
        V6: {ChainId("filter", "KUBE-FORWARD")}
    }


@pytest.mark.parametrize(
    ("kind", "payload", "flags"),
    [
        pytest.param(NEWRULE, rule("nat", "CNI-X"), CREATE, id="rule of the CNI"),
        pytest.param(NEWRULE, rule("nat", "PREROUTING"), CREATE, id="rule inserted in PREROUTING"),
        pytest.param(DELRULE, rule("nat", "INPUT"), 0, id="rule removed where no jump of ours is"),
        pytest.param(DELRULE, rule("raw", "KUBE-SERVICES"), 0, id="a table we do not use"),
        pytest.param(DELRULE, rule("nat", "KUBE-SERVICES", family=1), 0, id="family inet"),
        pytest.param(NEWCHAIN, chain("nat", "CNI-X"), EXCLUSIVE, id="iptables -N"),
        pytest.param(NEWCHAIN, chain("nat", "CNI-X"), CREATE, id="nft add chain, there already"),
        pytest.param(NEWCHAIN, chain("filter", "FORWARD", HOOK), 0, id="policy changed"),
        pytest.param(DELCHAIN, chain("nat", "CNI-X"), 0, id="foreign chain deleted"),
        pytest.param(NEWTABLE, message((1, b"nat\0")), CREATE, id="table made"),
        pytest.param(DELTABLE, message((1, b"calico\0")), 0, id="foreign table deleted"),
        pytest.param(10 << 8 | 9, message((1, b"nat\0")), 0, id="a set"),
    ],
)
def test_what_is_others_own_is_passed_over(kind, payload, flags):
    assert noted(kind, payload, flags) == {}


def test_a_rule_removed_where_our_jumps_stand_is_told():
    assert noted(DELRULE, rule("nat", "PREROUTING")) == {V4: {ChainId("nat", "PREROUTING")}}


def test_chains_made_and_deleted_are_told():
    assert noted(DELCHAIN, chain("nat", "KUBE-SVC-A")) == {V4: {ChainId("nat", "KUBE-SVC-A")}}
    assert noted(NEWCHAIN, chain("nat", "KUBE-SVC-A"), EXCLUSIVE) == {
        V4: {ChainId("nat", "KUBE-SVC-A")}
    }
    assert noted(DELCHAIN, chain("filter", "KUBE-FIREWALL")) == {
        V4: {ChainId("filter", "KUBE-FIREWALL")}
    }


@pytest.mark.parametrize("name", ["SOMETHING-ELSE", "KUBE-SVC-A"])
def test_a_renamed_chain_may_have_been_any_of_its_table(name):
    assert noted(NEWCHAIN, chain("nat", name)) == {V4: {ChainId("nat", "")}}


def test_a_deleted_table_is_all_of_it():
    assert noted(DELTABLE, message((1, b"nat\0"))) == {V4: None}


def test_more_chains_than_are_read_one_by_one_are_all():
    touched = {}
    for number in range(MAX_CHAINS + 1):
        events.note(touched, DELRULE, 0, rule("nat", f"KUBE-SVC-{number}"))
    events.note(touched, DELRULE, 0, rule("nat", "KUBE-SVC-LAST"))

    assert touched == {V4: None}


@pytest.mark.parametrize("length", range(0, 40, 3))
def test_a_message_that_is_cut_off_is_no_error(length):
    assert noted(DELRULE, rule("nat", "KUBE-SERVICES")[: 4 + length]) in (
        {}, {V4: {ChainId("nat", "KUBE-SERVICES")}},
    )  # fmt: skip


# Who ---------------------------------------------------------------------------------------------

GENERATION = message(
    (1, b"\0\0\0\2"), (2, b"\0\0\x07\xfd"), (3, b"iptables-nft\0"), family=0, generation=2
)


def status(proc, pid, name, parent):
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "status").write_text(f"Name:\t{name}\nPid:\t{pid}\nPPid:\t{parent}\n")


def test_the_author_of_a_generation_is_named_with_who_started_it(tmp_path):
    status(tmp_path, 2045, "iptables-nft", 17)
    status(tmp_path, 17, "firewalld", 1)

    assert events.parse_culprit(GENERATION, tmp_path) == Culprit("iptables-nft", 2045, "firewalld")


def test_an_author_who_is_gone_has_no_parent(tmp_path):
    assert events.parse_culprit(GENERATION, tmp_path) == Culprit("iptables-nft", 2045, "")


def test_another_process_with_that_number_is_not_asked(tmp_path):
    # The number is the host's; in a container it may be somebody else's.
    status(tmp_path, 2045, "nginx", 17)
    status(tmp_path, 17, "supervisord", 1)

    assert events.parse_culprit(GENERATION, tmp_path) == Culprit("iptables-nft", 2045, "")


def test_a_generation_without_a_name_has_no_author():
    assert events.parse_culprit(message((1, b"\0\0\0\2"), family=0)) is None
