"""The metrics port's pages, to the byte where kube-proxy's are known; and once over a real socket."""

import http.client
import json
import platform

import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge

import kubeproxy_py
from kubeproxy_py import httpserver, pages
from kubeproxy_py.httpserver import HttpServer, Request
from kubeproxy_py.pages import Build, MetricsPages

# Fri Nov 20 18:05:13 UTC 2026
STARTED_AT = 1_795_197_913.09
BUILD = Build("1.36.2", "1.36", "go1.27.3")
TEXT = ("Content-Type", "text/plain; charset=utf-8")
NOSNIFF = ("X-Content-Type-Options", "nosniff")
FLAGS = {"v": "4", "bind-address": "0.0.0.0", "ipvs-exclude-cidrs": "[]", "config": ""}
WARNING = (
    b"Warning: This endpoint is not meant to be machine parseable, has no formatting "
    b"compatibility guarantees and is for debugging purposes only.\n"
)


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def make(registry):
    """Return a function that makes the pages of a process that has run for 7 seconds."""

    def make(**settings):
        defaults = {
            "configz": lambda: b'{"kubeproxy.config.k8s.io":{}}',
            "flagz": lambda: FLAGS,
            "started_at": STARTED_AT,
            "build": BUILD,
            "clock": lambda: STARTED_AT + 7.9,
        }
        return MetricsPages(registry, **(defaults | settings))

    return make


def get(made, path, accept="", method="GET", query=None, body=b""):
    headers = {"accept": accept} if accept else {}
    return made.app(
        Request(method=method, path=path, query=query or {}, headers=headers, body=body)
    )


def header(response, name):
    return dict(response.headers).get(name)


# Metrics -----------------------------------------------------------------------------------------


def test_metrics_are_the_registrys_with_kube_proxys_headers(make, registry):
    Gauge("kubeproxy_x", "[ALPHA] X", registry=registry).set(2)

    response = get(make(), "/metrics")

    assert response.status == 200
    assert response.headers == (
        ("Content-Type", "text/plain; version=0.0.4; charset=utf-8; escaping=underscores"),
        ("Process-Start-Time-Unix", "1795197913"),
    )
    assert response.body == (
        b"# HELP kubeproxy_x [ALPHA] X\n# TYPE kubeproxy_x gauge\nkubeproxy_x 2.0\n"
    )


def test_process_metrics_are_registered(registry):
    pages.register_process_metrics(registry)

    for name in ("process_resident_memory_bytes", "process_start_time_seconds", "process_open_fds"):
        assert registry.get_sample_value(name) > 0
    assert registry.get_sample_value("process_cpu_seconds_total") is not None


def test_build_info_names_this_program_and_the_release_it_stands_in_for(registry):
    pages.register_process_metrics(registry)

    wanted = {
        "build_date": "",
        "compiler": platform.python_implementation().lower(),
        "git_commit": "",
        "git_tree_state": "",
        "git_version": f"v{kubeproxy_py.__version__}+kubeproxy-py",
        "go_version": f"python{platform.python_version()}",
        "major": "1",
        "minor": "36",
        "platform": f"linux/{platform.machine()}",
    }
    assert registry.get_sample_value("kubernetes_build_info", wanted) == 1


@pytest.mark.parametrize(
    ("name", "stage", "value"),
    [
        ("LoggingAlphaOptions", "ALPHA", 1),
        ("ComponentFlagz", "BETA", 1),
        ("NativeHistograms", "ALPHA", 0),
    ],
)
def test_feature_gates_are_shown_as_they_are_set(registry, name, stage, value):
    pages.register_process_metrics(registry, gates={"LoggingAlphaOptions": True})

    labels = {"name": name, "stage": stage}
    assert registry.get_sample_value("kubernetes_feature_enabled", labels) == value


def test_health_checks_of_this_port_are_counted_apart(make):
    made = make()
    get(made, "/healthz")
    get(made, "/healthz", query={"verbose": ""})
    get(made, "/healthz", query={"exclude": "ping"})
    get(made, "/healthz/ping")

    assert get(made, "/metrics/slis").body == (
        b"# HELP kubernetes_healthcheck [STABLE] This metric records the result of a single"
        b" healthcheck.\n"
        b"# TYPE kubernetes_healthcheck gauge\n"
        b'kubernetes_healthcheck{name="ping",type="healthz"} 1.0\n'
        b"# HELP kubernetes_healthchecks_total [STABLE] This metric records the results of all"
        b" healthcheck.\n"
        b"# TYPE kubernetes_healthchecks_total counter\n"
        b'kubernetes_healthchecks_total{name="ping",status="success",type="healthz"} 2.0\n'
        b"# HELP process_start_time_seconds [ALPHA] Start time of the process since unix epoch in"
        b" seconds.\n"
        b"# TYPE process_start_time_seconds gauge\n"
        b"process_start_time_seconds 1.79519791309e+09\n"
    )


