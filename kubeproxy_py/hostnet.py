"""
What this host's network interfaces say: their addresses, when they change, and whether there is IPv6.

Asked anew whenever it is needed. Node-port rules and conntrack follow interfaces, so a remembered
answer would be wrong sooner or later.
"""

import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
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

_AF: Final = {IPFamily.V4: socket.AF_INET, IPFamily.V6: socket.AF_INET6}

# How often a list that changed under us is read again. Addresses change in bursts of milliseconds.
_ATTEMPTS: Final = 5


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
    """Calls back, from a thread of its own, after the set of this host's addresses has changed.

    Renewed lifetimes, as every IPv6 router advertisement brings, are no change.
    """

    def __init__(
        self,
        callback: Callable[[], None],
        listing: Callable[[IPFamily], Iterable[InterfaceAddress]] = local_addresses,
        opener: Callable[[Iterable[int]], netlink.NetlinkSocket] = connect,
    ) -> None:
        self._callback = callback
        self._list = listing
        self._open = opener
        self._thread = threading.Thread(target=self._run, name="addresses", daemon=True)
        self._known: frozenset[InterfaceAddress] = frozenset()
        self._wake = -1
        self._events: netlink.NetlinkSocket | None = None

    def start(self) -> None:
        """Begin; changes after the return of this are noticed.

        Raises:
            OSError: the kernel gives no events or addresses. Nothing is running then.
        """
        events = self._open((_RTNLGRP_IPV4_IFADDR, _RTNLGRP_IPV6_IFADDR))
        try:
            # After joining: what changes in between is seen twice rather than never.
            self._known = self._addresses()
            self._wake = os.eventfd(0)
        except BaseException:
            events.close()
            raise
        self._events = events
        self._thread.start()

    def stop(self) -> None:
        """End the thread, waiting for a callback that runs; nothing happens if it never started."""
        if self._events is None:
            return
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._events.close()
        os.close(self._wake)
        self._events = None

    def _run(self) -> None:
        assert self._events is not None
        poller = select.poll()
        poller.register(self._events, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while True:
            if any(descriptor == self._wake for descriptor, _ in poller.poll()):
                return
            try:
                self._follow(self._events)
            except OSError:
                # Syncs for other reasons still read the addresses; only the nudge is missing.
                log.exception("addresses.watch_failed")
                return

    def _follow(self, events: netlink.NetlinkSocket) -> None:
        try:
            for _ in events.events():
                pass  # what changed is told by the list, not by the event
        except netlink.NetlinkError as error:
            # Events that were lost are a reason to look, as any.
            if error.errno != errno.ENOBUFS:
                raise
        found = self._addresses()
        if found != self._known:
            self._known = found
            self._callback()

    def _addresses(self) -> frozenset[InterfaceAddress]:
        return frozenset(address for family in IPFamily for address in self._list(family))


def _addresses(
    family: IPFamily,
    opener: Callable[[], netlink.NetlinkSocket],
    devices: Callable[[], list[tuple[int, str]]],
) -> Iterator[InterfaceAddress]:
    names = dict(devices())
    with opener() as sock:
        for kind, _, payload in sock.dump(_RTM_GETADDR, _IFADDRMSG.pack(_AF[family], 0, 0, 0, 0)):
            got_family, prefix_length, _, _, index = _IFADDRMSG.unpack_from(payload)
            # A kernel without IPv6 answers a request for it with all that it has.
            if kind != _RTM_NEWADDR or got_family != _AF[family]:
                continue
            values = dict(netlink.attributes(payload[_IFADDRMSG.size :]))
            # On a point-to-point link IFA_ADDRESS is the other end.
            value = values.get(_IFA_LOCAL, values.get(_IFA_ADDRESS))
            if value is not None:
                yield InterfaceAddress(
                    # An interface can appear between the two lists; its number still tells it.
                    device=names.get(index, str(index)),
                    address=socket.inet_ntop(_AF[family], value),
                    prefix_length=prefix_length,
                )
