"""A disk that does not take the state file; what it is written on is nothing iptables knows of."""

import subprocess

import pytest

from tests.support.duos import addresses, answers, web
from tests.support.proxy import HEALTH_PORT, running

pytestmark = pytest.mark.packet

DEADLINE_S = 60


@pytest.fixture
def disk(tmp_path):
    """Give a file system of 64 KiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", directory], check=True)
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


def fill(directory):
    with (directory / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return


def test_a_full_and_a_read_only_disk_cost_the_state_file_and_nothing_else(
    api, clean_lab, servers, disk, tmp_path
):
    client, near = clean_lab.local_pods[0], clean_lab.local_pods[1]
    api.apply_many(web(1, near))
    fill(disk)
    flags = [
        f"--kubeconfig={api.kubeconfig(tmp_path / 'kubeconfig')}",
        f"--state-file={disk / 'state'}",
    ]
    with running(clean_lab, "nft", tmp_path / "full", *flags) as proxy:
        proxy.wait(lambda: answers(client, 1) == addresses(near), DEADLINE_S)
        proxy.wait(lambda: bool(proxy.events("snapshot.save_failed")))

        assert "No space left" in proxy.events("snapshot.save_failed")[0]["error"]
        assert [path.name for path in disk.iterdir()] == ["filler"]
        assert proxy.get("/readyz", HEALTH_PORT)[0] == 200

    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with running(clean_lab, "nft", tmp_path / "read-only", *flags) as proxy:
        proxy.wait_synced(DEADLINE_S)

        assert "Read-only file system" in proxy.events("snapshot.unavailable")[0]["error"]
        assert answers(client, 1) == addresses(near)
