"""
Totals of traffic on disk, so that they go on where the last process stopped.

Where they cannot be kept or read they begin at zero, which Prometheus takes for what it is. Only this
boot's are taken: the counters that they go on from ended with the last one.
"""

import contextlib
from pathlib import Path
from typing import Final

import msgspec
import structlog

from kubeproxy_py.model import Protocol

log = structlog.get_logger()

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Ten thousand series are a megabyte; what is larger was not written by us.
_MAX_BYTES = 64 * 2**20


class Total(msgspec.Struct, frozen=True, array_like=True):
    """One series: its labels, what it had come to, and what the kernel's counters stood at then."""

    namespace: str
    service: str
    port: str
    protocol: Protocol
    detail: str
    total: int
    standing: int


class Board(msgspec.Struct, frozen=True):
    """All series of one metric and family."""

    totals: tuple[Total, ...] = ()
    others: int = 0


class State(msgspec.Struct, frozen=True):
    """What a process leaves to the next: boards by IP family and metric."""

    boot_id: str = ""
    boards: dict[str, dict[str, Board]] = {}


# Before there are threads, see watch.py.
_DECODER: Final = msgspec.json.Decoder(State)


class StateFile:
    """The file. Nothing here raises: a disk that fails costs the totals and nothing else."""

    def __init__(self, path: Path | None, boot_id: Path = _BOOT_ID) -> None:
        """Use *path*; None: keep nothing."""
        self._path = path
        self._boot_id = boot_id
        self._has_failed = False  # and said so

    def read(self) -> State:
        """Return what this boot's last process left, or an empty state."""
        if self._path is None:
            return State()
        try:
            with self._path.open("rb") as file:
                state = _DECODER.decode(file.read(_MAX_BYTES))
        except FileNotFoundError:
            return State()
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("traffic.state_unreadable", path=str(self._path), error=str(error))
            return State()
        return state if state.boot_id == self._boot() else State()

    def write(self, boards: dict[str, dict[str, Board]]) -> None:
        """Put *boards* in the file's place; a reader finds the old or the new one, whole."""
        if self._path is None:
            return
        draft = self._path.with_name(self._path.name + ".tmp")
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            draft.write_bytes(msgspec.json.encode(State(self._boot(), boards)))
            draft.rename(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink()
            if not self._has_failed:
                self._has_failed = True
                log.warning("traffic.state_unwritten", path=str(self._path), error=str(error))
        else:
            self._has_failed = False

    def _boot(self) -> str:
        try:
            return self._boot_id.read_text().strip()
        except OSError:
            return ""
