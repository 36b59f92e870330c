"""
Helm's own engine on a chart of this repository: lint, check values, render.

It runs in a process of its own, because Go's runtime brings threads and signal handlers along, which
do not belong into a process whose threads change their network namespace.

As a program: reads ``{"chart", "values", "name", "namespace"}`` as JSON, prints the answer as JSON.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

Json = dict[str, Any]

_TIMEOUT_S: Final = 120.0  # takes a fraction of a second; the machine may be busy
_WARNING: Final = 2  # Helm's severities: 0 unknown, 1 info, 2 warning, 3 error


class HelmError(Exception):
    """Helm refuses the chart or the values, in its own words."""


class Rendered(NamedTuple):
    objects: list[Json]
    notes: str
    warnings: list[str]  # of lint: warnings and errors


def render(
    chart: Path,
    values: Json | None = None,
    *,
    name: str = "kubeproxy-py",
    namespace: str = "kube-system",
) -> Rendered:
    """Return what ``helm template`` and ``helm lint`` say. Raises HelmError."""
    question = {"chart": str(chart), "values": values or {}, "name": name, "namespace": namespace}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.helm"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    if done.returncode:
        raise AssertionError(f"the renderer ended with {done.returncode}: {done.stderr}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise HelmError(answer["error"])
    objects: list[Json] = []
    notes = ""
    for path, text in answer["manifests"].items():
        if path.endswith("NOTES.txt"):
            notes = text
        else:
            objects += (obj for obj in yaml.safe_load_all(text) if obj)
    return Rendered(objects, notes, answer["warnings"])


def _answer(question: Json) -> Json:
    import helm_python  # noqa: PLC0415 - only in the process made for it

    try:
        report = helm_python.lint(question["chart"], question["values"])
        with helm_python.Chart.load(question["chart"]) as chart:
            chart.validate_schema(question["values"])
            manifests = chart.render(
                question["values"], name=question["name"], namespace=question["namespace"]
            )
    except helm_python.HelmError as error:
        return {"error": str(error)}
    found = [m["error"] for m in report["messages"] if m["severity"] >= _WARNING]
    return {"manifests": manifests, "warnings": found}


if __name__ == "__main__":
    json.dump(_answer(json.load(sys.stdin)), sys.stdout)
