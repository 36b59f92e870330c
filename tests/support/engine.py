"""
Containers of one image, run by docker or what takes its command line.

Each is removed when its block ends. None is ever given the host's network: only none at all, or that
of another container of ours.
"""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tests.support.traffic import wait_until

# What a container of the image needs at most; everything else is taken away.
HARDENED: Final = (
    "--read-only",
    "--cap-drop=ALL",
    "--cap-add=NET_ADMIN",
    "--cap-add=NET_RAW",
    "--security-opt=no-new-privileges",
)

# A container starts in a second or two; this is for a machine that does much else.
_LIMIT_S: Final = 120


class Container:
    """One that runs in the background."""

    def __init__(self, engine: "Engine", identity: str) -> None:
        self.identity: Final = identity
        self._engine = engine

    @property
    def pid(self) -> int:
        """The process number, on this host, of its first process; 0 once that has ended."""
        return int(self._engine.inspect(self.identity)["State"]["Pid"])

    def logs(self) -> str:
        done = self._engine.call("logs", self.identity)
        return done.stdout + done.stderr

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events of this name which it logged, if it logs JSON."""
        lines = (line for line in self.logs().splitlines() if line.startswith("{"))
        return [event for event in map(json.loads, lines) if event.get("event") == name]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, float]:
        """Send its first process a signal; return the exit status and the seconds it took to end."""
        process = Path("/proc", str(self.pid))
        os.kill(int(process.name), number)
        seconds = wait_until(lambda: not process.exists(), timeout_s=30, what="the container's end")
        return int(self._engine.call("wait", self.identity).stdout), seconds


class Engine:
    """The container engine, and the image."""

    def __init__(self, command: str, image: str) -> None:
        self.image: Final = image
        self._command: Final = command.split()

    def call(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the engine to its end; raises AssertionError, with its stderr, if it fails."""
        argv = [*self._command, *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr}")
        return done

    def inspect(self, what: str) -> Any:
        """Return what the engine knows of a container or an image."""
        return json.loads(self.call("inspect", what).stdout)[0]

    def run(
        self, *arguments: str, options: Sequence[str] = (), network: Container | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a container to its end, whatever that is; without a network, or in that of another."""
        return self.call(
            "run", "--rm", _network(network), *options, self.image, *arguments, check=False
        )

    @contextlib.contextmanager
    def running(
        self, *arguments: str, options: Sequence[str] = (), network: Container | None = None
    ) -> Iterator[Container]:
        """Run a container in the background, until the block ends."""
        started = self.call("run", "--detach", _network(network), *options, self.image, *arguments)
        container = Container(self, started.stdout.strip())
        try:
            yield container
        finally:
            self.call("rm", "--force", container.identity)


def _network(network: Container | None) -> str:
    return f"--network=container:{network.identity}" if network else "--network=none"
