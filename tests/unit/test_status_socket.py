"""The status socket, both ends of it."""

import os
import socket
import stat
from contextlib import ExitStack

import pytest
from structlog.testing import capture_logs

from kubeproxy_py import status_socket
from kubeproxy_py.errors import KubeProxyError
from kubeproxy_py.httpserver import HttpServer, Request


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "run" / "status.sock")


@pytest.fixture
def serve(path):
    """Return a function that serves pages at *path*; it returns what ends that."""
    with ExitStack() as stack:

        def serve(**pages):
            server = HttpServer()
            server.start()
            stack.callback(server.stop)
            served = status_socket.Pages()
            for name, page in pages.items():
                served.add(f"/{name}", page)
            return status_socket.serve(path, server, served)

        yield serve


def fail(error):
    raise error


def test_a_page_is_answered_as_the_value_that_was_wanted(serve, path):
    serve(top=lambda query: {"limit": int(query["limit"])})

    answer = status_socket.ask(path, "/top?limit=20", wanted=dict[str, int])
    assert answer == {"limit": 20}


def test_only_its_owner_may_open_it(serve, path):
    serve()

    mode = os.stat(path).st_mode  # noqa: PTH116 - the socket itself
    assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o600)


@pytest.mark.parametrize("error", [ValueError("no such limit"), KubeProxyError("no such limit")])
def test_a_question_that_makes_no_sense_is_told_to_who_asked(serve, path, error):
    serve(top=lambda _: fail(error))

    with pytest.raises(KubeProxyError, match="no such limit"):
        status_socket.ask(path, "/top", wanted=int)


def test_a_page_that_is_not_there_is_an_error(serve, path):
    serve()

    with pytest.raises(KubeProxyError, match="for /nothing: 404"):
        status_socket.ask(path, "/nothing", wanted=int)


def test_an_answer_of_another_shape_says_so(serve, path):
    serve(top=lambda _: "text")

    with pytest.raises(KubeProxyError, match="another version"):
        status_socket.ask(path, "/top", wanted=int)


def test_nothing_is_changed_by_asking(serve):
    pages = status_socket.Pages()
    pages.add("/top", lambda _: 1)

    assert pages.app(Request(method="POST", path="/top")).status == 405


@pytest.mark.parametrize("is_left_behind", [False, True])
def test_who_asks_nobody_is_told_that_nobody_listens(path, tmp_path, is_left_behind):
    if is_left_behind:
        status_socket.bind(path).close()

    with pytest.raises(status_socket.NotRunning, match="nobody listens"):
        status_socket.ask(path, "/status", wanted=int)


def test_a_dead_daemons_socket_is_replaced(serve, path):
    status_socket.bind(path).close()
    serve(one=lambda _: 1)

    assert status_socket.ask(path, "/one", wanted=int) == 1


def test_a_living_daemons_socket_is_left_alone(serve, path):
    serve(who=lambda _: "first")
    with capture_logs() as logs:
        close = serve(who=lambda _: "second")
    close()

    (line,) = [line for line in logs if line["event"] == "status.listen_failed"]
    assert (line["log_level"], line["error"]) == ("warning", "another process listens there")
    assert status_socket.ask(path, "/who", wanted=str) == "first"


def test_what_is_no_socket_is_left_alone(serve, path, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.sock").write_text("mine")
    with capture_logs() as logs:
        serve()

    assert [line["error"] for line in logs] == ["it exists and is no socket"]
    assert (tmp_path / "run" / "status.sock").read_text() == "mine"


def test_a_path_that_cannot_be_is_a_warning(tmp_path):
    with capture_logs() as logs:
        status_socket.serve(str(tmp_path / ("x" * 200)), HttpServer(), status_socket.Pages())

    assert [line["event"] for line in logs] == ["status.listen_failed"]


def test_it_is_removed_in_the_end_but_not_anothers(serve, path):
    close = serve()
    os.unlink(path)  # noqa: PTH108 - the socket itself
    other = status_socket.bind(path)
    close()
    assert os.path.exists(path)  # noqa: PTH110 - the socket itself

    other.close()
    serve()()
    assert not os.path.exists(path)  # noqa: PTH110 - the socket itself


def test_who_else_connects_gets_no_answer(path, monkeypatch):
    listener = status_socket.bind(path)
    with ExitStack() as stack:
        stack.enter_context(listener)
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(path)
        accepted = stack.enter_context(listener.accept()[0])
        is_trusted = status_socket.is_trusted(accepted)
        # The kernel says who is there; this process is somebody else now, as far as it knows.
        monkeypatch.setattr(status_socket.os, "geteuid", lambda: 12345)

        assert is_trusted
        assert status_socket.is_trusted(accepted) == (os.getuid() == 0)
