"""The tests' API server, asked with the standard library's HTTP client."""

import contextlib
import email.utils
import gzip
import http.client
import io
import json
import shutil
import socket
import ssl
import threading
import time
import urllib.parse

import pytest

from tests.support import builders
from tests.support.api_server import ApiServer

SERVICES = "/api/v1/services"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
STREAMING_LIST = {
    "watch": "true",
    "sendInitialEvents": "true",
    "resourceVersionMatch": "NotOlderThan",
    "allowWatchBookmarks": "true",
}
# Longer than anything here takes; a client that waits in vain fails instead of hanging.
TIMEOUT_S = 10


@pytest.fixture
def server():
    with ApiServer() as server:
        yield server


class Answer:
    def __init__(self, response, body):
        self.status = response.status
        self.headers = response.headers
        self.body = body

    @property
    def json(self):
        return json.loads(self.body)


def connect(server, context=None):
    if context is None:
        return http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    return http.client.HTTPSConnection("127.0.0.1", server.port, timeout=TIMEOUT_S, context=context)


def ask(server, path, query=None, *, method="GET", body=None, headers=None, context=None):
    target = f"{path}?{urllib.parse.urlencode(query)}" if query else path
    data = None if body is None else json.dumps(body)
    given = {"Content-Type": "application/json"} if body is not None else {}
    with contextlib.closing(connect(server, context)) as connection:
        connection.request(method, target, body=data, headers=given | (headers or {}))
        response = connection.getresponse()
        return Answer(response, response.read())


class Stream:
    """An open watch."""

    def __init__(self, server, path, query):
        self._connection = connect(server)
        self._connection.request("GET", f"{path}?{urllib.parse.urlencode(query)}")
        self._response = self._connection.getresponse()
        self.status = self._response.status

    def line(self):
        return self._response.readline()

    def event(self):
        return json.loads(self.line())

    def events(self, count):
        return [self.event() for _ in range(count)]

    def close(self):
        self._response.close()
        self._connection.close()


@pytest.fixture
def watch(server):
    """Open watches that are closed in the end."""
    with contextlib.ExitStack() as stack:

        def open_watch(path=SERVICES, **query):
            stream = Stream(server, path, {"watch": "true"} | query)
            stack.callback(stream.close)
            return stream

        yield open_watch


def brief(event):
    return event["type"], event["object"]["metadata"].get("name")


def names(answer):
    return [item["metadata"]["name"] for item in answer.json["items"]]


def apply_services(server, *service_names, **tweaks):
    server.apply_many(builders.make_service(name, **tweaks) for name in service_names)


# ---- lists


def test_list_holds_the_objects_of_all_namespaces_in_order(server):
    apply_services(server, "b", "a", namespace="zoo")
    apply_services(server, "c", namespace="bar")

    assert names(ask(server, SERVICES)) == ["c", "a", "b"]


def test_list_tells_the_version_it_was_made_at(server):
    apply_services(server, "a", "b")

    answer = ask(server, SERVICES)

    assert answer.json["kind"] == "ServiceList"
    assert answer.json["metadata"] == {"resourceVersion": server.resource_version}


def test_items_of_a_list_carry_neither_kind_nor_version(server):
    apply_services(server, "a")

    item = ask(server, SERVICES).json["items"][0]

    assert "kind" not in item
    assert "apiVersion" not in item


def test_namespaced_path_lists_one_namespace(server):
    apply_services(server, "a", namespace="one")
    apply_services(server, "b", namespace="two")

    assert names(ask(server, "/api/v1/namespaces/two/services")) == ["b"]


def test_endpoint_slices_and_nodes_are_served_too(server):
    server.apply(builders.make_slice("web"))
    server.apply(builders.make_node("node7"))

    assert names(ask(server, SLICES)) == ["web-abcde"]
    assert ask(server, "/api/v1/nodes/node7").json["kind"] == "Node"


