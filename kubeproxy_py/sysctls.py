"""
Kernel parameters of this host that kube-proxy sets, read and written as files.

A value that is right already is not written, so that no permission is needed for it. Nothing else
is ever set, and nothing is set back at the end: the rules outlive the process too.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from kubeproxy_py import errors

log = structlog.get_logger()

_HOST: Final = Path("/")
_PROC_SYS: Final = Path("proc/sys")
_NETFILTER: Final = "net/netfilter"
#: Below /proc/sys, as all names that others may ask for.
CONNTRACK_MAX: Final = f"{_NETFILTER}/nf_conntrack_max"
_TCP_BE_LIBERAL: Final = _PROC_SYS / _NETFILTER / "nf_conntrack_tcp_be_liberal"
_ACCOUNTING: Final = _PROC_SYS / _NETFILTER / "nf_conntrack_acct"
_EVENTS: Final = _PROC_SYS / _NETFILTER / "nf_conntrack_events"
_HASHSIZE: Final = Path("sys/module/nf_conntrack/parameters/hashsize")
_ROUTE_LOCALNET: Final = Path("proc/sys/net/ipv4/conf/all/route_localnet")
_ONLINE_CPUS: Final = Path("sys/devices/system/cpu/online")
_OOM_SCORE_ADJ: Final = Path("proc/self/oom_score_adj")

# kube-proxy's upper bound for maxPerCore times CPUs: more would cost kernel memory (320 bytes each)
# on hosts with many CPUs without being asked for. ``min`` may go beyond it.
_CONNTRACK_MAX_LIMIT: Final = 1024 * 1024
# Entries for each bucket of the hash table, as the kernel's own default has it.
_ENTRIES_PER_BUCKET: Final = 4

# As kube-proxy: the file may be busy for a moment while the process is being set up.
_OOM_TRIES: Final = 2
_OOM_PAUSE_S: Final = 0.1


def apply_conntrack(
    *,
    max_per_core: int,
    min: int,  # noqa: A002 - the configuration's own word
    tcp_established_timeout_s: float,
    tcp_close_wait_timeout_s: float,
    tcp_be_liberal: bool,
    udp_timeout_s: float,
    udp_stream_timeout_s: float,
    root: Path = _HOST,
) -> None:
    """Set the connection tracking parameters that are greater than 0, or true, in this order.

    Time-outs are cut to whole seconds.

    Raises:
        KubeProxyError: one of them cannot be read or written. kube-proxy ends then, too.
    """
    try:
        wanted = wanted_conntrack(
            max_per_core=max_per_core,
            min=min,
            tcp_established_timeout_s=tcp_established_timeout_s,
            tcp_close_wait_timeout_s=tcp_close_wait_timeout_s,
            tcp_be_liberal=tcp_be_liberal,
            udp_timeout_s=udp_timeout_s,
            udp_stream_timeout_s=udp_stream_timeout_s,
            root=root,
        )
        for name, value in wanted.items():
            _ensure(root, _PROC_SYS / name, value)
            buckets = value // _ENTRIES_PER_BUCKET
            if name == CONNTRACK_MAX and int(_read(root / _HASHSIZE)) < buckets:
                _ensure(root, _HASHSIZE, buckets)
    except (OSError, ValueError) as error:
        raise errors.KubeProxyError(
            "could not set conntrack parameters from kube-proxy configuration: "
            f"{_reason(error)} (--init-only sets them for a process with fewer rights; those whose "
            "--conntrack flag is 0 are left alone)"
        ) from error


def wanted_conntrack(
    *,
    max_per_core: int,
    min: int,  # noqa: A002 - the configuration's own word
    tcp_established_timeout_s: float,
    tcp_close_wait_timeout_s: float,
    tcp_be_liberal: bool,
    udp_timeout_s: float,
    udp_stream_timeout_s: float,
    root: Path = _HOST,
) -> dict[str, int]:
    """Return what ``apply_conntrack`` sees to, by path below /proc/sys, in its order."""
    wanted = {
        CONNTRACK_MAX: _conntrack_entries(max_per_core, min, root) if max_per_core > 0 else 0,
        f"{_NETFILTER}/nf_conntrack_tcp_timeout_established": int(tcp_established_timeout_s),
        f"{_NETFILTER}/nf_conntrack_tcp_timeout_close_wait": int(tcp_close_wait_timeout_s),
        f"{_NETFILTER}/nf_conntrack_tcp_be_liberal": int(tcp_be_liberal),
        f"{_NETFILTER}/nf_conntrack_udp_timeout": int(udp_timeout_s),
        f"{_NETFILTER}/nf_conntrack_udp_timeout_stream": int(udp_stream_timeout_s),
    }
    return {name: value for name, value in wanted.items() if value > 0}


def conntrack_is_liberal(root: Path = _HOST) -> bool:
    """Tell whether the kernel takes out-of-window TCP packets for valid.

    If so, no rule may drop invalid packets for their sake.
    """
    try:
        return int(_read(root / _TCP_BE_LIBERAL)) != 0
    except (OSError, ValueError):
        return False


def ensure_conntrack_accounting(root: Path = _HOST) -> bool:
    """Let the kernel count packets and bytes of connections that begin from now on.

    Return whether it does. Where it tells nobody of connections that end, it shall do that too.
    """
    try:
        _ensure(root, _ACCOUNTING, 1)
        # 2, the default of newer kernels, is as good: on where somebody listens.
        if int(_read(root / _EVENTS)) == 0:
            _ensure(root, _EVENTS, 1)
    except (OSError, ValueError) as error:
        log.warning(
            "conntrack.accounting_refused",
            error=_reason(error),
            consequence="packets and bytes of Services are not counted",
        )
        return False
    return True


def ensure_route_localnet(root: Path = _HOST) -> None:
    """Let packets to and from 127.0.0.0/8 be routed, which node ports on localhost need.

    Raises:
        KubeProxyError: it is not so and cannot be set.
    """
    try:
        _ensure(root, _ROUTE_LOCALNET, 1)
    except OSError as error:
        raise errors.KubeProxyError(
            "unable to create proxier: unable to create ipv4 proxier: "
            f"can't set sysctl net/ipv4/conf/all/route_localnet to 1: {_reason(error)} (--init-only "
            "sets it for a process with fewer rights; --iptables-localhost-nodeports=false does without)"
        ) from error


def set_oom_score_adj(
    value: int, root: Path = _HOST, sleep: Callable[[float], None] = time.sleep
) -> bool:
    """Tell the kernel how readily to kill this process (-1000 to 1000); return whether it took it.

    It is no reason to end if it does not: lowering takes CAP_SYS_RESOURCE, which few containers have.
    """
    for attempt in range(_OOM_TRIES):
        if attempt:
            sleep(_OOM_PAUSE_S)
        try:
            _ensure(root, _OOM_SCORE_ADJ, value)
        except OSError as error:
            log.info("oom_score_adj.set_failed", value=value, error=_reason(error))
        else:
            return True
    return False


def cpu_count(root: Path = _HOST) -> int:
    """Return the number of the machine's online CPUs, whatever part of them this process may use."""
    try:
        # For example "0-3,8-11".
        ranges = [part.partition("-") for part in _read(root / _ONLINE_CPUS).split(",")]
        return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)
    except (OSError, ValueError):
        return os.cpu_count() or 1


