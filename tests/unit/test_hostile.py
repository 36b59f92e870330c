"""
Whatever is sent, read or written in a file: no injection, bounded memory, a clear word, and on it goes.

Each parser is fed what hypothesis can think of. ``make fuzz`` lets it think for longer.
"""

import contextlib
import http.client
import json
import socket
import threading

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from kubeproxy_py import api, config_file, httpserver, manifest_parser, objects, records, watch
from kubeproxy_py.errors import ApiUnavailable
from kubeproxy_py.iptables import chains, plan
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily
from kubeproxy_py.ruleset import Ruleset
from kubeproxy_py.store import Store
from tests.support import builders, states

V4 = IPFamily.V4
DEEP = 100_000

# What ends a comment, a rule, a line, a string, a name; or is none of these in some alphabet.
NASTY = st.sampled_from(
    [
        '"', "'", "\\", "\n", "\r\n", "\0", "-j DROP", 'x" -j ACCEPT', "COMMIT\n*nat", "\u2028", "\u202e",
        "ß", "\ud7ff", "a" * 300, "0x7f.1", "1.2.3.4/33", "::ffff:1.2.3.4", "fe80::1%eth0", "-1",
    ]
)  # fmt: skip
TEXT = NASTY | st.text(max_size=20) | st.from_regex(records._LABEL, fullmatch=True)
NUMBER = st.integers() | st.integers(min_value=-1, max_value=70_000)
IP = st.sampled_from(["172.30.0.1", "10.0.0.1", "fd00::1", "1.2.3.4"]) | TEXT


def maybe(strategy):
    return st.none() | strategy


def built(kind, **fields):
    return st.builds(kind, **{name: maybe(strategy) for name, strategy in fields.items()})


METADATA = st.builds(
    objects.ObjectMeta,
    name=TEXT,
    namespace=TEXT,
    labels=maybe(
        st.dictionaries(st.sampled_from([records.SERVICE_NAME_LABEL]) | TEXT, TEXT, max_size=2)
    ),
    annotations=maybe(st.dictionaries(st.just(records.TRIGGER_ANNOTATION), TEXT, max_size=1)),
)
SERVICE = st.builds(
    objects.Service,
    metadata=METADATA,
    spec=built(
        objects.ServiceSpec,
        type=st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer"]) | TEXT,
        clusterIP=IP,
        clusterIPs=st.lists(IP, max_size=2),
        ipFamilies=st.lists(st.sampled_from(["IPv4", "IPv6"]) | TEXT, max_size=2),
        ports=st.lists(
            built(
                objects.ServicePortSpec,
                port=NUMBER,
                name=TEXT,
                protocol=st.sampled_from(["TCP", "UDP"]) | TEXT,
                nodePort=NUMBER,
            ),
            max_size=3,
        ),
        externalIPs=st.lists(IP, max_size=2),
        loadBalancerSourceRanges=st.lists(st.just("10.0.0.0/8") | TEXT, max_size=2),
        externalTrafficPolicy=st.just("Local") | TEXT,
        sessionAffinity=st.just("ClientIP") | TEXT,
        sessionAffinityConfig=built(
            objects.SessionAffinityConfig,
            clientIP=built(objects.ClientIPConfig, timeoutSeconds=NUMBER),
        ),
        healthCheckNodePort=NUMBER,
    ),
    status=built(
        objects.ServiceStatus,
        loadBalancer=built(
            objects.LoadBalancerStatus,
            ingress=st.lists(built(objects.LoadBalancerIngress, ip=IP, ipMode=TEXT), max_size=2),
        ),
    ),
)
SLICE = st.builds(
    objects.EndpointSlice,
    metadata=METADATA,
    addressType=st.sampled_from(["IPv4", "IPv6"]) | TEXT,
    ports=maybe(
        st.lists(built(objects.SlicePort, port=NUMBER, name=TEXT, protocol=TEXT), max_size=2)
    ),
    endpoints=maybe(
        st.lists(
            built(objects.SliceEndpoint, addresses=st.lists(IP, max_size=2), nodeName=TEXT),
            max_size=3,
        )
    ),
)


class Filled:
    """A store and what it complains about."""

    def __init__(self):
        self.problems = []
        self.store = Store(
            node_name="node1",
            families=tuple(IPFamily),
            metrics=Metrics(CollectorRegistry()),
            report=self.problems.append,
            changed=lambda family: None,
            node_changed=lambda node: None,
        )

    def rules(self, family):
        for kind in ("Service", "EndpointSlice"):
            self.store.listed(kind)
        ruleset = Ruleset(states.golden_options(family))
        ruleset.apply(self.store.take(family).services)
        return ruleset


# Objects -----------------------------------------------------------------------------------------