@pytest.mark.parametrize(
    ("selector", "wanted"),
    [
        pytest.param("app", ["both", "web"], id="has the label"),
        pytest.param("!app", ["none"], id="lacks the label"),
        pytest.param("app=web", ["web"], id="equals"),
        pytest.param("app == web", ["web"], id="equals, spelled with two signs"),
        pytest.param("app!=web", ["both", "none"], id="unequal matches what lacks the label"),
        pytest.param("app in (web, x)", ["web"], id="one of"),
        pytest.param("app notin (web,x)", ["both", "none"], id="none of"),
        pytest.param("app in (web,db),tier", ["both"], id="all parts must match"),
    ],
)
def test_label_selector(server, selector, wanted):
    apply_services(server, "web", labels={"app": "web"})
    apply_services(server, "both", labels={"app": "db", "tier": "back"})
    apply_services(server, "none")

    assert names(ask(server, SERVICES, {"labelSelector": selector})) == wanted


@pytest.mark.parametrize(
    ("selector", "wanted"),
    [
        pytest.param("metadata.name=web", ["web"], id="name"),
        pytest.param("spec.clusterIP!=None", ["web"], id="not headless"),
        pytest.param("spec.clusterIP=None,metadata.namespace=default", ["db"], id="two parts"),
    ],
)
def test_field_selector(server, selector, wanted):
    apply_services(server, "web")
    apply_services(server, "db", cluster_ip="None")

    assert names(ask(server, SERVICES, {"fieldSelector": selector})) == wanted


@pytest.mark.parametrize(
    "query",
    [
        pytest.param({"labelSelector": "a=(b"}, id="label selector"),
        pytest.param({"fieldSelector": "spec.colour=red"}, id="unknown field"),
        pytest.param({"resourceVersion": "abc"}, id="resource version"),
        pytest.param({"continue": "?"}, id="continue token"),
    ],
)
def test_unreadable_parameters_are_refused(server, query):
    answer = ask(server, SERVICES, query)

    assert (answer.status, answer.json["reason"]) == (400, "BadRequest")


def test_pages_show_one_moment_even_when_objects_change_meanwhile(server):
    apply_services(server, "a", "b", "c")
    first = ask(server, SERVICES, {"limit": "2"})
    server.delete("Service", "default", "c")
    apply_services(server, "d")

    token = first.json["metadata"]["continue"]
    second = ask(server, SERVICES, {"limit": "2", "continue": token})

    assert (names(first), names(second)) == (["a", "b"], ["c"])
    assert first.json["metadata"]["remainingItemCount"] == 1
    assert second.json["metadata"] == {"resourceVersion": first.json["metadata"]["resourceVersion"]}


def test_list_from_the_watch_cache_has_no_pages(server):
    apply_services(server, "a", "b", "c")

    answer = ask(server, SERVICES, {"limit": "2", "resourceVersion": "0"})

    assert names(answer) == ["a", "b", "c"]


def test_continue_after_a_compaction_has_expired(server):
    apply_services(server, "a", "b", "c")
    token = ask(server, SERVICES, {"limit": "2"}).json["metadata"]["continue"]
    apply_services(server, "d")
    server.compact()

    answer = ask(server, SERVICES, {"limit": "2", "continue": token})

    assert (answer.status, answer.json["reason"]) == (410, "Expired")


def test_expired_continue_offers_the_inconsistent_rest(server):
    apply_services(server, "a", "b", "c")
    token = ask(server, SERVICES, {"limit": "2"}).json["metadata"]["continue"]
    apply_services(server, "d")
    server.expire_next_continue()
    expired = ask(server, SERVICES, {"limit": "2", "continue": token})

    offered = expired.json["metadata"]["continue"]

    assert expired.status == 410
    assert names(ask(server, SERVICES, {"limit": "2", "continue": offered})) == ["c", "d"]


