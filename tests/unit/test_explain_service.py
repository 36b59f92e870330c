"""The front doors of a Service, found in its rules, and who may use them."""

import pytest

from kubeproxy_py import explain, explain_service, rules
from kubeproxy_py.explain_service import Viewpoint
from kubeproxy_py.model import IPFamily, ServiceName
from kubeproxy_py.ruleset import Ruleset
from tests.support import states
from tests.support.addresses import PLANS, V4, V6
from tests.support.builders import make_endpoint, make_port, make_service, make_slice

ENDPOINTS = (V4.local_pod(1),)
NAME = ServiceName("default", "svc1")


def tables(items, family=IPFamily.V4, **options):
    known = {
        "node_ip": PLANS[family].node,
        "local_detector": rules.LocalDetector("-s", PLANS[family].cluster_cidr),
        "localhost_node_ports": family is IPFamily.V4,
        "has_nfacct": True,
    }
    ruleset = Ruleset(rules.Options(family=family, node_name="node1", **known | options))
    ruleset.apply(states.service_states(items, family))
    return explain.with_jumps(ruleset.tables)


def view(items, family=IPFamily.V4, name=NAME, **options):
    node = PLANS[family].node
    facts = explain.Facts(local_addresses=frozenset({node, PLANS[family].node_alternate}))
    return explain_service.view(tables(items, family, **options), name, Viewpoint(facts, node))


def load_balancer(*, endpoints=ENDPOINTS, **spec):
    """Return the objects of a Service with every kind of door."""
    port = make_port(80, name="http", nodePort=30080)
    return [
        make_service(
            ports=[port],
            lb_ips=[V4.lb_vip],
            **{"type": "LoadBalancer", "externalIPs": [V4.external_ip]} | spec,
        ),
        make_slice(endpoints=list(endpoints), ports=[{"name": "http", "port": 8080}]),
    ]


def doors(found):
    return [(door.kind, door.address, door.port) for door in found.doors]


def verdicts(found, kind):
    """Return what becomes of everyone at the (first) door of *kind*."""
    door = next(door for door in found.doors if door.kind == kind)
    return {
        visit.who: {outcome.verdict for outcome in visit.trace.outcomes} for visit in door.visits
    }


def test_every_door_is_found():
    assert doors(view(load_balancer())) == [
        ("cluster IP", V4.cluster_ip, 80),
        ("external IP", V4.external_ip, 80),
        ("load balancer IP", V4.lb_vip, 80),
        ("node port", V4.node, 30080),
        ("node port", V4.loopback, 30080),
    ]


def test_ports_have_their_names():
    assert {door.port_name for door in view(load_balancer()).doors} == {"http"}


def test_doors_of_a_service_without_endpoints_are_found_too():
    found = view(load_balancer(endpoints=()))

    # Which of the two an address is, rules for refusals do not tell.
    assert doors(found) == [
        ("cluster IP", V4.cluster_ip, 80),
        ("external or load balancer IP", V4.external_ip, 80),
        ("external or load balancer IP", V4.lb_vip, 80),
        ("node port", V4.node, 30080),
        ("node port", V4.loopback, 30080),
    ]
    # With no endpoints at all, no rule tells pods from others.
    assert verdicts(found, "cluster IP") == {
        "this node": {"rejected"},
        "anybody else": {"rejected"},
    }


def test_health_check_node_port_is_a_door():
    found = view(load_balancer(externalTrafficPolicy="Local", healthCheckNodePort=32000))

    assert verdicts(found, "health check node port")["an outside client"] == {"accepted"}


def test_source_ranges_show_who_is_inside_and_who_is_not():
    found = view(load_balancer(loadBalancerSourceRanges=["198.51.100.0/24"]))

    assert verdicts(found, "load balancer IP") == {
        "a pod": {"dropped"},
        "this node": {"dropped"},
        "an outside client in 198.51.100.0/24": {"delivered"},
        "an outside client in no source range": {"dropped"},
    }


def test_ranges_of_everybody_leave_nobody_outside():
    found = view(load_balancer(loadBalancerSourceRanges=["0.0.0.0/1", "128.0.0.0/1"]))

    assert list(verdicts(found, "load balancer IP")) == [
        "a pod",
        "this node",
        "an outside client in 0.0.0.0/1",
    ]


def test_range_of_one_address_has_that_one_for_an_example():
    found = view(load_balancer(loadBalancerSourceRanges=["198.51.100.9/32"]))
    door = next(door for door in found.doors if door.kind == "load balancer IP")

    assert door.visits[2].trace.packet.source == "198.51.100.9"


