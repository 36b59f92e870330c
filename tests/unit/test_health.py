"""Health: the verdict over time, the pages to the byte, and Services' ports over real sockets."""

import http.client
import json
import re
import socket
import time
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from kubeproxy_py import health, httpserver
from kubeproxy_py.health import HealthPages, ProxyHealth, ServiceHealthPorts
from kubeproxy_py.httpserver import HttpServer, Request
from kubeproxy_py.metrics import Metrics
from kubeproxy_py.model import IPFamily, ServiceName

V4, V6 = IPFamily.V4, IPFamily.V6
WEB = ServiceName("ns2", "svc2")
DNS = ServiceName("kube-system", "dns")
SYNC_PERIOD_S = 30.0
LIMIT_S = 60.0  # two sync periods
# 2026-11-20T18:05:20.116371265Z
NOW_NS = 1_795_197_920_116_371_265
JSON_HEADERS = (("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff"))


class Clocks:
    """Both clocks of a ProxyHealth, which move together and only when told."""

    def __init__(self):
        self.now_ns = NOW_NS
        self.now_s = 1000.0

    def go_on(self, seconds):
        self.now_ns += round(seconds * 10**9)
        self.now_s += seconds


@pytest.fixture(autouse=True)
def set_zone():
    """Run in the zone of the examples; return a function that sets another."""
    with pytest.MonkeyPatch.context() as patch:

        def set_zone(name):
            patch.setenv("TZ", name)
            time.tzset()

        set_zone("UTC")
        yield set_zone
    time.tzset()


@pytest.fixture
def clocks():
    return Clocks()


@pytest.fixture
def proxy(clocks):
    """Give a ProxyHealth of which nothing is known yet."""
    return ProxyHealth(SYNC_PERIOD_S, now_ns=lambda: clocks.now_ns, clock=lambda: clocks.now_s)


@pytest.fixture
def metrics():
    return Metrics(CollectorRegistry())


@pytest.fixture
def pages(proxy, metrics):
    return HealthPages(proxy, metrics)


def get(pages, path):
    return pages.app(Request(method="GET", path=path))


def body(pages, path):
    return json.loads(get(pages, path).body)


# The verdict -------------------------------------------------------------------------------------


def test_proxy_that_never_synced_is_healthy(proxy):
    proxy.started(V4)

    assert proxy.verdict().is_healthy


def test_idle_time_never_makes_unhealthy(proxy, clocks):
    proxy.started(V4)
    proxy.updated(V4)
    clocks.go_on(1_000_000)

    assert proxy.verdict().is_healthy


@pytest.mark.parametrize(
    ("waiting_s", "is_healthy"), [(LIMIT_S - 0.001, True), (LIMIT_S, False), (LIMIT_S + 1, False)]
)
def test_change_that_waits_two_sync_periods_makes_unhealthy(proxy, clocks, waiting_s, is_healthy):
    proxy.started(V4)
    proxy.queued(V4)
    clocks.go_on(waiting_s)

    assert proxy.verdict().is_healthy is is_healthy


def test_oldest_waiting_change_counts(proxy, clocks):
    proxy.started(V4)
    proxy.queued(V4)
    clocks.go_on(LIMIT_S - 1)
    proxy.queued(V4)
    clocks.go_on(1)

    assert not proxy.verdict().is_healthy


def test_successful_sync_makes_healthy_again(proxy, clocks):
    proxy.started(V4)
    proxy.queued(V4)
    clocks.go_on(LIMIT_S)
    proxy.updated(V4)

    assert proxy.verdict().is_healthy


def test_change_queued_before_the_loop_started_does_not_count_from_then(proxy, clocks):
    proxy.queued(V4)
    clocks.go_on(LIMIT_S - 1)
    proxy.started(V4)
    clocks.go_on(1)

    assert proxy.verdict().is_healthy


def test_one_unhealthy_family_makes_the_proxy_unhealthy(proxy, clocks):
    for family in (V4, V6):
        proxy.started(family)
    proxy.queued(V6)
    clocks.go_on(LIMIT_S)

    verdict = proxy.verdict()

    assert not verdict.is_healthy
    assert verdict.families[V4].is_healthy
    assert not verdict.families[V6].is_healthy


def test_step_of_the_wall_clock_does_not_age_a_change(proxy, clocks):
    proxy.started(V4)
    proxy.queued(V4)
    clocks.now_ns += 10**15

    assert proxy.verdict().is_healthy


