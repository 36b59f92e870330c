"""
Named packet counters in the kernel (nfacct), which two of kube-proxy's rules feed.

They live in the network namespace and outlast this process; both families share them. The kernel
or the iptables program may lack them: the rules are then written without.
"""

import errno
import struct
from collections.abc import Callable, Iterator
from typing import Final

import structlog
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from kubeproxy_py import netlink, rules

log = structlog.get_logger()

_NFNL_MSG_ACCT_NEW: Final = 7 << 8 | 0
_NFNL_MSG_ACCT_GET: Final = 7 << 8 | 1
_NFACCT_NAME: Final = 1
_NFACCT_PKTS: Final = 2
_NFACCT_BYTES: Final = 3

# struct nfgenmsg: AF_NETLINK, version 0, resource id 0.
_GENERIC_HEADER: Final = struct.pack("=BBH", 16, 0, 0)
_COUNT: Final = struct.Struct(">Q")

Opener = Callable[[], netlink.NetlinkSocket]


def connect() -> netlink.NetlinkSocket:
    """Open a socket to the counters of this thread's network namespace."""
    return netlink.NetlinkSocket(netlink.connect(netlink.NETLINK_NETFILTER), "nfacct counters")


def supported(opener: Opener = connect) -> bool:
    """Tell whether this kernel has nfacct and lets us ask."""
    try:
        # No counter has this name; a kernel that can look it up says so.
        read("kubeproxy_py_probe", opener)
    except OSError as error:
        log.info("nfacct.unavailable", error=str(error))
        return False
    return True


def ensure(name: str, opener: Opener = connect) -> bool:
    """Create the counter if there is none of that name; tell whether there is one now."""
    try:
        if read(name, opener) is not None:
            return True
        with opener() as sock:
            sock.request(
                _NFNL_MSG_ACCT_NEW, _GENERIC_HEADER + _name(name), flags=netlink.NLM_F_CREATE
            )
    except OSError as error:
        # The kernel says EBUSY where another program was faster.
        if error.errno in (errno.EBUSY, errno.EEXIST):
            return True
        log.warning("nfacct.creation_failed", name=name, error=str(error))
        return False
    return True


def read(name: str, opener: Opener = connect) -> tuple[int, int] | None:
    """Return the packets and bytes counted so far; None where there is no such counter.

    Raises:
        OSError: the kernel lacks nfacct or refuses.
    """
    try:
        with opener() as sock:
            answers = sock.request(_NFNL_MSG_ACCT_GET, _GENERIC_HEADER + _name(name))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    for answer in answers:
        values = dict(netlink.attributes(memoryview(answer)[len(_GENERIC_HEADER) :]))
        if _NFACCT_PKTS in values and _NFACCT_BYTES in values:
            (packets,) = _COUNT.unpack_from(values[_NFACCT_PKTS])
            (size,) = _COUNT.unpack_from(values[_NFACCT_BYTES])
            return packets, size
    return None


class NfacctCollector(Collector):
    """Reads the counters at each scrape. Register it only where ``supported``."""

    def __init__(self, opener: Opener = connect) -> None:
        self._opener = opener

    def collect(self) -> Iterator[CounterMetricFamily]:
        for metric, name, text in _METRICS:
            try:
                count = read(name, self._opener)
            except OSError as error:
                # A scrape must not fail as a whole for this.
                log.warning("nfacct.read_failed", name=name, error=str(error))
                continue
            if count is not None:
                yield CounterMetricFamily(metric, text, value=count[0])

    def describe(self) -> Iterator[CounterMetricFamily]:
        # Without this, registering would read the counters, before they are created.
        for metric, _, text in _METRICS:
            yield CounterMetricFamily(metric, text)


_METRICS: Final = (
    (
        "kubeproxy_iptables_ct_state_invalid_dropped_packets",
        rules.INVALID_DROPPED_COUNTER,
        "[ALPHA] packets dropped by iptables to work around conntrack problems",
    ),
    (
        "kubeproxy_iptables_localhost_nodeports_accepted_packets",
        rules.LOCALHOST_NODE_PORTS_COUNTER,
        "[ALPHA] Number of packets accepted on nodeports of loopback interface",
    ),
)


def _name(name: str) -> bytes:
    # Zero-terminated, and with the zero at most 32 bytes.
    return netlink.attribute(_NFACCT_NAME, name.encode() + b"\0")
