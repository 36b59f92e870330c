"""Which rights are missing, told by name."""

import pytest

from kubeproxy_py import privileges
from kubeproxy_py.errors import KubeProxyError

NET_ADMIN = 1 << 12
NET_RAW = 1 << 13
ALL = (1 << 41) - 1


@pytest.fixture
def status(tmp_path):
    """Write a /proc/self/status with these effective capabilities."""

    def status(effective):
        path = tmp_path / "status"
        path.write_text(
            f"Name:\tpython3\nCapPrm:\t{ALL:016x}\nCapEff:\t{effective:016x}\nSeccomp:\t0\n"
        )
        return path

    return status


@pytest.mark.parametrize("effective", [ALL, NET_ADMIN | NET_RAW], ids=["root", "just the two"])
def test_with_both_rules_may_be_written(status, effective):
    privileges.require_netfilter(status(effective))


@pytest.mark.parametrize(
    ("effective", "missing"),
    [
        (0, "CAP_NET_ADMIN and CAP_NET_RAW"),
        (NET_ADMIN, "CAP_NET_RAW"),
        (ALL & ~NET_ADMIN, "CAP_NET_ADMIN"),
    ],
)
def test_what_is_missing_is_named(status, effective, missing):
    with pytest.raises(KubeProxyError, match=rf"^cannot use iptables without {missing}, which"):
        privileges.require_netfilter(status(effective))


@pytest.mark.parametrize(
    "content", ["", "CapEff:\tmany\n", None], ids=["none told", "unreadable", "no /proc"]
)
def test_where_it_cannot_be_learned_iptables_has_to_find_out(tmp_path, content):
    path = tmp_path / "status"
    if content is not None:
        path.write_text(content)

    privileges.require_netfilter(path)
