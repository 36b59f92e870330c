"""Which endpoints a ServicePort may use on this node; the cases are those of kube-proxy's own test."""

import pytest

from kubeproxy_py import topology
from kubeproxy_py.model import Endpoint, ServicePort, ServicePortName

NODE, ZONE = "node1", "zone-a"


def ep(number, *, local=False, ready=True, serving=True, terminating=False, zones="", nodes=""):
    """Make the endpoint 10.1.2.NUMBER:80; hints are blank-separated."""
    return Endpoint(
        f"10.1.2.{number}", 80, local, ready, serving, terminating,
        frozenset(zones.split()), frozenset(nodes.split()),
    )  # fmt: skip


def port(*, internal_local=False, external_local=False, external=True):
    return ServicePort(
        name=ServicePortName("ns", "svc", "", "tcp"),
        cluster_ip="172.30.0.1",
        port=80,
        is_internal_local=internal_local,
        is_external_local=external_local,
        is_externally_accessible=external,
    )


def choose(endpoints, service_port, zone=ZONE):
    return topology.choose(endpoints, service_port, node_name=NODE, zone=zone)


def numbers(endpoints):
    return [int(endpoint.ip.rpartition(".")[2]) for endpoint in endpoints]


CLUSTER = port()
INTERNAL_LOCAL = port(internal_local=True, external=False)
EXTERNAL_LOCAL = port(external_local=True)
SPREAD = [
    ep(3, zones="zone-a"),
    ep(4, zones="zone-b"),
    ep(5, zones="zone-c"),
    ep(6, zones="zone-a"),
]


@pytest.mark.parametrize(
    ("endpoints", "zone", "wanted"),
    [
        pytest.param(SPREAD, "zone-a", [3, 6], id="all hinted, some for this zone"),
        pytest.param(SPREAD, "zone-b", [4], id="one for this zone"),
        pytest.param(SPREAD, "zone-z", [3, 4, 5, 6], id="no endpoint for this zone: no filtering"),
        pytest.param(SPREAD, "", [3, 4, 5, 6], id="node without a zone: no filtering"),
        pytest.param([*SPREAD, ep(7)], "zone-a", [3, 4, 5, 6, 7], id="one without hint: no filtering"),
        pytest.param(
            [*SPREAD, ep(7, ready=False)], "zone-a", [3, 6], id="unready without hint does not matter"
        ),
        pytest.param(
            [ep(3, zones="zone-a", ready=False), ep(4, zones="zone-b")], "zone-a", [4],
            id="only unready endpoints in this zone: no filtering",
        ),
        pytest.param(
            [ep(3, zones="zone-a zone-b"), ep(4, zones="zone-b zone-c"), ep(5, zones="zone-c")],
            "zone-b", [3, 4], id="several hints per endpoint",
        ),
        pytest.param(
            [ep(3, nodes="node1", zones="zone-b"), ep(4, nodes="node2", zones="zone-a")],
            "zone-a", [3], id="PreferSameNode is available and goes before the zone",
        ),
        pytest.param(
            [ep(3, nodes="node1", zones="zone-b"), ep(4, zones="zone-a")],
            "zone-a", [4], id="PreferSameNode ignored if some endpoints are unhinted",
        ),
        pytest.param(
            [ep(3, nodes="node2", zones="zone-a"), ep(4, nodes="node3", zones="zone-b")],
            "zone-a", [3], id="PreferSameNode falls back to the zone",
        ),
        pytest.param(
            [ep(3, nodes="node2", zones="zone-b"), ep(4, nodes="node3", zones="zone-b")],
            "zone-a", [3, 4], id="PreferSameNode falls back to all",
        ),
        pytest.param([ep(3), ep(4, ready=False, serving=False)], "", [3], id="some endpoints ready"),
        pytest.param(
            [ep(3, ready=False, serving=False), ep(4, ready=False)], "", [], id="none ready"
        ),
        pytest.param(
            [ep(3, ready=False, terminating=True, zones="zone-b"),
             ep(4, ready=False, serving=False, terminating=True)],
            "zone-a", [3], id="all terminating: those still serving, without regard to hints",
        ),
        pytest.param(
            [ep(3, terminating=True), ep(4)], "", [3, 4],
            id="ready and terminating (publishNotReadyAddresses) is ready",
        ),
    ],
)  # fmt: skip
def test_cluster_policy_chooses(endpoints, zone, wanted):
    choice = choose(endpoints, CLUSTER, zone)

    assert (numbers(choice.cluster), numbers(choice.local), choice.has_any) == (
        wanted, [], bool(wanted),
    )  # fmt: skip
    assert choice.reachable == choice.cluster


