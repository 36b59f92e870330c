"""
Wait until something changes in some directories (inotify(7), through libc).

Says that something changed, never what: whoever asks looks for himself. Events may be missed
(network file systems send none), so a caller keeps looking from time to time all the same.
"""

import ctypes
import os
import select
import struct
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self

# linux/inotify.h. Reads and opens are not asked for: our own would wake us.
_IN_MODIFY: Final = 0x2
_IN_ATTRIB: Final = 0x4
_IN_CLOSE_WRITE: Final = 0x8
_IN_MOVED: Final = 0x40 | 0x80
_IN_CREATE: Final = 0x100
_IN_DELETE: Final = 0x200
_IN_DELETE_SELF: Final = 0x400
_IN_MOVE_SELF: Final = 0x800
_IN_Q_OVERFLOW: Final = 0x4000
_IN_IGNORED: Final = 0x8000
_IN_ONLYDIR: Final = 0x1000000
_MASK: Final = (
    _IN_MODIFY | _IN_ATTRIB | _IN_CLOSE_WRITE | _IN_MOVED | _IN_CREATE | _IN_DELETE
    | _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_ONLYDIR
)  # fmt: skip
_HEADER: Final = struct.Struct("iIII")  # wd, mask, cookie, length of the name that follows
_BUFFER_BYTES: Final = 64 * 1024  # an event takes at most 16 + 256 bytes


class Inotify:
    """An inotify instance and the directories it watches. Not for several threads at once."""

    def __init__(self) -> None:
        """Open it. Raises OSError when the kernel gives none (the limit is per user)."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._call("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        # By watch descriptor: the names that matter there; None is every name.
        self._names: dict[int, frozenset[str] | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def watch(self, directories: Mapping[str, frozenset[str] | None]) -> None:
        """
        Watch exactly *directories*, each for these names in it or, with None, for all.

        One that is not there, or not a directory, is passed over: its parent is what tells of
        it. Raises OSError when the kernel gives no more watches.
        """
        names: dict[int, frozenset[str] | None] = {}
        for directory, wanted in directories.items():
            try:
                # For a directory that is watched already this returns the descriptor it has.
                wd = self._call("inotify_add_watch", self._fd, os.fsencode(directory), _MASK)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
            known = names.get(wd, frozenset())
            names[wd] = None if known is None or wanted is None else known | wanted
        for wd in self._names.keys() - names.keys():
            # The kernel forgets a deleted directory itself, so there may be nothing to remove.
            self._libc.inotify_rm_watch(self._fd, wd)
        self._names = names

    def wait(self, timeout_s: float) -> bool:
        """Return True as soon as something that matters has changed, False after *timeout_s*."""
        if not self._poll.poll(timeout_s * 1000):
            return False
        return self._drain()

    def _drain(self) -> bool:
        is_relevant = False
        while True:
            try:
                data = os.read(self._fd, _BUFFER_BYTES)
            except BlockingIOError:
                return is_relevant
            offset = 0
            while offset < len(data):
                wd, mask, _, length = _HEADER.unpack_from(data, offset)
                offset += _HEADER.size
                name = os.fsdecode(data[offset : offset + length].rstrip(b"\0"))
                offset += length
                is_relevant |= self._matters(wd, mask, name)

    def _matters(self, wd: int, mask: int, name: str) -> bool:
        if mask & _IN_Q_OVERFLOW:
            return True
        if mask & _IN_IGNORED or wd not in self._names:
            return False
        wanted = self._names[wd]
        # No name: the directory itself.
        return not name or wanted is None or name in wanted

    def _call(self, function: str, *arguments: int | bytes) -> int:
        result: int = getattr(self._libc, function)(*arguments)
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot watch files: {function}: {os.strerror(number)}")
        return result
