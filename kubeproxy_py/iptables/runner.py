"""
Runs iptables-save and iptables-restore of one family and backend, and says what their failures mean.

No shell; binaries are found once, by absolute path. It must not decide what is written: it is given
text and gives text. Whoever gets an IptablesError from ``restore`` has to assume nothing about the
kernel's state and read it again.
"""

import contextlib
import fcntl
import functools
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextlib import nullcontext as _nothing
from pathlib import Path
from typing import IO, Final, Literal, NamedTuple, Protocol, TypeVar

import structlog

from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.errors import BackendMissing, BatchRejected, IptablesError, LockTimeout
from kubeproxy_py.iptables import chains, libiptc, nftables
from kubeproxy_py.iptables.lock import LockWait, LockWatch
from kubeproxy_py.model import IPFamily

log = structlog.get_logger()

_T = TypeVar("_T")

Backend = Literal["nft", "legacy"]
BACKENDS: Final[tuple[Backend, ...]] = ("nft", "legacy")

#: The kubelet leaves these in `mangle` of the backend that it (and so the host) uses.
HINTS: Final = frozenset({"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"})
# As kube-proxy waits; other programs' locks are held for milliseconds, or by something broken.
_LOCK_WAIT_S: Final = 5
# A restore of 100,000 rules takes seconds; one that takes minutes hangs, and would hang for ever.
_PROCESS_LIMIT_S: Final = 300
# Waking a program that waits for more costs more than its reading, above all in virtual machines. This
# is as big as a pipe may become without privileges.
_PIPE_BYTES: Final = 1 << 20
# Complaints that have nothing to do with what was to be written. The lock file's is not about a held
# lock: it cannot be opened, in a read-only root say, and will not be in a moment either.
_HOPELESS: Final = ("Permission denied", "you must be root", "can't open lock file")
# nft says "line 4: RULE_APPEND failed" when the kernel refuses a rule and "Error occurred at line: 4"
# when the parser does; legacy says "line 4 failed".
_LINE: Final = re.compile(r"\bline:? (\d+)")
_VERSION: Final = re.compile(r"v(\d+(?:\.\d+)+)")
# MASQUERADE --random-fully is understood from here on.
_RANDOM_FULLY_SINCE: Final = (1, 6, 2)

# A rule that iptables-nft began to show and could not: whatever follows it is not shown either.
_UNSHOWN: Final = "Parsing nftables rule failed"
# At what else it ends: a chain with rules of another kind, and one that does not exist. Up to 1.8.10,
# "incompatible" is its word for both.
_NOT_LISTED: Final = ("is incompatible", "No chain/target/match", "does not exist", _UNSHOWN)
# 50,000 chains, so many at a time, are listed in 2.3 s; 20,000 at once take 2 s already.
_LISTED_AT_ONCE: Final = 2000
# Of more, iptables (1.8.9) refuses to speak; nft allows names of 128.
_MAX_CHAIN_NAME: Final = 28

_PREFIX: Final = {IPFamily.V4: "iptables", IPFamily.V6: "ip6tables"}


class Input(Protocol):
    """A restore input that is too big to be made as one text."""

    def pieces(self) -> Iterator[str]:
        """Yield whole lines; the same each time."""


class Programs(NamedTuple):
    """The programs of one family and backend, by absolute path."""

    family: IPFamily
    backend: Backend
    save: str
    restore: str
    version: tuple[int, ...]

    @property
    def has_random_fully(self) -> bool:
        return self.version >= _RANDOM_FULLY_SINCE


def find_programs(family: IPFamily, backend: Backend) -> Programs:
    """Find the programs; raises BackendMissing if they are not there or do not run."""
    prefix = _PREFIX[family]
    for names in ((f"{prefix}-{backend}", ""), (prefix, backend)):
        program = shutil.which(names[0], path=search_path())
        save = shutil.which(f"{names[0]}-save", path=search_path())
        restore = shutil.which(f"{names[0]}-restore", path=search_path())
        if not (program and save and restore):
            continue
        try:
            said = _run([program, "--version"]).stdout
        except IptablesError as error:
            log.info("iptables.program_unusable", program=program, error=str(error))
            continue
        found = _VERSION.search(said)
        # Plain `iptables` is one of the two; before 1.8 there was only legacy, and it did not say.
        is_nft = "nf_tables" in said
        if found and (not names[1] or is_nft == (backend == "nft")):
            version = tuple(map(int, found.group(1).split(".")))
            return Programs(family, backend, save, restore, version)
    raise BackendMissing(f"cannot find a working {prefix} for backend {backend}")


