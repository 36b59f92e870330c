"""UDP flows follow their endpoints; named as in Kubernetes' test/e2e/network/conntrack.go."""

import pytest

from e2e.objects import port

# The same for all datagrams of a client, so that they are one flow to connection tracking, which a
# stale entry would send to where the endpoint was.
SOURCE_PORT = 12345
UDP = port(80, protocol="UDP")


def expect(bench, client, ip, number, server):
    bench.expect_udp(client, ip, number, server, source_port=SOURCE_PORT)


@pytest.mark.parametrize("host_network", [False, True], ids=["pod", "host"])
@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_service(
    bench, two_nodes, kind, host_network
):
    client = bench.client("client", node=two_nodes[0], host_network=host_network)
    service = bench.service("udp", [UDP], type=kind)
    ip, number = (
        (service.ip, 80) if kind == "ClusterIP" else (two_nodes[1].ip, service.node_ports["UDP"])
    )
    first = bench.server("first", node=two_nodes[1], udp_port=80)
    expect(bench, client, ip, number, first)
    second = bench.server("second", node=two_nodes[1], udp_port=80)
    bench.delete_pod(first)

    expect(bench, client, ip, number, second)


def test_should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_with_internal_traffic_policy_local(
    bench, two_nodes
):
    client = bench.client("client", node=two_nodes[0])
    service = bench.service("udp", [UDP], internalTrafficPolicy="Local")
    first = bench.server("first", node=two_nodes[0], udp_port=80)
    expect(bench, client, service.ip, 80, first)
    second = bench.server("second", node=two_nodes[0], udp_port=80)
    bench.delete_pod(first)

    expect(bench, client, service.ip, 80, second)


def test_should_be_able_to_preserve_udp_traffic_when_initial_unready_endpoints_get_ready(bench):
    client = bench.client()
    service = bench.service("udp", [UDP])
    server = bench.server("server", udp_port=80, is_ready=False)
    # Datagrams while nobody is ready must not leave an entry that keeps the flow from him later.
    answers = bench.ask_udp(client, service.ip, 80, tries=3, source_port=SOURCE_PORT)
    bench.set_ready(server, is_ready=True)

    assert all(answer.body != server.name for answer in answers)
    expect(bench, client, service.ip, 80, server)


def test_should_be_able_to_cleanup_conntrack_entries_when_udp_service_target_port_changes_for_a_node_port_service(
    bench, two_nodes
):
    client = bench.client("client", node=two_nodes[0])
    server = bench.server("server", udp_port=80, node=two_nodes[1])
    nobody = port(80, protocol="UDP", targetPort=9999)
    service = bench.service("udp", [nobody], type="NodePort")
    ip, number = two_nodes[1].ip, service.node_ports["UDP"]
    # The flow is tracked to a port where nobody listens.
    answers = bench.ask_udp(client, ip, number, tries=3, source_port=SOURCE_PORT)
    bench.service(
        "udp", [port(80, protocol="UDP", targetPort=80, nodePort=number)], type="NodePort"
    )

    assert all(answer.body != server.name for answer in answers)
    expect(bench, client, ip, number, server)
