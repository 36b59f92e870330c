"""Where to look and when; what the loop and the recipe make of it."""

import pytest
from structlog.testing import capture_logs

from kubeproxy_py import drift
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.drift import Culprit, Look, Suspects, Suspicion
from kubeproxy_py.errors import IptablesError
from kubeproxy_py.pacer import Pacer
from kubeproxy_py.sync_loop import SyncLoop
from tests.support.builders import make_node, make_service, make_slice
from tests.support.world import V4, World, desired

A, B = ChainId("nat", "KUBE-SVC-A"), ChainId("nat", "KUBE-SVC-B")
MASQ = ChainId("nat", "KUBE-MARK-MASQ")
NFT = Culprit("nft", 7)
FREE = 20
NEVER = float("inf")


def suspicion(*chains, culprit=NFT):
    return Suspicion(V4, culprit, frozenset(chains) if chains else None)


@pytest.mark.parametrize(
    ("found", "wanted", "kind"),
    [
        (None, ("a",), "chain_removed"),
        (("a",), None, "chain_added"),
        ((), ("a", "b"), "chain_flushed"),
        (("a",), ("a", "b"), "rule_removed"),
        (("a", "a"), ("a",), "rule_added"),
        (("a", "x", "b"), ("a", "b"), "rule_added"),
        (("x",), (), "rule_added"),
        (("a", "x"), ("a", "b"), "rule_changed"),
        (("b", "a"), ("a", "b"), "rule_changed"),
    ],
)
def test_what_was_done_to_a_chain_has_a_name(found, wanted, kind):
    assert drift.kind_of(found, wanted) == kind


# When --------------------------------------------------------------------------------------------


@pytest.fixture
def suspects():
    return Suspects(30.0)


def look(suspects, *chains, at, took_s=0.0, has_repaired=True):
    """Let *chains* be touched, and looked at as soon as they may be; return when, and the contest."""
    suspects.add(suspicion(*chains), at)
    due_at = max(at, suspects.due_at())
    found = suspects.take(due_at)
    assert found is not None
    return due_at, suspects.finished(found, due_at + took_s, has_repaired=has_repaired)


def test_nothing_waits_where_nothing_was_touched(suspects):
    assert suspects.due_at() == NEVER
    assert suspects.take(1.0) is None


def test_what_was_touched_is_looked_at_at_once(suspects):
    suspects.add(suspicion(A), 10)
    suspects.add(suspicion(B, culprit=Culprit("bash", 8)), 10)

    assert suspects.due_at() <= 10
    assert suspects.take(10) == Look(frozenset({A, B}), (Culprit("bash", 8), NFT))
    assert suspects.due_at() == NEVER


def test_looking_at_everything_is_looking_at_each(suspects):
    suspects.add(suspicion(A), 10)
    suspects.add(suspicion(culprit=None), 10)

    assert suspects.take(10) == Look(None, (NFT,))
    assert suspects.due_at() == NEVER


def test_many_chains_are_everything(suspects):
    for number in range(drift.MAX_CHAINS + 1):
        suspects.add(suspicion(ChainId("nat", f"KUBE-SVC-{number}")), 10)

    assert suspects.take(10) == Look(None, (NFT,))


def test_a_fight_is_told_once_and_waits_ever_longer(suspects):
    now = 0.0
    waits, contests = [], []
    for _ in range(FREE + 8):
        due_at, contest = look(suspects, A, at=now)
        waits.append(due_at - now)
        contests.append(contest)
        now = due_at + 0.001

    assert waits[:FREE] == [0.0] * FREE
    assert waits[FREE:] == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30], abs=0.01)
    assert [number for number, contest in enumerate(contests, 1) if contest] == [FREE]
    assert contests[FREE - 1] == drift.Contest(frozenset({A}), (NFT,), 1.0)


