"""
What ``kubeproxy-py status`` is told: one document.

It is an interface (docs/status.schema.json): fields are added, never renamed or removed, and those
added get a default, so that the command understands a daemon of another version. Pure.
"""

from datetime import datetime
from typing import Annotated, Final, Literal

import msgspec

#: Raised when a reader of the document would be misled by the old meaning.
SCHEMA: Final = 1

State = Literal["ready", "degraded", "not ready"]
#: With its zone, which is UTC.
Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class SyncStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One sync that succeeded."""

    at: Moment
    seconds: float
    kind: Literal["full", "partial"]
    restores: int
    chains_written: int
    chains_deleted: int
    rules_written: dict[str, int]


class QuarantinedService(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A Service whose rules iptables or the kernel refused, and which keeps those it had."""

    service: str
    reason: str
    since: Moment
    retry_at: Moment
    attempts: int


class DriftRepair(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Chains that others had changed, and that were put right."""

    at: Moment
    table: str
    kind: str
    count: int
    chains: tuple[str, ...]
    processes: tuple[str, ...]


class ContestedChains(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Chains that others change again and again, and how long they are left between repairs."""

    chains: tuple[str, ...]
    processes: tuple[str, ...]
    wait_seconds: float


class FailureStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An iptables call that failed, with the input around the lines that it complained about."""

    ip_family: str
    at: Moment
    message: str
    table: str = ""
    refused: tuple[int, ...] = ()
    first_line: int = 1
    total_lines: int = 0
    lines: tuple[str, ...] = ()


class ConntrackStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The last clean-up of UDP connection tracking entries."""

    at: Moment
    deleted: int = 0
    failed: int = 0
    error: str = ""


class LockStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The xtables lock, which legacy programs share: how long we waited for it, and for whom now."""

    waited_seconds: float
    waiting_seconds: float | None = None
    holders: tuple[str, ...] = ()


class AuditStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Services whose rules were compared with a build from nothing; any that differed is a bug."""

    services_compared: int
    services_differed: int


class FamilyStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One IP family."""

    ip_family: str
    program: str = ""
    program_version: str = ""
    services: int = 0
    endpoints: int = 0
    rules: dict[str, int] = {}
    trees: tuple[str, ...] = ()
    last_sync: SyncStatus | None = None
    last_write: SyncStatus | None = None
    last_full_sync: SyncStatus | None = None
    pending_seconds: float | None = None
    error: str | None = None
    quarantined: tuple[QuarantinedService, ...] = ()
    repairs: tuple[DriftRepair, ...] = ()
    contested: tuple[ContestedChains, ...] = ()
    conntrack: ConntrackStatus | None = None
    last_failure: FailureStatus | None = None
    missing_capabilities: tuple[str, ...] = ()
    lock: LockStatus | None = None
    #: The rules come from the state file.
    is_restored: bool = False
    audit: AuditStatus | None = None


class StateFileFailure(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What the state file could not be used for, and why."""

    at: Moment
    operation: Literal["prepare", "load", "save"]
    reason: str


class StateFileStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The file with the last good state, for a start without API server."""

    path: str
    #: Rules of some family come from it.
    is_in_use: bool = False
    #: When the state in it was current; None: not known yet, or not for us.
    saved_at: Moment | None = None
    size_bytes: int = 0
    last_failure: StateFileFailure | None = None
    #: It has not been written since.
    is_failing: bool = False


class WatchStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The watch of one kind of object."""

    kind: str
    objects: int
    resource_version: str
    last_event_at: Moment | None
    is_stale: bool
    silent_seconds: float | None = None
    failing_seconds: float | None = None
    error: str = ""


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """This node, as the cluster has it."""

    name: str
    is_known: bool = False
    is_eligible: bool = False
    ips: tuple[str, ...] = ()
    zone: str = ""


class Status(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """How this node's proxy is."""

    schema: int = SCHEMA
    now: Moment
    state: State
    #: Why it is not ready, then what else is wrong.
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    phase: str = ""
    node: NodeStatus
    version: str
    pid: int
    started_at: Moment
    source: str
    backend: str = ""
    dispatch: str = ""
    families: tuple[FamilyStatus, ...] = ()
    watches: tuple[WatchStatus, ...] = ()
    #: External addresses that get no rules, and why.
    refused_addresses: tuple[str, ...] = ()
    #: Node ports and addresses that are served, though they take what is somebody else's.
    doubts: tuple[str, ...] = ()
    #: None: none is kept.
    state_file: StateFileStatus | None = None
