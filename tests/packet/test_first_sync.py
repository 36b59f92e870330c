"""What works already while the first sync still writes."""

import pytest

from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS
from tests.support.api_server import ApiServer
from tests.support.builders import make_endpoint, make_node, make_port, make_service, make_slice
from tests.support.netns import iptables_programs
from tests.support.proxy import running
from tests.support.traffic import connect

pytestmark = pytest.mark.packet

PLAN = PLANS[IPFamily.V4]
DNS_IP, LAST_IP = "172.30.0.10", "172.30.8.120"
# More than are written in one go.
SERVICES = 120
# Holds every restore that has rules of the crowd, until it is told to go on.
SHIM = """\
#!/bin/bash
input=$(cat)
if grep -q crowd- <<<"$input"; then while [ ! -e {go} ]; do sleep 0.05; done; fi
exec {program} "$@" <<<"$input"
"""


@pytest.fixture
def held(clean_lab, backend, tmp_path, monkeypatch):
    """Put programs first in the path that wait with most Services until the file given is there."""
    directory, go = tmp_path / "bin", tmp_path / "go"
    directory.mkdir()
    name = iptables_programs(backend, IPFamily.V4).restore
    shim = directory / name
    shim.write_text(SHIM.format(go=go, program=f"/usr/sbin/{name}"))
    shim.chmod(0o755)
    for program in (name.replace("-restore", ""), name.replace("restore", "save")):
        (directory / program).symlink_to(f"/usr/sbin/{program}")
    monkeypatch.setitem(clean_lab.node._env, "PATH", f"{directory}:/usr/sbin:/usr/bin:/bin")
    yield go
    go.touch()


def test_dns_answers_while_the_first_sync_still_writes_the_other_services(
    clean_lab, servers, backend, held, tmp_path
):
    endpoint = make_endpoint(clean_lab.local_pods[0].address(IPFamily.V4))
    client = clean_lab.local_pods[1]
    with clean_lab.node.entered():
        api = ApiServer()
    with api:
        api.apply(make_node("node1"))
        for number in range(1, SERVICES + 1):
            api.apply(make_service(f"crowd-{number}", cluster_ip=f"172.30.8.{number}"))
            api.apply(make_slice(f"crowd-{number}", endpoints=[endpoint]))
        dns = {"namespace": "kube-system", "ports": [make_port(53, protocol="UDP", targetPort=80)]}
        api.apply(make_service("kube-dns", cluster_ip=DNS_IP, **dns))
        ports = [make_port(80, protocol="UDP")]
        api.apply(
            make_slice("kube-dns", namespace="kube-system", ports=ports, endpoints=[endpoint])
        )
        kubeconfig = api.kubeconfig(tmp_path / "kubeconfig")
        with running(clean_lab, backend, tmp_path / "log", f"--kubeconfig={kubeconfig}") as proxy:
            proxy.wait(
                lambda: connect(client, DNS_IP, 53, protocol="udp", timeout_s=1).is_answered, 60
            )
            assert not proxy.is_synced()
            assert not connect(client, LAST_IP, 80, timeout_s=0.2).is_answered

            held.touch()
            proxy.wait(lambda: connect(client, LAST_IP, 80).is_answered, 60)
            proxy.wait_synced(60)
            assert connect(client, DNS_IP, 53, protocol="udp").is_answered
