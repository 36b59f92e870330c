"""
The kernel's tables as a dict with the kernel's manners.

It takes restore inputs as ``iptables-restore --noflush`` does, refuses what that refuses, and keeps
the tables committed before the refusal. It knows rules as text only: a rule reads back as it was
written. tests/packet/test_fake_is_honest.py holds it against the real programs.
"""

import re
from collections import deque
from collections.abc import Callable
from typing import Final

from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.errors import BatchRejected, IptablesError
from kubeproxy_py.iptables.chains import BUILTIN, Chains, Tables
from kubeproxy_py.iptables.lock import LockWait
from kubeproxy_py.iptables.runner import Input
from kubeproxy_py.model import IPFamily

#: Built-in chains by table, as far as this program looks.
HOOKS: Final = {
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
}
_TARGETS: Final = frozenset({"ACCEPT", "DROP", "RETURN", "REJECT", "MARK", "DNAT", "MASQUERADE"})
_TARGET: Final = re.compile(r"(?:^| )-[jg] (\S+)")
_QUOTED: Final = re.compile(r'"(?:[^"\\]|\\.)*"')
_MAX_CHAIN_NAME: Final = 28


def empty_tables() -> Tables:
    """Return the tables of a host without any rule."""
    return {table: dict.fromkeys(hooks, ()) for table, hooks in HOOKS.items()}


def target(rule: str) -> str | None:
    """Return where *rule* jumps or goes to; what is quoted in it is no target."""
    found = _TARGET.search(_QUOTED.sub('""', rule))
    return found.group(1) if found else None


def dangling(tables: Tables) -> list[str]:
    """Return a line for each rule that jumps to a chain that is not there."""
    return [
        f"{table} {chain}: {rule}"
        for table, chains in tables.items()
        for chain, rules in chains.items()
        for rule in rules
        if (to := target(rule)) is not None and to not in _TARGETS and to not in chains
    ]


class _RefusedError(Exception):
    """A line is refused; the text says why."""


