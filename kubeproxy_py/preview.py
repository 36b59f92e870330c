"""
Batches that have not been run → what each Service would gain and lose by them.

Pure. ``iptables.plan`` says what is written, in which order; this says what is different afterwards,
which is what people decide by.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

import msgspec

from kubeproxy_py.iptables.chains import Tables
from kubeproxy_py.iptables.plan import Batch
from kubeproxy_py.model import ServiceName

Action = Literal["create", "change", "delete"]

# Comments name the ServicePort: kube-proxy's, and so ours. Of a Service that is not there any more,
# there is nothing else to go by.
_OWNER: Final = re.compile(
    r'--comment "?(?:[^"/]* )?(?P<namespace>[a-z0-9-]+)/(?P<name>[a-z0-9.-]+)(?=[:" ]|$)'
)
_PACKETS_WAY: Final = ("KUBE-FW-", "KUBE-EXT-", "KUBE-SVC-", "KUBE-SEP-")
_ENDPOINT: Final = re.compile(r"--to-destination (\S+)")


class ChainChange(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What becomes of one chain, or of one Service's rules in a chain that Services share."""

    table: str
    chain: str
    action: Action
    removed: tuple[str, ...]
    added: tuple[str, ...]


class ServiceChange(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What becomes of one Service."""

    #: "": chains and rules that belong to no Service in particular.
    service: str
    action: Action
    #: Endpoints that new connections would, or would no longer, be sent to.
    endpoints_added: tuple[str, ...]
    endpoints_removed: tuple[str, ...]
    chains: tuple[ChainChange, ...]


class Preview(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What becomes of one IP family."""

    ip_family: str
    backend: str
    #: How many Services there should be, changed or not.
    services: int
    restores: int
    chains_written: int
    chains_deleted: int
    rules_added: int
    rules_removed: int
    changes: tuple[ServiceChange, ...]


def preview(
    live: Tables,
    batches: Sequence[Batch],
    *,
    owners: Mapping[str, ServiceName],
    ip_family: str,
    backend: str,
    services: int,
) -> Preview:
    """
    Return what *batches* would change in *live*.

    Args:
        live: what the kernel has; it is left as it is.
        batches: what would be restored.
        owners: whose the desired chains are, where they are a Service's own.
        ip_family: for the result.
        backend: for the result.
        services: how many Services there should be.
    """
    after: Tables = {table: dict(chains) for table, chains in live.items()}
    for batch in batches:
        batch.apply_to(after)
    sections = [section for batch in batches for section in batch.sections]
    touched = sorted(
        {
            (section.table, chain)
            for section in sections
            for chain in (
                *section.write,
                *section.delete,
                *(jump.builtin for jump in (*section.insert, *section.remove)),
            )
        }
    )
    by_service: dict[str, list[ChainChange]] = {}
    for table, chain in touched:
        old, new = live.get(table, {}).get(chain), after.get(table, {}).get(chain)
        if old == new:
            continue
        for service, change in _chain_changes(table, chain, old, new, owners.get(chain)):
            by_service.setdefault(service, []).append(change)
    before, afterwards = _mentioned(live), _mentioned(after)

    def action(service: str) -> Action:
        if service in before:
            return "change" if service in afterwards else "delete"
        return "create" if service else "change"

    changes = tuple(
        _service_change(service, action(service), by_service[service])
        # What belongs to nobody in particular comes last.
        for service in sorted(by_service, key=lambda name: (not name, name))
    )
    all_chains = [chain for change in changes for chain in change.chains]
    deleted = {(chain.table, chain.chain) for chain in all_chains if chain.action == "delete"}
    return Preview(
        ip_family=ip_family,
        backend=backend,
        services=services,
        restores=len(batches),
        chains_written=len({(chain.table, chain.chain) for chain in all_chains} - deleted),
        chains_deleted=len(deleted),
        rules_added=sum(len(chain.added) for chain in all_chains),
        rules_removed=sum(len(chain.removed) for chain in all_chains),
        changes=changes,
    )


def _chain_changes(
    table: str,
    chain: str,
    old: tuple[str, ...] | None,
    new: tuple[str, ...] | None,
    owner: ServiceName | None,
) -> Iterable[tuple[str, ChainChange]]:
    """Yield what becomes of a chain, and whose that is: of a shared one, each Service's part."""
    action: Action = "create" if old is None else "delete" if new is None else "change"
    removed, added = _compare(old or (), new or ())
    if owner is not None:
        parts = {str(owner): (removed, added)}
    elif action == "delete":
        # Its rules' comments agree on whose it was, or are about nobody.
        parts = {next(filter(None, map(_owner, removed)), ""): (removed, added)}
    else:
        parts = {}
        for number, texts in enumerate((removed, added)):
            for text in texts:
                parts.setdefault(_owner(text), ([], []))[number].append(text)
        parts = parts or {"": ([], [])}
    for service, (gone, come) in parts.items():
        yield (
            service,
            ChainChange(
                table=table, chain=chain, action=action, removed=tuple(gone), added=tuple(come)
            ),
        )


def _compare(old: Sequence[str], new: Sequence[str]) -> tuple[list[str], list[str]]:
    removed: list[str] = []
    added: list[str] = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag != "equal":
            removed += old[i1:i2]
            added += new[j1:j2]
    return removed, added


def _service_change(service: str, action: Action, chains: list[ChainChange]) -> ServiceChange:
    gone = {found for chain in chains for found in _endpoints(chain.removed)}
    come = {found for chain in chains for found in _endpoints(chain.added)}
    return ServiceChange(
        service=service,
        action=action,
        endpoints_added=tuple(sorted(come - gone)),
        endpoints_removed=tuple(sorted(gone - come)),
        chains=tuple(sorted(chains, key=_rank)),
    )


def _rank(change: ChainChange) -> tuple[int, str, str]:
    # As a packet passes them: what all share, the Service's, its endpoints'.
    kinds = enumerate(_PACKETS_WAY, start=1)
    rank = next((number for number, kind in kinds if change.chain.startswith(kind)), 0)
    return rank, change.table, change.chain


def _mentioned(tables: Tables) -> set[str]:
    """Return the Services that rules say they are about."""
    return {
        owner
        for chains in tables.values()
        for texts in chains.values()
        for text in texts
        if (owner := _owner(text))
    }


def _owner(text: str) -> str:
    found = _OWNER.search(text)
    return f"{found['namespace']}/{found['name']}" if found else ""


def _endpoints(texts: Iterable[str]) -> Iterable[str]:
    return (found[1] for text in texts if (found := _ENDPOINT.search(text)))
