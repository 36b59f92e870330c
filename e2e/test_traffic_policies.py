"""Local endpoints, terminating ones, health check node ports; as in test/e2e/network/service.go."""

import pytest

from e2e.objects import port

# Longer than these tests take, so that a terminating server serves until its test is over.
DELAY_S = 120
# Local policies have health check node ports only where a load balancer may ask.
LOCAL = {"type": "LoadBalancer", "externalTrafficPolicy": "Local"}


@pytest.mark.parametrize("host_network", [False, True], ids=["pod", "host"])
def test_should_respect_internal_traffic_policy_local_pod_to_pod(bench, two_nodes, host_network):
    server = bench.server("server", node=two_nodes[0])
    service = bench.service("internal", [port(80)], internalTrafficPolicy="Local")
    near = bench.client("near", node=two_nodes[0], host_network=host_network)
    far = bench.client("far", node=two_nodes[1], host_network=host_network)

    bench.expect(near, service.ip, 80, server)
    bench.expect_silence(far, service.ip, 80)


def test_should_respect_internal_traffic_policy_local_pod_and_node_to_pod_host_network(
    bench, two_nodes
):
    bench.server("server", node=two_nodes[0], host_network=True, http_port=10180)
    service = bench.service("internal", [port(80, targetPort=10180)], internalTrafficPolicy="Local")
    near = bench.client("near", node=two_nodes[0])
    far = bench.client("far", node=two_nodes[1])

    # On the host's network, a server's host name is the node's.
    bench.expect(near, service.ip, 80, two_nodes[0].name)
    bench.expect_silence(far, service.ip, 80)


def test_should_support_external_traffic_policy_local_for_type_node_port(bench, two_nodes):
    server = bench.server("server", node=two_nodes[0])
    service = bench.service("external", [port(80)], type="NodePort", externalTrafficPolicy="Local")
    number = service.node_ports["TCP"]
    client = bench.client("client", node=two_nodes[1], host_network=True)
    bench.expect(client, two_nodes[0].ip, number, server)

    assert bench.source_of(client, two_nodes[0].ip, number) == two_nodes[1].ip


def test_should_implement_node_port_and_health_check_node_port_correctly_when_external_traffic_policy_changes(
    bench, two_nodes
):
    near, far = two_nodes
    server = bench.server("server", node=near)
    service = bench.service("changing", [port(80)], **LOCAL)
    number, health = service.node_ports["TCP"], service.health_check_node_port
    client = bench.client("client", node=near, host_network=True)
    bench.expect(client, near.ip, number, server)
    bench.expect_status(client, near.ip, health, "200")
    bench.expect_status(client, far.ip, health, "503")
    # From outside, a node without endpoints drops; from within the cluster it finds the others.
    outside = bench.client("outside", node=far, host_network=True)
    bench.expect(outside, near.ip, number, server)
    bench.service(
        "changing",
        [port(80, nodePort=number)],
        type="LoadBalancer",
        externalTrafficPolicy="Cluster",
    )
    for node in two_nodes:
        bench.expect(client, node.ip, number, server)
        bench.expect_nothing(client, node.ip, health)
    again = bench.service(
        "changing", [port(80, nodePort=number)], **LOCAL, healthCheckNodePort=health
    )

    assert again.health_check_node_port == health
    bench.expect_status(client, near.ip, health, "200")
    bench.expect_status(client, far.ip, health, "503")


def test_should_fail_health_check_node_port_if_there_are_only_terminating_endpoints(
    bench, two_nodes
):
    server = bench.server("server", node=two_nodes[0], delay_s=DELAY_S)
    service = bench.service("ending", [port(80)], **LOCAL)
    client = bench.client("client", node=two_nodes[0], host_network=True)
    bench.expect(client, two_nodes[0].ip, service.node_ports["TCP"], server)
    bench.expect_status(client, two_nodes[0].ip, service.health_check_node_port, "200")
    bench.delete("Pod", server.name)

    bench.expect_status(client, two_nodes[0].ip, service.health_check_node_port, "503")
    # Load balancers need time to notice; until then, traffic is still served.
    bench.expect(client, two_nodes[0].ip, service.node_ports["TCP"], server)


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
def test_should_fallback_to_terminating_endpoints_with_internal_traffic_policy(
    bench, two_nodes, policy
):
    server = bench.server("server", node=two_nodes[0], delay_s=DELAY_S)
    service = bench.service("ending", [port(80)], internalTrafficPolicy=policy)
    near = bench.client("near", node=two_nodes[0])
    far = bench.client("far", node=two_nodes[1])
    bench.expect(near, service.ip, 80, server)
    bench.delete("Pod", server.name)

    bench.expect(near, service.ip, 80, server)
    if policy == "Local":
        bench.expect_silence(far, service.ip, 80)
    else:
        bench.expect(far, service.ip, 80, server)


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
def test_should_fallback_to_terminating_endpoints_with_external_traffic_policy(
    bench, two_nodes, policy
):
    server = bench.server("server", node=two_nodes[0], delay_s=DELAY_S)
    service = bench.service("ending", [port(80)], type="NodePort", externalTrafficPolicy=policy)
    client = bench.client("client", node=two_nodes[1], host_network=True)
    number = service.node_ports["TCP"]
    bench.expect(client, two_nodes[0].ip, number, server)
    bench.delete("Pod", server.name)

    bench.expect(client, two_nodes[0].ip, number, server)
