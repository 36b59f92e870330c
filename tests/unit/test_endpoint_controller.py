import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeproxy_py import endpoint_controller, objects


def service(name="web", *, labels=None, **spec):
    defaults = {
        "clusterIP": "172.30.0.41",
        "selector": {"app": "web"},
        "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
    }
    metadata = {"name": name, "namespace": "shop", "labels": labels}
    return msgspec.convert({"metadata": metadata, "spec": defaults | spec}, objects.Service)


def pod(name="web-1", *ips, is_ready=True, metadata=None, spec=None, status=None):
    described = {
        "metadata": {"name": name, "namespace": "shop", "labels": {"app": "web"}},
        "spec": {"nodeName": "node-1"},
        "status": {
            "phase": "Running",
            "podIPs": [{"ip": ip} for ip in ips or ("10.0.0.1",)],
            "conditions": [{"type": "Ready", "status": str(is_ready)}],
        },
    }
    described["metadata"] |= metadata or {}
    described["spec"] |= spec or {}
    described["status"] |= status or {}
    return msgspec.convert(described, endpoint_controller.Pod)


def named_port(number, name="http", protocol="TCP"):
    return {"containers": [{"ports": [named(number, name, protocol)]}]}


def named(number, name="http", protocol="TCP"):
    return {"containerPort": number, "name": name, "protocol": protocol}


def endpoints(*subsets, name="web", **metadata):
    described = {"metadata": {"name": name, "namespace": "shop", **metadata}, "subsets": subsets}
    return msgspec.convert(described, endpoint_controller.Endpoints)


def build(services=(), pods=(), mirrored=(), existing=()):
    return endpoint_controller.build_slices(services, pods, mirrored, existing)


def addresses(slices):
    return [
        (item.addressType, [(p.name, p.port) for p in item.ports], endpoint.addresses[0])
        for item in slices
        for endpoint in item.endpoints
    ]


def conditions(slices):
    return [
        (endpoint.conditions.ready, endpoint.conditions.serving, endpoint.conditions.terminating)
        for item in slices
        for endpoint in item.endpoints
    ]


def test_ready_pod_becomes_an_endpoint_of_the_service_that_selects_it():
    (built,) = build([service()], [pod()])

    assert built == objects.EndpointSlice(
        metadata=objects.ObjectMeta(
            name=built.metadata.name,
            namespace="shop",
            labels={
                "kubernetes.io/service-name": "web",
                "endpointslice.kubernetes.io/managed-by": "kubeproxy-py",
            },
        ),
        addressType="IPv4",
        ports=[objects.SlicePort(port=8080, name="http", protocol="TCP")],
        endpoints=[
            objects.SliceEndpoint(
                addresses=["10.0.0.1"],
                nodeName="node-1",
                conditions=objects.EndpointConditions(ready=True, serving=True, terminating=False),
            )
        ],
    )
    assert built.metadata.name.startswith("web-")


DELETED = {"deletionTimestamp": "2024-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    ("changed", "publish", "wanted"),
    [
        pytest.param({}, False, (True, True, False), id="ready"),
        pytest.param({"is_ready": False}, False, (False, False, False), id="not ready"),
        pytest.param({"metadata": DELETED}, False, (False, True, True), id="terminating, serving"),
        pytest.param(
            {"metadata": DELETED, "is_ready": False}, False, (False, False, True), id="terminating"
        ),
        pytest.param({"is_ready": False}, True, (True, False, False), id="published not ready"),
        pytest.param({"metadata": DELETED}, True, (True, True, True), id="published terminating"),
        pytest.param(
            {"status": {"conditions": None}}, False, (False, False, False), id="no conditions yet"
        ),
    ],
)
def test_conditions_follow_the_pod(changed, publish, wanted):
    slices = build([service(publishNotReadyAddresses=publish)], [pod(**changed)])

    assert conditions(slices) == [wanted]


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"status": {"phase": "Succeeded"}}, id="succeeded"),
        pytest.param({"status": {"phase": "Failed"}}, id="failed"),
        pytest.param({"status": {"podIPs": None}}, id="without an IP"),
        pytest.param({"metadata": {"namespace": "other"}}, id="in another namespace"),
        pytest.param({"metadata": {"labels": {"app": "db"}}}, id="with another label"),
        pytest.param({"metadata": {"labels": None}}, id="without labels"),
    ],
)
def test_pod_is_no_endpoint(changed):
    assert build([service()], [pod(**changed)]) == []


