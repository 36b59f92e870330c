"""What the API server is asked, and what its answers come to."""

import socket
import threading

import pytest

from kubeproxy_py import config
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.external import ApiAddress
from kubeproxy_py.flags import Settings
from kubeproxy_py.preflight import ask
from tests.support.api_server import ApiServer


@pytest.fixture
def server():
    with ApiServer() as server:
        yield server


@pytest.fixture
def settings(server, tmp_path):
    path = server.kubeconfig(tmp_path / "kubeconfig")
    return of_kubeconfig(path)


def of_kubeconfig(path):
    changed = config.replace(KubeProxyConfiguration(), "client_connection.kubeconfig", str(path))
    return Settings(config=changed)


def test_a_server_that_answers_is_described(server, settings):
    facts = ask.ask(settings)

    assert (facts.server, facts.version) == (server.url, "v1.36.2")
    assert facts.addresses == (ApiAddress("127.0.0.1", server.port),)
    assert (facts.failure, facts.permissions_failure, facts.is_in_cluster) == ("", "", False)
    assert abs(facts.clock_ahead_s) < 5
    assert set(facts.permissions.values()) == {True}
    assert "watch endpointslices" in facts.permissions


def test_what_is_denied_is_told(server, settings):
    server.settings.authorize = lambda request, route: (
        (request.verb, route.resource.plural) not in {("watch", "nodes"), ("create", "events")}
    )

    denied = {what for what, is_allowed in ask.ask(settings).permissions.items() if not is_allowed}
    assert denied == {"watch nodes", "create events"}


def test_nothing_is_changed_by_asking(server, settings):
    before = server.resource_version
    ask.ask(settings)

    assert server.resource_version == before
    assert {request.path for request in server.requests if request.method != "GET"} == {
        ask._REVIEWS
    }


def test_a_clock_that_differs_is_told(server, settings):
    server.settings.clock_ahead_s = 600

    assert 590 < ask.ask(settings).clock_ahead_s < 610


def test_a_server_that_is_away_is_told(server, settings):
    server.stop()

    assert "cannot GET" in ask.ask(settings).failure


def test_credentials_that_are_refused_are_told(tmp_path):
    with ApiServer(tokens=["right"]) as server:
        path = server.kubeconfig(tmp_path / "kubeconfig")
        path.write_text(path.read_text().replace("right", "wrong"))
        facts = ask.ask(of_kubeconfig(path))

    # The version is everybody's to know.
    assert facts.version
    assert "401" in facts.permissions_failure


def test_a_kubeconfig_that_is_not_there_is_told(tmp_path):
    assert str(tmp_path) in ask.ask(of_kubeconfig(tmp_path / "none")).config_failure


class _Page:
    """Something else that answers on the port: a proxy's login page, say."""

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def serve_one(self):
        connection, _ = self._listener.accept()
        with connection:
            connection.recv(65536)
            body = b"<html>"
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            connection.sendall(head.encode() + body)

    def close(self):
        self._listener.close()


def test_something_else_that_answers_is_no_api_server():
    page = _Page()
    thread = threading.Thread(target=page.serve_one)
    thread.start()
    facts = ask.ask(
        Settings(config=KubeProxyConfiguration(), master=f"http://localhost:{page.port}")
    )
    thread.join(10)
    page.close()

    assert "not as an API server" in facts.failure
    # A name is resolved, as the connection would.
    assert ApiAddress("127.0.0.1", page.port) in facts.addresses


def test_a_name_that_nobody_knows_has_no_address():
    facts = ask.ask(Settings(config=KubeProxyConfiguration(), master="https://no.such.invalid"))

    assert facts.addresses == ()
    assert facts.failure


@pytest.mark.parametrize(
    ("settings", "environ", "has_source"),
    [
        (Settings(config=KubeProxyConfiguration()), {}, False),
        (Settings(config=KubeProxyConfiguration()), {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, True),
        (Settings(config=KubeProxyConfiguration(), master="http://m"), {}, True),
        (of_kubeconfig("k"), {}, True),
    ],
)
def test_where_an_api_server_may_be_named(settings, environ, has_source):
    assert ask.has_source(settings, environ) is has_source