# The pages ---------------------------------------------------------------------------------------


@pytest.fixture
def synced(proxy, clocks):
    """Let both families have synced some seconds ago, at the times of the examples."""
    proxy.set_node(eligible=True)
    for family, updated_ns in ((V6, 1_795_197_915_214_937_908), (V4, 1_795_197_914_950_390_276)):
        clocks.now_ns = updated_ns
        proxy.started(family)
        proxy.updated(family)
    clocks.now_ns = NOW_NS
    return proxy


def test_healthz_has_the_body_of_kube_proxys(pages, synced):
    response = get(pages, "/healthz")

    assert response.status == 200
    assert response.headers == JSON_HEADERS
    assert response.body == (
        b'{"lastUpdated":"2026-11-20T18:05:20.116371265Z",'
        b'"currentTime":"2026-11-20T18:05:20.116371265Z","nodeEligible":true,"healthy":true,'
        b'"status":{"IPv4":{"lastUpdated":"2026-11-20T18:05:14.950390276Z","healthy":true},'
        b'"IPv6":{"lastUpdated":"2026-11-20T18:05:15.214937908Z","healthy":true}}}'
    )


def test_livez_has_the_body_of_kube_proxys(pages, synced):
    response = get(pages, "/livez")

    assert response.status == 200
    assert response.headers == JSON_HEADERS
    assert response.body == (
        b'{"lastUpdated":"2026-11-20T18:05:20.116371265Z",'
        b'"currentTime":"2026-11-20T18:05:20.116371265Z","healthy":true,'
        b'"status":{"IPv4":{"lastUpdated":"2026-11-20T18:05:14.950390276Z","healthy":true},'
        b'"IPv6":{"lastUpdated":"2026-11-20T18:05:15.214937908Z","healthy":true}}}'
    )


def test_node_that_is_not_eligible_fails_healthz_alone(pages, synced):
    synced.set_node(eligible=False)

    assert get(pages, "/healthz").status == 503
    assert get(pages, "/livez").status == 200


def test_healthy_in_the_body_is_not_about_the_node(pages, synced):
    synced.set_node(eligible=False)

    got = body(pages, "/healthz")

    assert (got["nodeEligible"], got["healthy"]) == (False, True)


def test_node_that_was_never_seen_is_not_eligible(pages, proxy):
    proxy.started(V4)

    assert get(pages, "/healthz").status == 503
    assert body(pages, "/healthz")["nodeEligible"] is False


def test_unhealthy_proxy_fails_both(pages, synced, clocks):
    synced.queued(V4)
    clocks.go_on(LIMIT_S)

    assert get(pages, "/healthz").status == 503
    assert get(pages, "/livez").status == 503
    assert body(pages, "/livez")["status"]["IPv4"]["healthy"] is False


def test_failing_answer_shows_the_newest_update(pages, synced, clocks):
    synced.queued(V4)
    clocks.go_on(LIMIT_S)

    assert body(pages, "/livez")["lastUpdated"] == "2026-11-20T18:05:15.214937908Z"


def test_before_the_loops_start_there_is_no_status_and_no_update(pages):
    assert get(pages, "/healthz").body == (
        b'{"lastUpdated":"0001-01-01T00:00:00Z","currentTime":"2026-11-20T18:05:20.116371265Z",'
        b'"nodeEligible":false,"healthy":true}'
    )


def test_family_that_waits_before_its_loop_starts_is_shown_without_an_update(pages, proxy, clocks):
    proxy.queued(V6)
    clocks.go_on(LIMIT_S)

    assert body(pages, "/livez")["status"] == {
        "IPv6": {"lastUpdated": "0001-01-01T00:00:00Z", "healthy": False}
    }


@pytest.mark.parametrize("path", ["/", "/healthz/", "/metrics", "/healthz/ping"])
def test_other_paths_are_not_found(pages, path):
    response = get(pages, path)

    assert (response.status, response.body) == (404, b"404 page not found\n")


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "BREW"])
def test_method_does_not_matter(pages, synced, method):
    assert pages.app(Request(method=method, path="/healthz")).status == 200


