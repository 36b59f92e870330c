"""Wrong rules are noticed in the kernel, too: what the tracer finds wrong, packets find wrong."""

import itertools

import pytest

from kubeproxy_py.model import IPFamily
from tests.support import flows, mutations
from tests.support.flows import Kernel

pytestmark = pytest.mark.packet

DAMAGES = mutations.damages()
# Long enough for an answer, which takes a millisecond; where rules are wrong, many never come.
ANSWER_S = 0.25
#: Each damage is done once to each backend, and once in each family that has such rules.
FAMILIES = {"nft": IPFamily.V4, "legacy": IPFamily.V6}
#: Scenarios to try: what one of them does not show in the lab, another does.
CANDIDATES = 5


@pytest.fixture(scope="module")
def kernel(lab, servers, backend):
    """Give a backend that waits briefly, with servers on the node beside those of the pods."""
    with flows.node_servers(lab, servers):
        yield Kernel(lab, backend, answer_s=ANSWER_S)


@pytest.mark.parametrize("damage", DAMAGES, ids=list(DAMAGES))
def test_some_scenario_notices(kernel, backend, damage):
    candidates = mutations.noticing(DAMAGES[damage], FAMILIES[backend])

    assert any(
        kernel.try_all(case, rules).misses
        for case, rules in itertools.islice(candidates, CANDIDATES)
    )
