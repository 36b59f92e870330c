"""Ask the running daemon how it is, and say it: what ``status`` does beside reading flags."""

import os
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from kubeproxy_py import status_socket, status_text
from kubeproxy_py.errors import KubeProxyError
from kubeproxy_py.status_document import FailureStatus, Status

#: As systemctl and others do it: well, and not well.
EXIT_READY: Final = 0
EXIT_NOT_READY: Final = 2

_T = TypeVar("_T")

_PROC: Final = Path("/proc")


def tell(path: str, *, as_json: bool, colour: status_text.Colour) -> tuple[str, int]:
    """Return how the daemon is that listens at *path*, and the exit status that means it."""
    found = _ask(path, "/status", Status)
    text = _json(found) if as_json else status_text.status_text(found, colour)
    return text, EXIT_READY if found.state == "ready" else EXIT_NOT_READY


def tell_failures(path: str, *, as_json: bool) -> str:
    """Return the last failures of the daemon that listens at *path*."""
    found = _ask(path, "/last-failure", tuple[FailureStatus, ...])
    return _json(found) if as_json else status_text.failures_text(found)


def _ask(path: str, target: str, wanted: type[_T]) -> _T:
    try:
        return status_socket.ask(path, target, wanted=wanted)
    except status_socket.NotRunning as error:
        raise KubeProxyError(f"{error}; {_what_runs()}") from error


def _json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def _what_runs() -> str:
    pids = daemons()
    if not pids:
        return (
            "no daemon seems to run on this host: start it with `kubeproxy-py run` or its unit"
            " (docs/operations.md)"
        )
    listed = ", ".join(map(str, pids))
    return (
        f"a daemon seems to run (pid {listed}), but with another --status-socket, in another mount"
        " namespace (ask inside of its container), or it has not come so far"
    )


def daemons(proc: Path = _PROC) -> list[int]:
    """Return the processes on this host that look like ``kubeproxy-py run``."""
    found = []
    for directory in proc.iterdir():
        if not directory.name.isdecimal() or int(directory.name) == os.getpid():
            continue
        try:
            argv = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has ended since
        names = [Path(word).name for word in argv[:4]]
        if "run" in names and not {"kubeproxy-py", "kubeproxy_py"}.isdisjoint(names):
            found.append(int(directory.name))
    return sorted(found)
