"""What cleaning up removes, and what it leaves alone."""

from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from kubeproxy_py import cleanup, rules
from kubeproxy_py.errors import IptablesError
from kubeproxy_py.iptables import chains, plan
from kubeproxy_py.model import IPFamily

V4, V6 = IPFamily.V4, IPFamily.V6
OURS = {
    "nat": {
        "KUBE-SERVICES": ("-j KUBE-NODEPORTS",),
        "KUBE-NODEPORTS": (),
        "KUBE-POSTROUTING": ("-j RETURN",),
        "KUBE-MARK-MASQ": (),
        "KUBE-PROXY-CANARY": (),
        "KUBE-SVC-ABCDEFGHIJKLMNOP": ("-j KUBE-SEP-ABCDEFGHIJKLMNOP",),
        "KUBE-SVL-ABCDEFGHIJKLMNOP": (),
        "KUBE-SEP-ABCDEFGHIJKLMNOP": (),
        "KUBE-FW-ABCDEFGHIJKLMNOP": (),
        "KUBE-EXT-ABCDEFGHIJKLMNOP": (),
    },
    "filter": {
        "KUBE-SERVICES": (),
        "KUBE-EXTERNAL-SERVICES": (),
        "KUBE-FORWARD": (),
        "KUBE-NODEPORTS": (),
        "KUBE-PROXY-FIREWALL": (),
        "KUBE-PROXY-CANARY": (),
    },
    "mangle": {"KUBE-PROXY-CANARY": ()},
}
# Of the kubelet, of network plugins, of people; and names that only look like ours.
FOREIGN = {
    "nat": {
        "KUBE-KUBELET-CANARY": (),
        "KUBE-MARK-DROP": ("-j MARK --set-xmark 0x8000/0x8000",),
        "KUBE-IPTABLES-HINT": (),
        "CNI-HOSTPORT-DNAT": ("-j RETURN",),
        "KUBE-PROXY-FIREWALL": (),
        "MY-KUBE-SVC-X": (),
    },
    "filter": {
        "KUBE-FIREWALL": ("-j DROP",),
        "KUBE-KUBELET-CANARY": (),
        "KUBE-SVC-ABCDEFGHIJKLMNOP": (),
    },
    "mangle": {"KUBE-KUBELET-CANARY": (), "KUBE-IPTABLES-HINT": (), "KUBE-SERVICES": ()},
    "raw": {"KUBE-SERVICES": (), "PREROUTING": ()},
}
BUILTIN = {
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "mangle": tuple(chains.BUILTIN),
}
FOREIGN_RULE = "-s 192.0.2.1/32 -j DROP"


def tables(*parts, jumps=1):
    """Return live tables of these chains, with *jumps* copies of all our jumps."""
    built = {
        table: dict.fromkeys(names, (FOREIGN_RULE,)) | {
            name: texts for part in parts for name, texts in part.get(table, {}).items()
        }
        for table, names in BUILTIN.items()
    }  # fmt: skip
    for jump in rules.JUMPS:
        built[jump.table][jump.builtin] = (jump.rule,) * jumps + built[jump.table][jump.builtin]
    return built


def cleaned(live):
    """Return *live* as the batch leaves it."""
    result = {table: dict(found) for table, found in live.items()}
    cleanup.removal(live).apply_to(result)
    return result


def test_all_that_is_ours_goes_and_all_that_is_not_stays():
    left = cleaned(tables(OURS, FOREIGN))
    wanted = tables(FOREIGN, jumps=0)
    for builtin in ("INPUT", "OUTPUT"):
        # The kubelet's as well.
        wanted["filter"][builtin] = ("-j KUBE-FIREWALL", FOREIGN_RULE)

    assert left == wanted


def test_every_copy_of_a_jump_goes():
    left = cleaned(tables(OURS, jumps=3))

    assert left["nat"]["PREROUTING"] == (FOREIGN_RULE,)
    assert left["filter"]["INPUT"] == (*["-j KUBE-FIREWALL"] * 3, FOREIGN_RULE)


def test_a_host_without_our_rules_gets_an_empty_batch():
    assert not cleanup.removal({}).sections
    assert not cleanup.removal(tables(FOREIGN, jumps=0)).sections


def test_a_chain_that_others_lead_to_is_emptied():
    # It cannot be deleted, and in a restore that tries to, nothing else would be.
    live = tables(OURS)
    live["nat"]["PREROUTING"] += ("-s 192.0.2.2/32 -j KUBE-SERVICES",)
    left = cleaned(live)

    assert {name: texts for name, texts in left["nat"].items() if "KUBE" in name} == {
        "KUBE-SERVICES": ()
    }
    assert left["nat"]["PREROUTING"] == (FOREIGN_RULE, "-s 192.0.2.2/32 -j KUBE-SERVICES")


def test_jumps_go_before_the_chains_they_lead_to():
    lines = cleanup.removal(tables(OURS)).render().splitlines()

    for start, end in zip(
        (number for number, line in enumerate(lines) if line.startswith("*")),
        (number for number, line in enumerate(lines) if line == "COMMIT"),
        strict=True,
    ):
        section = lines[start:end]
        removed = [number for number, line in enumerate(section) if line.startswith("-D ")]
        deleted = [number for number, line in enumerate(section) if line.startswith("-X ")]
        assert max(removed, default=-1) < min(deleted)


def test_chains_are_emptied_before_any_of_them_is_deleted():
    # They lead to each other, and a chain that is led to cannot be deleted.
    for section in cleanup.removal(tables(OURS)).sections:
        lines = plan.Batch((section,)).render().splitlines()
        for name in section.delete:
            first = min(number for number, line in enumerate(lines) if line.startswith("-X "))
            assert lines.index(f":{name} - [0:0]") < first


def test_an_nft_table_that_cannot_be_looked_for_is_not_taken_for_none():
    def refused(family, name):
        raise IptablesError("cannot look for nft table kube-proxy: Operation not permitted")

    with capture_logs() as logs:
        assert not cleanup.remove_nft_mode_table(V6, refused)

    (told,) = logs
    assert (told["event"], told["table"]) == ("cleanup.nft_table_left", ["ip6", "kube-proxy"])
    assert "Operation not permitted" in told["error"]


def test_where_there_is_no_nft_table_nothing_is_run():
    # The unit tests' guard against programs is the proof.
    assert cleanup.remove_nft_mode_table(V4, lambda family, name: False)


@given(
    st.dictionaries(
        st.sampled_from(["nat", "filter", "mangle", "raw", "security"]),
        st.dictionaries(
            st.from_regex(r"(KUBE-(SVC|SVL|SEP|FW|EXT|X)-)?[A-Z]{1,8}", fullmatch=True)
            | st.sampled_from(["KUBE-SERVICES", "KUBE-FIREWALL", "KUBE-PROXY-CANARY"]),
            st.just(()),
        ),
    )
)
def test_exactly_the_chains_that_are_ours_are_deleted(live):
    left = cleaned(live)

    assert left == {
        table: {name: texts for name, texts in found.items() if not chains.is_ours(table, name)}
        for table, found in live.items()
    }
