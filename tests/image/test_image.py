"""The image, run as it is meant to be run: with two capabilities, read-only, and real traffic."""

import http.client
import json

import pytest

import kubeproxy_py
from kubeproxy_py.iptables import chains
from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS
from tests.support.api_server import ApiServer
from tests.support.builders import make_endpoint, make_node, make_service, make_slice
from tests.support.engine import HARDENED
from tests.support.netns import iptables_programs
from tests.support.traffic import connect, wait_until

V4 = PLANS[IPFamily.V4]
# Where nobody else's iptables programs run, the lock may be the container's own; on a node it is the
# host's file.
LOCK = "--tmpfs=/run"
FLAGS = (
    "--manifests=/objects",
    "--hostname-override=node1",
    f"--cluster-cidr={','.join(plan.cluster_cidr for plan in PLANS.values())}",
    "--logging-format=json",
)
# The table's size belongs to the first network namespace.
RUN = ("run", *FLAGS, "--conntrack-max-per-core=0")
# Measured with Debian 12 (bookworm): the base 75 MB, Debian's packages 48 MB, ours 59 MB.
MOST_BYTES = 190_000_000


@pytest.fixture(scope="module")
def objects(lab, tmp_path_factory):
    """Write a Service of each family with the node's two pods; returns the option that mounts it."""
    directory = tmp_path_factory.mktemp("objects")
    items = [make_node("node1")]
    for family, plan in PLANS.items():
        name = f"web-{family.value.lower()}"
        pods = [make_endpoint(pod.address(family)) for pod in lab.local_pods]
        items += [
            make_service(
                name,
                cluster_ip=plan.cluster_ip,
                type="NodePort",
                ports=[{"port": 80, "protocol": "TCP", "nodePort": 30080}],
            ),
            make_slice(name, endpoints=pods, ports=[80]),
        ]
    path = directory / "all.json"
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    directory.chmod(0o755)
    path.chmod(0o644)
    return f"--volume={directory}:/objects:ro"


@pytest.fixture(params=["nft", "legacy"])
def backend(request, clean_lab):
    """Let the node use one backend, as the kubelet does: it leaves a chain there."""
    for family in IPFamily:
        restore = iptables_programs(request.param, family).restore
        text = "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n"
        clean_lab.node.run([restore, "--noflush"], input=text)
    return request.param


@pytest.fixture
def prepared(engine, sandbox, clean_lab, objects):
    """Set the sysctls as an init container does, which may write to /proc/sys."""
    options = [*HARDENED, "--security-opt=systempaths=unconfined", objects]
    done = engine.run(*RUN, "--init-only", options=options, network=sandbox)
    assert done.returncode == 0, done.stderr


def status(lab, path, port=10256):
    """Return the status of a page in the node's namespace, 0 if nobody answers."""
    with lab.node.entered():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()


def wait_ready(lab, container):
    try:
        wait_until(lambda: status(lab, "/readyz") == 200, timeout_s=60, what="/readyz")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{container.logs()}") from None


def live(lab, backend, family=IPFamily.V4):
    saved = lab.node.run([iptables_programs(backend, family).save])
    return chains.parse_save(saved.stdout.splitlines())


# What it is -----------------------------------------------------------------------------------------


def test_it_says_which_version_it_is(engine):
    done = engine.run("--version")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"kubeproxy-py {kubeproxy_py.__version__},")


def test_it_is_labelled_with_its_version_and_has_nothing_that_surprises(engine):
    config = engine.inspect(engine.image)["Config"]

    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == kubeproxy_py.__version__
    assert labels["org.opencontainers.image.revision"] not in {"", "unknown"}
    assert config["Entrypoint"] == ["/usr/local/bin/kubeproxy-py"]
    assert not config.get("Healthcheck")
    assert not config.get("Volumes")


def test_it_is_small(engine):
    assert engine.inspect(engine.image)["Size"] < MOST_BYTES


def test_nothing_in_it_can_be_written_by_others_or_builds_software(engine):
    script = """
        find / -xdev ! -type l -perm /o+w ! -perm /1000 | grep -vE '^/(proc|sys|dev)/'
        find /opt ! -user root
        find / -xdev -name pip -o -xdev -name setuptools
        command -v gcc cc make pip pip3
        true
    """
    done = engine.run("-c", script, options=["--entrypoint=/bin/sh"])

    assert (done.returncode, done.stdout) == (0, "")


def test_all_of_its_own_code_is_compiled(engine):
    script = """
        cd /opt/kubeproxy-py/lib/python3*/site-packages
        for file in $(find kubeproxy_py -name '*.py'); do
          set -- $(dirname $file)/__pycache__/$(basename $file .py).*.pyc
          test -e "$1" || echo $file
        done
    """
    done = engine.run("-c", script, options=["--entrypoint=/bin/sh"])

    assert (done.returncode, done.stdout) == (0, "")


