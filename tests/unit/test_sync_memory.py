"""What cannot be written, for days, is not remembered piece by piece."""

import gc
import itertools
import tracemalloc

import pytest

from kubeproxy_py import repairs, rules, store, sync
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.drift import Culprit, Look
from kubeproxy_py.errors import IptablesError, LockTimeout
from kubeproxy_py.iptables import plan
from kubeproxy_py.model import ServiceName
from tests.support.builders import make_node, make_service, make_slice
from tests.support.world import V4, World, desired

ROUNDS = 100
# Less than a rule for each round.
NOTHING = 60 * ROUNDS
_FRESH = itertools.count(1)


@pytest.fixture(autouse=True)
def _low_limits(monkeypatch):
    monkeypatch.setattr(store, "_MAX_TRIGGERS", 20)
    monkeypatch.setattr(store, "_MAX_STRAYS", 20)
    monkeypatch.setattr(sync, "_MAX_TRIGGERS", 20)
    monkeypatch.setattr(repairs, "_MAX_ASKED_FOR", 20)


@pytest.fixture
def world(metrics):
    world = World(metrics)
    world.listed(make_node(), make_service(), make_slice())
    world.sync()
    return world


def endpoint(number):
    eps = make_slice(endpoints=[f"10.180.{number // 250}.{number % 250 + 1}"])
    eps["metadata"]["annotations"] = {
        "endpoints.kubernetes.io/last-change-trigger-time": "1970-01-01T00:01:30Z"
    }
    return eps


def churn(world):
    """Let an endpoint be another one, and a Service come; return the Service's name."""
    number = next(_FRESH)
    name = f"passing{number:06}"
    world.put(endpoint(number), make_service(name, cluster_ip="172.30.7.7"), make_slice(name))
    return name


def end(world, name):
    world.store.delete("EndpointSlice", "default", f"{name}-abcde")
    world.store.delete("Service", "default", name)


def growth(turn):
    """Return by how many bytes the last ROUNDS of many turns have made this process bigger."""
    for _ in range(ROUNDS):
        turn()
    tracemalloc.start()
    try:
        for _ in range(ROUNDS):
            turn()
        gc.collect()
        # What stands for what was there before is no growth: it is as much at the first turn.
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(ROUNDS):
            turn()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def unreadable(kernel):
    kernel.fail_save(IptablesError("no"))


def locked(kernel):
    kernel.fail_restore(LockTimeout("held"))


def refusing(kernel):
    kernel.refuses = lambda line: line == "COMMIT"


def fail_at(world, failing):
    """Let a Service come and go, and the sync of each fail."""
    name = churn(world)
    fail(world, failing)
    end(world, name)
    fail(world, failing)


def fail(world, failing):
    world.syncer.look(Look(None, (Culprit("rival", next(_FRESH)),)))
    failing(world.kernel)
    with pytest.raises(IptablesError):
        world.sync()
    world.kernel.restored.clear()


FAILURES = [unreadable, locked, refusing]


@pytest.mark.parametrize("failing", FAILURES)
def test_a_family_whose_syncs_fail_takes_no_more_memory_the_longer_it_lasts(world, failing):
    assert growth(lambda: fail_at(world, failing)) < NOTHING


def test_a_family_that_nobody_writes_takes_no_more_memory_the_longer_it_lasts(world):
    assert growth(lambda: end(world, churn(world))) < NOTHING


@pytest.mark.parametrize("failing", FAILURES)
def test_when_it_is_over_everything_is_written_and_nothing_of_ours_called_drift(world, failing):
    for _ in range(50):
        fail_at(world, failing)
    left = churn(world)
    fail(world, failing)
    world.kernel.refuses = lambda line: False
    result = world.sync()

    assert world.own() == desired(
        make_service(),
        endpoint(int(left[-6:])),
        make_service(left, cluster_ip="172.30.7.7"),
        make_slice(left),
    )
    assert result.repairs == ()
    assert not world.sync().batches


def test_when_it_is_over_everything_is_handed_out(world):
    for _ in range(50):
        end(world, churn(world))
    changes = world.store.take(V4)

    assert changes.is_everything
    assert set(changes.services) == {ServiceName("default", "svc1")}
    assert world.store.take(V4).services == {}


def test_a_jump_that_others_took_away_is_told_though_too_much_was_asked_for():
    found = repairs.Repairs()
    found.ask_for(frozenset(ChainId("nat", f"KUBE-SEP-{n}") for n in range(21)))
    jump = rules.JUMPS[0]
    section = plan.Section(jump.table, {"KUBE-SEP-1": ()}, insert=(jump,))
    found.note([plan.Batch((section,))], live={}, desired={})
    (repair,) = found.take(V4, ())

    assert (repair.kind, repair.chains) == ("jump_removed", (jump.builtin,))
    assert found.asked_for == frozenset()


def test_latency_is_observed_of_the_first_changes_only(world):
    for _ in range(30):
        fail_at(world, unreadable)
    world.sync()

    assert world.value("network_programming_duration_seconds_count") == 20