@pytest.mark.parametrize(
    ("options", "pods_are", "in_interface", "outside"),
    [
        pytest.param({}, "-s 10.180.0.0/16", "?", "?", id="by addresses"),
        pytest.param(
            {"local_detector": rules.LocalDetector("-i", "cni0")},
            "-i cni0",
            "cni0",
            "outside0",
            id="by bridge",
        ),
        pytest.param(
            {"local_detector": rules.LocalDetector("-i", "veth+")},
            "-i veth+",
            "veth0",
            "outside0",
            id="by prefix",
        ),
    ],
)
def test_pods_are_told_as_the_rules_tell_them(options, pods_are, in_interface, outside):
    found = view(load_balancer(), **options)
    interfaces = [visit.trace.packet.in_interface for visit in found.doors[0].visits]

    assert found.pods_are == pods_are
    assert interfaces == [in_interface, "", outside]


def test_pods_by_interface_have_an_address_beside_the_endpoints():
    detector = rules.LocalDetector("-i", "cni0")
    # Another Service's rules tell of the detector, this one has no endpoints.
    other = [make_service("other", cluster_ip="172.30.0.99"), make_slice("other")]
    items = [*load_balancer(endpoints=()), *other]
    pod = view(items, local_detector=detector).doors[0].visits[0]

    assert (pod.who, pod.trace.packet.source) == ("a pod", V4.node_alternate)


def test_where_pods_are_not_told_from_others_they_are_not_shown():
    found = view(load_balancer(), local_detector=None)

    assert found.pods_are == ""
    assert list(verdicts(found, "cluster IP")) == ["this node", "anybody else"]


def test_masquerade_all_hides_the_detector_of_cluster_ips():
    local = {"externalTrafficPolicy": "Local"}

    assert view(load_balancer(), masquerade_all=True).pods_are == ""
    assert view(load_balancer(**local), masquerade_all=True).pods_are == "-s 10.180.0.0/16"


def test_affinity_is_told():
    assert view(load_balancer()).affinity_timeout_s is None
    assert view(load_balancer(sessionAffinity="ClientIP")).affinity_timeout_s == 10800


def test_node_ports_stand_only_at_the_addresses_they_are_served_on():
    found = view(load_balancer(), node_port_addresses=(V4.node_alternate,))

    assert [door[1] for door in doors(found) if door[0] == "node port"] == [V4.node_alternate]


def test_node_ports_served_nowhere_are_no_doors():
    found = view(load_balancer(), node_port_addresses=())

    assert "node port" not in {door.kind for door in found.doors}


def test_node_on_loopback_alone_has_one_node_port():
    facts = explain.Facts()
    found = explain_service.view(tables(load_balancer()), NAME, Viewpoint(facts, V4.loopback))

    assert [door[1] for door in doors(found) if door[0] == "node port"] == [V4.loopback]


def test_service_of_another_family_or_name_is_not_there():
    assert view(load_balancer(), IPFamily.V6) is None
    assert view(load_balancer(), name=ServiceName("default", "svc")) is None
    assert explain_service.view({}, NAME, Viewpoint(explain.Facts(), V4.node)) is None


def test_ipv6_doors_are_found():
    port = make_port(80, nodePort=30080)
    items = [
        make_service(cluster_ip=V6.cluster_ip, ports=[port], type="NodePort"),
        make_slice(endpoints=[make_endpoint(V6.remote_pod(1), node="node2")]),
    ]
    found = view(items, IPFamily.V6)

    assert doors(found) == [
        ("cluster IP", V6.cluster_ip, 80),
        ("node port", V6.node, 30080),
    ]


def test_doors_in_trees_of_chains_are_found():
    assert doors(view(load_balancer(), layout="tree")) == doors(view(load_balancer()))


def test_loop_among_chains_is_followed_once():
    found = tables(load_balancer())
    # The kernel refuses loops; rules from elsewhere may have them.
    found["nat"][rules.SERVICES] += ("-j KUBE-PART",)
    found["nat"]["KUBE-PART"] = (f"-j {rules.SERVICES}",)
    facts = explain.Facts(local_addresses=frozenset({V4.node}))

    looped = explain_service.view(found, NAME, Viewpoint(facts, V4.node))

    assert doors(looped) == doors(view(load_balancer()))


def test_foreign_rule_with_a_comment_of_ours_is_no_door():
    found = tables(load_balancer())
    found["nat"][rules.SERVICES] += ('-m comment --comment "default/svc1 external IP" -j RETURN',)
    facts = explain.Facts(local_addresses=frozenset({V4.node}))

    foreign = explain_service.view(found, NAME, Viewpoint(facts, V4.node))

    assert doors(foreign) == doors(view(load_balancer()))
