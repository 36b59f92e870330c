"""How connections are shared among endpoints: by a chi-square test, of a few thousand of them."""

import collections
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support import scenario, traffic
from tests.support.builders import make_endpoint, make_port, make_service, make_slice
from tests.support.flows import Kernel
from tests.support.scenario import NODE_NAME, Scenario
from tests.support.servers import Servers

pytestmark = pytest.mark.packet

# Above the ports that all pods serve.
FIRST_PORT = 10000
#: The value of chi-square that a fair choice among n endpoints (n - 1 degrees of freedom) exceeds
#: with a probability of 0.001, as in any table of them.
CRITICAL = {1: 0.0, 2: 10.828, 3: 13.816, 10: 27.877, 100: 148.230}
CONNECTIONS = {1: 500, 2: 2000, 3: 2000, 10: 2000, 100: 4000}
CLIENTS = 4


@pytest.fixture(scope="module")
def endpoints(lab):
    """Let a hundred servers, on all pods, tell their own addresses; give these in turn."""
    pods = lab.pods
    by_pod = {pod: range(FIRST_PORT, FIRST_PORT + 100 // len(pods)) for pod in pods}
    with Servers() as running:
        for pod, ports in by_pod.items():
            running.serve(pod, tcp=ports)
        yield [
            (pod, port)
            for ports in zip(*by_pod.values(), strict=True)
            for pod, port in zip(pods, ports, strict=True)
        ]


def fair(plan, endpoints) -> Scenario:
    """Return a Service with these endpoints, each port of which is in a slice of its own."""
    by_port = collections.defaultdict(list)
    for pod, port in endpoints:
        by_port[port].append(make_endpoint(pod.address(plan.family), node=NODE_NAME))
    slices = [
        make_slice("web", name=f"web-{port}", endpoints=found, ports=[make_port(port, name="http")])
        for port, found in by_port.items()
    ]
    web = make_service("web", cluster_ip=plan.cluster_ip, ports=[make_port(80, name="http")])
    return Scenario(name="spread", plan=plan, objects=[web, *slices], flows=())


def draw(lab, plan, number: int) -> collections.Counter[tuple[str, int]]:
    """Connect *number* times; count who answered."""

    def once(_number: int) -> tuple[str, int]:
        outcome = traffic.connect(lab.outside, plan.cluster_ip, 80)
        assert outcome.is_answered, outcome
        return outcome.server, outcome.server_port

    with ThreadPoolExecutor(CLIENTS) as pool:
        return collections.Counter(pool.map(once, range(number)))


def chi_square(counts: collections.Counter[tuple[str, int]], n: int) -> float:
    """Return how far *counts* are from *n* equal shares."""
    share = counts.total() / n
    empty = n - len(counts)
    return sum((count - share) ** 2 / share for count in counts.values()) + empty * share


@pytest.mark.parametrize(
    ("n", "dispatch"),
    # In a tree of rules so many endpoints are chosen among in two steps.
    [*((n, "flat") for n in CONNECTIONS), (100, "tree")],
)
def test_every_endpoint_gets_its_share(lab, endpoints, backend, plan, n, dispatch):
    case = fair(plan, endpoints[:n])
    known = {(pod.name, port) for pod, port in endpoints[:n]}
    with Kernel(lab, backend).programmed(case, scenario.build(case, dispatch=dispatch)):
        counts = draw(lab, plan, CONNECTIONS[n])
        assert counts.keys() <= known
        if chi_square(counts, n) > CRITICAL[n]:
            # A fair choice does that once in a thousand runs, and twice running once in a million.
            counts = draw(lab, plan, CONNECTIONS[n])

    assert chi_square(counts, n) <= CRITICAL[n], sorted(counts.items())
