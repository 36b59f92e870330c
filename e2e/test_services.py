"""Services come, change and go; named as in Kubernetes' test/e2e/network/service.go."""

import pytest

from e2e.objects import port


def test_should_serve_a_basic_endpoint_from_pods(bench):
    client = bench.client()
    service = bench.service("basic", [port(80)])
    bench.expect_refusal(client, service.ip, 80)
    one = bench.server("one")
    bench.expect(client, service.ip, 80, one)
    two = bench.server("two")
    bench.expect(client, service.ip, 80, one, two)
    bench.delete_pod(one)
    bench.expect(client, service.ip, 80, two)
    bench.delete_pod(two)

    bench.expect_refusal(client, service.ip, 80)


def test_should_serve_multiport_endpoints_from_pods(bench):
    client = bench.client()
    one = bench.server("one", http_port=100, ports=[{"name": "p1", "containerPort": 100}])
    two = bench.server("two", http_port=101, ports=[{"name": "p2", "containerPort": 101}])
    service = bench.service(
        "multi",
        [port(80, name="a", targetPort="p1"), port(81, name="b", targetPort="p2")],
    )

    bench.expect(client, service.ip, 80, one)
    bench.expect(client, service.ip, 81, two)


def test_should_be_updated_after_adding_or_deleting_ports(bench):
    client = bench.client()
    server = bench.server("server")
    http = port(80, name="http")
    more = port(8080, name="more", targetPort=80)
    service = bench.service("ports", [http])
    bench.expect(client, service.ip, 80, server)
    bench.service("ports", [http, more])
    bench.expect(client, service.ip, 8080, server)
    bench.service("ports", [more])
    bench.expect_nothing(client, service.ip, 80)

    bench.expect(client, service.ip, 8080, server)


def test_should_preserve_source_pod_ip_for_traffic_thru_service_cluster_ip(bench, two_nodes):
    server = bench.server("server", node=two_nodes[0])
    service = bench.service("source", [port(80)])
    clients = [bench.client("same", node=two_nodes[0]), bench.client("other", node=two_nodes[1])]
    for client in clients:
        bench.expect(client, service.ip, 80, server)

        assert bench.source_of(client, service.ip, 80) == client.ip


def test_should_allow_pods_to_hairpin_back_to_themselves_through_services(bench):
    pod = bench.server("hairpin")
    service = bench.service("hairpin", [port(80)])

    bench.expect(pod, service.ip, 80, pod)


def test_should_be_able_to_up_and_down_services(bench):
    client = bench.client()
    servers = [bench.server(name, app=name) for name in ("up-down-1", "up-down-2", "up-down-3")]
    first = bench.service("up-down-1", [port(80)], app="up-down-1")
    second = bench.service("up-down-2", [port(80)], app="up-down-2")
    bench.expect(client, first.ip, 80, servers[0])
    bench.expect(client, second.ip, 80, servers[1])
    bench.delete("Service", "up-down-1")
    bench.expect_nothing(client, first.ip, 80)
    bench.expect(client, second.ip, 80, servers[1])
    third = bench.service("up-down-3", [port(80)], app="up-down-3")

    bench.expect(client, third.ip, 80, servers[2])
    bench.expect(client, second.ip, 80, servers[1])


def test_should_work_after_the_service_has_been_recreated(bench):
    client = bench.client()
    server = bench.server("server")
    first = bench.service("again", [port(80)])
    bench.expect(client, first.ip, 80, server)
    bench.delete("Service", "again")
    bench.wait(
        lambda: bench.cluster.find("Service", bench.namespace, "again") is None, "its deletion"
    )
    bench.expect_nothing(client, first.ip, 80)
    second = bench.service("again", [port(80)])

    bench.expect(client, second.ip, 80, server)


def test_should_be_able_to_create_a_functioning_node_port_service(bench, two_nodes):
    client = bench.client("client", node=two_nodes[0], host_network=True)
    server = bench.server("server", node=two_nodes[0])
    service = bench.service("node-port", [port(80)], type="NodePort")

    bench.expect(client, service.ip, 80, server)
    for node in two_nodes:
        bench.expect(client, node.ip, service.node_ports["TCP"], server)


def test_should_be_possible_to_connect_to_a_service_via_external_ip_when_the_external_ip_is_not_assigned_to_a_node(
    bench,
):
    external = "2001:db8::7b" if bench.family == "IPv6" else "203.0.113.250"
    client = bench.client()
    server = bench.server("server")
    bench.service("external", [port(80)], externalIPs=[external])

    bench.expect(client, external, 80, server)


