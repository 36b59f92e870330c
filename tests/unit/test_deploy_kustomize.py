"""deploy/kubernetes: what is rendered is valid, and agrees with the program it starts."""

import functools
import json
import operator
import re
import shutil
import subprocess

import pytest
import yaml

import kubeproxy_py
from kubeproxy_py import config_file, config_validation, flag_table, flags
from tests.support import kustomize, manifests, schemas

KUBE_PROXY = {
    "apiVersion": "apps/v1",
    "kind": "DaemonSet",
    "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
    "spec": {
        "selector": {"matchLabels": {"k8s-app": "kube-proxy"}},
        "template": {
            "metadata": {"labels": {"k8s-app": "kube-proxy"}},
            "spec": {
                "nodeSelector": {"kubernetes.io/os": "linux"},
                "containers": [{"name": "kube-proxy", "image": "registry.k8s.io/kube-proxy"}],
            },
        },
    },
}


def by_identity(objects):
    return {(obj["kind"], obj["metadata"]["name"]): obj for obj in objects}


def wants(daemon_set, labels):
    """Tell whether a DaemonSet runs on a node with these labels."""
    pod = daemon_set["spec"]["template"]["spec"]
    if not pod.get("nodeSelector", {}).items() <= labels.items():
        return False
    required = (
        pod.get("affinity", {})
        .get("nodeAffinity", {})
        .get("requiredDuringSchedulingIgnoredDuringExecution")
    )
    if required is None:
        return True
    return any(
        all(
            (labels.get(expression["key"]) in expression["values"])
            == {"In": True, "NotIn": False}[expression["operator"]]
            for expression in term["matchExpressions"]
        )
        for term in required["nodeSelectorTerms"]
    )


def patch_of(path):
    return yaml.safe_load((manifests.KUBERNETES / path).read_text())


@pytest.fixture(params=manifests.KUSTOMIZATIONS)
def objects(request):
    return manifests.build(request.param)


@pytest.mark.parametrize("version", schemas.VERSIONS)
def test_the_api_server_takes_every_object(objects, version):
    assert [problem for obj in objects for problem in schemas.problems(obj, version)] == []


@pytest.mark.subprocess
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("kustomization", manifests.KUSTOMIZATIONS)
def test_kubectl_renders_the_same(kustomization):
    directory = manifests.KUBERNETES / kustomization
    done = subprocess.run(
        ["kubectl", "kustomize", directory], capture_output=True, text=True, check=False
    )
    if done.returncode and "kustomize" not in done.stderr:
        pytest.skip(f"kubectl does not work here: {done.stderr[:200]}")

    assert done.returncode == 0, done.stderr
    assert by_identity(yaml.safe_load_all(done.stdout)) == by_identity(
        manifests.build(kustomization)
    )


def test_a_kustomization_that_is_not_understood_is_refused(tmp_path):
    (tmp_path / "kustomization.yaml").write_text("namePrefix: a-\n")

    with pytest.raises(ValueError, match="namePrefix"):
        kustomize.build(tmp_path)


def test_a_change_of_the_configuration_changes_the_pods(tmp_path):
    shutil.copytree(manifests.KUBERNETES, tmp_path / "k")
    file = tmp_path / "k/base/config.conf"
    file.write_text(file.read_text() + "clusterCIDR: 10.244.0.0/16\n")
    changed = kustomize.build(tmp_path / "k/base")

    def name(found):
        (volume,) = (v for v in manifests.pod(found)["volumes"] if v["name"] == "config")
        return volume["configMap"]["name"]

    assert name(changed) != name(manifests.build("base"))
    assert name(changed) == manifests.one(changed, "ConfigMap")["metadata"]["name"]


# --- agreement with the program


@pytest.mark.parametrize("kustomization", ["base", "overlays/kind"])
def test_the_configuration_is_read_without_a_warning(kustomization, tmp_path):
    (text,) = manifests.one(manifests.build(kustomization), "ConfigMap")["data"].values()
    path = tmp_path / "config.conf"
    path.write_text(text)
    config, warnings = config_file.load_file(path)

    assert warnings == []
    config_validation.validate(config)
    assert config.oom_score_adj == -997


