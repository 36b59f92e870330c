"""
What this host's network interfaces say: their addresses, when they change, and whether there is IPv6.

Asked anew whenever it is needed, or followed by the kernel's events. Node-port rules and conntrack
follow interfaces, so an answer that is only remembered would be wrong sooner or later.
"""

import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import structlog

from kubeproxy_py import netlink
from kubeproxy_py.model import IPFamily

log = structlog.get_logger()

_RTM_GETADDR: Final = 22
_RTM_NEWADDR: Final = 20
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
# struct ifaddrmsg: family, prefix length, flags, scope, interface index.
_IFADDRMSG: Final = struct.Struct("=BBBBI")

_RTNLGRP_IPV4_IFADDR: Final = 5
_RTNLGRP_IPV6_IFADDR: Final = 9

# How often a list that changed under us is read again. Addresses change in bursts of milliseconds.
_ATTEMPTS: Final = 5
# How soon to look again where that failed, or where there are no events: a look costs a millisecond.
_RETRY_S: Final = 1.0


class InterfaceAddress(NamedTuple):
    """One address of one of this host's interfaces."""

    device: str
    address: str
    prefix_length: int


def connect(groups: Iterable[int] = ()) -> netlink.NetlinkSocket:
    """Open a socket to the interfaces of this thread's network namespace."""
    raw = netlink.connect(netlink.NETLINK_ROUTE, groups)
    return netlink.NetlinkSocket(raw, "interface addresses")


def local_addresses(
    family: IPFamily,
    opener: Callable[[], netlink.NetlinkSocket] = connect,
    devices: Callable[[], list[tuple[int, str]]] = socket.if_nameindex,
) -> tuple[InterfaceAddress, ...]:
    """Return the addresses of *family* on all interfaces, loopback included, in the kernel's order.

    Raises:
        OSError: they cannot be listed, or changed under every attempt to.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            return tuple(_addresses(family, opener, devices))
        except netlink.NetlinkError as error:
            if error.errno != errno.EINTR:
                raise
    return tuple(_addresses(family, opener, devices))


def has_ipv6(root: Path = Path("/")) -> bool:
    """Tell whether this host speaks IPv6, by the same two files as kube-proxy."""
    if not (root / "proc/net/if_inet6").exists():
        return False
    switch = root / "proc/sys/net/ipv6/conf/all/disable_ipv6"
    try:
        return switch.read_text(encoding="ascii").strip() != "1"
    except OSError:
        return True


class AddressWatcher:
    """Knows this host's addresses; calls back, from a thread of its own, after their set has changed.

    Renewed lifetimes, as every IPv6 router advertisement brings, are no change. Nor is a list that
    cannot be read: what was read last holds until it can.
    """

    def __init__(
        self,
        callback: Callable[[], None],
        listing: Callable[[IPFamily], Iterable[InterfaceAddress]] = local_addresses,
        opener: Callable[[Iterable[int]], netlink.NetlinkSocket] = connect,
        *,
        retry_s: float = _RETRY_S,
    ) -> None:
        self._callback = callback
        self._list = listing
        self._open = opener
        self._retry_s = retry_s
        self._thread = threading.Thread(target=self._run, name="addresses", daemon=True)
        # Replaced as a whole: other threads read it.
        self._known: Mapping[IPFamily, frozenset[InterfaceAddress]] = {}
        self._wake = -1
        # None: there are no events now, or the list could not be read.
        self._events: netlink.NetlinkSocket | None = None
        self._is_failing = False

    def addresses_of(self, family: IPFamily) -> tuple[str, ...]:
        """Return the addresses of *family* as they were read last; none before that. From any thread."""
        return tuple(found.address for found in self._known.get(family, ()))

    def start(self) -> None:
        """Begin; changes after the return of this are noticed, without a call for those before.

        Raises:
            OSError: this process may open no more files. Nothing is running then.
        """
        self._wake = os.eventfd(0)
        self._look()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, waiting for a callback that runs; nothing happens if it never started."""
        if self._wake < 0:
            return
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._close()
        os.close(self._wake)
        self._wake = -1

    def _run(self) -> None:
        while not self._wait():
            if self._look():
                self._callback()

    def _wait(self) -> bool:
        """Wait for events, or a moment where there are none; True: stopped."""
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        if self._events is not None:
            poller.register(self._events, select.POLLIN)
        ready = poller.poll(None if self._events is not None else self._retry_s * 1000)
        return any(descriptor == self._wake for descriptor, _ in ready)

    def _look(self) -> bool:
        """Take the events there are, and read the list; return whether it has changed."""
        failure = None
        try:
            self._take_events()
        except OSError as error:
            failure = error
        known = self._known
        try:
            self._known = {family: frozenset(self._list(family)) for family in IPFamily}
        except OSError as error:
            failure = error
        if failure is not None:
            # Without a socket, it is opened and everything read again in a moment.
            self._close()
        self._tell(failure)
        return self._known != known

    def _take_events(self) -> None:
        if self._events is None:
            # Before the list is read: what changes in between is seen twice rather than never.
            self._events = self._open((_RTNLGRP_IPV4_IFADDR, _RTNLGRP_IPV6_IFADDR))
            return
        try:
            for _ in self._events.events():
                pass  # what changed is told by the list, not by the event
        except netlink.NetlinkError as error:
            # Events that were lost are a reason to look, as any.
            if error.errno != errno.ENOBUFS:
                raise

    def _tell(self, failure: OSError | None) -> None:
        if failure is not None and not self._is_failing:
            log.error("addresses.watch_failed", error=str(failure))
        elif failure is None and self._is_failing:
            log.info("addresses.watch_recovered")
        self._is_failing = failure is not None

    def _close(self) -> None:
        if self._events is not None:
            self._events.close()
        self._events = None


def _addresses(
    family: IPFamily,
    opener: Callable[[], netlink.NetlinkSocket],
    devices: Callable[[], list[tuple[int, str]]],
) -> Iterator[InterfaceAddress]:
    names = dict(devices())
    with opener() as sock:
        for kind, _, payload in sock.dump(
            _RTM_GETADDR, _IFADDRMSG.pack(family.socket_family, 0, 0, 0, 0)
        ):
            got_family, prefix_length, _, _, index = _IFADDRMSG.unpack_from(payload)
            # A kernel without IPv6 answers a request for it with all that it has.
            if kind != _RTM_NEWADDR or got_family != family.socket_family:
                continue
            values = dict(netlink.attributes(payload[_IFADDRMSG.size :]))
            # On a point-to-point link IFA_ADDRESS is the other end.
            value = values.get(_IFA_LOCAL, values.get(_IFA_ADDRESS))
            if value is not None:
                yield InterfaceAddress(
                    # An interface can appear between the two lists; its number still tells it.
                    device=names.get(index, str(index)),
                    address=socket.inet_ntop(family.socket_family, value),
                    prefix_length=prefix_length,
                )
