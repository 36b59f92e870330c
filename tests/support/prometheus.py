"""
The monitoring files of deploy/, for tests; and what makes those of them that are made of others.

``python -m tests.support.prometheus`` renews the Operator's object and the Helm chart's rules.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

Json = dict[str, Any]

ROOT: Final = Path(__file__).parents[2]
PROMETHEUS: Final = ROOT / "deploy" / "prometheus"
RULES: Final = PROMETHEUS / "rules.yaml"
OPERATOR_RULES: Final = PROMETHEUS / "prometheusrule.yaml"
CHART_RULES: Final = ROOT / "deploy" / "helm" / "kubeproxy-py" / "files" / "rules.yaml"
DASHBOARD: Final = ROOT / "deploy" / "grafana" / "kubeproxy-py.json"

_MADE: Final = "# Made of deploy/prometheus/rules.yaml: python -m tests.support.prometheus\n"
# What Grafana puts in the place of its variables, as far as a parser is concerned.
_VARIABLES: Final = {"$__rate_interval": "5m", "$__interval": "1m", "$__range": "1h"}


def promtool() -> str | None:
    """Return where promtool is: `make test` unpacks it, where the host has none."""
    return shutil.which("promtool", path=f"{ROOT / 'build'}:/usr/local/bin:/usr/bin")


def groups() -> list[Json]:
    found: list[Json] = yaml.safe_load(RULES.read_text())["groups"]
    return found


def rules() -> list[Json]:
    """Return all rules, recording and alerting."""
    return [rule for group in groups() for rule in group["rules"]]


def alerts() -> dict[str, Json]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def operator_rules() -> str:
    """Return the PrometheusRule with the same rules."""
    document = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": "kubeproxy-py",
            "namespace": "kube-system",
            "labels": {"app.kubernetes.io/name": "kubeproxy-py"},
        },
        "spec": {"groups": groups()},
    }
    return _MADE + _dump(document)


def chart_rules() -> str:
    """Return the same rules as one list, which the chart puts into a group of its own."""
    return _MADE + _dump(rules())


def dashboard() -> Json:
    found: Json = json.loads(DASHBOARD.read_text())
    return found


def panels() -> Iterator[Json]:
    """Yield the panels that show something, from all rows."""
    for panel in dashboard()["panels"]:
        yield from (panel.get("panels", ()) if panel["type"] == "row" else (panel,))


def queries() -> Iterator[tuple[str, str]]:
    """Yield each panel's title and the PromQL of each of its targets, without Grafana's variables."""
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"]
            for name, value in _VARIABLES.items():
                query = query.replace(name, value)
            yield panel["title"], re.sub(r"\$\w+", ".*", query)


def metric_names(query: str) -> set[str]:
    """Return the metrics that *query* names, recorded ones included."""
    # Neither label values nor label names are metrics.
    bare = re.sub(r'"[^"]*"', "", query)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"\{[^}]*\}", "", bare)
    return set(re.findall(r"\b(?:[a-z_]+:)?(?:kubeproxy|process|rest_client|up)\w*(?::\w+)?", bare))


def _dump(document: object) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=110, allow_unicode=True)


if __name__ == "__main__":
    OPERATOR_RULES.write_text(operator_rules())
    CHART_RULES.write_text(chart_rules())
