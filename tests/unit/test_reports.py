"""What is told of what happens: log lines, Events, counts."""

import pytest
from structlog.testing import capture_logs

from kubeproxy_py import drift
from kubeproxy_py.external import Refusal
from kubeproxy_py.lookout import Notice
from kubeproxy_py.model import IPFamily, Problem, ServiceName
from kubeproxy_py.reports import Reporter
from kubeproxy_py.sync_log import SyncResult

V4 = IPFamily.V4
WEB = ServiceName("shop", "web")


class Events:
    """What a Recorder is given, with the object that it is about."""

    def __init__(self):
        self.posted = []

    def node_event(self, name, *, event_type, reason, action, note=""):
        self.posted.append((name, event_type, reason, action, note))

    def service_event(self, namespace, name, *, event_type, reason, action, note=""):
        self.posted.append((f"{namespace}/{name}", event_type, reason, action, note))


@pytest.fixture
def events():
    return Events()


@pytest.fixture
def reporter(metrics, events):
    return Reporter("node1", metrics, events)


def result(**changes):
    nothing = {
        "is_full": False,
        "batches": 0,
        "rules_written": {},
        "chains_written": 0,
        "chains_deleted": 0,
        "seconds": 0.1,
    }
    return SyncResult(**{**nothing, **changes})


@pytest.mark.usefixtures("reporter")
@pytest.mark.parametrize("kind", ["Node", "Service", "EndpointSlice", "File"])
def test_invalid_objects_count_from_zero_so_that_an_alert_sees_the_first(metrics, kind):
    value = metrics.registry.get_sample_value("kubeproxy_invalid_objects_total", {"kind": kind})

    assert value == 0


def test_an_invalid_object_is_counted_and_named(metrics, reporter, events):
    problem = Problem(
        kind="Service", namespace="shop", name="web", field="spec.clusterIP", message="no IP"
    )
    with capture_logs() as logs:
        reporter.invalid(problem)

    assert logs == [
        {
            "event": "object.invalid",
            "log_level": "warning",
            "kind": "Service",
            "namespace": "shop",
            "name": "web",
            "field": "spec.clusterIP",
            "message": "no IP",
        }
    ]
    assert events.posted == []
    kinds = {"kind": "Service"}
    assert metrics.registry.get_sample_value("kubeproxy_invalid_objects_total", kinds) == 1


def test_no_name_makes_a_log_line_of_megabytes(reporter):
    huge = "x" * 1_000_000
    with capture_logs() as logs:
        reporter.invalid(
            Problem(kind="Service", namespace=huge, name=huge, field=huge, message=huge)
        )

    assert len(str(logs)) < 3000


def test_a_refused_address_is_counted_logged_and_told_on_its_service(metrics, reporter, events):
    refusal = Refusal(WEB, "spec.externalIPs", "10.96.0.1", 0, "cluster_ip", "is somebody else's")
    with capture_logs() as logs:
        reporter.refused(refusal)

    (entry,) = logs
    assert (entry["event"], entry["name"], entry["address"], entry["port"]) == (
        "service.address_refused", "web", "10.96.0.1", None,
    )  # fmt: skip
    assert events.posted == [
        (
            "shop/web", "Warning", "AddressRefused", "Sync",
            "node node1 does not serve this Service's address: "
            "spec.externalIPs: 10.96.0.1 is somebody else's",
        )
    ]  # fmt: skip
    reasons = {"reason": "cluster_ip"}
    assert metrics.registry.get_sample_value("kubeproxy_external_ips_refused_total", reasons) == 1


def test_a_notice_is_logged_and_told_on_its_service(reporter, events):
    with capture_logs() as logs:
        reporter.doubtful(Notice(WEB, "Warning", "NodePortTaken", "Look", "sshd listens"))

    assert [(entry["event"], entry["reason"]) for entry in logs] == [
        ("service.doubtful", "NodePortTaken")
    ]
    assert events.posted == [
        ("shop/web", "Warning", "NodePortTaken", "Look", "node node1: sshd listens")
    ]


def test_a_quarantined_service_is_told_in_as_many_words_as_an_event_takes(reporter, events):
    reporter.quarantined(WEB, "no such match " * 200)

    ((about, *_, reason, _, note),) = events.posted
    assert (about, reason) == ("shop/web", "RulesRefused")
    assert note.startswith("node node1 cannot program this Service: no such match")
    assert len(note) == 1024


def test_a_health_check_port_that_cannot_be_opened_is_told_as_kube_proxy_does(reporter, events):
    reporter.listen_failed(WEB, 30001, "address in use")

    assert events.posted == [
        (
            "shop/web", "Warning", "FailedToStartServiceHealthcheck", "Listen",
            'node node1 failed to start healthcheck "shop/web" on port 30001: address in use',
        )
    ]  # fmt: skip


def test_each_repair_is_told_on_the_node(reporter, events):
    repairs = tuple(
        drift.Repair(V4, table, "chain_flushed", 1, ("KUBE-SERVICES",), ())
        for table in ("filter", "nat")
    )
    reporter.synced(V4, result(batches=1, repairs=repairs))

    assert [(about, reason) for about, _, reason, *_ in events.posted] == [
        ("node1", "RulesRepaired")
    ] * 2


@pytest.mark.parametrize(
    ("found", "batches", "reasons"),
    [(0, 3, []), (40, 0, []), (40, 1, ["RulesAdopted"])],
    ids=["nothing was there", "all was right", "some was not"],
)
def test_rules_from_before_are_told_if_any_were_not_right(
    reporter, events, found, batches, reasons
):
    reporter.synced(V4, result(chains_found=found, batches=batches))

    assert [reason for _, _, reason, *_ in events.posted] == reasons


def test_a_contest_is_told_on_the_node(reporter, events):
    reporter.contested(V4, drift.Contest(None, (), 1.0))

    assert [(about, reason) for about, _, reason, *_ in events.posted] == [
        ("node1", "RulesContested")
    ]
