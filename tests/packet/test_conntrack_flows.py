"""UDP flows when endpoints change, with the daemon: they leave who is gone, and nobody else."""

import contextlib
import re

import pytest

from kubeproxy_py.model import IPFamily
from tests.support.object_files import ObjectFiles
from tests.support.proxy import running
from tests.support.scenario import NODE_PORT, endpoint, service
from tests.support.traffic import connect

pytestmark = pytest.mark.packet

CLIENT_PORT = 5353
OTHER_CLIENT_PORT = 5354


@pytest.fixture
def files(tmp_path):
    return ObjectFiles(tmp_path)


@pytest.fixture
def start(clean_lab, servers, backend, files, tmp_path):
    """Start the daemon once *files* are written; give a function."""
    with contextlib.ExitStack() as running_:

        def start():
            arguments = (clean_lab, backend, tmp_path / "log", f"--manifests={files.directory}")
            proxy = running_.enter_context(running(*arguments))
            proxy.wait_synced()
            return proxy

        yield start


def dns(plan, *endpoints, **fields):
    return service(
        plan,
        *endpoints,
        protocol="UDP",
        node_port=NODE_PORT,
        type="LoadBalancer",
        lb_ips=[plan.lb_vip],
        externalIPs=[plan.external_ip],
        **fields,
    )


def front_doors(plan):
    return [
        (plan.cluster_ip, 80),
        (plan.external_ip, 80),
        (plan.lb_vip, 80),
        (plan.node, NODE_PORT),
    ]


def flow_identity(node, family, client_port):
    """Return the kernel's number for the flow from *client_port*; None if it has none."""
    name = "ipv4" if family is IPFamily.V4 else "ipv6"
    listed = node.run(["conntrack", "-L", "-f", name, "-p", "udp", "-o", "id"]).stdout
    found = re.search(rf" sport={client_port} .*\bid=(\d+)", listed)
    return found and found[1]


def wait_for_cleaning(proxy, family, change):
    """Make *change* and wait until conntrack has been compared with what came of it."""

    def cleanings():
        return [
            event
            for event in proxy.events("conntrack.reconciled")
            if event["ip_family"] == family.value
        ]

    before = len(cleanings())
    change()
    proxy.wait(lambda: len(cleanings()) > before)


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
def test_a_flow_moves_when_its_endpoint_goes(start, files, lab, plan, policy):
    """The client never falls silent, so its entry would never expire."""
    policies = {"externalTrafficPolicy": policy, "internalTrafficPolicy": policy}
    files.write(dns(plan, "pod1", **policies))
    proxy = start()
    doors = front_doors(plan)

    def ask(door):
        # A flow that is on its way to nobody is soon given up.
        return connect(lab.outside, *door, "udp", source_port=CLIENT_PORT, timeout_s=0.2).server

    assert {ask(door) for door in doors} == {"pod1"}
    files.write(dns(plan, "pod2", **policies))
    for door in doors:
        proxy.wait(lambda door=door: ask(door) == "pod2")


def test_a_flow_of_the_node_itself_moves(start, files, lab, plan):
    files.write(dns(plan, "pod1"))
    proxy = start()

    def ask():
        door = (plan.cluster_ip, 80)
        return connect(lab.node, *door, "udp", source_port=CLIENT_PORT, timeout_s=0.2).server

    assert ask() == "pod1"
    files.write(dns(plan, "pod2"))
    proxy.wait(lambda: ask() == "pod2")


def test_a_flow_moves_when_the_endpoint_changes_its_port(start, files, lab, plan):
    files.write(dns(plan, "pod1", target_port=80))
    proxy = start()

    def ask():
        door = (plan.node, NODE_PORT)
        outcome = connect(lab.outside, *door, "udp", source_port=CLIENT_PORT, timeout_s=0.2)
        return outcome.server_port

    assert ask() == 80
    files.write(dns(plan, "pod1", target_port=8080))
    proxy.wait(lambda: ask() == 8080)


def test_flows_that_are_none_of_its_business_stay(start, files, lab, family, plan):
    files.write(dns(plan, "pod1"))
    proxy = start()
    connect(lab.outside, plan.cluster_ip, 80, "udp", source_port=CLIENT_PORT)
    connect(lab.outside, plan.local_pod(2), 81, "udp", source_port=OTHER_CLIENT_PORT)
    ports = (CLIENT_PORT, OTHER_CLIENT_PORT)
    before = [flow_identity(lab.node, family, port) for port in ports]
    wait_for_cleaning(proxy, family, lambda: files.write(dns(plan, "pod1", "pod2")))
    wait_for_cleaning(proxy, family, lambda: files.write(dns(plan, "pod1", "remote1")))

    assert None not in before
    assert [flow_identity(lab.node, family, port) for port in ports] == before


def test_a_flow_to_an_endpoint_that_still_serves_stays(start, files, lab, family, plan):
    """What is on its way is finished while the endpoint terminates."""
    files.write(dns(plan, "pod1"))
    proxy = start()
    connect(lab.outside, plan.cluster_ip, 80, "udp", source_port=CLIENT_PORT)
    before = flow_identity(lab.node, family, CLIENT_PORT)
    leaving = endpoint(plan, "pod1", ready=False, serving=True, terminating=True)
    wait_for_cleaning(proxy, family, lambda: files.write(dns(plan, leaving, "pod2")))

    assert flow_identity(lab.node, family, CLIENT_PORT) == before
    again = connect(lab.outside, plan.cluster_ip, 80, "udp", source_port=CLIENT_PORT)
    assert again.server == "pod1"
