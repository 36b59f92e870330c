"""
Tests of the built image: ``make image-test`` builds it and names it in $IMAGE.

They need a container engine and minutes, so that without that variable there are none of them.
"""

import os
from collections.abc import Iterator

import pytest

from tests.support.engine import Container, Engine
from tests.support.netns import Lab
from tests.support.servers import Servers

collect_ignore_glob = [] if os.environ.get("IMAGE") else ["test_*.py"]


@pytest.fixture(scope="session")
def engine() -> Engine:
    """Give the container engine, with the image under test."""
    return Engine(os.environ.get("DOCKER") or "docker", os.environ["IMAGE"])


@pytest.fixture(scope="module")
def sandbox(engine: Engine) -> Iterator[Container]:
    """Give a container that does nothing but have a network, as each Pod has one."""
    with engine.running("infinity", options=["--entrypoint=/usr/bin/sleep"]) as container:
        yield container


@pytest.fixture(scope="module")
def lab(sandbox: Container) -> Iterator[Lab]:
    """Give a cluster whose node is the sandbox."""
    with Lab.build(node_of=sandbox.pid) as built, Servers() as servers:
        for pod in built.pods:
            servers.serve(pod, tcp=[80], udp=[80])
        yield built


@pytest.fixture
def clean_lab(lab: Lab) -> Iterator[Lab]:
    """Give the lab without rules, and with the sysctls that a new node has."""
    lab.reset_rules()
    lab.node.write_sysctls({"net/ipv4/conf/all/route_localnet": "0"})
    yield lab
    lab.reset_rules()
