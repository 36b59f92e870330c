"""
Notices that the configuration file was rewritten, as kube-proxy does.

Only the file that was there at the start counts: written in place or renamed away is a change; a
replacement by rename, a deletion and the symlink swap of a mounted ConfigMap are not. Those arrive
on every node at one moment, and kube-proxies of a whole cluster must not restart together.
"""

import hashlib
import os
from pathlib import Path


class ConfigFile:
    """One open configuration file."""

    def __init__(self, path: str) -> None:
        """Open *path*, symlinks resolved now and never again. Raises OSError."""
        self._path = Path(path).resolve(strict=True)
        self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self._stamp = self._look()
        self._digest = self._read()

    def close(self) -> None:
        os.close(self._fd)

    def has_changed(self) -> bool:
        """Tell whether it was rewritten or renamed since the last call. Cheap enough to poll."""
        info = os.fstat(self._fd)
        if info.st_nlink == 0:
            return False
        if not self._path.exists():
            # It has a name, but no longer this one.
            return True
        stamp = self._look()
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        digest = self._read()
        is_same, self._digest = digest == self._digest, digest
        return not is_same

    def _look(self) -> tuple[int, int]:
        info = os.fstat(self._fd)
        return info.st_mtime_ns, info.st_size

    def _read(self) -> bytes:
        os.lseek(self._fd, 0, os.SEEK_SET)
        with os.fdopen(os.dup(self._fd), "rb") as file:
            return hashlib.sha256(file.read()).digest()
