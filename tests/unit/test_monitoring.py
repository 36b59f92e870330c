"""Prometheus' rules, scrape configurations and Grafana's dashboard: what they name exists and works."""

import re
import subprocess

import pytest
import yaml

from tests.support import manifests, prometheus
from tests.unit.test_architecture import OPERATIONS, table_rows

ALERTS = prometheus.alerts()
QUERIES = [*prometheus.queries(), *((rule.get("alert") or rule["record"], rule["expr"]) for rule in prometheus.rules())]  # fmt: skip
#: Labels that scraping adds, and those of histograms.
COMMON_LABELS = {"job", "node", "instance", "le"}
RENEW = "renew it: python -m tests.support.prometheus"


@pytest.fixture(scope="module")
def exposed():
    """Give every sample's name that /metrics can have, with its labels; test_architecture checks it."""
    found = {}
    for name, kind, labels, *_ in table_rows("Metrics"):
        own = {label.strip() for label in labels.split(",") if label.strip()}
        suffixes = ("_bucket", "_count", "_sum") if kind == "histogram" else ("",)
        found |= {f"{name}{suffix}": own for suffix in suffixes}
    return found


@pytest.fixture
def promtool():
    program = prometheus.promtool()
    if program is None:
        pytest.skip(
            "promtool is missing: `make build/promtool` unpacks it from the package prometheus"
        )

    def run(*arguments):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


# Rules -------------------------------------------------------------------------------------------


@pytest.mark.subprocess
def test_rules_are_valid(promtool):
    promtool("check", "rules", "--lint=all", "--lint-fatal", str(prometheus.RULES))


@pytest.mark.subprocess
def test_alerts_fire_when_they_should(promtool):
    promtool("test", "rules", str(prometheus.PROMETHEUS / "rules_test.yaml"))


def test_every_alert_is_seen_firing_and_silent():
    tests = yaml.safe_load((prometheus.PROMETHEUS / "rules_test.yaml").read_text())["tests"]
    seen = [case for test in tests for case in test["alert_rule_test"]]
    firing = {case["alertname"] for case in seen if case.get("exp_alerts")}
    silent = {case["alertname"] for case in seen if not case.get("exp_alerts")}

    assert firing == set(ALERTS)
    # What is slow has histograms, which a quiet node does not fill.
    assert silent >= set(ALERTS) - {"KubeProxyProgrammingSlow"}


def test_the_operators_object_and_the_chart_have_the_same_rules():
    assert prometheus.OPERATOR_RULES.read_text() == prometheus.operator_rules(), RENEW
    assert prometheus.CHART_RULES.read_text() == prometheus.chart_rules(), RENEW


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_where_and_what_to_do(name):
    alert = ALERTS[name]
    text = OPERATIONS.read_text()
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")

    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert (page, anchor in anchors) == ("docs/operations.md", True)


def test_the_documented_alerts_are_those_there_are():
    assert {row[0] for row in table_rows("Alerts")} == set(ALERTS)


# Queries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_a_query_is_about_metrics_and_labels_that_exist(title, query, exposed):
    recorded = {rule["record"] for rule in prometheus.rules() if "record" in rule}
    names = prometheus.metric_names(query)
    known = {"up": set(), **exposed}
    labels = {label for name in names - recorded for label in known[name]}
    used = {
        label.strip()
        for group in re.findall(r"\b(?:by|on|without)\s*\(([^)]*)\)", query)
        for label in group.split(",")
    } | set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query))

    assert names
    assert names <= known.keys() | recorded
    assert recorded & names or used <= labels | COMMON_LABELS


@pytest.mark.subprocess
def test_the_dashboards_queries_are_promql(promtool, tmp_path):
    rules = [
        {"record": f"panel:{number}", "expr": query}
        for number, (_, query) in enumerate(prometheus.queries())
    ]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))

    promtool("check", "rules", str(file))


def test_panels_stand_side_by_side_and_say_what_they_show():
    taken = {}
    for panel in prometheus.dashboard()["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]
        assert place["x"] + place["w"] <= 24
    ids = [panel["id"] for panel in prometheus.dashboard()["panels"]]

    assert len(ids) == len(set(ids))
    assert all(panel["description"] for panel in prometheus.panels())


def test_the_dashboard_asks_for_node_and_family():
    variables = {var["name"]: var for var in prometheus.dashboard()["templating"]["list"]}

    assert variables.keys() == {"datasource", "node", "ip_family"}
    assert all(
        target["datasource"]["uid"] == "${datasource}"
        for panel in prometheus.panels()
        for target in panel["targets"]
    )
    assert all('node=~"$node"' in target["expr"] for panel in prometheus.panels() for target in panel["targets"])  # fmt: skip


# Scraping ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return manifests.build("base")


def pod_labels(base):
    labels = manifests.one(base, "DaemonSet")["spec"]["template"]["metadata"]["labels"]
    ports = {port["name"] for port in manifests.container(base, "kubeproxy-py")["ports"]}
    return labels, ports


@pytest.mark.parametrize("name", ["podmonitor", "servicemonitor"])
def test_monitors_find_the_pods_and_name_their_node(name, base):
    labels, ports = pod_labels(base)
    objects = list(yaml.safe_load_all((prometheus.PROMETHEUS / f"{name}.yaml").read_text()))
    spec = objects[-1]["spec"]
    (endpoint,) = spec.get("podMetricsEndpoints") or spec["endpoints"]
    if name == "servicemonitor":
        service = objects[0]
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["selector"].items() <= labels.items()
        assert service["spec"]["ports"][0]["targetPort"] in ports
        labels = service["metadata"]["labels"]

    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert endpoint["port"] in ports
    assert endpoint["relabelings"][0]["targetLabel"] == "node"
    # The Operator's name of the job: namespace and name of the monitor, or the Service's name.
    metadata = objects[-1]["metadata"]
    for job in (f"{metadata['namespace']}/{metadata['name']}", metadata["name"]):
        assert re.fullmatch("(.+/)?kubeproxy-py", job)


@pytest.mark.subprocess
def test_the_scrape_configuration_finds_the_pods_and_is_valid(promtool, base, tmp_path):
    labels, ports = pod_labels(base)
    document = yaml.safe_load((prometheus.PROMETHEUS / "scrape.yaml").read_text())
    (job,) = document["scrape_configs"]
    wanted = {rule["source_labels"][0]: rule["regex"] for rule in job["relabel_configs"] if "regex" in rule}  # fmt: skip

    assert job["job_name"] == "kubeproxy-py"
    assert (
        labels["app.kubernetes.io/name"]
        == (wanted["__meta_kubernetes_pod_label_app_kubernetes_io_name"])
    )
    assert wanted["__meta_kubernetes_pod_container_port_name"] in ports
    # Debian's promtool is built without Kubernetes; what it finds is no matter of syntax.
    assert job.pop("kubernetes_sd_configs")[0]["role"] == "pod"
    (tmp_path / "rules.yaml").write_text(prometheus.RULES.read_text())
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(document))
    promtool("check", "config", str(tmp_path / "prometheus.yml"))
