"""One refused rule: its Service is set aside, and all others are programmed."""

import pytest
from structlog.testing import capture_logs

from kubeproxy_py.errors import BatchRejected, LockTimeout
from kubeproxy_py.model import ServiceName
from kubeproxy_py.quarantine import Quarantine
from tests.support.builders import make_node, make_service, make_slice
from tests.support.fake_iptables import empty_tables
from tests.support.world import World, desired

BAD = ServiceName("default", "bad")


def good(number):
    name = f"good{number}"
    return make_service(name, cluster_ip=f"172.30.1.{number}"), make_slice(name)


GOOD = [item for number in range(1, 6) for item in good(number)]


def bad(*endpoints):
    return make_slice("bad", endpoints=[*endpoints, "10.180.66.6"])


BAD_SERVICE = make_service("bad", cluster_ip="172.30.1.66")


@pytest.fixture(params=[True, False], ids=["line named", "line not named"])
def world(metrics, request):
    """Give a world whose kernel refuses to send anything to 10.180.66.6."""
    world = World(metrics)
    world.kernel.names_lines = request.param
    world.kernel.refuses = lambda line: "--to-destination 10.180.66.6" in line
    return world


def test_all_others_are_programmed_in_the_same_sync(world):
    world.listed(make_node(), *GOOD, BAD_SERVICE, bad())
    world.sync()

    assert world.own() == desired(*GOOD)
    assert world.syncer.quarantined == (BAD,)


def test_it_is_named_counted_and_reported(world):
    world.listed(make_node(), BAD_SERVICE, bad())
    with capture_logs() as logs:
        world.sync()

    (log,) = [log for log in logs if log["event"] == "service.quarantined"]
    assert (log["namespace"], log["name"]) == ("default", "bad")
    assert [name for name, _ in world.quarantined] == [BAD]
    assert world.value("quarantined_services") == 1


def test_rules_it_had_before_stay(world):
    before = make_slice("bad", endpoints=["10.180.1.11"])
    world.listed(make_node(), *GOOD, BAD_SERVICE, before)
    world.sync()
    world.put(bad("10.180.1.12"))
    world.sync()

    assert world.own() == desired(*GOOD, BAD_SERVICE, before)


def test_rules_it_had_before_stay_though_a_sync_failed_in_between(world):
    before = make_slice("bad", endpoints=["10.180.1.11"])
    world.listed(make_node(), *GOOD, BAD_SERVICE, before)
    world.sync()
    world.put(bad())
    world.fail(BatchRejected("odd"))
    world.sync()

    assert world.own() == desired(*GOOD, BAD_SERVICE, before)


def test_others_change_while_it_is_set_aside(world):
    world.listed(make_node(), *GOOD, BAD_SERVICE, bad())
    world.sync()
    more = good(7)
    world.put(*more)
    world.sync()

    assert world.own() == desired(*GOOD, *more)
    assert len(world.quarantined) == 1


def test_it_comes_back_when_it_changes(world):
    world.listed(make_node(), *GOOD, BAD_SERVICE, bad())
    world.sync()
    mended = make_slice("bad", endpoints=["10.180.1.11"])
    world.put(mended)
    world.sync()

    assert world.own() == desired(*GOOD, BAD_SERVICE, mended)
    assert world.syncer.quarantined == ()
    assert world.value("quarantined_services") == 0


def test_it_goes_when_it_is_deleted(world):
    world.listed(make_node(), *GOOD, BAD_SERVICE, bad())
    world.sync()
    world.store.delete("Service", "default", "bad")
    world.sync()

    assert world.syncer.quarantined == ()
    assert world.own() == desired(*GOOD)


def test_it_is_tried_again_when_its_time_has_come(world):
    world.listed(make_node(), *GOOD, BAD_SERVICE, bad())
    world.sync()
    world.kernel.refuses = lambda line: False
    world.sync()
    assert world.own() == desired(*GOOD)

    world.now = world.syncer.retry_at
    world.sync()
    assert world.own() == desired(*GOOD, BAD_SERVICE, bad())
    assert world.syncer.quarantined == ()


