"""Who may do what, as kube-apiserver's RBAC authorizer decides it from rendered roles and bindings."""

import threading
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from tests.support import api_http, api_requests

Json = dict[str, Any]

#: ClusterRole system:node-proxier as kube-apiserver 1.36 creates it at its start (bootstrappolicy).
NODE_PROXIER: Final[Json] = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRole",
    "metadata": {"name": "system:node-proxier"},
    "rules": [
        {"apiGroups": [""], "resources": ["services", "endpoints"], "verbs": ["list", "watch"]},
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},
        {
            "apiGroups": ["", "events.k8s.io"],
            "resources": ["events"],
            "verbs": ["create", "patch", "update"],
        },
        {
            "apiGroups": ["discovery.k8s.io"],
            "resources": ["endpointslices"],
            "verbs": ["list", "watch"],
        },
        {
            "apiGroups": ["networking.k8s.io"],
            "resources": ["servicecidrs"],
            "verbs": ["list", "watch"],
        },
    ],
}


class Permission(NamedTuple):
    """One thing that a rule allows; *namespace* is "" for all of them."""

    verb: str
    group: str
    resource: str
    namespace: str = ""


class Authorizer:
    """Allows what a service account's roles allow. May be called from many threads."""

    def __init__(self, objects: Iterable[Json], account: str, namespace: str) -> None:
        """Read the roles and bindings among *objects*; nothing else is known to the cluster."""
        self.permissions: Final = _permissions([NODE_PROXIER, *objects], account, namespace)
        self._lock = threading.Lock()
        # Under the lock:
        self.used: set[Permission] = set()
        self.refused: list[str] = []

    def __call__(self, request: api_http.Request, route: api_requests.Route) -> bool:
        resource = route.resource
        for namespace in {"", route.namespace}:
            wanted = Permission(request.verb, resource.group, resource.plural, namespace)
            if wanted in self.permissions:
                with self._lock:
                    self.used.add(wanted)
                return True
        with self._lock:
            self.refused.append(f"{request.verb} {request.path}")
        return False


def _permissions(objects: list[Json], account: str, namespace: str) -> set[Permission]:
    roles = {
        (obj["kind"], obj["metadata"].get("namespace", ""), obj["metadata"]["name"]): obj["rules"]
        for obj in objects
        if obj["kind"] in {"ClusterRole", "Role"}
    }
    subject = {"kind": "ServiceAccount", "name": account, "namespace": namespace}
    found = set()
    for obj in objects:
        if obj["kind"] not in {"ClusterRoleBinding", "RoleBinding"}:
            continue
        if subject not in obj["subjects"]:
            continue
        where = obj["metadata"].get("namespace", "")
        reference = obj["roleRef"]
        home = where if reference["kind"] == "Role" else ""
        for rule in roles[reference["kind"], home, reference["name"]]:
            found |= {
                Permission(verb, group, resource, where)
                for verb in rule["verbs"]
                for group in rule["apiGroups"]
                for resource in rule["resources"]
            }
    return found