def test_answers_are_counted_by_status(pages, synced, metrics):
    get(pages, "/healthz")
    synced.set_node(eligible=False)
    for path in ("/healthz", "/livez", "/livez", "/readyz", "/nope"):
        get(pages, path)

    def counted(name, code):
        return metrics.registry.get_sample_value(name, {"code": code})

    assert counted("kubeproxy_proxy_healthz_total", "200") == 1
    assert counted("kubeproxy_proxy_healthz_total", "503") == 1
    assert counted("kubeproxy_proxy_livez_total", "200") == 2
    assert counted("kubeproxy_proxy_livez_total", "503") is None


@pytest.mark.parametrize(
    ("ns", "zone", "wanted"),
    [
        pytest.param(NOW_NS, "UTC", "2026-11-20T18:05:20.116371265Z", id="nanoseconds"),
        pytest.param(1_500_000_000, "UTC", "1970-01-01T00:00:01.5Z", id="trailing zeros trimmed"),
        pytest.param(
            1_000_000_010, "UTC", "1970-01-01T00:00:01.00000001Z", id="leading zeros kept"
        ),
        pytest.param(1_000_000_000, "UTC", "1970-01-01T00:00:01Z", id="whole second"),
        pytest.param(0, "<+0530>-5:30", "1970-01-01T05:30:00+05:30", id="east"),
        pytest.param(0, "<-03>3", "1969-12-31T21:00:00-03:00", id="west"),
    ],
)
def test_time_is_written_as_go_does(set_zone, ns, zone, wanted):
    set_zone(zone)

    assert health.render_time(ns) == wanted


# Readiness ---------------------------------------------------------------------------------------


def test_not_ready_before_anything_has_been_started(pages):
    response = get(pages, "/readyz")

    assert response.status == 503
    assert response.headers == JSON_HEADERS
    assert response.body == b'{"ready":false,"reasons":["started: nothing has been started"]}'


def test_not_ready_until_every_family_has_synced(pages, proxy):
    for family in (V4, V6):
        proxy.started(family)
    proxy.updated(V4)

    assert body(pages, "/readyz")["reasons"] == ["programmed-IPv6: not synced since the start"]


def test_not_ready_while_an_expected_family_has_not_started(pages, proxy):
    proxy.expect([V4, V6])
    proxy.started(V4)
    proxy.updated(V4)

    assert body(pages, "/readyz")["reasons"] == ["programmed-IPv6: not synced since the start"]


def test_ready_when_every_family_has_synced(pages, proxy):
    for family in (V4, V6):
        proxy.started(family)
        proxy.updated(family)

    assert get(pages, "/readyz").status == 200
    assert get(pages, "/readyz").body == b'{"ready":true,"reasons":[]}'


def test_not_ready_when_a_change_waits_too_long(pages, synced, clocks):
    synced.queued(V4)
    clocks.go_on(LIMIT_S)

    assert body(pages, "/readyz")["reasons"] == [
        "prompt-IPv4: a change has been waiting for 60 s or more"
    ]


def test_others_may_speak_against_readiness_but_only_there(pages, synced):
    synced.add_readiness("quarantine", lambda: "2 Services")
    synced.add_readiness("drift", lambda: None)

    assert body(pages, "/readyz") == {"ready": False, "reasons": ["quarantine: 2 Services"]}
    assert get(pages, "/healthz").status == 200
    assert get(pages, "/livez").status == 200


def test_whoever_asks_for_a_restart_fails_livez_alone(pages, synced):
    synced.add_liveness("sync-IPv4", lambda: "no sign of life for 400 s")
    synced.add_liveness("sync-IPv6", lambda: None)
    found = body(pages, "/livez")

    assert get(pages, "/livez").status == 503
    assert found["healthy"] is False
    assert found["reasons"] == ["sync-IPv4: no sign of life for 400 s"]
    assert get(pages, "/healthz").status == 200
    assert get(pages, "/readyz").status == 200


def ask(pages, path, query, **headers):
    return pages.app(Request(method="GET", path=path, query=query, headers=headers))


def test_people_get_a_list_of_what_was_looked_at_as_from_an_api_server(pages, synced):
    synced.add_readiness("fresh-Service", lambda: "no sign of life for 400 s")
    synced.add_readiness("quarantine-IPv4", lambda: None)
    answer = ask(pages, "/readyz", {"verbose": ""})

    assert answer.status == 503
    assert dict(answer.headers)["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.body.decode().splitlines() == [
        "[+]started ok",
        "[+]programmed-IPv4 ok",
        "[+]programmed-IPv6 ok",
        "[+]prompt-IPv4 ok",
        "[+]prompt-IPv6 ok",
        "[-]fresh-Service failed: no sign of life for 400 s",
        "[+]quarantine-IPv4 ok",
        "readyz check failed",
    ]


