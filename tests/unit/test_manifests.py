import itertools
import os
import textwrap

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeproxy_py import endpoint_controller, errors, manifest_parser, manifests, objects
from kubeproxy_py.model import Problem

SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 172.30.0.41, ports: [{port: 80}]}
"""


def service_text(name, cluster_ip="172.30.0.41"):
    return SERVICE.replace("web", name).replace("172.30.0.41", cluster_ip)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def names(loaded, kind="Service"):
    return [f"{o.metadata.namespace}/{o.metadata.name}" for o in loaded.objects[kind]]


def load_text(tmp_path, text, name="a.yaml"):
    return manifests.load([write(tmp_path / name, text)])


def the_service(loaded):
    (service,) = loaded.objects["Service"]
    return service


def test_kinds_that_nobody_gave_are_there_and_empty(tmp_path):
    assert manifests.load([tmp_path]) == manifests.Loaded(
        objects={"Service": (), "EndpointSlice": (), "Node": ()}, problems=(), broken_files=()
    )


def test_directories_are_read_with_all_below_them(tmp_path):
    write(tmp_path / "b.yaml", service_text("b"))
    write(tmp_path / "sub/deep/a.yml", service_text("a"))
    write(tmp_path / "C.JSON", msgspec.json.encode(yaml_value(service_text("c"))).decode())

    assert names(manifests.load([tmp_path])) == ["shop/a", "shop/b", "shop/c"]


def yaml_value(text):
    return manifest_parser.parse_yaml(text.encode())[0].value


@pytest.mark.parametrize(
    "name", [".hidden.yaml", ".git/a.yaml", "a.txt", "a.yaml~", "..data/a.yaml"]
)
def test_file_in_a_directory_is_not_read(tmp_path, name):
    write(tmp_path / name, SERVICE)

    assert names(manifests.load([tmp_path])) == []


def test_file_given_by_name_is_read_whatever_it_is_called(tmp_path):
    assert names(load_text(tmp_path, SERVICE, ".services")) == ["shop/web"]


def test_configmap_volume_is_read_once(tmp_path):
    write(tmp_path / "..2024_01/a.yaml", SERVICE)
    (tmp_path / "..data").symlink_to("..2024_01")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")

    loaded = manifests.load([tmp_path])

    assert names(loaded) == ["shop/web"]
    assert loaded.problems == ()


def test_links_that_lead_in_circles_end(tmp_path):
    write(tmp_path / "sub/a.yaml", SERVICE)
    (tmp_path / "sub/up").symlink_to(tmp_path)

    loaded = manifests.load([tmp_path, tmp_path / "sub", tmp_path / "sub/a.yaml"])

    assert names(loaded) == ["shop/web"]
    assert loaded.problems == ()


def test_lists_are_taken_apart(tmp_path):
    text = """
        apiVersion: v1
        kind: List
        items:
        - {apiVersion: v1, kind: Service, metadata: {name: a}, spec: {clusterIP: 172.30.0.1}}
        - apiVersion: v1
          kind: ServiceList
          items:
          - {metadata: {name: b}, spec: {clusterIP: 172.30.0.2}}
        - {apiVersion: v1, kind: Node, metadata: {name: node-1}}
        """
    loaded = load_text(tmp_path, text)

    assert names(loaded) == ["default/a", "default/b"]
    assert names(loaded, "Node") == ["/node-1"]
    assert loaded.problems == ()


def test_other_kinds_and_other_projects_kinds_are_ignored(tmp_path):
    text = """
        {apiVersion: apps/v1, kind: Deployment, metadata: {name: 5}}
        ---
        {apiVersion: serving.knative.dev/v1, kind: Service, metadata: {name: a}, spec: {ports: x}}
        """
    loaded = load_text(tmp_path, text)

    assert names(loaded) == []
    assert loaded.problems == ()


def test_defaults_of_the_api_server_are_filled_in(tmp_path):
    text = """
        apiVersion: v1
        kind: Service
        metadata: {name: web}
        spec:
          clusterIPs: [172.30.0.41, "fd00::41"]
          sessionAffinity: ClientIP
          ports: [{port: 80, nodePort: 0}]
        """
    service = the_service(load_text(tmp_path, text))

    assert service.metadata.namespace == "default"
    assert service.spec == objects.ServiceSpec(
        type="ClusterIP",
        clusterIP="172.30.0.41",
        clusterIPs=["172.30.0.41", "fd00::41"],
        ipFamilies=["IPv4", "IPv6"],
        sessionAffinity="ClientIP",
        sessionAffinityConfig=objects.SessionAffinityConfig(
            clientIP=objects.ClientIPConfig(timeoutSeconds=10800)
        ),
        ports=[objects.ServicePortSpec(port=80, protocol="TCP", nodePort=0)],
    )


def test_ports_of_a_slice_get_a_name_and_a_protocol(tmp_path):
    text = """
        apiVersion: discovery.k8s.io/v1
        kind: EndpointSlice
        metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
        addressType: IPv4
        ports: [{port: 8080}]
        """
    (item,) = load_text(tmp_path, text).objects["EndpointSlice"]

    assert item.ports == [objects.SlicePort(port=8080, name="", protocol="TCP")]


@pytest.mark.parametrize(
    ("spec", "is_problem"),
    [
        pytest.param("{ports: [{port: 80}]}", True, id="ordinary"),
        pytest.param("{clusterIP: None}", False, id="headless"),
        pytest.param("{type: ExternalName}", False, id="ExternalName"),
        pytest.param("", True, id="without a spec"),
    ],
)
def test_service_without_cluster_ip_stays_and_is_reported(tmp_path, spec, is_problem):
    text = f"apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec: {spec}"
    loaded = load_text(tmp_path, text)

    assert names(loaded) == ["default/web"]
    assert [problem.field for problem in loaded.problems] == ["spec.clusterIP"] * is_problem


def test_pods_and_selectors_become_slices(tmp_path):
    write(tmp_path / "service.yaml", SERVICE.replace("{clusterIP", "{selector: {a: b}, clusterIP"))
    pod = """
        apiVersion: v1
        kind: Pod
        metadata: {name: web-1, namespace: shop, labels: {a: b}}
        status: {podIP: 10.0.0.1, conditions: [{type: Ready, status: "True"}]}
        """
    write(tmp_path / "pod.yaml", pod)

    (item,) = manifests.load([tmp_path]).objects["EndpointSlice"]

    assert item.metadata.labels["kubernetes.io/service-name"] == "web"
    assert [endpoint.addresses for endpoint in item.endpoints] == [["10.0.0.1"]]


def test_endpoints_are_mirrored(tmp_path):
    text = f"""{SERVICE}---
