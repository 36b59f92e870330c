"""What is put together to count; what it counts is in test_traffic_meter.py and tests/packet."""

import pytest

from kubeproxy_py import flow_meter, label_selector, traffic_counting
from kubeproxy_py.flags import Traffic
from kubeproxy_py.model import IPFamily
from kubeproxy_py.store import Store
from tests.support.fake_iptables import FakeIptables

V4, V6 = IPFamily.V4, IPFamily.V6


@pytest.fixture
def start(metrics):
    """Return a function that begins to count on two fake kernels; it is stopped in the end."""
    started = []

    def start(**settings):
        kernels = {V4: FakeIptables(), V6: FakeIptables()}
        for kernel in kernels.values():
            # Its counters are read when somebody scrapes; nobody does.
            kernel.backend = "nft"
        store = Store(
            node_name="node1",
            families=list(kernels),
            metrics=metrics,
            report=lambda problem: None,
            changed=lambda family: None,
            node_changed=lambda node: None,
        )
        started.append(
            traffic_counting.start(Traffic(max_series=10), kernels, store, metrics, **settings)
        )
        return started[-1]

    yield start
    for counting in started:
        counting.stop()


def test_every_family_has_a_meter_and_all_are_shown(start, metrics):
    counting = start(has_accounting=False)

    assert counting.meters.keys() == {V4, V6}
    assert "kubeproxy_service_connections_total" in metrics.registry._names_to_collectors


def test_without_accounting_there_are_no_flows_to_count(start):
    counting = start(has_accounting=False)
    counting.outdate()

    assert counting.flow_meter is None


def test_rules_are_counted_where_the_kernel_does_not_tell_of_connections(start, monkeypatch):
    def refuse(meter):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(flow_meter.FlowMeter, "start", refuse)
    counting = start(has_accounting=True)

    assert counting.flow_meter is None
    assert counting.meters.keys() == {V4, V6}


@pytest.mark.parametrize(
    ("text", "is_selected"), [("team=web", True), ("team=db", False)], ids=["matches", "does not"]
)
def test_a_selector_chooses_by_labels(text, is_selected):
    asked = Traffic(max_series=10, selector=label_selector.parse(text))

    assert asked.selects({"team": "web"}) is is_selected


def test_without_a_selector_nobody_is_asked():
    assert Traffic(max_series=10).selects is None
