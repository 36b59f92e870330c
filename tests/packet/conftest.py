"""Fixtures of the packet tests: a lab, its servers, and the two backends and families."""

import os
from collections.abc import Iterator

import pytest

from kubeproxy_py.model import IPFamily
from tests.support import netns
from tests.support.addresses import PLANS, AddressPlan
from tests.support.netns import Backend, IptablesPrograms, Lab
from tests.support.servers import Servers

POD_PORTS = (80, 81, 8080)  # what every pod serves, over TCP, UDP and SCTP


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Give the small cluster of the address plan, for all tests of a module."""
    if os.geteuid():
        pytest.skip("packet tests need root")
    with Lab.build() as built:
        yield built


@pytest.fixture
def clean_lab(lab: Lab) -> Iterator[Lab]:
    """Give the lab with no rule and no tracked connection on its node; both go afterwards, too."""
    lab.reset_rules()
    yield lab
    lab.reset_rules()


@pytest.fixture(scope="module")
def servers(lab: Lab) -> Iterator[Servers]:
    """Let every pod serve POD_PORTS under its namespace's name."""
    with Servers() as running:
        for pod in lab.pods:
            running.serve(pod, tcp=POD_PORTS, udp=POD_PORTS, sctp=POD_PORTS)
        yield running


@pytest.fixture(scope="module", params=["nft", "legacy"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Repeat a test on both of iptables' backends."""
    chosen: Backend = request.param
    return chosen


@pytest.fixture(scope="module", params=list(IPFamily), ids=lambda family: family.value)
def family(request: pytest.FixtureRequest) -> IPFamily:
    """Repeat a test in both families."""
    chosen: IPFamily = request.param
    return chosen


@pytest.fixture(scope="module")
def plan(family: IPFamily) -> AddressPlan:
    """Give the addresses of the test's family."""
    return PLANS[family]


@pytest.fixture(scope="module")
def iptables(backend: Backend, family: IPFamily) -> IptablesPrograms:
    """Give the program names of the test's backend and family."""
    return netns.iptables_programs(backend, family)