def test_livez_has_such_a_list_as_well(pages, synced):
    synced.add_liveness("sync-IPv4", lambda: None)
    answer = ask(pages, "/livez", {"verbose": ""})

    assert answer.status == 200
    assert answer.body.decode().splitlines() == [
        "[+]prompt-IPv4 ok",
        "[+]prompt-IPv6 ok",
        "[+]sync-IPv4 ok",
        "livez check passed",
    ]


@pytest.mark.parametrize(
    ("query", "headers"),
    [({"verbose": "", "format": "json"}, {}), ({"verbose": ""}, {"accept": "application/json"})],
)
def test_programs_get_json_if_they_say_so(pages, synced, query, headers):
    for path in ("/readyz", "/livez"):
        json.loads(ask(pages, path, query, **headers).body)


# Services' ports ---------------------------------------------------------------------------------


@pytest.fixture
def server():
    server = HttpServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def failures():
    """Collect what was reported as (Service, port, error)."""
    return []


@pytest.fixture
def open_ports(server, synced, failures):
    """Return a function that makes a family's ports; they are closed in the end."""
    with ExitStack() as stack:

        def open_ports(family=V4, addresses=("127.0.0.1",), proxy=synced):
            made = ServiceHealthPorts(
                family, server, addresses, proxy, lambda *failure: failures.append(failure)
            )
            stack.callback(made.close)
            return made

        yield open_ports


def free_port(host="127.0.0.1"):
    with httpserver.bind(host, 0) as sock:
        return sock.getsockname()[1]


def fetch(port, host="127.0.0.1", method="GET", path="/"):
    """Return the status and the number of local endpoints that a port shows."""
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())["localEndpoints"]
    finally:
        connection.close()


def is_open(port, host="127.0.0.1"):
    try:
        with socket.create_connection((host, port), timeout=10):
            return True
    except ConnectionRefusedError:
        return False


def test_service_port_has_the_answer_of_kube_proxys_to_the_byte(open_ports):
    port = free_port()
    open_ports().update({WEB: port}, {WEB: 1})

    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: node1\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as file:
            answer = file.read()

    assert re.sub(rb"Date: [^\r]*", b"Date: now", answer) == (
        b"HTTP/1.1 200 OK\r\n"
        b"Content-Type: application/json\r\n"
        b"X-Content-Type-Options: nosniff\r\n"
        b"X-Load-Balancing-Endpoint-Weight: 1\r\n"
        b"Date: now\r\n"
        b"Content-Length: 111\r\n"
        b"\r\n"
        b'{\n\t"service": {\n\t\t"namespace": "ns2",\n\t\t"name": "svc2"\n\t},\n'
        b'\t"localEndpoints": 1,\n\t"serviceProxyHealthy": true\n}'
    )


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("POST", "/any/path?x=1"), ("BREW", "/healthz")]
)
def test_any_method_and_path_is_answered(open_ports, method, path):
    port = free_port()
    open_ports().update({WEB: port}, {WEB: 2})

    assert fetch(port, method=method, path=path) == (200, 2)


def test_service_without_local_endpoints_is_unavailable(open_ports):
    port = free_port()
    open_ports().update({WEB: port}, {})

    assert fetch(port) == (503, 0)


def test_number_of_endpoints_follows_updates_and_the_socket_is_left_alone(open_ports):
    port = free_port()
    ports = open_ports()
    ports.update({WEB: port}, {WEB: 1})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/")
    connection.getresponse().read()
    ports.update({WEB: port}, {WEB: 3})

    connection.request("GET", "/")
    weight = connection.getresponse().headers["X-Load-Balancing-Endpoint-Weight"]
    connection.close()

    assert weight == "3"


def test_unhealthy_proxy_makes_every_service_unavailable(open_ports, synced, clocks):
    port = free_port()
    open_ports().update({WEB: port}, {WEB: 1})
    synced.queued(V6)  # of the other family: it counts as well
    clocks.go_on(LIMIT_S)

    assert fetch(port) == (503, 1)


def test_node_that_is_not_eligible_does_not_matter_to_services(open_ports, synced):
    port = free_port()
    open_ports().update({WEB: port}, {WEB: 1})
    synced.set_node(eligible=False)

    assert fetch(port) == (200, 1)


