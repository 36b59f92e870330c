"""The connection to the API server, against a real one on loopback."""

import json
import os
import queue
import ssl
import sys
import threading
import time
from contextlib import ExitStack

import pytest
import urllib3
import yaml
from kubernetes.client import configuration as client_configuration
from urllib3.util import ssl_

from kubeproxy_py import api, errors
from tests.support import builders
from tests.support.api_server import ApiServer

SERVICES = "/api/v1/services"
EVENTS = "/apis/events.k8s.io/v1/namespaces/default/events"


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def serve(stack):
    def serve(**settings):
        return stack.enter_context(ApiServer(**settings))

    return serve


@pytest.fixture
def server(serve):
    return serve()


@pytest.fixture
def connect(stack, serve, metrics):
    def connect(**settings):
        connection = api.connect(user_agent="kube-proxy/test", metrics=metrics, **settings)
        stack.callback(connection.close)
        return connection

    return connect


def read(connection, path=SERVICES, **settings):
    with connection.get(path, **settings) as response:
        return json.loads(response.read())


def rewrite(kubeconfig, *, user=None, **cluster):
    """Change a kubeconfig file's user and cluster."""
    config = json.loads(kubeconfig.read_text())
    if user is not None:
        config["users"][0]["user"] = user
    config["clusters"][0]["cluster"] |= cluster
    kubeconfig.write_text(json.dumps(config))
    return str(kubeconfig)


# -- where and who -------------------------------------------------------------------------------


def test_kubeconfig_names_server_and_token(serve, connect, tmp_path):
    server = serve(tokens=["secret"])
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")

    connection = connect(kubeconfig=str(kubeconfig))

    assert read(connection)["kind"] == "ServiceList"
    assert connection.server == server.url


def test_kubeconfig_names_authority_and_client_certificate(serve, connect, tmp_path):
    server = serve(tls=True, needs_client_certificate=True)
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")

    assert read(connect(kubeconfig=str(kubeconfig)))["kind"] == "ServiceList"


def test_server_with_a_certificate_of_another_authority_is_not_spoken_to(serve, connect, tmp_path):
    ours, other = serve(tls=True), serve(tls=True)
    kubeconfig = rewrite(ours.kubeconfig(tmp_path / "kubeconfig"), server=other.url)

    with pytest.raises(errors.ApiUnavailable, match="certificate verify failed"):
        read(connect(kubeconfig=kubeconfig))
    assert other.requests == []


def test_authority_that_only_strict_readers_refuse_is_believed(
    serve, connect, tmp_path, monkeypatch
):
    make = ssl_.create_urllib3_context

    def strict(*args, **settings):
        # What urllib3 does from Python 3.13 on.
        context = make(*args, **settings)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    for module in (ssl_, urllib3.connection):
        monkeypatch.setattr(module, "create_urllib3_context", strict)
    kubeconfig = serve(tls=True).kubeconfig(tmp_path / "kubeconfig")

    assert read(connect(kubeconfig=str(kubeconfig)))["kind"] == "ServiceList"


def test_certificate_is_not_checked_when_kubeconfig_says_so(serve, connect, tmp_path):
    server = serve(tls=True)
    path = server.kubeconfig(tmp_path / "kubeconfig")
    config = json.loads(path.read_text())
    config["clusters"][0]["cluster"] = {"server": server.url, "insecure-skip-tls-verify": True}
    path.write_text(json.dumps(config))

    assert read(connect(kubeconfig=str(path)))["kind"] == "ServiceList"


def test_master_overrides_the_server_of_kubeconfig_and_keeps_its_token(serve, connect, tmp_path):
    server = serve(tokens=["secret"])
    kubeconfig = rewrite(server.kubeconfig(tmp_path / "kubeconfig"), server="http://127.0.0.1:9")

    connection = connect(kubeconfig=kubeconfig, master=server.url)

    assert read(connection)["kind"] == "ServiceList"


def test_master_alone_is_enough_and_needs_no_scheme(server, connect):
    connection = connect(master=server.url.removeprefix("http://"))

    assert read(connection)["kind"] == "ServiceList"


@pytest.mark.parametrize("master", ["http://", "ftp://host", "http://[::1", "http://host:port"])
def test_master_that_is_no_url_is_refused(connect, master):
    with pytest.raises(errors.ConfigError, match=r"cannot use .* as the API server's URL"):
        connect(master=master)


def test_without_any_configuration_says_what_is_missing(connect):
    with pytest.raises(
        errors.ConfigError,
        match=r"^unable to load in-cluster configuration, KUBERNETES_SERVICE_HOST and "
        r"KUBERNETES_SERVICE_PORT must be defined$",
    ):
        connect(environ={})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "no such file", id="missing"),
        pytest.param("", "empty", id="empty"),
        pytest.param("a: [", "while parsing", id="not yaml"),
        pytest.param("[]", "not a kubeconfig", id="a list"),
        pytest.param("kind: Config", "current-context", id="without a context"),
    ],
)
def test_unusable_kubeconfig_is_named(connect, tmp_path, content, message):
    path = tmp_path / "kubeconfig"
    if content is not None:
        path.write_text(content)

    with pytest.raises(errors.ConfigError, match=f"cannot load kubeconfig '{path}': .*{message}"):
        connect(kubeconfig=str(path))