def test_it_is_tried_again_though_it_is_handed_out_as_it_was_at_that_moment(world):
    world.listed(make_node(), *GOOD, BAD_SERVICE, bad())
    world.sync()
    world.kernel.refuses = lambda line: False
    # There and back again before anybody looks: it is handed out, and is what was refused.
    world.put(make_slice("bad", endpoints=["10.180.1.11"]))
    world.put(bad())
    world.now = world.syncer.retry_at
    world.sync()

    assert world.own() == desired(*GOOD, BAD_SERVICE, bad())
    assert world.syncer.quarantined == ()


def test_a_change_of_zone_does_not_bring_it_back(world):
    world.listed(make_node(), *GOOD, BAD_SERVICE, bad())
    world.sync()
    world.put(make_node(labels={"topology.kubernetes.io/zone": "zone-b"}))
    world.sync()

    assert len(world.quarantined) == 1
    assert world.own() == desired(*GOOD)


def test_several_are_set_aside_in_one_sync(world):
    others = [make_slice(f"good{number}", endpoints=["10.180.66.6"]) for number in (1, 3)]
    world.listed(make_node(), *GOOD)
    world.sync()
    world.put(*others, BAD_SERVICE, bad())
    world.sync()

    assert len(world.syncer.quarantined) == 3
    assert world.own() == desired(*GOOD)


def test_a_rule_of_nobody_in_particular_is_no_reason_to_set_anybody_aside(world):
    world.kernel.refuses = lambda line: line.startswith("-A KUBE-FORWARD")
    world.listed(make_node(), *GOOD)

    with pytest.raises(BatchRejected):
        world.sync()
    assert world.syncer.quarantined == ()


def test_what_others_do_meanwhile_is_no_services_fault(world):
    world.listed(make_node(), *GOOD)
    world.sync()
    # Somebody flushes and deletes while we do not look: what we write then refers to what is gone.
    world.kernel.tables["nat"] = {
        name: () for name in world.kernel.tables["nat"] if not name.startswith("KUBE-")
    }
    world.put(*good(9))
    world.sync()

    assert world.syncer.quarantined == ()
    assert world.own() == desired(*GOOD, *good(9))


def flush_while_we_write(kernel, *, when=lambda: True):
    """Let somebody flush nat, once, while iptables makes its transaction of one of our inputs."""

    def interfere(text):
        if not when() or "-j DNAT" not in text:
            return
        kernel.before_restore = None
        kernel.tables |= {"nat": empty_tables()["nat"]}
        # Every line refers to what is gone, and nft says so of each.
        refusal = "RULE_APPEND failed (No such file or directory)"
        lines = range(1, text.count("\n") + 1)
        kernel.fail_restore(BatchRejected(refusal, batch=text, lines=lines))

    kernel.before_restore = interfere


@pytest.mark.parametrize("is_first", [True, False], ids=["first sync", "repair"])
def test_a_flush_while_we_write_is_no_services_fault(world, is_first):
    world.listed(make_node(), *GOOD)
    if not is_first:
        world.sync()
        world.kernel.tables["nat"] = empty_tables()["nat"]
        world.syncer.forget_live()
    flush_while_we_write(world.kernel)
    world.sync()

    assert world.quarantined == []
    assert world.own() == desired(*GOOD)


def test_a_flush_after_one_was_set_aside_is_no_other_services_fault(world):
    world.listed(make_node(), *GOOD, BAD_SERVICE, bad())
    flush_while_we_write(world.kernel, when=lambda: world.quarantined)
    world.sync()

    assert [name for name, _ in world.quarantined] == [BAD]
    assert world.own() == desired(*GOOD)