class Detection(NamedTuple):
    """Which backend this host uses, and how that was told."""

    backend: Backend
    reason: str


def detect_backend(
    families: Iterable[IPFamily], legacy_tables: Mapping[IPFamily, Path] = libiptc.TABLE_LISTS
) -> Detection:
    """Find out which backend this host uses, as iptables-wrappers does.

    The kubelet's hint chains decide; without them, the backend with more rules; nft if equal.
    Writing into the other one would split the host's rules in two halves that do not see each other.
    Raises BackendMissing if neither backend has working programs.
    """
    hints: dict[Backend, bool] = {}
    counts: dict[Backend, int] = {}
    for backend in BACKENDS:
        for family in families:
            try:
                programs = find_programs(family, backend)
            except BackendMissing:
                continue
            has_hint, count = _survey(programs, legacy_tables[family])
            hints[backend] = hints.get(backend, False) or has_hint
            counts[backend] = counts.get(backend, 0) + count
    if not counts:
        raise BackendMissing(
            "cannot find working iptables programs of either backend, nft or legacy"
        )
    hinted = [backend for backend in BACKENDS if hints.get(backend)]
    chosen = hinted[0] if hinted else max(counts, key=lambda backend: counts[backend])
    reason = "kubelet's hint chains" if hinted else "number of rules"
    log.info("iptables.backend_detected", backend=chosen, reason=reason, rules=counts)
    return Detection(chosen, reason)


def has_legacy_tables(family: IPFamily) -> bool:
    """Tell whether the kernel has legacy tables of *family* in this network namespace.

    Looking into a legacy table creates it, and with it a hook that every packet passes: a table that
    the kernel does not list has no rules, and should stay that way.
    """
    return bool(list_legacy_tables(family))


def list_legacy_tables(family: IPFamily) -> list[str]:
    """Return the legacy tables that the kernel has; see ``has_legacy_tables``."""
    return _legacy_tables(libiptc.TABLE_LISTS[family])


def _legacy_tables(names: Path) -> list[str]:
    try:
        return names.read_text().split()
    except OSError:
        return []


def _survey(programs: Programs, legacy_tables: Path) -> tuple[bool, int]:
    """Return whether the kubelet's hints are there, and the number of rules."""
    if programs.backend == "legacy":
        names = _legacy_tables(legacy_tables)
        if not names:
            return False, 0
        if "mangle" in names and libiptc.has_any_chain(programs.family, "mangle", HINTS):
            return True, 0
    try:
        tables = Iptables(programs).save()
    except IptablesError as error:
        log.warning("iptables.survey_failed", backend=programs.backend, error=str(error))
        return False, 0
    has_hint = not HINTS.isdisjoint(tables.get("mangle", {}))
    return has_hint, sum(len(rules) for table in tables.values() for rules in table.values())


class _RuleUnshownError(IptablesError):
    """A rule that is none of iptables' ended the program."""


