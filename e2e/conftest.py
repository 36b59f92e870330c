"""Options and fixtures: which cluster, which families, and a namespace for each test."""

import os
import uuid
from collections.abc import Iterator
from typing import Any, Final

import pytest

from e2e import agnhost, objects
from e2e.bench import Bench, Node
from e2e.cluster import Cluster, ClusterError, Kubectl

# A test waits for several things in turn; each wait has its own limit.
_TEST_S: Final = 1200
#: As pytest's exit status when there is nothing to test on.
NO_CLUSTER: Final = 2


class Hooks:
    """What plugins may provide."""

    @pytest.hookspec(firstresult=True)
    def pytest_e2e_cluster(self, config: pytest.Config) -> Cluster | None:
        """Return the cluster to test, instead of the one of --kubeconfig."""


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(Hooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("e2e")
    group.addoption("--kubeconfig", default="", help="the cluster to test; KUBECONFIG otherwise")
    group.addoption("--agnhost", default=agnhost.IMAGE, help="image of test servers and clients")
    group.addoption(
        "--disruptive",
        action="store_true",
        help="also tests that restart the proxy or delete its rules",
    )
    group.addoption(
        "--proxy-selector", default="k8s-app=kube-proxy", help="labels of the proxy's Pods"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "disruptive: disturbs others on the cluster; --disruptive")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(_TEST_S))
        if item.get_closest_marker("disruptive") and not config.getoption("--disruptive"):
            item.add_marker(pytest.mark.skip(reason="disturbs others; run with --disruptive"))


@pytest.fixture(scope="session")
def cluster(pytestconfig: pytest.Config) -> Cluster:
    provided: Cluster | None = pytestconfig.hook.pytest_e2e_cluster(config=pytestconfig)
    if provided is not None:
        return provided
    kubeconfig = pytestconfig.getoption("--kubeconfig") or os.environ.get("KUBECONFIG", "")
    if not kubeconfig:
        pytest.exit("there is no cluster: give --kubeconfig, or set KUBECONFIG", NO_CLUSTER)
    found = Kubectl(kubeconfig)
    try:
        found.list("nodes")
    except ClusterError as error:
        pytest.exit(f"the cluster of {kubeconfig} does not answer: {error}", NO_CLUSTER)
    return found


@pytest.fixture(scope="session")
def node_objects(cluster: Cluster) -> list[dict[str, Any]]:
    """Give the Nodes that run Pods."""
    return [
        node
        for node in cluster.list("nodes")
        if not node["spec"].get("unschedulable")
        and any((c["type"], c["status"]) == ("Ready", "True") for c in node["status"]["conditions"])
    ]


@pytest.fixture(params=["IPv4", "IPv6"])
def family(request: pytest.FixtureRequest, node_objects: list[dict[str, Any]]) -> str:
    """Repeat a test in both families; the one that the cluster does not have is left out."""
    wanted: str = request.param
    if not _nodes(node_objects, wanted):
        pytest.skip(f"the cluster has no {wanted}")
    return wanted


@pytest.fixture
def bench(
    cluster: Cluster,
    family: str,
    node_objects: list[dict[str, Any]],
    pytestconfig: pytest.Config,
) -> Iterator[Bench]:
    """Give a namespace of the test's own, which is deleted with all that is in it."""
    name = f"kubeproxy-py-e2e-{uuid.uuid4().hex[:8]}"
    cluster.apply(objects.namespace(name))
    try:
        yield Bench(
            cluster,
            name,
            family=family,
            nodes=_nodes(node_objects, family),
            image=pytestconfig.getoption("--agnhost"),
        )
    finally:
        cluster.delete("Namespace", "", name)


@pytest.fixture
def two_nodes(bench: Bench) -> tuple[Node, Node]:
    """Give two nodes; workers first."""
    if len(bench.nodes) < 2:
        pytest.skip("the cluster has one node")
    return bench.nodes[0], bench.nodes[1]


def _nodes(found: list[dict[str, Any]], family: str) -> list[Node]:
    is_v6 = family == "IPv6"
    nodes = []
    # Control planes last: they may be small.
    for node in sorted(
        found,
        key=lambda n: (
            "node-role.kubernetes.io/control-plane" in n["metadata"].get("labels", {}),
            n["metadata"]["name"],
        ),
    ):
        ips = [a["address"] for a in node["status"]["addresses"] if a["type"] == "InternalIP"]
        cidrs = node["spec"].get("podCIDRs") or ips
        if any((":" in ip) == is_v6 for ip in ips) and any((":" in c) == is_v6 for c in cidrs):
            nodes.append(
                Node(node["metadata"]["name"], next(ip for ip in ips if (":" in ip) == is_v6))
            )
    return nodes
