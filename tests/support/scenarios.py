"""
The behaviour of a service proxy, as data: one table for the tracer and for the kernel.

A behaviour is added once, in the module where its like are; tests/unit/test_flows.py and
tests/packet/test_flows.py run all there are. What is wanted is kube-proxy's documented behaviour,
not what our rules happen to do.
"""

from typing import Final

from tests.support import scenarios_endpoints, scenarios_external, scenarios_inside
from tests.support.addresses import PLANS

_GROUPS: Final = (
    *scenarios_inside.GROUPS,
    *scenarios_external.GROUPS,
    *scenarios_endpoints.GROUPS,
)

#: Every scenario, by family and name.
SCENARIOS: Final = {
    family: {scenario.name: scenario for group in _GROUPS for scenario in group(plan)}
    for family, plan in PLANS.items()
}
ALL: Final = tuple(scenario for found in SCENARIOS.values() for scenario in found.values())
