"""What people and programs read."""

import json

import pytest

from kubeproxy_py import explain, explain_service, explain_text
from kubeproxy_py.model import IPFamily, ServiceName
from kubeproxy_py.ruleset import Ruleset
from tests.support import states
from tests.support.addresses import V4, V6

FACTS = explain.Facts(local_addresses=frozenset({V4.node}))


@pytest.fixture(scope="module")
def golden():
    ruleset = Ruleset(states.golden_options(IPFamily.V4))
    ruleset.apply(states.service_states(states.golden_items("state"), IPFamily.V4))
    return explain.with_jumps(ruleset.tables)


def packet_text(tables, source, destination, port=80, facts=FACTS, **fields):
    in_interface = "" if source in FACTS.local_addresses else "eth0"
    packet = explain.Packet(
        source=source,
        destination=destination,
        destination_port=port,
        **{"in_interface": in_interface} | fields,
    )
    return explain_text.packet_text(explain.trace(tables, packet, facts))


def headline(text):
    return " ".join(text.partition("\n\n")[0].split())


def view(tables, name):
    viewpoint = explain_service.Viewpoint(FACTS, V4.node)
    return explain_service.view(tables, ServiceName(*name.split("/")), viewpoint)


@pytest.mark.parametrize(
    ("source", "destination", "port", "wanted"),
    [
        pytest.param(
            "10.180.0.77",
            "172.30.0.41",
            80,
            "tcp from 10.180.0.77 to 172.30.0.41:80 is delivered to one of 3 endpoints; "
            "its source is kept.",
            id="delivered",
        ),
        pytest.param(
            "10.180.0.9",
            "172.30.0.41",
            80,
            "tcp from 10.180.0.9 to 172.30.0.41:80 is delivered to one of 3 endpoints; "
            "it is masqueraded only on the way to 10.180.0.9:8080.",
            id="hairpin possible",
        ),
        pytest.param(
            V4.node,
            "172.30.0.43",
            80,
            "tcp from 192.168.0.2 to 172.30.0.43:80 is delivered to 10.180.0.3:80; "
            "it is masqueraded (not from a pod: outside 10.180.0.0/16).",
            id="from the node",
        ),
        pytest.param(
            V4.outside,
            V4.node,
            3003,
            "tcp from 203.0.113.2 to 192.168.0.2:3003 is delivered to 10.180.0.3:80; "
            "it is masqueraded (to an external destination).",
            id="node port",
        ),
        pytest.param(
            V4.node,
            V4.node,
            3001,
            "tcp from 192.168.0.2 to 192.168.0.2:3001 is delivered to one of 2 endpoints; "
            "it is masqueraded (from this node to an external destination).",
            id="node port with local policy from the node",
        ),
        pytest.param(
            "10.180.0.3",
            "172.30.0.43",
            80,
            "tcp from 10.180.0.3 to 172.30.0.43:80 is delivered to 10.180.0.3:80; "
            "it is masqueraded (an endpoint that is sent to itself).",
            id="hairpin certain",
        ),
        pytest.param(
            V4.outside,
            "172.30.0.46",
            80,
            "tcp from 203.0.113.2 to 172.30.0.46:80 is rejected by filter KUBE-SERVICES: "
            "ns6/svc6:p80 has no endpoints.",
            id="rejected",
        ),
        pytest.param(
            V4.outside,
            "9.9.9.9",
            53,
            "tcp from 203.0.113.2 to 9.9.9.9:53 passes: "
            "no rule changes its destination or refuses it.",
            id="nothing to do",
        ),
        pytest.param(
            V4.outside,
            V4.node,
            30000,
            "tcp from 203.0.113.2 to 192.168.0.2:30000 passes by filter KUBE-NODEPORTS: "
            "ns2/svc2:p80 health check node port.",
            id="accepted",
        ),
    ],
)
def test_first_sentence_is_the_answer(golden, source, destination, port, wanted):
    assert headline(packet_text(golden, source, destination, port)) == wanted


def test_endpoints_follow_with_their_shares(golden):
    lines = packet_text(golden, "10.180.0.9", "172.30.0.41").splitlines()

    assert lines[lines.index("Outcomes:") + 1 :][:3] == [
        "   33.33 %  10.180.0.10:8080       source kept",
        "   33.33 %  10.180.0.9:8080        masqueraded",
        "   33.33 %  10.180.1.1:8080        source kept",
    ]


