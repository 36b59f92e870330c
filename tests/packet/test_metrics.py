"""What monitoring asks for is there on /metrics of a daemon that runs."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import prometheus
from tests.support.api_server import ApiServer
from tests.support.builders import cluster, make_node
from tests.support.proxy import running

pytestmark = pytest.mark.packet


def test_every_metric_of_alerts_and_dashboard_is_served(clean_lab, backend, tmp_path):
    queries = [*(query for _, query in prometheus.queries()), *(rule["expr"] for rule in prometheus.rules())]  # fmt: skip
    recorded = {rule["record"] for rule in prometheus.rules() if "record" in rule}
    wanted = set().union(*map(prometheus.metric_names, queries)) - recorded - {"up"}
    with clean_lab.node.entered():
        api = ApiServer()
    with api:
        api.apply(make_node("node1"))
        api.apply_many(cluster(3, 2))
        kubeconfig = api.kubeconfig(tmp_path / "kubeconfig")
        arguments = (f"--kubeconfig={kubeconfig}", "--traffic-metrics=service")
        with running(clean_lab, backend, tmp_path / "log", *arguments) as proxy:
            proxy.wait_synced()
            text = proxy.get("/metrics")[1]

    # A family that has no sample yet is there with its type.
    served = {family.name for family in text_string_to_metric_families(text)}
    served |= {f"{name}_total" for name in served}
    assert {re.sub("_(bucket|count|sum)$", "", name) for name in wanted} <= served
