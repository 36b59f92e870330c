"""Clients stay with an endpoint, or do not; named as in Kubernetes' test/e2e/network/service.go."""

import pytest

from e2e.bench import SERVICE_S
from e2e.objects import port

TRIES = 30


@pytest.fixture
def servers(bench):
    return [bench.server(f"server-{number}") for number in (1, 2, 3)]


@pytest.fixture
def client(bench):
    return bench.client()


def wait_for_affinity(bench, client, ip, number):
    """Wait until all requests go to one endpoint, and return its name."""
    seen = set()

    def sticks():
        seen.clear()
        seen.update(answer.body for answer in bench.ask(client, ip, number, tries=TRIES))
        return len(seen) == 1 and "" not in seen

    bench.wait(sticks, "session affinity", SERVICE_S)
    return seen.pop()


def timeout(seconds):
    return {"clientIP": {"timeoutSeconds": seconds}}


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_should_have_session_affinity_work_for_service(bench, servers, client, kind):
    service = bench.service("sticky", [port(80)], type=kind, sessionAffinity="ClientIP")
    ip, number = (
        (service.ip, 80) if kind == "ClusterIP" else (bench.nodes[0].ip, service.node_ports["TCP"])
    )
    chosen = wait_for_affinity(bench, client, ip, number)

    assert {answer.body for answer in bench.ask(client, ip, number, tries=TRIES)} == {chosen}


def test_should_have_session_affinity_timeout_work_for_service(bench, servers, client):
    service = bench.service(
        "sticky",
        [port(80)],
        sessionAffinity="ClientIP",
        sessionAffinityConfig=timeout(2),
    )
    seen = {wait_for_affinity(bench, client, service.ip, 80)}

    def expired():
        # Longer than the time-out after the last request; then any endpoint may be chosen.
        bench.run(client, ["sleep", "3"])
        seen.update(answer.body for answer in bench.ask(client, service.ip, 80))
        return len(seen) > 1

    bench.wait(expired, "another endpoint after the time-out", SERVICE_S)


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_should_be_able_to_switch_session_affinity_for_service(bench, servers, client, kind):
    service = bench.service("switched", [port(80)], type=kind, sessionAffinity="None")
    ip, number = (
        (service.ip, 80) if kind == "ClusterIP" else (bench.nodes[0].ip, service.node_ports["TCP"])
    )
    ports = [port(80, nodePort=number)] if kind == "NodePort" else [port(80)]
    bench.expect(client, ip, number, *servers)
    bench.service("switched", ports, type=kind, sessionAffinity="ClientIP")
    wait_for_affinity(bench, client, ip, number)
    bench.service("switched", ports, type=kind, sessionAffinity="None")

    bench.expect(client, ip, number, *servers)


def test_affinity_ends_with_its_endpoint(bench, servers, client):
    service = bench.service("sticky", [port(80)], sessionAffinity="ClientIP")
    chosen = wait_for_affinity(bench, client, service.ip, 80)
    (server,) = (server for server in servers if server.name == chosen)
    bench.delete_pod(server)

    assert wait_for_affinity(bench, client, service.ip, 80) != chosen