class Iptables:
    """The kernel's tables of one family, through one backend's programs."""

    def __init__(
        self,
        programs: Programs,
        *,
        own: Callable[[IPFamily, int], AbstractContextManager[None]] | None = None,
        lock: LockWatch | None = None,
        lock_wait_s: int = _LOCK_WAIT_S,
        process_limit_s: float = _PROCESS_LIMIT_S,
    ) -> None:
        """
        Use these *programs*.

        Args:
            programs: what ``find_programs`` found.
            own: entered with each process that writes, before it is given anything to write. A
                watcher that did not know would take each of our own restores for somebody else's
                change, and have it looked at and, for all it knows, repaired.
            lock: is told of waits for the xtables lock; None where the backend has none.
            lock_wait_s: how long a restore waits for it.
            process_limit_s: when a program is ended that does not end by itself.
        """
        self.programs = programs
        self._own = own
        self._lock = lock
        self.family = programs.family
        self.backend = programs.backend
        self._lock_wait_s = lock_wait_s
        self._process_limit_s = process_limit_s
        #: Chains in which, when they were last read, there were rules that only `nft` can show. Of
        #: such a rule ``nftables`` tells where it leads. Replaced as a whole. From any thread.
        self.unreadable: frozenset[ChainId] = frozenset()

    @property
    def lock_wait(self) -> LockWait | None:
        """Return the wait for the xtables lock that is not over, if there is one. From any thread."""
        return self._lock.wait if self._lock else None

    @property
    def lock_waited_s(self) -> float:
        """Return how long restores have waited for the lock so far, all together."""
        return self._lock.waited_s if self._lock else 0.0

    def abandon_lock_wait(self) -> None:
        """Say that a restore which gave up waiting for the lock is not tried again."""
        if self._lock is not None:
            self._lock.abandon()

    def check(self) -> None:
        """Raise IptablesError unless nat, without which there are no Services, can be read."""
        argv = [self.programs.save, "-t", "nat"]
        done = _run(argv)
        if done.returncode and _UNSHOWN not in done.stderr:
            raise _error(argv, done.returncode, done.stderr)

    def save(
        self,
        policies: dict[tuple[str, str], str] | None = None,
        *,
        known: chains.Tables | None = None,
    ) -> chains.Tables:
        """Read all tables there are; see ``chains.parse_save`` for the arguments.

        nft shows a table as a whole or, if one rule in it is none of iptables', not at all. Such a
        table is read chain by chain.

        Raises:
            IptablesError: that is not possible.
        """
        found: chains.Tables = {}
        unshown: set[str] = set()
        try:
            self._read(
                [self.programs.save],
                lambda lines: found.update(chains.parse_save(lines, policies, known, unshown)),
            )
        except _RuleUnshownError:
            # Neither the rest of this table is shown, nor are those after it.
            unshown |= {*chains.TABLES} - found.keys()
        self.unreadable = frozenset()
        if unshown:
            names = self._ask_kernel(lambda: nftables.chain_names(self.family))
            for table in unshown & {name.table for name in names}:
                listed = sorted(name.chain for name in names if name.table == table)
                found[table] = self._list_chains(table, listed, policies, known)
        return found

    def has_rules(self, chain: ChainId) -> bool:
        """Tell whether there is such a chain, and any rule in it; however many others there are.

        Raises:
            IptablesError: it cannot be read.
        """
        if self.backend == "nft":
            return bool(self.read_chain(chain))
        if chain.table not in list_legacy_tables(self.family):
            return False
        beginning = f"-A {chain.chain} "
        # To the end: a program whose output nobody reads any more fails.
        return self._read(
            [self.programs.save, "-t", chain.table],
            lambda lines: sum(line.startswith(beginning) for line in lines) > 0,
        )

    def _read(self, argv: list[str], parse: Callable[[Iterable[str]], _T]) -> _T:
        """Return what *parse* makes of the lines that a program prints, as they come.

        The text of a big node is tens of megabytes, and not needed whole.
        """
        try:
            with subprocess.Popen(  # noqa: S603 - fixed argv, no shell
                argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
            ) as process:
                assert process.stdout is not None
                assert process.stderr is not None
                limit = threading.Timer(self._process_limit_s, process.kill)
                limit.start()
                try:
                    found = parse(process.stdout)
                    said = process.stderr.read()
                finally:
                    limit.cancel()
        except OSError as error:
            raise IptablesError(f"cannot run {argv[0]}: {error.strerror}") from error
        if process.returncode:
            raise _error(argv, process.returncode, said)
        return found

    def _list_chains(
        self,
        table: str,
        names: Sequence[str],
        policies: dict[tuple[str, str], str] | None = None,
        known: chains.Tables | None = None,
    ) -> chains.Chains:
        """Return those of these chains of nft that exist, each read by itself.

        A chain that iptables cannot show is read as the kernel tells it, and noted as unreadable.
        """
        found: chains.Chains = {}
        opaque: set[ChainId] = set()
        left = [name for name in names if len(name) <= _MAX_CHAIN_NAME]
        unlisted = [name for name in names if len(name) > _MAX_CHAIN_NAME]
        while left:
            shown, rest = self._list_some(table, left, policies, known)
            found |= shown
            unlisted += left[len(shown) : len(left) - len(rest)]
            left = rest
        for name in unlisted:
            chain = ChainId(table, name)
            told = self._ask_kernel(functools.partial(nftables.read_chain, self.family, chain))
            if told is not None:
                found[name] = told.rules
                opaque.add(chain)
                if policies is not None and told.policy:
                    policies[table, name] = told.policy
        self.unreadable = (
            self.unreadable.difference(ChainId(table, name) for name in names) | opaque
        )
        return found

    def _list_some(
        self,
        table: str,
        names: list[str],
        policies: dict[tuple[str, str], str] | None,
        known: chains.Tables | None,
    ) -> tuple[chains.Chains, list[str]]:
        """Return the first of these chains, and the names after the first one that is not shown."""
        some = names[:_LISTED_AT_ONCE]
        if len(names) == 1:
            command = self.programs.save.removesuffix("-save")
            argv, asked = [command, "-t", table, "-S", *names], ""
        else:
            # That takes 2 ms a chain, and a process that takes many commands little more for
            # thousands. Nothing is committed.
            argv = [self.programs.restore, "--noflush"]
            asked = "".join([f"*{table}\n", *(f"-S {name}\n" for name in some), "COMMIT\n"])
        done = _run(argv, asked)
        if done.returncode and not any(words in done.stderr for words in _NOT_LISTED):
            raise _error(argv, done.returncode, done.stderr)
        lines = done.stdout.splitlines()
        count = sum(line.startswith(("-N ", "-P ")) for line in lines)
        if done.returncode and _UNSHOWN in done.stderr:
            # Some of its rules are shown, and not that there are more.
            count = max(0, count - 1)
        elif not done.returncode and count < len(some):
            raise IptablesError(f"cannot read chains of {table}: {argv[0]} does not list them")
        shown = {*some[:count]}
        saved = [f"*{table}", *map(_as_saved, lines), "COMMIT"]
        read = chains.parse_save(saved, policies, known)[table]
        return (
            {name: texts for name, texts in read.items() if name in shown},
            names[count + 1 :] if count < len(some) else names[count:],
        )

    def remove_unreadable(self, rules: Mapping[ChainId, Collection[str]]) -> None:
        """Remove rules, as they were read, from unreadable chains, where a restore's `-D` may fail.

        Raises:
            IptablesError: that is not possible.
        """
        for chain, texts in rules.items():
            remove = functools.partial(nftables.remove_rules, self.family, chain, texts)
            self._ask_kernel(remove)

    def _ask_kernel(self, look: Callable[[], _T]) -> _T:
        try:
            return look()
        except OSError as error:
            raise IptablesError(f"cannot read chains of nft: {error}") from error

    def restore(self, batch: str | Input, *, test: bool = False) -> None:
        """Commit a restore input, leaving alone what it does not name.

        The program reads the first pieces while the next are made: on legacy, all rules of a big node
        are one input, and the two take turns on different processors.

        Args:
            batch: the input.
            test: parse and build it, but commit nothing.

        Raises:
            LockTimeout: somebody holds the xtables lock. Legacy takes it for each table anew: only of
                an input of one table is it certain that nothing was changed.
            BatchRejected: a rule was refused; tables before it in the input may be changed.
            IptablesError: anything else.
        """
        argv = [self.programs.restore, "-w", str(self._lock_wait_s), "--noflush"]
        if test:
            argv.append("--test")
        try:
            # What it says goes to a file, because nobody reads it while it is given its input.
            with (
                os.fdopen(os.memfd_create("said"), "w+", errors="replace") as stderr,
                subprocess.Popen(  # noqa: S603 - fixed argv, no shell
                    argv,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    text=True,
                    errors="replace",
                    bufsize=_PIPE_BYTES,
                ) as process,
            ):
                limit = threading.Timer(self._process_limit_s, process.kill)
                limit.start()
                try:
                    with (
                        self._own(self.family, process.pid) if self._own else _nothing(),
                        self._lock.following(process.pid) if self._lock else _nothing(),
                    ):
                        assert process.stdin is not None
                        _feed(process.stdin, batch)
                        process.wait()
                finally:
                    limit.cancel()
                stderr.seek(0)
                said = stderr.read()
        except OSError as error:
            raise IptablesError(f"cannot run {argv[0]}: {error.strerror}") from error
        failure = _error(argv, process.returncode, said, batch) if process.returncode else None
        if self._lock is not None:
            self._lock.finish(has_lock=not isinstance(failure, LockTimeout))
            if isinstance(failure, LockTimeout):
                failure = LockTimeout(f"{failure}; held by {self._lock.wait}")
        if failure is not None:
            raise failure

    def read_chain(self, chain: ChainId) -> tuple[str, ...] | None:
        """Return the rules of one chain; None: there is no such chain.

        On nft this takes 2 ms whatever else there is; see ``unreadable`` for what is told of rules that
        iptables cannot show. On legacy the whole table is read for it, by the program that takes no
        lock: whoever watches who takes it need not know of this.

        Raises:
            IptablesError: it cannot be read.
        """
        table = chain.table
        if self.backend == "legacy":
            beginnings = (f":{chain.chain} ", f"-A {chain.chain} ")
            lines = self._read(
                [self.programs.save, "-t", table],
                lambda lines: [line for line in lines if line.startswith(beginnings)],
            )
            return chains.parse_save([f"*{table}", *lines, "COMMIT"])[table].get(chain.chain)
        return self._list_chains(table, [chain.chain]).get(chain.chain)