def test_path_marks_the_rules_that_decide(golden):
    text = packet_text(golden, V4.outside, "5.6.7.8", protocol="udp")
    decisive = [line.split()[1] for line in text.splitlines() if line.startswith("    * ")]

    assert decisive == [
        "KUBE-EXT-ZCFRLRXJJ5IA6SS3:",
        "KUBE-SEP-MEEZI44XBCQHHOMQ:",
        "KUBE-FORWARD:",
    ]


def test_path_shows_what_was_looked_through_in_vain(golden):
    text = packet_text(golden, V4.outside, V4.node2, 22)

    assert "nothing matches in KUBE-PROXY-FIREWALL, KUBE-FORWARD, KUBE-SERVICES" in text


@pytest.mark.parametrize(
    ("destination", "note"),
    [
        pytest.param("172.30.0.41", "# chosen here with 33.33 %", id="a choice"),
        pytest.param("172.30.0.43", "# what is left", id="the last choice"),
        pytest.param("172.30.0.43", "# destination becomes 10.180.0.3:80", id="DNAT"),
        pytest.param("172.30.0.43", "# source becomes an address of this node", id="masquerade"),
        pytest.param("172.30.0.43", ": will be masqueraded", id="mark"),
        pytest.param("9.9.9.9", "# not marked: keeps its source", id="no mark"),
    ],
)
def test_notes_say_what_rules_mean(golden, destination, note):
    assert note in packet_text(golden, V4.outside, destination)


def test_known_client_is_told_of(golden):
    known = explain.Facts(
        local_addresses=frozenset({V4.node}), recent={"KUBE-SEP-HUOZED3P75TZIULX": {V4.outside}}
    )
    text = packet_text(golden, V4.outside, "5.6.7.8", protocol="udp", facts=known)

    assert "# was here before: the same endpoint again" in text


def test_text_keeps_to_its_width(golden):
    text = packet_text(golden, V4.outside, "5.6.7.8", protocol="udp")
    view_text = explain_text.service_text(view(golden, "ns5/svc5"))

    assert max(map(len, (text + view_text).splitlines())) <= 100


def test_decisive_lines_stand_out_where_they_can(golden):
    packet = explain.Packet(source=V4.node, destination="172.30.0.46", destination_port=80)
    trace = explain.trace(golden, packet, FACTS)
    text = explain_text.packet_text(trace, lambda line: f"<{line}>")

    assert text.startswith("<tcp from")
    assert sum(line.startswith("<    * ") for line in text.splitlines()) == 1


def foreign(*rules, table="filter", builtin="FORWARD"):
    return {table: {builtin: rules}}


def test_mixed_outcomes_are_listed():
    rules = (
        "-m statistic --mode random --probability 0.50000000000 -j DROP",
        "-m statistic --mode random --probability 0.50000000000 -m comment --comment no -j REJECT",
    )
    text = packet_text(foreign(*rules), V4.outside, V4.local_pod(1), 443)

    assert headline(text) == "tcp from 203.0.113.2 to 10.180.1.11:443 has more than one outcome."
    assert "   50.00 %  10.180.1.11:443        dropped by filter FORWARD\n" in text
    assert "   25.00 %  10.180.1.11:443        rejected by filter FORWARD: no\n" in text
    assert "   25.00 %  10.180.1.11:443        source kept, no endpoint\n" in text


def test_unknown_rules_are_told_of():
    text = packet_text(foreign("-m hashlimit -j DROP"), V4.outside, V4.local_pod(1))

    assert text.endswith(
        "Not understood, and taken as not matching:\n"
        "    filter FORWARD: -m hashlimit -j DROP\n"
        "          # unknown: -m hashlimit"
    )


@pytest.mark.parametrize(
    ("rule", "wanted", "note"),
    [
        (
            f"-j SNAT --to-source {V4.node}",
            "refuses it; it is masqueraded (by a rule in nat POSTROUTING).",
            f"# source becomes {V4.node}",
        ),
        (
            "-j MASQUERADE",
            "passes: no rule changes its",
            "# source becomes an address of this node",
        ),
    ],
)
def test_foreign_source_nat_is_told_of(rule, wanted, note):
    text = packet_text(
        foreign(rule, table="nat", builtin="POSTROUTING"), V4.local_pod(1), V4.outside
    )

    assert wanted in headline(text)
    assert note in text
    assert "masqueraded (* decides)" in text


@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        ('! -i cni0 -m comment --comment "a/b cluster IP" -j KUBE-MARK-MASQ', "not by cni0"),
        ('-m comment --comment "a/b cluster IP" -j KUBE-MARK-MASQ', "(a/b cluster IP)"),
    ],
)
def test_reasons_for_masquerading_come_from_the_rule(mark, reason):
    tables = {
        "nat": {
            "PREROUTING": (mark, "-j DNAT --to-destination 10.0.0.1"),
            "KUBE-MARK-MASQ": ("-j MARK --set-xmark 0x4000/0x4000",),
            "POSTROUTING": ("-j KUBE-POSTROUTING",),
            "KUBE-POSTROUTING": ("-m mark --mark 0x4000/0x4000 -j MASQUERADE",),
        }
    }

    assert reason in headline(packet_text(tables, V4.outside, V4.cluster_ip))