def test_counted_health_checks_can_be_reset(make):
    made = make()
    get(made, "/healthz")

    reset = get(made, "/metrics/slis", method="DELETE")

    assert (reset.status, reset.body) == (200, b"metrics reset\n")
    left = get(made, "/metrics/slis").body
    assert left.startswith(b"# HELP process_start_time_seconds ")


# Pages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        pytest.param({}, b"ok", id="plain"),
        pytest.param({"verbose": ""}, b"[+]ping ok\nhealthz check passed\n", id="verbose"),
        pytest.param({"exclude": "ping"}, b"ok", id="excluded"),
        pytest.param(
            {"exclude": "ping", "verbose": ""},
            b"[+]ping excluded: ok\nhealthz check passed\n",
            id="excluded and verbose",
        ),
        pytest.param(
            {"exclude": "etcd", "verbose": "1"},
            b"[+]ping ok\n"
            b'warn: some health checks cannot be excluded: no matches for "etcd"\n'
            b"healthz check passed\n",
            id="excluded without being there",
        ),
    ],
)
def test_healthz_says_that_this_port_answers(make, query, wanted):
    response = get(make(), "/healthz", query=query)

    assert (response.status, response.headers) == (200, (TEXT, NOSNIFF))
    assert response.body == wanted


def test_ping_is_answered(make):
    response = get(make(), "/healthz/ping")

    assert (response.status, response.headers, response.body) == (200, (), b"ok")


def test_mode_is_iptables(make):
    response = get(make(), "/proxyMode")

    assert (response.status, response.headers) == (200, (TEXT, NOSNIFF))
    assert response.body == b"iptables"


def test_configuration_is_shown_as_given(make):
    response = get(make(), "/configz")

    assert (response.status, response.headers) == (
        200,
        (("Content-Type", "application/json"), NOSNIFF),
    )
    assert response.body == b'{"kubeproxy.config.k8s.io":{}}'


@pytest.mark.parametrize(
    "path", ["/", "/livez", "/metrics/", "/nope", "/debug/pprof", "/debug/flags/v"]
)
def test_other_paths_are_not_found(make, path):
    response = get(make(), path)

    assert (response.status, response.headers) == (404, (TEXT, NOSNIFF))
    assert response.body == b"404 page not found\n"


def test_flags_are_listed_by_name(make):
    response = get(make(), "/flagz")

    assert (response.status, response.headers) == (200, (TEXT,))
    assert response.body == (
        b"\nkube-proxy flagz\n" + WARNING + b"bind-address=0.0.0.0\n"
        b"config=\nipvs-exclude-cidrs=[]\nv=4\n"
    )


def test_status_is_shown_as_text(make):
    response = get(make(), "/statusz")

    assert (response.status, response.headers) == (200, (TEXT,))
    assert response.body == (
        b"\nkube-proxy statusz\n" + WARNING + b"\n"
        b"Started:  Fri Nov 20 18:05:13 UTC 2026\n"
        b"Up:  0 hr 00 min 07 sec\n"
        b"Go version:  go1.27.3\n"
        b"Binary version:  1.36.2\n"
        b"Emulation version:  1.36\n"
        b"Paths:  /configz /flagz /healthz /metrics /proxyMode\n"
    )
    assert len(response.body) == 348


def test_long_uptime_is_shown_in_hours(make):
    made = make(clock=lambda: STARTED_AT + 100 * 3600 + 61)

    assert b"Up:  100 hr 01 min 01 sec\n" in get(made, "/statusz").body


def test_status_is_shown_as_json_to_those_who_name_its_type(make):
    kind = "application/json;g=config.k8s.io;v=v1beta1;as=Statusz"

    response = get(make(), "/statusz", kind)

    assert (response.status, response.headers) == (200, (("Content-Type", kind),))
    assert response.body == (
        b'{\n  "kind": "Statusz",\n  "apiVersion": "config.k8s.io/v1beta1",\n'
        b'  "metadata": {\n    "name": "kube-proxy"\n  },\n'
        b'  "startTime": "2026-11-20T18:05:13Z",\n  "uptimeSeconds": 7,\n'
        b'  "goVersion": "go1.27.3",\n  "binaryVersion": "1.36.2",\n'
        b'  "emulationVersion": "1.36",\n  "paths": [\n    "/configz",\n    "/flagz",\n'
        b'    "/healthz",\n    "/metrics",\n    "/proxyMode"\n  ]\n}'
    )


