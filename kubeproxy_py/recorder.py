"""
Post Kubernetes Events about this node and its Services.

Recording never blocks, never raises and never fills memory: Events are for people, and the
proxy's work must not depend on whether anybody can be told of it.
"""

import datetime as dt
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec
import structlog

from kubeproxy_py import api, errors

log = structlog.get_logger()

EventType = Literal["Normal", "Warning"]

# Enough for a bad start on a big cluster; in a longer outage the latest are the useful ones.
_QUEUE: Final = 100
# client-go's (tools/events): what comes again within six minutes is counted on the first Event. The
# count is posted at the first repetition, every half hour, and when it has been quiet for that long.
_FINISH_S: Final = 6 * 60.0
_REFRESH_S: Final = 30 * 60.0
# client-go's (tools/record): so many different Events about one object at once, and one more every five
# minutes. Who fills the API server with Events is a problem of its own.
_BURST: Final = 25
_REFILL_S: Final = 300.0
# Series that are remembered; each is about a kilobyte.
_SERIES: Final = 500
# The API server is away: a look every ten seconds delivers late, but costs nothing.
_RETRY_S: Final = 10.0
# events.k8s.io refuses longer notes.
_MAX_NOTE: Final = 1024
# Node Events stand in this namespace, as the kubelet's do: a Node has none of its own.
_NODE_NAMESPACE: Final = "default"


class _Series(msgspec.Struct, eq=False):
    """One Event and its repetitions."""

    event: dict[str, Any]
    last_ns: int
    seen_at: float
    count: int = 1
    posted_count: int = 0  # 0: it has not been posted
    posted_at: float = 0.0

    @property
    def path(self) -> str:
        namespace = self.event["metadata"]["namespace"]
        return f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"

    @property
    def name(self) -> str:
        return str(self.event["metadata"]["name"])

    def due_at(self) -> float:
        """Return when the count should be posted; infinity: what was posted is right."""
        if self.count == self.posted_count or not self.posted_count:
            return float("inf")
        return min(self.seen_at + _FINISH_S, self.posted_at + _REFRESH_S)

    def is_over(self, now: float) -> bool:
        """Tell whether the next time will be another Event."""
        return now - self.seen_at >= _FINISH_S


class _Budget(msgspec.Struct):
    """How many different Events about one object may still be recorded."""

    tokens: float
    at: float

    def left(self, now: float) -> float:
        return min(_BURST, self.tokens + (now - self.at) / _REFILL_S)