def test_other_chains_do_not_wait_with_those_that_are_fought_for(suspects):
    for _ in range(FREE):
        look(suspects, A, at=0)
    suspects.add(suspicion(A), 0.1)
    suspects.add(suspicion(B), 0.1)

    assert suspects.take(0.1) == Look(frozenset({B}), (NFT,))
    assert suspects.due_at() == 1.0


def test_peace_is_believed_after_a_while(suspects):
    for _ in range(FREE + 3):
        due_at, _ = look(suspects, A, at=0)
    # The next wait is 8 s.
    suspects.add(suspicion(A), due_at + 20)
    assert suspects.due_at() == due_at + 8

    suspects = Suspects(30.0)
    for _ in range(FREE + 3):
        due_at, _ = look(suspects, A, at=0)
    suspects.add(suspicion(A), due_at + 22)
    assert suspects.due_at() <= due_at + 22


def test_looks_that_find_nothing_are_fewer_as_well_but_no_contest(suspects):
    contests = [look(suspects, at=0, has_repaired=False)[1] for _ in range(FREE + 3)]

    assert contests == [None] * (FREE + 3)
    suspects.add(suspicion(), 0)
    assert suspects.due_at() > 0


def test_chains_touched_once_are_not_remembered_for_ever(suspects):
    for number in range(100):
        look(suspects, ChainId("nat", f"KUBE-SVC-{number}"), at=number * 100.0)

    assert len(suspects._records) == 1


# The recipe --------------------------------------------------------------------------------------


@pytest.fixture
def world(metrics):
    """Give a world that was synced, and that reads single chains."""
    world = World(metrics)
    world.read = []

    def read_chain(chain):
        world.read.append(chain)
        return world.kernel.tables.get(chain.table, {}).get(chain.chain)

    world.syncer._read_chain = read_chain
    world.syncer._list_chains = lambda: {
        ChainId(table, name) for table, found in world.kernel.tables.items() for name in found
    }
    world.listed(make_node(), make_service(), make_slice())
    world.sync()
    world.kernel.restored.clear()
    return world


def repaired(world, *chains):
    world.syncer.look(Look(frozenset(chains), (NFT,)))
    with capture_logs() as logs:
        world.sync()
    return [line for line in logs if line["event"] == "drift.repaired"]


def test_only_what_was_touched_is_read_and_only_what_differs_written(world):
    untouched = ChainId("nat", "KUBE-POSTROUTING")
    world.kernel.tables["nat"]["KUBE-MARK-MASQ"] = ()
    lines = repaired(world, MASQ, untouched)

    assert world.kernel.saves == 1  # that of the start
    assert set(world.read) == {MASQ, untouched}
    assert world.kernel.restored == [
        "*nat\n:KUBE-MARK-MASQ - [0:0]\n"
        "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\nCOMMIT\n"
    ]
    assert [(line["kind"], line["process"], line["pid"]) for line in lines] == [
        ("chain_flushed", "nft", [7])
    ]
    assert world.value("iptables_drift_total", table="nat", kind="chain_flushed") == 1


def test_a_chain_that_is_gone_is_written_again(world):
    chain = next(name for name in world.own()["nat"] if name.startswith("KUBE-SVC-"))
    world.kernel.tables["nat"]["KUBE-SERVICES"] = ()
    del world.kernel.tables["nat"][chain]
    lines = repaired(world, ChainId("nat", chain), ChainId("nat", "KUBE-SERVICES"))

    assert world.own() == desired(make_service(), make_slice())
    assert {line["kind"] for line in lines} == {"chain_removed", "chain_flushed"}


def test_a_chain_with_our_name_is_deleted(world):
    world.kernel.tables["nat"]["KUBE-SVC-STRAY"] = ()
    lines = repaired(world, ChainId("nat", "KUBE-SVC-STRAY"))

    assert "KUBE-SVC-STRAY" not in world.kernel.tables["nat"]
    assert [line["kind"] for line in lines] == ["chain_added"]