def test_masquerading_without_a_word_is_told_by_its_place():
    tables = {
        "nat": {
            "PREROUTING": ("-j DNAT --to-destination 10.0.0.1",),
            "POSTROUTING": ("-j MASQUERADE",),
        }
    }

    assert headline(packet_text(tables, V4.outside, V4.cluster_ip)).endswith(
        "it is masqueraded (by a rule in nat POSTROUTING)."
    )


def test_ipv6_addresses_stand_in_brackets_and_portless_ones_alone():
    facts = explain.Facts()
    text = packet_text({}, V6.outside, V6.node, 80, facts)
    ping = packet_text({}, V6.outside, V6.node, 0, facts, protocol="ipv6-icmp")

    assert f" to [{V6.node}]:80 " in text
    assert f" to {V6.node} passes" in ping


def test_service_is_told_door_by_door(golden):
    assert explain_text.service_text(view(golden, "ns2/svc2")).splitlines()[:16] == [
        "Service ns2/svc2",
        "Pods are told by -s 10.180.0.0/16.",
        "",
        "cluster IP 172.30.0.42:80/tcp (port p80)",
        "    a pod (10.180.255.254): delivered; its source is kept",
        "         50.00 %  10.180.0.2:80",
        "         50.00 %  10.180.1.2:80",
        "    this node (192.168.0.2), an outside client (203.0.113.7): delivered; it is masqueraded (not from",
        "        a pod: outside 10.180.0.0/16)",
        "         50.00 %  10.180.0.2:80",
        "         50.00 %  10.180.1.2:80",
        "",
        "external IP 192.168.99.22:80/tcp (port p80)",
        "    a pod (10.180.255.254): delivered; its source is kept",
        "         50.00 %  10.180.0.2:80",
        "         50.00 %  10.180.1.2:80",
    ]


def test_affinity_of_a_service_is_told(golden):
    text = explain_text.service_text(view(golden, "ns5/svc5"))

    assert "A client keeps its endpoint for 10800 s (session affinity)." in text


def test_service_whose_pods_are_not_told_says_so(golden):
    tables = {"filter": golden["filter"]}
    text = explain_text.service_text(view(tables, "ns6/svc6"))

    assert "The rules do not tell pods from others." in text


def test_door_with_mixed_outcomes_gives_their_shares():
    tables = foreign(
        "-m statistic --mode random --probability 0.25000000000 -j DROP", builtin="OUTPUT"
    )
    packet = explain.Packet(source=V4.node, destination=V4.cluster_ip, destination_port=80)
    visit = explain_service.Visit("this node", explain.trace(tables, packet, FACTS))
    door = explain_service.Door("cluster IP", "", V4.cluster_ip, 80, "tcp", (visit,))
    text = explain_text.service_text(
        explain_service.ServiceView(ServiceName("a", "b"), (door,), None, "")
    )

    assert text.endswith("    this node (192.168.0.2): 75.00 % accepted, 25.00 % dropped")


def test_json_of_a_packet_has_everything(golden):
    packet = explain.Packet(source=V4.node, destination="172.30.0.43", destination_port=80)
    trace = explain.trace(golden, packet, FACTS)
    found = json.loads(json.dumps(explain_text.packet_json(trace)))

    assert found["packet"]["destination"] == "172.30.0.43"
    (outcome,) = found["outcomes"]
    assert outcome["path"][0]["hook"] == "OUTPUT"
    assert outcome["masqueradeRule"]["effect"] == "jump KUBE-MARK-MASQ"
    assert outcome["verdictRule"] is None
    assert (outcome["probability"], outcome["verdict"], outcome["port"]) == (1.0, "delivered", 80)


def test_json_of_a_service_has_a_trace_for_everyone(golden):
    found = json.loads(json.dumps(explain_text.service_json(view(golden, "ns5/svc5"))))

    assert (found["namespace"], found["name"], found["affinityTimeoutSeconds"]) == (
        "ns5",
        "svc5",
        10800,
    )
    assert [visit["who"] for visit in found["doors"][0]["visits"]] == [
        "a pod",
        "this node",
        "an outside client",
    ]
    assert found["doors"][0]["visits"][0]["outcomes"][0]["verdict"] == "delivered"