def test_list_of_an_exact_older_version_is_the_past(server):
    apply_services(server, "a")
    before = server.resource_version
    apply_services(server, "a", cluster_ip="172.30.0.9")
    apply_services(server, "b")

    query = {"resourceVersion": before, "resourceVersionMatch": "Exact"}
    answer = ask(server, SERVICES, query)

    assert names(answer) == ["a"]
    assert answer.json["items"][0]["spec"]["clusterIP"] == "172.30.0.41"


def test_list_of_a_future_version_times_out(server):
    answer = ask(server, SERVICES, {"resourceVersion": "999999"})

    assert (answer.status, answer.json["reason"]) == (504, "Timeout")
    assert answer.headers["Retry-After"] == "1"


def test_large_lists_are_compressed_if_the_client_can_read_that(server):
    server.apply_many(builders.cluster(300, 1))

    packed = ask(server, SERVICES, headers={"Accept-Encoding": "gzip"})
    plain = ask(server, SERVICES)

    assert packed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body


def test_client_that_only_reads_protobuf_is_not_acceptable(server):
    answer = ask(server, SERVICES, headers={"Accept": "application/vnd.kubernetes.protobuf"})

    assert (answer.status, answer.json["reason"]) == (406, "NotAcceptable")


def test_client_that_prefers_protobuf_gets_json(server):
    headers = {"Accept": "application/vnd.kubernetes.protobuf, */*"}

    assert ask(server, SERVICES, headers=headers).headers["Content-Type"] == "application/json"


# ---- watches


def test_watch_from_a_version_shows_what_happened_since(server, watch):
    apply_services(server, "a", "b")
    since = server.resource_version
    stream = watch(resourceVersion=since)
    apply_services(server, "a", cluster_ip="172.30.0.9")
    apply_services(server, "c")
    server.delete("Service", "default", "b")

    assert [brief(event) for event in stream.events(3)] == [
        ("MODIFIED", "a"),
        ("ADDED", "c"),
        ("DELETED", "b"),
    ]


def test_objects_of_a_watch_carry_kind_and_version(server, watch):
    stream = watch(SLICES)
    server.apply(builders.make_slice("web"))

    obj = stream.event()["object"]

    assert (obj["kind"], obj["apiVersion"]) == ("EndpointSlice", "discovery.k8s.io/v1")


def test_deleted_object_has_the_version_of_its_deletion(server, watch):
    apply_services(server, "a")
    stream = watch(resourceVersion=server.resource_version)
    server.delete("Service", "default", "a")

    event = stream.event()

    assert event["object"]["metadata"]["resourceVersion"] == server.resource_version
    assert event["object"]["spec"]["clusterIP"] == "172.30.0.41"


def test_unchanged_object_is_not_written(server, watch):
    apply_services(server, "a")
    before = server.resource_version

    apply_services(server, "a")

    assert server.resource_version == before


def test_object_that_stops_matching_is_deleted_for_that_watch(server, watch):
    apply_services(server, "a")
    stream = watch(resourceVersion=server.resource_version, labelSelector="!skip")
    apply_services(server, "a", labels={"skip": "yes"})

    event = stream.event()

    assert brief(event) == ("DELETED", "a")
    assert "labels" not in event["object"]["metadata"]
    assert event["object"]["metadata"]["resourceVersion"] == server.resource_version


def test_object_that_begins_to_match_is_added_for_that_watch(server, watch):
    apply_services(server, "a", cluster_ip="None")
    stream = watch(resourceVersion=server.resource_version, fieldSelector="spec.clusterIP!=None")
    apply_services(server, "a")

    assert brief(stream.event()) == ("ADDED", "a")


def test_watch_without_a_version_begins_with_the_present_state(server, watch):
    apply_services(server, "a", "b")

    stream = watch()

    assert [brief(event) for event in stream.events(2)] == [("ADDED", "a"), ("ADDED", "b")]


def test_watch_of_one_node_shows_no_other(server, watch):
    stream = watch("/api/v1/nodes/node2")
    server.apply(builders.make_node("node1"))
    server.apply(builders.make_node("node2"))

    assert brief(stream.event()) == ("ADDED", "node2")