def rename(world, old, new):
    """Rename a chain of nat as the kernel does: whatever leads there, leads to the new name."""
    nat = world.kernel.tables["nat"]
    nat[new] = nat.pop(old)
    for name, texts in nat.items():
        nat[name] = tuple(text.replace(f"-j {old}", f"-j {new}") for text in texts)


def service_chain(world):
    return next(name for name in world.own()["nat"] if name.startswith("KUBE-SVC-"))


@pytest.mark.parametrize("new", ["SOMETHING", "KUBE-SVC-SOMETHING"])
def test_a_renamed_chain_is_written_again_and_all_that_leads_there(world, new):
    rename(world, service_chain(world), new)
    lines = repaired(world, ChainId("nat", ""))

    assert world.own() == desired(make_service(), make_slice())
    assert world.kernel.saves == 1  # that of the start
    assert {line["kind"] for line in lines} >= {"chain_removed", "rule_changed"}


def test_a_chain_renamed_among_others_own_is_nothing_to_us(world):
    assert repaired(world, ChainId("nat", "")) == []
    assert (world.read, world.kernel.restored) == ([], [])


def test_renamed_chains_are_looked_for_everywhere_if_names_cannot_be_listed(world):
    world.syncer._list_chains = None
    rename(world, service_chain(world), "SOMETHING")
    repaired(world, ChainId("nat", ""))

    assert world.own() == desired(make_service(), make_slice())


def test_many_renamed_chains_are_read_at_once(world):
    services = [make_service(f"svc{n}", cluster_ip=f"172.30.1.{n}") for n in range(1, 60)]
    slices = [make_slice(f"svc{n}") for n in range(1, 60)]
    world.listed(make_node(), *services, *slices)
    world.sync()
    saves, read = world.kernel.saves, len(world.read)
    for name in [name for name in world.own()["nat"] if name.startswith("KUBE-SVC-")]:
        rename(world, name, f"X-{name[-16:]}")
    repaired(world, ChainId("nat", ""))

    assert world.own() == desired(*services, *slices)
    assert (world.kernel.saves, len(world.read)) == (
        saves + 2,
        read,
    )  # once more to learn spellings


def test_what_we_are_asked_for_at_the_same_time_is_not_called_drift(world):
    world.kernel.tables["nat"]["KUBE-MARK-MASQ"] = ()
    world.put(make_slice(endpoints=["10.180.1.12"]))
    lines = repaired(world, MASQ)

    assert world.own() == desired(make_service(), make_slice(endpoints=["10.180.1.12"]))
    assert [line["chains"] for line in lines] == [["KUBE-MARK-MASQ"]]


def test_what_was_right_after_all_is_neither_written_nor_told(world):
    assert repaired(world, MASQ) == []
    assert world.kernel.restored == []


def test_drift_is_told_though_the_first_attempt_to_repair_it_fails(world):
    world.kernel.tables["nat"]["KUBE-MARK-MASQ"] = ()
    world.syncer.look(Look(frozenset({MASQ}), (NFT,)))
    world.fail(IptablesError("no"))
    with capture_logs() as logs:
        world.sync()

    assert [line["process"] for line in logs if line["event"] == "drift.repaired"] == ["nft"]


# The loop ----------------------------------------------------------------------------------------


class Health:
    def started(self, family):
        pass

    queued = updated = started


class Clock:
    now = 100.0


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def loop(world, metrics, clock):
    pacer = Pacer(retry_s=30, audit_s=600, min_interval_s=0)
    pacer.finished(clock.now, took_s=0.0, outcome="ok")
    return SyncLoop(
        V4, world.syncer, pacer, health=Health(), metrics=metrics, clock=lambda: clock.now
    )


def turn(loop, clock):
    """Run one sync that is due."""
    assert loop._wait()
    outcome = loop._sync()
    loop._pacer.finished(clock.now, took_s=0.0, outcome=outcome)
    loop._finish_look(clock.now)
    return outcome


