"""What the kernel lists and tells of connections, on its own table: the filters, both families, many."""

import itertools

import pytest
from prometheus_client import CollectorRegistry

from kubeproxy_py import sysctls
from kubeproxy_py.flow_meter import FlowMeter
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily, ServicePort, ServicePortName
from tests.support import tracked
from tests.support.addresses import PLANS
from tests.support.traffic import wait_until

pytestmark = pytest.mark.packet

DNS = ServicePortName("kube-system", "dns", "dns", "udp")
COUNT = 1000


def flows(family, is_rewritten, first=0):
    plan = PLANS[family]
    vip, pod = tracked.packed(plan.cluster_ip, 53), tracked.packed(plan.local_pod(1), 5353)
    for client in itertools.islice(tracked.clients(plan.outside), first, first + COUNT):
        yield tracked.Flow(client, vip, pod, is_rewritten=is_rewritten)


@pytest.fixture
def node(clean_lab):
    """Run the test inside of the node, with accounting switched on."""
    with clean_lab.node.entered():
        assert sysctls.ensure_conntrack_accounting()
        yield clean_lab.node
    clean_lab.node.write_sysctls({"net/netfilter/nf_conntrack_acct": "0"})


@pytest.fixture
def metrics():
    return Metrics(CollectorRegistry())


@pytest.fixture
def meter(node, metrics):
    meter = FlowMeter(
        lambda family: [ServicePort(name=DNS, cluster_ip=PLANS[family].cluster_ip, port=53)],
        lambda _family: [],
        families=list(IPFamily),
        metrics=metrics,
    )
    meter.start()
    yield meter
    meter.stop()


def test_the_kernel_passes_on_what_was_rewritten_and_no_more(node, meter, metrics, monkeypatch):
    seen = []
    parse = meter._parse
    monkeypatch.setattr(meter, "_parse", lambda *args: seen.append(parse(*args)) or seen[-1])

    def kept():
        assert meter.look()
        return metrics.registry.get_sample_value("kubeproxy_traffic_flows", {"state": "tracked"})

    assert kept() == 0
    for family in IPFamily:
        tracked.insert(family, flows(family, is_rewritten=True))
        tracked.insert(family, flows(family, is_rewritten=False, first=COUNT))
    assert kept() == 2 * COUNT
    # All are connections to the Service, told apart from each other; others were not even listed.
    assert len(seen) == len({found[0] for found in seen}) == 2 * COUNT
    node.run(["conntrack", "-F"])
    node.run(["conntrack", "-F", "-f", "ipv6"])
    wait_until(lambda: kept() == 0, timeout_s=60, what="the end of all connections")

    # Each ended as the connection that was listed.
    assert len(seen) == 4 * COUNT
    assert len({found[0] for found in seen}) == 2 * COUNT
    assert metrics.registry.get_sample_value("kubeproxy_traffic_flow_events_lost_total") == 0