def test_streaming_list_ends_with_a_marked_bookmark(server, watch):
    apply_services(server, "a")
    stream = watch(**STREAMING_LIST)

    first, mark = stream.events(2)

    assert brief(first) == ("ADDED", "a")
    assert mark == {
        "type": "BOOKMARK",
        "object": {
            "kind": "Service",
            "apiVersion": "v1",
            "metadata": {
                "resourceVersion": server.resource_version,
                "annotations": {"k8s.io/initial-events-end": "true"},
            },
        },
    }


def test_streaming_list_goes_on_as_a_watch(server, watch):
    stream = watch(**STREAMING_LIST)
    stream.event()
    apply_services(server, "a")

    assert brief(stream.event()) == ("ADDED", "a")


def test_old_server_refuses_streaming_lists():
    with ApiServer(streaming_lists=False) as server:
        answer = ask(server, SERVICES, STREAMING_LIST)

    assert (answer.status, answer.json["reason"]) == (422, "Invalid")
    assert "sendInitialEvents is forbidden for watch" in answer.json["message"]


def test_streaming_list_must_say_which_version_it_wants(server):
    answer = ask(server, SERVICES, {"watch": "true", "sendInitialEvents": "true"})

    assert answer.status == 422


def test_bookmarks_come_regularly_to_who_allows_them(watch, server):
    server.settings.bookmark_interval_s = 0.02
    stream = watch(SLICES, resourceVersion=server.resource_version, allowWatchBookmarks="true")
    apply_services(server, "elsewhere")
    wanted = {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": {"resourceVersion": server.resource_version},
    }

    # The first may still tell of the version before.
    seen = [stream.event() for _ in range(3)]

    assert {"type": "BOOKMARK", "object": wanted} in seen


def test_bookmarks_do_not_come_to_who_does_not_allow_them(watch, server):
    server.settings.bookmark_interval_s = 0.01
    without = watch()
    with_them = watch(allowWatchBookmarks="true")
    server.apply(builders.make_node("node1"))  # what is told must be newer than where it began
    with_them.events(3)
    server.end_watches()

    assert without.line() == b""


def test_watch_from_forgotten_history_gets_410_as_an_event(watch, server):
    apply_services(server, "a")
    old = server.resource_version
    apply_services(server, "b")
    server.compact()
    stream = watch(resourceVersion=old)

    event = stream.event()

    assert stream.status == 200
    assert event["type"] == "ERROR"
    assert (event["object"]["code"], event["object"]["reason"]) == (410, "Expired")
    assert event["object"]["message"].startswith("too old resource version")
    assert stream.line() == b""


def test_history_is_a_ring():
    with ApiServer(history=3) as server:
        apply_services(server, "a")
        old = server.resource_version
        apply_services(server, *"bcde")
        with contextlib.closing(
            Stream(server, SERVICES, {"watch": "1", "resourceVersion": old})
        ) as stream:
            event = stream.event()

    assert event["object"]["code"] == 410


def test_compaction_leaves_open_watches_alone(watch, server):
    apply_services(server, "a")
    stream = watch()
    stream.event()
    server.compact()
    apply_services(server, "b")

    assert brief(stream.event()) == ("ADDED", "b")


def test_watch_ends_cleanly_and_its_connection_is_used_again(server):
    with contextlib.closing(connect(server)) as connection:
        connection.request("GET", f"{SERVICES}?watch=true&timeoutSeconds=1")
        first = connection.getresponse().read()
        connection.request("GET", SERVICES)
        second = connection.getresponse()
        second.read()

    assert (first, second.status) == (b"", 200)
    assert len({request.client for request in server.requests}) == 1


def test_watches_can_be_ended_as_if_by_timeout(server, watch):
    stream = watch()
    server.end_watches("services")

    assert stream.line() == b""


def test_open_watches_are_counted_by_resource(server, watch):
    watch()
    watch(SLICES)

    assert server.open_watches("services") == 1
    assert server.open_watches() == 2


