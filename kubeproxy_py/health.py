"""
Answers whether this node's proxy is well: /healthz, /livez, /readyz and Services' health check ports.

Load balancers, the kubelet and the cluster autoscaler act on these answers, so states, bodies and
headers are kube-proxy's. Nothing here looks at the kernel or the cluster: the sync loops and the
node's watch say what they know. The invariant: idle time never makes a node unhealthy, only a
change that has been waiting too long does.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import msgspec
import structlog

from kubeproxy_py import httpserver
from kubeproxy_py.errors import KubeProxyError
from kubeproxy_py.httpserver import NOT_FOUND, HttpServer, Listener, Request, Response
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily, ServiceName

log = structlog.get_logger()

_JSON: Final = ("Content-Type", "application/json")
_HEADERS: Final = (_JSON, httpserver.NOSNIFF)
_WEIGHT: Final = "X-Load-Balancing-Endpoint-Weight"
# A failed sync is tried again after one period; missing that as well is not normal any more.
_PERIODS_UNTIL_UNHEALTHY: Final = 2
# What Go prints for a time that was never set.
_ZERO_TIME: Final = "0001-01-01T00:00:00Z"
_WILDCARD: Final = {IPFamily.V4: "0.0.0.0", IPFamily.V6: "::"}  # noqa: S104 - node ports are public


Check = Callable[[], str | None]
#: What was looked at, by name, and what was found wrong; None: nothing.
Findings = dict[str, str | None]


def render_time(ns: int) -> str:
    """Write a time (Unix, nanoseconds) as Go's RFC3339Nano does, in the local zone."""
    seconds, fraction = divmod(ns, 10**9)
    text = datetime.fromtimestamp(seconds, UTC).astimezone().isoformat()
    date, offset = text[:19], text[19:]
    # Unlike Python, Go writes nanoseconds, and trims trailing zeros.
    digits = f".{fraction:09d}".rstrip("0") if fraction else ""
    return f"{date}{digits}{'Z' if offset == '+00:00' else offset}"


class FamilyHealth(NamedTuple):
    """One family's part of a verdict."""

    updated_ns: int | None  # Unix time; None: its loop has not started
    is_healthy: bool


class Verdict(NamedTuple):
    """How the proxy is, at one moment."""

    now_ns: int
    is_eligible: bool
    families: Mapping[IPFamily, FamilyHealth]

    @property
    def is_healthy(self) -> bool:
        return all(family.is_healthy for family in self.families.values())

    def body(self, *, has_node: bool, is_ok: bool, reasons: Sequence[str] = ()) -> bytes:
        """Render it as kube-proxy does; *is_ok* is the status the answer goes out with.

        *reasons*, which kube-proxy does not have, are added where there are any.
        """
        times = [family.updated_ns for family in self.families.values() if family.updated_ns]
        updated_ns = self.now_ns if is_ok else max(times, default=None)
        body: dict[str, Any] = {
            "lastUpdated": _time_or_zero(updated_ns),
            "currentTime": render_time(self.now_ns),
        }
        if has_node:
            body["nodeEligible"] = self.is_eligible
        # Of the proxy alone, so that 503 with "healthy":true means: look at the Node.
        body["healthy"] = self.is_healthy and not reasons
        if self.families:
            body["status"] = {
                family.value: {
                    "lastUpdated": _time_or_zero(part.updated_ns),
                    "healthy": part.is_healthy,
                }
                for family, part in sorted(self.families.items(), key=lambda item: item[0].value)
            }
        if reasons:
            body["reasons"] = reasons
        return msgspec.json.encode(body)


