"""Which external addresses are served: each reason, and that they come and go with their cause."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeproxy_py import external
from kubeproxy_py.external import ApiAddress, Exposure, Policy, Refusal, Shadow
from kubeproxy_py.model import IPFamily, PortKey, ServiceName, ServicePort, ServicePortName
from kubeproxy_py.store import Store
from tests.support import states
from tests.support.builders import make_service, make_slice

V4, V6 = IPFamily.V4, IPFamily.V6
TCP, UDP = PortKey("", "tcp"), PortKey("dns", "udp")
WEB, DB = ServiceName("a", "web"), ServiceName("b", "db")
EXTERNAL, VIP = "spec.externalIPs", "status.loadBalancer.ingress"


def ports(
    name, cluster_ip, external_ips=(), lb_vips=(), numbers=((TCP, 80),)
) -> dict[PortKey, ServicePort]:
    return {
        key: ServicePort(
            name=ServicePortName(*name, *key),
            cluster_ip=cluster_ip,
            port=number,
            external_ips=external_ips,
            lb_vips=lb_vips,
            is_externally_accessible=bool(external_ips or lb_vips),
        )
        for key, number in numbers
    }


def exposure(services, policy=None, api=()):
    """Return an Exposure that was told of *services*, which are admitted, and what it admitted."""
    built = Exposure(policy or Policy())
    for name, found in services.items():
        built.replace(name, None, found)
    built.replace_api(frozenset(api))
    return built, {name: built.admit(name, found) for name, found in services.items()}


def kept(admitted, key=TCP):
    return admitted[key].external_ips, admitted[key].lb_vips


def reasons(built):
    return [
        (refusal.field, refusal.ip, refusal.port, refusal.reason)
        for _, refusals in sorted(built.refusals.items())
        for refusal in refusals
    ]


# Reasons -----------------------------------------------------------------------------------------


def test_without_any_conflict_everything_is_served():
    web = ports(WEB, "172.30.0.1", ("192.0.2.1",), ("192.0.2.2",))
    built, admitted = exposure({WEB: web, DB: ports(DB, "172.30.0.2")})

    assert admitted[WEB] is web
    assert (built.refusals, built.take_news()) == ({}, [])


def test_the_cluster_ip_of_another_service_is_refused_and_all_else_is_served():
    web = ports(WEB, "172.30.0.1", ("172.30.0.2", "192.0.2.1"), ("172.30.0.2", "192.0.2.2"))
    built, admitted = exposure({WEB: web, DB: ports(DB, "172.30.0.2")})

    assert kept(admitted[WEB]) == (("192.0.2.1",), ("192.0.2.2",))
    assert reasons(built) == [
        (EXTERNAL, "172.30.0.2", 0, "cluster_ip"),
        (VIP, "172.30.0.2", 0, "cluster_ip"),
    ]


def test_a_service_s_own_cluster_ip_takes_nothing_from_anybody():
    _, admitted = exposure({WEB: ports(WEB, "172.30.0.1", ("172.30.0.1",))})

    assert kept(admitted[WEB]) == (("172.30.0.1",), ())


def test_of_two_owners_only_the_other_one_counts():
    # Nothing keeps files from giving two Services one cluster IP.
    both = {
        WEB: ports(WEB, "172.30.0.1", ("172.30.0.1",)),
        DB: ports(DB, "172.30.0.1"),
    }
    built, _ = exposure(both)

    assert reasons(built) == [(EXTERNAL, "172.30.0.1", 0, "cluster_ip")]
    built.replace(DB, both[DB], None)
    assert kept(built.admit(WEB, both[WEB])) == (("172.30.0.1",), ())


def test_where_an_api_server_listens_is_refused_for_that_port_and_tcp_alone():
    key = PortKey("", "udp")
    web = ports(WEB, "172.30.0.1", ("192.168.0.2",), (), ((TCP, 6443), (UDP, 6443)))
    other = ports(DB, "172.30.0.2", (), ("192.168.0.2",), ((TCP, 443), (key, 6443)))
    built, admitted = exposure({WEB: web, DB: other}, api=[ApiAddress("192.168.0.2", 6443)])

    assert kept(admitted[WEB]) == ((), ())
    assert kept(admitted[WEB], UDP) == (("192.168.0.2",), ())
    assert admitted[DB] == other
    assert reasons(built) == [(EXTERNAL, "192.168.0.2", 6443, "api_server")]


def test_the_api_service_may_be_exposed_where_its_servers_are():
    api = ports(external.API_SERVICE, "172.30.0.1", ("192.168.0.2",), (), ((TCP, 6443),))
    _, admitted = exposure({external.API_SERVICE: api}, api=[ApiAddress("192.168.0.2", 6443)])

    assert admitted[external.API_SERVICE] is api


@pytest.mark.parametrize(
    ("allowed", "external_ips", "vips"),
    [
        (("192.0.2.0/24",), ("192.0.2.1",), ()),
        (("198.51.100.7/32", "192.0.2.0/24"), ("192.0.2.1",), ("198.51.100.7",)),
        (("fd00::/8",), (), ()),
        (("0.0.0.0/0",), ("192.0.2.1",), ("198.51.100.7",)),
    ],
)
def test_what_is_outside_of_the_allowed_cidrs_is_refused(allowed, external_ips, vips):
    web = ports(WEB, "172.30.0.1", ("192.0.2.1",), ("198.51.100.7",))
    built, admitted = exposure({WEB: web}, Policy(allowed=allowed))

    assert kept(admitted[WEB]) == (external_ips, vips)
    assert {found[3] for found in reasons(built)} <= {"not_allowed"}


def test_a_cluster_ip_is_refused_though_it_is_in_an_allowed_cidr():
    web = ports(WEB, "172.30.0.1", ("172.30.0.2",))
    policy = Policy(allowed=("172.30.0.0/16",))
    built, _ = exposure({WEB: web, DB: ports(DB, "172.30.0.2")}, policy)

    assert reasons(built) == [(EXTERNAL, "172.30.0.2", 0, "cluster_ip")]


def test_without_the_feature_gate_external_ips_are_refused_and_vips_are_not():
    web = ports(WEB, "172.30.0.1", ("192.0.2.1",), ("192.0.2.1",))
    built, admitted = exposure({WEB: web}, Policy(allows_external_ips=False))

    assert kept(admitted[WEB]) == ((), ("192.0.2.1",))
    # As with kube-proxy: the Service's other rules stay what they were.
    assert admitted[WEB][TCP].is_externally_accessible
    assert reasons(built) == [(EXTERNAL, "192.0.2.1", 0, "disabled")]


def test_a_refusal_reads_as_a_sentence():
    refusal = Refusal(WEB, EXTERNAL, "192.0.2.1", 0, "cluster_ip", "is the cluster IP of b/db")
    by_port = msgspec.structs.replace(refusal, port=6443)

    assert (str(refusal), by_port.where) == (
        "Service 'a/web': spec.externalIPs: 192.0.2.1 is the cluster IP of b/db",
        "spec.externalIPs: 192.0.2.1 port 6443 is the cluster IP of b/db",
    )


def test_services_are_counted_for_each_reason_there_is():
    web = ports(WEB, "172.30.0.1", ("172.30.0.2",), ("172.30.0.2",))
    built, _ = exposure({WEB: web, DB: ports(DB, "172.30.0.2")})

    assert built.services_by_reason() == {
        "disabled": 0, "not_allowed": 0, "cluster_ip": 1, "api_server": 0,
    }  # fmt: skip


# Coming and going --------------------------------------------------------------------------------


def test_who_takes_or_leaves_a_claimed_address_says_whom_it_concerns():
    built, _ = exposure({WEB: ports(WEB, "172.30.0.1", ("172.30.0.2",))})
    db = ports(DB, "172.30.0.2")

    assert built.replace(DB, None, db) == {WEB}
    assert built.replace(DB, db, ports(DB, "172.30.0.2", numbers=((TCP, 81),))) == set()
    assert built.replace(DB, db, ports(DB, "172.30.0.3")) == {WEB}
    assert built.replace(DB, ports(DB, "172.30.0.3"), None) == set()


def test_api_servers_that_come_or_go_say_whom_they_concern():
    built, _ = exposure({WEB: ports(WEB, "172.30.0.1", ("192.0.2.1",))})
    first, second = (ApiAddress(f"192.0.2.{n}", 6443) for n in (1, 2))

    assert built.replace_api(frozenset({first})) == {WEB}
    assert built.replace_api(frozenset({first, second})) == set()
    assert built.replace_api(frozenset({second})) == {WEB}


def test_a_refusal_is_news_once_and_again_after_it_went():
    web = ports(WEB, "172.30.0.1", ("172.30.0.2",))
    db = ports(DB, "172.30.0.2")
    built, _ = exposure({WEB: web, DB: db})
    assert len(built.take_news()) == 1

    built.admit(WEB, web)
    assert built.take_news() == []

    built.replace(DB, db, None)
    assert built.admit(WEB, web) is web
    assert (built.take_news(), built.refusals) == ([], {})

    built.replace(DB, None, db)
    built.admit(WEB, web)
    assert len(built.take_news()) == 1


def test_what_was_refused_of_a_service_that_went_is_forgotten():
    built, _ = exposure(
        {WEB: ports(WEB, "172.30.0.1", ("172.30.0.2",)), DB: ports(DB, "172.30.0.2")}
    )
    built.forget(WEB)
    built.forget(DB)

    assert built.refusals == {}


def test_service_without_ports_exposes_nothing():
    built, admitted = exposure({WEB: {}})

    assert (admitted[WEB], built.refusals) == ({}, {})


# Shadows -----------------------------------------------------------------------------------------


def test_an_address_of_the_node_is_a_shadow():
    web = ports(WEB, "172.30.0.1", ("192.0.2.1",), ("192.168.0.2",))

    assert list(external.shadows({WEB: web}, node_ips=frozenset({"192.168.0.2"}), api=())) == [
        Shadow(WEB, VIP, "192.168.0.2", 0, "node_address")
    ]


def test_the_way_to_the_api_server_is_a_shadow_by_port():
    web = ports(
        WEB, "172.30.0.1", ("192.0.2.1",), (), ((TCP, 6443), (UDP, 6443), (PortKey("x", "tcp"), 80))
    )
    api = ports(external.API_SERVICE, "172.30.0.9", ("192.0.2.1",), (), ((TCP, 6443),))
    found = external.shadows(
        {WEB: web, external.API_SERVICE: api},
        node_ips=frozenset(),
        api=[ApiAddress("192.0.2.1", 6443)],
    )

    assert list(found) == [Shadow(WEB, EXTERNAL, "192.0.2.1", 6443, "api_address")]


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://192.0.2.1:6443", ApiAddress("192.0.2.1", 6443)),
        ("https://192.0.2.1", ApiAddress("192.0.2.1", 443)),
        ("http://192.0.2.1/", ApiAddress("192.0.2.1", 80)),
        ("https://[fd00:0::1]:6443", ApiAddress("fd00::1", 6443)),
        ("https://api.example.org:6443", None),
        ("https://192.0.2.1:x", None),
    ],
)
def test_an_api_server_s_url_tells_its_address_if_it_has_one(url, address):
    assert external.api_address(url) == address


def test_a_service_without_ports_shadows_nothing():
    assert list(external.shadows({WEB: {}}, node_ips=frozenset({"192.168.0.2"}), api=())) == []


# The promise -------------------------------------------------------------------------------------

_SERVICES = ("one", "two", "three", "kubernetes")
_IPS = ("172.30.0.1", "172.30.0.2", "192.168.0.2", "192.0.2.1")


@st.composite
def _change(draw):
    """Draw a Service, or the API servers' slice, as it becomes; None: it goes."""
    kind = draw(st.sampled_from(["Service", "Service", "Service", "EndpointSlice"]))
    if kind == "EndpointSlice":
        endpoints = draw(st.lists(st.sampled_from(_IPS), unique=True, max_size=2))
        name = draw(st.sampled_from(["kubernetes-1", "kubernetes-2"]))
        item = make_slice("kubernetes", name=name, endpoints=endpoints, ports=[6443])
    else:
        item = make_service(
            draw(st.sampled_from(_SERVICES)),
            cluster_ip=draw(st.sampled_from(_IPS[:3])),
            ports=[draw(st.sampled_from([80, 6443]))],
            externalIPs=draw(st.lists(st.sampled_from(_IPS), unique=True, max_size=2)),
            lb_ips=draw(st.lists(st.sampled_from(_IPS), unique=True, max_size=2)),
        )
    return item, draw(st.booleans())


