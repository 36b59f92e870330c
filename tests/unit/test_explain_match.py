"""What single rules ask of packets: every match, with and without ``!``, and every value's form."""

from fractions import Fraction

import pytest

from kubeproxy_py import explain_match
from kubeproxy_py.explain_match import Facts, Packet, Seen

POD, CLUSTER_IP, NODE = "10.180.1.11", "172.30.0.41", "192.168.0.2"
V6_POD, V6_CLUSTER_IP = "fd00:10:180:1::11", "fd00:172:30::41"
FULL = "--mask 255.255.255.255 --rsource"


def seen(*, facts=None, is_dnated=False, is_snated=False, **packet):
    fields = {
        "source": POD,
        "destination": CLUSTER_IP,
        "source_port": 40000,
        "destination_port": 80,
        "in_interface": "cni0",
        "out_interface": "eth0",
        "mark": 0x4001,
    }
    facts = facts or Facts(local_addresses=frozenset({NODE}), recent={"SEP": {POD}})
    return Seen(Packet(**fields | packet), facts, is_dnated, is_snated)


def judge(rule, **packet):
    answer, _ = explain_match.parse_rule(rule).judge(seen(**packet))
    return answer


@pytest.mark.parametrize(
    ("match", "packet", "wanted"),
    [
        pytest.param("-s 10.180.0.0/16", {}, True, id="source inside a network"),
        pytest.param("-s 10.180.2.0/24", {}, False, id="source outside a network"),
        pytest.param("-s 10.180.1.11", {}, True, id="source without a mask"),
        pytest.param("-s 10.180.0.0/255.255.0.0", {}, True, id="source with a netmask"),
        pytest.param("-s fd00::/8", {}, False, id="source of the other family"),
        pytest.param("-s fd00::/8", {"source": V6_POD}, True, id="IPv6 source"),
        pytest.param("-d 172.30.0.41/32", {}, True, id="destination"),
        pytest.param("-d 172.30.0.42/32", {}, False, id="another destination"),
        pytest.param(
            "-d fd00:172:30::41/128", {"destination": V6_CLUSTER_IP}, True, id="IPv6 destination"
        ),
        pytest.param("-i cni0", {}, True, id="in-interface"),
        pytest.param("-i cni", {}, False, id="in-interface is no prefix without a plus"),
        pytest.param("-i cni+", {}, True, id="in-interface by prefix"),
        pytest.param("-i eth+", {}, False, id="in-interface by another prefix"),
        pytest.param("-i cni0", {"in_interface": ""}, False, id="generated here has no in-interface"),
        pytest.param("-o eth0", {}, True, id="out-interface"),
        pytest.param("-o cni0", {}, False, id="another out-interface"),
        pytest.param("-p tcp", {}, True, id="protocol"),
        pytest.param("-p udp", {}, False, id="another protocol"),
        pytest.param("-p 6", {}, True, id="protocol by number"),
        pytest.param("-p 17", {}, False, id="another protocol by number"),
        pytest.param("-p tcp -m tcp --dport 80", {}, True, id="destination port"),
        pytest.param("-p tcp -m tcp --dport 81", {}, False, id="another destination port"),
        pytest.param("-p tcp -m tcp --dport 70:80", {}, True, id="destination port in a range"),
        pytest.param("-p tcp -m tcp --dport :79", {}, False, id="range without a beginning"),
        pytest.param("-p tcp -m tcp --dport 80:", {}, True, id="range without an end"),
        pytest.param("-m udp --sport 40000", {}, True, id="source port"),
        pytest.param("-m sctp --sport 1:2", {}, False, id="another source port"),
        pytest.param("-m multiport --dports 22,70:90", {}, True, id="list of destination ports"),
        pytest.param("-m multiport --sports 22,80", {}, False, id="list of source ports"),
        pytest.param("-m multiport --ports 22,40000", {}, True, id="list of either ports"),
        pytest.param("-m multiport --ports 80", {"source_port": 0}, True, id="either port, one known"),
        pytest.param("-m conntrack --ctstate NEW", {}, True, id="new connection"),
        pytest.param("-m state --state RELATED,ESTABLISHED", {}, False, id="known connection"),
        pytest.param(
            "-m conntrack --ctstate RELATED,ESTABLISHED", {"ctstate": "RELATED"}, True, id="related"
        ),
        pytest.param("-m conntrack --ctstate DNAT", {}, False, id="state DNAT before any"),
        pytest.param("-m conntrack --ctstate DNAT", {"is_dnated": True}, True, id="state DNAT"),
        pytest.param("-m conntrack --ctstate SNAT", {"is_dnated": True}, False, id="no state SNAT"),
        pytest.param("-m conntrack --ctstate SNAT", {"is_snated": True}, True, id="state SNAT"),
        pytest.param("-m mark --mark 0x4000/0x4000", {}, True, id="bit of a mark"),
        pytest.param("-m mark --mark 0x4000", {}, False, id="whole mark"),
        pytest.param("-m mark --mark 16385", {}, True, id="whole mark in decimals"),
        pytest.param("-m addrtype --dst-type LOCAL", {"destination": NODE}, True, id="to this node"),
        pytest.param("-m addrtype --dst-type LOCAL", {}, False, id="to elsewhere"),
        pytest.param("-m addrtype --src-type LOCAL", {"source": "127.0.0.9"}, True, id="loopback"),
        pytest.param("-m addrtype --src-type LOCAL", {"source": "::1"}, True, id="IPv6 loopback"),
        pytest.param("-m addrtype --src-type LOCAL", {}, False, id="from elsewhere"),
        pytest.param(f"-m recent --rcheck --seconds 9 --reap --name SEP {FULL}", {}, True, id="recent"),
        pytest.param(f"-m recent --update --name OTHER {FULL}", {}, False, id="not in the recent list"),
        pytest.param(f"-m recent --set --name OTHER {FULL}", {}, True, id="recent set"),
        pytest.param(
            "-m recent --rcheck --name SEP --mask 255.255.255.0 --rsource",
            {"source": "10.180.1.99"},
            True,
            id="recent neighbour by a wider mask",
        ),
        pytest.param("-m recent --rcheck --name SEP --rdest", {}, False, id="recent destination"),
        pytest.param("-m recent --rcheck --rsource", {}, False, id="recent list without a name"),
        pytest.param("-m nfacct --nfacct-name counter", {}, True, id="counter"),
        pytest.param("", {}, True, id="no condition"),
    ],
)  # fmt: skip
def test_match_holds_or_not(match, packet, wanted):
    assert judge(f"{match} -j ACCEPT", **packet) is wanted


