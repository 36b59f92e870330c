"""
Look at this host, as far as this process may. Changes nothing.

The only part of a pre-flight that reads files, sockets and programs of the host; it decides nothing.
What cannot be seen is left out, with a sentence that says so where a person would miss it.
"""

import os
import re
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

from kubeproxy_py import host, hostnet, listeners, netlink, nfacct, sysctls
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.errors import BackendMissing, IptablesError
from kubeproxy_py.iptables import backends, events, infos, lock, runner
from kubeproxy_py.model import IPFamily
from kubeproxy_py.node_ports import Listener
from kubeproxy_py.preflight.facts import HostFacts, Leftover, Process, Program, Role, StateFile

_T = TypeVar("_T")

# Bits of CapEff (linux/capability.h).
_CAPABILITIES: Final = {"NET_ADMIN": 12, "NET_RAW": 13, "SYS_ADMIN": 21}
_SYSCTLS: Final = (
    "net/ipv4/ip_forward",
    "net/ipv6/conf/all/forwarding",
    "net/bridge/bridge-nf-call-iptables",
    "net/bridge/bridge-nf-call-ip6tables",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_local_reserved_ports",
    "net/netfilter/nf_conntrack_max",
    "net/netfilter/nf_conntrack_count",
    "net/netfilter/nf_conntrack_buckets",
)
_PROGRAM_NAMES: Final[dict[str, Role]] = {"kube-proxy": "kube-proxy", "firewalld": "firewalld"}
# What starts the daemon: the console script, or the package as a module.
_OWN_NAMES: Final = frozenset({"kubeproxy-py", "kubeproxy_py"})
# linux/netfilter/nf_tables.h and nfnetlink.h.
_NFT_GETTABLE: Final = 10 << 8 | 1
_NFTA_TABLE_NAME: Final = 1
_NFGENMSG_BYTES: Final = 4
_NFT_FAMILIES: Final = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}


class Files:
    """The host's files, each below the first of *roots* that has it."""

    def __init__(self, roots: Sequence[Path] = (Path("/"),)) -> None:
        self._roots = roots

    def path(self, name: str) -> Path:
        """Return where the file is; below the last root if it is nowhere."""
        paths = [root / name for root in self._roots]
        return next((path for path in paths if os.access(path, os.F_OK)), paths[-1])

    def read(self, name: str) -> str | None:
        """Return the text without blanks around it; None if it cannot be read."""
        try:
            return self.path(name).read_text(errors="replace").strip()
        except OSError:
            return None


