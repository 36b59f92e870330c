"""How many rules a cluster costs, and that this grows no faster than the cluster."""

import pytest

from kubeproxy_py.model import (
    Endpoint,
    IPFamily,
    PortKey,
    ServiceName,
    ServicePort,
    ServicePortName,
    ServiceState,
)
from kubeproxy_py.rules import FILTER, NAT
from kubeproxy_py.ruleset import Ruleset
from tests.support import states

KEY = PortKey("", "tcp")
# One rule of KUBE-FIREWALL and three of KUBE-FORWARD; one of KUBE-MARK-MASQ, three of
# KUBE-POSTROUTING and the jump to the node ports.
BASE = {FILTER: 4, NAT: 5}
LOAD_BALANCER = {
    "node_port": 30000,
    "external_ips": ("192.168.99.22",),
    "lb_vips": ("1.2.3.4",),
    "source_ranges": ("203.0.113.0/25",),
    "is_externally_accessible": True,
}


def rule_counts(services, endpoints, **fields):
    ruleset = Ruleset(states.golden_options(IPFamily.V4))
    ruleset.apply(
        {
            ServiceName("ns", f"svc{number}"): ServiceState(
                {
                    KEY: ServicePort(
                        name=ServicePortName("ns", f"svc{number}", "", "tcp"),
                        cluster_ip=f"172.30.{number}.1",
                        port=80,
                        **fields,
                    )
                },
                {KEY: tuple(Endpoint(f"10.0.{number}.{n}", 80) for n in range(1, endpoints + 1))},
            )
            for number in range(services)
        }
    )
    return {table: ruleset.rule_count(table) - BASE[table] for table in (FILTER, NAT)}


@pytest.mark.parametrize("services", [0, 1, 10])
@pytest.mark.parametrize("endpoints", [0, 1, 2, 10])
def test_cluster_ip_services_cost_what_they_cost_with_kube_proxy(services, endpoints):
    each = {FILTER: 0, NAT: 2 + 3 * endpoints} if endpoints else {FILTER: 1, NAT: 0}

    assert rule_counts(services, endpoints) == {
        table: services * count for table, count in each.items()
    }


@pytest.mark.parametrize("services", [0, 1, 10])
@pytest.mark.parametrize("endpoints", [0, 1, 2, 10])
def test_load_balancers_cost_what_they_cost_with_kube_proxy(services, endpoints):
    each = {FILTER: 1, NAT: 10 + 3 * endpoints} if endpoints else {FILTER: 4, NAT: 0}

    assert rule_counts(services, endpoints, **LOAD_BALANCER) == {
        table: services * count for table, count in each.items()
    }
