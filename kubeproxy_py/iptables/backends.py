"""
Rules of kube-proxy's or ours in the backend that is not used, and which one the kubelet uses.

Two backends in one kernel do not see each other's rules, but every packet passes both: rules left in
the other one go on sending connections to endpoints that are long gone. This only looks, and so that
looking changes nothing: a legacy table that the kernel does not list is not asked for, because asking
would create it, with a hook that every packet passes.
"""

import subprocess
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import msgspec

from kubeproxy_py import rules
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.errors import BackendMissing, IptablesError
from kubeproxy_py.iptables import chains, nftables, runner
from kubeproxy_py.model import IPFamily

_TABLES: Final = (rules.NAT, rules.FILTER, rules.MANGLE)
# Enough of their names to tell what they are.
_NAMED_CHAINS: Final = 10


class Leftover(msgspec.Struct, frozen=True):
    """Chains of kube-proxy's or ours in one backend and family that should have none."""

    backend: runner.Backend
    family: IPFamily
    count: int
    chains: tuple[str, ...]  # the first few, as table/chain
    #: Built-in chains, as table/chain, that lead there: packets meet these rules. Empty: harmless;
    #: None: it cannot be seen.
    jumps: tuple[str, ...] | None

    @property
    def is_met(self) -> bool | None:
        """Tell whether packets pass these rules; None: nobody knows."""
        return None if self.jumps is None else bool(self.jumps)

    def __str__(self) -> str:
        what = f"{self.family.value}: {self.count} chains of kube-proxy's in {self.backend} tables"
        if self.is_met is None:
            return f"{what}, and it cannot be seen whether packets pass them"
        return f"{what}, which packets pass as well" if self.is_met else what


class Survey(msgspec.Struct, frozen=True):
    """What one look at the other backend has found."""

    leftovers: tuple[Leftover, ...] = ()
    #: Families whose kubelet keeps its hint in the other backend, and none in ours.
    moved: tuple[IPFamily, ...] = ()
    #: Families of which nothing is known: their chains could not be listed.
    unknown: tuple[IPFamily, ...] = ()
    #: What could not be looked at, and why.
    failures: tuple[str, ...] = ()


def other(backend: runner.Backend) -> runner.Backend:
    return "legacy" if backend == "nft" else "nft"


def survey(
    own: runner.Backend,
    families: Iterable[IPFamily],
    list_chains: Callable[[IPFamily, runner.Backend], set[ChainId]] | None = None,
    find_jumps: Callable[[IPFamily, runner.Backend, Iterable[str]], tuple[str, ...]] | None = None,
) -> Survey:
    """Look what there is in the backend that is not *own*. Never raises, and changes nothing.

    Args:
        own: the backend that is used.
        families: those that are programmed.
        list_chains: what to call instead of ``chain_names``.
        find_jumps: returns the built-in chains of some tables that lead to chains of ours, as
            table/chain; otherwise they are read by its programs.
    """
    list_chains, find_jumps = list_chains or chain_names, find_jumps or _jumps
    leftovers, moved, unknown, failures = [], [], [], []
    for family in families:
        looked_at = f"{family.value}, {other(own)}"
        try:
            found = list_chains(family, other(own))
            has_moved = _has_hint(found) and not _has_hint(list_chains(family, own))
        except IptablesError as error:
            unknown.append(family)
            failures.append(f"{looked_at}: {error}")
            continue
        if has_moved:
            moved.append(family)
        ours = sorted(chain for chain in found if chains.is_ours(*chain))
        if not ours:
            continue
        try:
            jumps = find_jumps(family, other(own), {chain.table for chain in ours})
        except IptablesError as error:
            jumps = None
            failures.append(f"{looked_at}: {error}")
        named = tuple(f"{table}/{chain}" for table, chain in ours[:_NAMED_CHAINS])
        leftovers.append(Leftover(other(own), family, len(ours), named, jumps))
    return Survey(tuple(leftovers), tuple(moved), tuple(unknown), tuple(failures))


def chain_names(family: IPFamily, backend: runner.Backend) -> set[ChainId]:
    """Return all chains that *backend* has in nat, filter and mangle.

    Raises:
        IptablesError: the kernel does not tell; or there are legacy tables, and no program that
            could read them.
    """
    try:
        return nftables.chain_names(family) if backend == "nft" else set(_legacy_chains(family))
    except OSError as error:
        raise IptablesError(f"cannot list chains of {backend}: {error}") from error


def has_nft_table(family: IPFamily, name: str) -> bool:
    """Tell whether *family* has an nft table of that *name*, whoever made it.

    Raises:
        IptablesError: the kernel does not tell.
    """
    try:
        return nftables.has_table(family, name)
    except OSError as error:
        raise IptablesError(f"cannot look for nft table {name}: {error}") from error


def _jumps(family: IPFamily, backend: runner.Backend, tables: Iterable[str]) -> tuple[str, ...]:
    """Return the built-in chains of *tables* that lead to chains of ours."""
    kernel = runner.Iptables(runner.find_programs(family, backend))
    builtin = {ChainId(jump.table, jump.builtin) for jump in rules.JUMPS if jump.table in tables}
    return tuple(
        f"{chain.table}/{chain.chain}"
        for chain in sorted(builtin)
        if any(
            chains.is_ours(chain.table, f" {text}".rpartition(" -j ")[2].partition(" ")[0])
            for text in kernel.read_chain(chain) or ()
        )
    )


def _has_hint(found: Iterable[ChainId]) -> bool:
    return any(chain.table == rules.MANGLE and chain.chain in runner.HINTS for chain in found)


def _legacy_chains(family: IPFamily) -> Iterator[ChainId]:
    """Yield the chains of the legacy tables there are."""
    listed = runner.list_legacy_tables(family)
    tables = [table for table in _TABLES if table in listed]
    if not tables:
        return
    try:
        programs = runner.find_programs(family, "legacy")
    except BackendMissing as error:
        raise IptablesError(
            f"legacy tables {tables} are there, and nothing to read them: {error}"
        ) from error
    for table in tables:
        # Chains come before rules, which may be 100,000: reading ends at the first of them.
        with subprocess.Popen(  # noqa: S603 - fixed argv, no shell
            [programs.save, "-t", table],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace",
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("-A "):
                    break
                if line.startswith(":"):
                    yield ChainId(table, line[1:].partition(" ")[0])
            process.kill()
