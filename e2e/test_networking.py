"""Who reaches whom over which protocol; named as in Kubernetes' test/e2e/network/networking.go."""

import pytest

from e2e.objects import port


@pytest.fixture
def servers(bench, two_nodes):
    return [
        bench.server(f"netserver-{number}", node=node, udp_port=80)
        for number, node in enumerate(two_nodes)
    ]


@pytest.fixture
def service(bench):
    ports = [port(80, name="http"), port(80, name="udp", protocol="UDP")]
    return bench.service("node-port", ports, type="NodePort")


def expect(bench, client, ip, service, servers, protocol, *, is_node=False):
    ask = bench.expect_udp if protocol == "udp" else bench.expect
    ask(client, ip, service.node_ports[protocol] if is_node else 80, *servers)


@pytest.mark.parametrize("protocol", ["http", "udp"])
def test_should_function_for_pod_service(bench, two_nodes, servers, service, protocol):
    client = bench.client("client", node=two_nodes[0])

    expect(bench, client, service.ip, service, servers, protocol)
    for node in two_nodes:
        expect(bench, client, node.ip, service, servers, protocol, is_node=True)


@pytest.mark.parametrize("protocol", ["http", "udp"])
def test_should_function_for_node_service(bench, two_nodes, servers, service, protocol):
    client = bench.client("client", node=two_nodes[0], host_network=True)

    expect(bench, client, service.ip, service, servers, protocol)
    for node in two_nodes:
        expect(bench, client, node.ip, service, servers, protocol, is_node=True)


@pytest.mark.parametrize("protocol", ["http", "udp"])
def test_should_function_for_endpoint_service(bench, servers, service, protocol):
    expect(bench, servers[0], service.ip, service, servers, protocol)


def test_should_function_for_multiple_endpoint_services_with_same_selector(bench, servers, service):
    other = bench.service("other", [port(80)])
    for found in (service, other):
        bench.expect(servers[0], found.ip, 80, *servers)


@pytest.mark.parametrize("protocol", ["http", "udp"])
def test_should_update_endpoints(bench, servers, service, protocol):
    client = bench.client()
    expect(bench, client, service.ip, service, servers, protocol)
    bench.delete_pod(servers[0])

    expect(bench, client, service.ip, service, servers[1:], protocol)


def test_should_update_node_port(bench, two_nodes, servers, service):
    client = bench.client()
    number = service.node_ports["http"]
    bench.expect(client, two_nodes[0].ip, number, *servers)
    bench.delete("Service", "node-port")

    bench.expect_nothing(client, two_nodes[0].ip, number)


def test_should_function_for_service_endpoints_using_host_network(bench, two_nodes):
    for number, node in enumerate(two_nodes):
        bench.server(f"host-{number}", node=node, host_network=True, http_port=10280)
    service = bench.service("hosts", [port(80, targetPort=10280)], type="NodePort")
    client = bench.client("client", node=two_nodes[0])
    names = [node.name for node in two_nodes]

    bench.expect(client, service.ip, 80, *names)
    bench.expect(client, two_nodes[1].ip, service.node_ports["TCP"], *names)


def test_should_be_able_to_handle_large_requests(bench, servers, service):
    client = bench.client()
    bench.expect(client, service.ip, 80, *servers)
    message = "x" * 4000
    (answer,) = bench.ask(client, service.ip, 80, f"/echo?msg={message}")

    assert answer.body == message
