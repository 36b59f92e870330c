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
from typing import Final, Literal

import structlog

from kubeproxy_py import api, errors

log = structlog.get_logger()

EventType = Literal["Normal", "Warning"]

# Enough for a bad start on a big cluster; in a longer outage the latest are the useful ones.
_QUEUE: Final = 100
# A loop that reports the same every second is worth one Event a minute.
_REPEAT_S: Final = 60.0
# The API server is away: a look every ten seconds delivers late, but costs nothing.
_RETRY_S: Final = 10.0
# events.k8s.io refuses longer notes.
_MAX_NOTE: Final = 1024
# Node Events stand in this namespace, as the kubelet's do: a Node has none of its own.
_NODE_NAMESPACE: Final = "default"


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
        self._queue: deque[dict[str, object]] = deque()
        self._dropped = 0
        self._recorded_at: dict[tuple[str, ...], float] = {}

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
        regarding = {"kind": "Node", "apiVersion": "v1", "name": name}
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
        identity = (regarding["kind"], namespace, regarding["name"], reason, note)
        with self._changed:
            if not self._is_new(identity):
                return
            if len(self._queue) == _QUEUE:
                self._queue.popleft()
                self._dropped += 1
            nanoseconds = self._now_ns()
            self._queue.append(
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
                }
            )
            self._changed.notify_all()

    def _is_new(self, identity: tuple[str, ...]) -> bool:
        now = self._clock()
        # In order of time, so only what is to be forgotten is looked at.
        while self._recorded_at:
            oldest, at = next(iter(self._recorded_at.items()))
            if now - at < _REPEAT_S:
                break
            del self._recorded_at[oldest]
        if identity in self._recorded_at:
            return False
        self._recorded_at[identity] = now
        return True

    def _run(self) -> None:
        while not self._stopped.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopped.is_set())
                if self._stopped.is_set():
                    return
                event = self._queue.popleft()
                dropped, self._dropped = self._dropped, 0
            if dropped:
                log.warning("recorder.events_dropped", count=dropped)
            if not self._post(event):
                with self._changed:
                    if len(self._queue) < _QUEUE:
                        self._queue.appendleft(event)
                    else:
                        self._dropped += 1
                self._stopped.wait(self._retry_s)

    def _post(self, event: dict[str, object]) -> bool:
        """Return False if trying again later may help."""
        assert self._connection is not None
        metadata = event["metadata"]
        assert isinstance(metadata, dict)
        path = f"/apis/events.k8s.io/v1/namespaces/{metadata['namespace']}/events"
        try:
            self._connection.post(path, event)
        except api.Refused as error:
            # No permission, or the namespace is being deleted: it will not be taken later either.
            if error.status < 500 and error.status != 429:
                log.warning("recorder.event_refused", name=metadata["name"], error=str(error))
                return True
            return False
        except errors.ApiError as error:
            log.debug("recorder.post_failed", error=str(error))
            return False
        return True


def _micro_time(nanoseconds: int) -> str:
    """Render a meta/v1 MicroTime."""
    moment = dt.datetime.fromtimestamp(nanoseconds // 1_000_000_000, tz=dt.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{nanoseconds // 1000 % 1_000_000:06d}Z"
