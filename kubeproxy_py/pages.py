"""
The metrics port's pages: /metrics, and what else kube-proxy shows there about itself.

Bodies and headers are kube-proxy's, for the scripts and dashboards that read them. Nothing here
decides or changes anything, but for the log level where profiling is on.
"""

import json
import platform
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import prometheus_client
import yaml
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import kubeproxy_py
from kubeproxy_py.httpserver import NOSNIFF, NOT_FOUND, PLAIN_TEXT, Request, Response

_JSON: Final = ("Content-Type", "application/json")
_METRICS: Final = (
    "Content-Type",
    "text/plain; version=0.0.4; charset=utf-8; escaping=underscores",
)
_START_TIME: Final = "Process-Start-Time-Unix"
_NAME: Final = "kube-proxy"
_WARNING: Final = (
    "Warning: This endpoint is not meant to be machine parseable, has no formatting "
    "compatibility guarantees and is for debugging purposes only."
)
_GROUP: Final = "config.k8s.io"
_VERSIONS: Final = ("v1beta1", "v1alpha1")
# The paths that /statusz names. kube-proxy leaves out those below them.
_PATHS: Final = ("/configz", "/flagz", "/healthz", "/metrics", "/proxyMode")
_NOT_ACCEPTABLE: Final = {
    "kind": "Status",
    "apiVersion": "v1",
    "metadata": {},
    "status": "Failure",
    "message": "only the following media types are accepted: "
    "application/json, application/yaml, text/plain",
    "reason": "NotAcceptable",
    "code": 406,
}

# Feature gates of kube-proxy 1.36 that mean something here: stage ("" is GA) and default.
_GATES: Final = {
    "AllAlpha": ("ALPHA", False),
    "AllBeta": ("BETA", False),
    "AllowServiceExternalIPs": ("", True),
    "ComponentFlagz": ("BETA", True),
    "ComponentStatusz": ("BETA", True),
    "ContextualLogging": ("BETA", True),
    "LoggingAlphaOptions": ("ALPHA", False),
    "LoggingBetaOptions": ("BETA", True),
    "MultiCIDRServiceAllocator": ("", True),
    "NFTablesProxyMode": ("", True),
    "NativeHistograms": ("ALPHA", False),
    "PreferSameTrafficDistribution": ("", True),
}


class Build(NamedTuple):
    """Which program this is, as pages and metrics name it."""

    version: str = kubeproxy_py.__version__
    emulation: str = "1.36"
    """The minor release of kube-proxy whose behaviour this is."""
    runtime: str = f"python{platform.python_version()}"
    """Stands where kube-proxy names its Go version."""


def register_process_metrics(
    registry: CollectorRegistry,
    *,
    gates: Mapping[str, bool] | None = None,
    build: Build = Build(),  # noqa: B008 - immutable
) -> None:
    """Register process_*, kubernetes_build_info and kubernetes_feature_enabled; *gates* were set."""
    ProcessCollector(registry=registry)
    major, _, minor = build.emulation.partition(".")
    info = {
        "build_date": "",
        "compiler": platform.python_implementation().lower(),
        "git_commit": "",
        "git_tree_state": "",
        # Fleets are searched by it for version skew: it must not look like a kube-proxy's.
        "git_version": f"v{build.version}+kubeproxy-py",
        "go_version": build.runtime,
        "major": major,
        "minor": minor,
        "platform": f"linux/{platform.machine()}",
    }
    Gauge(
        "kubernetes_build_info",
        "[BETA] A metric with a constant '1' value labeled by the version of this program,"
        " and the minor release of Kubernetes that it stands in for.",
        list(info),
        registry=registry,
    ).labels(**info).set(1)
    enabled = Gauge(
        "kubernetes_feature_enabled",
        "[BETA] This metric records the data about the stage and enablement of a k8s feature.",
        ["name", "stage"],
        registry=registry,
    )
    for name, (stage, default) in _GATES.items():
        enabled.labels(name, stage).set((gates or {}).get(name, default))


_WHOLE_LIMIT: Final = re.compile(rb'le="(\d+)\.0"')


