"""
``make e2e``: a cluster of kind without kube-proxy, this program on it, and the tests.

Exit status: pytest's; 2 if something that is needed is missing (nothing was done then); 1 if the
cluster could not be set up.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from typing import Final

import yaml

import kubeproxy_py
from e2e import deploy

ROOT: Final = Path(__file__).parents[1]
OVERLAY: Final = ROOT / "deploy" / "kubernetes" / "overlays" / "kind"
MISSING: Final = 2
_FAILED: Final = 1
# Images are pulled and nodes come up; on a laptop it takes one or two minutes.
_READY: Final = "300s"


class SetupError(Exception):
    """A step failed; the message names it and has its words."""


def main(argv: Sequence[str]) -> int:
    """Do all of it and return the exit status."""
    options = _parse(argv)
    if missing := _missing(options):
        for what in missing:
            print(f"cannot run the end-to-end tests: {what}", file=sys.stderr)
        return MISSING
    if options.kubeconfig:
        return _test(options.kubeconfig, options.pytest)
    name = f"kubeproxy-py-{options.family}"
    with tempfile.TemporaryDirectory(prefix="kubeproxy-py-e2e-") as directory:
        kubeconfig = str(Path(directory) / "kubeconfig")
        try:
            if not options.image:
                _run(["docker", "build", "--tag", _image(options), str(ROOT)])
            _create(name, options, kubeconfig)
            status = _test(kubeconfig, ["--disruptive", *options.pytest])
        except SetupError as error:
            print(f"cannot set the cluster up: {error}", file=sys.stderr)
            status = _FAILED
        finally:
            if not options.keep:
                _run_anyway(["kind", "delete", "cluster", f"--name={name}"])
    return status


def _create(name: str, options: argparse.Namespace, kubeconfig: str) -> None:
    config = str(Path(__file__).parent / "kind" / f"{options.family}.yaml")
    kubectl = ["kubectl", f"--kubeconfig={kubeconfig}"]
    _run(
        [
            "kind",
            "create",
            "cluster",
            f"--name={name}",
            f"--config={config}",
            f"--kubeconfig={kubeconfig}",
        ]
    )
    _run(["kind", "load", "docker-image", _image(options), f"--name={name}"])
    rendered = list(yaml.safe_load_all(_run([*kubectl, "kustomize", str(OVERLAY)])))
    objects = deploy.fitted(rendered, image=_image(options), api_host=f"{name}-control-plane")
    _run([*kubectl, "apply", "--filename=-"], text=yaml.safe_dump_all(objects))
    rollout = ["rollout", "status", "daemonset/kubeproxy-py", f"--timeout={_READY}"]
    _run([*kubectl, "--namespace=kube-system", *rollout])
    _run([*kubectl, "wait", "--for=condition=Ready", "nodes", "--all", f"--timeout={_READY}"])


def _test(kubeconfig: str, extra: Sequence[str]) -> int:
    command = [sys.executable, "-m", "pytest", "e2e", f"--kubeconfig={kubeconfig}", *extra]
    return subprocess.run(command, check=False, cwd=ROOT).returncode


def _missing(options: argparse.Namespace) -> list[str]:
    """Return what is needed and not there."""
    programs = ["kubectl"] if options.kubeconfig else ["docker", "kind", "kubectl"]
    missing = [f"{name} is not installed" for name in programs if which(name) is None]
    if "docker" in programs and which("docker") is not None and not _has_docker():
        missing.append("docker does not answer (docker info)")
    if not (options.kubeconfig or options.image or (ROOT / "Dockerfile").exists()):
        missing.append("there is no Dockerfile: name an image that exists with --image")
    if options.kubeconfig and not Path(options.kubeconfig).is_file():
        missing.append(f"there is no file {options.kubeconfig}")
    return missing


def _has_docker() -> bool:
    done = subprocess.run(["docker", "info"], capture_output=True, check=False)
    return done.returncode == 0


def _image(options: argparse.Namespace) -> str:
    return options.image or f"kubeproxy-py:{kubeproxy_py.__version__}"


def _run(command: Sequence[str], *, text: str = "") -> str:
    print("+", *command, flush=True)
    done = subprocess.run(
        command, input=text, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        raise SetupError(f"{' '.join(command[:3])} ended with {done.returncode}")
    return done.stdout


def _run_anyway(command: Sequence[str]) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, check=False, cwd=ROOT)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m e2e", description=__doc__)
    parser.add_argument("--family", choices=["ipv4", "ipv6", "dual"], default="ipv4")
    parser.add_argument("--image", default="", help="an image that exists; otherwise one is built")
    parser.add_argument("--keep", action="store_true", help="leave the cluster of kind")
    parser.add_argument(
        "--kubeconfig", default="", help="test this cluster as it is, and make none"
    )
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
