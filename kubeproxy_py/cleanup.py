"""
Removes what kube-proxy or we have written, and nothing else.

As kube-proxy's ``--cleanup``: KUBE-FIREWALL with its jumps stays (it is the kubelet's as well), and so
do sysctls, conntrack entries and nfacct counters. Both backends are looked into, because rules left
behind in the one that nobody looks at still meet every packet.
"""

import shutil
import subprocess
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from kubeproxy_py import rules
from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.errors import IptablesError
from kubeproxy_py.iptables import backends, chains, plan, runner
from kubeproxy_py.model import IPFamily

log = structlog.get_logger()

# It answers within milliseconds, or waits for something that does not come.
_NFT_LIMIT_S: Final = 60
_NFT_MODE_TABLE: Final = "kube-proxy"
_NFT_FAMILIES: Final = {IPFamily.V4: "ip", IPFamily.V6: "ip6"}


def removal(live: chains.Tables) -> plan.Batch:
    """
    Return the batch that removes all that is ours from *live*. Pure.

    A chain that a rule of others jumps to cannot be deleted; it is emptied.
    """
    sections = []
    for table in (rules.NAT, rules.FILTER, rules.MANGLE):
        there = live.get(table, {})
        # Our own jumps from built-in chains go in the same section, spelled as they read now.
        jumps = [
            rules.Jump(table, jump.builtin, text)
            for jump in rules.JUMPS
            if jump.table == table
            for text in there.get(jump.builtin, ())
            if plan.is_jump(text, jump)
        ]
        ours = {jump.rule for jump in jumps}
        others = {
            name: tuple(text for text in texts if text not in ours) for name, texts in there.items()
        }
        held = plan.held_by_others({table: others}, table)
        mine = sorted(name for name in there if chains.is_ours(table, name))
        section = plan.Section(
            table,
            remove=tuple(jump for jump in jumps if not jump.rule.endswith(f"-j {rules.FIREWALL}")),
            write={name: () for name in mine if name in held and there[name]},
            delete=tuple(name for name in mine if name not in held),
        )
        if section:
            sections.append(section)
    return plan.Batch(tuple(sections))


def clean(families: Iterable[IPFamily], backends: Iterable[runner.Backend]) -> bool:
    """Clean the tables of these *families* and *backends*; return False if something failed."""
    is_clean = True
    for backend in backends:
        for family in families:
            try:
                programs = runner.find_programs(family, backend)
            except IptablesError as error:
                is_clean = _is_nothing_there(family, backend, str(error)) and is_clean
                continue
            is_clean = _clean_one(programs) and is_clean
    for family in IPFamily:
        is_clean = remove_nft_mode_table(family) and is_clean
    return is_clean


def _is_nothing_there(family: IPFamily, backend: runner.Backend, why_not: str) -> bool:
    """Tell whether a backend without programs has nothing to remove; say so if it has."""
    try:
        is_clean = not any(
            chains.is_ours(*chain) for chain in backends.chain_names(family, backend)
        )
    except IptablesError as error:
        is_clean, why_not = False, str(error)
    if is_clean:
        log.debug("cleanup.skipped", error=why_not)
    else:
        log.error("cleanup.failed", ip_family=family.value, backend=backend, error=why_not)
    return is_clean


def _clean_one(programs: runner.Programs) -> bool:
    if programs.backend == "legacy" and not runner.has_legacy_tables(programs.family):
        return True
    iptables = runner.Iptables(programs)
    try:
        batch = removal(iptables.save())
        jumps = sum(len(section.remove) for section in batch.sections)
        if iptables.unreadable:
            iptables.remove_unreadable(_removed_from(batch, iptables.unreadable))
            batch = removal(iptables.save())
        if batch.sections:
            iptables.restore(batch)
    except IptablesError as error:
        log.error(  # noqa: TRY400 - the cause is another program; our stack says nothing
            "cleanup.failed",
            ip_family=programs.family.value,
            backend=programs.backend,
            error=str(error),
        )
        return False
    log.info(
        "cleanup.completed",
        ip_family=programs.family.value,
        backend=programs.backend,
        chains=sum(len(section.delete) for section in batch.sections),
        jumps=jumps,
    )
    return True


def _removed_from(batch: plan.Batch, unreadable: Iterable[ChainId]) -> dict[ChainId, list[str]]:
    """Return what *batch* removes from each of the *unreadable* chains."""
    return {
        chain: [
            jump.rule
            for section in batch.sections
            for jump in section.remove
            if (jump.table, jump.builtin) == chain
        ]
        for chain in unreadable
    }


def remove_nft_mode_table(
    family: IPFamily,
    has_table: Callable[[IPFamily, str], bool] = backends.has_nft_table,
) -> bool:
    """Delete *family*'s table of kube-proxy's nftables mode, which would handle Services twice.

    Returns:
        Whether there is none now; what is in the way is in the log.
    """
    table = [_NFT_FAMILIES[family], _NFT_MODE_TABLE]
    try:
        if not has_table(family, _NFT_MODE_TABLE):
            return True
        error = _nft("delete", "table", *table)
    except IptablesError as failure:
        error = str(failure)
    if error is not None:
        log.error("cleanup.nft_table_left", table=table, error=error)
        return False
    log.info("cleanup.nft_table_deleted", table=table)
    return True


def _nft(*arguments: str) -> str | None:
    """Run nft; return what went wrong, or None."""
    program = shutil.which("nft", path=runner.search_path())
    if program is None:
        return "no nft program"
    try:
        done = subprocess.run(  # noqa: S603 - fixed argv, no shell
            [program, *arguments], capture_output=True, text=True, check=False, timeout=_NFT_LIMIT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip() if done.returncode else None