class FakeIptables:
    """The tables of one family. What ``sync.Kernel`` and ``runner.Iptables`` promise, it keeps."""

    def __init__(self, tables: Tables | None = None) -> None:
        """Begin with *tables*; with none, as a host without any rule."""
        self.tables = empty_tables()
        for table, chains in (tables or {}).items():
            self.tables[table] |= chains
        #: Every restore input, also those that failed.
        self.restored: list[str] = []
        self.saves = 0
        #: Called with every restore input before it is looked at.
        self.before_restore: Callable[[str], None] | None = None
        #: Tells which lines the kernel refuses for reasons of its own.
        self.refuses: Callable[[str], bool] = lambda line: False
        self.family = IPFamily.V4
        #: Through what spectacles a chain that is read alone is seen.
        self.misreads: Callable[[str], str] = lambda text: text
        #: What ``runner.Iptables`` tells of the xtables lock.
        self.lock_wait: LockWait | None = None
        self.lock_waited_s = 0.0
        #: What ``runner.Iptables`` tells of rules that only nft can show.
        self.unreadable: frozenset[ChainId] = frozenset()
        #: Whether a refusal names the line.
        self.names_lines = True
        self._save_failures: deque[IptablesError] = deque()
        self._restore_failures: deque[tuple[IptablesError, int]] = deque()

    def fail_save(self, error: IptablesError) -> None:
        """Let one save, the next that is not yet to fail, raise *error*."""
        self._save_failures.append(error)

    def fail_restore(self, error: IptablesError, *, after_tables: int = 0) -> None:
        """Let one restore raise *error* when it has committed *after_tables* of its tables."""
        self._restore_failures.append((error, after_tables))

    def fail_no_more(self) -> None:
        """Forget the restores that are yet to fail."""
        self._restore_failures.clear()

    def abandon_lock_wait(self) -> None:
        self.lock_wait = None

    def save(self, *, known: Tables | None = None) -> Tables:
        self.saves += 1
        if self._save_failures:
            raise self._save_failures.popleft()
        return {table: dict(chains) for table, chains in self.tables.items()}

    def has_rules(self, chain: ChainId) -> bool:
        """Tell whether there is such a chain, and any rule in it."""
        return bool(self.tables[chain.table].get(chain.chain))

    def read_chain(self, chain: ChainId) -> tuple[str, ...] | None:
        """Return the rules of one chain; None: there is no such chain."""
        texts = self.tables[chain.table].get(chain.chain)
        return None if texts is None else tuple(map(self.misreads, texts))

    def restore(self, batch: str | Input) -> None:
        """Commit *batch*, table by table. Raises BatchRejected, with the line, or a planned error."""
        text = batch if isinstance(batch, str) else "".join(batch.pieces())
        if self.before_restore is not None:
            self.before_restore(text)
        self.restored.append(text)
        failure = self._restore_failures.popleft() if self._restore_failures else None
        committed = 0
        open_table: tuple[str, Chains] | None = None
        for number, line in enumerate(text.splitlines(), start=1):
            if failure is not None and failure[1] == committed:
                raise failure[0]
            try:
                if self.refuses(line):
                    raise _RefusedError("refused")  # noqa: TRY301 - one place names the line
                if line.startswith("*"):
                    open_table = line[1:], self._open(line[1:])
                elif open_table is None:
                    raise _RefusedError("no table")  # noqa: TRY301 - one place names the line
                elif line == "COMMIT":
                    self.tables[open_table[0]] = open_table[1]
                    open_table = None
                    committed += 1
                else:
                    _execute(line, *open_table)
            except _RefusedError as error:
                lines = (number,) if self.names_lines else ()
                raise BatchRejected(f"line {number}: {error}", batch=text, lines=lines) from error
        if failure is not None:
            raise failure[0]
        if open_table is not None:
            raise BatchRejected("COMMIT expected", batch=text)

    def _open(self, table: str) -> Chains:
        if table not in self.tables:
            raise _RefusedError(f"no table {table}")
        return dict(self.tables[table])


def _execute(line: str, table: str, chains: Chains) -> None:
    """Do what one *line* of a restore input says to the *chains* of *table*."""
    if line.startswith(":"):
        _declare(line, chains)
        return
    command, _, rest = line.partition(" ")
    chain, _, rule = rest.partition(" ")
    if command not in ("-A", "-I", "-D", "-X"):
        raise _RefusedError(f"unknown command {command}")
    if chain not in chains:
        raise _RefusedError(f"no chain {chain}")
    if command == "-X":
        _delete(chain, chains)
        return
    to = target(rule)
    if to is not None and to not in _TARGETS and (to not in chains or to in BUILTIN):
        raise _RefusedError(f"no chain or target {to}")
    if table == "nat" and to in ("DROP", "REJECT"):
        raise _RefusedError(f"{to} in nat")
    if command == "-A":
        chains[chain] = (*chains[chain], rule)
    elif command == "-I":
        chains[chain] = (rule, *chains[chain])
    else:
        left = list(chains[chain])
        if rule not in left:
            raise _RefusedError(f"no such rule in {chain}")
        left.remove(rule)
        chains[chain] = tuple(left)


def _declare(line: str, chains: Chains) -> None:
    name, policy, *_ = line[1:].split(" ")
    if policy != "-" or name in BUILTIN:
        raise _RefusedError(f"this fake has no policies: {line}")
    if len(name) > _MAX_CHAIN_NAME:
        raise _RefusedError(f"chain name {name} is too long")
    chains[name] = ()


def _delete(chain: str, chains: Chains) -> None:
    if chain in BUILTIN:
        raise _RefusedError(f"{chain} is built in")
    if chains[chain]:
        raise _RefusedError(f"{chain} is not empty")
    referrers = [name for name, rules in chains.items() if chain in map(target, rules)]
    if referrers:
        raise _RefusedError(f"{chain} is referred to by {referrers[0]}")
    del chains[chain]
