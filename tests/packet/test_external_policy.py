"""Refused external addresses on a real kernel: the hijack does not work, and the rest does."""

import json
import socket

import pytest

from tests.support.addresses import V4
from tests.support.api_server import ApiServer
from tests.support.builders import make_node, make_port, make_service, make_slice
from tests.support.proxy import running
from tests.support.traffic import connect

pytestmark = pytest.mark.packet


@pytest.fixture
def files(tmp_path):
    """Give a directory of manifests, and a function that puts objects there."""
    directory = tmp_path / "objects"
    directory.mkdir()

    def put(name, *items):
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(items)})
        path = directory / f"{name}.json"
        new = path.with_suffix(".new")
        new.write_text(text)
        new.replace(path)  # a rename, so that no half of it is read

    put.directory = directory
    return put


def test_a_hijack_of_another_service_does_not_work_and_ends_with_its_cause(
    clean_lab, servers, files, backend, family, plan, tmp_path
):
    """CVE-2020-8554: external IPs that are somebody else's cluster IP."""
    lab = clean_lab
    victim, thief = (lab.local_pods[0], lab.local_pods[1])
    stolen = plan.cluster_ip
    own = plan.cluster_ip[:-2] + "42"
    files(
        "thief",
        make_service("thief", cluster_ip=own, externalIPs=[stolen, plan.external_ip], ports=[80]),
        make_slice("thief", endpoints=[thief.address(family)]),
    )
    arguments = f"--manifests={files.directory}"
    client = lab.remote_pods[0]
    with running(lab, backend, tmp_path / "log", arguments) as proxy:
        proxy.wait_synced()
        # Nobody has it yet, so nobody is robbed.
        assert connect(lab.node, stolen, 80).server == thief.name

        files(
            "victim",
            make_service("victim", cluster_ip=stolen),
            make_slice("victim", endpoints=[victim.address(family)]),
        )
        proxy.wait(lambda: connect(lab.node, stolen, 80).server == victim.name)
        assert {connect(lab.node, stolen, 80).server for _ in range(5)} == {victim.name}
        assert connect(client, plan.external_ip, 80).server == thief.name
        (told,) = proxy.events("service.address_refused")
        assert (told["name"], told["address"], told["reason"]) == ("thief", stolen, "cluster_ip")
        labels = {"ip_family": family.value, "reason": "cluster_ip"}
        assert proxy.metric("kubeproxy_shadowing_services", **labels) == 1
        assert proxy.metric("kubeproxy_external_ips_refused_total", reason="cluster_ip") == 1

        (files.directory / "victim.json").unlink()
        proxy.wait(lambda: connect(lab.node, stolen, 80).server == thief.name)
        assert proxy.metric("kubeproxy_shadowing_services", **labels) == 0


def test_a_refusal_is_an_event_on_the_service(clean_lab, tmp_path):
    with clean_lab.node.entered():
        server = ApiServer()
    with server:
        server.apply(make_node())
        server.apply(make_service("web", externalIPs=["198.51.100.1"]))
        kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
        flags = (f"--kubeconfig={kubeconfig}", "--external-ips-allow=192.0.2.0/24")
        with running(clean_lab, "nft", tmp_path / "log", *flags) as proxy:
            proxy.wait_synced()
            server.wait_for(lambda: len(server.objects("Event")) == 2, 20)
        events = {event["reason"]: event for event in server.objects("Event")}

    event = events["AddressRefused"]
    assert event["regarding"]["name"] == "web"
    assert event["type"] == "Warning"
    assert event["note"] == (
        "node node1 does not serve this Service's address: "
        "spec.externalIPs: 198.51.100.1 is outside of --external-ips-allow"
    )


def test_a_taken_node_port_and_a_shadowed_address_are_told(clean_lab, tmp_path):
    """Both are served: what is told is for the people who wonder where their connections went."""
    with clean_lab.node.entered():
        server = ApiServer()
        taken = socket.create_server(("0.0.0.0", 30080))
    with server, taken:
        server.apply(make_node())
        ports = [make_port(80, nodePort=30080)]
        server.apply(make_service("web", type="NodePort", ports=ports, externalIPs=[V4.node]))
        server.apply(make_slice("web"))
        kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
        with running(clean_lab, "nft", tmp_path / "log", f"--kubeconfig={kubeconfig}") as proxy:
            proxy.wait(lambda: len(proxy.events("service.doubtful")) == 2, 30)
            server.wait_for(lambda: len(server.objects("Event")) == 3, 20)
            assert proxy.metric("kubeproxy_node_port_collisions") == 1
            shadowing = {"reason": "node_address", "ip_family": "IPv4"}
            assert proxy.metric("kubeproxy_shadowing_services", **shadowing) == 1
            served = proxy.live()["nat"]["KUBE-SERVICES"]
        events = {event["reason"]: event["note"] for event in server.objects("Event")}

    assert any(f"-d {V4.node}/32" in rule and "external IP" in rule for rule in served)
    assert "python listens on 0.0.0.0" in events["NodePortTaken"]
    assert V4.node in events["AddressShadowed"]


def test_an_address_that_became_the_node_s_after_the_start_is_told(clean_lab, tmp_path):
    with clean_lab.node.entered():
        server = ApiServer()
    with server:
        server.apply(make_node(ips=[V4.node]))
        server.apply(make_service("web", externalIPs=[V4.node_alternate]))
        # Services come last: that is when the first look is.
        server.fail(500, resource="services")
        kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
        with running(clean_lab, "nft", tmp_path / "log", f"--kubeconfig={kubeconfig}") as proxy:
            proxy.wait(lambda: "programming Services" in proxy.ask().stdout)
            server.apply(make_node(ips=[V4.node_alternate]))
            proxy.wait(lambda: bool(proxy.events("node.ips_changed")))
            server.heal()
            proxy.wait(lambda: bool(proxy.events("service.doubtful")), 30)

            assert V4.node_alternate in str(proxy.events("service.doubtful"))
