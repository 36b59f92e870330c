"""What the kernel can do, found out on it: quick, unseen, and with programs that lack something."""

import signal
import time

import pytest

from kubeproxy_py import nfacct, rules
from kubeproxy_py.iptables import probe, runner
from kubeproxy_py.iptables.chains import PROBE
from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS
from tests.support.builders import make_service, make_slice
from tests.support.netns import iptables_programs
from tests.support.object_files import ObjectFiles
from tests.support.proxy import HEALTH_PORT, own_rules, running
from tests.support.traffic import connect
from tests.support.wrapped_programs import WrappedPrograms

pytestmark = pytest.mark.packet

V4 = PLANS[IPFamily.V4]
CLIENT_IP = {"sessionAffinity": "ClientIP"}


@pytest.fixture
def kernel(clean_lab, backend, family):
    with clean_lab.node.entered():
        nfacct.ensure(rules.INVALID_DROPPED_COUNTER)
        yield runner.Iptables(runner.find_programs(family, backend))


def test_this_kernel_has_everything_and_shows_no_trace_of_having_been_asked(kernel, clean_lab):
    kernel.restore("*nat\n:SOMEBODY - [0:0]\n-A SOMEBODY -j RETURN\nCOMMIT\n")
    before = kernel.save()
    found = probe.probe(kernel)
    after = kernel.save()

    assert found == probe.Findings(kernel.family)
    assert {table: found for table, found in after.items() if any(found.values())} == {
        table: found for table, found in before.items() if any(found.values())
    }


@pytest.fixture
def wrapped(clean_lab, tmp_path, monkeypatch):
    wrapped = WrappedPrograms(tmp_path / "programs")
    monkeypatch.setitem(clean_lab.node._env, "PATH", wrapped.path)
    return wrapped


@pytest.fixture
def files(tmp_path):
    files = ObjectFiles(tmp_path)
    files.write([make_service(cluster_ip=V4.cluster_ip, ports=[80], **CLIENT_IP), make_slice()])
    return files


@pytest.fixture
def start(clean_lab, backend, files, tmp_path):
    """Start the daemon; gives a context."""

    def start():
        log = tmp_path / f"log-{len(list(tmp_path.iterdir()))}"
        return running(clean_lab, backend, log, f"--manifests={files.directory}")

    return start


def restore_program(backend):
    return iptables_programs(backend, IPFamily.V4).restore


def test_without_a_module_services_work_as_far_as_they_can_and_the_lack_is_told(
    clean_lab, servers, wrapped, backend, start
):
    wrapped.refuse(restore_program(backend), "-m recent")
    with start() as proxy:
        proxy.wait_synced()
        [lack] = proxy.events("capability.missing")
        answer = connect(clean_lab.local_pods[1], V4.cluster_ip, 80)

        assert (lack["capability"], lack["ip_family"]) == ("recent", "IPv4")
        assert "sessionAffinity" in lack["consequence"]
        assert answer.is_answered
        assert proxy.metric("kubeproxy_iptables_capability", capability="recent") == 1  # IPv6 only
        assert not proxy.events("service.quarantined")
        assert proxy.get("/readyz", HEALTH_PORT)[0] == 200


def test_without_what_every_rule_needs_nothing_is_written_until_it_is_there(
    wrapped, backend, start
):
    wrapped.refuse(restore_program(backend), "--comment")
    with start() as proxy:
        proxy.wait(lambda: bool(proxy.events("capability.refused")))
        # The other family goes on.
        proxy.wait(lambda: bool(own_rules(proxy.live(IPFamily.V6))))
        status, body = proxy.get("/readyz", HEALTH_PORT)

        assert own_rules(proxy.live()) == {}
        assert status == 503
        assert "capabilities-IPv4: no Service can be programmed without comment" in body
        assert proxy.get("/livez", HEALTH_PORT)[0] == 200
        wrapped.mend(restore_program(backend))
        proxy.wait_synced(30)
        assert own_rules(proxy.live()) != {}
        proxy.wait(lambda: proxy.get("/readyz", HEALTH_PORT)[0] == 200)


def test_a_mark_match_that_is_not_read_back_stops_every_writing(wrapped, backend, start):
    """Host 1.8.8 and image 1.8.7: a match that one writes and the other does not see."""
    programs = iptables_programs(backend, IPFamily.V4)
    # Whoever finds one program in a directory takes the others from there.
    wrapped.mend(programs.save)
    reader = programs.save if backend == "legacy" else programs.command
    wrapped.garble(reader, "-m mark ! --mark 0x4000/0x4000 ")
    with start() as proxy:
        proxy.wait(lambda: bool(proxy.events("capability.refused")))
        [refused] = proxy.events("capability.refused")
        proxy.wait(lambda: bool(own_rules(proxy.live(IPFamily.V6))))

        assert "back as `-j RETURN` (mark)" in refused["reason"]
        assert own_rules(proxy.live()) == {}
        assert proxy.get("/readyz", HEALTH_PORT)[0] == 503
        # And it ends as quickly as ever.
        asked = time.monotonic()
        assert proxy.end(signal.SIGTERM) == 0
        assert time.monotonic() - asked < 2


def test_a_probe_that_was_killed_leaves_nothing_for_long(clean_lab, backend, start):
    programs = iptables_programs(backend, IPFamily.V4)
    for table in ("mangle", "nat", "filter"):
        left = f"*{table}\n:{PROBE} - [0:0]\n-A {PROBE} -j RETURN\nCOMMIT\n"
        clean_lab.node.run([programs.restore, "--noflush"], input=left)
    with start() as proxy:
        proxy.wait_synced()

        assert not any(PROBE in found for found in proxy.live().values())
        assert not proxy.events("drift.repaired")
