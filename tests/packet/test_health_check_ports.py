"""Health check node ports, with the daemon: what a load balancer asks, and what it is told."""

import http.client
import json

import pytest

from tests.support.object_files import ObjectFiles
from tests.support.proxy import running
from tests.support.scenario import endpoint, service
from tests.support.traffic import connect

pytestmark = pytest.mark.packet

HEALTH_CHECK_PORT = 31999
WEIGHT = "X-Load-Balancing-Endpoint-Weight"


@pytest.fixture
def files(tmp_path):
    return ObjectFiles(tmp_path)


@pytest.fixture
def proxy(clean_lab, servers, backend, files, plan, tmp_path):
    """Give a daemon that has served one local endpoint and one on another node."""
    files.write(balanced(plan, "pod1", "remote1"))
    with running(clean_lab, backend, tmp_path / "log", f"--manifests={files.directory}") as started:
        started.wait_synced()
        yield started


def balanced(plan, *endpoints, **fields):
    return service(
        plan,
        *endpoints,
        **{
            "type": "LoadBalancer",
            "lb_ips": [plan.lb_vip],
            "node_port": 30080,
            "externalTrafficPolicy": "Local",
            "healthCheckNodePort": HEALTH_CHECK_PORT,
        }
        | fields,
    )


def ask(lab, plan, path="/"):
    """Return status, headers and body, as an outside load balancer gets them."""
    with lab.outside.entered():
        connection = http.client.HTTPConnection(plan.node, HEALTH_CHECK_PORT, timeout=5)
        connection.connect()
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


def status(lab, plan):
    """Return the status and the weight; (0, "") where nobody listens."""
    try:
        code, headers, _body = ask(lab, plan)
    except ConnectionRefusedError:
        return 0, ""
    except ConnectionResetError:
        return 0, "closed while we asked"
    return code, headers[WEIGHT]


def test_it_tells_the_endpoints_of_this_node(proxy, clean_lab, plan):
    code, headers, body = ask(clean_lab, plan, "/any/path")

    assert code == 200
    assert headers[WEIGHT] == "1"
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert json.loads(body) == {
        "service": {"namespace": "default", "name": "web"},
        "localEndpoints": 1,
        "serviceProxyHealthy": True,
    }


def test_its_count_follows_the_endpoints(proxy, clean_lab, files, plan):
    files.write(balanced(plan, "pod1", "pod2"))
    proxy.wait(lambda: status(clean_lab, plan) == (200, "2"))
    files.write(balanced(plan, "remote1"))
    proxy.wait(lambda: status(clean_lab, plan) == (503, "0"))


def test_it_fails_while_terminating_endpoints_still_serve(proxy, clean_lab, files, plan):
    """So the load balancer goes elsewhere while what it sends here is still answered."""
    leaving = endpoint(plan, "pod1", ready=False, serving=True, terminating=True)
    files.write(balanced(plan, leaving, "remote1"))
    proxy.wait(lambda: status(clean_lab, plan) == (503, "0"))

    assert connect(clean_lab.outside, plan.lb_vip, 80).server == "pod1"


def test_it_is_closed_with_the_cluster_policy_and_opened_again(proxy, clean_lab, files, plan):
    files.write(balanced(plan, "pod1", externalTrafficPolicy="Cluster"))
    proxy.wait(lambda: status(clean_lab, plan) == (0, ""))
    files.write(balanced(plan, "pod1"))
    proxy.wait(lambda: status(clean_lab, plan) == (200, "1"))
