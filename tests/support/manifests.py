"""The manifests of deploy/, rendered: what an operator would apply, for tests to look at."""

from pathlib import Path
from typing import Any, Final

from tests.support import kustomize

Json = dict[str, Any]

ROOT: Final = Path(__file__).parents[2]
KUBERNETES: Final = ROOT / "deploy" / "kubernetes"
CHART: Final = ROOT / "deploy" / "helm" / "kubeproxy-py"
KUSTOMIZATIONS: Final = ("base", "overlays/kind", "overlays/kubeadm", "overlays/kubeadm-canary")


def build(kustomization: str) -> list[Json]:
    """Return the objects of one of KUSTOMIZATIONS."""
    return kustomize.build(KUBERNETES / kustomization)


def one(objects: list[Json], kind: str) -> Json:
    """Return the only object of a kind."""
    (found,) = (obj for obj in objects if obj["kind"] == kind)
    return found


def pod(objects: list[Json]) -> Json:
    """Return the spec of the DaemonSet's Pods."""
    spec: Json = one(objects, "DaemonSet")["spec"]["template"]["spec"]
    return spec


def container(objects: list[Json], name: str) -> Json:
    """Return a container, or init container, of the DaemonSet by its name."""
    found = pod(objects)
    containers: list[Json] = [*found["initContainers"], *found["containers"]]
    (chosen,) = (container for container in containers if container["name"] == name)
    return chosen
