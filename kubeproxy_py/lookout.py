"""
Look now and then at what Services and this host take from each other, and tell what is new.

Rules are none of its business: what it finds is served all the same. The invariant it guards: whatever
goes wrong with a look, the daemon goes on without it.
"""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, Literal, NamedTuple, get_args

import structlog

from kubeproxy_py import external, listeners, node_ports
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily, PortKey, ServiceName, ServicePort

log = structlog.get_logger()

# Listeners and addresses change when somebody works on the node; a look costs a few milliseconds.
PERIOD_S: Final = 60.0
# How soon to see whether there are Services to look at.
_START_S: Final = 1.0

_SHADOWS: Final[dict[external.Doubt, str]] = {
    "node_address": "is an address of this node: what it serves on the same port gets nothing",
    "api_address": "is where this node reaches the API server: it must lead there",
}


class Family(NamedTuple):
    """What is asked of one family, each time anew."""

    services: Callable[[], Mapping[ServiceName, Mapping[PortKey, ServicePort]]]
    reach: Callable[[], node_ports.Reach]


class Notice(NamedTuple):
    """An Event about a Service, but for when and where.

    The same thing again must give the same words, so there are no process ids in them.
    """

    service: ServiceName
    event_type: Literal["Warning"]
    reason: str
    action: str
    note: str

    def __str__(self) -> str:
        return f"Service '{self.service}': {self.note}"


class Lookout:
    """Looks every *period_s*, from a thread of its own, once there is something to look at."""

    def __init__(
        self,
        families: Mapping[IPFamily, Family],
        *,
        is_ready: Callable[[], bool],
        metrics: Metrics,
        tell: Callable[[Notice], None],
        node_ips: Callable[[], Collection[str]] = tuple,
        api: external.ApiAddress | None = None,
        listening: Callable[[], Sequence[node_ports.Listener]] = listeners.listening,
        start_s: float = _START_S,
        period_s: float = PERIOD_S,
    ) -> None:
        """Prepare.

        Args:
            families: where to look.
            is_ready: tells whether all Services are known.
            metrics: two gauges of it are set.
            node_ips: the Node's own. Not the interfaces': a load balancer's VIP may stand on one.
            tell: called with what was not there at the last look; must not block.
            api: where this program reaches the API server, if that is an address.
            listening: who listens on this host; raises OSError.
            start_s: how often to see whether it is ready.
            period_s: from one look to the next.
        """
        self._families = families
        self._is_ready = is_ready
        self._metrics = metrics
        self._tell = tell
        self._node_ips = node_ips
        self._api = () if api is None else (api,)
        self._listening = listening
        self._start_s = start_s
        self._period_s = period_s
        self._stopped = threading.Event()
        #: What the last look found, sorted. Replaced as a whole: other threads read it.
        self.notices: tuple[Notice, ...] = ()

    def run(self) -> None:
        """Look until stopped."""
        pause_s = self._start_s
        while not self._stopped.wait(pause_s):
            if self._is_ready():
                self.look()
                pause_s = self._period_s

    def stop(self) -> None:
        self._stopped.set()

    def look(self) -> None:
        """Look once. Never raises what a host may cause."""
        try:
            found = tuple(sorted({*self._shadows(), *self._collisions()}))
        except OSError as error:
            # Told again at the next look, a minute later; nothing depends on it.
            log.warning("lookout.failed", error=str(error))
            return
        # A set: where load balancers hand out this node's address, there is one for each Service.
        known = frozenset(self.notices)
        for notice in found:
            if notice not in known:
                self._tell(notice)
        self.notices = found

    def _shadows(self) -> list[Notice]:
        notices = []
        for family, ways in self._families.items():
            found = list(
                external.shadows(
                    ways.services(), node_ips=frozenset(self._node_ips()), api=self._api
                )
            )
            for doubt in get_args(external.Doubt):
                services = {shadow.service for shadow in found if shadow.doubt == doubt}
                gauge = self._metrics.shadowing_services.labels(family.value, doubt)
                gauge.set(len(services))
            for shadow in found:
                text = f"{shadow.field}: {shadow.ip} {_SHADOWS[shadow.doubt]}"
                notices.append(
                    Notice(
                        service=shadow.service,
                        event_type="Warning",
                        reason="AddressShadowed",
                        action="Look",
                        note=text,
                    )
                )
        return notices

    def _collisions(self) -> list[Notice]:
        listening = self._listening()
        found = {
            # One node port may be taken in both families; it is one thing to mend.
            (collision.port, collision.node_port): collision
            for family, ways in self._families.items()
            for collision in node_ports.collisions(ways.services(), listening, family, ways.reach())
        }
        self._metrics.node_port_collisions.set(len(found))
        names = listeners.owners({collision.inode for collision in found.values()})
        return [
            Notice(
                service=ServiceName(port.namespace, port.name),
                event_type="Warning",
                reason="NodePortTaken",
                action="Look",
                note=_taken(collision, names.get(collision.inode)),
            )
            for (port, _), collision in found.items()
        ]


def _taken(collision: node_ports.Collision, owner: listeners.Owner | None) -> str:
    who = owner.name if owner else "a process"
    protocol = collision.port.protocol.upper()
    return (
        f"node port {collision.node_port}/{protocol} takes the connections for which {who} listens "
        f"on {collision.address}"
    )