# What it does ---------------------------------------------------------------------------------------


def test_render_needs_no_right_at_all(engine, objects):
    done = engine.run(
        "render",
        *FLAGS,
        options=["--read-only", "--cap-drop=ALL", "--user=65534", objects],
    )

    assert done.returncode == 0, done.stderr
    assert f"-A KUBE-SERVICES -d {V4.cluster_ip}/32" in done.stdout


@pytest.mark.parametrize("missing", ["NET_ADMIN", "NET_RAW"])
def test_without_a_right_it_ends_with_its_name(engine, sandbox, clean_lab, objects, missing):
    options = [option for option in HARDENED if not option.endswith(missing)]
    done = engine.run(*RUN, options=[*options, LOCK, objects], network=sandbox)

    assert done.returncode == 1
    assert f"without CAP_{missing}, which" in done.stderr


def test_what_it_may_not_set_it_names_with_the_way_out(engine, sandbox, clean_lab, objects):
    done = engine.run(*RUN, options=[*HARDENED, LOCK, objects], network=sandbox)

    assert done.returncode == 1
    assert "read-only file system (--init-only sets" in done.stderr


@pytest.mark.parametrize("wrong", ["nft", "legacy"])
def test_where_alternatives_point_does_not_matter(
    engine, sandbox, prepared, backend, objects, wrong
):
    script = f"""
        update-alternatives --set iptables /usr/sbin/iptables-{wrong} >/dev/null
        update-alternatives --set ip6tables /usr/sbin/ip6tables-{wrong} >/dev/null
        exec kubeproxy-py plan "$@"
    """
    done = engine.run(
        *("-c", script, "sh", *FLAGS),
        options=["--entrypoint=/bin/sh", "--cap-add=NET_ADMIN", objects],
        network=sandbox,
    )

    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith(f"IPv4, iptables-{backend}\n")


def test_it_programs_services_with_two_capabilities_and_ends_at_once(
    engine, sandbox, clean_lab, prepared, backend, objects
):
    options = [*HARDENED, LOCK, objects]
    with engine.running(*RUN, options=options, network=sandbox) as proxy:
        wait_ready(clean_lab, proxy)
        assert status(clean_lab, "/metrics", 10249) == 200
        assert engine.call("exec", proxy.identity, "kubeproxy-py", "status").stdout
        before = {family: live(clean_lab, backend, family) for family in IPFamily}
        for family, plan in PLANS.items():
            pods = {pod.address(family) for pod in clean_lab.local_pods}
            client = clean_lab.namespace("pod1")
            assert connect(client, plan.cluster_ip, 80).server_ip in pods
            assert connect(clean_lab.outside, plan.node, 30080).server_ip in pods
        (detected,) = proxy.events("iptables.backend_detected")
        assert (detected["backend"], detected["reason"]) == (backend, "kubelet's hint chains")
        assert not proxy.events("libiptc.unavailable")
        code, seconds = proxy.end()

    assert code == 0
    assert seconds < 2
    assert {family: live(clean_lab, backend, family) for family in IPFamily} == before
    assert connect(clean_lab.outside, V4.node, 30080).is_answered


def test_it_follows_an_api_server(engine, sandbox, clean_lab, prepared, tmp_path):
    with clean_lab.node.entered():
        server = ApiServer(tls=True, needs_client_certificate=True)
    pod = clean_lab.local_pods[0].address(IPFamily.V4)
    kubeconfig = f"--volume={server.kubeconfig(tmp_path / 'kubeconfig')}:/kubeconfig:ro"
    flags = [flag for flag in RUN if not flag.startswith("--manifests")]
    with (
        server,
        engine.running(
            *flags,
            "--kubeconfig=/kubeconfig",
            # The Kubernetes client puts certificates that stand in the kubeconfig into files.
            options=[*HARDENED, LOCK, "--tmpfs=/tmp", kubeconfig],
            network=sandbox,
        ) as proxy,
    ):
        server.apply(make_node("node1"))
        wait_ready(clean_lab, proxy)
        server.apply(make_service("web", cluster_ip=V4.cluster_ip, ports=[80]))
        server.apply(make_slice("web", endpoints=[make_endpoint(pod)], ports=[80]))
        client = clean_lab.namespace("pod2")
        wait_until(lambda: connect(client, V4.cluster_ip, 80).server_ip == pod, timeout_s=30)
        code, _ = proxy.end()

    assert code == 0
