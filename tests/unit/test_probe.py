"""What a host can do, as a probe finds it out: on a kernel that refuses and misreads what a test wants."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeproxy_py.errors import BatchRejected, IptablesError, LockTimeout
from kubeproxy_py.iptables import probe
from kubeproxy_py.iptables.chains import PROBE, is_ours
from kubeproxy_py.model import IPFamily
from tests.support.fake_iptables import FakeIptables, empty_tables

V4 = IPFamily.V4
NAMES = [capability.name for capability in probe.CAPABILITIES]


@pytest.fixture
def kernel():
    return FakeIptables()


@pytest.mark.parametrize("family", list(IPFamily))
def test_where_everything_is_there_it_takes_one_restore_and_nothing_is_left(family):
    kernel = FakeIptables()
    kernel.family = family
    found = probe.probe(kernel)

    assert (found, found.refusal, found.lacks) == (probe.Findings(family), "", frozenset())
    assert all(map(found.has, NAMES))
    assert len(kernel.restored) == 2  # written, and removed
    assert kernel.tables == empty_tables()


@pytest.mark.parametrize("names_lines", [True, False])
def test_what_is_refused_is_missing_and_the_rest_is_there(kernel, names_lines):
    kernel.refuses = lambda line: "-m recent" in line or "REJECT" in line
    kernel.names_lines = names_lines
    found = probe.probe(kernel)

    assert found.lacks == {"recent", "REJECT"}
    assert "refused" in found.missing["recent"]
    assert found.refusal == ""
    assert kernel.tables == empty_tables()


@pytest.mark.parametrize(
    "name", [capability.name for capability in probe.CAPABILITIES if capability.is_required]
)
def test_without_what_every_rule_needs_nothing_may_be_written(kernel, name):
    rule = next(found for found in probe.CAPABILITIES if found.name == name).rule(V4)
    kernel.refuses = lambda line: line.endswith(f" {rule}")
    found = probe.probe(kernel)

    assert f"no Service can be programmed without {name}: " in found.refusal


def test_what_is_known_to_be_missing_is_not_tried(kernel):
    found = probe.probe(kernel, {"nfacct": "none"})

    assert found.missing == {"nfacct": "none"}
    assert "nfacct" not in kernel.restored[0]


def test_a_mark_match_that_is_lost_in_reading_is_the_reason_to_write_nothing(kernel):
    kernel.misreads = lambda text: text.replace("-m mark ! --mark 0x4000/0x4000 ", "")
    found = probe.probe(kernel)

    assert list(found.garbled) == ["mark"]
    assert not found.has("mark")
    assert "reads `-m mark ! --mark 0x4000/0x4000 -j RETURN` back as `-j RETURN`" in found.refusal


def test_rules_that_are_lost_in_reading_are_told(kernel):
    kernel.tables["mangle"][PROBE] = ()
    real = kernel.read_chain
    kernel.read_chain = lambda chain: real(chain)[:-1]

    assert "nfacct" in probe.probe(kernel).garbled


def test_a_chain_that_cannot_be_read_back_is_an_error_and_removed(kernel):
    kernel.read_chain = lambda _chain: None
    with pytest.raises(IptablesError, match="cannot read back chain KUBE-PROXY-PROBE"):
        probe.probe(kernel)

    assert kernel.tables == empty_tables()


def test_a_lock_that_is_held_is_not_waited_for_twice(kernel):
    kernel.fail_restore(LockTimeout("busy"))
    with pytest.raises(LockTimeout):
        probe.probe(kernel)

    assert len(kernel.restored) == 1


def test_what_is_refused_only_together_is_an_error(kernel):
    kernel.fail_restore(BatchRejected("odd"))
    with pytest.raises(BatchRejected, match="odd"):
        probe.probe(kernel)

    assert kernel.tables == empty_tables()


def test_what_a_crash_left_behind_is_begun_anew_and_is_ours_to_remove(kernel):
    for table in ("mangle", "filter", "nat"):
        kernel.tables[table][PROBE] = ("-j DROP",)
        assert is_ours(table, PROBE)
    found = probe.probe(kernel)

    assert not found.lacks
    assert kernel.tables == empty_tables()


@pytest.mark.parametrize(
    ("written", "read", "is_same"),
    [
        pytest.param("-m mark --mark 0x4000/0x4000 -j X", "-m mark --mark 0x4000/0x4000 -j X", True, id="same"),
        pytest.param("-p tcp -m tcp -j X", "-m tcp -p tcp -j X", True, id="order"),
        pytest.param("-m mark --mark 0x10 -j X", "-m mark --mark 16/0xffffffff -j X", True, id="number"),
        pytest.param("-m statistic --probability 0.50000000000", "-m statistic --probability 0.5", True, id="decimals"),
        pytest.param("-j REJECT", "-j REJECT --reject-with icmp-port-unreachable", True, id="default"),
        pytest.param('-m comment --comment "a b" -j X', '-m comment --comment "a b" -j X', True, id="quoted"),
        pytest.param("-m mark --mark 0x4000/0x4000 -j X", "-m mark --mark 0x4000 -j X", False, id="mask lost"),
        pytest.param("-m mark ! --mark 0x4 -j X", "-m mark --mark 0x4 -j X", False, id="negation lost"),
        pytest.param("-m mark --mark 0x4 -j X", "-j X", False, id="match lost"),
        pytest.param("-m mark --mark 0x4 -j X", "-m mark --mark 0x4 -j Y", False, id="other target"),
        pytest.param("-j X", "", False, id="nothing"),
        pytest.param("-j X", "stray -j X", True, id="stray words"),
    ],
)  # fmt: skip
def test_meaning_counts_and_not_spelling(written, read, is_same):
    assert probe.means_the_same(written, read) is is_same


@given(st.sampled_from(probe.CAPABILITIES), st.sampled_from(list(IPFamily)), st.data())
def test_whatever_word_is_lost_is_noticed(capability, family, data):
    words = capability.rule(family).split(" ")
    lost = data.draw(st.sampled_from(range(len(words))))
    left = " ".join(words[:lost] + words[lost + 1 :])

    assert probe.means_the_same(" ".join(words), " ".join(words))
    assert not probe.means_the_same(" ".join(words), left)