class _Unseen:
    """Tries, and remembers what could not be looked at."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def attempt(self, what: str, look: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return look()
        except (OSError, IptablesError) as error:
            self.said.append(f"{what}: {error}")
            return otherwise


def collect(
    config: KubeProxyConfiguration,
    *,
    backend: str = "auto",
    state_file: str = "",
    files: Files | None = None,
) -> HostFacts:
    """Return what this host is like.

    Args:
        config: whose sysctls are looked at.
        backend: auto, nft or legacy.
        state_file: where the last good state would be kept; "": nowhere.
        files: where the host's files are.
    """
    files = files or Files()
    unseen = _Unseen()
    capabilities = _capabilities(files)
    names = [name for _, name in socket.if_nameindex()]
    programs = tuple(_programs())
    chosen, reason, failure = _backend(backend)
    is_blind = capabilities is not None and "NET_ADMIN" not in capabilities
    survey = _other_backend(chosen)
    unseen.said += (f"other backend: {text}" for text in survey.failures)
    wanted = _wanted_sysctls(config)
    values = {
        name: text
        for name in (*_SYSCTLS, *wanted)
        if (text := files.read(f"proc/sys/{name}")) is not None
    }
    listening = unseen.attempt("listeners", listeners.listening, list[Listener]())
    if is_blind:
        unseen.said.append("rules, and others' processes and sockets: no CAP_NET_ADMIN")
    addresses = unseen.attempt("addresses", _addresses, frozenset[str]())
    buckets = values.get("net/netfilter/nf_conntrack_buckets", "0")
    return HostFacts(
        release=files.read("proc/sys/kernel/osrelease") or "",
        capabilities=capabilities,
        lock_path=str(lock.lock_path()),
        lock_failure=_lock_failure(lock.lock_path()),
        state_file=_state_file(files, Path(state_file)) if state_file else None,
        has_ipv6=hostnet.has_ipv6(),
        programs=programs,
        backend=chosen,
        backend_reason=f"{reason}, as far as can be seen" if is_blind else reason,
        backend_failure=failure,
        leftovers=tuple(
            Leftover(found.backend, found.family, found.count, is_reached=found.is_met)
            for found in survey.leftovers
        ),
        kubelet_elsewhere=survey.moved,
        nft_tables=unseen.attempt("nft tables", _nft_tables, frozenset[str]()),
        unreadable=()
        if is_blind
        else unseen.attempt("rules", lambda: tuple(_unreadable(programs, chosen)), ()),
        rule_events_failure=_failure(lambda: events.connect().close()),
        lock_events_failure=_failure(lambda: infos.LockUsers(lock.lock_path()).close()),
        has_nfacct=nfacct.supported(),
        processes=tuple(_processes(files)),
        listeners=tuple(listening),
        owners={
            inode: (owner.pid, owner.name)
            for inode, owner in listeners.owners({found.inode for found in listening}).items()
        },
        sysctls=values,
        wanted_sysctls=wanted,
        read_only_sysctls=frozenset(
            name for name in values if not os.access(files.path(f"proc/sys/{name}"), os.W_OK)
        ),
        conntrack_buckets=int(buckets) if buckets.isdigit() else 0,
        conntrack_stats=_conntrack_stats(files.read("proc/self/net/stat/nf_conntrack") or ""),
        rp_filter=_rp_filter(files, names),
        interfaces=tuple(names),
        uplinks=_uplinks(files.read("proc/self/net/route") or ""),
        addresses=addresses,
        unseen=tuple(unseen.said),
    )


def _addresses() -> frozenset[str]:
    return frozenset(
        found.address for family in IPFamily for found in hostnet.local_addresses(family)
    )


def _failure(look: Callable[[], object]) -> str:
    """Return why *look* is not possible; "": it is."""
    try:
        look()
    except OSError as error:
        return str(error)
    return ""


def _capabilities(files: Files) -> frozenset[str] | None:
    for line in (files.read("proc/self/status") or "").splitlines():
        name, _, text = line.partition(":")
        if name == "CapEff":
            bits = int(text.strip(), 16)
            return frozenset(name for name, bit in _CAPABILITIES.items() if bits >> bit & 1)
    return None


def _lock_failure(path: Path) -> str:
    if os.access(path, os.F_OK):
        return "" if os.access(path, os.R_OK | os.W_OK) else "cannot be opened for writing"
    is_possible = os.access(path.parent, os.W_OK)
    return "" if is_possible else f"is not there, and {path.parent} is not writable"


def _state_file(files: Files, path: Path) -> StateFile:
    # `run` makes directories that are not there.
    directory = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    failure, is_foreign, is_open = "", False, False
    try:
        found = directory.stat()
        is_foreign = found.st_uid not in {0, os.geteuid()}
        is_open = bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
        if not stat.S_ISDIR(found.st_mode):
            failure = f"{directory} is not a directory"
        elif not os.access(directory, os.W_OK | os.X_OK):
            failure = f"{directory} is not writable"
        elif path.is_dir():
            failure = "it is a directory"
    except OSError as error:
        failure = str(error)
    return StateFile(
        path=str(path),
        directory=str(directory),
        failure=failure,
        is_foreign=is_foreign,
        is_open=is_open,
        filesystem=_filesystem(files.read("proc/self/mountinfo") or "", directory.resolve()),
    )


def _filesystem(mounts: str, directory: Path) -> str:
    """Return the type of the file system that has *directory*, from /proc/self/mountinfo (proc(5))."""
    found, deepest = "", -1
    for line in mounts.splitlines():
        fields = line.split(" ")
        # Blanks and backslashes in paths are written as octal numbers.
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4]))
        # The last of several at one place is the one that is seen.
        if directory.is_relative_to(point) and len(point.parts) >= deepest:
            found, deepest = fields[fields.index("-") + 1], len(point.parts)
    return found


def _wanted_sysctls(config: KubeProxyConfiguration) -> dict[str, int]:
    tracking = config.conntrack
    return sysctls.wanted_conntrack(
        max_per_core=tracking.max_per_core,
        min=tracking.min,
        tcp_established_timeout_s=tracking.tcp_established_timeout_s,
        tcp_close_wait_timeout_s=tracking.tcp_close_wait_timeout_s,
        tcp_be_liberal=tracking.tcp_be_liberal,
        udp_timeout_s=tracking.udp_timeout_s,
        udp_stream_timeout_s=tracking.udp_stream_timeout_s,
    )


def _programs() -> Iterator[Program]:
    for backend in runner.BACKENDS:
        for family in host.usable_families():
            try:
                found = runner.find_programs(family, backend)
            except BackendMissing:
                continue
            yield Program(backend, family, found.version)


def _unreadable(programs: Iterable[Program], backend: str) -> Iterator[str]:
    """Yield the chains with rules that the programs cannot show, which only nft's can have."""
    for program in programs:
        if program.backend == backend == "nft":
            kernel = runner.Iptables(runner.find_programs(program.family, "nft"))
            kernel.save()
            for table, chain in sorted(kernel.unreadable):
                yield f"{program.family.value} {table}/{chain}"


