"""
The narrow seam to a cluster: five things that tests do to one, and kubectl to do them.

Tests know only ``Cluster``, so the same tests run on anything that has these methods.
"""

import json
import subprocess
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

Json = dict[str, Any]

_MANAGER: Final = "kubeproxy-py-e2e"
# For one command; what waits for a cluster's state asks again and again instead.
_COMMAND_S: Final = 60.0


class ClusterError(Exception):
    """The cluster, or kubectl, refuses; with its words."""


class Execution(NamedTuple):
    """What became of a program in a Pod."""

    status: int
    stdout: str
    stderr: str


class Cluster(Protocol):
    """A cluster with a service proxy on each node."""

    def apply(self, obj: Json) -> Json:
        """Create or change *obj* and return it as the cluster has it. Raises ClusterError."""

    def delete(self, kind: str, namespace: str, name: str, *, grace_s: int | None = None) -> None:
        """Ask for the end of an object, without waiting for it; none there is fine."""

    def find(self, kind: str, namespace: str, name: str) -> Json | None:
        """Return an object; None if there is none."""

    def list(self, kind: str, namespace: str = "", selector: str = "") -> list[Json]:
        """Return the objects of a kind, of one namespace or of all."""

    def execute(
        self, namespace: str, pod: str, argv: Sequence[str], *, timeout_s: float = _COMMAND_S
    ) -> Execution:
        """Run a program in a Pod to its end, and return how it ended. Raises ClusterError."""


class Kubectl:
    """A cluster as kubectl reaches it."""

    def __init__(self, kubeconfig: str) -> None:
        self._command: Final = ["kubectl", f"--kubeconfig={kubeconfig}"]

    def apply(self, obj: Json) -> Json:
        # Server-side: fields that this manager no longer names are taken away, others' are left.
        how = ["--server-side", "--force-conflicts", f"--field-manager={_MANAGER}"]
        text = self._run(["apply", *how, "--output=json", "--filename=-"], text=json.dumps(obj))
        applied: Json = json.loads(text)
        return applied

    def delete(self, kind: str, namespace: str, name: str, *, grace_s: int | None = None) -> None:
        grace = [] if grace_s is None else [f"--grace-period={grace_s}"]
        where = [f"--namespace={namespace}"] if namespace else []
        self._run(["delete", kind, name, "--ignore-not-found", "--wait=false", *where, *grace])

    def find(self, kind: str, namespace: str, name: str) -> Json | None:
        where = [f"--namespace={namespace}"] if namespace else []
        text = self._run(["get", kind, name, "--ignore-not-found", "--output=json", *where])
        return json.loads(text) if text.strip() else None

    def list(self, kind: str, namespace: str = "", selector: str = "") -> list[Json]:
        where = [f"--namespace={namespace}"] if namespace else ["--all-namespaces"]
        chosen = [f"--selector={selector}"] if selector else []
        found: list[Json] = json.loads(self._run(["get", kind, "--output=json", *where, *chosen]))[
            "items"
        ]
        return found

    def execute(
        self, namespace: str, pod: str, argv: Sequence[str], *, timeout_s: float = _COMMAND_S
    ) -> Execution:
        done = self._start(
            ["exec", f"--namespace={namespace}", pod, "--", *argv], "", timeout_s=timeout_s
        )
        # kubectl's own failures begin so; a program's status is passed on.
        if done.returncode and done.stderr.startswith(("Error from server", "error: ")):
            raise ClusterError(f"cannot run {argv[0]} in {namespace}/{pod}: {done.stderr.strip()}")
        return Execution(done.returncode, done.stdout, done.stderr)

    def _run(self, arguments: Sequence[str], text: str = "") -> str:
        done = self._start(arguments, text, timeout_s=_COMMAND_S)
        if done.returncode:
            raise ClusterError(f"cannot {' '.join(arguments[:3])}: {done.stderr.strip()}")
        return done.stdout

    def _start(
        self, arguments: Sequence[str], text: str, *, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [*self._command, *arguments],
                input=text,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except FileNotFoundError as error:
            raise ClusterError("cannot run kubectl: it is not installed") from error
        except subprocess.TimeoutExpired as error:
            raise ClusterError(
                f"cannot {' '.join(arguments[:3])}: no answer within {timeout_s} s"
            ) from error
