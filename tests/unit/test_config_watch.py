"""What counts as a change of the configuration file, and what does not."""

import os
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from kubeproxy_py.config_watch import ConfigFile

OLD, NEW = "mode: iptables\n", "mode: iptables # new\n"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "config.conf"
    path.write_text(OLD)
    return path


@pytest.fixture
def file(path):
    with closing(ConfigFile(str(path))) as file:
        yield file


def append(path):
    with path.open("a") as stream:
        stream.write("# more\n")


def copy_over(path):
    new = path.with_name("new")
    new.write_text(NEW)
    shutil.copyfile(new, path)


def edit_with_a_backup(path):
    # As editors do that keep what was there under another name.
    path.rename(path.with_name("config.conf~"))
    path.write_text(NEW)


CHANGES = {
    "written in place": lambda path: path.write_text(NEW),
    "appended to": append,
    "truncated": lambda path: path.write_text(""),
    "copied over": copy_over,
    "renamed away": lambda path: path.rename(path.with_name("gone")),
    "moved to another directory": lambda path: path.rename(path.parent.parent / path.name),
    "renamed away and written anew": edit_with_a_backup,
}


def replace(path):
    new = path.with_name("new")
    new.write_text(NEW)
    new.rename(path)


def recreate(path):
    path.unlink()
    path.write_text(NEW)


NO_CHANGES = {
    "nothing": lambda _: None,
    "touched": os.utime,
    "made read-only": lambda path: path.chmod(0o400),
    "rewritten as it was": lambda path: path.write_text(OLD),
    "replaced by a rename": replace,
    "deleted": lambda path: path.unlink(),
    "deleted and created again": recreate,
    "its directory deleted": lambda path: shutil.rmtree(path.parent),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change(file, path, change):
    change(path)

    assert file.has_changed()


@pytest.mark.parametrize("change", NO_CHANGES.values(), ids=NO_CHANGES)
def test_no_change(file, path, change):
    change(path)

    assert not file.has_changed()
    assert not file.has_changed()


def test_after_a_replacement_the_new_file_is_not_watched(file, path):
    replace(path)
    path.write_text(OLD)

    assert not file.has_changed()


def test_an_update_of_a_mounted_config_map_is_no_change(tmp_path):
    # The kubelet's way: a directory for each version, and a symlink that is swapped.
    first, second = tmp_path / "..first", tmp_path / "..second"
    for directory, text in ((first, OLD), (second, NEW)):
        directory.mkdir()
        (directory / "config.conf").write_text(text)
    (tmp_path / "..data").symlink_to(first.name)
    (tmp_path / "config.conf").symlink_to("..data/config.conf")

    with closing(ConfigFile(str(tmp_path / "config.conf"))) as file:
        (tmp_path / "..new").symlink_to(second.name)
        (tmp_path / "..new").rename(tmp_path / "..data")
        assert not file.has_changed()
        shutil.rmtree(first)
        assert not file.has_changed()


def test_a_change_is_told_once(file, path):
    path.write_text(NEW)

    assert file.has_changed()
    assert not file.has_changed()


def test_a_file_that_is_not_there_cannot_be_watched(tmp_path):
    with pytest.raises(FileNotFoundError):
        ConfigFile(str(tmp_path / "none"))


def test_closing_gives_the_descriptor_back(path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    ConfigFile(str(path)).close()

    assert len(list(Path("/proc/self/fd").iterdir())) == before
