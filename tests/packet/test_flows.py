"""Every scenario, in the kernel, with real connections."""

import pytest

from tests.support import flows, scenario
from tests.support.flows import Kernel
from tests.support.scenario import RULESETS
from tests.support.scenarios import ALL

pytestmark = pytest.mark.packet


@pytest.fixture(scope="module")
def kernel(lab, servers, backend):
    """Give the backend, with servers on the node beside those of the pods."""
    with flows.node_servers(lab, servers):
        yield Kernel(lab, backend)


@pytest.mark.parametrize("dispatch", RULESETS)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_scenario_holds_in_the_kernel(kernel, case, dispatch):
    rules = scenario.build(case, dispatch=dispatch, has_nfacct=kernel.has_nfacct)
    misses = kernel.try_all(case, rules)

    assert not misses, flows.explain_misses(case, rules, misses)