class MetricsPages:
    """The pages. Methods of requests are not looked at, except where a page has several."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        configz: Callable[[], bytes],
        flagz: Callable[[], Mapping[str, str]],
        started_at: float,
        set_verbosity: Callable[[int], None] | None = None,
        build: Build = Build(),  # noqa: B008 - immutable
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Serve what the functions give at each request.

        Args:
            registry: what /metrics shows.
            configz: the effective configuration as JSON.
            flagz: every flag's name and value.
            started_at: Unix time at which this process began.
            set_verbosity: changes the log level; None if profiling is off.
            build: which program this is.
            clock: Unix time.
        """
        self._registry = registry
        self._configz = configz
        self._flagz = flagz
        self._started_at = started_at
        self._set_verbosity = set_verbosity
        self._build = build
        self._clock = clock
        self._slis = _Slis(started_at)
        self._pages: dict[str, Callable[[Request], Response]] = {
            "/metrics": lambda _: self._exposition(registry),
            "/metrics/slis": self._show_slis,
            "/healthz": self._healthz,
            "/healthz/ping": lambda _: Response(200, b"ok"),
            "/proxyMode": lambda _: Response(200, b"iptables", (PLAIN_TEXT, NOSNIFF)),
            "/configz": lambda _: Response(200, self._configz(), (_JSON, NOSNIFF)),
            "/flagz": self._show_flags,
            "/statusz": self._show_status,
        }
        if set_verbosity is not None:
            self._pages["/debug/flags/v"] = self._put_verbosity

    def app(self, request: Request) -> Response:
        page = self._pages.get(request.path)
        return NOT_FOUND if page is None else page(request)

    def _exposition(self, registry: CollectorRegistry) -> Response:
        headers = (_METRICS, (_START_TIME, str(int(self._started_at))))
        text = prometheus_client.generate_latest(registry)
        # Go prints whole bucket limits without a fraction. Summing by `le` over nodes with this proxy
        # and nodes with kube-proxy would otherwise count such buckets apart.
        return Response(200, _WHOLE_LIMIT.sub(rb'le="\1"', text), headers)

    def _show_slis(self, request: Request) -> Response:
        if request.method == "DELETE":
            self._slis.reset()
            return Response(200, b"metrics reset\n")
        return self._exposition(self._slis.registry)

    def _healthz(self, request: Request) -> Response:
        # Says that this server answers, no more: how the proxy is, the health server knows.
        excluded = request.query.get("exclude")
        if excluded == "ping":
            lines = ["[+]ping excluded: ok"]
        else:
            self._slis.passed()
            lines = ["[+]ping ok"]
            if excluded:
                lines.append(
                    "warn: some health checks cannot be excluded: no matches for "
                    + json.dumps(excluded)
                )
        lines.append("healthz check passed\n")
        text = "\n".join(lines) if "verbose" in request.query else "ok"
        return Response(200, text.encode(), (PLAIN_TEXT, NOSNIFF))

    def _show_flags(self, request: Request) -> Response:
        flags = dict(sorted(self._flagz().items()))
        lines = ["", f"{_NAME} flagz", _WARNING, *[f"{name}={flags[name]}" for name in flags]]
        return _negotiated(request, "Flagz", lines, {"flags": flags})

    def _show_status(self, request: Request) -> Response:
        started = datetime.fromtimestamp(int(self._started_at), UTC)
        up_s = max(0, int(self._clock() - self._started_at))
        minutes, seconds = divmod(up_s, 60)
        hours, minutes = divmod(minutes, 60)
        lines = [
            "",
            f"{_NAME} statusz",
            _WARNING,
            "",
            f"Started:  {started:%a %b} {started.day:2} {started:%H:%M:%S} UTC {started.year}",
            f"Up:  {hours} hr {minutes:02} min {seconds:02} sec",
            f"Go version:  {self._build.runtime}",
            f"Binary version:  {self._build.version}",
            f"Emulation version:  {self._build.emulation}",
            f"Paths:  {' '.join(_PATHS)}",
        ]
        fields = {
            "startTime": f"{started:%Y-%m-%dT%H:%M:%SZ}",
            "uptimeSeconds": up_s,
            "goVersion": self._build.runtime,
            "binaryVersion": self._build.version,
            "emulationVersion": self._build.emulation,
            "paths": _PATHS,
        }
        return _negotiated(request, "Statusz", lines, fields)

    def _put_verbosity(self, request: Request) -> Response:
        assert self._set_verbosity is not None
        if request.method != "PUT":
            return _plain(406, "unsupported http method")
        text = request.body.decode("utf-8", "replace")
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", text):
            return _plain(
                400,
                f"failed set klog.logging.verbosity {text}: "
                f"strconv.ParseInt: parsing {json.dumps(text)}: invalid syntax",
            )
        self._set_verbosity(int(text))
        return _plain(200, f"successfully set klog.logging.verbosity to {text}")