@given(st.lists(SERVICE, max_size=4), st.lists(SLICE, max_size=4))
def test_no_object_writes_anything_but_rules(services, slices):
    filled = Filled()
    for kind, found in (("Service", services), ("EndpointSlice", slices)):
        for obj in found:
            filled.store.upsert(kind, obj)
    for family in IPFamily:
        ruleset = filled.rules(family)
        for batch in plan.plan(ruleset.tables, {}, groups=ruleset.groups()):
            text = batch.render()
            # What a restore would read is what was meant: as many rules, and each the same.
            read = chains.parse_save(text.splitlines())
            for section in batch.sections:
                assert {name: read[section.table][name] for name in section.write} == section.write
            assert text.isascii()
            assert all(line.isprintable() and len(line) < 1000 for line in text.split("\n"))


@given(st.text(alphabet=st.characters(), min_size=1), st.sampled_from(["name", "namespace"]))
def test_only_dns_labels_are_names(text, field):
    item = builders.make_service()
    item["metadata"][field] = text
    filled = Filled()
    filled.store.upsert("Service", states.decode(item))

    assert filled.rules(V4).service_count == records.is_label(text)


def test_a_hundred_thousand_bad_ports_are_told_in_twenty_lines_and_one():
    item = builders.make_service(
        ports=[builders.make_port(0, name=f"p{n}") for n in range(100_000)]
    )
    filled = Filled()
    filled.store.upsert("Service", states.decode(item))

    assert len(filled.problems) == 21
    assert filled.problems[-1].message == "and 99980 more problems of this object"


def test_a_hundred_thousand_endpoints_that_are_none_are_told_in_twenty_lines_and_one():
    endpoints = [builders.make_endpoint(f"host-{n}") for n in range(100_000)]
    filled = Filled()
    filled.store.upsert(
        "EndpointSlice",
        states.decode(builders.make_slice(endpoints=endpoints, address_type="IPv4")),
    )

    assert len(filled.problems) == 21


@pytest.mark.parametrize(
    "field", ["name", "namespace", "clusterIP", "externalIPs", "loadBalancerSourceRanges"]
)
def test_ten_megabytes_of_name_are_told_in_a_line(field):
    huge = "x" * (10 << 20)
    item = builders.make_service()
    if field in item["metadata"]:
        item["metadata"][field] = huge
    else:
        item["spec"][field] = huge if field == "clusterIP" else [huge]
        del item["spec"]["ipFamilies"]
    filled = Filled()
    filled.store.upsert("Service", states.decode(item))

    (problem,) = filled.problems
    assert len(problem.message) < 200


# Watch streams -----------------------------------------------------------------------------------


class Script:
    """A connection whose answers are written in advance; then comes the truth, and the end."""

    server = "http://script"

    def __init__(self, answers, truth, stop):
        self._answers = list(answers)
        self._truth = truth
        self._stop = stop
        self._is_true = False

    def get(self, _path, query, *, read_timeout_s):
        if self._answers:
            return Answer(self._answers.pop(0))
        if self._is_true:
            self._stop.set()
            raise ApiUnavailable("the end")
        if query.get("resourceVersion", "0") != "0" and "limit" not in query:
            # Whatever the garbage has made of its place, a server that lost it says so.
            return Answer([line("ERROR", {"code": 410, "reason": "Expired"})])
        self._is_true = "watch" in query
        items = [line("ADDED", item) for item in self._truth]
        end = {
            "metadata": {"resourceVersion": "9", "annotations": {watch._INITIAL_EVENTS_END: "true"}}
        }
        if "watch" in query:
            return Answer([*items, line("BOOKMARK", end)])
        self._is_true = True
        page = {"metadata": {"resourceVersion": "9"}, "items": self._truth}
        return Answer([json.dumps(page).encode()])


class Answer(contextlib.AbstractContextManager):
    def __init__(self, pieces):
        self._pieces = pieces

    def pieces(self):
        return iter(self._pieces)

    def __exit__(self, *_):
        return None


class Shelf:
    """A sink that remembers."""

    def __init__(self):
        self.objects = {}

    def upsert(self, _kind, obj):
        self.objects[obj.metadata.namespace, obj.metadata.name] = obj.metadata.resourceVersion

    def delete(self, _kind, namespace, name):
        self.objects.pop((namespace, name), None)

    def listed(self, _kind):
        pass


def line(kind, obj):
    return json.dumps({"type": kind, "object": obj}).encode() + b"\n"


def service(name, version):
    return {"metadata": {"name": name, "namespace": "default", "resourceVersion": version}}


NAMES = st.sampled_from(["a", "b", "c", ""])
VERSIONS = st.sampled_from(["", "1", "5", "100", "9" * 5000, "x", "²"])
EVENTS = st.builds(
    line,
    st.sampled_from(["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR", "NEW"]),
    st.builds(service, NAMES, VERSIONS)
    | st.just(
        {"metadata": {"resourceVersion": "7", "annotations": {watch._INITIAL_EVENTS_END: "true"}}}
    )
    | st.just({"code": 410})
    | st.just({"metadata": {"name": "bad", "namespace": 5}}),
)
GARBAGE = st.binary(max_size=30) | st.sampled_from(
    [
        b'{"type":"ADDED","object":' + b"[" * DEEP + b"]" * DEEP + b"}\n",
        b'{"type":"ADDED","object":{"metadata":{"name":"a","x":'
        + b"[" * DEEP
        + b"]" * DEEP
        + b"}}}\n",
        b'{"type":"ADDED","object":{"metadata":{"name":"\xff"}}}\n',
        b'{"type":"ERROR","object":{"message":"\xff"}}\n',
        b'{"type":"ADDED","object":{"metadata":{"name":"a"},"spec":{"ports":[{"port":1e999}]}}}\n',
        b'{"type":"ADDED"',
        b"\n\n\n",
        b"null\n",
    ]
)


