"""What the service's installer puts where, in a directory of its own. It downloads the dependencies."""

import os
import subprocess
from pathlib import Path

import pytest

import kubeproxy_py

INSTALL = Path(__file__).parents[2] / "deploy" / "systemd" / "install"


def install(*arguments, **environment):
    return subprocess.run(
        [INSTALL, *arguments],
        env={**os.environ, "PYTHON": "/usr/bin/python3", **environment},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install for another root and prefix, as a packager does."""
    root = tmp_path_factory.mktemp("root")
    done = install(DESTDIR=str(root), PREFIX="/usr")
    assert done.returncode == 0, done.stderr
    return root


def files(root):
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


def test_it_writes_the_unit_for_the_prefix_and_the_flags_file(installed):
    unit = (installed / "usr/lib/systemd/system/kubeproxy-py.service").read_text()

    assert "ExecStart=/usr/lib/kubeproxy-py/bin/kubeproxy-py run" in unit
    assert "/usr/local" not in unit
    assert 'KUBEPROXY_PY_FLAGS=""' in (installed / "etc/default/kubeproxy-py").read_text()
    command = (installed / "usr/bin/kubeproxy-py").readlink()
    assert command == Path("/usr/lib/kubeproxy-py/bin/kubeproxy-py")


def test_nothing_in_it_knows_where_it_was_made(installed):
    found = subprocess.run(
        ["grep", "--recursive", "--files-with-matches", "--text", "-e", installed, installed],
        capture_output=True,
        text=True,
        check=False,
    )

    # venv notes for itself how it was called.
    assert [Path(name).name for name in found.stdout.split()] == ["pyvenv.cfg"]


def test_the_command_runs(installed):
    done = subprocess.run(
        [installed / "usr/lib/kubeproxy-py/bin/python", "-m", "kubeproxy_py", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=installed,
    )

    assert f"kubeproxy-py {kubeproxy_py.__version__}," in done.stdout


def test_installing_again_keeps_the_flags_and_removing_too(installed):
    flags = installed / "etc/default/kubeproxy-py"
    flags.write_text('KUBEPROXY_PY_FLAGS="--v=4"\n')
    before = files(installed)
    assert install(DESTDIR=str(installed), PREFIX="/usr").returncode == 0
    assert flags.read_text() == 'KUBEPROXY_PY_FLAGS="--v=4"\n'
    assert files(installed) == before

    assert install("--remove", DESTDIR=str(installed), PREFIX="/usr").returncode == 0
    assert files(installed) == {"etc/default/kubeproxy-py"}


def test_what_it_does_not_know_it_refuses():
    done = install("--purge")

    assert done.returncode == 1
    assert "--purge" in done.stderr