def test_waits_grow_up_to_a_limit_and_begin_anew_after_a_change():
    quarantine = Quarantine()
    waits = []
    for _ in range(8):
        quarantine.admit(BAD, None, "refused", 0.0)
        waits.append(quarantine.next_retry_at())
        quarantine.release_due(1e9)
    quarantine.release_changed([BAD])
    quarantine.admit(BAD, None, "refused", 0.0)

    assert waits == [30, 60, 120, 240, 480, 900, 900, 900]
    assert quarantine.next_retry_at() == 30


def test_how_long_it_lasts_counts_from_the_first_refusal_until_it_was_programmed():
    quarantine = Quarantine()
    quarantine.admit(BAD, None, "refused", 10.0)
    quarantine.release_due(1e9)
    quarantine.admit(BAD, None, "refused", 60.0)
    assert quarantine.cases[BAD].since == 10.0

    quarantine.release_due(1e9)
    quarantine.settle()
    quarantine.admit(BAD, None, "refused", 500.0)
    assert quarantine.cases[BAD].since == 500.0


def test_who_asks_is_told_which_service_why_since_when_and_what_was_refused(world):
    world.now = 40.0
    world.listed(make_node(), *GOOD, BAD_SERVICE, bad())
    world.sync()

    (case,) = world.syncer.programmed.quarantined
    # The wall clock shows 100 when the other one shows 40.
    assert (case.service, case.since, case.retry_at, case.attempts) == (BAD, 100.0, 130.0, 1)
    assert world.syncer.last_failure.message.startswith("cannot restore rules")
    assert any("10.180.66.6" in line for line in world.syncer.last_failure.lines)


# Where no line is named --------------------------------------------------------------------------


@pytest.fixture
def mute(metrics):
    """Give a world whose kernel refuses as legacy does: without saying what."""
    world = World(metrics)
    world.kernel.names_lines = False
    world.kernel.refuses = lambda line: "--to-destination 10.180.66.6" in line
    return world


def many(number):
    return [
        item
        for n in range(number)
        for item in (
            make_service(f"many{n:03}", cluster_ip=f"172.30.2.{n + 1}"),
            make_slice(f"many{n:03}"),
        )
    ]


def test_one_of_many_is_found_in_few_trials_of_which_each_is_a_sign_of_life(mute):
    mute.listed(make_node(), *many(128), BAD_SERVICE, bad())
    mute.sync()

    assert mute.syncer.quarantined == (BAD,)
    assert len(mute.kernel.restored) < 25
    assert mute.beats == len(mute.kernel.restored)


def test_counters_of_what_is_written_to_find_it_are_read_before(mute):
    mute.listed(make_node(), *many(8), BAD_SERVICE, bad())
    mute.sync()

    assert mute.surrounded == len(mute.kernel.restored)


def test_a_kernel_that_refuses_everything_blames_nobody(mute):
    mute.kernel.refuses = lambda line: line == "COMMIT"
    mute.listed(make_node(), *many(20))

    with pytest.raises(BatchRejected):
        mute.sync()
    assert mute.syncer.quarantined == ()
    assert len(mute.kernel.restored) < 5


def test_what_trials_wrote_before_the_lock_was_taken_is_not_forgotten(mute):
    mute.listed(make_node(), *GOOD)
    mute.sync()
    changed = [make_slice(f"good{number}", endpoints=["10.180.3.9"]) for number in (1, 2, 3)]
    mute.put(BAD_SERVICE, bad(), *changed)

    def be_locked_later(text):
        # What goes to the new endpoint is tried, Service by Service or in halves, and accepted.
        if "10.180.3.9" in text and "10.180.66.6" not in text:
            mute.kernel.before_restore = lambda _: mute.kernel.fail_restore(LockTimeout("held"))

    mute.kernel.before_restore = be_locked_later
    with pytest.raises(LockTimeout):
        mute.sync()
    mute.kernel.before_restore = None
    mute.store.delete("Service", "default", "bad")
    mute.put(*GOOD)
    mute.sync()

    assert mute.own() == desired(*GOOD)