class _Slis(Collector):
    """How often this port's one health check, which always passes, was asked."""

    def __init__(self, started_at: float) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._started_at = started_at
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._passed = 0

    def passed(self) -> None:
        with self._lock:
            self._passed += 1

    def reset(self) -> None:
        with self._lock:
            self._passed = 0

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            passed = self._passed
        if passed:
            last = GaugeMetricFamily(
                "kubernetes_healthcheck",
                "[STABLE] This metric records the result of a single healthcheck.",
                labels=["name", "type"],
            )
            last.add_metric(["ping", "healthz"], 1)
            yield last
            total = CounterMetricFamily(
                "kubernetes_healthchecks_total",
                "[STABLE] This metric records the results of all healthcheck.",
                labels=["name", "status", "type"],
            )
            total.add_metric(["ping", "success", "healthz"], passed)
            yield total
        yield GaugeMetricFamily(
            "process_start_time_seconds",
            "[ALPHA] Start time of the process since unix epoch in seconds.",
            value=self._started_at,
        )


def _plain(status: int, text: str) -> Response:
    return Response(status, f"{text}\n".encode(), (("Content-Type", "text/plain"), NOSNIFF))


def _negotiated(
    request: Request, kind: str, lines: Iterable[str], fields: Mapping[str, Any]
) -> Response:
    """
    Answer in the first form of the Accept header that this page has.

    Text for people; JSON or YAML only for those who name the group, version and kind that they
    understand, as KEP-4827 and KEP-4828 have it.
    """
    for media_type, params in _accepted(request.headers.get("accept", "")):
        if media_type in {"text/plain", "text/*", "*/*"}:
            return Response(200, "".join(f"{line}\n" for line in lines).encode(), (PLAIN_TEXT,))
        version = params.get("v", "")
        if (
            media_type not in {"application/json", "application/yaml"}
            or version not in _VERSIONS
            or params.get("g") != _GROUP
            or params.get("as") != kind
        ):
            continue
        document = {
            "kind": kind,
            "apiVersion": f"{_GROUP}/{version}",
            "metadata": {"name": _NAME},
            **fields,
        }
        headers = [("Content-Type", f"{media_type};g={_GROUP};v={version};as={kind}")]
        if version != _VERSIONS[0]:
            text = f"{_GROUP}/{version} {kind} is deprecated; use {_GROUP}/{_VERSIONS[0]} {kind}"
            headers.append(("Warning", f'299 - "{text}"'))
        text = json.dumps(document, indent=2)
        if media_type == "application/yaml":
            text = yaml.safe_dump(json.loads(text))
        return Response(200, text.encode(), tuple(headers))
    return Response(406, json.dumps(_NOT_ACCEPTABLE, indent=2).encode(), (_JSON,))


def _accepted(header: str) -> list[tuple[str, dict[str, str]]]:
    """Return media types and their parameters, the most wanted first (RFC 9110, section 12.5.1)."""
    if not header.strip():
        return [("*/*", {})]
    ranked = []
    for part in header.split(","):
        media_type, *rest = (piece.strip() for piece in part.split(";"))
        pairs = [piece.partition("=") for piece in rest]
        params = {name.strip().lower(): value.strip().strip('"') for name, _, value in pairs}
        try:
            quality = float(params.pop("q", "1"))
        except ValueError:
            quality = 0.0
        if quality > 0:
            ranked.append((quality, media_type.lower(), params))
    ranked.sort(key=lambda item: -item[0])
    return [(media_type, params) for _, media_type, params in ranked]
