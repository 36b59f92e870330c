"""Objects in, changes out."""

import threading

import pytest

from kubeproxy_py import snapshot
from kubeproxy_py.model import IPFamily, Node, PortKey, ServiceName
from kubeproxy_py.store import Store
from tests.support import states
from tests.support.builders import make_endpoint, make_node, make_port, make_service, make_slice

V4, V6 = IPFamily.V4, IPFamily.V6
SVC1 = ServiceName("default", "svc1")
STARTED = 1000.0  # of the store, in Unix time
DUAL = {"ipFamilies": ["IPv4", "IPv6"], "clusterIPs": ["172.30.0.41", "fd00:172:30::41"]}


class World:
    """A store, and what it told."""

    def __init__(self, metrics, families=(V4, V6), **options):
        self.problems = []
        self.nudged = []
        self.nodes = []
        self.refused = []
        self.known = {}
        self.metrics = metrics
        self.store = Store(
            node_name="node1",
            families=families,
            metrics=metrics,
            report=self.problems.append,
            changed=self.nudged.append,
            node_changed=self.nodes.append,
            refused=self.refused.append,
            clock=lambda: STARTED,
            **options,
        )

    def put(self, *items):
        for item in items:
            self.store.upsert(item["kind"], states.decode(item))

    def remove(self, item):
        meta = item["metadata"]
        self.store.delete(item["kind"], meta.get("namespace", ""), meta["name"])

    def listed(self, kind, *items):
        self.store.replace(kind, [states.decode(item) for item in items])

    def addresses(self, family=V4, changes=None):
        """Return the endpoints by Service in what is to be synced."""
        changes = changes or self.store.take(family)
        return {
            str(name): None
            if state is None
            else [ep.address for eps in state.endpoints.values() for ep in eps]
            for name, state in changes.services.items()
        }

    def forget(self):
        """Take all that is there, so that only what comes now is seen."""
        for family in (V4, V6):
            self.store.take(family)
        self.nudged.clear()


@pytest.fixture
def world(metrics):
    """Give a store that was told one Service with one endpoint, and was asked since."""
    world = World(metrics)
    world.listed("Service", make_service())
    world.listed("EndpointSlice", make_slice())
    world.forget()
    return world


def triggered(item, second):
    minute, second = divmod(second, 60)
    item["metadata"]["annotations"] = {
        "endpoints.kubernetes.io/last-change-trigger-time": f"1970-01-01T00:{minute:02}:{second:02}Z"
    }
    return item


# Before everything was listed --------------------------------------------------------------------


def test_nothing_is_handed_out_before_both_kinds_were_listed(metrics):
    world = World(metrics)
    world.put(make_service(), make_slice())
    assert world.store.take(V4) is None

    world.listed("Service", make_service())
    assert (world.store.take(V4), world.store.is_synced, world.nudged) == (None, False, [])

    world.listed("EndpointSlice", make_slice())
    assert (world.addresses(), world.store.is_synced) == (
        {"default/svc1": ["10.180.1.11:8080"]},
        True,
    )


def test_each_kind_tells_whether_it_was_listed(metrics):
    world = World(metrics)
    world.listed("Node")

    assert [world.store.has_listed(kind) for kind in ("Node", "Service")] == [True, False]


def test_every_family_is_nudged_once_when_everything_was_listed(metrics):
    world = World(metrics)
    world.listed("EndpointSlice")
    world.listed("Service")

    assert world.nudged == [V4, V6]


def test_first_taking_is_of_everything(metrics):
    world = World(metrics)
    world.listed("EndpointSlice")
    world.listed("Service", make_service())

    assert [world.store.take(V4).is_everything for _ in range(2)] == [True, False]


# What is a change --------------------------------------------------------------------------------


def test_nothing_changed_is_nothing_handed_out(world):
    assert world.addresses() == {}


def test_same_objects_again_are_no_change(world):
    world.put(make_service(labels={"a": "b"}), make_slice(labels={"a": "b"}))

    assert (world.nudged, world.addresses()) == ([], {})


def test_changed_service_is_handed_out_once(world):
    world.put(make_service(ports=[81]))

    assert world.nudged == [V4]
    assert world.addresses().keys() == {"default/svc1"}
    assert world.addresses() == {}


def test_changed_slice_hands_out_its_service(world):
    world.put(make_slice(endpoints=["10.180.1.12"]))

    assert (world.nudged, world.addresses()) == ([V4], {"default/svc1": ["10.180.1.12:8080"]})


