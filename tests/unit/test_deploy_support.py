"""What the tests of deploy/ rely on: schemas that find faults, and an authorizer that says no."""

import copy

import pytest

from tests.support import containers, manifests, rbac, schemas
from tests.support.rbac import Authorizer, Permission


@pytest.fixture
def daemon_set():
    return manifests.one(manifests.build("base"), "DaemonSet")


def container(found):
    return found["spec"]["template"]["spec"]["containers"][0]


def faults():
    """Yield what is wrong, how it comes about, and a word of the complaint."""

    def unknown_field(found):
        container(found)["imagePullPolice"] = "Always"

    def wrong_type(found):
        container(found)["ports"][0]["containerPort"] = "10256"

    def missing_field(found):
        del found["spec"]["selector"]

    def unknown_volume(found):
        container(found)["volumeMounts"][0]["name"] = "nowhere"

    def unknown_port(found):
        container(found)["livenessProbe"]["httpGet"]["port"] = "nowhere"

    def another_host_port(found):
        container(found)["ports"][0]["hostPort"] = 1

    def doubled_variable(found):
        container(found)["env"] *= 2

    def unmatched_selector(found):
        found["spec"]["selector"]["matchLabels"]["a"] = "b"

    def bad_label(found):
        found["metadata"]["labels"]["a"] = "-"

    def bad_name(found):
        found["metadata"]["name"] = "Upper"

    def unknown_kind(found):
        found["kind"] = "DemonSet"

    yield unknown_field, "imagePullPolice"
    yield wrong_type, "10256"
    yield missing_field, "selector"
    yield unknown_volume, "no volume 'nowhere'"
    yield unknown_port, "no port 'nowhere'"
    yield another_host_port, "hostPort"
    yield doubled_variable, "env: names are not unique"
    yield unmatched_selector, "selector"
    yield bad_label, "labels"
    yield bad_name, "metadata.name"
    yield unknown_kind, "no such kind"


@pytest.mark.parametrize(
    ("fault", "word"), list(faults()), ids=lambda item: getattr(item, "__name__", "")
)
def test_schemas_find_the_fault(daemon_set, fault, word):
    assert schemas.problems(copy.deepcopy(daemon_set)) == []
    fault(daemon_set)

    (problem,) = schemas.problems(daemon_set)
    assert word in problem
    assert problem.startswith(f"{daemon_set['kind']} {daemon_set['metadata']['name']}: ")


def role(kind, name, verb, **metadata):
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": kind,
        "metadata": {"name": name, **metadata},
        "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": [verb]}],
    }


def binding(kind, role_kind, role_name, account="a", **metadata):
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": kind,
        "metadata": {"name": "b", **metadata},
        "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": role_kind,
            "name": role_name,
        },
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": "n"}],
    }


def test_a_cluster_role_counts_everywhere_or_where_it_is_bound():
    everywhere = Authorizer(
        [role("ClusterRole", "r", "get"), binding("ClusterRoleBinding", "ClusterRole", "r")],
        "a",
        "n",
    )
    bound = [
        role("ClusterRole", "r", "get"),
        binding("RoleBinding", "ClusterRole", "r", namespace="m"),
    ]

    assert everywhere.permissions == {Permission("get", "", "pods")}
    assert Authorizer(bound, "a", "n").permissions == {Permission("get", "", "pods", "m")}


def test_a_role_counts_in_its_namespace():
    objects = [
        role("Role", "r", "get", namespace="m"),
        binding("RoleBinding", "Role", "r", namespace="m"),
    ]

    assert Authorizer(objects, "a", "n").permissions == {Permission("get", "", "pods", "m")}


def test_a_role_bound_to_others_does_not_count():
    objects = [
        role("ClusterRole", "r", "get"),
        binding("ClusterRoleBinding", "ClusterRole", "r", account="other"),
    ]

    assert Authorizer(objects, "a", "n").permissions == set()


def test_kube_proxys_own_role_is_known():
    objects = [binding("ClusterRoleBinding", "ClusterRole", "system:node-proxier")]

    assert Permission("watch", "discovery.k8s.io", "endpointslices") in (
        Authorizer(objects, "a", "n").permissions
    )
    assert schemas.problems(rbac.NODE_PROXIER) == []


def test_privileges_are_what_the_security_context_leaves():
    objects = manifests.build("base")

    assert containers.privileges(manifests.container(objects, "init")) == []
    assert containers.privileges(manifests.container(objects, "kubeproxy-py")) == [
        "setpriv",
        "--bounding-set=-all,+net_admin,+net_raw",
        "--inh-caps=-all",
        "--no-new-privs",
    ]