@pytest.fixture
def pod(serve, tmp_path):
    """A server with TLS, and what a Pod in its cluster is given: connect's arguments."""
    server = serve(tls=True, tokens=["first"])
    (tmp_path / "ca.crt").write_bytes(server.certificates.authority.read_bytes())
    (tmp_path / "token").write_text("first\n")
    environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(server.port)}
    return server, {"environ": environ, "service_account_dir": tmp_path}


def test_pod_uses_its_service_account(pod, connect):
    _, arguments = pod

    assert read(connect(**arguments))["kind"] == "ServiceList"


def test_pod_without_a_token_says_so(pod, connect, tmp_path):
    _, arguments = pod
    (tmp_path / "token").unlink()

    with pytest.raises(errors.ConfigError, match=r"cannot load in-cluster configuration: .*token"):
        connect(**arguments)


def test_pod_takes_a_rotated_token_when_the_old_one_is_refused(pod, connect, tmp_path):
    server, arguments = pod
    connection = connect(**arguments)
    read(connection)

    (tmp_path / "token").write_text("second")
    server.accept_tokens("second")

    assert read(connection)["kind"] == "ServiceList"


def test_token_file_named_by_kubeconfig_is_read_again_after_a_401(serve, connect, tmp_path):
    server = serve(tokens=["first"])
    token = tmp_path / "token"
    token.write_text("first\n")
    user = {"tokenFile": str(token)}
    connection = connect(kubeconfig=rewrite(server.kubeconfig(tmp_path / "config"), user=user))
    read(connection)

    token.write_text("second\n")
    server.accept_tokens("second")

    assert read(connection)["kind"] == "ServiceList"


def test_exec_plugin_gives_the_token_and_is_asked_again_after_a_401(serve, connect, tmp_path):
    server = serve(tokens=["first"])
    token = tmp_path / "token"
    token.write_text("first")
    plugin = tmp_path / "plugin"
    plugin.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib\n"
        f"token = pathlib.Path({str(token)!r}).read_text()\n"
        "print(json.dumps({'kind': 'ExecCredential', 'status': {'token': token},\n"
        "                  'apiVersion': 'client.authentication.k8s.io/v1'}))\n"
    )
    plugin.chmod(0o755)
    user = {"exec": {"command": str(plugin), "apiVersion": "client.authentication.k8s.io/v1"}}
    connection = connect(kubeconfig=rewrite(server.kubeconfig(tmp_path / "config"), user=user))
    read(connection)

    token.write_text("second")
    server.accept_tokens("second")

    assert read(connection)["kind"] == "ServiceList"


def test_refused_credentials_are_renewed_once_and_not_for_ever(serve, connect, tmp_path):
    server = serve(tokens=["secret"])
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    server.accept_tokens("other")

    with pytest.raises(api.Refused, match="401"):
        read(connect(kubeconfig=str(kubeconfig)))
    assert len(server.requests) == 2


def test_threads_refused_together_renew_credentials_once(server, metrics):
    loads = []

    def load():
        loads.append(1)
        return client_configuration.Configuration(host=server.url)

    connection = api.Connection(load, user_agent="test", metrics=metrics)
    for _ in range(3):
        connection._renew(0)

    assert len(loads) == 2


def test_token_file_that_vanished_is_no_reason_to_exit(server, metrics):
    def refresh(configuration):
        raise OSError("token: no such file")

    def load():
        configuration = client_configuration.Configuration(host=server.url)
        configuration.api_key["BearerToken"] = "Bearer secret"
        configuration.refresh_api_key_hook = refresh
        return configuration

    connection = api.Connection(load, user_agent="test", metrics=metrics)

    with pytest.raises(errors.ApiUnavailable, match="cannot renew credentials: token"):
        connection.get(SERVICES)


def test_kubeconfig_that_became_unreadable_is_no_reason_to_exit(serve, connect, tmp_path):
    server = serve(tokens=["secret"])
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    connection = connect(kubeconfig=str(kubeconfig))

    kubeconfig.unlink()
    server.accept_tokens("other")

    with pytest.raises(errors.ApiUnavailable, match=r"cannot renew credentials: .*no such file"):
        read(connection)


# -- answers -------------------------------------------------------------------------------------


def test_request_says_who_asks_and_wants_json(server, connect):
    read(connect(master=server.url), query={"labelSelector": "!a/b"})

    (request,) = server.requests
    assert request.headers["User-Agent"] == "kube-proxy/test"
    assert request.headers["Accept"] == "application/json"
    assert request.query == {"labelSelector": "!a/b"}


def test_requests_one_after_the_other_share_a_connection(server, connect):
    connection = connect(master=server.url)

    read(connection)
    read(connection)

    assert len({request.client for request in server.requests}) == 1


def test_object_is_posted_as_json(server, connect):
    event = builders.make_service() | {"kind": "Event", "apiVersion": "events.k8s.io/v1"}

    answer = connect(master=server.url).post(EVENTS, event)

    assert json.loads(answer)["metadata"]["name"] == "svc1"


