"""Slices that nobody's controller made; named as in Kubernetes' test/e2e/network/endpointslice.go."""

import pytest

from e2e import objects
from e2e.objects import port


@pytest.fixture
def pods(bench):
    return [
        bench.server("one", http_port=8090, app="unselected"),
        bench.server("two", http_port=8091, app="unselected"),
    ]


def apply(bench, name, service, ports, addresses, **labels):
    bench.cluster.apply(
        objects.endpoint_slice(
            name,
            service,
            namespace=bench.namespace,
            ports=ports,
            addresses=addresses,
            labels=labels,
        )
    )


def test_should_support_a_service_with_multiple_ports_specified_in_multiple_endpoint_slices(
    bench, pods
):
    client = bench.client()
    service = bench.service("custom", [port(8090, name="a"), port(8091, name="b")], app=None)
    apply(bench, "custom-a", "custom", [port(8090, name="a")], [pods[0].ip])
    apply(bench, "custom-b", "custom", [port(8091, name="b")], [pods[1].ip])

    bench.expect(client, service.ip, 8090, pods[0])
    bench.expect(client, service.ip, 8091, pods[1])


def test_should_support_a_service_with_multiple_endpoint_ips_specified_in_multiple_endpoint_slices(
    bench, pods
):
    client = bench.client()
    service = bench.service("custom", [port(80, name="web")], app=None)
    apply(bench, "custom-1", "custom", [port(8090, name="web")], [pods[0].ip])
    apply(bench, "custom-2", "custom", [port(8091, name="web")], [pods[1].ip])

    bench.expect(client, service.ip, 80, *pods)


def test_should_implement_service_kubernetes_io_headless(bench, pods):
    client = bench.client()
    service = bench.service("custom", [port(80, name="web")], app=None)
    headless = {"service.kubernetes.io/headless": ""}
    slices = [
        ("custom-1", port(8090, name="web"), pods[0]),
        ("custom-2", port(8091, name="web"), pods[1]),
    ]
    for name, ports, pod in slices:
        apply(bench, name, "custom", [ports], [pod.ip])
    bench.expect(client, service.ip, 80, *pods)
    for name, ports, pod in slices:
        apply(bench, name, "custom", [ports], [pod.ip], **headless)
    bench.expect_refusal(client, service.ip, 80)
    name, ports, pod = slices[0]
    apply(bench, name, "custom", [ports], [pod.ip])

    bench.expect(client, service.ip, 80, pod)
