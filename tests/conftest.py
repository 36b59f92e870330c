"""
Hygiene for all tests: a registry of their own, no Kubernetes environment, no stray programs.

A unit test that runs one of the host's programs would pass or fail with the host, and could change
it. What a test wrote itself (below its tmp_path), the interpreter and openssl (throw-away
certificates) are no danger; anything else needs ``@pytest.mark.subprocess``.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from prometheus_client import CollectorRegistry

from kubeproxy_py.metrics import Metrics

_UNIT = Path(__file__).parent / "unit"
_HARMLESS = frozenset({"openssl", Path(sys.executable).name})

# How long one example takes says more about what else runs on the machine than about the code.
hypothesis.settings.register_profile("unhurried", deadline=None)
# For `make fuzz`, with --hypothesis-profile: no number of examples is enough.
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=20_000)
hypothesis.settings.load_profile("unhurried")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "subprocess: a unit test that may run the host's programs")


@pytest.fixture
def metrics() -> Metrics:
    """Give all metrics, on a registry that no other test has seen."""
    return Metrics(CollectorRegistry())


@pytest.fixture(autouse=True)
def _no_cluster_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test find a cluster because it happens to run inside one."""
    for name in os.environ:
        if name.startswith("KUBERNETES_") or name == "KUBECONFIG":
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _no_programs_of_the_host(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if _UNIT not in request.path.parents or request.node.get_closest_marker("subprocess"):
        return
    start = subprocess.Popen.__init__
    made_by_tests = tmp_path_factory.getbasetemp()

    def guarded(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        program = Path(str(args if isinstance(args, str | os.PathLike) else args[0]))
        if program.name not in _HARMLESS and made_by_tests not in program.parents:
            raise AssertionError(f"a unit test ran {program}; mark it with pytest.mark.subprocess")
        start(self, args, *rest, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", guarded)