def _backend(wanted: str) -> tuple[str, str, str]:
    """Return the backend that `run` would use, how it is told, and why there is none."""
    try:
        if wanted == "auto":
            return (*runner.detect_backend(host.usable_families()), "")
        runner.find_programs(IPFamily.V4, host.choose_backend(wanted))
    except IptablesError as error:
        return "", "", str(error)
    return wanted, "--iptables-backend", ""


def _other_backend(own: str) -> backends.Survey:
    """Look for rules of kube-proxy's, and for the kubelet's hint, where they are not looked for."""
    for backend in runner.BACKENDS:
        if backend == own:
            return backends.survey(backend, host.usable_families())
    return backends.Survey()


def _nft_tables() -> frozenset[str]:
    """Return the names of all nft tables, with their family. Raises OSError."""
    raw = netlink.connect(netlink.NETLINK_NETFILTER)
    names = set()
    with netlink.NetlinkSocket(raw, "nft tables") as sock:
        # A struct nfgenmsg for all families.
        for _, _, payload in sock.dump(_NFT_GETTABLE, bytes(_NFGENMSG_BYTES)):
            values = dict(netlink.attributes(payload[_NFGENMSG_BYTES:]))
            name = bytes(values.get(_NFTA_TABLE_NAME, b"")).rstrip(b"\0").decode(errors="replace")
            names.add(f"{_NFT_FAMILIES.get(payload[0], payload[0])} {name}")
    return frozenset(names)


def _processes(files: Files) -> Iterator[Process]:
    """Yield proxies and firewalls of this network namespace, as far as they can be seen."""
    own = _namespace(Path("/proc/self"))
    # Of another network namespace it is none of ours, and without rights that cannot be told.
    for directory in sorted(files.path("proc").glob("[0-9]*")):
        role = _role(directory)
        if role is not None and _namespace(directory) == own and int(directory.name) != os.getpid():
            yield Process(role, int(directory.name))


def _role(directory: Path) -> Role | None:
    try:
        name = (directory / "comm").read_text(errors="replace").strip()
        words = (directory / "cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return None  # it has ended
    if name in _PROGRAM_NAMES:
        return _PROGRAM_NAMES[name]
    # An interpreter and its options may stand in front.
    for index, word in enumerate(words[:4]):
        if Path(word).name in _OWN_NAMES:
            return "kubeproxy-py" if words[index + 1 : index + 2] == ["run"] else None
    return None


def _namespace(directory: Path) -> str:
    try:
        return str((directory / "ns/net").readlink())
    except OSError:
        return ""


def _conntrack_stats(text: str) -> dict[str, int]:
    """Parse /proc/net/stat/nf_conntrack: a line of names, and one of hexadecimal numbers a CPU."""
    head, *lines = text.splitlines() or [""]
    rows = [[int(number, 16) for number in line.split()] for line in lines]
    return {
        name: sum(row[index] for row in rows if index < len(row))
        for index, name in enumerate(head.split())
    }


def _rp_filter(files: Files, names: Iterable[str]) -> dict[str, int]:
    everywhere = _value(files, "all")
    # The kernel takes the greater of the two.
    return {name: max(everywhere, _value(files, name)) for name in names}


def _value(files: Files, interface: str) -> int:
    text = files.read(f"proc/sys/net/ipv4/conf/{interface}/rp_filter") or ""
    return int(text) if text.isdigit() else 0


def _uplinks(text: str) -> frozenset[str]:
    """Return the interfaces with a default route, from /proc/net/route."""
    rows = [line.split() for line in text.splitlines()[1:]]
    return frozenset(row[0] for row in rows if len(row) > 7 and row[1] == row[7] == "00000000")
