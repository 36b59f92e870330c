"""API objects → records; the cases of Services are those of kube-proxy's TestServiceToServiceMap."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeproxy_py import objects, records
from kubeproxy_py.model import Endpoint, IPFamily, Node, PortKey, ServiceName
from tests.support.builders import (
    make_endpoint,
    make_node,
    make_port,
    make_service,
    make_slice,
)

V4, V6 = IPFamily.V4, IPFamily.V6
DUAL = {
    "ipFamilies": ["IPv4", "IPv6"],
    "clusterIPs": ["172.30.0.41", "fd00:172:30::41"],
    "ipFamilyPolicy": "RequireDualStack",
}
TCP = PortKey("", "tcp")


def service_record(item):
    return records.service_record(msgspec.convert(item, objects.Service))


def slice_record(item):
    return records.slice_record(msgspec.convert(item, objects.EndpointSlice), node_name="node1")


def only_port(item, family=V4):
    """Return the one ServicePort of an object without problems."""
    record = service_record(item)
    assert record.problems == ()
    (port,) = record.ports[family].values()
    return port


def said(record):
    return [(problem.field, problem.message) for problem in record.problems]


# Services ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(make_service(cluster_ip="None"), id="headless"),
        pytest.param(make_service(cluster_ip="None", ports=()), id="headless without ports"),
        pytest.param(make_service(cluster_ip=""), id="no cluster IP yet"),
        pytest.param(make_service(clusterIP=None), id="no field clusterIP"),
        pytest.param(
            make_service(type="ExternalName", externalName="example.com"),
            id="ExternalName, even with a cluster IP",
        ),
        pytest.param(
            make_service(labels={"service.kubernetes.io/service-proxy-name": ""}),
            id="another proxy's, whatever it is called",
        ),
        pytest.param(
            {"kind": "Service", "metadata": {"name": "a", "namespace": "b"}}, id="no spec"
        ),
    ],
)
def test_service_is_ignored(item):
    assert service_record(item) == records.ServiceRecord(
        ServiceName(item["metadata"]["namespace"], item["metadata"]["name"]), {}
    )


def test_cluster_ip_service_has_a_cluster_ip_and_nothing_more():
    port = only_port(make_service())

    assert (port.cluster_ip, port.port, port.node_port) == ("172.30.0.41", 80, 0)
    assert not port.is_externally_accessible
    assert port.uses_cluster_endpoints
    assert not port.uses_local_endpoints
    assert port.affinity_timeout_s is None


def test_ports_of_one_number_differ_by_protocol():
    record = service_record(
        make_service(
            ports=[
                make_port(53, name="dns", protocol="UDP"),
                make_port(53, name="dns-tcp"),
                make_port(53, name="dns", protocol="SCTP"),
            ]
        )
    )

    assert [str(port.name) for port in record.ports[V4].values()] == [
        "default/svc1:dns", "default/svc1:dns-tcp", "default/svc1:dns",
    ]  # fmt: skip
    assert list(record.ports[V4]) == [
        PortKey("dns", "udp"), PortKey("dns-tcp", "tcp"), PortKey("dns", "sctp"),
    ]  # fmt: skip


def test_absent_protocol_is_tcp():
    item = make_service()
    del item["spec"]["ports"][0]["protocol"]

    assert only_port(item).name.protocol == "tcp"


def test_node_port_makes_a_service_externally_accessible():
    port = only_port(make_service(type="NodePort", ports=[make_port(80, nodePort=30080)]))

    assert port.node_port == 30080
    assert port.is_externally_accessible


@pytest.mark.parametrize("kind", ["LoadBalancer", "ClusterIP"])
def test_load_balancer_address_counts_whatever_the_type(kind):
    port = only_port(make_service(type=kind, lb_ips=["1.2.3.4"]))

    assert port.lb_vips == ("1.2.3.4",)
    assert port.is_externally_accessible


@pytest.mark.parametrize(
    ("ingress", "vips"),
    [
        pytest.param({"ip": "1.2.3.4", "ipMode": "VIP"}, ("1.2.3.4",), id="VIP"),
        pytest.param({"ip": "1.2.3.4"}, ("1.2.3.4",), id="absent is VIP"),
        pytest.param({"ip": "1.2.3.4", "ipMode": "Proxy"}, (), id="Proxy"),
        pytest.param({"hostname": "lb.example.com"}, (), id="host name"),
        pytest.param({"ip": ""}, (), id="empty"),
    ],
)
def test_load_balancer_ingress(ingress, vips):
    port = only_port(make_service(type="LoadBalancer", lb_ips=[ingress]))

    assert port.lb_vips == vips
    assert port.is_externally_accessible is bool(vips)


def test_both_families_get_the_addresses_of_their_own():
    record = service_record(
        make_service(
            type="LoadBalancer",
            externalIPs=["192.168.99.22", "2001:db8::99"],
            loadBalancerSourceRanges=["203.0.113.0/25", "2001:db8:1::/48"],
            lb_ips=["1.2.3.4", "2001:db8::1"],
            **DUAL,
        )
    )

    assert record.problems == ()
    assert [
        (port.cluster_ip, port.external_ips, port.source_ranges, port.lb_vips)
        for port in (record.ports[V4][TCP], record.ports[V6][TCP])
    ] == [
        ("172.30.0.41", ("192.168.99.22",), ("203.0.113.0/25",), ("1.2.3.4",)),
        ("fd00:172:30::41", ("2001:db8::99",), ("2001:db8:1::/48",), ("2001:db8::1",)),
    ]


@pytest.mark.parametrize(
    ("spec", "families"),
    [
        pytest.param({}, {V4}, id="single stack"),
        pytest.param(DUAL, {V4, V6}, id="dual stack"),
        pytest.param(
            DUAL | {"ipFamilies": ["IPv6", "IPv4"], "clusterIPs": ["fd00::1", "172.30.0.41"]},
            {V4, V6}, id="IPv6 first",
        ),
        pytest.param(DUAL | {"clusterIPs": ["172.30.0.41"]}, {V4}, id="second address still missing"),
        pytest.param(DUAL | {"clusterIPs": None}, set(), id="no addresses at all"),
        pytest.param(
            {"ipFamilies": None, "clusterIP": "fd00::1", "clusterIPs": None}, {V6},
            id="from before dual stack, IPv6",
        ),
        pytest.param(
            {"ipFamilies": None, "clusterIP": "172.30.0.1", "clusterIPs": None}, {V4},
            id="from before dual stack, IPv4",
        ),
    ],
)  # fmt: skip
def test_families_are_those_with_a_cluster_ip(spec, families):
    record = service_record(make_service(**spec))

    assert record.ports.keys() == families
    assert record.problems == ()


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (
            {"clusterIP": "x", "clusterIPs": ["x"]},
            ("spec.clusterIPs[0]", "'x' is not an IP address"),
        ),
        (
            {"clusterIP": "fd00::1", "clusterIPs": ["fd00::1"]},
            ("spec.clusterIPs[0]", "'fd00::1' is not an IPv4 address"),
        ),
        (
            {"ipFamilies": None, "clusterIP": "x"},
            ("spec.clusterIP", "'x' is not an IP address"),
        ),
    ],
)
def test_cluster_ip_that_is_wrong_is_named_once(spec, problem):
    record = service_record(make_service(**spec))

    assert record.ports == {}
    assert said(record) == [problem]


@pytest.mark.parametrize(
    ("kind", "policy", "external_ips", "is_local"),
    [
        ("NodePort", "Local", None, True),
        ("LoadBalancer", "Local", None, True),
        ("LoadBalancer", "Cluster", None, False),
        ("LoadBalancer", None, None, False),
        ("ClusterIP", "Local", ["192.168.99.1"], True),
        (None, "Local", ["192.168.99.1"], True),
        ("ClusterIP", "Local", None, False),
        ("ClusterIP", "Local", ["2001:db8::1"], True),  # the raw list of both families is asked
    ],
)
def test_external_policy_holds_where_there_is_external_traffic(
    kind, policy, external_ips, is_local
):
    port = only_port(
        make_service(
            type=kind,
            externalTrafficPolicy=policy,
            externalIPs=external_ips,
            healthCheckNodePort=30100,
        )
    )

    assert port.is_external_local is is_local


@pytest.mark.parametrize(
    ("policy", "is_local"), [("Local", True), ("Cluster", False), (None, False)]
)
def test_internal_policy_holds_for_any_type(policy, is_local):
    port = only_port(make_service(internalTrafficPolicy=policy))

    assert port.is_internal_local is is_local
    assert port.uses_local_endpoints is is_local
    assert port.uses_cluster_endpoints is not is_local


@pytest.mark.parametrize(
    ("spec", "port"),
    [
        ({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30100}, 30100),
        ({"type": "LoadBalancer", "externalTrafficPolicy": "Cluster", "healthCheckNodePort": 30100}, 0),
        ({"type": "NodePort", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30100}, 0),
    ],
)  # fmt: skip
def test_health_check_port_is_of_local_load_balancers_only(spec, port):
    assert only_port(make_service(**spec)).health_check_node_port == port


@pytest.mark.parametrize("number", [None, 0, 65536, -1])
def test_missing_health_check_port_is_told_and_does_no_harm(number):
    record = service_record(
        make_service(type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=number)
    )

    assert said(record) == [("spec.healthCheckNodePort", "Service has no healthcheck nodeport")]
    assert record.ports[V4][TCP].is_external_local


@pytest.mark.parametrize(
    ("ranges", "wanted"),
    [
        pytest.param([" 203.0.113.000/025 "], ("203.0.113.0/25",), id="blanks and leading zeros"),
        pytest.param(["10.1.2.3/8", "1.2.3.4/32"], ("10.0.0.0/8", "1.2.3.4/32"), id="host bits"),
        pytest.param(["2001:db8::/32"], (), id="other family only: open"),
        pytest.param(["10.0.0.0/8", "0.0.0.0/0"], (), id="everybody: open"),
        pytest.param(["10.0.0.0/8", "::/0"], ("10.0.0.0/8",), id="everybody of the other family"),
        pytest.param([], (), id="none: open"),
    ],
)
def test_source_ranges(ranges, wanted):
    port = only_port(
        make_service(type="LoadBalancer", lb_ips=["1.2.3.4"], loadBalancerSourceRanges=ranges)
    )

    assert (port.source_ranges, port.lb_vips) == (wanted, ("1.2.3.4",))


def test_invalid_range_beside_a_valid_one_is_left_out():
    record = service_record(
        make_service(lb_ips=["1.2.3.4"], loadBalancerSourceRanges=["x", "10.0.0.0/8"])
    )

    port = record.ports[V4][TCP]
    assert (port.source_ranges, port.lb_vips) == (("10.0.0.0/8",), ("1.2.3.4",))
    assert said(record) == [("spec.loadBalancerSourceRanges[0]", "'x' is not a CIDR")]


@pytest.mark.parametrize("ranges", [["x"], [""], ["x", "2001:db8::/32"]])
def test_nothing_but_invalid_ranges_does_not_open_the_load_balancer_to_all(ranges):
    record = service_record(make_service(lb_ips=["1.2.3.4"], loadBalancerSourceRanges=ranges))

    port = record.ports[V4][TCP]
    assert (port.lb_vips, port.is_externally_accessible) == ((), False)
    assert len(record.problems) == 1


def test_everybody_beside_an_invalid_range_is_still_everybody():
    record = service_record(
        make_service(lb_ips=["1.2.3.4"], loadBalancerSourceRanges=["x", "0.0.0.0/0"])
    )

    assert record.ports[V4][TCP].lb_vips == ("1.2.3.4",)


def test_bad_ips_are_spelled_canonically_everywhere():
    port = only_port(
        make_service(
            type="LoadBalancer",
            cluster_ip="172.30.0.041",
            externalIPs=["192.168.099.022"],
            loadBalancerSourceRanges=["203.0.113.000/025"],
            lb_ips=["001.002.003.004"],
        )
    )

    assert (port.cluster_ip, port.external_ips, port.source_ranges, port.lb_vips) == (
        "172.30.0.41", ("192.168.99.22",), ("203.0.113.0/25",), ("1.2.3.4",),
    )  # fmt: skip


def test_address_given_twice_counts_once():
    assert only_port(make_service(externalIPs=["1.2.3.4", "01.2.3.4"])).external_ips == ("1.2.3.4",)


def test_external_ip_that_is_none_is_named_and_left_out():
    record = service_record(make_service(externalIPs=["x", " ", "192.168.99.22"], **DUAL))

    assert record.ports[V4][TCP].external_ips == ("192.168.99.22",)
    assert said(record) == [("spec.externalIPs[0]", "'x' is not an IP address")]


@pytest.mark.parametrize(
    ("spec", "seconds"),
    [
        ({"sessionAffinity": "None"}, None),
        ({"sessionAffinity": None}, None),
        ({"sessionAffinity": "ClientIP"}, 10800),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {}}, 10800),
        (
            {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}},
            60,
        ),
        (
            {"sessionAffinity": "None", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}},
            None,
        ),
    ],
)  # fmt: skip
def test_affinity(spec, seconds):
    assert only_port(make_service(**spec)).affinity_timeout_s == seconds


@pytest.mark.parametrize("seconds", [0, -1, 2_000_001])
def test_affinity_of_impossible_length_is_the_default(seconds):
    record = service_record(
        make_service(
            sessionAffinity="ClientIP",
            sessionAffinityConfig={"clientIP": {"timeoutSeconds": seconds}},
        )
    )

    assert record.ports[V4][TCP].affinity_timeout_s == 10800
    assert said(record)[0][0] == "spec.sessionAffinityConfig.clientIP.timeoutSeconds"


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        pytest.param(make_port(0, name="bad"), "spec.ports[1].port", id="port 0"),
        pytest.param(make_port(65536, name="bad"), "spec.ports[1].port", id="port too high"),
        pytest.param({"name": "bad"}, "spec.ports[1].port", id="no port"),
        pytest.param(
            make_port(81, name="bad", nodePort=70000), "spec.ports[1].nodePort", id="node port"
        ),
        pytest.param(
            make_port(81, name="bad", protocol="ICMP"), "spec.ports[1].protocol", id="proto"
        ),
        pytest.param(
            make_port(81, name="tcp", protocol="tcp"), "spec.ports[1].protocol", id="case"
        ),
        pytest.param(make_port(81, name='a" -j x'), "spec.ports[1].name", id="name with a quote"),
        pytest.param(make_port(81, name="good"), "spec.ports[1].name", id="name used twice"),
    ],
)
def test_one_bad_port_does_not_harm_the_others(bad, field):
    record = service_record(make_service(ports=[make_port(80, name="good"), bad], **DUAL))

    assert record.ports[V4].keys() == record.ports[V6].keys() == {PortKey("good", "tcp")}
    assert [problem.field for problem in record.problems] == [field]


@pytest.mark.parametrize("field", ["name", "namespace"])
@pytest.mark.parametrize("text", ["", "UPPER", "a.b", "a\nb", 'a"b', "a" * 64, "-a", "a-", "é"])
def test_object_whose_name_could_break_a_rule_is_left_out(field, text):
    item = make_service()
    item["metadata"][field] = text
    record = service_record(item)

    assert record.ports == {}
    assert [problem.field for problem in record.problems] == [f"metadata.{field}"]


def test_fields_that_are_not_read_change_nothing():
    plain = make_service()
    other = make_service(
        labels={"a": "b"},
        annotations={"service.kubernetes.io/topology-mode": "auto"},
        selector={"c": "d"},
        loadBalancerIP="9.9.9.9",
        trafficDistribution="PreferClose",
    )
    other["spec"]["ports"][0]["targetPort"] = 8080

    assert service_record(plain) == service_record(other)


# EndpointSlices ----------------------------------------------------------------------------------


def test_slice_gives_its_endpoints_for_every_port():
    record, problems = slice_record(
        make_slice(endpoints=["10.180.1.11", "10.180.1.12"], ports=[80, 443])
    )

    assert problems == ()
    assert (record.service, record.family) == (ServiceName("default", "svc1"), V4)
    assert {key: [ep.address for ep in eps] for key, eps in record.endpoints.items()} == {
        PortKey("p80", "tcp"): ["10.180.1.11:80", "10.180.1.12:80"],
        PortKey("p443", "tcp"): ["10.180.1.11:443", "10.180.1.12:443"],
    }


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(make_slice(""), id="no service name"),
        pytest.param(make_slice(labels={"service.kubernetes.io/headless": ""}), id="headless"),
        pytest.param(make_slice(name="x", namespace=""), id="no namespace"),
        pytest.param(
            {"metadata": {"name": "x", "namespace": "y"}, "addressType": "IPv4"}, id="bare"
        ),
    ],
)
def test_slice_is_ignored(item):
    assert slice_record(item) == (None, ())


def test_slice_of_host_names_is_ignored_and_told():
    record, problems = slice_record(make_slice(address_type="FQDN"))

    assert record is None
    assert [str(problem) for problem in problems] == [
        "EndpointSlice 'default/svc1-abcde': addressType: 'FQDN' is not supported"
    ]


@pytest.mark.parametrize(
    ("port", "field"),
    [
        pytest.param({"port": 81, "name": None}, "ports[1].name", id="no name"),
        pytest.param({"name": "b"}, "ports[1].port", id="no port is not all ports"),
        pytest.param({"name": "b", "port": 0}, "ports[1].port", id="port 0"),
        pytest.param({"name": "b", "port": 70000}, "ports[1].port", id="port too high"),
        pytest.param(
            {"name": "b", "port": 81, "protocol": "X"}, "ports[1].protocol", id="protocol"
        ),
        pytest.param({"name": "b\n", "port": 81}, "ports[1].name", id="name with a line end"),
    ],
)
def test_one_bad_port_of_a_slice_does_not_harm_the_others(port, field):
    item = make_slice(ports=[make_port(80, name="a"), make_port(81, name="b")])
    item["ports"][1] = port
    record, problems = slice_record(item)

    assert record.endpoints.keys() == {PortKey("a", "tcp")}
    assert [problem.field for problem in problems] == [field]


def test_absent_protocol_of_a_slice_is_tcp():
    item = make_slice()
    item["ports"] = [{"name": "", "port": 80}]
    record, _ = slice_record(item)

    assert record.endpoints.keys() == {TCP}


@pytest.mark.parametrize(
    ("endpoint", "field"),
    [
        pytest.param(make_endpoint(), "endpoints[1].addresses", id="no address"),
        pytest.param(make_endpoint("x"), "endpoints[1].addresses[0]", id="no IP"),
        pytest.param(make_endpoint("fd00::1"), "endpoints[1].addresses[0]", id="other family"),
    ],
)
def test_one_bad_endpoint_does_not_harm_the_others(endpoint, field):
    record, problems = slice_record(make_slice(endpoints=["10.180.1.11", endpoint]))

    assert [ep.address for ep in record.endpoints[TCP]] == ["10.180.1.11:8080"]
    assert [problem.field for problem in problems] == [field]


def test_only_the_first_address_counts_and_is_spelled_canonically():
    record, _ = slice_record(make_slice(endpoints=[make_endpoint("010.0.0.1", "10.0.0.2")]))

    assert [ep.address for ep in record.endpoints[TCP]] == ["10.0.0.1:8080"]


def test_absent_conditions_mean_ready_serving_and_not_terminating():
    endpoint = make_endpoint("10.0.0.1", ready=None, serving=None, terminating=None, node=None)
    del endpoint["conditions"]
    record, _ = slice_record(make_slice(endpoints=[endpoint]))

    assert record.endpoints[TCP] == (Endpoint("10.0.0.1", 8080),)


def test_serving_does_not_follow_ready():
    endpoint = make_endpoint("10.0.0.1", ready=False, serving=None, terminating=True)
    record, _ = slice_record(make_slice(endpoints=[endpoint]))

    assert record.endpoints[TCP] == (
        Endpoint("10.0.0.1", 8080, is_local=True, ready=False, serving=True, terminating=True),
    )


@pytest.mark.parametrize(("node", "is_local"), [("node1", True), ("Node1", False), (None, False)])
def test_local_is_what_names_this_node_exactly(node, is_local):
    record, _ = slice_record(make_slice(endpoints=[make_endpoint("10.0.0.1", node=node)]))

    assert record.endpoints[TCP][0].is_local is is_local


def test_hints_are_sets_of_names():
    endpoint = make_endpoint("10.0.0.1", zone_hints=["b", "a"], node_hints=["node1"])
    record, _ = slice_record(make_slice(endpoints=[endpoint]))

    assert record.endpoints[TCP][0].zone_hints == {"a", "b"}
    assert record.endpoints[TCP][0].node_hints == {"node1"}


@pytest.mark.parametrize(("protocol", "has_udp"), [("UDP", True), ("TCP", False)])
def test_slice_knows_whether_conntrack_cares(protocol, has_udp):
    record, _ = slice_record(make_slice(ports=[make_port(53, protocol=protocol)]))

    assert record.has_udp is has_udp


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:10Z", 10.0),
        ("1970-01-01T01:00:10.5+01:00", 10.5),
        ("1970-01-01T00:00:10.123456789Z", pytest.approx(10.123457, abs=2e-6)),
        ("", None),
        (None, None),
        ("yesterday", None),
        ("2026-13-01T00:00:00Z", None),
    ],
)
def test_trigger_time_is_read_or_left_out(text, seconds):
    assert records.parse_time(text) == seconds


def test_trigger_time_is_taken_from_the_annotation():
    item = make_slice()
    item["metadata"]["annotations"] = {records.TRIGGER_ANNOTATION: "1970-01-01T00:00:10Z"}
    record, _ = slice_record(item)

    assert record.trigger_time == 10.0


# Merging slices ----------------------------------------------------------------------------------


def merged(*slices):
    return records.merge_slices([slice_record(item)[0] for item in slices])


def test_what_one_slice_says_is_not_kept_twice():
    record, _ = slice_record(make_slice(endpoints=["10.180.1.9", "10.180.1.11"], ports=[80]))

    assert records.merge_slices([record]) is record.endpoints


def test_endpoints_are_sorted_as_text():
    by_port = merged(
        make_slice(name="b", endpoints=["10.0.1.1", "10.0.0.9"]),
        make_slice(name="a", endpoints=["10.0.0.10"]),
    )

    assert [ep.ip for ep in by_port[TCP]] == ["10.0.0.10", "10.0.0.9", "10.0.1.1"]


@pytest.mark.parametrize("is_first", [True, False])
def test_duplicate_that_is_not_terminating_wins(is_first):
    slices = [
        make_slice(name="a", endpoints=[make_endpoint("10.0.0.1")]),
        make_slice(name="b", endpoints=[make_endpoint("10.0.0.1", ready=False, terminating=True)]),
    ]
    (endpoint,) = merged(*(slices if is_first else reversed(slices)))[TCP]

    assert not endpoint.terminating


def test_later_of_two_duplicates_that_are_not_terminating_wins():
    (endpoint,) = merged(
        make_slice(name="a", endpoints=[make_endpoint("10.0.0.1", node="node1")]),
        make_slice(name="b", endpoints=[make_endpoint("10.0.0.1", node="node2")]),
    )[TCP]

    assert not endpoint.is_local


def test_one_address_with_two_ports_is_two_endpoints():
    by_port = merged(make_slice(name="a", ports=[80]), make_slice(name="b", ports=[8080]))

    assert [ep.port for ep in by_port[TCP]] == [80, 8080]


def test_port_without_endpoints_has_no_entry():
    assert merged(make_slice(endpoints=[])) == {}


# Nodes -------------------------------------------------------------------------------------------


def node_record(item):
    return records.node_record(msgspec.convert(item, objects.Node))


def test_node_tells_what_the_rules_need():
    assert node_record(make_node(ips=["192.168.0.2", "fd00::2"])) == Node(
        name="node1",
        ips=("192.168.0.2", "fd00::2"),
        pod_cidrs=("10.180.1.0/24",),
        zone="zone-a",
    )


def test_internal_addresses_go_before_external_ones_and_host_names_are_none():
    item = make_node(ips=[])
    item["status"]["addresses"] = [
        {"type": "ExternalIP", "address": "203.0.113.9"},
        {"type": "Hostname", "address": "node1"},
        {"type": "InternalIP", "address": "node1.internal"},
        {"type": "InternalIP", "address": "192.168.0.2"},
    ]

    assert node_record(item).ips == ("192.168.0.2", "203.0.113.9")


def test_bare_node_is_understood():
    assert node_record({"metadata": {"name": "node1"}}) == Node(name="node1")


def test_single_pod_cidr_counts_where_the_list_is_missing():
    item = make_node()
    del item["spec"]["podCIDRs"]

    assert node_record(item).pod_cidrs == ("10.180.1.0/24",)


@pytest.mark.parametrize(
    ("taint", "is_eligible"),
    [("ToBeDeletedByClusterAutoscaler", False), ("node.kubernetes.io/unschedulable", True)],
)
def test_node_that_the_autoscaler_removes_is_not_eligible(taint, is_eligible):
    assert node_record(make_node(taints=[{"key": taint}])).is_eligible is is_eligible


def test_node_that_is_being_deleted_is_not_eligible():
    item = make_node()
    item["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"

    assert not node_record(item).is_eligible


# Anything ----------------------------------------------------------------------------------------

_TEXT = st.text(max_size=12) | st.sampled_from(
    ["a", "1.2.3.4", "10.0.0.0/8", "x\n-A", '"', "fd00::1"]
)
_TEXTS = st.lists(_TEXT | st.just("10.0.0.9"), max_size=3)


@given(
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer", "odd"]),
            "clusterIP": _TEXT,
            "clusterIPs": _TEXTS,
            "ipFamilies": st.lists(st.sampled_from(["IPv4", "IPv6", "x"]), max_size=2),
            "externalIPs": _TEXTS,
            "loadBalancerSourceRanges": _TEXTS,
            "ports": st.lists(
                st.fixed_dictionaries(
                    {"port": st.integers(), "name": _TEXT, "protocol": _TEXT | st.just("TCP")}
                ),
                max_size=3,
            ),
        }
    ),
    _TEXT,
)
def test_no_service_whatever_it_says_is_more_than_a_problem(spec, name):
    item = {"metadata": {"name": name, "namespace": "ns"}, "spec": spec}

    assert isinstance(service_record(item), records.ServiceRecord)