class ProxyHealth:
    """What the sync loops and the Node say about this proxy. From any thread."""

    def __init__(
        self,
        sync_period_s: float,
        *,
        now_ns: Callable[[], int] = time.time_ns,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show times of *now_ns* (Unix); measure waiting with *clock*, which no NTP step moves."""
        self._limit_s = _PERIODS_UNTIL_UNHEALTHY * sync_period_s
        self._now_ns = now_ns
        self._clock = clock
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._updated_ns: dict[IPFamily, int] = {}
        self._pending_since: dict[IPFamily, float] = {}  # by the clock; the oldest change
        self._unsynced: set[IPFamily] = set()  # expected, but without a successful sync so far
        self._is_expecting = False
        self._is_eligible = False  # a Node that was never seen is not
        self._readiness: dict[str, Check] = {}
        self._liveness: dict[str, Check] = {}

    def expect(self, families: Iterable[IPFamily]) -> None:
        """Name families before their loops start, so that /readyz waits for all of them."""
        with self._lock:
            self._expect(*families)

    def started(self, family: IPFamily) -> None:
        """Note that the loop of *family* runs; what was queued before does not count."""
        with self._lock:
            if family not in self._updated_ns:
                self._expect(family)
            self._updated_ns[family] = self._now_ns()
            self._pending_since.pop(family, None)

    def queued(self, family: IPFamily) -> None:
        """Note that a change waits to be synced."""
        with self._lock:
            self._pending_since.setdefault(family, self._clock())

    def updated(self, family: IPFamily) -> None:
        """Note a successful sync."""
        with self._lock:
            self._updated_ns[family] = self._now_ns()
            self._pending_since.pop(family, None)
            self._unsynced.discard(family)
            self._is_expecting = True

    def excused(self, family: IPFamily) -> None:
        """Note that what was queued cannot be synced yet, and will be queued again when it can."""
        with self._lock:
            self._pending_since.pop(family, None)

    def set_node(self, *, eligible: bool) -> None:
        """Note whether the Node may get traffic: neither being deleted nor about to be."""
        with self._lock:
            self._is_eligible = eligible

    def add_readiness(self, name: str, check: Check) -> None:
        """Let *check* say why we are not ready; None: nothing speaks against it."""
        with self._lock:
            self._readiness[name] = check

    def add_liveness(self, name: str, check: Check) -> None:
        """Let *check* say why only a restart will help; None: nothing speaks for one."""
        with self._lock:
            self._liveness[name] = check

    def verdict(self) -> Verdict:
        """Return how the proxy is now."""
        with self._lock:
            late = self._late()
            families = self._updated_ns.keys() | late
            return Verdict(
                self._now_ns(),
                self._is_eligible,
                {
                    family: FamilyHealth(self._updated_ns.get(family), family not in late)
                    for family in families
                },
            )

    def pending(self) -> dict[IPFamily, float]:
        """Return for how many seconds the oldest change of each family has been waiting."""
        with self._lock:
            now = self._clock()
            return {family: now - since for family, since in self._pending_since.items()}

    def unreadiness(self) -> list[str]:
        """Return every reason not to be ready; none means ready."""
        return _reasons(self.readiness())

    def readiness(self) -> Findings:
        """Return what was looked at, by name; None means that nothing speaks against being ready."""
        with self._lock:
            found: Findings = {
                "started": None if self._is_expecting else "nothing has been started"
            }
            families = self._updated_ns.keys() | self._unsynced
            for family in _sorted(families):
                is_unsynced = family in self._unsynced
                found[f"programmed-{family.value}"] = (
                    "not synced since the start" if is_unsynced else None
                )
            found |= self._promptness()
            checks = dict(self._readiness)
        return found | _run(checks)

    def liveness(self) -> Findings:
        """Return what was looked at, by name; None means that nothing speaks for a restart."""
        with self._lock:
            found = self._promptness()
            checks = dict(self._liveness)
        return found | _run(checks)

    def _promptness(self) -> Findings:
        late = self._late()
        return {
            f"prompt-{family.value}": (
                f"a change has been waiting for {self._limit_s:g} s or more"
                if family in late
                else None
            )
            for family in _sorted(self._updated_ns.keys() | late)
        }

    def _expect(self, *families: IPFamily) -> None:
        self._unsynced.update(families)
        self._is_expecting = True

    def _late(self) -> set[IPFamily]:
        now = self._clock()
        return {
            family for family, since in self._pending_since.items() if now - since >= self._limit_s
        }


class HealthPages:
    """The health server's pages. Any method will do, as with kube-proxy."""

    def __init__(self, health: ProxyHealth, metrics: Metrics) -> None:
        self._health = health
        self._metrics = metrics

    def app(self, request: Request) -> Response:
        match request.path:
            case "/healthz":
                return self._healthz()
            case "/livez":
                return self._livez(request)
            case "/readyz":
                return self._readyz(request)
        return NOT_FOUND

    def _healthz(self) -> Response:
        # For load balancers: may new connections come to this node?
        verdict = self._health.verdict()
        is_ok = verdict.is_healthy and verdict.is_eligible
        status = _status(is_ok=is_ok)
        self._metrics.healthz.labels(str(status)).inc()
        return Response(status, verdict.body(has_node=True, is_ok=is_ok), _HEADERS)

    def _livez(self, request: Request) -> Response:
        # For the kubelet: would a restart help? A node about to be removed is no reason for one.
        verdict, findings = self._health.verdict(), self._health.liveness()
        reasons = _reasons(findings)
        is_ok = verdict.is_healthy and not reasons
        status = _status(is_ok=is_ok)
        self._metrics.livez.labels(str(status)).inc()
        if _is_list_wanted(request):
            return _listed("livez", findings)
        return Response(
            status, verdict.body(has_node=False, is_ok=is_ok, reasons=reasons), _HEADERS
        )

    def _readyz(self, request: Request) -> Response:
        # Ours: for rollouts, which kube-proxy's "never synced is healthy" would let run ahead.
        findings = self._health.readiness()
        if _is_list_wanted(request):
            return _listed("readyz", findings)
        reasons = _reasons(findings)
        body = msgspec.json.encode({"ready": not reasons, "reasons": reasons})
        return Response(_status(is_ok=not reasons), body, _HEADERS)


class _Check:
    """One Service's health check node port."""

    def __init__(self, service: ServiceName, port: int, health: ProxyHealth | None) -> None:
        self.port = port
        self.local_endpoints = 0
        self.listeners: list[Listener] = []
        self._service = service
        self._health = health

    def app(self, _request: Request) -> Response:
        # Any path and any method: load balancers have different habits.
        count = self.local_endpoints
        # The health server can be switched off. kube-proxy then breaks the connection, and the
        # load balancer takes the node out; but nothing says that it is not well.
        is_healthy = self._health is None or self._health.verdict().is_healthy
        body = {
            "service": {"namespace": self._service.namespace, "name": self._service.name},
            "localEndpoints": count,
            "serviceProxyHealthy": is_healthy,
        }
        return Response(
            _status(is_ok=is_healthy and count > 0),
            json.dumps(body, indent="\t").encode(),
            (*_HEADERS, (_WEIGHT, str(count))),
        )

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()


class ServiceHealthPorts:
    """The health check node ports of one family's Services (externalTrafficPolicy: Local)."""

    def __init__(
        self,
        family: IPFamily,
        server: HttpServer,
        addresses: tuple[str, ...] | None,
        health: ProxyHealth | None,
        report_failure: Callable[[ServiceName, int, str], None],
    ) -> None:
        """
        Serve nothing yet.

        Args:
            family: sockets are strictly of this family, so that both can have the same port.
            server: has been started when ``update`` is called.
            addresses: on which to listen; None: on all, by a wildcard socket.
            health: None if there is no health server; the proxy then counts as healthy.
            report_failure: told the Service, port and error of a port that cannot be opened.
        """
        self._family = family
        self._server = server
        self._addresses = (_WILDCARD[family],) if addresses is None else addresses
        self._health = health
        self._report_failure = report_failure
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._checks: dict[ServiceName, _Check] = {}
        self._is_closed = False

    def update(self, ports: Mapping[ServiceName, int], counts: Mapping[ServiceName, int]) -> None:
        """
        Serve exactly *ports*, with the numbers of local endpoints in *counts*.

        Sockets that are right are left alone. One that cannot be opened is reported, and tried
        again at the next call.
        """
        failures: list[tuple[ServiceName, int, str]] = []
        with self._lock:
            if self._is_closed:
                return
            # All that goes, first: a port may move from one Service to another.
            for service, check in list(self._checks.items()):
                if ports.get(service) != check.port:
                    check.close()
                    del self._checks[service]
            for service, port in ports.items():
                check = self._checks.get(service) or _Check(service, port, self._health)
                # Before the socket: the first answer must not say that there are none.
                check.local_endpoints = counts.get(service, 0)
                if service not in self._checks:
                    try:
                        self._open(check)
                    except KubeProxyError as error:
                        failures.append((service, port, str(error)))
                    else:
                        self._checks[service] = check
        for service, port, text in failures:
            log.error(
                "health.service_port_failed",
                ip_family=self._family.value,
                service=str(service),
                port=port,
                error=text,
            )
            self._report_failure(service, port, text)

    def close(self) -> None:
        """Close all ports for good: an update that comes late does nothing."""
        with self._lock:
            self._is_closed = True
            for check in self._checks.values():
                check.close()
            self._checks.clear()

    def _open(self, check: _Check) -> None:
        try:
            for address in self._addresses:
                sock = httpserver.bind_family(address, check.port, self._family)
                check.listeners.append(self._server.listen(sock, check.app))
        except OSError as error:
            # All or nothing: a load balancer asks one address and believes it for the node.
            check.close()
            raise KubeProxyError(
                f"cannot listen on {address} port {check.port}: {httpserver.reason(error)}"
            ) from error


def _run(checks: Mapping[str, Check]) -> Findings:
    """Look at all of *checks*, without a lock of ours: they may take locks of their own."""
    return {name: check() for name, check in checks.items()}


def _reasons(findings: Findings) -> list[str]:
    return [f"{name}: {reason}" for name, reason in findings.items() if reason]


def _is_list_wanted(request: Request) -> bool:
    """Tell whether people ask, as Kubernetes' own pages let them: by ``?verbose``."""
    wants_json = (
        request.query.get("format") == "json"
        or request.headers.get("accept", "") == "application/json"
    )
    return "verbose" in request.query and not wants_json


def _listed(page: str, findings: Findings) -> Response:
    """Answer as a Kubernetes API server's ``/readyz?verbose`` does, with the reasons."""
    is_ok = not _reasons(findings)
    lines = [
        f"[-]{name} failed: {reason}" if reason else f"[+]{name} ok"
        for name, reason in findings.items()
    ]
    lines.append(f"{page} check {'passed' if is_ok else 'failed'}\n")
    return Response(
        _status(is_ok=is_ok), "\n".join(lines).encode(), (httpserver.PLAIN_TEXT, httpserver.NOSNIFF)
    )


def _time_or_zero(ns: int | None) -> str:
    return _ZERO_TIME if ns is None else render_time(ns)


def _status(*, is_ok: bool) -> int:
    return 200 if is_ok else 503


def _sorted(families: set[IPFamily]) -> list[IPFamily]:
    return sorted(families, key=lambda family: family.value)