def test_error_carries_the_servers_words(server, connect):
    server.fail(403)

    with pytest.raises(
        api.Refused, match=r"cannot GET 127.0.0.1:\d+/api/v1/services: 403: .*is forbidden"
    ) as caught:
        read(connect(master=server.url))
    assert caught.value.status == 403


def test_gone_means_that_history_is_lost(server, connect):
    server.fail(410)

    with pytest.raises(errors.WatchExpired):
        read(connect(master=server.url))


def test_error_page_of_a_proxy_is_shown(server, connect):
    server.spoil(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 14\r\n\r\n<h1>sorry</h1>")

    with pytest.raises(api.Refused, match="502: <h1>sorry</h1>"):
        read(connect(master=server.url))


def test_requests_that_are_over_are_not_remembered(server, connect):
    connection = connect(master=server.url)
    read(connection)
    for answer in (b"302 Found\r\nLocation: http://127.0.0.1:9/", b"500 Oops", b"401 Who"):
        end = b"\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        server.spoil(b"HTTP/1.1 " + answer + end, times=2)
        with pytest.raises(api.Refused):
            read(connection)
        server.heal()
    server.spoil(b"")
    with pytest.raises(errors.ApiUnavailable):
        read(connection)

    assert connection._in_flight == {}


def test_redirect_is_an_error(server, connect):
    server.spoil(
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n"
    )

    with pytest.raises(api.Refused, match="302"):
        read(connect(master=server.url))


@pytest.mark.parametrize("data", [b"", b"garbage\r\n"], ids=["nothing", "garbage"])
def test_answer_that_is_no_http_is_an_error(server, connect, data):
    server.spoil(data)

    with pytest.raises(errors.ApiUnavailable):
        read(connect(master=server.url))


def test_half_a_body_is_an_error(server, connect):
    server.apply_many(builders.make_service(f"svc{n}") for n in range(10))
    server.halve()

    with pytest.raises(errors.ApiUnavailable, match="cannot read GET"):
        read(connect(master=server.url))


def test_silence_before_the_answer_is_told_from_absence(server, connect):
    server.freeze()

    with pytest.raises(api.Silence):
        read(connect(master=server.url), read_timeout_s=0.05)


def test_silence_within_the_answer_is_told_from_its_end(server, connect):
    connection = connect(master=server.url)

    with (
        connection.get(SERVICES, {"watch": "true"}, read_timeout_s=0.05) as response,
        pytest.raises(api.Silence),
    ):
        response.read()


def test_requests_are_counted_as_client_go_does(server, connect, metrics):
    connection = connect(master=server.url)
    host = server.url.removeprefix("http://")
    read(connection)
    server.fail(500, times=1)
    with pytest.raises(api.Refused):
        read(connection)
    server.stop()
    with pytest.raises(errors.ApiUnavailable, match=f"cannot GET {host}"):
        read(connection)

    counted = {code: metrics.rest_requests.labels(code, host, "GET")._value.get() for code in
               ("200", "500", "<error>")}  # fmt: skip
    assert counted == {"200": 1, "500": 1, "<error>": 1}
    assert metrics.rest_request_duration.labels(host, "GET")._sum.get() > 0


# -- the end -------------------------------------------------------------------------------------


def blocked(connection):
    """Let a thread watch; return the queue of its outcome once it waits for the server."""
    outcome = queue.SimpleQueue()

    def follow():
        try:
            outcome.put(read(connection, query={"watch": "true"}))
        except errors.ApiError as error:
            outcome.put(error)

    threading.Thread(target=follow).start()
    deadline = time.monotonic() + 5
    while not connection._in_flight:
        assert time.monotonic() < deadline
        os.sched_yield()
    return outcome


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("is_frozen", [True, False], ids=["before the answer", "within the answer"])
def test_close_ends_a_read_that_blocks(serve, connect, tmp_path, tls, is_frozen):
    server = serve(tls=tls)
    connection = connect(kubeconfig=str(server.kubeconfig(tmp_path / "kubeconfig")))
    read(connection)  # the handshake is done
    if is_frozen:
        server.freeze()
    outcome = blocked(connection)

    connection.close()

    assert isinstance(outcome.get(timeout=2), errors.ApiUnavailable)


def test_close_ends_a_handshake_that_blocks(serve, connect, tmp_path):
    server = serve(tls=True)
    connection = connect(kubeconfig=str(server.kubeconfig(tmp_path / "kubeconfig")))
    server.freeze()
    outcome = blocked(connection)

    connection.close()

    assert isinstance(outcome.get(timeout=2), errors.ApiUnavailable)


def test_closed_connection_refuses_requests(server, connect):
    connection = connect(master=server.url)
    connection.close()

    with pytest.raises(errors.ApiUnavailable, match="it is closed"):
        read(connection)


def test_kubeconfig_may_be_yaml(server, connect, tmp_path):
    path = server.kubeconfig(tmp_path / "kubeconfig")
    path.write_text(yaml.safe_dump(json.loads(path.read_text())))

    assert read(connect(kubeconfig=str(path)))["kind"] == "ServiceList"
