"""A state file in the recipe: only for a kernel without rules, only until the lists are there."""

import pytest

from kubeproxy_py import snapshot
from kubeproxy_py.errors import IptablesError
from kubeproxy_py.iptables import chains
from kubeproxy_py.model import Node
from tests.support import states
from tests.support.builders import make_service, make_slice
from tests.support.world import V4, World, desired


@pytest.fixture
def world(metrics):
    """Give a world in which nothing has been listed."""
    return World(metrics)


def restore(world, *items):
    services = {V4: states.service_states(items, V4)}
    return world.store.restore(snapshot.Snapshot(snapshot.State(Node(name="node1"), services), 1.0))


def test_a_kernel_without_rules_gets_those_of_the_state_file(world):
    restore(world, make_service("web"), make_slice("web"))

    assert world.sync().is_full
    assert world.own() == desired(make_service("web"), make_slice("web"))
    assert world.syncer.is_restored
    assert world.value("snapshot_in_use") == 1


def test_rules_that_are_there_are_newer_than_any_file(world):
    newer = (make_service("new"), make_slice("new"))
    world.listed(*newer)
    world.sync()
    restarted = World(world.metrics, world.kernel)
    restore(restarted, make_service("old"), make_slice("old"))

    assert restarted.sync() is None
    assert restarted.own() == desired(*newer)
    assert not restarted.syncer.is_restored


def test_a_flush_while_no_api_server_answers_leads_to_the_state_file(world):
    world.listed(make_service("new"), make_slice("new"))
    world.sync()
    restarted = World(world.metrics, world.kernel)
    restore(restarted, make_service("old"), make_slice("old"))
    restarted.sync()
    for table, found in world.kernel.tables.items():
        world.kernel.tables[table] = {name: () for name in found if name in chains.BUILTIN}

    assert restarted.sync() is not None
    assert restarted.own() == desired(make_service("old"), make_slice("old"))


def test_the_lists_alone_count_once_they_are_there(world):
    restore(world, make_service("old"), make_slice("old"))
    world.sync()
    world.listed(make_service("new"), make_slice("new"))
    world.sync()

    assert world.own() == desired(make_service("new"), make_slice("new"))
    assert not world.syncer.is_restored
    assert world.value("snapshot_in_use") == 0


def test_a_restored_state_that_could_not_be_written_is_tried_again(world):
    restore(world, make_service("old"), make_slice("old"))
    world.fail(IptablesError("once"))

    assert world.sync() is not None
    assert world.own() == desired(make_service("old"), make_slice("old"))


def test_a_restored_state_is_repaired_like_any_other(world):
    restore(world, make_service("old"), make_slice("old"))
    world.sync()
    wanted = world.own()
    world.kernel.tables["nat"]["KUBE-SERVICES"] = ()
    world.syncer.forget_live()
    world.sync()

    assert world.own() == wanted


def test_no_load_balancer_is_told_of_endpoints_on_the_word_of_a_file(world):
    local = make_service(
        "lb",
        type="LoadBalancer",
        externalTrafficPolicy="Local",
        healthCheckNodePort=30000,
        lb_ips=["1.2.3.4"],
    )
    restore(world, local, make_slice("lb"))
    world.sync()
    world.listed(local, make_slice("lb"))
    world.sync()

    assert [len(told) for told in world.health_checks] == [0, 1]


def test_a_restored_cluster_may_be_a_large_one(world):
    items = [make_service("big")]
    items += [
        make_slice("big", name=f"big-{n}", endpoints=[f"10.1.{n}.{i}" for i in range(1, 251)])
        for n in range(5)
    ]
    restore(world, *items)
    world.sync()

    assert world.ruleset.is_large
    assert world.ruleset.options.is_large


def test_lists_that_come_while_the_kernel_is_read_win(world):
    restore(world, make_service("old"), make_slice("old"))
    has_rules = world.kernel.has_rules

    def slow(chain):
        world.listed(make_service("new"), make_slice("new"))
        return has_rules(chain)

    world.kernel.has_rules = slow
    world.sync()

    assert world.own() == desired(make_service("new"), make_slice("new"))
    assert not world.syncer.is_restored
