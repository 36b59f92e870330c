"""
A wall clock that jumps, for one process and those it starts; the machine's own is left alone.

Not libfaketime: 0.9.10 makes time.sleep fail with EINVAL from Python 3.11 on, which sleeps until a time
of the monotonic clock, and with it every wait for a child that has a time limit.
"""

import mmap
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

_SOURCE: Final = Path(__file__).with_suffix(".c")
_SHIFT: Final = struct.Struct("=q")


class WallClock:
    """How far the wall clock of whoever has ``environ`` is from the machine's."""

    def __init__(self, directory: Path) -> None:
        """Compile what shifts it into *directory*. Raises CalledProcessError, FileNotFoundError."""
        library, shift = directory / "wall_clock.so", directory / "wall_clock.shift"
        argv = [
            "gcc",
            "-shared",
            "-fPIC",
            "-O2",
            "-Wall",
            "-Werror",
            "-o",
            str(library),
            str(_SOURCE),
        ]
        subprocess.run(argv, check=True)
        shift.write_bytes(_SHIFT.pack(0))
        with shift.open("r+b") as file:
            self._shift = mmap.mmap(file.fileno(), _SHIFT.size)
        #: For the process whose clock it is.
        self.environ: Final[Mapping[str, str]] = {
            "LD_PRELOAD": str(library),
            "WALL_CLOCK_SHIFT": str(shift),
        }

    @property
    def shift_s(self) -> int:
        """How many seconds it is ahead; a process that runs sees a change with its next look."""
        (seconds,) = _SHIFT.unpack(self._shift[:])
        return int(seconds)

    @shift_s.setter
    def shift_s(self, seconds: int) -> None:
        self._shift[:] = _SHIFT.pack(seconds)

    def close(self) -> None:
        self._shift.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