class Recorder:
    """Posts Events from a thread of its own. All methods may be called from any thread."""

    def __init__(
        self,
        connection: api.Connection | None,
        *,
        host: str,
        component: str = "kube-proxy",
        clock: Callable[[], float] = time.monotonic,
        now_ns: Callable[[], int] = time.time_ns,
        retry_s: float = _RETRY_S,
    ) -> None:
        """Prepare; without a *connection* every Event is dropped.

        Args:
            connection: where Events are posted
            host: this host's name, part of reportingInstance
            component: reportingController; people filter by kube-proxy's
            clock: monotonic seconds
            now_ns: nanoseconds since the epoch
            retry_s: how long to wait after the API server could not be reached
        """
        self._connection = connection
        self._component = component
        self._instance = f"{component}-{host}"
        self._clock = clock
        self._now_ns = now_ns
        self._retry_s = retry_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._changed = threading.Condition()
        # Under the condition:
        self._queue: deque[_Series] = deque()
        self._dropped = 0
        self._series: dict[tuple[str, ...], _Series] = {}  # the one seen last comes last
        self._budgets: dict[tuple[str, ...], _Budget] = {}

    def start(self) -> None:
        if self._connection is not None:
            self._thread.start()

    def stop(self, timeout_s: float = 1.0) -> None:
        """End the thread; what is not posted by then is lost. Wait *timeout_s* for it at most."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def node_event(
        self, name: str, *, event_type: EventType, reason: str, action: str, note: str = ""
    ) -> None:
        """Record an Event about the Node *name*."""
        # With its name for a uid, as the kubelet's: `kubectl describe node` asks for that.
        regarding = {"kind": "Node", "apiVersion": "v1", "name": name, "uid": name}
        self._record(_NODE_NAMESPACE, regarding, event_type, reason, action, note)

    def service_event(
        self,
        namespace: str,
        name: str,
        *,
        event_type: EventType,
        reason: str,
        action: str,
        note: str = "",
    ) -> None:
        """Record an Event about a Service."""
        regarding = {"kind": "Service", "apiVersion": "v1", "namespace": namespace, "name": name}
        self._record(namespace, regarding, event_type, reason, action, note)

    def _record(
        self,
        namespace: str,
        regarding: dict[str, str],
        event_type: EventType,
        reason: str,
        action: str,
        note: str,
    ) -> None:
        if self._connection is None:
            return
        about = (regarding["kind"], namespace, regarding["name"])
        identity = (*about, event_type, reason, action, note)
        with self._changed:
            now, nanoseconds = self._clock(), self._now_ns()
            series = self._series.pop(identity, None)
            if series is not None and not series.is_over(now):
                self._series[identity] = series
                series.count += 1
                series.last_ns, series.seen_at = nanoseconds, now
                if series.count == 2:
                    self._enqueue(series)
                # What is to be posted later changes how long the thread may wait.
                self._changed.notify_all()
                return
            if series is not None and series.due_at() <= now:
                self._enqueue(series)
            if not self._may_record(about, now):
                self._dropped += 1
                return
            self._forget_old(now)
            series = _Series(
                {
                    "apiVersion": "events.k8s.io/v1",
                    "kind": "Event",
                    # client-go's scheme: unique for each object and moment.
                    "metadata": {
                        "name": f"{regarding['name']}.{nanoseconds:x}",
                        "namespace": namespace,
                    },
                    "eventTime": _micro_time(nanoseconds),
                    "reportingController": self._component,
                    "reportingInstance": self._instance,
                    "action": action,
                    "reason": reason,
                    "regarding": regarding,
                    "note": note.encode()[:_MAX_NOTE].decode(errors="ignore"),
                    "type": event_type,
                },
                nanoseconds,
                now,
            )
            self._series[identity] = series
            self._enqueue(series)

    def _enqueue(self, series: _Series) -> None:
        # Who waits already will be posted with the count of that moment.
        if series not in self._queue:
            if len(self._queue) == _QUEUE:
                self._queue.popleft()
                self._dropped += 1
            self._queue.append(series)
        self._changed.notify_all()

    def _may_record(self, about: tuple[str, ...], now: float) -> bool:
        budget = self._budgets.pop(about, _Budget(_BURST, now))
        left = budget.left(now)
        may = left >= 1
        self._budgets[about] = _Budget(left - may, now)
        if len(self._budgets) > _SERIES:
            del self._budgets[next(iter(self._budgets))]
        return may

    def _forget_old(self, now: float) -> None:
        # In order of time, so only what is to be forgotten is looked at.
        while self._series:
            identity, oldest = next(iter(self._series.items()))
            is_waiting = oldest.due_at() < float("inf") or oldest in self._queue
            if len(self._series) < _SERIES and (is_waiting or not oldest.is_over(now)):
                break
            del self._series[identity]

    def _run(self) -> None:
        while not self._stopped.is_set():
            with self._changed:
                self._enqueue_due()
                while not self._queue and not self._stopped.is_set():
                    self._changed.wait(self._until_due())
                    self._enqueue_due()
                if self._stopped.is_set():
                    return
                series = self._queue.popleft()
                count, last_ns = series.count, series.last_ns
                dropped, self._dropped = self._dropped, 0
            if dropped:
                log.warning("recorder.events_dropped", count=dropped)
            is_done = self._post(series, count, last_ns)
            with self._changed:
                if is_done:
                    series.posted_count, series.posted_at = count, self._clock()
                elif len(self._queue) < _QUEUE:
                    self._queue.appendleft(series)
                else:
                    self._dropped += 1
            if not is_done:
                self._stopped.wait(self._retry_s)

    def _until_due(self) -> float | None:
        due_at = min((series.due_at() for series in self._series.values()), default=float("inf"))
        return None if due_at == float("inf") else max(0.0, due_at - self._clock())

    def _enqueue_due(self) -> None:
        now = self._clock()
        for series in self._series.values():
            if series.due_at() <= now and series not in self._queue:
                self._queue.append(series)

    def _post(self, series: _Series, count: int, last_ns: int) -> bool:
        """Return False if trying again later may help."""
        assert self._connection is not None
        regarding = series.event["regarding"]
        repeated: dict[str, object] = {}
        if count > 1:
            repeated["series"] = {"count": count, "lastObservedTime": _micro_time(last_ns)}
        try:
            if "uid" not in regarding:
                regarding["uid"] = self._service_uid(regarding)
            if series.posted_count:
                try:
                    self._connection.patch(f"{series.path}/{series.name}", repeated)
                except api.Refused as error:
                    # Events live for an hour: this one is gone, its series is not.
                    if error.status != 404:
                        raise
                    self._connection.post(series.path, {**series.event, **repeated})
            else:
                self._connection.post(series.path, {**series.event, **repeated})
        except api.Refused as error:
            # No permission, or the namespace is being deleted: it will not be taken later either.
            if error.status < 500 and error.status != 429:
                log.warning("recorder.event_refused", name=series.name, error=str(error))
                return True
            return False
        except errors.ApiError as error:
            log.debug("recorder.post_failed", error=str(error))
            return False
        return True

    def _service_uid(self, regarding: dict[str, str]) -> str:
        """Return the uid of a Service, by which `kubectl describe` finds Events; "": it is unknown.

        Asked for when it is needed, which is hardly ever: keeping those of all would cost memory.
        """
        assert self._connection is not None
        path = f"/api/v1/namespaces/{regarding['namespace']}/services"
        # A list, because nodes may list Services and not get them (system:node-proxier).
        query = {"fieldSelector": f"metadata.name={regarding['name']}"}
        try:
            with self._connection.get(path, query) as response:
                found = _UIDS_DECODER.decode(response.read()).items
        except (api.Refused, *api.UNREADABLE):
            return ""
        return found[0].metadata.uid if found else ""


class _Metadata(msgspec.Struct):
    uid: str = ""


class _Object(msgspec.Struct):
    metadata: _Metadata


class _Objects(msgspec.Struct):
    items: list[_Object] | None = None


# Before there are threads, see watch.py.
_UIDS_DECODER: Final = msgspec.json.Decoder(_Objects)


def _micro_time(nanoseconds: int) -> str:
    """Render a meta/v1 MicroTime."""
    moment = dt.datetime.fromtimestamp(nanoseconds // 1_000_000_000, tz=dt.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{nanoseconds // 1000 % 1_000_000:06d}Z"