def test_arguments_are_flags_of_run(objects):
    for name in ("init", "kubeproxy-py"):
        command, *arguments = manifests.container(objects, name)["args"]
        known = {flag.name: flag for flag in flag_table.FLAGS}
        given = {argument.removeprefix("--").partition("=")[0] for argument in arguments}

        assert command == "run"
        assert given <= set(known)
        # Beside --config, only these have an effect.
        assert all(known[flag].is_honoured_with_config for flag in given)


def test_only_the_init_container_prepares_the_host(objects):
    assert "--init-only" in manifests.container(objects, "init")["args"]
    assert "--init-only" not in manifests.container(objects, "kubeproxy-py")["args"]


def test_the_configuration_file_is_where_the_arguments_say(objects):
    (volume,) = (v for v in manifests.pod(objects)["volumes"] if v["name"] == "config")
    generated = [obj for obj in objects if obj["kind"] == "ConfigMap"]
    for name in ("init", "kubeproxy-py"):
        container = manifests.container(objects, name)
        (mount,) = (m for m in container["volumeMounts"] if m["name"] == "config")

        assert f"--config={mount['mountPath']}/config.conf" in container["args"]
    # kubeadm makes its own, called kube-proxy, with this key as well.
    assert volume["configMap"]["name"] in {obj["metadata"]["name"] for obj in generated} | {
        "kube-proxy"
    }
    assert all("config.conf" in obj["data"] for obj in generated)


def test_ports_are_those_that_the_program_listens_on(objects):
    settings = flags.settings_from_flags(flags.FlagValues())
    ports = {
        p["name"]: p["containerPort"] for p in manifests.container(objects, "kubeproxy-py")["ports"]
    }

    assert settings.config.healthz_bind_address.endswith(f":{ports['healthz']}")
    assert settings.config.metrics_bind_address.endswith(f":{ports['metrics']}")


def test_image_is_this_version(objects):
    images = {manifests.container(objects, name)["image"] for name in ("init", "kubeproxy-py")}

    assert images == {f"kubeproxy-py:{kubeproxy_py.__version__}"}


# --- least privilege, and a calm roll-out