def test_watch_that_the_client_leaves_is_noticed_at_once(server, watch):
    stream = watch()
    stream.close()

    server.wait_for(lambda: server.open_watches() == 0)


# ---- single objects and writing


def test_stored_object_gets_what_a_server_assigns(server):
    stored = server.apply(builders.make_service("a"))

    assert set(stored["metadata"]) == {
        "name",
        "namespace",
        "uid",
        "resourceVersion",
        "creationTimestamp",
    }


def test_replaced_object_keeps_its_uid(server):
    before = server.apply(builders.make_service("a"))
    after = server.apply(builders.make_service("a", cluster_ip="172.30.0.9"))

    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert int(after["metadata"]["resourceVersion"]) > int(before["metadata"]["resourceVersion"])


def test_realistic_objects_carry_what_nobody_reads():
    with ApiServer(realistic=True) as server:
        stored = server.apply(builders.make_service("a"))

    fields = stored["metadata"]["managedFields"][0]["fieldsV1"]
    assert fields["f:spec"]["f:clusterIP"] == {}


def test_created_object_is_there(server):
    path = "/api/v1/namespaces/default/services"
    created = ask(server, path, method="POST", body=builders.make_service("a"))

    assert created.status == 201
    assert ask(server, f"{path}/a").json == created.json


def test_creating_twice_is_a_conflict(server):
    apply_services(server, "a")
    path = "/api/v1/namespaces/default/services"

    answer = ask(server, path, method="POST", body=builders.make_service("a"))

    assert (answer.status, answer.json["reason"]) == (409, "AlreadyExists")


def test_update_of_an_older_version_is_a_conflict(server):
    stale = server.apply(builders.make_service("a"))
    apply_services(server, "a", cluster_ip="172.30.0.9")
    path = "/api/v1/namespaces/default/services/a"

    answer = ask(server, path, method="PUT", body=stale)

    assert (answer.status, answer.json["reason"]) == (409, "Conflict")


def test_update_is_seen_by_watches(server, watch):
    obj = server.apply(builders.make_service("a"))
    stream = watch(resourceVersion=server.resource_version)
    obj["spec"]["clusterIP"] = "172.30.0.9"
    ask(server, "/api/v1/namespaces/default/services/a", method="PUT", body=obj)

    assert stream.event()["object"]["spec"]["clusterIP"] == "172.30.0.9"


def test_deleted_object_is_gone(server):
    server.apply(builders.make_slice("a", name="a"))
    path = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/a"

    answer = ask(server, path, method="DELETE")

    assert answer.json["status"] == "Success"
    assert ask(server, path).status == 404


def test_deleting_a_service_returns_the_service(server):
    apply_services(server, "a")

    answer = ask(server, "/api/v1/namespaces/default/services/a", method="DELETE")

    assert (answer.json["kind"], server.objects("Service")) == ("Service", [])


def test_events_are_recorded_and_can_be_counted_up(server):
    path = "/apis/events.k8s.io/v1/namespaces/default/events"
    event = {"metadata": {"name": "node1.1"}, "reason": "Starting", "action": "StartKubeProxy"}
    ask(server, path, method="POST", body=event)
    headers = {"Content-Type": "application/merge-patch+json"}
    patch = {"series": {"count": 2}, "action": None}
    ask(server, f"{path}/node1.1", method="PATCH", body=patch, headers=headers)

    (recorded,) = server.objects("Event")

    assert recorded["apiVersion"] == "events.k8s.io/v1"
    assert (recorded["reason"], recorded["series"]) == ("Starting", {"count": 2})
    assert "action" not in recorded


@pytest.mark.parametrize("metadata", [None, {"name": "other"}, {"namespace": None}, "text"])
def test_patch_cannot_rename(server, metadata):
    server.apply({"kind": "Event", "apiVersion": "v1", "metadata": {"name": "e"}})
    path = "/api/v1/namespaces/default/events/e"
    headers = {"Content-Type": "application/merge-patch+json"}

    answer = ask(server, path, method="PATCH", body={"metadata": metadata}, headers=headers)

    assert (answer.status, answer.json["reason"]) == (422, "Invalid")


