"""Rules that an iptables prints otherwise than they were written, and those that others changed."""

import pytest

from kubeproxy_py import rules
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.echoes import Echoes
from tests.support.builders import make_service, make_slice
from tests.support.fake_iptables import FakeIptables
from tests.unit.test_sync import World, desired, own

MARK = ChainId(rules.NAT, rules.MARK_MASQ)
WRITTEN = ("-j MARK --set-xmark 0x4000/0x4000",)
PRINTED = ("-j MARK --set-xmark 16384/0x4000",)


def tables(chain, texts):
    return {chain.table: {chain.chain: texts}}


def learned(read, written=WRITTEN):
    """Return Echoes that have seen one chain be read back as *read*."""
    echoes = Echoes()
    echoes.learn(tables(MARK, read), tables(MARK, written))
    return echoes


def undone(echoes, live):
    live = tables(MARK, live)
    echoes.undo(live)
    return live[MARK.table][MARK.chain]


def test_another_spelling_is_taken_for_what_was_written():
    assert undone(learned(PRINTED), PRINTED) == WRITTEN


def test_what_reads_back_as_written_is_nothing_to_learn():
    assert undone(learned(WRITTEN), PRINTED) == PRINTED


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(("-j MARK --set-xmark 0x8000/0x8000",), id="other rule"),
        pytest.param((), id="no rule"),
        pytest.param((*PRINTED, "-j ACCEPT"), id="one rule more"),
    ],
)
def test_what_others_change_later_is_still_seen(changed):
    assert undone(learned(PRINTED), changed) == changed


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(("-j ACCEPT",), id="other target"),
        pytest.param((), id="flushed"),
        pytest.param((*PRINTED, "-j RETURN"), id="one rule more"),
        pytest.param(("-m mark --mark 0x1",), id="no target"),
    ],
)
def test_a_chain_with_other_targets_is_no_spelling_of_ours(read):
    assert undone(learned(read), read) == read


@pytest.mark.parametrize(
    ("written", "read"),
    [
        pytest.param(
            "-p tcp -m tcp -j DNAT --to-destination 10.180.1.11:80",
            "-p tcp -m tcp -j DNAT --to-destination 192.0.2.66:1",
            id="other destination",
        ),
        pytest.param("-s 10.0.0.0/8 -j X", "-s 0.0.0.0/0 -j X", id="wider source"),
        pytest.param("-s 10.0.0.0/8 -j X", "-j X", id="match removed"),
        pytest.param("-j X", "-s 10.0.0.0/8 -j X", id="match added"),
        pytest.param("-s 10.0.0.0/8 -j X", "! -s 10.0.0.0/8 -j X", id="negated"),
    ],
)
def test_a_rule_with_the_same_target_and_another_meaning_is_no_spelling_of_ours(written, read):
    assert undone(learned((read,), (written,)), (read,)) == (read,)


def test_rules_count_in_their_order():
    read, written = ("-j A -m x", "-j B"), ("-j B", "-m x -j A")

    assert undone(learned(read, written), read) == read


def test_a_chain_that_is_not_there_is_nothing_to_learn_and_nothing_to_undo():
    echoes = Echoes()
    echoes.learn({}, tables(MARK, WRITTEN))
    assert undone(echoes, PRINTED) == PRINTED

    live = {}
    learned(PRINTED).undo(live)
    assert live == {}


def test_the_last_spelling_is_what_counts():
    echoes = learned(PRINTED)
    echoes.learn(tables(MARK, ("-j MARK --set 0x1",)), tables(MARK, ("-j MARK --set 1",)))

    assert undone(echoes, PRINTED) == PRINTED
    assert undone(echoes, ("-j MARK --set 0x1",)) == ("-j MARK --set 1",)


# In a Syncer -------------------------------------------------------------------------------------


class OtherPrinter(FakeIptables):
    """A kernel whose iptables-save has other words for some rules."""

    WORDS = (
        ("--set-xmark 0x4000/0x4000", "--set-xmark 16384/0x4000"),
        ("-p tcp -m tcp", "-m tcp -p tcp"),
    )

    def save(self, *, known=None):
        return {
            table: {chain: tuple(map(self._print, texts)) for chain, texts in by_name.items()}
            for table, by_name in super().save().items()
        }

    def _print(self, text):
        for ours, theirs in self.WORDS:
            text = text.replace(ours, theirs)
        return text


@pytest.fixture
def world(metrics):
    """Give a world on another iptables, with one Service that was synced."""
    world = World(metrics, OtherPrinter())
    world.listed(make_service(), make_slice())
    world.sync()
    world.kernel.restored.clear()
    return world


def audit(world):
    """Let the Syncer look at the kernel; return how many inputs it restored."""
    before = len(world.kernel.restored)
    world.syncer.forget_live()
    world.sync()
    return len(world.kernel.restored) - before


def test_the_first_audit_writes_them_once_more_and_all_later_ones_are_silent(world):
    assert [audit(world) for _ in range(4)] == [1, 0, 0, 0]


def test_the_rules_are_those_that_are_wanted_after_all(world):
    audit(world)
    audit(world)

    assert own(world.kernel.tables) == desired(make_service(), make_slice())


def test_a_rule_that_another_program_took_away_is_put_back(world):
    audit(world)
    world.kernel.tables[MARK.table][MARK.chain] = ()

    assert audit(world) == 1
    assert world.kernel.tables[MARK.table][MARK.chain] == WRITTEN
    assert audit(world) == 0


def test_a_rule_that_another_program_changed_is_put_right(world):
    audit(world)
    world.kernel.tables[MARK.table][MARK.chain] = ("-j MARK --set-xmark 0x8000/0x8000",)

    assert audit(world) == 1
    assert world.kernel.tables[MARK.table][MARK.chain] == WRITTEN


class QuickRival(FakeIptables):
    """A kernel with somebody who sends an endpoint's connections elsewhere as soon as we have written."""

    ELSEWHERE = "192.0.2.66:1"
    is_there = False

    def restore(self, batch):
        super().restore(batch)
        if self.is_there:
            self.is_there = False
            nat = self.tables["nat"]
            (endpoint,) = [chain for chain in nat if chain.startswith("KUBE-SEP-")]
            nat[endpoint] = tuple(
                text.replace("10.180.1.11:8080", self.ELSEWHERE) for text in nat[endpoint]
            )


def test_what_another_program_changes_before_a_repair_is_read_back_is_repaired_next(metrics):
    kernel = QuickRival()
    world = World(metrics, kernel)
    world.listed(make_service(), make_slice())
    world.sync()
    kernel.tables[MARK.table][MARK.chain] = ()
    kernel.is_there = True
    audit(world)
    assert kernel.ELSEWHERE in str(kernel.tables)

    assert audit(world) == 1
    assert own(kernel.tables) == desired(make_service(), make_slice())


def test_only_the_chain_that_differs_is_written(world):
    audit(world)
    world.kernel.tables[MARK.table][MARK.chain] = ()
    audit(world)

    assert world.kernel.restored[-1].count(" - [0:0]") == 1


def test_a_change_of_ours_is_written_and_then_silence_is_found_again(world):
    audit(world)
    world.put(make_slice(endpoints=["10.180.1.12"]))
    world.sync()
    audit(world)

    assert audit(world) == 0
    assert own(world.kernel.tables) == desired(
        make_service(), make_slice(endpoints=["10.180.1.12"])
    )


def test_a_chain_that_is_gone_is_forgotten():
    echoes = learned(PRINTED)
    echoes.learn({}, {})

    assert undone(echoes, PRINTED) == PRINTED