def test_change_of_one_family_is_none_of_the_other(world):
    world.put(make_service(**DUAL))
    world.forget()
    world.put(make_slice(name="six", endpoints=["fd00:10::1"]))

    assert world.nudged == [V6]
    assert world.addresses(V4) == {}
    assert world.addresses(V6) == {"default/svc1": ["[fd00:10::1]:8080"]}


def test_slices_of_one_service_are_merged(world):
    world.put(make_slice(name="b", endpoints=["10.180.1.1"]))

    # As text: a colon comes after a digit.
    assert world.addresses() == {"default/svc1": ["10.180.1.11:8080", "10.180.1.1:8080"]}


def test_slice_that_comes_before_its_service_is_kept_for_it(world):
    world.put(make_slice("late", endpoints=["10.180.1.9"]))
    assert world.addresses() == {"default/late": None}

    world.put(make_service("late", cluster_ip="172.30.0.99"))
    assert world.addresses() == {"default/late": ["10.180.1.9:8080"]}


def test_deleted_service_is_handed_out_as_gone(world):
    world.remove(make_service())

    assert world.addresses() == {"default/svc1": None}


def test_endpoints_of_a_deleted_service_serve_its_successor(world):
    world.remove(make_service())
    world.forget()
    world.put(make_service(cluster_ip="172.30.0.77"))

    assert world.addresses() == {"default/svc1": ["10.180.1.11:8080"]}


@pytest.mark.parametrize(
    "spec", [{"type": "ExternalName"}, {"clusterIP": "None", "ipFamilies": None}]
)
def test_service_that_becomes_one_to_ignore_goes(world, spec):
    world.put(make_service(**spec))

    assert world.addresses() == {"default/svc1": None}


def test_deleted_slice_leaves_the_others(world):
    world.put(make_slice(name="b", endpoints=["10.180.1.1"]))
    world.forget()
    world.remove(make_slice())

    assert world.addresses() == {"default/svc1": ["10.180.1.1:8080"]}


@pytest.mark.parametrize(
    "item", [make_service("unknown"), make_slice("unknown"), make_node("unknown")]
)
def test_deleting_what_is_not_known_is_no_change(world, item):
    world.remove(item)

    assert (world.nudged, world.addresses()) == ([], {})


def test_slice_that_is_given_to_another_service_leaves_the_first(world):
    world.put(make_service("svc2", cluster_ip="172.30.0.42"))
    world.forget()
    world.put(make_slice("svc2", name="svc1-abcde"))

    assert world.addresses() == {"default/svc1": [], "default/svc2": ["10.180.1.11:8080"]}


def test_slice_that_changes_its_family_leaves_the_first(world):
    world.put(make_service(**DUAL))
    world.forget()
    world.put(make_slice(endpoints=["fd00:10::1"]))

    assert sorted(family.value for family in world.nudged) == ["IPv4", "IPv6"]
    assert world.addresses(V4) == {"default/svc1": []}
    assert world.addresses(V6) == {"default/svc1": ["[fd00:10::1]:8080"]}


def test_slice_that_loses_its_label_leaves_its_service(world):
    world.put(make_slice(""))
    item = make_slice()
    item["metadata"]["labels"] = {}
    world.put(item)

    assert world.addresses() == {"default/svc1": []}


def test_family_that_this_host_has_not_is_ignored(metrics):
    world = World(metrics, families=[V4])
    world.listed("Service", make_service(**DUAL))
    world.listed("EndpointSlice", make_slice(endpoints=["fd00:10::1"]))

    assert world.nudged == [V4]
    assert world.addresses(V4) == {"default/svc1": []}


def test_store_forgets_the_slices_that_are_gone(world):
    world.put(make_slice(name="b"), make_slice("svc2", name="c"))
    for item in (make_slice(), make_slice(name="b"), make_slice("svc2", name="c")):
        world.remove(item)

    assert world.store._slice_owners == {}
    assert world.store._families[V4].slices == {}


# Listing again -----------------------------------------------------------------------------------


def test_listing_again_removes_what_is_not_among_them(world):
    world.put(make_service("svc2", cluster_ip="172.30.0.42"), make_slice("svc2"))
    world.forget()
    world.listed("Service", make_service())
    world.listed("EndpointSlice", make_slice())

    assert world.addresses() == {"default/svc2": None}