def search_path() -> str:
    """Return where programs are looked for."""
    # Daemons are often started with a PATH that lacks sbin.
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/bin", "/bin"])


def _run(argv: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # noqa: S603 - fixed argv, no shell
            argv,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROCESS_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise IptablesError(
            f"cannot wait longer than {_PROCESS_LIMIT_S} s for {argv[0]}"
        ) from error
    except OSError as error:
        raise IptablesError(f"cannot run {argv[0]}: {error.strerror}") from error


def _feed(stdin: IO[str], batch: str | Input) -> None:
    """Give a program all of *batch*, or as much as it takes before it ends."""
    # Refused to a user whose pipes hold a lot already; it is slower then, and no worse.
    with contextlib.suppress(PermissionError):
        fcntl.fcntl(stdin, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    with contextlib.suppress(BrokenPipeError), stdin:
        stdin.writelines(_pieces(batch))


def _as_saved(line: str) -> str:
    """Return what ``-S`` prints as ``iptables-save`` would have it."""
    if not line.startswith(("-N ", "-P ")):
        return line
    chain, _, policy = line[3:].partition(" ")
    return f":{chain} {policy or '-'}"


def _pieces(batch: str | Input) -> Iterable[str]:
    return (batch,) if isinstance(batch, str) else batch.pieces()


def _error(argv: list[str], status: int, said: str, batch: str | Input = "") -> IptablesError:
    reason = " ".join(said.split()) or f"exit status {status}"
    if "holding the xtables lock" in said:
        return LockTimeout(f"cannot get the xtables lock: {reason}")
    if any(text in said for text in _HOPELESS):
        return IptablesError(f"cannot use {argv[0]}: {reason}")
    if not batch and _UNSHOWN in said:
        return _RuleUnshownError(f"cannot run {argv[0]}: {reason}")
    # Whom a signal ended (a limit of time or memory) has not refused anything.
    if batch and status > 0:
        # iptables-nft-restore names every line that the kernel refused.
        lines = dict.fromkeys(int(number) for number in _LINE.findall(said))
        return BatchRejected(reason, batch="".join(_pieces(batch)), lines=tuple(lines))
    return IptablesError(f"cannot run {argv[0]}: {reason}")
