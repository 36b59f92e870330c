"""
What happens to objects, Services and rules → log lines, Events and counts, for those who look after a node.

Decides nothing and waits for nothing: whoever has something to tell goes on at once.
"""

from typing import Final, get_args

import structlog

from kubeproxy_py import drift, external, lookout, node_events, recorder, sync_log
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily, Kind, Problem, ServiceName

log = structlog.get_logger()

# What the API takes as the note of an Event.
_MAX_NOTE: Final = 1024
# What a log line shows of a name that may be megabytes long.
_MAX_NAME: Final = 253


class Reporter:
    """Tells of what happens on the node *node_name*. From any thread."""

    def __init__(self, node_name: str, metrics: Metrics, events: recorder.Recorder) -> None:
        self._node_name = node_name
        self._metrics = metrics
        self._events = events
        # From 0 on, or Prometheus takes the first that is invalid for no increase.
        for kind in (*get_args(Kind), "File"):
            metrics.invalid_objects.labels(kind)

    def invalid(self, problem: Problem) -> None:
        """Tell what was left out of an object, or that all of it was."""
        self._metrics.invalid_objects.labels(problem.kind).inc()
        log.warning(
            "object.invalid",
            kind=problem.kind,
            namespace=problem.namespace[:_MAX_NAME],
            name=problem.name[:_MAX_NAME],
            field=problem.field[:_MAX_NAME],
            message=problem.message[:_MAX_NOTE],
        )

    def refused(self, refusal: external.Refusal) -> None:
        """Tell that an external address of a Service is not served."""
        self._metrics.external_ips_refused.labels(refusal.reason).inc()
        log.warning(
            "service.address_refused",
            namespace=refusal.service.namespace,
            name=refusal.service.name,
            field=refusal.field,
            address=refusal.ip,
            port=refusal.port or None,
            reason=refusal.reason,
            message=refusal.message,
        )
        self._events.service_event(
            refusal.service.namespace,
            refusal.service.name,
            event_type="Warning",
            reason="AddressRefused",
            action="Sync",
            note=f"node {self._node_name} does not serve this Service's address: {refusal.where}",
        )

    def doubtful(self, notice: lookout.Notice) -> None:
        """Tell that a Service and this host take something from each other."""
        log.warning(
            "service.doubtful",
            namespace=notice.service.namespace,
            name=notice.service.name,
            reason=notice.reason,
            message=notice.note,
        )
        self._events.service_event(
            notice.service.namespace,
            notice.service.name,
            event_type=notice.event_type,
            reason=notice.reason,
            action=notice.action,
            note=f"node {self._node_name}: {notice.note}",
        )

    def quarantined(self, service: ServiceName, reason: str) -> None:
        """Tell that the kernel refuses a Service's rules; the log has it already."""
        self._events.service_event(
            service.namespace,
            service.name,
            event_type="Warning",
            reason="RulesRefused",
            action="Sync",
            note=f"node {self._node_name} cannot program this Service: {reason}"[:_MAX_NOTE],
        )

    def listen_failed(self, service: ServiceName, port: int, error: str) -> None:
        """Tell that a health check node port cannot be opened; the log has it already."""
        self._events.service_event(
            service.namespace,
            service.name,
            event_type="Warning",
            reason="FailedToStartServiceHealthcheck",
            action="Listen",
            note=f'node {self._node_name} failed to start healthcheck "{service}" on port {port}: '
            f"{error}",
        )

    def synced(self, family: IPFamily, result: sync_log.SyncResult) -> None:
        """Tell what a sync repaired, or made of rules that it found; the log has it already."""
        for repair in result.repairs:
            self.post(node_events.repaired(repair))
        if result.chains_found and result.batches:
            self.post(
                node_events.adopted(
                    family,
                    found=result.chains_found,
                    written=result.chains_written,
                    deleted=result.chains_deleted,
                )
            )

    def contested(self, family: IPFamily, contest: drift.Contest) -> None:
        """Tell that somebody fights with us; the log has it already."""
        self.post(node_events.contested(family, contest))

    def post(self, event: node_events.NodeEvent) -> None:
        """Post *event* on this Node."""
        self._events.node_event(
            self._node_name,
            event_type=event.event_type,
            reason=event.reason,
            action=event.action,
            note=event.note,
        )
