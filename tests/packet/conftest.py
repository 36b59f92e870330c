"""Fixtures of the packet tests: a lab, its servers, and the two backends and families."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kubeproxy_py.model import IPFamily
from tests.support import netns
from tests.support.addresses import PLANS, AddressPlan
from tests.support.api_server import ApiServer
from tests.support.builders import make_node
from tests.support.duos import node_ips
from tests.support.netns import Backend, IptablesPrograms, Lab
from tests.support.proxy import Proxy, running
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


@pytest.fixture
def api(clean_lab: Lab) -> Iterator[ApiServer]:
    """Give an API server on the lab's node, which knows this node and nothing else."""
    with clean_lab.node.entered():
        server = ApiServer()
    with server:
        server.apply(make_node("node1", ips=node_ips()))
        yield server


@pytest.fixture
def start(
    clean_lab: Lab, backend: Backend, api: ApiServer, tmp_path: Path
) -> Iterator[Callable[..., Proxy]]:
    """Give a function that starts the daemon against the API server; all are killed at the end.

    Its arguments are the daemon's, and names with values are its environment.
    """
    kubeconfig = f"--kubeconfig={api.kubeconfig(tmp_path / 'kubeconfig')}"
    numbers = itertools.count()
    with contextlib.ExitStack() as started:

        def start(*arguments: str, **environ: str) -> Proxy:
            log = tmp_path / f"log-{next(numbers)}"
            return started.enter_context(
                running(clean_lab, backend, log, kubeconfig, *arguments, environ=environ)
            )

        yield start


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
