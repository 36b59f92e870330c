"""Every scenario, in the kernel, with real connections."""

import dataclasses
import re

import pytest

from kubeproxy_py.model import IPFamily
from tests.support import flows, scenario, traffic
from tests.support.flows import Kernel
from tests.support.scenario import DISPATCHES, REFUSED
from tests.support.scenarios import ALL, SCENARIOS

pytestmark = pytest.mark.packet


@pytest.fixture(scope="module")
def kernel(lab, servers, backend):
    """Give the backend, with servers on the node beside those of the pods."""
    with flows.node_servers(lab, servers):
        yield Kernel(lab, backend)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_scenario_holds_in_the_kernel(kernel, case, dispatch):
    rules = scenario.build(case, dispatch=dispatch, has_nfacct=kernel.has_nfacct)
    misses, live = kernel.try_all(case, rules)

    assert not misses, flows.explain_misses(case, rules, misses, live)


@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
@pytest.mark.parametrize("source", ["pod1", "outside"])
def test_a_refusal_is_felt_at_once(kernel, lab, family, source, protocol):
    case = SCENARIOS[family][f"a Service without endpoints refuses {protocol.upper()}"]
    with kernel.programmed(case, scenario.build(case)):
        tried = [
            traffic.connect(lab.namespace(source), case.plan.cluster_ip, 80, protocol)
            for _ in range(3)
        ]

    assert {outcome.kind for outcome in tried} == {"refused"}
    # Of three, since this machine may be busy with something else. Kernels may tell a TCP client of
    # an ICMPv6 error only when it sends again, after one second.
    is_slow = family is IPFamily.V6 and protocol == "tcp"
    assert min(outcome.seconds for outcome in tried) < (2.0 if is_slow else 0.1)


def test_a_failure_shows_the_live_rules_and_the_way_by_the_tracer(kernel, family):
    case = SCENARIOS[family]["a cluster IP serves UDP"]
    rules = scenario.build(case)
    wrong = dataclasses.replace(
        case, flows=[dataclasses.replace(flow, wanted=REFUSED) for flow in case.flows]
    )
    misses, live = kernel.try_all(wrong, rules)
    text = flows.explain_misses(wrong, rules, misses, live)

    assert "pod2 to" in text
    assert "wanted refused, source kept; got reached" in text
    assert "by the tracer 50.0% delivered" in text
    assert re.search(r"^\[\d+:\d+\] -A KUBE-SVC-", text, re.MULTILINE)
