"""What image and service are made of, as far as it can be told without making them."""

import configparser
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kubeproxy_py.flag_table import FLAGS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
UNIT = ROOT / "deploy" / "systemd" / "kubeproxy-py.service"
DEFAULTS = ROOT / "deploy" / "systemd" / "kubeproxy-py.default"
REQUIREMENTS = ROOT / "deploy" / "requirements.txt"
BUILD_REQUIREMENTS = ROOT / "deploy" / "requirements-build.txt"


# Dependencies ---------------------------------------------------------------------------------------


def locked(path):
    """Return version and hashes by name, as a lock file has them."""
    found = {}
    for entry in re.split(r"\n(?=\S)", path.read_text()):
        if not entry.startswith("#"):
            requirement = Requirement(entry.split("\\")[0])
            (pin,) = requirement.specifier
            assert pin.operator == "==", entry
            hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry)
            found[canonicalize_name(requirement.name)] = (pin.version, hashes)
    return found


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        pytest.param(REQUIREMENTS, PROJECT["project"]["dependencies"], id="at run time"),
        pytest.param(BUILD_REQUIREMENTS, PROJECT["build-system"]["requires"], id="to build"),
    ],
)
def test_what_is_installed_is_locked_as_pyproject_asks(path, wanted):
    found = locked(path)
    requirements = [Requirement(text) for text in wanted]

    # If this fails: make lock.
    assert [
        str(requirement)
        for requirement in requirements
        if canonicalize_name(requirement.name) not in found
        or found[canonicalize_name(requirement.name)][0] not in requirement.specifier
    ] == []


@pytest.mark.parametrize("path", [REQUIREMENTS, BUILD_REQUIREMENTS], ids=lambda path: path.name)
def test_every_locked_dependency_has_hashes_and_comes_from_no_special_place(path):
    assert [name for name, (_, hashes) in locked(path).items() if not hashes] == []
    assert not re.search(r"://|^--?(index|extra|find|trusted)", path.read_text(), re.MULTILINE)


# The image ------------------------------------------------------------------------------------------


