"""
This host, as ``run`` finds it: which families and backend work, which counters and sysctls there are.

Learned once at start-up; what a command line may state instead is ``flags.HostFacts``.
"""

import ctypes
import gc
import socket
import sys
import time
from collections.abc import Callable, Sequence

import structlog

from kubeproxy_py import hostnet, nfacct, rules
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.errors import BackendMissing, ConfigError, IptablesError, KubeProxyError
from kubeproxy_py.iptables import chains, runner
from kubeproxy_py.model import IPFamily

log = structlog.get_logger()

# Once for all: each CDLL is a class of its own, which only a look for cycles frees again.
_LIBC = ctypes.CDLL(None)
# From glibc's malloc.h.
_M_ARENA_MAX = -8
# Python looks for cycles whenever there are 700 objects more, in a first sync hundreds of times over
# everything there is: a fifth of the time it takes at 10,000 Services. What we keep has no cycles; what
# exceptions and libraries leave is found 50,000 objects later, a few megabytes at most.
_GC_THRESHOLDS = (50_000, 20, 100)
# How long a thread that computes may let another wait that has something to do. A sync has tens of such
# moments around its programs, and each would wait for Python's 5 ms while another thread reads a large
# connection table or a list of objects.
_SWITCH_INTERVAL_S = 0.0005


def node_name(override: str) -> str:
    """Return the name of this node's Node object: *override*, else the host's name, lower case."""
    name = (override or socket.gethostname()).strip().lower()
    if not name:
        raise ConfigError("empty hostname is invalid")
    return name


def choose_backend(wanted: str) -> runner.Backend:
    """Return the backend a person asked for, or the one this host uses."""
    for backend in runner.BACKENDS:
        if wanted == backend:
            return backend
    return runner.detect_backend(usable_families()).backend


def usable_families() -> list[IPFamily]:
    """Return the families that this kernel speaks, V4 first."""
    return [IPFamily.V4, *([IPFamily.V6] if hostnet.has_ipv6() else [])]


def find_kernels(backend: runner.Backend) -> dict[IPFamily, runner.Iptables]:
    """Return the families that work, V4 first; both if both do, whatever the cluster uses.

    Raises KubeProxyError if none works.
    """
    kernels: dict[IPFamily, runner.Iptables] = {}
    failures: dict[IPFamily, str] = {}
    for family in IPFamily:
        if family not in usable_families():
            failures[family] = "this kernel has no IPv6"
            continue
        try:
            programs = runner.find_programs(family, backend)
            kernel = runner.Iptables(programs)
            kernel.check()
        except (BackendMissing, IptablesError) as error:
            failures[family] = str(error)
        else:
            kernels[family] = kernel
    if not kernels:
        why = "; ".join(failures.values())
        raise KubeProxyError(f"iptables is not available on this host : {why}")
    for family, why in failures.items():
        log.info("iptables.family_unavailable", ip_family=family.value, reason=why)
    return kernels


def knows_nfacct_match(kernel: runner.Iptables) -> bool:
    """Tell whether iptables knows the match of our counters. Unlike a probe, it changes nothing."""
    text = (
        f"*filter\n:{chains.PROBE} - [0:0]\n-A {chains.PROBE}"
        f" -m nfacct --nfacct-name {rules.INVALID_DROPPED_COUNTER} -j DROP\nCOMMIT\n"
    )
    try:
        kernel.restore(text, test=True)
    except IptablesError:
        return False
    return True


def ensure_counters() -> bool:
    """Create the two counters if they are missing; tell whether both are there, and can be."""
    if not nfacct.supported():
        return False
    names = (rules.INVALID_DROPPED_COUNTER, rules.LOCALHOST_NODE_PORTS_COUNTER)
    return sum(nfacct.ensure(name) for name in names) == len(names)


def addresses_of(family: IPFamily) -> Sequence[str]:
    """Return this host's addresses of *family*; none, with an error logged, if that fails."""
    try:
        return [found.address for found in hostnet.local_addresses(family)]
    except OSError as error:
        log.error("hostnet.listing_failed", ip_family=family.value, error=str(error))  # noqa: TRY400 - netlink's words say it all
        return ()


def wait_until(
    is_true: Callable[[], bool], is_stopped: Callable[[float], bool], limit_s: float
) -> bool:
    """Look once a second whether *is_true*, for *limit_s*; *is_stopped* waits and ends it early."""
    deadline = time.monotonic() + limit_s
    while not is_true():
        if time.monotonic() >= deadline or is_stopped(min(1.0, limit_s)):
            return False
    return True


def warn_if_unknown(config: KubeProxyConfiguration, *, is_known: bool) -> None:
    """Say so if this node's IP could not be learned."""
    if not is_known and config.bind_address:
        log.info(
            "node.ip_unknown",
            message="Can't determine this node's IP, assuming loopback; if this is incorrect, "
            "please set the --bind-address flag",
        )


def tune_interpreter() -> None:
    """Set this process up for a cluster's worth of small objects, and for threads that must not wait.

    To be called before there are threads.
    """
    # glibc gives each thread an arena of its own, so that they do not wait for each other; each keeps
    # what it once had (3 MiB). Only one thread runs Python at a time, so nothing waits for one.
    choose = getattr(_LIBC, "mallopt", None)
    if choose is not None:
        choose(_M_ARENA_MAX, 1)
    gc.set_threshold(*_GC_THRESHOLDS)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def release_memory() -> None:
    """Give memory that is free inside this process back to the kernel, where the C library can.

    Reading 100,000 rules takes tens of megabytes for a moment. glibc would keep them for the rest
    of the process's life, next to something small that was allocated behind them.
    """
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)