def test_every_label_of_the_selector_must_match():
    both = {"app": "web", "tier": "front"}
    pods = [pod("a", "10.0.0.1"), pod("b", "10.0.0.2", metadata={"labels": both | {"x": "y"}})]

    slices = build([service(selector=both)], pods)

    assert [address for _, _, address in addresses(slices)] == ["10.0.0.2"]


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({"clusterIP": "None"}, id="headless"),
        pytest.param({"type": "ExternalName"}, id="ExternalName"),
        pytest.param({"clusterIP": ""}, id="without a cluster IP"),
        pytest.param({"selector": {}}, id="with an empty selector"),
        pytest.param({"ports": []}, id="without ports"),
    ],
)
def test_service_gets_no_slices(spec):
    assert build([service(**spec)], [pod()]) == []


def test_pod_ip_alone_is_enough():
    slices = build([service()], [pod(status={"podIPs": None, "podIP": "10.0.0.9"})])

    assert addresses(slices) == [("IPv4", [("http", 8080)], "10.0.0.9")]


def test_host_network_pod_without_pod_ip_uses_the_host_ip():
    host = pod(
        spec={"hostNetwork": True},
        status={"podIPs": None, "hostIP": "192.168.0.1"},
    )

    assert addresses(build([service()], [host])) == [("IPv4", [("http", 8080)], "192.168.0.1")]


def test_host_ip_is_not_used_for_other_pods():
    plain = pod(status={"podIPs": None, "hostIP": "192.168.0.1"})

    assert build([service()], [plain]) == []


def test_dual_stack_service_has_a_slice_for_each_family():
    dual = service(clusterIPs=["172.30.0.41", "fd00::41"], ipFamilies=["IPv4", "IPv6"])

    slices = build([dual], [pod("web-1", "10.0.0.1", "fd00:10::1")])

    assert addresses(slices) == [
        ("IPv4", [("http", 8080)], "10.0.0.1"),
        ("IPv6", [("http", 8080)], "fd00:10::1"),
    ]


def test_single_stack_service_takes_only_its_family_of_a_dual_stack_pod():
    slices = build(
        [service(clusterIP="fd00::41", ipFamilies=["IPv6"])], [pod("p", "10.0.0.1", "fd00:10::1")]
    )

    assert addresses(slices) == [("IPv6", [("http", 8080)], "fd00:10::1")]


@pytest.mark.parametrize("target", [None, 0, ""], ids=["absent", "zero", "empty"])
def test_missing_target_port_is_the_port(target):
    slices = build([service(ports=[{"port": 80, "targetPort": target}])], [pod()])

    assert addresses(slices) == [("IPv4", [("", 80)], "10.0.0.1")]


def test_named_target_port_is_looked_up_in_each_pod():
    named_target = service(ports=[{"name": "http", "port": 80, "targetPort": "http"}])
    pods = [
        pod("a", "10.0.0.1", spec=named_port(8080)),
        pod("b", "10.0.0.2", spec=named_port(9090)),
        pod("c", "10.0.0.3", spec=named_port(8080)),
    ]

    slices = build([named_target], pods)

    assert addresses(slices) == [
        ("IPv4", [("http", 8080)], "10.0.0.1"),
        ("IPv4", [("http", 8080)], "10.0.0.3"),
        ("IPv4", [("http", 9090)], "10.0.0.2"),
    ]
    assert len(slices) == 2
    assert len({item.metadata.name for item in slices}) == 2


def test_pod_without_the_named_port_serves_the_other_ports():
    two = service(
        ports=[
            {"name": "http", "port": 80, "targetPort": 8080},
            {"name": "metrics", "port": 9100, "targetPort": "metrics"},
        ]
    )
    pods = [pod("a", "10.0.0.1"), pod("b", "10.0.0.2", spec=named_port(9999, "metrics"))]

    assert addresses(build([two], pods)) == [
        ("IPv4", [("http", 8080)], "10.0.0.1"),
        ("IPv4", [("http", 8080), ("metrics", 9999)], "10.0.0.2"),
    ]


def test_named_port_of_another_protocol_does_not_count():
    dns = service(ports=[{"port": 53, "targetPort": "dns", "protocol": "UDP"}])
    containers = [{"ports": [named(1053, "dns", "TCP"), named(2053, "dns", "UDP")]}]

    slices = build([dns], [pod(spec={"containers": containers})])

    assert addresses(slices) == [("IPv4", [("", 2053)], "10.0.0.1")]


def test_named_port_is_found_in_sidecars_but_not_in_plain_init_containers():
    named_target = service(ports=[{"port": 80, "targetPort": "http"}])
    init = [
        {"ports": [named(1111)]},
        {"ports": [named(2222)], "restartPolicy": "Always"},
    ]

    slices = build([named_target], [pod(spec={"initContainers": init})])

    assert addresses(slices) == [("IPv4", [("", 2222)], "10.0.0.1")]