def instructions():
    """Return the Dockerfile's instructions and their arguments, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def of_stage(number):
    """Return the instructions of one stage; 0 is what stands before the first FROM."""
    stages = [[]]
    for name, rest in instructions():
        if name == "FROM":
            stages.append([])
        stages[-1].append((name, rest))
    return stages[number]


def test_both_stages_begin_with_the_base_that_was_asked_for():
    assert of_stage(0) == [("ARG", "BASE=debian:bookworm-slim")]
    assert [rest.split()[0] for name, rest in instructions() if name == "FROM"] == ["${BASE}"] * 2


def test_what_runs_has_an_entry_point_and_labels_and_nothing_implicit():
    found = dict(of_stage(-1))

    assert found["ENTRYPOINT"] == '["/usr/local/bin/kubeproxy-py"]'
    assert set(re.findall(r"org\.opencontainers\.image\.(\w+)=", found["LABEL"])) == {
        *("title", "description", "licenses", "version", "revision"),
    }
    # kube-proxy's image has no health check either: probes belong to whoever runs it. A volume would
    # be writable, and a shell would not pass signals on.
    assert not {"HEALTHCHECK", "VOLUME", "CMD", "SHELL", "ADD", "EXPOSE"} & set(found)


def test_compilers_stay_in_the_first_stage():
    final = " ".join(rest for _, rest in of_stage(-1))

    assert not re.search(r"\b(gcc|python3-dev|python3-pip|libc6-dev|pip)\b", final)


def test_packages_come_without_recommended_ones_and_leave_no_lists():
    steps = [rest for name, rest in instructions() if name == "RUN" and "apt-get" in rest]

    assert len(steps) == 2
    for step in steps:
        assert "--no-install-recommends" in step
        assert "rm -rf /var/lib/apt/lists/*" in step


def test_it_is_built_by_every_builder():
    # BuildKit's own syntax is unknown to docker without buildx, and to old podman.
    assert not [rest for name, rest in instructions() if name in {"RUN", "COPY"} and "<<" in rest]
    assert not [rest for name, rest in instructions() if name == "RUN" and "--mount" in rest]


def test_settings_of_pip_are_not_left_in_the_image():
    assert "PIP_" not in " ".join(rest for _, rest in of_stage(-1))


def test_the_build_sees_what_it_copies_and_no_more():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = {
        source
        for name, rest in instructions()
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }

    assert all((ROOT / source).exists() for source in copied)
    assert "*" in ignored
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied


# The service ----------------------------------------------------------------------------------------


@pytest.fixture
def unit():
    """Give the unit; of a setting that stands there several times, the last."""
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read(UNIT)
    return parser


def known_flags():
    return {f"--{flag.name}" for flag in FLAGS}


def test_the_service_runs_the_daemon_with_the_flags_of_its_file(unit):
    words = unit["Service"]["ExecStart"].split()

    assert words == ["/usr/local/lib/kubeproxy-py/bin/kubeproxy-py", "run", "$KUBEPROXY_PY_FLAGS"]
    assert unit["Service"]["EnvironmentFile"] == "-/etc/default/kubeproxy-py"


def test_the_flags_its_file_suggests_are_flags_of_run():
    text = DEFAULTS.read_text()

    suggested = set(re.findall(r"--[a-z-]+", text))
    # --help is click's own.
    assert suggested - {"--help"} <= known_flags()
    assert re.findall(r"^[^#\s].*$", text, re.MULTILINE) == ['KUBEPROXY_PY_FLAGS=""']


def test_the_service_says_when_it_is_ready_and_is_always_started_again(unit):
    service = unit["Service"]

    assert (service["Type"], service["NotifyAccess"]) == ("notify", "main")
    assert service["Restart"] == "always"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    # The daemon speaks at least once a second while it runs, and a start that is slow is no hang.
    assert int(service["WatchdogSec"]) >= 30


def test_stopping_the_service_leaves_the_rules(unit):
    assert not [key for key in unit["Service"] if key.startswith("ExecStop")]


def test_the_service_may_do_what_it_must_and_no_more(unit):
    service = unit["Service"]

    assert service["CapabilityBoundingSet"].split() == ["CAP_NET_ADMIN", "CAP_NET_RAW"]
    assert service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["ReadWritePaths"].split() == ["-/run/xtables.lock"]
    assert set(service["RestrictAddressFamilies"].split()) == {
        *("AF_INET", "AF_INET6", "AF_NETLINK", "AF_UNIX"),
    }
    # It sets sysctls itself.
    assert service["ProtectKernelTunables"] == "no"


def test_the_service_has_the_directories_that_the_program_uses(unit):
    service = unit["Service"]

    assert service["StateDirectory"] == service["RuntimeDirectory"] == "kubeproxy-py"


def test_the_service_starts_after_those_who_replace_all_rules(unit):
    after = set(re.findall(r"^After=(.*)$", UNIT.read_text(), re.MULTILINE))
    units = {name for line in after for name in line.split()}

    assert units >= {"network.target", "firewalld.service", "nftables.service", "ufw.service"}
    assert "modprobe@nf_conntrack.service" in units
    assert unit["Unit"]["Conflicts"] == "kube-proxy.service"


@pytest.mark.subprocess
def test_systemd_understands_the_unit(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    # It looks whether the programs are there.
    program = tmp_path / "kubeproxy-py"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    there = tmp_path / UNIT.name
    there.write_text(
        re.sub("^ExecStart=\\S+", f"ExecStart={program}", UNIT.read_text(), flags=re.MULTILINE)
    )
    done = subprocess.run(
        ["systemd-analyze", "verify", there], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.subprocess
def test_systemd_finds_the_unit_little_exposed():
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    # Tenths. 2.8 now, most of it for what it is there for: root, network, netlink, sysctls.
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=30", "--no-pager", UNIT],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-200:] + done.stderr
