"""What is waited for of the Node at the start, and what its changes mean afterwards."""

import pytest
from structlog.testing import capture_logs

from kubeproxy_py import own_node
from kubeproxy_py.errors import KubeProxyError
from kubeproxy_py.health import ProxyHealth
from kubeproxy_py.lifecycle import Lifecycle
from kubeproxy_py.model import IPFamily, Node
from kubeproxy_py.notify import Notifier
from kubeproxy_py.snapshot import Snapshot, State
from kubeproxy_py.store import Store
from tests.support import states
from tests.support.addresses import V4
from tests.support.builders import make_node


class World:
    """The Node of node1, a store, and a wait that takes no time: after each rest something happens."""

    def __init__(self, metrics, monkeypatch, **settings):
        self.health = ProxyHealth(30.0)
        self.life = Lifecycle(Notifier({}), self.health)
        self.rests = []
        self.meanwhile = []
        monkeypatch.setattr(self.life, "rest", self._rest)
        self.node = own_node.OwnNode(
            "node1",
            life=self.life,
            health=self.health,
            **{"is_in_files": False, "needs_pod_cidrs": False, **settings},
        )
        self.store = Store(
            node_name="node1",
            families=[IPFamily.V4],
            metrics=metrics,
            report=lambda problem: None,
            changed=lambda family: None,
            node_changed=self.node.changed,
        )

    def _rest(self, seconds):
        self.rests.append(seconds)
        if self.meanwhile:
            self.meanwhile.pop(0)()
        return self.life.stop.is_set()

    def listed(self, *nodes):
        self.store.replace("Node", map(states.decode, nodes))

    def put(self, node):
        self.store.upsert("Node", states.decode(node))

    def wait(self):
        with capture_logs() as logs:
            node = self.node.wait(self.store)
        return node, [entry["event"] for entry in logs]


@pytest.fixture
def world(metrics, monkeypatch):
    """Return a function that makes a World."""
    return lambda **settings: World(metrics, monkeypatch, **settings)


@pytest.fixture
def no_patience(monkeypatch):
    """Let what is missing be missing at once."""
    monkeypatch.setattr(own_node, "_IPS_WAIT_S", 0.0)
    monkeypatch.setattr(own_node, "_POD_CIDRS_WAIT_S", 0.0)


def test_the_node_is_looked_for_soon_and_then_less_often(world):
    world = world()
    world.meanwhile = [*[lambda: None] * 20, lambda: world.listed(make_node())]
    node, logs = world.wait()

    assert (node.ips, logs) == ((V4.node,), [])
    assert world.rests[0] == 0.05
    assert world.rests == sorted(world.rests)
    assert world.rests[-1] == 1.0


def test_a_node_from_the_state_file_will_do(world):
    world = world()
    state = State(node=Node(name="node1", ips=(V4.node,)), services={})
    world.meanwhile = [lambda: world.store.restore(Snapshot(saved_at=1.0, state=state))]
    node, _ = world.wait()

    assert node.ips == (V4.node,)


def test_a_node_gets_time_to_be_given_its_addresses(world):
    world = world()
    world.listed(make_node(ips=()))
    world.meanwhile = [lambda: None, lambda: world.put(make_node())]
    node, logs = world.wait()

    assert (node.ips, logs) == ((V4.node,), [])


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("nodes", [[], [make_node(ips=())]], ids=["no Node", "no addresses"])
def test_a_node_without_addresses_is_gone_on_without_in_the_end(world, nodes):
    world = world()
    world.listed(*nodes)
    node, logs = world.wait()

    assert (node.ips, logs) == ((), ["node.wait_ended"])


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize(
    ("nodes", "what"),
    [
        ([], 'timeout waiting for node "node1" to exist'),
        ([make_node(pod_cidrs=())], 'timeout waiting for PodCIDR allocation on node "node1"'),
    ],
    ids=["no Node", "no pod CIDRs"],
)
def test_pod_cidrs_that_are_needed_and_do_not_come_are_an_error(world, nodes, what):
    world = world(needs_pod_cidrs=True)
    world.listed(*nodes)

    with pytest.raises(KubeProxyError, match=what):
        world.wait()


def test_pod_cidrs_that_are_needed_are_waited_for(world):
    world = world(needs_pod_cidrs=True)
    world.listed(make_node(pod_cidrs=()))
    world.meanwhile = [lambda: world.put(make_node())]
    node, _ = world.wait()

    assert node.pod_cidrs == (V4.pod_cidr,)


def test_files_without_a_node_are_no_reason_to_wait(world):
    world = world(is_in_files=True, needs_pod_cidrs=True)
    world.listed()
    node, logs = world.wait()

    assert (node, logs, world.rests) == (Node(name="node1"), ["node.absent"], [])
    assert world.health.verdict().is_eligible


@pytest.mark.parametrize(
    "nodes", [None, [make_node(ips=())], [make_node(pod_cidrs=())]], ids=["list", "IPs", "CIDRs"]
)
def test_a_signal_ends_the_wait_without_a_word(world, nodes):
    world = world(needs_pod_cidrs=True)
    if nodes is not None:
        world.listed(*nodes)
    world.meanwhile = [world.life.stop.set]

    assert world.wait() == (None, [])
    assert world.life.failure is None


def started(world, *, ips=(), pod_cidrs=()):
    world.node.at_start = Node(name="node1", ips=ips, pod_cidrs=pod_cidrs)


@pytest.mark.parametrize(
    ("is_needed", "before", "after", "is_failure"),
    [
        (True, ("10.0.0.0/24",), ("10.0.1.0/24",), True),
        (True, ("10.0.0.0/24", "fd00::/64"), ("fd00::/64", "10.0.0.0/24"), True),
        (True, ("10.0.0.0/24",), (), True),
        (True, ("10.0.0.0/24",), ("10.0.0.0/24",), False),
        (False, ("10.0.0.0/24",), ("10.0.1.0/24",), False),
    ],
)
def test_changed_pod_cidrs_end_it_where_rules_depend_on_them(
    world, is_needed, before, after, is_failure
):
    world = world(needs_pod_cidrs=is_needed)
    started(world, pod_cidrs=before)
    world.node.changed(Node(name="node1", pod_cidrs=after))

    assert world.life.stop.is_set() is is_failure


def test_pod_cidrs_that_come_while_they_are_waited_for_are_no_change(world):
    # What is there at the end of the wait counts.
    world = world(needs_pod_cidrs=True)
    world.node.changed(Node(name="node1", pod_cidrs=("10.0.1.0/24",)))

    assert not world.life.stop.is_set()


def test_node_ips_that_change_are_told_and_nothing_more(world):
    world = world()
    started(world, ips=("192.168.0.2",))
    with capture_logs() as logs:
        world.node.changed(Node(name="node1", ips=("192.168.0.2",), zone="zone-b"))
        world.node.changed(Node(name="node1", ips=("192.168.0.3",)))

    assert [entry["event"] for entry in logs] == ["node.ips_changed"]
    assert not world.life.stop.is_set()


def test_a_node_that_is_leaving_gets_no_traffic(world):
    world = world()
    world.node.changed(Node(name="node1"))
    assert world.health.verdict().is_eligible
    world.node.changed(Node(name="node1", is_eligible=False))

    assert not world.health.verdict().is_eligible
