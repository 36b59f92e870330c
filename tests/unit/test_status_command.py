"""The status command: what it asks, says, and ends with."""

import json

import click
import pytest
import structlog
from structlog.testing import capture_logs

from kubeproxy_py import cli, status, status_command, status_socket
from kubeproxy_py.httpserver import HttpServer


def gatherer(reasons=()):
    return status.Gatherer(
        node_name="node1",
        version="0.1.0",
        source="files: objects",
        started_at=0.0,
        dispatch="auto",
        unreadiness=lambda: list(reasons),
        pending=dict,
    )


@pytest.fixture
def serve(tmp_path):
    """Return a function that lets a daemon be asked at the path it returns."""
    server = HttpServer()
    server.start()

    def serve(found):
        path = str(tmp_path / "status.sock")
        pages = status_socket.Pages()
        pages.add("/status", lambda _: found.status())
        pages.add("/last-failure", lambda _: found.failures())
        with capture_logs():
            status_socket.serve(path, server, pages)
        return path

    yield serve
    server.stop()


@pytest.fixture
def command(capsys):
    """Run ``status`` as the console script does; returns its exit status and what it printed."""
    before = structlog.get_config()

    def command(*argv):
        with pytest.raises(SystemExit) as ended:
            cli.main(["status", *argv])
        return ended.value.code or 0, *capsys.readouterr()

    yield command
    structlog.configure(**before)


@pytest.mark.parametrize(("reasons", "exit_status"), [((), 0), (("not synced",), 2)])
def test_the_exit_status_says_whether_it_is_ready(serve, command, reasons, exit_status):
    ended, out, _ = command(f"--status-socket={serve(gatherer(reasons))}")

    assert ended == exit_status
    assert out.startswith("node1: not ready\n  not synced" if reasons else "node1: ready\n")


def test_json_is_the_document(serve, command):
    _, out, _ = command(f"--status-socket={serve(gatherer())}", "--output=json")

    assert json.loads(out)["node"]["name"] == "node1"


@pytest.mark.parametrize(
    ("flags", "printed"),
    [([], "No iptables call has failed since the start.\n"), (["--output=json"], "[]\n")],
)
def test_without_a_failure_there_is_none_to_show(serve, command, flags, printed):
    path = serve(gatherer())

    assert command(f"--status-socket={path}", "--last-failure", *flags)[:2] == (0, printed)


def test_where_nobody_listens_it_says_what_to_do(command, tmp_path):
    ended, out, err = command(f"--status-socket={tmp_path / 'none'}")

    assert (ended, out) == (1, "")
    assert "nobody listens there" in err


@pytest.fixture
def proc(tmp_path):
    """Return a function that writes the command lines of processes as /proc has them."""

    def proc(**command_lines):
        for pid, words in command_lines.items():
            directory = tmp_path / "proc" / pid.removeprefix("p")
            directory.mkdir(parents=True)
            if words is not None:
                (directory / "cmdline").write_bytes("\0".join(words).encode() + b"\0")
        return tmp_path / "proc"

    return proc


def test_daemons_are_known_by_their_command_line(proc):
    found = status_command.daemons(
        proc(
            p7=["/usr/bin/python3", "/usr/local/bin/kubeproxy-py", "run", "--v=4"],
            p8=["python3", "-m", "kubeproxy_py", "run"],
            p9=["/usr/local/bin/kubeproxy-py", "status"],
            p10=["vim", "kubeproxy-py"],
            p11=None,
            self=["kubeproxy-py", "run"],
        )
    )

    assert found == [7, 8]


@pytest.mark.parametrize(
    ("pids", "told"),
    [([], "no daemon seems to run on this host: start it with"), ([7, 8], "(pid 7, 8)")],
)
def test_whether_a_daemon_seems_to_run_is_told(monkeypatch, pids, told):
    monkeypatch.setattr(status_command, "daemons", lambda: pids)

    assert told in status_command._what_runs()


def test_a_state_has_a_colour():
    assert cli._coloured("ready", "ready") == click.style("ready", fg="green", bold=True)


@pytest.mark.parametrize(
    ("wanted", "no_color", "is_coloured"),
    [("always", "1", True), ("never", "", False), ("auto", "", False)],
)
def test_colour_is_as_it_was_asked_for_and_else_only_on_a_terminal(
    monkeypatch, wanted, no_color, is_coloured
):
    monkeypatch.setenv("NO_COLOR", no_color)

    assert cli._is_coloured(wanted) == is_coloured


@pytest.mark.parametrize(("no_color", "is_coloured"), [("1", False), ("", True)])
def test_on_a_terminal_no_color_decides(monkeypatch, no_color, is_coloured):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(cli.sys.stdout, "isatty", lambda: True)

    assert cli._is_coloured("auto") == is_coloured