@pytest.mark.parametrize(
    "match",
    [
        "! -s 10.180.0.0/16",
        "! -d 172.30.0.41/32",
        "! -i cni0",
        "! -i cni+",
        "! -o eth0",
        "! -p tcp",
        "-m tcp ! --dport 80",
        "-m udp ! --sport 40000",
        "-m multiport ! --dports 80,81",
        "-m conntrack ! --ctstate NEW",
        "-m mark ! --mark 0x4000/0x4000",
        "-m addrtype ! --dst-type LOCAL",
        f"-m recent ! --rcheck --name SEP {FULL}",
    ],
)
def test_negation_turns_a_match_round(match):
    packet = {"destination": NODE} if "LOCAL" in match else {}
    packet |= {"destination": CLUSTER_IP} if "-d" in match.split() else {}

    assert (judge(match.replace("! ", ""), **packet), judge(match, **packet)) == (True, False)


def test_rule_for_all_protocols_takes_every_one():
    assert judge("-p all -j ACCEPT", protocol="sctp") is True


@pytest.mark.parametrize(
    ("rule", "word"),
    [
        ("-m hashlimit --hashlimit-upto 5/sec --hashlimit-name x -j DROP", "-m hashlimit"),
        ("-p tcp -m set ! --match-set blocked src -j DROP", "-m set"),
        ("-m limit --limit 5/min -m physdev --physdev-is-in -j DROP", "-m limit -m physdev"),
        ("-p tcp -m tcp ! --tcp-flags FIN,SYN SYN -j DROP", "-m tcp ! --tcp-flags FIN,SYN SYN"),
        ("-m conntrack --ctdir ORIGINAL -j DROP", "-m conntrack --ctdir ORIGINAL"),
        ("-m conntrack --ctstate SEEN -j DROP", "--ctstate SEEN"),
        ("-m addrtype --dst-type BROADCAST -j DROP", "--dst-type BROADCAST"),
        ("-m addrtype --limit-iface-in -j DROP", "-m addrtype --limit-iface-in"),
        ("-s 10.0.0.0/255.0.255.0 -j DROP", "-s 10.0.0.0/255.0.255.0"),
        ("-f -j DROP", "-f"),
        ("-m statistic --mode nth --every 3 --packet 0 -j DROP", "-m statistic --mode nth --every 3 --packet 0"),
        ("-m recent --remove --name X -j DROP", "-m recent --remove --name X"),
        ("-m recent --rcheck --hitcount 4 -j DROP", "-m recent --rcheck --hitcount 4"),
        ("-m recent --rcheck --mask 255.0.255.0 -j DROP", "-m recent --rcheck --mask 255.0.255.0"),
        ("-j DNAT --to-destination 10.0.0.1-10.0.0.9", "-j DNAT --to-destination 10.0.0.1-10.0.0.9"),
        ("-j SNAT", "-j SNAT"),
        ("-j MARK --restore-mark", "-j MARK --restore-mark"),
        ("-j MARK", "-j MARK"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_named(rule, word):
    assert explain_match.parse_rule(rule).judge(seen()) == (None, word)


@pytest.mark.parametrize(
    ("match", "packet"),
    [
        pytest.param("-i cni0", {"in_interface": explain_match.UNKNOWN_INTERFACE}, id="-i"),
        pytest.param("! -i cni+", {"in_interface": explain_match.UNKNOWN_INTERFACE}, id="! -i"),
        pytest.param("-o eth0", {"out_interface": ""}, id="-o"),
        pytest.param("-m tcp --sport 53", {"source_port": 0}, id="--sport"),
    ],
)
def test_match_on_what_was_not_stated_cannot_be_told(match, packet):
    assert judge(match, **packet) is None


def test_match_that_fails_makes_unknown_ones_irrelevant():
    assert judge("-m hashlimit --hashlimit-name x -p udp -j DROP") is False


@pytest.mark.parametrize(
    ("text", "comment"),
    [
        ('-m comment --comment "default/web cluster IP" -j X', "default/web cluster IP"),
        ("-m comment --comment default/web -j X", "default/web"),
        (
            r'-m comment --comment "say \"! -j DROP\" and \\" -j X',
            r'say "! -j DROP" and \ '.strip(),
        ),
        ('-m comment --comment "" -j X', ""),
    ],
)
def test_comment_is_read_as_it_was_meant(text, comment):
    rule = explain_match.parse_rule(text)

    assert (rule.comment, rule.target) == (comment, "X")


def test_words_in_any_order_are_understood():
    rule = explain_match.parse_rule(
        "-m comment --comment x -m tcp -p tcp -d 10.0.0.1 --dport 80 -j X"
    )

    assert rule.judge(seen(destination="10.0.0.1")) == (True, "")


def test_arguments_are_kept_by_option():
    rule = explain_match.parse_rule("! -s 10.0.0.0/8 -d 10.0.0.1/32 -p tcp -m tcp --dport 80 -j X")

    assert rule.values == {"! -s": "10.0.0.0/8", "-d": "10.0.0.1/32", "-p": "tcp", "--dport": "80"}


@pytest.mark.parametrize(
    ("text", "chance"),
    [
        ("-m statistic --mode random --probability 0.50000000000 -j X", Fraction(1, 2)),
        ("-m statistic --mode random ! --probability 0.25000000000 -j X", Fraction(3, 4)),
        ("-m statistic --mode random --probability 0.33333333349 -j X", Fraction(715827883, 1 << 31)),
        ("-j X", Fraction(1)),
    ],
)  # fmt: skip
def test_chance_is_what_the_kernel_keeps(text, chance):
    assert explain_match.parse_rule(text).chance == chance


@pytest.mark.parametrize(
    ("change", "mark"),
    [
        ("--set-xmark 0x4000/0x4000", 0x4001),
        ("--set-xmark 0x4000/0x0", 0x0001),
        ("--set-xmark 0x8000/0xffffffff", 0x8000),
        ("--set-mark 0x2/0xf", 0x4002),
        ("--set-mark 7", 0x7),
        ("--or-mark 0x8000", 0xC001),
        ("--and-mark 0x1", 0x0001),
        ("--xor-mark 0x4000", 0x0001),
    ],
)
def test_marks_are_changed_bit_by_bit(change, mark):
    rule = explain_match.parse_rule(f"-j MARK {change}")

    assert rule.change_mark(0x4001) == mark


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("DNAT --to-destination 10.0.0.1:8080", ("10.0.0.1", 8080)),
        ("DNAT --to-destination 10.0.0.1", ("10.0.0.1", 0)),
        ("DNAT --to-destination :8080", ("", 8080)),
        ("DNAT --to-destination [fd00::1]:8080 --random", ("fd00::1", 8080)),
        ("DNAT --to-destination fd00::1", ("fd00::1", 0)),
        ("SNAT --to-source 192.168.0.2 --random-fully", ("192.168.0.2", 0)),
    ],
)
def test_addresses_of_nat_are_read(target, wanted):
    assert explain_match.parse_rule(f"-j {target}").nat_to == wanted


def test_rule_that_ends_too_early_is_not_understood():
    assert judge("-p tcp -m tcp --dport") is None