def test_without_a_health_server_the_proxy_counts_as_healthy(open_ports):
    port = free_port()
    open_ports(proxy=None).update({WEB: port}, {WEB: 1})

    assert fetch(port) == (200, 1)


def test_port_of_a_service_that_is_gone_is_closed(open_ports):
    port = free_port()
    ports = open_ports()
    ports.update({WEB: port}, {WEB: 1})
    ports.update({}, {})

    assert not is_open(port)


def test_port_that_changes_is_moved(open_ports):
    old, new = free_port(), free_port()
    ports = open_ports()
    ports.update({WEB: old}, {WEB: 1})
    ports.update({WEB: new}, {WEB: 1})

    assert not is_open(old)
    assert fetch(new) == (200, 1)


def test_two_services_can_exchange_their_ports(open_ports, failures):
    one, two = free_port(), free_port()
    ports = open_ports()
    ports.update({WEB: one, DNS: two}, {WEB: 1, DNS: 2})
    ports.update({WEB: two, DNS: one}, {WEB: 1, DNS: 2})

    assert (fetch(one), fetch(two)) == ((200, 2), (200, 1))
    assert failures == []


def test_port_that_cannot_be_opened_is_reported_and_the_others_go_on(open_ports, failures):
    with httpserver.bind("127.0.0.1", 0) as taken, capture_logs() as logs:
        blocked, port = taken.getsockname()[1], free_port()
        open_ports().update({WEB: blocked, DNS: port}, {WEB: 1, DNS: 1})

    text = f"cannot listen on 127.0.0.1 port {blocked}: Address already in use"
    assert failures == [(WEB, blocked, text)]
    assert [(entry["event"], entry["service"], entry["error"]) for entry in logs] == [
        ("health.service_port_failed", "ns2/svc2", text)
    ]
    assert fetch(port) == (200, 1)


def test_port_that_could_not_be_opened_is_tried_again_at_the_next_update(open_ports, failures):
    ports = open_ports()
    with httpserver.bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        ports.update({WEB: port}, {WEB: 1})
    ports.update({WEB: port}, {WEB: 4})

    assert fetch(port) == (200, 4)
    assert len(failures) == 1


def test_service_listens_on_each_of_the_addresses(open_ports):
    port = free_port()
    open_ports(addresses=("127.0.0.1", "127.0.0.2")).update({WEB: port}, {WEB: 1})

    assert fetch(port, "127.0.0.1") == fetch(port, "127.0.0.2") == (200, 1)
    assert not is_open(port, "127.0.0.3")


def test_port_taken_on_one_address_is_opened_on_none(open_ports, failures):
    with httpserver.bind("127.0.0.2", 0) as taken:
        port = taken.getsockname()[1]
        open_ports(addresses=("127.0.0.1", "127.0.0.2")).update({WEB: port}, {WEB: 1})

        assert not is_open(port, "127.0.0.1")
    assert len(failures) == 1


def test_no_address_means_no_socket_and_no_error(open_ports, failures):
    port = free_port()
    open_ports(addresses=()).update({WEB: port}, {WEB: 1})

    assert not is_open(port)
    assert failures == []


def test_two_families_serve_the_same_port_each_with_its_own_endpoints(open_ports, failures):
    port = free_port("0.0.0.0")
    open_ports(V4, None).update({WEB: port}, {WEB: 1})
    open_ports(V6, None).update({WEB: port}, {WEB: 0})

    assert fetch(port, "127.0.0.1") == (200, 1)
    assert fetch(port, "::1") == (503, 0)
    assert failures == []


def test_family_alone_does_not_listen_on_the_other(open_ports):
    port = free_port("0.0.0.0")
    open_ports(V6, None).update({WEB: port}, {WEB: 1})

    assert not is_open(port, "127.0.0.1")


def test_late_update_of_closed_ports_opens_nothing(open_ports, failures):
    port = free_port()
    ports = open_ports()
    ports.update({WEB: port}, {WEB: 1})
    ports.close()
    ports.update({WEB: port}, {WEB: 1})

    assert not is_open(port)
    assert failures == []


def test_who_asks_is_told_how_long_changes_have_waited(proxy, clocks):
    proxy.queued(IPFamily.V4)
    clocks.go_on(3)

    assert proxy.pending() == {IPFamily.V4: 3}
