"""
Runs iptables as ``runner`` does, and tells a watcher which changes are our own.

A watcher that could not tell would take each of our own restores for somebody else's change, and
have it looked at and, for all it knows, repaired.
"""

import subprocess
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.errors import IptablesError
from kubeproxy_py.iptables import chains, runner
from kubeproxy_py.model import IPFamily

# As iptables-nft says it of a chain that does not exist; "incompatible" is also what it says of one
# with rules of another kind, which is to be written anew just the same.
_NO_CHAIN: Final = ("No chain/target/match", "is incompatible", "does not exist")


class WatchedIptables(runner.Iptables):
    """The kernel's tables of one family, with restores that a watcher overlooks."""

    def __init__(
        self,
        programs: runner.Programs,
        own: Callable[[IPFamily, int], AbstractContextManager[None]],
    ) -> None:
        """Call *own* with each process that writes, before it is given anything to write."""
        super().__init__(programs)
        self._own = own

    def restore(self, text: str, *, test: bool = False) -> None:
        if test:
            super().restore(text, test=True)
            return
        argv = [self.programs.restore, "-w", str(self._lock_wait_s), "--noflush"]
        try:
            with subprocess.Popen(  # noqa: S603 - fixed argv, no shell
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            ) as process:
                limit = threading.Timer(self._process_limit_s, process.kill)
                limit.start()
                try:
                    with self._own(self.family, process.pid):
                        _, said = process.communicate(text)
                finally:
                    limit.cancel()
        except OSError as error:
            raise IptablesError(f"cannot run {argv[0]}: {error.strerror}") from error
        if process.returncode:
            raise runner._error(argv, process.returncode, said, text)  # noqa: SLF001 - one way to tell failures apart

    def read_chain(self, chain: ChainId) -> tuple[str, ...] | None:
        """Return the rules of one chain; None: there is no such chain.

        Raises:
            IptablesError: it cannot be read.
        """
        argv = [self.programs.save.removesuffix("-save"), "-t", chain.table, "-S", chain.chain]
        done = runner._run(argv)  # noqa: SLF001 - the same limits and errors
        if any(words in done.stderr for words in _NO_CHAIN):
            return None
        if done.returncode:
            raise runner._error(argv, done.returncode, done.stderr)  # noqa: SLF001 - as above
        # The first line declares the chain; parse_save knows the rest.
        text = [f"*{chain.table}", *done.stdout.splitlines(), "COMMIT"]
        return chains.parse_save(text)[chain.table].get(chain.chain, ())