def test_body_that_is_not_json_is_not_understood(server):
    answer = ask(
        server,
        "/api/v1/namespaces/default/events",
        method="POST",
        body={},
        headers={"Content-Type": "application/vnd.kubernetes.protobuf"},
    )

    assert (answer.status, answer.json["reason"]) == (415, "UnsupportedMediaType")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/nothing",
        "/api/v1/pods",
        "/api/v1/services/a",
        "/api/v1/namespaces/default/nodes",
        "/apis/apps/v1/deployments",
    ],
)
def test_unknown_paths_are_not_found(server, path):
    assert ask(server, path).status == 404


@pytest.mark.parametrize("path", ["/healthz", "/livez", "/readyz"])
def test_server_says_it_is_well(server, path):
    assert ask(server, path).body == b"ok"


@pytest.mark.parametrize("path", ["/version", "/version/"])
def test_server_tells_its_version(server, path):
    assert ask(server, path).json["gitVersion"].startswith("v1.")


def test_lists_of_both_kinds_can_be_loaded(server, tmp_path):
    mixed = {"kind": "List", "apiVersion": "v1", "items": [builders.make_node("node1")]}
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    bare = {key: value for key, value in builders.make_service("a").items() if key != "kind"}
    typed = {"kind": "ServiceList", "apiVersion": "v1", "items": [bare]}
    (tmp_path / "typed.yaml").write_text(json.dumps(typed))

    loaded = server.load(tmp_path / "mixed.json") + server.load(tmp_path / "typed.yaml")

    assert loaded == 2
    assert [obj["kind"] for obj in server.objects("Node") + server.objects("services")] == [
        "Node",
        "Service",
    ]


# ---- who is let in


def test_request_without_a_token_is_unauthorized():
    with ApiServer(tokens=["secret"]) as server:
        answer = ask(server, SERVICES)

    assert (answer.status, answer.json["reason"]) == (401, "Unauthorized")


def test_accepted_tokens_can_be_rotated():
    with ApiServer(tokens=["old"]) as server:
        server.accept_tokens("new")
        statuses = [
            ask(server, SERVICES, headers={"Authorization": f"Bearer {token}"}).status
            for token in ("old", "new")
        ]

    assert statuses == [401, 200]


def test_kubeconfig_file_points_to_the_server(tmp_path):
    with ApiServer(tokens=["secret"]) as server:
        config = json.loads(server.kubeconfig(tmp_path / "kubeconfig").read_text())
        url = server.url

    assert config["clusters"][0]["cluster"] == {"server": url}
    assert config["users"][0]["user"] == {"token": "secret"}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made with openssl")
def test_client_certificate_is_as_good_as_a_token():
    with ApiServer(tls=True, needs_client_certificate=True) as server:
        files = server.certificates
        stranger = ssl.create_default_context(cafile=files.authority)
        known = ssl.create_default_context(cafile=files.authority)
        known.load_cert_chain(files.client, files.client_key)
        statuses = [ask(server, SERVICES, context=context).status for context in (stranger, known)]

    assert statuses == [401, 200]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made with openssl")
def test_stop_cuts_encrypted_watches():
    with ApiServer(tls=True) as server:
        context = ssl.create_default_context(cafile=server.certificates.authority)
        with contextlib.closing(connect(server, context)) as connection:
            connection.request("GET", f"{SERVICES}?watch=true")
            response = connection.getresponse()
            server.stop()

            with pytest.raises((http.client.IncompleteRead, OSError)):
                response.read()


# ---- outages


def test_stopped_server_refuses_connections(server):
    server.stop()

    with pytest.raises(ConnectionRefusedError):
        ask(server, SERVICES)


