"""Totals on disk."""

import pytest
from structlog.testing import capture_logs

from kubeproxy_py.traffic_state import Board, State, StateFile, Total

BOARDS = {"IPv4": {"connections": Board((Total("ns", "web", "", "tcp", "", 5, 3),), 7)}}


@pytest.fixture
def boot_id(tmp_path):
    path = tmp_path / "boot_id"
    path.write_text("one\n")
    return path


def test_what_was_written_is_read(tmp_path, boot_id):
    path = tmp_path / "made" / "traffic.json"
    StateFile(path, boot_id).write(BOARDS)

    assert StateFile(path, boot_id).read() == State("one", BOARDS)
    assert [each.name for each in path.parent.iterdir()] == ["traffic.json"]


def test_counters_of_another_boot_are_none(tmp_path, boot_id):
    path = tmp_path / "traffic.json"
    StateFile(path, boot_id).write(BOARDS)
    boot_id.write_text("two\n")

    assert StateFile(path, boot_id).read() == State()


def test_without_a_path_nothing_is_kept(boot_id):
    file = StateFile(None, boot_id)
    file.write(BOARDS)

    assert file.read() == State()


def test_no_file_is_no_state(tmp_path, boot_id):
    with capture_logs() as logs:
        assert StateFile(tmp_path / "none", boot_id).read() == State()
    assert logs == []


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"boards": 5}', b"\xff"])
def test_a_damaged_file_costs_the_totals_and_is_told(content, tmp_path, boot_id):
    path = tmp_path / "traffic.json"
    path.write_bytes(content)
    with capture_logs() as logs:
        assert StateFile(path, boot_id).read() == State()

    assert [log["event"] for log in logs] == ["traffic.state_unreadable"]


def test_a_disk_that_fails_is_told_once_until_it_works_again(tmp_path, boot_id):
    blocker = tmp_path / "dir"
    blocker.write_text("no directory")
    file = StateFile(blocker / "traffic.json", boot_id)
    with capture_logs() as logs:
        file.write(BOARDS)
        file.write(BOARDS)
        blocker.unlink()
        file.write(BOARDS)
        (blocker / "traffic.json").unlink()
        blocker.rmdir()
        blocker.write_text("no directory")
        file.write(BOARDS)

    assert [log["event"] for log in logs] == ["traffic.state_unwritten"] * 2


def test_without_a_boot_id_states_are_taken(tmp_path):
    path, none = tmp_path / "traffic.json", tmp_path / "none"
    StateFile(path, none).write(BOARDS)

    assert StateFile(path, none).read().boards == BOARDS
