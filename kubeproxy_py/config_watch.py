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
        # The name before the file: the other way round, a file deleted in between would count as
        # one that was renamed, and a ConfigMap's update would restart a few nodes of every cluster.
        has_its_name = self._has_its_name()
        if os.fstat(self._fd).st_nlink == 0:
            return False
        if not has_its_name:
            return True
        stamp = self._look()
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        digest = self._read()
        is_same, self._digest = digest == self._digest, digest
        return not is_same

    def _has_its_name(self) -> bool:
        try:
            named = self._path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(named, os.fstat(self._fd))

    def _look(self) -> tuple[int, int]:
        info = os.fstat(self._fd)
        return info.st_mtime_ns, info.st_size

    def _read(self) -> bytes:
        os.lseek(self._fd, 0, os.SEEK_SET)
        with os.fdopen(os.dup(self._fd), "rb") as file:
            return hashlib.sha256(file.read()).digest()
