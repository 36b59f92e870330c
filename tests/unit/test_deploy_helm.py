"""deploy/helm: the chart renders what deploy/kubernetes does, and every value means something."""

import copy
import functools
import json
import platform
import re

import pytest
import yaml
from prometheus_client import CollectorRegistry

import kubeproxy_py
from kubeproxy_py import config_file, config_validation
from kubeproxy_py.metrics import Metrics
from tests.support import helm, manifests, schemas

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="Helm's engine comes as a wheel for x86_64 only"
)

VALUES = yaml.safe_load((manifests.CHART / "values.yaml").read_text())


@functools.cache
def rendered(text="{}"):
    """Return what the values, as JSON, make of the chart."""
    return helm.render(manifests.CHART, json.loads(text))


def objects(**values):
    return copy.deepcopy(rendered(json.dumps(values)).objects)


def substance(found):
    """Return objects without what only tells who made them."""
    kept = {}
    for obj in copy.deepcopy(found):
        kind = obj["kind"]
        for metadata in (
            obj["metadata"],
            obj.get("spec", {}).get("template", {}).get("metadata", {}),
        ):
            labels = metadata.get("labels", {})
            metadata["labels"] = {k: v for k, v in labels.items() if k == "k8s-app"}
            metadata.pop("annotations", None)
        if kind == "ConfigMap":
            obj["metadata"]["name"] = "config"
            obj["data"] = {name: yaml.safe_load(text) for name, text in obj["data"].items()}
        if kind == "DaemonSet":
            del obj["spec"]["selector"]
            for volume in obj["spec"]["template"]["spec"]["volumes"]:
                if "configMap" in volume:
                    volume["configMap"]["name"] = "config"
        kept[kind] = obj
    return kept


def test_lint_has_nothing_to_say():
    assert rendered().warnings == []


def test_by_default_it_is_what_kustomize_makes():
    assert substance(objects()) == substance(manifests.build("base"))


def test_with_the_api_server_it_is_what_the_overlay_for_kind_makes():
    conf = yaml.safe_load((manifests.KUBERNETES / "overlays/kind/config.conf").read_text())
    made = objects(apiServer={"host": "kind-control-plane"}, config=conf)

    assert by_env_name(substance(made)) == by_env_name(substance(manifests.build("overlays/kind")))


def by_env_name(kinds):
    pod = kinds["DaemonSet"]["spec"]["template"]["spec"]
    for container in [*pod["initContainers"], *pod["containers"]]:
        container["env"].sort(key=lambda variable: variable["name"])
    return kinds


def test_with_kubeadms_config_map_it_is_what_the_overlay_for_kubeadm_makes():
    made = objects(existingConfigMap="kube-proxy")
    (volume,) = (v for v in manifests.pod(made)["volumes"] if v["name"] == "config")

    assert volume["configMap"]["name"] == "kube-proxy"
    assert substance(made) == substance(manifests.build("overlays/kubeadm"))


EVERYTHING = {
    "image": {"repository": "registry.example/p", "tag": "1.2.3", "pullPolicy": "Always"},
    "imagePullSecrets": [{"name": "pull"}],
    "fullnameOverride": "proxy",
    "apiServer": {"host": "fd00::1", "port": 443},
    "config": {
        "clusterCIDR": "10.244.0.0/16",
        "detectLocalMode": "ClusterCIDR",
        "healthzBindAddress": "[::]:10300",
        "metricsBindAddress": "0.0.0.0:10400",
    },
    "extraArgs": ["--v=4", "--iptables-backend=legacy"],
    "extraEnv": [{"name": "TZ", "value": "UTC"}],
    "serviceAccount": {"name": "other", "annotations": {"a": "b"}},
    "podAnnotations": {"c": "d"},
    "podLabels": {"e": "f"},
    "priorityClassName": "high",
    "nodeSelector": {"kubernetes.io/os": "linux", "pool": "a"},
    "affinity": {},
    "tolerations": [{"key": "x", "operator": "Exists"}],
    "updateStrategy": {"type": "OnDelete", "rollingUpdate": None},
    "seLinuxOptions": {"type": "spc_t"},
    "resources": {"requests": {"cpu": "1"}, "limits": {"memory": "1Gi"}},
    "podMonitor": {"enabled": True, "interval": "15s", "labels": {"release": "prometheus"}},
    "serviceMonitor": {"enabled": True, "interval": "1m"},
    "prometheusRule": {
        "enabled": True,
        "additionalRules": [{"alert": "Mine", "expr": "vector(1)"}],
    },
}


