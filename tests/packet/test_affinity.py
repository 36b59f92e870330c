"""Session affinity over time: it ends by itself, with its endpoint, and with nothing else."""

import pytest

from kubeproxy_py.model import IPFamily
from tests.support import scenario, traffic
from tests.support.addresses import PLANS
from tests.support.flows import Kernel
from tests.support.scenario import Scenario, service
from tests.support.traffic import Ticker

pytestmark = pytest.mark.packet

# A client that is not held to its endpoint stays there so often in one of a million runs.
CONNECTIONS = 21


@pytest.fixture
def kernel(lab, servers, backend):
    return Kernel(lab, backend)


def sticky(family: IPFamily, *endpoints: str, timeout_s: int = 3600) -> Scenario:
    plan = PLANS[family]
    objects = service(
        plan,
        *endpoints,
        sessionAffinity="ClientIP",
        sessionAffinityConfig={"clientIP": {"timeoutSeconds": timeout_s}},
    )
    return Scenario(name="affinity", plan=plan, objects=objects, flows=())


def answers(lab, plan, number: int) -> set[str]:
    """Return who answered *number* connections of one client."""
    return {
        traffic.connect(lab.outside, plan.cluster_ip, 80).server or "nobody" for _ in range(number)
    }


def test_it_ends_when_the_client_was_away_for_its_time(kernel, lab, family, plan):
    case = sticky(family, "pod1", "pod2", timeout_s=1)
    with (
        kernel.programmed(case, scenario.build(case)),
        # Each connection begins the time anew, so the pause is what counts.
        Ticker(lab.outside, plan.cluster_ip, 80, interval_s=1.2) as ticker,
    ):
        # Chosen anew each time: thirty times the same one of two will not happen.
        ticker.wait_for(
            lambda ticks: {tick.outcome.server for tick in ticks} == {"pod1", "pod2"}, timeout_s=36
        )


def test_it_ends_when_the_endpoint_leaves(kernel, lab, family, plan):
    case = sticky(family, "pod1", "pod2")
    rules = scenario.build(case)
    with kernel.programmed(case, rules):
        (first,) = answers(lab, plan, CONNECTIONS)
        (other,) = {"pod1", "pod2"} - {first}
        kernel.restore(family, scenario.build(sticky(family, other), after=rules))

        assert answers(lab, plan, CONNECTIONS) == {other}


def test_it_holds_when_another_endpoint_comes(kernel, lab, family, plan):
    case = sticky(family, "pod1", "pod2")
    rules = scenario.build(case)
    with kernel.programmed(case, rules):
        first = answers(lab, plan, 1)
        more = sticky(family, "pod1", "pod2", "remote1")
        kernel.restore(family, scenario.build(more, after=rules))

        assert answers(lab, plan, CONNECTIONS) == first
