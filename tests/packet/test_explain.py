"""``explain --live`` on a real kernel: our rules beside those of others, and what packets really do."""

import json
import sys

import pytest

from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS
from tests.support.builders import make_endpoint, make_service, make_slice
from tests.support.netns import iptables_programs
from tests.support.proxy import running
from tests.support.traffic import connect

pytestmark = pytest.mark.packet

PLAN = PLANS[IPFamily.V4]
FOREIGN = """\
*filter
:FORWARD DROP [0:0]
:CNI-FORWARD - [0:0]
-A CNI-FORWARD -p udp -m hashlimit --hashlimit-upto 10/sec --hashlimit-name x -j ACCEPT
-A FORWARD -j CNI-FORWARD
COMMIT
"""


@pytest.fixture
def programmed(clean_lab, servers, backend, tmp_path):
    """Give the lab with foreign rules and one Service, programmed by the daemon, which has ended."""
    objects = tmp_path / "objects.json"
    pod = clean_lab.local_pods[0].address(IPFamily.V4)
    items = [
        make_service("web", cluster_ip=PLAN.cluster_ip),
        make_slice("web", endpoints=[make_endpoint(pod)]),
    ]
    objects.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    restore = iptables_programs(backend, IPFamily.V4).restore
    clean_lab.node.run([restore, "--noflush"], input=FOREIGN)
    with running(clean_lab, backend, tmp_path / "log", f"--manifests={objects}") as proxy:
        proxy.wait_synced()
    yield clean_lab
    clean_lab.node.run([restore, "--noflush"], input="*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n")


def explained(lab, backend, *arguments):
    done = lab.node.run(
        [
            *(sys.executable, "-m", "kubeproxy_py", "explain", "--live"),
            f"--iptables-backend={backend}",
            "--output=json",
            *arguments,
        ]
    )
    return json.loads(done.stdout)


def test_a_packet_to_a_service_is_told_as_it_goes(programmed, backend):
    pod = programmed.local_pods[1]
    told = explained(
        programmed,
        backend,
        f"--from={pod.address(IPFamily.V4)}",
        "--in-interface=cni0",
        f"--to={PLAN.cluster_ip}:80/tcp",
    )
    answer = connect(pod, PLAN.cluster_ip, 80)

    (outcome,) = told["outcomes"]
    # Not to be masqueraded and new: no rule of ours accepts it, so the policy of FORWARD decides.
    assert (outcome["verdict"], answer.kind) == ("dropped", "timeout")
    assert outcome["path"][-1]["rule"] == "policy"


def test_a_foreign_match_that_is_not_known_is_named(programmed, backend):
    told = explained(
        programmed,
        backend,
        f"--from={programmed.local_pods[1].address(IPFamily.V4)}",
        "--in-interface=cni0",
        f"--to={PLAN.cluster_ip}:80/udp",
    )

    assert any("hashlimit" in json.dumps(warning) for warning in told["warnings"])