def test_a_suspicion_makes_a_sync_that_reads_no_more_than_it_must(world, loop, clock):
    world.kernel.tables["nat"]["KUBE-MARK-MASQ"] = ()
    loop.suspect(suspicion(MASQ))

    assert turn(loop, clock) == "ok"
    assert world.own() == desired(make_service(), make_slice())
    assert world.kernel.saves == 1
    assert [(done.repair.kind, done.repair.culprits) for done in loop.history.repairs] == [
        ("chain_flushed", (NFT,))
    ]


def test_who_undoes_every_repair_is_named_once(world, loop, clock):
    with capture_logs() as logs:
        for _ in range(FREE + 5):
            world.kernel.tables["nat"]["KUBE-MARK-MASQ"] = ()
            loop.suspect(suspicion(MASQ))
            clock.now = max(clock.now, loop._suspects.due_at())
            turn(loop, clock)

    contests = [line for line in logs if line["event"] == "drift.contested"]
    assert [(line["process"], line["chains"], line["wait_s"]) for line in contests] == [
        ("nft", ["nat/KUBE-MARK-MASQ"], 1.0)
    ]


def test_a_failure_while_others_write_is_tried_again_at_once(world, loop, clock):
    world.kernel.tables["nat"]["KUBE-MARK-MASQ"] = ()
    world.kernel.fail_restore(IptablesError("chain does not exist"))
    loop.suspect(suspicion(MASQ))
    assert loop._wait()
    loop.suspect(suspicion(MASQ))

    assert loop._sync() == "disturbed"
    loop._pacer.finished(clock.now, took_s=0.0, outcome="disturbed")
    assert loop._pacer.due_at() - clock.now < 0.1


def fight(suspects, *chains):
    """Let *chains* be contested; return when they were looked at last."""
    at = 0.0
    for _ in range(FREE + 1):
        at, _ = look(suspects, *chains, at=at)
    return at


@pytest.mark.parametrize(("chains", "told"), [((A,), frozenset([A])), ((), None)])
def test_a_contest_is_told_to_who_asks_while_it_lasts(suspects, chains, told):
    assert suspects.contested(0.0) == ()
    at = fight(suspects, *chains)
    (contest,) = suspects.contested(at)

    assert (contest.chains, contest.culprits, contest.wait_s) == (told, (NFT,), 2.0)
    # Five seconds and twice the wait.
    assert suspects.contested(at + 8.9) == (contest,)
    assert suspects.contested(at + 9.1) == ()


def test_a_look_that_names_nobody_leaves_the_last_name(suspects):
    at = fight(suspects, A)
    suspects.add(suspicion(A, culprit=None), at)
    found = suspects.take(suspects.due_at())
    suspects.finished(found, at + 2, has_repaired=True)

    assert suspects.contested(at + 2)[0].culprits == (NFT,)


def test_the_loop_tells_of_syncs_and_contests(world, metrics, clock):
    pacer = Pacer(retry_s=30, audit_s=600, min_interval_s=0)
    pacer.finished(clock.now, took_s=0.0, outcome="ok")
    news = []
    loop = SyncLoop(
        V4, world.syncer, pacer, health=Health(), metrics=metrics, clock=lambda: clock.now, tell=news.append
    )  # fmt: skip
    for _ in range(FREE + 1):
        world.kernel.tables["nat"]["KUBE-MARK-MASQ"] = ()
        loop.suspect(suspicion(MASQ))
        clock.now = max(clock.now, loop._suspects.due_at())
        turn(loop, clock)

    assert sum(isinstance(one, drift.Contest) for one in news) == 1
    assert sum(bool(getattr(one, "repairs", ())) for one in news) == FREE + 1
    assert [contest.chains for contest in loop.contested()] == [frozenset([MASQ])]
    assert len(loop.history.repairs) == 20