def test_restarted_server_has_the_same_port_and_objects(server):
    apply_services(server, "a")
    url = server.url
    server.stop()
    server.start()

    assert server.url == url
    assert names(ask(server, SERVICES)) == ["a"]


def test_stop_cuts_open_watches(server, watch):
    stream = watch()
    server.stop()

    assert stream.line() == b""
    assert server.open_watches() == 0
    assert server.open_connections() == 0


def test_frozen_server_holds_requests_and_answers_them_when_thawed(server):
    server.freeze()
    answers = []
    client = threading.Thread(target=lambda: answers.append(ask(server, SERVICES).status))
    client.start()
    server.wait_for(lambda: server.open_connections() == 1)
    held = list(answers)
    server.thaw()
    client.join(TIMEOUT_S)

    assert (held, answers) == ([], [200])


def test_frozen_server_sends_no_events(server, watch):
    stream = watch(**STREAMING_LIST)
    stream.event()
    server.freeze()
    apply_services(server, "a")
    server.settings.bookmark_interval_s = 0.01
    with contextlib.closing(connect(server)) as other:
        other.timeout = 0.2
        other.request("GET", SERVICES)

        with pytest.raises(TimeoutError):
            other.getresponse()

    server.thaw()
    assert brief(stream.event()) == ("ADDED", "a")


def test_server_can_be_stopped_while_a_client_does_not_read(server):
    with contextlib.closing(connect(server)) as connection:
        # More than the buffers of both sockets hold.
        big = builders.make_service("big", annotations={"text": "x" * 16_000_000})
        connection.request("GET", f"{SERVICES}?watch=true")
        server.wait_for(lambda: server.open_watches() == 1)
        server.apply(big)
        server.stop()

    assert server.open_connections() == 0


def test_frozen_server_can_be_stopped(server, watch):
    watch()
    server.freeze()
    server.stop()

    assert server.open_connections() == 0


def test_cut_watches_end_in_the_middle_of_the_stream(server, watch):
    stream = watch(SLICES)
    other = watch()

    assert server.cut_watches("endpointslices") == 1

    assert stream.line() == b""
    apply_services(server, "a")
    assert brief(other.event()) == ("ADDED", "a")


def test_trickling_server_still_says_everything(server):
    apply_services(server, "a")
    server.trickle(20_000)

    assert names(ask(server, SERVICES)) == ["a"]


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_failures_last_until_healed(server, status):
    server.fail(status)
    during = [ask(server, SERVICES).status for _ in range(2)]
    server.heal()

    assert during == [status, status]
    assert ask(server, SERVICES).status == 200


def test_failure_can_be_limited_to_a_verb_a_resource_and_a_number(server):
    server.fail(503, verb="list", resource="services", times=1)

    statuses = [ask(server, path).status for path in (SLICES, SERVICES, SERVICES)]

    assert statuses == [200, 503, 200]


def test_forbidden_says_what_is_forbidden_as_the_real_server_does(server):
    server.fail(403)

    assert ask(server, SLICES).json["message"] == (
        "endpointslices.discovery.k8s.io is forbidden: User "
        '"system:serviceaccount:kube-system:kube-proxy" cannot list resource "endpointslices" '
        'in API group "discovery.k8s.io" at the cluster scope'
    )


def test_too_many_requests_says_when_to_come_back(server):
    server.fail(429, retry_after_s=3)
    answer = ask(server, SERVICES)

    assert answer.headers["Retry-After"] == "3"
    assert answer.json["details"]["retryAfterSeconds"] == 3


def test_raw_line_reaches_all_watches_of_the_resource_between_events(server, watch):
    streams = [watch(), watch()]
    server.send_raw("services", b"garbage\n")
    apply_services(server, "a")

    for stream in streams:
        assert stream.line() == b"garbage\n"
        assert brief(stream.event()) == ("ADDED", "a")


