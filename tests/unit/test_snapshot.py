"""State to bytes and back; and everything that must not come back."""

import hashlib
import json
import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeproxy_py import snapshot
from kubeproxy_py.model import Endpoint, IPFamily, Node, PortKey, ServiceState
from kubeproxy_py.ruleset import Ruleset
from tests.support import states, strategies
from tests.support.builders import make_endpoint, make_service, make_slice

V4, V6 = IPFamily.V4, IPFamily.V6
NODE = Node(name="node1", ips=("192.168.0.2", "fd00::2"), pod_cidrs=("10.180.0.0/24",), zone="a")
IDENTITY = snapshot.identity("https://api:6443", True)
ITEMS = [
    make_service("web", cluster_ip="172.30.0.1", externalIPs=["192.168.99.1"]),
    make_slice("web", endpoints=[make_endpoint("10.180.0.1"), make_endpoint("10.180.1.1")]),
]


def states_of(family=V4, items=ITEMS):
    return states.service_states(items, family)


def written(services=None, node=NODE, **options):
    packed = snapshot.pack(node, {V4: (services or states_of()).values()})
    return snapshot.render(
        packed, **{"node": "node1", "identity": IDENTITY, "saved_at": 12.5, **options}
    )


def read(data):
    return snapshot.parse(data, node="node1", identity=IDENTITY)


def forged(change):
    """Return a file that is right but for what *change* does to its content."""
    head, _, packed = written().partition(b"\n")
    content = json.loads(zlib.decompress(packed))
    change(content)
    packed = zlib.compress(json.dumps(content).encode())
    header = json.loads(head)
    header |= {"size": len(packed), "sha256": hashlib.sha256(packed).hexdigest()}
    return json.dumps(header).encode() + b"\n" + packed


def with_header(**fields):
    head, _, packed = written().partition(b"\n")
    return json.dumps({**json.loads(head), **fields}).encode() + b"\n" + packed


def first_port(content):
    return content["services"]["IPv4"][0][0]


def test_what_is_written_is_read():
    last = read(written())

    assert last.saved_at == 12.5
    assert last.state == snapshot.State(NODE, {V4: states_of()})


@given(strategies.service_states())
def test_a_state_read_back_has_the_same_rules(services):
    back = read(written(services or states_of())).state.services[V4]
    before, after = (Ruleset(states.golden_options(V4)) for _ in range(2))
    before.apply({name: state for name, state in (services or states_of()).items() if state.ports})
    after.apply(back)

    assert after.tables == before.tables


def test_equal_states_give_equal_bytes():
    hints = [frozenset(names) for names in (("a", "b", "c"), ("c", "b", "a"))]
    key = next(iter(next(iter(states_of().values())).ports))
    one, other = (
        snapshot.pack(
            NODE,
            {
                V4: [
                    ServiceState(state.ports, {key: (Endpoint("10.0.0.1", 80, zone_hints=zones),)})
                    for state in states_of().values()
                ]
            },
        )
        for zones in hints
    )

    assert one == other


def test_endpoints_are_sorted_and_without_duplicates_whatever_the_file_has():
    def twice(content):
        first_port(content)[1] = [*reversed(first_port(content)[1]), *first_port(content)[1]]

    (state,) = read(forged(twice)).state.services[V4].values()

    assert [ep.ip for ep in state.endpoints[PortKey("", "tcp")]] == ["10.180.0.1", "10.180.1.1"]