def test_listing_the_same_again_is_no_change(world):
    world.listed("Service", make_service())
    world.listed("EndpointSlice", make_slice())
    world.listed("Node")

    assert (world.nudged, world.addresses()) == ([], {})


def test_listing_again_never_shows_a_service_without_its_endpoints(world):
    """A slice that is replaced by another must not leave a gap between the two."""
    seen = []
    world.store._changed = lambda family: seen.append(world.addresses(family))
    world.listed("EndpointSlice", make_slice(name="new"))

    assert seen == [{"default/svc1": ["10.180.1.11:8080"]}] * 2


# For conntrack and metrics -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "has_udp"),
    [
        pytest.param([make_slice(ports=[make_port(53, protocol="UDP")])], True, id="comes"),
        pytest.param([make_slice(endpoints=["10.180.1.12"])], False, id="TCP"),
        pytest.param(
            [make_service(ports=[make_port(53, protocol="UDP")])], False, id="Service only"
        ),
    ],
)
def test_change_of_udp_endpoints_is_told(world, change, has_udp):
    world.put(*change)

    assert [world.store.take(V4).has_udp for _ in range(2)] == [has_udp, False]


def test_udp_endpoints_that_go_are_told(world):
    item = make_slice(ports=[make_port(53, protocol="UDP")])
    world.put(item)
    world.forget()
    world.remove(item)

    assert world.store.take(V4).has_udp


def test_trigger_times_are_handed_out_once(world):
    world.put(triggered(make_slice(), 1001), triggered(make_slice(name="b"), 1002))

    assert [world.store.take(V4).trigger_times for _ in range(2)] == [(1001.0, 1002.0), ()]


def test_the_first_trigger_times_are_kept_where_nobody_takes_them(world):
    for second in range(1001, 1301):
        world.put(triggered(make_slice(endpoints=[f"10.180.1.{second % 200 + 1}"]), second))

    assert world.store.take(V4).trigger_times == tuple(range(1001, 1101))


def test_what_was_triggered_before_the_start_is_nobodys_latency(world):
    world.put(triggered(make_slice(), 999))

    assert world.store.take(V4).trigger_times == ()


def test_deleted_slice_forgets_when_its_service_was_triggered(world):
    world.put(triggered(make_slice(), 1001))
    world.remove(make_slice())

    assert world.store.take(V4).trigger_times == ()


def test_changes_are_counted_and_pending_until_taken(world):
    def value(name):
        return world.metrics.registry.get_sample_value(f"kubeproxy_sync_proxy_rules_{name}")

    before = value("endpoint_changes_total"), value("service_changes_total")
    world.put(make_slice(endpoints=["10.180.1.12"]), make_service(ports=[81]))
    assert (value("endpoint_changes_total"), value("service_changes_total")) > before
    assert (value("endpoint_changes_pending"), value("service_changes_pending")) == (1, 1)

    world.store.take(V4)
    assert (value("endpoint_changes_pending"), value("service_changes_pending")) == (0, 0)


def test_problems_of_both_kinds_are_reported(world):
    world.put(
        make_service(ports=[make_port(80, name="a"), make_port(0, name="b")]),
        make_slice(endpoints=[make_endpoint("x")]),
    )

    assert [(problem.kind, problem.field) for problem in world.problems] == [
        ("Service", "spec.ports[1].port"),
        ("EndpointSlice", "endpoints[0].addresses[0]"),
    ]


# The own Node ------------------------------------------------------------------------------------


def test_own_node_is_told_and_others_are_not(world):
    world.put(make_node("node2"), make_node("node1"))

    assert [node.name for node in world.nodes] == ["node1"]
    assert world.store.node == world.nodes[0]


def test_same_node_again_is_not_told(world):
    world.put(make_node(), make_node(annotations={"a": "b"}))

    assert len(world.nodes) == 1


def test_change_of_zone_hands_out_everything_to_both_families(world):
    world.put(make_node(zone="zone-b"))
    changes = world.store.take(V4)

    assert world.nudged == [V4, V6]
    assert (changes.is_everything, changes.zone) == (True, "zone-b")
    assert world.addresses(changes=changes).keys() == {"default/svc1"}


def test_change_of_anything_else_hands_out_nothing(world):
    world.put(make_node())
    world.forget()
    world.put(make_node(taints=[{"key": "ToBeDeletedByClusterAutoscaler"}]))

    assert world.nudged == []
    assert not world.store.take(V4).is_everything
    assert not world.nodes[-1].is_eligible