@pytest.mark.parametrize("version", schemas.VERSIONS)
@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["default", "everything"])
def test_the_api_server_takes_every_object(values, version):
    own = [obj for obj in objects(**values) if not obj["apiVersion"].startswith("monitoring.")]

    assert [problem for obj in own for problem in schemas.problems(obj, version)] == []


def test_every_value_has_an_effect():
    made = objects(**EVERYTHING)
    pod = manifests.pod(made)
    daemon = manifests.container(made, "kubeproxy-py")

    assert (
        daemon["image"] == manifests.container(made, "init")["image"] == "registry.example/p:1.2.3"
    )
    assert daemon["imagePullPolicy"] == "Always"
    assert pod["imagePullSecrets"] == [{"name": "pull"}]
    assert manifests.one(made, "DaemonSet")["metadata"]["name"] == "proxy"
    assert daemon["env"][1:] == [
        {"name": "KUBERNETES_SERVICE_HOST", "value": "fd00::1"},
        {"name": "KUBERNETES_SERVICE_PORT", "value": "443"},
        {"name": "TZ", "value": "UTC"},
    ]
    assert daemon["args"][-2:] == ["--v=4", "--iptables-backend=legacy"]
    assert "--v=4" not in manifests.container(made, "init")["args"]
    assert {p["name"]: p["hostPort"] for p in daemon["ports"]} == {
        "healthz": 10300,
        "metrics": 10400,
    }
    assert pod["serviceAccountName"] == "other"
    assert manifests.one(made, "ServiceAccount")["metadata"]["annotations"] == {"a": "b"}
    assert manifests.one(made, "ClusterRoleBinding")["subjects"][0]["name"] == "other"
    template = manifests.one(made, "DaemonSet")["spec"]["template"]["metadata"]
    assert template["annotations"]["c"] == "d"
    assert template["labels"]["e"] == "f"
    assert pod["priorityClassName"] == "high"
    assert pod["nodeSelector"] == EVERYTHING["nodeSelector"]
    assert pod["tolerations"] == EVERYTHING["tolerations"]
    assert daemon["resources"]["limits"] == {"memory": "1Gi"}
    assert daemon["securityContext"]["seLinuxOptions"] == {"type": "spc_t"}
    assert manifests.one(made, "PodMonitor")["metadata"]["labels"]["release"] == "prometheus"
    assert manifests.one(made, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["interval"] == "15s"
    assert manifests.one(made, "ServiceMonitor")["spec"]["endpoints"][0]["interval"] == "1m"
    (group,) = manifests.one(made, "PrometheusRule")["spec"]["groups"]
    assert group["rules"][-1]["alert"] == "Mine"


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("0.0.0.0:10300", None, 10300),
        ("[::]:10300", None, 10300),
        ("::", None, 10256),
        ("127.0.0.1:10300", "127.0.0.1", 10300),
        ("127.0.0.1", "127.0.0.1", 10256),
        ("[fd00::1]:10300", "fd00::1", 10300),
        ("fd00::1", "fd00::1", 10256),
        ("", None, 10256),
    ],
)
def test_probes_go_where_the_health_server_listens(address, host, port):
    daemon = manifests.container(objects(config={"healthzBindAddress": address}), "kubeproxy-py")
    probes = [
        daemon[kind]["httpGet"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")
    ]

    assert {probe.get("host") for probe in probes} == {host}
    assert {p["name"]: p["hostPort"] for p in daemon["ports"]}["healthz"] == port


def test_a_digest_takes_precedence_over_a_tag():
    digest = "sha256:" + "a" * 64
    made = objects(image={"tag": "1", "digest": digest})

    assert manifests.container(made, "kubeproxy-py")["image"] == f"kubeproxy-py@{digest}"


def test_what_belongs_to_others_can_be_left_out():
    made = objects(serviceAccount={"create": False, "name": "given"}, rbac={"create": False})

    assert {obj["kind"] for obj in made} == {"ConfigMap", "DaemonSet"}
    assert manifests.pod(made)["serviceAccountName"] == "given"


@pytest.mark.parametrize("values", [{}, {"podMonitor": {"enabled": True}}, EVERYTHING])
def test_the_configuration_is_read_without_a_warning(values, tmp_path):
    path = tmp_path / "config.conf"
    path.write_text(manifests.one(objects(**values), "ConfigMap")["data"]["config.conf"])
    config, warnings = config_file.load_file(path)

    assert warnings == []
    config_validation.validate(config)


@pytest.mark.parametrize("monitor", ["podMonitor", "serviceMonitor"])
def test_metrics_are_reachable_if_and_only_if_a_monitor_is_asked_for(monitor):
    def address(**values):
        text = manifests.one(objects(**values), "ConfigMap")["data"]["config.conf"]
        return yaml.safe_load(text).get("metricsBindAddress")

    assert address() is None
    assert address(**{monitor: {"enabled": True}}) == "0.0.0.0:10249"
    assert (
        address(**{monitor: {"enabled": True}, "config": {"metricsBindAddress": "10.0.0.1:10249"}})
        == "10.0.0.1:10249"
    )


def test_monitors_select_the_pods_and_their_port():
    made = objects(podMonitor={"enabled": True}, serviceMonitor={"enabled": True})
    labels = manifests.one(made, "DaemonSet")["spec"]["template"]["metadata"]["labels"]
    service = manifests.one(made, "Service")
    ports = {p["name"] for p in manifests.container(made, "kubeproxy-py")["ports"]}

    for kind in ("PodMonitor", "ServiceMonitor"):
        spec = manifests.one(made, kind)["spec"]
        selected = labels if kind == "PodMonitor" else service["metadata"]["labels"]
        assert spec["selector"]["matchLabels"].items() <= selected.items()
        # By which alerts and dashboard select, whatever release, chart and monitor are called.
        (endpoint,) = spec.get("podMetricsEndpoints") or spec["endpoints"]
        relabelled = {
            rule["targetLabel"]: rule.get("replacement") for rule in endpoint["relabelings"]
        }
        assert relabelled["job"] == "kubeproxy-py"
    assert service["spec"]["selector"].items() <= labels.items()
    assert service["spec"]["ports"][0]["targetPort"] in ports


def test_alerts_are_about_metrics_that_exist():
    registry = CollectorRegistry()
    Metrics(registry)
    known = {
        f"{family.name}{suffix}"
        for family in registry.collect()
        for suffix in ("", "_total", "_bucket")
    }
    (group,) = manifests.one(objects(prometheusRule={"enabled": True}), "PrometheusRule")["spec"][
        "groups"
    ]
    used = {
        name
        for rule in group["rules"]
        for name in re.findall(r"(?<![:\w])kubeproxy_\w+", rule["expr"])
    }

    assert len(used) >= 5
    assert used - known == set()


def test_a_change_of_the_configuration_is_a_roll_out():
    def checksum(**values):
        template = manifests.one(objects(**values), "DaemonSet")["spec"]["template"]
        return template["metadata"]["annotations"]["checksum/config"]

    assert checksum() != checksum(config={"clusterCIDR": "10.0.0.0/8"})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"imagee": {}}, "imagee"),
        ({"image": {"digest": "sha256:short"}}, "digest"),
        ({"apiServer": {"host": "https://10.0.0.1"}}, "host"),
        ({"apiServer": {"host": "[fd00::1]"}}, "host"),
        ({"apiServer": {"port": 0}}, "port"),
        ({"config": {"mode": "ipvs"}}, "mode"),
        ({"extraArgs": ["v=4"]}, "extraArgs"),
        ({"tolerations": {}}, "tolerations"),
        ({"serviceAccount": {"create": False}}, "serviceAccount.name"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values, named):
    with pytest.raises(helm.HelmError, match=re.escape(named)):
        helm.render(manifests.CHART, values)


def test_notes_warn_where_the_api_server_is_not_named():
    assert "apiServer.host is not set" in rendered().notes
    assert "apiServer.host" not in rendered('{"apiServer": {"host": "10.0.0.1"}}').notes
    assert "metricsBindAddress" in (
        rendered('{"existingConfigMap": "kube-proxy", "podMonitor": {"enabled": true}}').notes
    )


def test_versions_are_this_programs():
    chart = yaml.safe_load((manifests.CHART / "Chart.yaml").read_text())

    assert chart["version"] == chart["appVersion"] == kubeproxy_py.__version__


def test_the_readme_lists_every_value():
    rows = [
        line.split("|")[1]
        for line in (manifests.CHART / "README.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    listed = {
        name.partition(".")[0]
        for row in rows
        for name in re.findall(r"`([\w.*]+)`", row)
        if name[0] != "."
    }
    schema = json.loads((manifests.CHART / "values.schema.json").read_text())

    assert listed == set(VALUES)
    assert set(schema["properties"]) - {"global"} == set(VALUES)