def test_identity_tells_clusters_and_settings_apart():
    assert len({snapshot.identity(*facts) for facts in (("a", 1), ("b", 1), ("a", 2))}) == 3


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no header"),
        (b"x" * 10_000 + b"\n", "no header"),
        (b"no json\n", "header is not readable"),
        (b"[" * 4000 + b"\n", "header is not readable"),
        (with_header(magic="other"), "another program's"),
        (with_header(format=2), r"written by version '\d.*format 2"),
        (with_header(version="9.9"), "written by version '9.9'"),
        (with_header(node="node2"), "of node 'node2'"),
        (with_header(identity="x"), "another cluster or configuration"),
        (with_header(size=1), "damaged"),
        (with_header(saved_at=-1), "time is -1"),
        (with_header(saved_at=1e300), "time is 1e"),
        (written()[:-1], "damaged"),
        (written() + b"x", "damaged"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_what_is_not_ours_is_refused_with_the_reason(data, why):
    with pytest.raises(snapshot.Unusable, match=why):
        read(data)


def packed_as(packed):
    head = json.loads(written().partition(b"\n")[0])
    head |= {"size": len(packed), "sha256": hashlib.sha256(packed).hexdigest()}
    return json.dumps(head).encode() + b"\n" + packed


@pytest.mark.parametrize(
    "packed",
    [
        b"not compressed",
        zlib.compress(b"{}") + b"more",
        zlib.compress(b"{}")[:-1],
        zlib.compress(b"{}"),
        zlib.compress(b'{"node":' + b"[" * 100_000),
    ],
)
def test_content_that_is_not_readable_is_refused(packed):
    with pytest.raises(snapshot.Unusable, match="content is"):
        read(packed_as(packed))


def test_a_file_that_unpacks_to_more_than_fits_is_refused(monkeypatch):
    monkeypatch.setattr(snapshot, "_MAX_PLAIN", 1000)

    with pytest.raises(snapshot.Unusable, match="more than 1000 bytes"):
        read(packed_as(zlib.compress(b" " * 1_000_000)))


def put(path, value):
    def change(content):
        *way, last = path
        for step in way:
            content = content[step]
        content[last] = value

    return change


PORT = ("services", "IPv4", 0, 0, 0)


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("node", "name"), "node2", "its Node is 'node2'"),
        (("node", "ips"), ["1.2.3.4 -j ACCEPT"], "Node: .* is not an address"),
        ((*PORT, "name"), ["a\n-A INPUT -j DROP", "web", "", "tcp"], "is not a DNS label"),
        ((*PORT, "name"), ["default", 'web"', "", "tcp"], "is not a DNS label"),
        ((*PORT, "name"), ["default", "web", '" -j DROP', "tcp"], "is not a name"),
        ((*PORT, "name"), ["default", "web", "", "icmp"], "content is not readable"),
        ((*PORT, "cluster_ip"), "172.30.0.1/8", "is not an IPv4 address"),
        ((*PORT, "cluster_ip"), "fd00::1", "is not an IPv4 address"),
        ((*PORT, "external_ips"), ["0x7f.1"], "is not an IPv4 address"),
        ((*PORT, "lb_vips"), ["1.2.3.4\n"], "is not an IPv4 address"),
        ((*PORT, "source_ranges"), ["1.2.3.4/8"], "is not an IPv4 CIDR"),
        ((*PORT, "source_ranges"), ["fd00::/8"], "is not an IPv4 CIDR"),
        ((*PORT, "port"), 0, "is not a number from 1 to 65535"),
        ((*PORT, "node_port"), 65536, "is not a number from 0 to 65535"),
        ((*PORT, "health_check_node_port"), -1, "is not a number from 0 to 65535"),
        ((*PORT, "affinity_timeout_s"), 10**9, "is not a number from 1 to"),
        (("services", "IPv4", 0, 0, 1, 0, "ip"), "10.0.0.1:80", "is not an IPv4 address"),
        (("services", "IPv4", 0, 0, 1, 0, "port"), 0, "is not a number from 1 to 65535"),
    ],
)
def test_content_that_would_not_have_come_from_the_api_is_refused(path, value, why):
    with pytest.raises(snapshot.Unusable, match=why):
        read(forged(put(path, value)))


def test_a_port_of_another_service_is_refused():
    items = [make_service("web", cluster_ip="172.30.0.1", ports=[{"name": "a", "port": 1}])]

    def stray(content):
        (port,) = content["services"]["IPv4"][0]
        other = json.loads(json.dumps(port))
        other[0]["name"][1] = "other"
        content["services"]["IPv4"][0].append(other)

    assert read(written(states_of(items=items)))
    with pytest.raises(snapshot.Unusable, match="is not a port's Service"):
        read(forged(stray))


def test_affinity_that_the_api_allows_is_kept():
    items = [make_service("web", cluster_ip="172.30.0.1", sessionAffinity="ClientIP")]
    (state,) = read(written(states_of(items=items))).state.services[V4].values()

    assert state.ports[PortKey("", "tcp")].affinity_timeout_s == 10800


def test_a_service_without_ports_is_left_out():
    assert read(forged(put(("services", "IPv4"), [[]]))).state.services == {V4: {}}


@given(st.binary())
def test_no_bytes_do_more_than_be_refused(data):
    with pytest.raises(snapshot.Unusable):
        read(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
PLACES = [
    ("node",),
    ("node", "ips"),
    ("services", "IPv4"),
    ("services", "IPv4", 0, 0, 1),
    *((*PORT, field) for field in ("name", "cluster_ip", "port", "source_ranges", "lb_vips")),
]


@given(st.sampled_from(PLACES), JSON)
def test_no_content_reaches_a_rule_unjudged(place, value):
    try:
        services = read(forged(put(place, value))).state.services
    except snapshot.Unusable:
        return
    ruleset = Ruleset(states.golden_options(V4))
    ruleset.apply(services.get(V4, {}))
    rules = [
        text for table in ruleset.tables.values() for found in table.values() for text in found
    ]

    assert all(text.isascii() and text.isprintable() and len(text) < 1000 for text in rules)


def test_a_header_is_one_line_for_people():
    head = written().partition(b"\n")[0]

    assert msgspec.json.decode(head)["node"] == "node1"