def test_the_daemon_has_two_capabilities_and_no_more(objects):
    context = manifests.container(objects, "kubeproxy-py")["securityContext"]

    assert context["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]}
    assert context["privileged"] is False
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True


def test_only_the_init_container_is_privileged(objects):
    pod = manifests.pod(objects)
    privileged = [
        c["name"]
        for c in [*pod["initContainers"], *pod["containers"]]
        if c["securityContext"].get("privileged")
    ]

    assert privileged == ["init"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostPID", "hostIPC"} & set(pod)


def test_what_is_mounted_from_the_host_is_as_little_as_it_needs(objects):
    writable = {}
    for volume in manifests.pod(objects)["volumes"]:
        if "hostPath" in volume:
            mounts = [
                m
                for m in manifests.container(objects, "kubeproxy-py")["volumeMounts"]
                if m["name"] == volume["name"]
            ]
            writable[volume["hostPath"]["path"]] = any(not m.get("readOnly") for m in mounts)

    assert writable == {
        "/run/xtables.lock": True,
        "/lib/modules": False,
        "/var/lib/kubeproxy-py": True,
        "/run/kubeproxy-py": True,
    }


def test_one_node_after_the_other_is_updated_and_the_old_pod_goes_first(objects):
    strategy = manifests.one(objects, "DaemonSet")["spec"]["updateStrategy"]

    assert strategy["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_it_runs_on_every_node_whatever_its_taints(objects):
    pod = manifests.pod(objects)

    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert pod["priorityClassName"] == "system-node-critical"
    assert pod["hostNetwork"] is True
    assert pod["dnsPolicy"] == "Default"


def test_monitors_of_kube_proxy_select_its_pods(objects):
    daemon_set = manifests.one(objects, "DaemonSet")

    assert daemon_set["spec"]["template"]["metadata"]["labels"]["k8s-app"] == "kube-proxy"
    # But kube-proxy's own DaemonSet, which selects by that label alone, is not selected by ours.
    assert not (
        daemon_set["spec"]["selector"]["matchLabels"].items()
        <= KUBE_PROXY["spec"]["template"]["metadata"]["labels"].items()
    )


def test_no_role_but_that_of_kube_proxy_is_asked_for(objects):
    binding = manifests.one(objects, "ClusterRoleBinding")

    assert binding["roleRef"]["name"] == "system:node-proxier"
    assert {obj["kind"] for obj in objects} <= {
        "ServiceAccount",
        "ClusterRoleBinding",
        "ConfigMap",
        "DaemonSet",
    }


# --- overlays


def test_on_kind_the_api_server_is_not_asked_for_by_its_cluster_ip():
    objects = manifests.build("overlays/kind")
    for name in ("init", "kubeproxy-py"):
        variables = {v["name"]: v.get("value") for v in manifests.container(objects, name)["env"]}

        assert variables["KUBERNETES_SERVICE_HOST"] == "kind-control-plane"
        assert variables["KUBERNETES_SERVICE_PORT"] == "6443"
        assert "NODE_NAME" in variables


def test_on_kubeadm_nothing_of_the_configuration_is_ours():
    assert "ConfigMap" not in {obj["kind"] for obj in manifests.build("overlays/kubeadm")}


@pytest.mark.parametrize("label", [{}, {"service-proxy": "kubeproxy-py"}])
def test_node_by_node_every_node_has_one_proxy(label):
    labels = {"kubernetes.io/os": "linux", "kubernetes.io/arch": "arm64"} | label
    ours = manifests.one(manifests.build("overlays/kubeadm-canary"), "DaemonSet")
    theirs = kustomize.merge(KUBE_PROXY, patch_of("overlays/kubeadm-canary/kube-proxy.yaml"))

    assert schemas.problems(theirs) == []
    assert (wants(ours, labels), wants(theirs, labels)) == (bool(label), not label)


@pytest.mark.parametrize("label", [{}, {"service-proxy": "kubeproxy-py"}])
def test_after_the_take_over_every_node_has_ours(label):
    labels = {"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"} | label
    ours = manifests.one(manifests.build("overlays/kubeadm"), "DaemonSet")
    node_by_node = kustomize.merge(KUBE_PROXY, patch_of("overlays/kubeadm-canary/kube-proxy.yaml"))
    off = kustomize.merge(node_by_node, patch_of("overlays/kubeadm/kube-proxy.yaml"))

    assert schemas.problems(off) == []
    assert (wants(ours, labels), wants(off, labels)) == (True, False)


def test_patches_keep_what_they_do_not_name():
    merged = kustomize.merge(
        {"a": 1, "containers": [{"name": "x", "env": [{"name": "A", "value": "1"}]}], "args": [1]},
        {"b": 2, "a": None, "containers": [{"name": "x", "env": [{"name": "B"}]}], "args": [2]},
    )

    assert json.loads(json.dumps(merged)) == {
        "b": 2,
        "containers": [{"name": "x", "env": [{"name": "B"}, {"name": "A", "value": "1"}]}],
        "args": [2],
    }


@pytest.mark.parametrize("document", ["docs/kubernetes.md", "deploy/helm/kubeproxy-py/README.md"])
def test_paths_that_the_documents_name_exist(document):
    text = (manifests.ROOT / document).read_text()
    named = {path.rstrip(".") for path in re.findall(r"\b(?:deploy|e2e)/[\w./-]+", text)}

    assert named
    assert [path for path in sorted(named) if not (manifests.ROOT / path).exists()] == []


def test_the_hand_back_takes_away_what_the_take_over_brought():
    text = (manifests.ROOT / "docs" / "kubernetes.md").read_text()
    removed = re.findall(r'"op": "remove", "path": "([^"]+)"', text)
    off = kustomize.merge(KUBE_PROXY, patch_of("overlays/kubeadm-canary/kube-proxy.yaml"))
    off = kustomize.merge(off, patch_of("overlays/kubeadm/kube-proxy.yaml"))
    for path in removed:
        *parents, last = path.strip("/").split("/")
        del functools.reduce(operator.getitem, parents, off)[last]

    assert off == KUBE_PROXY
