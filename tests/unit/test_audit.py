"""The audit: never wrong about rules that are right, and not blind to any that are not."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from kubeproxy_py import audit, rules, sync_loop
from kubeproxy_py.errors import BatchRejected
from kubeproxy_py.model import IPFamily, ServiceName
from kubeproxy_py.pacer import Pacer
from kubeproxy_py.ruleset import Ruleset
from kubeproxy_py.sync_loop import SyncLoop
from tests.support import crowds, states, strategies
from tests.support.builders import make_endpoint, make_port, make_service, make_slice
from tests.support.world import V4, World, desired

SVC1 = ServiceName("default", "svc1")


@pytest.fixture
def world(metrics):
    """Give a world with a hundred Services, so that chains are trees, that was synced."""
    world = World(metrics)
    world.listed(*some(100))
    world.sync()
    return world


def some(count):
    items = []
    for number in range(1, count + 1):
        items.append(
            make_service(
                f"svc{number}",
                cluster_ip=f"172.30.{number // 200}.{number % 200}",
                type="NodePort",
                ports=[make_port(80, nodePort=30000 + number)],
            )
        )
        items.append(make_slice(f"svc{number}", endpoints=[f"10.0.{number}.1"]))
    return items


def tree_options(family=V4):
    return msgspec.structs.replace(states.golden_options(family), layout="auto")


def look_at_all(world):
    """Look until every Service has been compared; return those that differ."""
    auditor = audit.Auditor(V4, world.store, clock=lambda: 0.0)
    return auditor.look(world.ruleset, ignored=())


def test_what_is_right_is_right(world):
    assert look_at_all(world) == ()


def test_a_look_takes_as_long_as_it_may_and_the_next_goes_on(world):
    ticks = iter(range(10**6))
    auditor = audit.Auditor(V4, world.store, clock=lambda: next(ticks) * audit._BUDGET_S / 4)
    for _ in range(10):
        auditor.look(world.ruleset, ignored=())

    assert 20 <= auditor.compared <= 40


def test_a_look_at_few_services_ends_when_all_were_seen(metrics):
    world = World(metrics)
    world.listed(*some(3))
    world.sync()
    auditor = audit.Auditor(V4, world.store, clock=lambda: 0.0)
    assert auditor.look(world.ruleset, ignored=()) == ()
    assert (auditor.compared, auditor.differed) == (3, 0)


def test_a_look_at_nothing_ends(metrics):
    world = World(metrics)
    world.listed()
    world.sync()

    assert look_at_all(world) == ()


def test_what_has_changed_and_was_not_synced_yet_is_not_compared(world):
    world.put(make_slice("svc1", endpoints=["10.0.9.9"]))

    assert look_at_all(world) == ()


def test_nothing_is_compared_while_everything_is_due(world):
    auditor = audit.Auditor(V4, world.store, clock=lambda: 0.0)
    world.store._families[V4].is_everything_due = True

    assert auditor.look(world.ruleset, ignored=()) == ()
    assert auditor.compared == 0


@given(st.lists(strategies.changes(), max_size=3))
def test_after_any_changes_every_service_is_held(rounds):
    ruleset = Ruleset(states.golden_options(V4))
    latest = {}
    for changes in rounds:
        ruleset.apply(changes)
        latest |= changes

    assert all(ruleset.holds(name, state) for name, state in latest.items())


@given(crowds.changed_crowds(), st.sampled_from(["auto", "tree", "flat"]))
def test_in_trees_as_well(pair, layout):
    before, after = pair
    options = msgspec.structs.replace(states.golden_options(V4), layout=layout)
    ruleset = Ruleset(options)
    ruleset.apply(before)
    ruleset.apply({**dict.fromkeys(before.keys() - after.keys()), **after})

    assert all(ruleset.holds(name, state) for name, state in after.items())


def wrong_chain(world):
    chain = next(name for name in world.ruleset.tables["nat"] if name.startswith("KUBE-SEP-"))
    world.ruleset.tables["nat"][chain] = ("-j RETURN",)


def lost_service(world):
    world.ruleset._services.pop(SVC1)


def surplus_service(world):
    world.ruleset._services[ServiceName("default", "ghost")] = world.ruleset._services[SVC1]


def other_fragment(world):
    world.ruleset._services[SVC1] = world.ruleset._services[ServiceName("default", "svc2")]


def lost_entry(world):
    nat = world.ruleset.tables["nat"]
    for chain, texts in nat.items():
        kept = tuple(text for text in texts if '"default/svc1 cluster IP"' not in text)
        if chain.startswith("KUBE-SV") and kept != texts:
            nat[chain] = kept


def lost_root(world):
    world.ruleset.tables["nat"][rules.SERVICES] = ()


def lost_node_port_root(world):
    world.ruleset.tables["nat"][rules.NODE_PORTS] = ()


FAULTS = [
    wrong_chain,
    lost_service,
    surplus_service,
    other_fragment,
    lost_entry,
    lost_root,
    lost_node_port_root,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("layout", ["flat", "auto"])
def test_what_is_wrong_is_found(world, fault, layout):
    world.ruleset.rebuild(
        Ruleset(tree_options()).options if layout == "auto" else world.ruleset.options,
        {name: world.ruleset.state(name) for name in world.ruleset.names()},
    )
    fault(world)

    assert look_at_all(world)


def test_mismatches_count_from_zero_so_that_an_alert_sees_the_first(metrics):
    assert World(metrics).value("audit_mismatches_total") == 0


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_is_wrong_is_told_and_built_anew(world, fault):
    fault(world)
    with capture_logs() as logs:
        while world.syncer.audit():
            pass
        world.sync()

    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == [
        "audit.mismatch_found"
    ]
    assert world.own() == desired(*some(100))
    assert world.value("audit_mismatches_total") >= 1
    assert world.value("audited_services_total") >= 1
    assert world.syncer.audited == (
        world.value("audited_services_total"),
        world.value("audit_mismatches_total"),
    )
    world.ruleset = world.syncer._ruleset
    assert look_at_all(world) == ()


def test_wrong_rules_that_reached_the_kernel_are_mended_there(world):
    """The fault is in what was computed, so the kernel has it and nothing drifted."""
    chain = next(name for name in world.ruleset.tables["nat"] if name.startswith("KUBE-SEP-"))
    world.ruleset.tables["nat"][chain] = ("-j RETURN",)
    world.kernel.tables["nat"][chain] = ("-j RETURN",)
    while world.syncer.audit():
        pass
    world.sync()

    assert world.own() == desired(*some(100))
    assert world.value("iptables_chains_repaired_total", table="nat") is None


def test_nothing_is_compared_before_everything_was_listed(metrics):
    assert World(metrics).syncer.audit()


def test_a_service_that_is_set_aside_is_not_compared(metrics):
    world = World(metrics)
    world.listed(*some(2))
    world.sync()
    world.kernel.refuses = lambda line: "10.9.9.9" in line
    world.put(make_slice("svc1", endpoints=[make_endpoint("10.9.9.9")]))
    world.sync()
    assert world.syncer.quarantined == (SVC1,)

    assert world.syncer.audit()


def test_a_service_that_is_refused_after_a_mismatch_keeps_its_old_rules(metrics):
    world = World(metrics)
    world.listed(*some(2))
    world.sync()
    wrong_chain(world)
    while world.syncer.audit():
        pass
    world.kernel.refuses = lambda line: "10.9.9.9" in line
    world.put(make_slice("svc1", endpoints=[make_endpoint("10.9.9.9")]))
    world.sync()

    assert world.syncer.quarantined == (SVC1,)
    assert world.own() == desired(*some(2))


def test_a_sync_that_fails_after_a_mismatch_is_repeated_with_what_was_built_anew(metrics):
    world = World(metrics)
    world.listed(*some(2))
    world.sync()
    wrong_chain(world)
    while world.syncer.audit():
        pass
    world.kernel.tables["nat"][rules.SERVICES] = ()
    world.fail(BatchRejected("no"))
    world.sync()

    assert world.own() == desired(*some(2))


class NoHealth:
    def started(self, family):
        pass

    queued = updated = excused = started


def test_the_loop_audits_when_it_has_nothing_to_do_and_asks_for_a_sync_if_need_be(world):
    now = [0.0]
    pacer = Pacer(retry_s=1, audit_s=3600)
    loop = SyncLoop(
        V4, world.syncer, pacer, health=NoHealth(), metrics=world.metrics, clock=lambda: now[0]
    )
    now[0] = sync_loop._AUDIT_EVERY_S
    assert loop._wait() == "audit"
    loop._audit()
    assert pacer.due_at() == float("inf")
    lost_root(world)
    now[0] += sync_loop._AUDIT_EVERY_S
    assert loop._wait() == "audit"
    loop._audit()

    assert pacer.due_at() == now[0] + 0.01


def test_a_sync_comes_before_an_audit(world):
    now = [0.0]
    loop = SyncLoop(
        V4,
        world.syncer,
        Pacer(retry_s=1, audit_s=3600),
        health=NoHealth(),
        metrics=world.metrics,
        clock=lambda: now[0],
    )
    loop.nudge()
    now[0] = sync_loop._AUDIT_EVERY_S

    assert loop._wait() == "sync"


def test_both_families_can_be_held():
    for family in IPFamily:
        ruleset = Ruleset(states.golden_options(family))
        ruleset.apply(states.service_states(states.golden_items("state"), family))
        assert all(ruleset.holds(name, ruleset.state(name)) for name in ruleset.names())