def _conntrack_entries(max_per_core: int, floor: int, root: Path) -> int:
    product = max_per_core * cpu_count(root)
    if product > _CONNTRACK_MAX_LIMIT:
        # Before the floor is looked at, as in kube-proxy: a floor above the limit counts only
        # where the product is below the limit.
        log.info("conntrack.max_limited", wanted=product, limit=_CONNTRACK_MAX_LIMIT)
        return _CONNTRACK_MAX_LIMIT
    return max(product, floor)


def _ensure(root: Path, name: Path, value: int) -> None:
    path = root / name
    try:
        old = int(_read(path))
    except (OSError, ValueError):
        old = None
    if old == value:
        return
    # Not Path.write_text, which would create a missing file where this is a plain directory.
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(descriptor, str(value).encode())
    except OSError as error:
        # The call does not know the file's name; the message must have it.
        reason = os.strerror(error.errno or 0).lower()
        raise OSError(error.errno, f"write {path}: {reason}") from error
    finally:
        os.close(descriptor)
    log.info("sysctl.set", name="/" + str(name), old=old, new=value)


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()


def _reason(error: OSError | ValueError) -> str:
    # As Go prints it, which runbooks for kube-proxy quote: "open /proc/...: permission denied".
    if not isinstance(error, OSError):
        return str(error)
    if error.filename is None:
        return str(error.strerror)
    return f"open {error.filename}: {os.strerror(error.errno or 0).lower()}"
