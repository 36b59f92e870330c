"""The proxy itself: its pages, its restart, its rules; as in test/e2e/network/{networking,kube_proxy}.go."""

import pytest

from e2e.objects import port


@pytest.fixture
def proxies(cluster, pytestconfig):
    """Give node, namespace and name of the proxy's ready Pods, by a function that asks anew."""
    selector = pytestconfig.getoption("--proxy-selector")

    def find():
        return sorted(
            (pod["spec"]["nodeName"], pod["metadata"]["namespace"], pod["metadata"]["name"])
            for pod in cluster.list("pods", selector=selector)
            if not pod["metadata"].get("deletionTimestamp")
            and any(
                (c["type"], c["status"]) == ("Ready", "True")
                for c in pod["status"].get("conditions", ())
            )
        )

    return find


def test_should_check_kube_proxy_urls(bench):
    node = bench.nodes[0]
    client = bench.client("client", node=node, host_network=True)
    loopback = "::1" if bench.family == "IPv6" else "127.0.0.1"

    bench.expect_status(client, node.ip, 10256, "200", path="/healthz")
    (health,) = bench.ask(client, node.ip, 10256, "/healthz")
    assert "lastUpdated" in health.body
    if bench.family == "IPv4":
        # Metrics are on 127.0.0.1 only.
        (mode,) = bench.ask(client, loopback, 10249, "/proxyMode")
        assert mode.body == "iptables"


def test_every_node_has_one_ready_proxy(bench, proxies):
    nodes = sorted(node.name for node in bench.nodes)

    bench.wait(lambda: [node for node, *_ in proxies()] == nodes, "one ready proxy on each node")


@pytest.mark.disruptive
def test_should_work_after_restarting_kube_proxy(bench, cluster, proxies):
    client = bench.client()
    server = bench.server("server")
    before = bench.service("before", [port(80)])
    bench.expect(client, before.ip, 80, server)
    old = proxies()
    for _, namespace, name in old:
        cluster.delete("Pod", namespace, name)
    # Rules stay while the proxy is away.
    answers = bench.ask(client, before.ip, 80, tries=10)
    bench.wait(lambda: len(proxies()) == len(old) and not set(proxies()) & set(old), "new proxies")
    after = bench.service("after", [port(80)])

    assert {answer.body for answer in answers} == {server.name}
    bench.expect(client, before.ip, 80, server)
    bench.expect(client, after.ip, 80, server)


@pytest.mark.disruptive
def test_should_recreate_its_iptables_rules_if_they_are_deleted(bench, cluster, proxies):
    client = bench.client()
    server = bench.server("server")
    service = bench.service("repaired", [port(80)])
    bench.expect(client, service.ip, 80, server)
    # The proxy's container has the programs, in the version that wrote the rules, and the host's network.
    flush = (
        "for p in iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do"
        " $p -w -t nat -F KUBE-SERVICES 2>/dev/null || true; done"
    )
    for _, namespace, name in proxies():
        cluster.execute(namespace, name, ["sh", "-c", flush])

    bench.expect(client, service.ip, 80, server)