def test_deleted_node_keeps_its_last_verdict(world):
    world.put(make_node())
    world.remove(make_node())

    assert world.store.node.name == "node1"


# Everything, and threads --------------------------------------------------------------------------


def test_another_zone_means_everything_with_what_changed_and_without_what_went(world):
    world.put(make_service("svc2", cluster_ip="172.30.0.2"))
    world.put(make_slice(endpoints=["10.180.1.12"]))
    world.put(make_node(zone="zone-b"))
    world.remove(make_service("svc2"))
    changes = world.store.take(V4)

    assert changes.is_everything
    assert world.addresses(changes=changes) == {"default/svc1": ["10.180.1.12:8080"]}
    assert world.addresses() == {}


def test_no_change_is_lost_between_threads(world):
    """What was handed out, one over the other, is what was put in."""
    known = {}
    is_done = threading.Event()

    def take_all():
        while True:
            was_done = is_done.is_set()
            known.update(world.store.take(V4).services)
            if was_done:
                return

    taker = threading.Thread(target=take_all)
    taker.start()
    for number in range(1, 201):
        world.put(make_slice(endpoints=[f"10.180.3.{number}"]))
    is_done.set()
    taker.join(timeout=10)

    (endpoints,) = known[SVC1].endpoints.values()
    assert [ep.ip for ep in endpoints] == ["10.180.3.200"]
    assert known[SVC1].ports.keys() == {PortKey("", "tcp")}


# The state file --------------------------------------------------------------------------------------


def last_state(*items, zone="zone-a"):
    services = {family: states.service_states(items, family) for family in (V4, V6)}
    node = Node(name="node1", ips=("192.168.0.2",), zone=zone)
    return snapshot.Snapshot(snapshot.State(node, services), 900.0)


def test_a_restored_state_is_handed_out_apart_from_what_is_being_listed(metrics):
    world = World(metrics)
    world.put(make_service("half", cluster_ip="172.30.0.9"))
    is_offered = world.store.restore(last_state(make_service(), make_slice()))

    assert is_offered
    assert world.store.restored_at == 900.0
    assert set(world.nudged) == {V4, V6}
    assert world.store.take(V4) is None
    changes = world.store.take_restored(V4)
    assert set(changes.services) == {SVC1}
    assert (changes.is_everything, changes.is_restored, changes.zone) == (True, True, "zone-a")


def test_a_restored_state_counts_no_more_once_everything_was_listed(metrics):
    world = World(metrics)
    world.store.restore(last_state(make_service(), make_slice()))
    world.listed("Service", make_service("new", cluster_ip="172.30.0.9"))
    assert world.store.take_restored(V4).services
    world.listed("EndpointSlice")

    assert world.store.restored_at is None
    assert world.store.take_restored(V4) is None
    changes = world.store.take(V4)
    assert (set(changes.services), changes.is_restored) == ({("default", "new")}, False)
    assert changes.is_everything


def test_a_state_that_comes_after_the_lists_is_refused(world):
    assert not world.store.restore(last_state(make_service()))
    assert world.store.restored_at is None


@pytest.mark.parametrize("is_complete", [True, False], ids=["listed", "being listed"])
def test_a_node_that_was_listed_is_not_replaced_by_an_older_one(metrics, is_complete):
    world = World(metrics)
    world.put(make_node("node1", zone="zone-b"))
    if is_complete:
        world.store.listed("Node")
    world.store.restore(last_state(make_service(), zone="zone-a"))

    assert world.store.node.zone == "zone-b"
    assert world.store.take_restored(V4).zone == "zone-b"


def test_all_states_are_given_by_name_however_many(metrics):
    world = World(metrics)
    items = [
        make_service(f"svc{number:03}", cluster_ip=f"172.30.1.{number}") for number in range(1, 130)
    ]
    world.put(*reversed(items))

    names = [next(iter(state.ports.values())).name.name for state in world.store.states(V4)]
    assert names == [item["metadata"]["name"] for item in items]
    assert list(world.store.states(V6)) == []


def test_a_service_that_goes_while_states_are_read_is_passed_over(metrics):
    world = World(metrics)
    items = [make_service(f"s{n:03}", cluster_ip=f"172.30.1.{n}") for n in range(1, 120)]
    world.put(*items)
    reading = world.store.states(V4)
    next(reading)
    world.remove(items[-1])

    assert len(list(reading)) == len(items) - 2


# External addresses ------------------------------------------------------------------------------


