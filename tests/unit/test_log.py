"""Logging as operators see it."""

import json
import sys
from pathlib import Path

import pytest
import structlog

from kubeproxy_py import log


@pytest.fixture(autouse=True)
def restored():
    """Put structlog back as it was: its configuration is one for the whole process."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
    log.set_verbosity(0)


def lines(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_json_is_one_object_a_line_on_stderr(capsys):
    log.configure(fmt="json")
    structlog.get_logger().warning("sync.failed", ip_family="IPv4", excerpt="1: a\n2: b")

    (line,) = lines(capsys)
    event = json.loads(line)
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "event": "sync.failed",
        "level": "warning",
        "ip_family": "IPv4",
        "excerpt": "1: a\n2: b",
    }


def test_text_has_no_colours_where_nobody_sees_them(capsys):
    log.configure()
    structlog.get_logger().info("sync.completed", ip_family="IPv4")

    (line,) = lines(capsys)
    assert "sync.completed" in line
    assert "ip_family=IPv4" in line
    assert "\x1b" not in line


@pytest.mark.parametrize(("verbosity", "is_shown"), [(0, False), (3, False), (4, True), (9, True)])
def test_details_are_shown_from_verbosity_4(capsys, verbosity, is_shown):
    log.configure(fmt="json", verbosity=verbosity)
    structlog.get_logger().debug("watch.listed")

    assert bool(lines(capsys)) is is_shown


def test_verbosity_changes_while_running(capsys):
    log.configure(fmt="json")
    logger = structlog.get_logger()
    log.set_verbosity(4)
    logger.debug("seen")
    log.set_verbosity(2)
    logger.debug("unseen")

    assert [json.loads(line)["event"] for line in lines(capsys)] == ["seen"]


def test_an_exception_is_shown_with_its_stack(capsys):
    log.configure(fmt="json")
    try:
        raise ValueError("why")  # noqa: TRY301 - a stack is wanted
    except ValueError as error:
        structlog.get_logger().error("thread.crashed", exc_info=error)

    event = json.loads(lines(capsys)[0])
    assert "ValueError: why" in event["exception"]
    assert "test_log.py" in event["exception"]


def test_a_value_that_json_does_not_know_is_shown_all_the_same(capsys):
    log.configure(fmt="json")
    structlog.get_logger().info("event", value=object)

    assert "object" in json.loads(lines(capsys)[0])["value"]


def test_a_name_that_is_no_utf8_does_not_break_the_log(capsys):
    log.configure(fmt="json")
    structlog.get_logger().info("event", path="/etc/\udcff")

    assert json.loads(lines(capsys)[0])["path"] == "/etc/\udcff"


def test_a_log_that_takes_nothing_raises_nothing(monkeypatch):
    full = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115 - closing it fails as well
    monkeypatch.setattr(sys, "stderr", full)
    log.configure()
    structlog.get_logger().error("sync.failed")

    with pytest.raises(OSError, match="No space left"):
        full.close()