@pytest.mark.parametrize(
    ("endpoints", "service_port", "cluster", "local", "reachable", "has_any"),
    [
        pytest.param(
            [ep(3, local=True, zones="zone-a"), ep(4, zones="zone-a"), ep(5, zones="zone-b")],
            EXTERNAL_LOCAL, [3, 4], [3], [3, 4], True, id="eTP Local: hints do not apply to local",
        ),
        pytest.param(
            [ep(3, local=True, zones="zone-b"), ep(4, zones="zone-a"), ep(5, zones="zone-c")],
            EXTERNAL_LOCAL, [4], [3], [4, 3], True,
            id="conflicting topology and localness are merged",
        ),
        pytest.param(
            [ep(3, local=True), ep(4)], port(external_local=True, external=False),
            [3, 4], [], [3, 4], True, id="eTP Local ignored if not externally accessible",
        ),
        pytest.param(
            [ep(3, local=True), ep(4)], INTERNAL_LOCAL, [], [3], [3], True,
            id="iTP Local, some endpoints local",
        ),
        pytest.param(
            [ep(3, local=True), ep(4, local=True)], INTERNAL_LOCAL, [], [3, 4], [3, 4], True,
            id="iTP Local, all endpoints local",
        ),
        pytest.param(
            [ep(3), ep(4)], INTERNAL_LOCAL, [], [], [], True, id="iTP Local, all endpoints remote"
        ),
        pytest.param(
            [ep(3, ready=False)], INTERNAL_LOCAL, [], [], [], False, id="iTP Local, none usable"
        ),
        pytest.param(
            [ep(3, ready=False, terminating=True)], INTERNAL_LOCAL, [], [], [], True,
            id="iTP Local, remote terminating only",
        ),
        pytest.param(
            [ep(3, local=True, zones="zone-b"), ep(4, local=True, zones="zone-a")],
            INTERNAL_LOCAL, [], [3, 4], [3, 4], True, id="iTP Local: hints are ignored",
        ),
        pytest.param(
            [ep(3, local=True), ep(4)], port(internal_local=True), [3, 4], [3], [3, 4], True,
            id="iTP Local, eTP Cluster, some endpoints local",
        ),
        pytest.param(
            [ep(3, local=True), ep(4)], port(internal_local=True, external_local=True),
            [3, 4], [3], [3, 4], True, id="iTP Local, eTP Local, some endpoints local",
        ),
        pytest.param(
            [ep(3), ep(4)], port(internal_local=True, external_local=True),
            [3, 4], [], [3, 4], True, id="iTP Local, eTP Local, all endpoints remote",
        ),
        pytest.param(
            [ep(3, ready=False, terminating=True), ep(4, ready=False, terminating=True)],
            port(internal_local=True, external_local=True), [3, 4], [], [3, 4], True,
            id="iTP Local, eTP Local, all remote and terminating",
        ),
        pytest.param(
            [ep(3, local=True, ready=False, terminating=True), ep(4),
             ep(5, local=True, ready=False, serving=False, terminating=True)],
            EXTERNAL_LOCAL, [4], [3], [4, 3], True,
            id="eTP Local: local terminating serve while remote ones are ready",
        ),
        pytest.param(
            [ep(3, local=True), ep(4, local=True, ready=False, terminating=True)],
            EXTERNAL_LOCAL, [3], [3], [3], True, id="eTP Local: ready local ones go first",
        ),
        pytest.param([], EXTERNAL_LOCAL, [], [], [], False, id="no endpoints"),
    ],
)  # fmt: skip
def test_local_policies_choose(endpoints, service_port, cluster, local, reachable, has_any):
    choice = choose(endpoints, service_port)

    assert numbers(choice.cluster) == cluster
    assert numbers(choice.local) == local
    assert numbers(choice.reachable) == reachable
    assert choice.has_any is has_any