def test_flags_are_shown_as_json_to_those_who_name_their_type(make):
    response = get(make(), "/flagz", "application/json;v=v1beta1;g=config.k8s.io;as=Flagz")

    assert header(response, "Content-Type") == (
        "application/json;g=config.k8s.io;v=v1beta1;as=Flagz"
    )
    assert json.loads(response.body) == {
        "kind": "Flagz",
        "apiVersion": "config.k8s.io/v1beta1",
        "metadata": {"name": "kube-proxy"},
        "flags": FLAGS,
    }


def test_flags_are_shown_as_yaml_to_those_who_name_their_type(make):
    kind = "application/yaml;g=config.k8s.io;v=v1beta1;as=Flagz"

    response = get(make(), "/flagz", kind)

    assert header(response, "Content-Type") == kind
    assert yaml.safe_load(response.body)["flags"] == FLAGS


def test_older_version_of_the_type_is_given_with_a_warning(make):
    response = get(make(), "/flagz", "application/json;g=config.k8s.io;v=v1alpha1;as=Flagz")

    assert json.loads(response.body)["apiVersion"] == "config.k8s.io/v1alpha1"
    assert header(response, "Warning") == (
        '299 - "config.k8s.io/v1alpha1 Flagz is deprecated; use config.k8s.io/v1beta1 Flagz"'
    )


@pytest.mark.parametrize(
    "accept",
    [
        "application/json",
        "application/xml",
        "application/json;g=config.k8s.io;v=v1beta1;as=Statusz",
        "application/json;g=config.k8s.io;v=v2;as=Flagz",
        "text/plain;q=0",
        "text/plain;q=much",
    ],
)
def test_other_forms_are_not_acceptable(make, accept):
    response = get(make(), "/flagz", accept)

    assert (response.status, response.headers) == (406, (("Content-Type", "application/json"),))
    assert response.body == (
        b'{\n  "kind": "Status",\n  "apiVersion": "v1",\n  "metadata": {},\n'
        b'  "status": "Failure",\n  "message": "only the following media types are accepted:'
        b' application/json, application/yaml, text/plain",\n  "reason": "NotAcceptable",\n'
        b'  "code": 406\n}'
    )


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        pytest.param("*/*", "text/plain", id="curl"),
        pytest.param("text/html, application/xml;q=0.9, */*;q=0.8", "text/plain", id="browser"),
        pytest.param(
            "text/plain;q=0.5, application/json;g=config.k8s.io;v=v1beta1;as=Flagz",
            "application/json",
            id="rather JSON",
        ),
        pytest.param(
            "application/json;g=config.k8s.io;v=v1beta1;as=Flagz;q=0.5, text/plain",
            "text/plain",
            id="rather text",
        ),
    ],
)
def test_most_wanted_form_is_chosen(make, accept, wanted):
    assert header(get(make(), "/flagz", accept), "Content-Type").startswith(wanted)


# The log level -----------------------------------------------------------------------------------


def test_log_level_can_be_set_where_profiling_is_on(make):
    levels = []

    response = get(make(set_verbosity=levels.append), "/debug/flags/v", method="PUT", body=b"4")

    assert response.status == 200
    assert response.headers == (("Content-Type", "text/plain"), NOSNIFF)
    assert response.body == b"successfully set klog.logging.verbosity to 4\n"
    assert levels == [4]


def test_log_level_that_is_no_number_is_refused(make):
    levels = []

    response = get(make(set_verbosity=levels.append), "/debug/flags/v", method="PUT", body=b"lots")

    assert (response.status, levels) == (400, [])
    assert response.body == (
        b"failed set klog.logging.verbosity lots: "
        b'strconv.ParseInt: parsing "lots": invalid syntax\n'
    )


def test_log_level_cannot_be_read(make):
    response = get(make(set_verbosity=print), "/debug/flags/v")

    assert (response.status, response.body) == (406, b"unsupported http method\n")


# Over a socket -----------------------------------------------------------------------------------


def test_large_metrics_page_arrives_whole(make, registry):
    gauge = Gauge("kubeproxy_many", "[ALPHA] Many", ["n"], registry=registry)
    for n in range(50_000):
        gauge.labels(n).set(n)
    made = make()
    server = HttpServer()
    server.start()
    try:
        sock = httpserver.bind("127.0.0.1", 0)
        port = sock.getsockname()[1]
        server.listen(sock, made.app)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/metrics")
        body = connection.getresponse().read()
        connection.close()
    finally:
        server.stop()

    assert body == get(made, "/metrics").body