def refused_reasons(world):
    return [(str(refusal.service), refusal.ip, refusal.reason) for refusal in world.refused]


def external_ips(world, name="svc1"):
    world.known |= world.store.take(V4).services
    state = world.known[ServiceName("default", name)]
    return [ip for port in state.ports.values() for ip in port.external_ips]


def test_an_address_is_refused_as_soon_as_another_service_has_it_and_no_longer(world):
    claimed = make_service(externalIPs=["172.30.0.42"])
    other = make_service("svc2", cluster_ip="172.30.0.42")
    world.put(claimed)
    assert (external_ips(world), world.refused) == (["172.30.0.42"], [])

    world.nudged.clear()
    world.put(other)
    assert world.nudged == [V4]
    assert external_ips(world) == []
    assert refused_reasons(world) == [("default/svc1", "172.30.0.42", "cluster_ip")]
    assert [refusal.ip for refusal in world.store.refusals()] == ["172.30.0.42"]

    world.remove(other)
    assert external_ips(world) == ["172.30.0.42"]
    assert (len(world.refused), world.store.refusals()) == (1, ())


def test_a_service_that_gets_a_claimed_cluster_ip_hands_out_who_claims_it(world):
    world.put(make_service(externalIPs=["172.30.0.42"]))
    world.forget()
    world.put(make_service("svc2", cluster_ip="172.30.0.42"))

    assert world.addresses().keys() == {"default/svc1", "default/svc2"}


def test_api_servers_that_move_hand_out_who_claims_their_address(world):
    world.put(make_service(ports=[6443], externalIPs=["192.168.0.9"]))
    world.forget()
    api = make_slice("kubernetes", endpoints=["192.168.0.9"], ports=[6443])
    world.put(api)
    assert world.addresses().keys() == {"default/kubernetes", "default/svc1"}
    assert refused_reasons(world) == [("default/svc1", "192.168.0.9", "api_server")]

    world.remove(api)
    assert external_ips(world) == ["192.168.0.9"]


def test_nothing_is_refused_before_everything_is_listed(metrics):
    world = World(metrics)
    world.put(make_service(externalIPs=["172.30.0.42"]))
    world.listed("EndpointSlice")
    world.put(make_service("svc2", cluster_ip="172.30.0.42"))
    assert (world.store.take(V4), world.refused) == (None, [])

    world.store.listed("Service")
    assert external_ips(world) == []
    assert len(world.refused) == 1


def test_shadowing_services_are_counted_by_reason(world):
    def count():
        labels = {"ip_family": "IPv4", "reason": "cluster_ip"}
        return world.metrics.registry.get_sample_value("kubeproxy_shadowing_services", labels)

    world.put(
        make_service(externalIPs=["172.30.0.42"]), make_service("svc2", cluster_ip="172.30.0.42")
    )
    assert count() == 0

    world.forget()
    assert count() == 1

    world.remove(make_service())
    world.forget()
    assert (count(), world.store.refusals()) == (0, ())


def test_ports_are_told_as_they_are_handed_out(world):
    world.put(
        make_service(externalIPs=["172.30.0.42", "192.0.2.1"]),
        make_service("svc2", cluster_ip="172.30.0.42"),
    )
    changes = world.store.take(V4)

    assert world.store.service_ports(V4) == {
        name: state.ports for name, state in changes.services.items()
    }
    assert world.store.service_ports(V6) == {}


# Services chosen by label --------------------------------------------------------------------------


def test_services_are_chosen_by_the_labels_they_have_now(metrics):
    world = World(metrics, selects=lambda labels: labels.get("team") == "a")
    name = ServiceName("default", "svc1")
    world.put(make_service(labels={"team": "a"}), make_service("other"))
    assert world.store.selected() is None
    world.listed("Service", make_service(labels={"team": "a"}), make_service("other"))
    world.listed("EndpointSlice")
    assert world.store.selected() == {name}
    # A label is no reason to sync.
    world.store.take(V4)
    world.nudged.clear()
    world.put(make_service(labels={"team": "b"}))
    assert world.store.selected() == set()
    assert world.nudged == []
    world.put(make_service(labels={"team": "a"}))
    assert world.store.selected() == {name}
    world.remove(make_service())

    assert world.store.selected() == set()


def test_a_node_that_is_not_there_any_more_is_not_brought_back_by_a_file(metrics):
    world = World(metrics)
    world.listed("Node")
    world.store.restore(last_state(make_service()))

    assert world.store.node is None