@given(
    st.lists(st.lists(EVENTS | GARBAGE, max_size=6), max_size=4),
    st.dictionaries(st.sampled_from(["a", "b", "d"]), st.just("8")),
)
@example(
    [
        [
            line("ADDED", service("a", "1")),
            b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"'
            + b"9" * 5000
            + b'"}}}\n',
        ]
    ],
    {},
)
def test_whatever_a_server_sent_a_fresh_list_is_the_truth(answers, truth):
    stop = threading.Event()
    shelf = Shelf()
    watcher = watch.Watcher(
        "Service",
        Script(answers, [service(name, version) for name, version in truth.items()], stop),
        shelf,
        lambda problem: None,
        Metrics(CollectorRegistry()),
        stop=stop,
        pause_s=0.0,
    )
    watcher.run()

    assert shelf.objects == {("default", name): version for name, version in truth.items()}


@pytest.mark.parametrize(
    ("one", "other", "is_older"),
    [("9", "10", True), ("10", "9", False), ("9" * 5000, "1" + "0" * 5000, True), ("007", "7", False),
     ("x", "9", False), ("²", "3", False), ("", "1", False)],
)  # fmt: skip
def test_versions_are_compared_as_numbers_however_long(one, other, is_older):
    assert watch._is_older(one, other) is is_older


@pytest.mark.parametrize("body", [b"[" * DEEP, b'{"message":"\xff"}', b"{", b'{"message":"' + b"x" * 99_999 + b'"}'])  # fmt: skip
def test_a_refusal_with_any_body_is_told_in_a_line(body):
    class Refusing:
        status = 500

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def pieces(self):
            return iter([body])

    error = api._refusal(Refusing(), api._Request("GET", "http://host/path", None, 1.0))

    assert isinstance(error, api.Refused)
    assert len(str(error)) < 1200


# Texts -------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.text()
        | NASTY
        | st.sampled_from(["*nat", "COMMIT", ":A - [0:0]", "-A A -j B", "-A", ":", "*"])
    )
)
def test_no_text_of_iptables_save_is_too_much(lines):
    chains.parse_save(lines)


@given(st.binary() | st.text().map(str.encode) | st.sampled_from([
    b"[" * 2000, b"{" * 2000, b"&a [*a]", b"a: &a\n  b: *a\n", b'{"kind":' * 5000, b"- " * 2000,
    b"kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v1alpha1\nconntrack: 5",
]))  # fmt: skip
def test_no_configuration_file_is_more_than_wrong(content):
    # What load_file turns into a ConfigError.
    with contextlib.suppress(ValueError, RecursionError):
        config_file._decode(content)


@given(st.binary() | st.sampled_from([b"[" * 5000, b"{" * 5000, b"&a [*a]", b"- " * 5000]))
def test_no_manifest_is_more_than_unparsable(content):
    for parse in (manifest_parser.parse_yaml, manifest_parser.parse_json):
        with contextlib.suppress(manifest_parser.UnparsableError):
            parse(content)


def test_every_decoder_of_the_watch_knows_what_is_unreadable():
    nested = b"[" * DEEP
    for decode in (
        watch._EVENT_DECODER.decode,
        watch._PAGE_DECODER.decode,
        msgspec.json.Decoder(objects.Service).decode,
    ):
        with pytest.raises(api.UNREADABLE):
            decode(nested)


# The servers -------------------------------------------------------------------------------------


@pytest.fixture
def port():
    """Give the port of a server that answers everything with 200."""
    server = httpserver.HttpServer()
    server.start()
    sock = httpserver.bind("127.0.0.1", 0)
    number = sock.getsockname()[1]
    server.listen(sock, lambda request: httpserver.Response(200, request.path.encode()))
    yield number
    server.stop()


REQUESTS = st.lists(
    st.binary(max_size=60)
    | st.sampled_from(
        [b"GET /%00%ff?a=%zz HTTP/1.1\r\n", b"Host: x\r\n", b"\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    )
    | st.sampled_from(
        [b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n", b"ffffffffffffffff\r\n", b"A" * 70_000]
    ),
    max_size=6,
).map(b"".join)  # fmt: skip


def test_no_bytes_keep_a_server_from_answering_the_next(port):
    threads = threading.active_count()

    @given(REQUESTS)
    @settings(max_examples=200)
    def send(data):
        # The server may have hung up on the first half.
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as sock,
            contextlib.suppress(OSError),
        ):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass

    with capture_logs() as logs:
        send()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/fine")
        assert connection.getresponse().read() == b"/fine"
        connection.close()

    assert logs == []
    # The workers of the server, which are bounded, and nobody else.
    assert threading.active_count() <= threads + httpserver._WORKERS
