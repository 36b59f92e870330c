"""Every scenario, on the tracer."""

import pytest

from tests.support import flows, scenario
from tests.support.scenario import DISPATCHES
from tests.support.scenarios import ALL


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_scenario_holds_by_the_tracer(case, dispatch):
    rules = scenario.build(case, dispatch=dispatch)
    misses = flows.trace_all(case, rules.tables)

    assert not misses, flows.explain_misses(case, rules, misses)
