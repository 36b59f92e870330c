"""A sync costs what has changed, however many Services there are: counted, not timed."""

import functools
import itertools
import sys
import tracemalloc

import pytest
from prometheus_client import CollectorRegistry

from kubeproxy_py.metrics import Metrics
from tests.support import builders
from tests.support.builders import make_service, make_slice
from tests.support.world import World

# Both are large clusters to kube-proxy, so that their rules are of one kind.
FEW, MANY = 250, 5000
ENDPOINTS = 5
_FRESH = itertools.count(2)


class DeafKernel:
    """Takes whatever it is told: a real kernel costs this process nothing either."""

    unreadable = frozenset()

    def has_rules(self, chain):
        return False

    def save(self, *, known=None):
        return {}

    def restore(self, text):
        pass


@functools.cache
def world(services):
    """Return a world of so many Services that was synced. Every test leaves it as it was."""
    world = World(Metrics(CollectorRegistry()), DeafKernel(), max_batch_rules=2500, layout="auto")
    world.listed(*builders.cluster(services, ENDPOINTS))
    world.sync()
    return world


def endpoint_changes(world):
    last = f"10.1.250.{next(_FRESH)}"
    world.put(make_slice("svc-7", name="svc-7-00000", endpoints=["10.1.250.1", last]))


def service_comes(world):
    world.put(make_service("new", cluster_ip="172.30.254.1"), make_slice("new"))


def service_goes(world):
    world.store.delete("EndpointSlice", "default", "new-abcde")
    world.store.delete("Service", "default", "new")


def nothing_changes(_world):
    pass


# In this order, because each finds what the one before has left.
CHANGES = [nothing_changes, endpoint_changes, service_comes, service_goes]


def calls(world, change):
    """Return how many functions a change and its sync call, those of C included."""
    count = 0

    def note(_frame, event, _argument):
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(note)
    try:
        change(world)
        world.sync()
    finally:
        sys.setprofile(None)
    return count


def peak_bytes(world, change):
    """Return the most memory a change and its sync take: what is copied as a whole shows in it."""
    tracemalloc.start()
    try:
        change(world)
        world.sync()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("measure", [calls, peak_bytes])
def test_a_sync_costs_the_same_however_many_services_there_are(measure):
    costs = {}
    for services in (FEW, MANY):
        for change in CHANGES:
            change(
                world(services)
            )  # once before: what is made only the first time is no sync's cost
            world(services).sync()
        for change in CHANGES:
            costs[services, change.__name__] = measure(world(services), change)
    grown = {
        change.__name__: (costs[FEW, change.__name__], costs[MANY, change.__name__])
        for change in CHANGES
        if costs[MANY, change.__name__] > 1.5 * costs[FEW, change.__name__]
    }

    assert grown == {}
