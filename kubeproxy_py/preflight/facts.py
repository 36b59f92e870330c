"""
What a pre-flight knows of this host, the API server and the cluster, as immutable values.

Pure: collected elsewhere, judged elsewhere. None, an empty text or a missing key means that it could
not be seen, or is not there; ``unseen`` has the reasons where they matter.
"""

from collections.abc import Mapping
from typing import Literal

import msgspec

from kubeproxy_py.external import ApiAddress, Refusal
from kubeproxy_py.model import IPFamily, Node, Problem, ServiceName, ServiceState
from kubeproxy_py.node_ports import Listener

Role = Literal["kube-proxy", "kubeproxy-py", "firewalld"]


class Program(msgspec.Struct, frozen=True):
    """The iptables programs of one backend and family."""

    backend: str
    family: IPFamily
    version: tuple[int, ...]


class Leftover(msgspec.Struct, frozen=True):
    """Chains of kube-proxy's in the backend that is not used."""

    backend: str
    family: IPFamily
    chains: int
    is_reached: bool | None = True  # packets pass them; None: it cannot be seen


class Process(msgspec.Struct, frozen=True):
    """A process of this network namespace that matters to a proxy."""

    role: Role
    pid: int


class StateFile(msgspec.Struct, frozen=True, kw_only=True):
    """The file of --state-file, and the directory it is in or the one in which that is to be made."""

    path: str
    directory: str
    #: Why no file can be put there; "": it can.
    failure: str = ""
    #: Of what is there: it is neither root's nor this user's; others may write into it.
    is_foreign: bool = False
    is_open: bool = False
    #: The file system's type; "": unknown.
    filesystem: str = ""


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """This host, as this process may see it."""

    release: str = ""
    #: Effective, without CAP_; None: unknown.
    capabilities: frozenset[str] | None = None
    lock_path: str = ""
    #: Why the lock file cannot be used; "": it can.
    lock_failure: str = ""
    #: None: no state is kept.
    state_file: StateFile | None = None
    has_ipv6: bool = True
    programs: tuple[Program, ...] = ()
    #: nft or legacy; "": none works, and why.
    backend: str = ""
    backend_reason: str = ""
    backend_failure: str = ""
    leftovers: tuple[Leftover, ...] = ()
    #: Families whose kubelet uses the other backend.
    kubelet_elsewhere: tuple[IPFamily, ...] = ()
    #: Names of nft tables with their family, e.g. "inet firewalld".
    nft_tables: frozenset[str] = frozenset()
    #: Chains of iptables' tables with rules that only `nft` can show, as FAMILY table/chain.
    unreadable: tuple[str, ...] = ()
    #: Why the kernel does not tell of changes; "": it does.
    rule_events_failure: str = ""
    lock_events_failure: str = ""
    has_nfacct: bool = True
    processes: tuple[Process, ...] = ()
    listeners: tuple[Listener, ...] = ()
    #: Process names by inode of their socket, and their pids.
    owners: Mapping[int, tuple[int, str]] = {}
    #: By path below /proc/sys, as text.
    sysctls: Mapping[str, str] = {}
    #: What `run` sees to at its start, by path below /proc/sys.
    wanted_sysctls: Mapping[str, int] = {}
    #: Those of ``sysctls`` that this process cannot write.
    read_only_sysctls: frozenset[str] = frozenset()
    #: nf_conntrack's hash buckets; 0: unknown.
    conntrack_buckets: int = 0
    #: Sums over all CPUs since boot, by the kernel's names.
    conntrack_stats: Mapping[str, int] = {}
    #: Interface -> its effective rp_filter.
    rp_filter: Mapping[str, int] = {}
    interfaces: tuple[str, ...] = ()
    #: Interfaces with a default route.
    uplinks: frozenset[str] = frozenset()
    addresses: frozenset[str] = frozenset()
    #: What could not be looked at, as sentences.
    unseen: tuple[str, ...] = ()


class ApiFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The API server, as the credentials at hand see it."""

    server: str = ""
    #: The host of ``server``, resolved if it is a name.
    addresses: tuple[ApiAddress, ...] = ()
    is_in_cluster: bool = False
    #: Why there are no usable credentials; "": there are.
    config_failure: str = ""
    #: Why it did not answer; "": it did.
    failure: str = ""
    version: str = ""
    #: Its clock less ours; None: it did not say.
    clock_ahead_s: float | None = None
    #: "list services" and so on -> whether it is allowed.
    permissions: Mapping[str, bool] = {}
    #: Why permissions could not be asked for.
    permissions_failure: str = ""
    #: Why objects could not be read though all that is needed is allowed.
    listing_failure: str = ""


class ClusterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What objects say, from the API server or from files."""

    node_name: str
    node: Node | None
    services: Mapping[IPFamily, Mapping[ServiceName, ServiceState]]
    refusals: tuple[Refusal, ...] = ()
    problems: tuple[Problem, ...] = ()
    are_files: bool = False