def test_named_port_is_found_in_a_later_container():
    named_target = service(ports=[{"port": 80, "targetPort": "http"}])
    containers = [{"ports": [named(1111, "metrics")]}, {"ports": [named(2222)]}]

    slices = build([named_target], [pod(spec={"containers": containers})])

    assert addresses(slices) == [("IPv4", [("", 2222)], "10.0.0.1")]


def test_addresses_without_an_ip_are_left_out_of_mirrored_endpoints():
    subset = {"addresses": [{"ip": ""}, {"ip": "192.0.2.1"}], "ports": [{"port": 80}]}

    slices = build([service(selector=None)], mirrored=[endpoints(subset)])

    assert addresses(slices) == [("IPv4", [("", 80)], "192.0.2.1")]


def test_endpoints_of_a_service_without_selector_are_mirrored():
    subset = {
        "addresses": [{"ip": "192.0.2.1", "nodeName": "node-1"}, {"ip": "2001:db8::1"}],
        "notReadyAddresses": [{"ip": "192.0.2.2"}],
        "ports": [{"name": "http", "port": 8080}],
    }

    slices = build([service(selector=None)], mirrored=[endpoints(subset)])

    assert addresses(slices) == [
        ("IPv4", [("http", 8080)], "192.0.2.1"),
        ("IPv4", [("http", 8080)], "192.0.2.2"),
        ("IPv6", [("http", 8080)], "2001:db8::1"),
    ]
    # As the mirroring controller: serving and terminating are left to their defaults.
    assert conditions(slices) == [(True, None, None), (False, None, None), (True, None, None)]
    assert slices[0].endpoints[0].nodeName == "node-1"


def test_subsets_with_equal_ports_share_a_slice():
    one, two, other = (
        {"addresses": [{"ip": ip}], "ports": [{"port": port}]}
        for ip, port in (("192.0.2.1", 80), ("192.0.2.2", 80), ("192.0.2.3", 81))
    )

    slices = build([service(selector=None)], mirrored=[endpoints(one, two, other)])

    assert [len(item.endpoints) for item in slices] == [2, 1]


SUBSET = {"addresses": [{"ip": "192.0.2.1"}], "ports": [{"port": 80}]}


@pytest.mark.parametrize(
    ("spec", "item"),
    [
        pytest.param({}, endpoints(SUBSET), id="service has a selector"),
        pytest.param({"selector": None}, endpoints(SUBSET, name="x"), id="no such service"),
        pytest.param(
            {"selector": None},
            endpoints(SUBSET, labels={"endpointslice.kubernetes.io/skip-mirror": "true"}),
            id="label says so",
        ),
        pytest.param(
            {"selector": None},
            endpoints(SUBSET, annotations={"control-plane.alpha.kubernetes.io/leader": "{}"}),
            id="leader election",
        ),
        pytest.param({"selector": None}, endpoints({"addresses": []}), id="no ports"),
    ],
)
def test_endpoints_are_not_mirrored(spec, item):
    assert build([service(**spec)], mirrored=[item]) == []


def given_slice():
    metadata = objects.ObjectMeta(
        name="given", namespace="shop", labels={"kubernetes.io/service-name": "web"}
    )
    return objects.EndpointSlice(metadata=metadata, addressType="IPv4")


def test_endpoints_are_not_mirrored_when_a_slice_is_given():
    built = build([service(selector=None)], mirrored=[endpoints(SUBSET)], existing=[given_slice()])

    assert built == []


def test_pod_as_it_is_before_it_starts_is_no_endpoint():
    bare = msgspec.convert(
        {"metadata": {"name": "a", "namespace": "shop", "labels": {"app": "web"}}},
        endpoint_controller.Pod,
    )

    assert build([service()], [bare]) == []


def test_named_port_of_a_pod_without_a_spec_is_missing():
    bare = pod()
    bare.spec = None
    named_target = service(ports=[{"port": 80, "targetPort": "http"}])

    assert build([named_target], [bare]) == []


def test_pods_count_beside_a_slice_that_is_given():
    assert len(build([service()], [pod()], existing=[given_slice()])) == 1


names = st.sampled_from([f"web-{number}" for number in range(8)])


@given(st.dictionaries(names, st.sampled_from(["10.0.0.1", "10.0.0.2"])), st.randoms())
def test_order_of_pods_makes_no_difference(by_name, random):
    pods = [pod(name, ip) for name, ip in by_name.items()]
    slices = build([service()], pods)
    random.shuffle(pods)

    assert build([service()], pods) == slices


def test_pod_that_comes_or_goes_leaves_the_name_of_the_slice():
    (one,) = build([service()], [pod("a", "10.0.0.1")])
    (two,) = build([service()], [pod("b", "10.0.0.2"), pod("c", "10.0.0.3")])

    assert one.metadata.name == two.metadata.name
