"""`kubeproxy-py explain` from its arguments to its output and exit status."""

import json

import pytest
import structlog

from kubeproxy_py import cli, explain, explain_command, log
from kubeproxy_py.errors import ConfigError
from kubeproxy_py.explain_command import Question, Situation
from kubeproxy_py.model import IPFamily
from tests.support.addresses import V4, V6
from tests.support.builders import make_node, make_service, make_slice

OBJECTS = [
    make_node(),
    make_service("web"),
    make_slice("web", endpoints=[V4.local_pod(1)]),
    make_service("web6", cluster_ip=V6.cluster_ip),
    make_slice("web6", endpoints=[V6.local_pod(1)]),
]
FAMILIES = tuple(IPFamily)


@pytest.fixture
def command(capsys, tmp_path):
    """Run ``explain`` on the objects above; returns status, standard output, standard error."""
    path = tmp_path / "objects.json"
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": OBJECTS}))
    before = structlog.get_config()

    def command(*argv):
        flags = ["--manifests", str(path), "--hostname-override=node1"]
        with pytest.raises(SystemExit) as ended:
            cli.main(["explain", *flags, "--cluster-cidr=10.180.0.0/16", *argv])
        return (ended.value.code or 0, *capsys.readouterr())

    yield command
    structlog.configure(**before)
    log.set_verbosity(0)


def find(family):
    """Return a host with a Service's rule of its own making."""
    plan = V4 if family is IPFamily.V4 else V6
    rule = f"-d {plan.cluster_ip} -j DNAT --to-destination {plan.local_pod(1)}"
    tables = {"nat": {"PREROUTING": (rule,), "OUTPUT": (rule,)}}
    return Situation(tables, explain.Facts(local_addresses=frozenset({plan.node})), plan.node)


def ask(families=FAMILIES, **fields):
    empty = {"service": "", "source": "", "to": "", "in_interface": "", "is_live": False}
    question = Question(**empty | fields)
    return json.loads(explain_command.answer(question, find, families, as_json=True))


def test_packet_is_explained(command):
    status, out, _ = command("--from", V4.local_pod(2), "--to", f"{V4.cluster_ip}:80/tcp")

    assert status == 0
    assert "is delivered to 10.180.1.11:8080; its source is kept." in " ".join(out.split())


def test_ipv6_packet_is_explained_by_ipv6_rules(command):
    status, out, _ = command("--from", V6.outside, "--to", f"[{V6.cluster_ip}]:80/tcp")

    assert status == 0
    assert f"[{V6.local_pod(1)}]:8080" in out


def test_service_is_explained_in_its_own_family(command):
    status, out, _ = command("default/web6")

    assert status == 0
    assert f"cluster IP [{V6.cluster_ip}]:80/tcp" in out


def test_packet_is_explained_as_json(command):
    status, out, _ = command("--to", f"{V4.cluster_ip}:80/tcp", "--output=json")

    assert status == 0
    assert json.loads(out)["outcomes"][0]["destination"] == V4.local_pod(1)


def test_service_is_explained_as_json(command):
    status, out, _ = command("default/web", "--output=json")

    assert status == 0
    assert [view["name"] for view in json.loads(out)] == ["web"]


def test_stated_interface_addresses_are_local(command):
    stated = ["--interface-address", "eth0=198.51.100.1/24", "--node-ip", V4.node]
    _, out, _ = command(*stated, "--from=198.51.100.1", "--to=9.9.9.9:53/udp", "--output=json")

    assert json.loads(out)["packet"]["inInterface"] == ""


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "give either NAMESPACE/NAME of a Service or --to"),
        (["default/web", "--to=1.2.3.4:80/tcp"], "give either NAMESPACE/NAME of a Service or --to"),
        (["default/web", "--from=1.2.3.4"], "cannot use --from with a Service"),
        (["web"], "cannot read 'web' as NAMESPACE/NAME"),
        (["default/web/x"], "cannot read 'default/web/x' as NAMESPACE/NAME"),
        (["default/none"], "cannot find Service default/none"),
        (["--to=1.2.3.4"], "cannot read --to '1.2.3.4' as IP:PORT/PROTO"),
        (["--to=1.2.3.4:0/tcp"], "cannot read --to '1.2.3.4:0/tcp' as IP:PORT/PROTO"),
        (["--to=1.2.3.4:65536/tcp"], "cannot read --to '1.2.3.4:65536/tcp' as IP:PORT/PROTO"),
        (["--to=web:80/tcp"], "cannot read --to 'web:80/tcp' as IP:PORT/PROTO"),
        (["--to=1.2.3.4:80/icmp"], "cannot use protocol 'icmp' of --to"),
        (["--to=1.2.3.4:80/"], "cannot use protocol '' of --to"),
        (["--to=[fd00::1]:80/tcp", "--ip-family=ipv4"], "IPv6 is not looked at"),
        (["--to=1.2.3.4:80/tcp", "--from=pod"], "cannot read --from 'pod' as an IP address"),
        (["--to=1.2.3.4:80/tcp", "--from=fd00::1"], "--from and --to differ in family"),
        (["--to=1.2.3.4:80/tcp", "--in-interface=eth0"], "cannot use --in-interface without --from"),
        (["--to=1.2.3.4:80/tcp", "--live"], "cannot use --manifests with --live"),
    ],
)  # fmt: skip
def test_bad_question_is_an_error_that_says_what_is_wrong(command, argv, complaint):
    status, out, err = command(*argv)

    assert (status, out) == (1, "")
    assert complaint in err


def test_protocol_may_be_left_out_or_written_large():
    assert ask(to="9.9.9.9:53")["packet"]["protocol"] == "tcp"
    assert ask(to="9.9.9.9:53/UDP")["packet"]["protocol"] == "udp"


@pytest.mark.parametrize(
    ("fields", "source", "in_interface"),
    [
        pytest.param({}, V4.node, "", id="nobody is this node"),
        pytest.param({"to": "127.0.0.1:80"}, V4.loopback, "", id="to loopback from loopback"),
        pytest.param({"source": V4.node}, V4.node, "", id="this node"),
        pytest.param({"source": V4.outside}, V4.outside, "?", id="somebody by some interface"),
        pytest.param(
            {"source": V4.outside, "in_interface": "eth1"}, V4.outside, "eth1", id="all stated"
        ),
        pytest.param(
            {"source": V4.node, "in_interface": "eth1"}, V4.node, "eth1", id="a spoofed source"
        ),
    ],
)
def test_sender_is_completed(fields, source, in_interface):
    packet = ask(**{"to": "9.9.9.9:53/udp"} | fields)["packet"]

    assert (packet["source"], packet["inInterface"]) == (source, in_interface)


def test_error_of_a_family_that_was_not_asked_for():
    with pytest.raises(ConfigError, match="IPv4 is not looked at"):
        ask([IPFamily.V6], to="1.2.3.4:80/tcp")


def test_text_stands_out_as_told():
    question = Question("", "", f"{V4.cluster_ip}:80/tcp", "", is_live=False)
    text = explain_command.answer(question, find, FAMILIES, as_json=False, bold=str.upper)

    assert text.startswith("TCP FROM 192.168.0.2 TO 172.30.0.41:80 IS DELIVERED")
