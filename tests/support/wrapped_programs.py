"""iptables' programs with a fault of a test's choice: scripts that stand before the host's in PATH."""

import os
import shutil
from pathlib import Path


class WrappedPrograms:
    """A directory of such scripts."""

    def __init__(self, directory: Path) -> None:
        """Make *directory*."""
        self.directory = directory
        directory.mkdir()

    @property
    def path(self) -> str:
        """Return a PATH in which they come first."""
        return f"{self.directory}{os.pathsep}{os.environ['PATH']}"

    def refuse(self, program: str, text: str) -> None:
        """Let a restore *program* refuse every input that has *text*, as one without that module."""
        real = shutil.which(program)
        given = self.directory / f"{program}.$$"
        self._write(
            program,
            f"cat > {given}; trap 'rm -f {given}' EXIT\n"
            f"line=$(grep -n -m1 -e '{text}' {given} | cut -d: -f1)\n"
            f'if [ -n "$line" ]; then\n'
            f'  echo "{program} v1.8.9: Could not load match: No such file or directory" >&2\n'
            f'  echo "Error occurred at line: $line" >&2; exit 2\n'
            f"fi\n"
            f'{real} "$@" < {given}\n',
        )

    def garble(self, program: str, text: str) -> None:
        """Let *program* say all it says without *text*, as one that cannot read a rule of others."""
        self._write(program, f"{shutil.which(program)} \"$@\" | sed 's,{text},,'\n")

    def mend(self, program: str) -> None:
        """Let *program* be the host's again."""
        self._write(program, f'exec {shutil.which(program)} "$@"\n')

    def _write(self, program: str, body: str) -> None:
        new = self.directory / f".{program}"
        new.write_text(f"#!/bin/sh\n{body}")
        new.chmod(0o755)
        new.rename(self.directory / program)
