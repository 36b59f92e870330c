"""The pure parts of e2e/, its program without a cluster, and its seam with a kubectl of the test's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from e2e import __main__ as program
from e2e import agnhost, deploy, objects
from e2e.agnhost import Answer
from e2e.cluster import ClusterError, Kubectl
from tests.support import manifests, schemas

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put programs of the test's own in front of the host's; each notes what it was asked."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    notes = tmp_path / "asked"
    notes.touch()

    def put(name, script):
        path = directory / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {notes}\n{script}\n')
        path.chmod(0o755)

    put.asked = lambda: notes.read_text().splitlines()
    return put


# --- what is asked, and what the answers mean


@pytest.mark.subprocess
def test_answers_of_http_are_told_apart(fake, tmp_path):
    fake(
        "curl",
        'case "$*" in'
        " *:80/*) echo web-1;;"
        " *:81/*) echo 'connect to 10.0.0.1 port 81 failed: Connection refused' >&2; exit 7;;"
        " *:82/*) echo 'No route to host' >&2; exit 7;;"
        " *:83/*) exit 28;;"
        " *) exit 52;; esac",
    )
    seen = []
    for port in (80, 81, 82, 83, 84):
        done = subprocess.run(
            agnhost.http("10.0.0.1", port, tries=2), capture_output=True, text=True, check=True
        )
        answers = agnhost.parse(done.stdout)
        # It does not go on where nobody answers.
        assert len(answers) == (2 if port == 80 else 1)
        seen.append(answers[0])

    assert seen[0] == Answer("answered", "web-1")
    assert [answer.status for answer in seen[1:]] == [
        "refused",
        "unreachable",
        "timed out",
        "failed",
    ]


@pytest.mark.subprocess
def test_a_datagram_without_an_answer_is_told_apart(fake):
    fake("nc", 'read line; [ "$5" = 80 ] && echo "web-1"; exit 0')
    statuses = {
        port: agnhost.parse(
            subprocess.run(
                agnhost.udp("10.0.0.1", port, tries=3), capture_output=True, text=True, check=True
            ).stdout
        )
        for port in (80, 81)
    }

    assert statuses[80] == [Answer("answered", "web-1")] * 3
    assert statuses[81] == [Answer("timed out")] * 3


def test_ipv6_addresses_stand_in_brackets():
    assert "http://[fd00::1]:80/hostname" in agnhost.http("fd00::1", 80)[-1]
    assert "http://[fd00::1]:80/" in agnhost.http_status("fd00::1", 80)[-1]
    assert " fd00::1 80" in agnhost.udp("fd00::1", 80)[-1]


def test_a_source_port_makes_datagrams_one_flow_one_after_the_other():
    (*_, script) = agnhost.udp("10.0.0.1", 80, tries=3, source_port=12345)

    assert "-p 12345" in script
    assert "&" not in script.replace("&&", "").replace("2>&1", "")


def test_what_is_not_an_answer_is_refused():
    with pytest.raises(ValueError, match="no status"):
        agnhost.parse("no status")


@pytest.mark.parametrize(
    ("body", "ip"),
    [
        ("10.244.1.5:40312", "10.244.1.5"),
        ("[fd00::5]:40312", "fd00::5"),
        ("[::ffff:10.244.1.5]:40312", "10.244.1.5"),
    ],
)
def test_client_addresses_are_read(body, ip):
    assert agnhost.parse_client_ip(body) == ip


@pytest.mark.parametrize("body", ["10.244.1.5", "", "10.244.1.5:http"])
def test_what_is_no_client_address_is_refused(body):
    with pytest.raises(ValueError, match="ADDRESS:PORT"):
        agnhost.parse_client_ip(body)


# --- objects


def test_the_api_server_would_take_what_is_built():
    here = {"namespace": "e2e"}
    port = objects.port(80, name="web", nodePort=30080)
    built = [
        objects.namespace("e2e"),
        objects.pod("a", **here, arguments=agnhost.netexec(udp_port=80)),
        objects.pod(
            "b",
            **here,
            arguments=["pause"],
            node="node1",
            labels={"app": "b"},
            ports=[{"name": "web", "containerPort": 80}],
            host_network=True,
            ready_by_file=True,
        ),
        objects.service(
            "s", **here, selector={"app": "b"}, ports=[port], family="IPv6", type="NodePort"
        ),
        objects.service(
            "t", **here, selector=None, type="ExternalName", externalName="example.com"
        ),
        objects.endpoint_slice("u", "s", **here, ports=[objects.port(80)], addresses=["fd00::1"]),
    ]

    for version in schemas.VERSIONS:
        assert [problem for obj in built for problem in schemas.problems(obj, version)] == []


# --- the cluster of kind


def test_manifests_are_fitted_to_the_cluster():
    fitted = deploy.fitted(
        manifests.build("overlays/kind"), image="other:1", api_host="e2e-control-plane"
    )

    assert [problem for obj in fitted for problem in schemas.problems(obj)] == []
    for name in ("init", "kubeproxy-py"):
        container = manifests.container(fitted, name)
        values = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert container["image"] == "other:1"
        assert container["imagePullPolicy"] == "Never"
        assert values["KUBERNETES_SERVICE_HOST"] == "e2e-control-plane"


def test_manifests_that_do_not_name_the_api_server_are_refused():
    with pytest.raises(ValueError, match="API server"):
        deploy.fitted(manifests.build("base"), image="x", api_host="y")


@pytest.mark.parametrize("family", ["ipv4", "ipv6", "dual"])
def test_clusters_of_kind_have_no_kube_proxy_and_two_workers(family):
    config = yaml.safe_load((ROOT / "e2e" / "kind" / f"{family}.yaml").read_text())

    assert config["networking"] == {"kubeProxyMode": "none", "ipFamily": family}
    assert [node["role"] for node in config["nodes"]].count("worker") == 2


# --- the program


def test_what_is_missing_is_said_and_nothing_is_done(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    status = program.main(["--image=some:image"])

    assert status == 2
    assert {line.rpartition(": ")[2] for line in capsys.readouterr().err.splitlines()} == {
        f"{name} is not installed" for name in ("docker", "kind", "kubectl")
    }


@pytest.mark.subprocess
def test_a_docker_that_does_not_answer_is_said(fake, capsys):
    fake("docker", "exit 1")
    fake("kind", "")
    fake("kubectl", "")

    assert program.main(["--image=some:image"]) == 2
    assert "docker does not answer" in capsys.readouterr().err


@pytest.mark.subprocess
def test_a_cluster_is_made_tested_and_removed(fake, tmp_path, capfd):
    rendered = tmp_path / "rendered.yaml"
    rendered.write_text(yaml.safe_dump_all(manifests.build("overlays/kind")))
    applied = tmp_path / "applied.yaml"
    fake("docker", "")
    fake("kind", "")
    fake("kubectl", f'case "$2" in kustomize) cat {rendered};; apply) cat > {applied};; esac')
    status = program.main(["--family=dual", "--image=some:image", "--", "--collect-only", "-q"])
    steps = [line.split(" --")[0] for line in fake.asked() if not line.startswith("docker info")]

    assert status == 0
    assert steps[0] == "kind create cluster"
    assert steps[1] == "kind load docker-image some:image"
    assert steps[-1] == "kind delete cluster"
    assert sum("kubectl" in step for step in steps) == 4
    deployed = list(yaml.safe_load_all(applied.read_text()))
    assert manifests.container(deployed, "init")["image"] == "some:image"
    assert "kubeproxy-py-dual-control-plane" in applied.read_text()
    assert "tests collected" in capfd.readouterr().out


@pytest.mark.subprocess
def test_a_step_that_fails_is_named_and_the_cluster_removed(fake, capfd):
    fake("docker", "")
    fake("kind", '[ "$1" = load ] && exit 3 || exit 0')
    fake("kubectl", "")
    status = program.main(["--image=some:image"])

    assert status == 1
    assert "kind load docker-image ended with 3" in capfd.readouterr().err
    assert fake.asked()[-1].startswith("kind delete cluster")


@pytest.mark.subprocess
def test_without_a_cluster_the_tests_say_so_and_end_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "e2e/test_kube_proxy.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )

    assert done.returncode == 2
    assert "there is no cluster: give --kubeconfig" in done.stdout


# --- the seam


@pytest.mark.subprocess
def test_kubectl_is_asked_for_what_tests_want(fake, tmp_path):
    sent = tmp_path / "sent"
    fake(
        "kubectl",
        f'case "$2" in apply) tee {sent};; get) echo \'{{"items": [{{"kind": "Pod"}}]}}\';;'
        " exec) echo out; echo err >&2; exit 3;; esac",
    )
    cluster = Kubectl("the-file")
    namespace = objects.namespace("e2e")

    assert cluster.apply(namespace) == namespace
    assert json.loads(sent.read_text()) == namespace
    assert cluster.list("pods", selector="a=b") == [{"kind": "Pod"}]
    assert cluster.execute("ns", "pod", ["true"]) == (3, "out\n", "err\n")
    cluster.delete("Pod", "ns", "pod", grace_s=1)
    assert [line.split(" ", 2)[1] for line in fake.asked()] == ["--kubeconfig=the-file"] * 4
    assert fake.asked()[-1].endswith(
        "delete Pod pod --ignore-not-found --wait=false --namespace=ns --grace-period=1"
    )


@pytest.mark.subprocess
def test_what_kubectl_refuses_is_an_error_in_its_words(fake):
    fake("kubectl", "echo 'Error from server (NotFound): pods \"pod\" not found' >&2; exit 1")
    cluster = Kubectl("the-file")

    with pytest.raises(ClusterError, match="not found"):
        cluster.execute("ns", "pod", ["true"])
    with pytest.raises(ClusterError, match="cannot apply"):
        cluster.apply(objects.namespace("e2e"))
    with pytest.raises(ClusterError, match="not found"):
        cluster.find("Pod", "ns", "pod")