apiVersion: v1
kind: Endpoints
metadata: {{name: web, namespace: shop}}
subsets: [{{addresses: [{{ip: 192.0.2.1}}], ports: [{{port: 8080}}]}}]
"""
    (item,) = load_text(tmp_path, text).objects["EndpointSlice"]

    assert [endpoint.addresses for endpoint in item.endpoints] == [["192.0.2.1"]]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        pytest.param(
            "{kind: Service, apiVersion: v1, metadata: {name: 123}}",
            "Service 'default/123': metadata.name: cannot be read: expected str, got int (quote it)",
            id="number as name",
        ),
        pytest.param(
            "{kind: Service, apiVersion: v1, metadata: {name: a, labels: {on: yes, b: yes}}}",
            "Service 'default/a': metadata.labels: cannot be read: a key is not text, "
            "expected str, got bool (quote it)",
            id="on as label",
        ),
        pytest.param(
            "{kind: Service, apiVersion: v1, metadata: {name: a}, spec: {selector: {b: c, d: yes}}}",
            "Service 'default/a': spec.selector[d]: cannot be read: expected str, got bool (quote it)",
            id="yes in a selector",
        ),
        pytest.param(
            "{kind: Service, apiVersion: v1, metadata: {name: a, namespace: b}, spec: {ports: [{}, {port: x}]}}",
            "Service 'b/a': spec.ports[1].port: cannot be read: expected int | null, got str",
            id="word as port",
        ),
        pytest.param(
            "{kind: Service, apiVersion: v1, metadata: {generateName: a}}",
            "Service 'default/': metadata.name: is missing",
            id="no name",
        ),
        pytest.param(
            "{kind: Service, apiVersion: v1}",
            "Service '': cannot be read: Object missing required field `metadata`",
            id="no metadata",
        ),
        pytest.param(
            "{kind: Service, apiVersion: v1, metadata: {name: 'a\"b'}}",
            "Service 'default/a\"b': metadata.name: is not a DNS name (RFC 1123)",
            id="quote in the name",
        ),
        pytest.param(
            "{kind: Service, apiVersion: v1, metadata: {name: a, namespace: b.c}}",
            "Service 'b.c/a': metadata.namespace: is not a DNS label (RFC 1123)",
            id="dot in the namespace",
        ),
        pytest.param(
            "{kind: Node, apiVersion: v2, metadata: {name: a}}",
            "Node 'a': apiVersion: must be v1",
            id="unknown version",
        ),
        pytest.param(
            "{kind: EndpointSlice, metadata: {name: a}}",
            "EndpointSlice 'default/a': apiVersion: must be discovery.k8s.io/v1",
            id="no version",
        ),
    ],
)
def test_object_that_does_not_convert_is_left_out_and_named(tmp_path, text, wanted):
    path = write(tmp_path / "a.yaml", f"{SERVICE}---\n{text}")
    loaded = manifests.load([path])

    assert [str(problem) for problem in loaded.problems] == [f"{wanted} (line 5 of {path})"]
    assert names(loaded) == ["shop/web"]


@pytest.mark.parametrize(
    "text", ["hello", "- 1", "{a: 1}", "{kind: 5}", "{kind: List, items: [5]}"]
)
def test_what_is_no_object_is_reported_with_file_and_line(tmp_path, text):
    path = write(tmp_path / "a.yaml", f"---\n{text}")

    assert manifests.load([path]).problems == (
        Problem(kind="File", name=str(path), message="the object at line 1 has no kind"),
    )


def test_huge_name_does_not_flood_the_log(tmp_path):
    path = write(tmp_path / "a.yaml", SERVICE.replace("web", "w" * 10_000_000))
    (problem,) = manifests.load([path]).problems

    assert problem.field == "metadata.name"
    assert len(str(problem)) < 400


def test_same_object_in_two_files_is_reported_and_the_later_wins(tmp_path):
    first = write(tmp_path / "a.yaml", service_text("web", "172.30.0.1"))
    second = write(tmp_path / "b.yaml", service_text("web", "172.30.0.2"))
    loaded = manifests.load([second, first])

    assert the_service(loaded).spec.clusterIP == "172.30.0.2"
    assert [str(problem) for problem in loaded.problems] == [
        f"Service 'shop/web': is in {first} and in {second}; the latter is used"
    ]


def test_same_object_twice_in_a_file_is_reported_and_the_later_wins(tmp_path):
    text = service_text("web", "172.30.0.1") + "---\n" + service_text("web", "172.30.0.2")
    loaded = load_text(tmp_path, text)

    assert the_service(loaded).spec.clusterIP == "172.30.0.2"
    assert [problem.name for problem in loaded.problems] == ["web"]


def test_broken_file_is_named_and_others_are_read(tmp_path):
    write(tmp_path / "a.yaml", SERVICE)
    broken = write(tmp_path / "b.yaml", "a: b: c")
    loaded = manifests.load([tmp_path])

    assert names(loaded) == ["shop/web"]
    assert loaded.broken_files == (broken,)
    assert [str(problem) for problem in loaded.problems] == [
        f"File '{broken}': cannot parse YAML: line 1, column 5: "
        "mapping values are not allowed in this context"
    ]


def test_pipe_with_the_name_of_a_manifest_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.yaml")

    assert [p.message for p in manifests.load([tmp_path]).problems] == ["is not a regular file"]


def test_file_that_is_too_large_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    with path.open("wb") as file:
        file.truncate(64 * 2**20 + 1)

    assert [p.message for p in manifests.load([path]).problems] == ["is larger than 67108864 bytes"]


def test_link_to_nothing_is_reported(tmp_path):
    (tmp_path / "a.yaml").symlink_to("missing")

    assert [p.message for p in manifests.load([tmp_path]).problems] == [
        "cannot be read: No such file or directory"
    ]


def test_paths_that_cannot_be_read_are_all_named_at_once(tmp_path):
    with pytest.raises(errors.ConfigError) as caught:
        manifests.load([tmp_path / "one", tmp_path, tmp_path / "two.yaml"])

    assert str(caught.value) == (
        f"cannot read manifests: {tmp_path}/one: No such file or directory; "
        f"{tmp_path}/two.yaml: No such file or directory"
    )


# Pieces of manifests, so that much of what is made of them almost makes sense.
pieces = st.lists(
    st.sampled_from(
        ["---\n", "apiVersion: v1\n", "kind: Service\n", "kind: Pod\n", "kind: List\n", "items:\n- ",
         "metadata: {name: web}\n", "metadata: {name: 1}\n", "metadata: 1\n", "spec: {ports: 1}\n",
         "spec: {selector: {on: a}}\n", "spec:\n", "status: {podIPs: [{ip: x}]}\n", "{", "}", "  "]
    )
).map(lambda parts: "".join(parts).encode())  # fmt: skip
numbers = itertools.count()


@settings(max_examples=200)
@given(st.binary() | pieces, st.sampled_from(["b.yaml", "b.json"]))
def test_any_content_of_a_file_loses_nothing_of_the_others(tmp_path_factory, content, name):
    directory = tmp_path_factory.getbasetemp() / f"any-content-{next(numbers)}"
    write(directory / "a.yaml", SERVICE)
    write(directory / "c.yaml", service_text("other"))
    (directory / name).write_bytes(content)

    assert {"shop/other", "shop/web"} <= set(names(manifests.load([directory])))


def test_structs_of_pods_and_endpoints_take_null_for_absent():
    everything = {
        "metadata": {"name": "a"},
        "spec": dict.fromkeys(endpoint_controller.PodSpec.__struct_fields__),
        "status": dict.fromkeys(endpoint_controller.PodStatus.__struct_fields__),
    }

    assert msgspec.convert(everything, endpoint_controller.Pod).metadata.name == "a"