def _store(metrics, policy, refused):
    return Store(
        node_name="node1",
        families=(V4,),
        metrics=metrics,
        report=lambda problem: None,
        changed=lambda family: None,
        node_changed=lambda node: None,
        policy=policy,
        refused=refused.append,
    )


@pytest.fixture(scope="module")
def shared_metrics():
    from prometheus_client import CollectorRegistry  # noqa: PLC0415 - the module's own alone

    from kubeproxy_py.metrics import Metrics  # noqa: PLC0415

    return Metrics(CollectorRegistry())


@given(
    history=st.lists(_change(), max_size=12),
    taken=st.lists(st.booleans(), min_size=12, max_size=12),
    allowed=st.sampled_from([(), ("192.0.0.0/8",)]),
    gate=st.booleans(),
)
def test_any_sequence_of_changes_is_served_as_if_it_had_always_been_so(
    shared_metrics, history, taken, allowed, gate
):
    policy = Policy(allowed=allowed, allows_external_ips=gate)
    store = _store(shared_metrics, policy, [])
    store.listed("Service")
    store.listed("EndpointSlice")
    served, left = {}, {}
    for (item, is_gone), is_taken in zip(history, taken, strict=False):
        key = (item["kind"], item["metadata"]["name"])
        left.pop(key, None)
        if is_gone:
            store.delete(item["kind"], "default", item["metadata"]["name"])
        else:
            left[key] = item
            store.upsert(item["kind"], states.decode(item))
        if is_taken:
            served |= store.take(V4).services
    served |= store.take(V4).services

    reference = _store(shared_metrics, policy, [])
    for kind in ("EndpointSlice", "Service"):
        items = [states.decode(left[key]) for key in sorted(left, reverse=True) if key[0] == kind]
        reference.replace(kind, items)
    assert {name: state for name, state in served.items() if state is not None} == (
        reference.take(V4).services
    )
    assert store.refusals() == reference.refusals()
    assert store.service_ports(V4) == reference.service_ports(V4)
    assert store._families[V4].exposure._claims.keys() == (
        reference._families[V4].exposure._claims.keys()
    )