def test_watch_can_end_within_an_event(server, watch):
    stream = watch()
    server.send_raw("services", b'{"type":"ADD', close=True)

    assert stream.line() == b'{"type":"ADD'
    assert stream.line() == b""


def test_answer_can_be_something_else_than_http(server):
    server.spoil(b"\x15\x03\x01\x00\x02\x02\x16")

    with pytest.raises(http.client.BadStatusLine):
        ask(server, SERVICES)


def test_answer_can_break_off_in_the_middle(server):
    server.apply_many(builders.cluster(50, 1))
    server.halve(verb="list")

    with pytest.raises(http.client.IncompleteRead):
        ask(server, SERVICES)


def test_bytes_that_are_no_request_are_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S) as sock:
        sock.sendall(b"hello\r\n\r\n")
        answer = io.BytesIO()
        while data := sock.recv(4096):
            answer.write(data)

    assert answer.getvalue().startswith(b"HTTP/1.1 400 ")


def test_requests_are_remembered_with_what_was_asked(server):
    ask(server, SERVICES, {"labelSelector": "!a/b"}, headers={"User-Agent": "me"})

    (request,) = server.requests

    assert (request.path, request.query) == (SERVICES, {"labelSelector": "!a/b"})
    assert (request.verb, request.resource) == ("list", "services")
    assert request.headers["user-agent"] == "me"


def test_requests_are_counted_by_what_they_are(server, watch):
    ask(server, SERVICES)
    ask(server, SLICES)
    watch()

    assert server.count() == 3
    assert server.count("list") == 2
    assert server.count(verb="watch", resource="services", method="GET") == 1


def test_server_can_listen_on_ipv6():
    try:
        server = ApiServer(host="::1")
    except OSError:
        pytest.skip("no IPv6 here")
    with server:
        assert server.url == f"http://[::1]:{server.port}"


# ---- many objects


def test_streaming_list_of_a_large_cluster_is_complete(server, watch):
    server.apply_many(builders.cluster(2000, 1))
    stream = watch(SLICES, **STREAMING_LIST)

    kinds = [event["type"] for event in stream.events(2001)]

    assert kinds == ["ADDED"] * 2000 + ["BOOKMARK"]


def test_made_up_cluster_has_no_address_twice():
    objects = list(builders.cluster(300, 7, nodes=4))
    pods = [
        endpoint["addresses"][0]
        for obj in objects
        if obj["kind"] == "EndpointSlice"
        for endpoint in obj["endpoints"]
    ]
    cluster_ips = [obj["spec"]["clusterIP"] for obj in objects if obj["kind"] == "Service"]

    assert len(set(pods)) == 300 * 7
    assert (cluster_ips[0], cluster_ips[299]) == ("172.30.0.1", "172.30.1.44")


def test_made_up_service_with_many_endpoints_has_several_slices():
    slices = [obj for obj in builders.cluster(1, 250) if obj["kind"] == "EndpointSlice"]

    assert [len(obj["endpoints"]) for obj in slices] == [100, 100, 50]


# Permissions -------------------------------------------------------------------------------------


def may(server, verb, resource):
    answer = ask(
        server,
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
        method="POST",
        body={
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {"verb": verb, "resource": resource}},
        },
    )
    assert answer.status == 201
    return answer.json["status"]["allowed"]


def test_what_nobody_may_do_is_refused_and_told_when_asked(server):
    server.settings.authorize = lambda request, route: (
        (request.verb, route.resource.plural) != ("list", "services")
    )

    assert (may(server, "list", "services"), may(server, "watch", "services")) == (False, True)
    assert ask(server, SERVICES).status == 403
    assert ask(server, SLICES).status == 200


def test_version_and_clock_can_be_set(server):
    server.settings.version = "v1.20.0"
    server.settings.clock_ahead_s = 3600
    answer = ask(server, "/version")
    date = email.utils.parsedate_to_datetime(answer.headers["Date"])

    assert answer.json["gitVersion"] == "v1.20.0"
    assert 3500 < date.timestamp() - time.time() < 3700