def test_should_be_able_to_update_service_type_to_node_port_listening_on_same_port_number_but_different_protocols(
    bench,
):
    client = bench.client()
    server = bench.server("server", udp_port=80)
    bench.service("both", [port(80, name="tcp")])
    made = bench.service("both", [port(80, name="tcp")], type="NodePort")
    number = made.node_ports["tcp"]
    ports = [
        port(80, name="tcp", nodePort=number),
        port(80, name="udp", protocol="UDP", nodePort=number),
    ]
    bench.service("both", ports, type="NodePort")

    bench.expect(client, bench.nodes[0].ip, number, server)
    bench.expect_udp(client, bench.nodes[0].ip, number, server)


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_should_be_able_to_change_the_type_from_external_name(bench, kind):
    client = bench.client()
    server = bench.server("server")
    bench.service("changed", app=None, type="ExternalName", externalName="example.com")
    service = bench.service("changed", [port(80)], type=kind)

    bench.expect(client, service.ip, 80, server)
    if kind == "NodePort":
        bench.expect(client, bench.nodes[0].ip, service.node_ports["TCP"], server)


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_should_be_able_to_change_the_type_to_external_name(bench, kind):
    client = bench.client()
    server = bench.server("server")
    service = bench.service("changed", [port(80)], type=kind)
    bench.expect(client, service.ip, 80, server)
    bench.service("changed", app=None, type="ExternalName", externalName="example.com")

    bench.expect_nothing(client, service.ip, 80)
    if kind == "NodePort":
        bench.expect_nothing(client, bench.nodes[0].ip, service.node_ports["TCP"])


def test_should_be_rejected_when_no_endpoints_exist(bench, two_nodes):
    client = bench.client("client", node=two_nodes[0])
    service = bench.service("empty", [port(80)], type="NodePort")

    bench.expect_refusal(client, service.ip, 80)
    for node in two_nodes:
        bench.expect_refusal(client, node.ip, service.node_ports["TCP"])


def test_should_implement_service_proxy_name(bench):
    client = bench.client()
    server = bench.server("server")
    service = bench.service("labelled", [port(80)])
    bench.expect(client, service.ip, 80, server)
    other = {"service.kubernetes.io/service-proxy-name": "somebody-else"}
    bench.service("labelled", [port(80)], labels=other)
    bench.expect_nothing(client, service.ip, 80)
    bench.service("labelled", [port(80)])

    bench.expect(client, service.ip, 80, server)


def test_should_be_able_to_connect_to_terminating_and_unready_endpoints_if_publish_not_ready_addresses_is_true(
    bench,
):
    client = bench.client()
    unready = bench.server("unready", is_ready=False)
    service = bench.service("published", [port(80)], publishNotReadyAddresses=True)
    bench.expect(client, service.ip, 80, unready)
    terminating = bench.server("terminating", delay_s=60)
    bench.expect(client, service.ip, 80, unready, terminating)
    bench.delete("Pod", terminating.name)

    bench.expect(client, service.ip, 80, unready, terminating)


def test_should_not_be_able_to_connect_to_unready_endpoints_if_publish_not_ready_addresses_is_false(
    bench,
):
    client = bench.client()
    server = bench.server("unready", is_ready=False)
    service = bench.service("unpublished", [port(80)], type="NodePort")
    bench.expect_refusal(client, service.ip, 80)
    bench.expect_refusal(client, bench.nodes[0].ip, service.node_ports["TCP"])
    bench.set_ready(server, is_ready=True)
    bench.expect(client, service.ip, 80, server)
    bench.set_ready(server, is_ready=False)

    bench.expect_refusal(client, service.ip, 80)


def test_should_serve_endpoints_on_same_port_and_different_protocols(bench):
    client = bench.client()
    server = bench.server("server", udp_port=80)
    tcp, udp = port(80, name="tcp"), port(80, name="udp", protocol="UDP")
    service = bench.service("protocols", [tcp, udp])
    bench.expect(client, service.ip, 80, server)
    bench.expect_udp(client, service.ip, 80, server)
    bench.service("protocols", [udp])

    bench.expect_nothing(client, service.ip, 80)
    bench.expect_udp(client, service.ip, 80, server)


def test_should_support_named_target_ports_that_resolve_to_different_ports_on_different_endpoints(
    bench,
):
    client = bench.client()
    one = bench.server("one", http_port=8080, ports=[{"name": "web", "containerPort": 8080}])
    two = bench.server("two", http_port=8081, ports=[{"name": "web", "containerPort": 8081}])
    service = bench.service("named", [port(80, targetPort="web")])

    bench.expect(client, service.ip, 80, one, two)
