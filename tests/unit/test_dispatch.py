"""The chains that all ServicePorts share."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeproxy_py import dispatch, rules, trees
from kubeproxy_py.dispatch import NAT_SERVICES, SHARED, ChainId, Dispatch
from kubeproxy_py.iptables import chains
from kubeproxy_py.model import IPFamily, ServicePortName
from tests.support import lookups
from tests.support.lookups import Packet

NAT_NODE_PORTS = ChainId(rules.NAT, rules.NODE_PORTS)
FILTER_SERVICES = ChainId(rules.FILTER, rules.SERVICES)
FIRST = ServicePortName("a", "first", "", "tcp")
SECOND = ServicePortName("b", "second", "", "tcp")


def entry(chain, rule):
    return rules.Entry(*chain, address="", protocol="tcp", port=80, rule=rule)


@pytest.fixture
def layout():
    """Give a layout of which all that is there from the beginning was taken."""
    layout = Dispatch(IPFamily.V4)
    layout.take_changed()
    return layout


def test_shared_chains_exist_when_they_are_empty():
    assert Dispatch(IPFamily.V4).take_changed() == dict.fromkeys(SHARED, ())


def test_nothing_changed_is_nothing_taken(layout):
    assert layout.take_changed() == {}


def test_only_the_chain_that_changed_is_taken(layout):
    layout.replace(FIRST, [entry(NAT_SERVICES, "one")])

    assert layout.take_changed() == {NAT_SERVICES: ("one",)}


def test_rules_are_sorted_by_service_port_whatever_came_first(layout):
    layout.replace(SECOND, [entry(NAT_SERVICES, "two")])
    layout.replace(FIRST, [entry(NAT_SERVICES, "z"), entry(NAT_SERVICES, "a")])

    assert layout.take_changed() == {NAT_SERVICES: ("z", "a", "two")}


def test_same_entries_again_change_nothing(layout):
    layout.replace(FIRST, [entry(NAT_SERVICES, "one")])
    layout.take_changed()
    layout.replace(FIRST, [entry(NAT_SERVICES, "one")])

    assert layout.take_changed() == {}


def test_entries_move_from_one_chain_to_another(layout):
    layout.replace(FIRST, [entry(NAT_SERVICES, "one")])
    layout.take_changed()
    layout.replace(FIRST, [entry(FILTER_SERVICES, "reject")])

    assert layout.take_changed() == {NAT_SERVICES: (), FILTER_SERVICES: ("reject",)}


def test_no_entries_remove_a_service_port(layout):
    layout.replace(FIRST, [entry(NAT_NODE_PORTS, "one")])
    layout.replace(SECOND, [entry(NAT_NODE_PORTS, "two")])
    layout.take_changed()
    layout.replace(FIRST, [])

    assert layout.take_changed() == {NAT_NODE_PORTS: ("two",)}


def test_removing_what_was_never_there_changes_nothing(layout):
    layout.replace(FIRST, [])

    assert layout.take_changed() == {}


def test_tail_stays_the_end_of_nat_services(layout):
    layout.set_tail(("node ports",))
    layout.replace(SECOND, [entry(NAT_SERVICES, "two")])

    assert layout.take_changed() == {NAT_SERVICES: ("two", "node ports")}


def test_same_tail_again_changes_nothing(layout):
    layout.set_tail(("node ports",))
    layout.take_changed()
    layout.set_tail(("node ports",))

    assert layout.take_changed() == {}


# Layouts -----------------------------------------------------------------------------------------

EXTERNAL_SERVICES = ChainId(rules.FILTER, rules.EXTERNAL_SERVICES)
LAYOUTS = st.sampled_from(["flat", "auto", "tree"])


def port_name(number):
    return ServicePortName("ns", f"svc{number:04}", "", "tcp")


def at_address(chain, address, port=80, protocol="tcp", target="KUBE-SVC-ABCDEFGHIJKLMNOP"):
    bits = 128 if ":" in address else 32
    rule = f"-d {address}/{bits} -p {protocol} -m {protocol} --dport {port} -j {target}"
    return rules.Entry(*chain, address, protocol, port, rule)


def at_port(chain, port, protocol="tcp", target="KUBE-EXT-ABCDEFGHIJKLMNOP"):
    rule = f"-p {protocol} -m {protocol} --dport {port} -j {target}"
    return rules.Entry(*chain, "", protocol, port, rule)


def address(number, family=IPFamily.V4):
    return (
        f"172.30.{number // 250}.{number % 250 + 1}"
        if family is IPFamily.V4
        else f"fd00::{number + 1:x}"
    )


class Kept(Dispatch):
    """Chains by all that was ever taken, as a ruleset keeps them."""

    def __init__(self, family=IPFamily.V4, layout="auto"):
        super().__init__(family, layout)
        self.tables = {}
        self.keep()

    def keep(self):
        changed = self.take_changed()
        for chain, texts in changed.items():
            by_name = self.tables.setdefault(chain.table, {})
            if texts is None:
                by_name.pop(chain.chain, None)
            else:
                by_name[chain.chain] = texts
        return changed

    def fill(self, count, chain=NAT_SERVICES):
        """Let there be *count* Services with one entry each in *chain*."""
        for number in range(2 * max(count, 100)):
            made = [at_address(chain, address(number))] if number < count else []
            self.replace(port_name(number), made)
        self.keep()

    def is_tree(self, chain=NAT_SERVICES):
        return any(
            dispatch.tree_depth(rule.rpartition(" -j ")[2]) is not None
            for rule in self.tables[chain.table][chain.chain]
        )


def test_auto_is_flat_up_to_64_entries_and_a_tree_above():
    kept = Kept()
    kept.fill(64)
    assert not kept.is_tree()

    kept.fill(65)
    assert kept.is_tree()


def test_a_tree_becomes_flat_again_only_below_32_entries():
    kept = Kept()
    kept.fill(65)
    kept.fill(32)
    assert kept.is_tree()

    kept.fill(31)
    assert not kept.is_tree()
    assert kept.tables[rules.NAT].keys() == {rules.SERVICES, rules.NODE_PORTS}


def test_what_became_flat_stays_so_up_to_the_upper_threshold():
    kept = Kept()
    kept.fill(65)
    kept.fill(31)
    kept.fill(64)

    assert not kept.is_tree()


def test_entries_are_counted_and_not_services():
    kept = Kept()
    kept.replace(FIRST, [at_address(NAT_SERVICES, address(number)) for number in range(65)])
    kept.keep()

    assert kept.is_tree()


def test_each_chain_has_thresholds_of_its_own():
    kept = Kept()
    kept.fill(65)
    kept.fill(10, FILTER_SERVICES)

    assert not kept.is_tree(FILTER_SERVICES)


def test_flat_is_flat_with_any_number_of_entries():
    kept = Kept(layout="flat")
    kept.fill(500)

    assert not kept.is_tree()
    assert len(kept.tables[rules.NAT][rules.SERVICES]) == 500


def test_tree_is_a_tree_from_the_second_entry_on():
    kept = Kept(layout="tree")
    kept.fill(2)

    assert kept.tables[rules.NAT][rules.SERVICES] == ("-d 172.30.0.0/28 -j KUBE-SVL-172.30.0.0-28",)


def test_becoming_a_tree_and_flat_again_between_two_looks_leaves_no_chain():
    layout = Dispatch(IPFamily.V4, "auto")
    layout.take_changed()
    for count in (65, 0):
        for number in range(65):
            made = [at_address(NAT_SERVICES, address(number))] if number < count else []
            layout.replace(port_name(number), made)
    changed = layout.take_changed()

    assert changed.pop(NAT_SERVICES) == ()
    assert set(changed.values()) <= {None}


def test_tail_is_the_end_of_a_tree_as_well():
    kept = Kept(layout="tree")
    kept.set_tail(("node ports",))
    kept.fill(300)
    assert kept.tables[rules.NAT][rules.SERVICES][-1] == "node ports"

    kept.set_tail(("other node ports",))
    kept.keep()
    assert kept.tables[rules.NAT][rules.SERVICES][-1] == "other node ports"


def test_what_goes_by_address_stands_before_what_goes_by_port():
    kept = Kept(layout="tree")
    kept.replace(FIRST, [at_port(EXTERNAL_SERVICES, 30080), at_port(EXTERNAL_SERVICES, 30081)])
    kept.replace(SECOND, [at_address(EXTERNAL_SERVICES, "1.2.3.4")])
    kept.keep()

    assert kept.tables[rules.FILTER][rules.EXTERNAL_SERVICES] == (
        at_address(EXTERNAL_SERVICES, "1.2.3.4").rule,
        "-p tcp -m tcp --dport 30080:30095 -j KUBE-EXT-NP-tcp-30080-16",
    )


def test_protocols_have_branches_of_their_own():
    kept = Kept(layout="tree")
    entries = [
        at_port(NAT_NODE_PORTS, port, protocol)
        for protocol in ("tcp", "udp", "sctp")
        for port in (1, 65535)
    ]
    kept.replace(FIRST, entries)
    kept.keep()

    assert kept.tables[rules.NAT][rules.NODE_PORTS] == tuple(
        f"-p {protocol} -j KUBE-EXT-NP-{protocol}-0-4" for protocol in ("tcp", "udp", "sctp")
    )


def test_two_rules_of_one_node_port_stay_in_their_order():
    kept = Kept(layout="tree")
    first, second = (
        at_port(NAT_NODE_PORTS, 30080, target="A"),
        at_port(NAT_NODE_PORTS, 30080, target="B"),
    )
    kept.replace(FIRST, [first, second])
    kept.keep()

    assert kept.tables[rules.NAT] == {
        rules.SERVICES: (),
        rules.NODE_PORTS: ("-p tcp -m tcp --dport 30080 -j KUBE-EXT-NP-tcp-30080-20",),
        "KUBE-EXT-NP-tcp-30080-20": (first.rule, second.rule),
    }


@pytest.mark.parametrize("layout", ["flat", "tree"])
@pytest.mark.parametrize("order", [(FIRST, SECOND), (SECOND, FIRST)])
def test_of_two_services_with_one_address_the_first_by_name_comes_first(layout, order):
    kept = Kept(layout=layout)
    for name in order:
        kept.replace(name, [at_address(NAT_SERVICES, "192.168.99.22", target=name.name)])
    kept.keep()

    assert lookups.shared_rules(kept.tables, *NAT_SERVICES) == [
        at_address(NAT_SERVICES, "192.168.99.22", target="first").rule,
        at_address(NAT_SERVICES, "192.168.99.22", target="second").rule,
    ]


def test_jumps_of_ipv6_show_the_prefix_that_the_name_has_no_room_for():
    kept = Kept(IPFamily.V6, "tree")
    kept.replace(
        FIRST,
        [at_address(NAT_SERVICES, "fd00:172:30::41"), at_address(NAT_SERVICES, "fd00:172:30::42")],
    )
    kept.keep()
    (jump,) = kept.tables[rules.NAT][rules.SERVICES]

    assert jump.startswith("-d fd00:172:30::40/124 -j KUBE-SVL-6-")
    assert jump.endswith("-124")


# One entry of a ServicePort: chain, address ("" for none), protocol, port.
_PORTS = st.sampled_from([*range(30000, 30040), 1, 80, 443, 65535])
_PROTOCOLS = st.sampled_from(["tcp", "tcp", "udp", "sctp"])


@st.composite
def histories(draw, family=IPFamily.V4):
    """Draw changes: a ServicePort and all entries it has by then."""
    addresses = st.integers(0, 40).map(lambda number: address(number, family))
    if family is IPFamily.V4:
        addresses |= st.ip_addresses(v=4).map(str)
    else:
        addresses |= st.sampled_from([f"fd{n:02x}:1:2:3::{n:x}" for n in range(20)])
    entries = st.builds(at_address, st.just(EXTERNAL_SERVICES), addresses, _PORTS, _PROTOCOLS)
    entries |= st.builds(at_address, st.just(NAT_SERVICES), addresses, _PORTS, _PROTOCOLS)
    entries |= st.builds(
        at_port, st.sampled_from([EXTERNAL_SERVICES, NAT_NODE_PORTS]), _PORTS, _PROTOCOLS
    )
    change = st.tuples(st.integers(0, 12).map(port_name), st.lists(entries, max_size=20))
    return draw(st.lists(change, max_size=20))


@given(histories(), LAYOUTS)
def test_any_sequence_of_changes_is_what_building_from_nothing_gives(history, layout):
    kept, known = Kept(layout=layout), {}
    for name, entries in history:
        kept.replace(name, entries)
        kept.keep()
        known[name] = entries
    reference = Kept(layout=layout)
    for name, entries in sorted(known.items()):
        reference.replace(name, entries)
    reference.keep()

    counted = [
        sum(entry[:2] == chain for made in known.values() for entry in made) for chain in SHARED
    ]
    if layout != "auto" or not any(32 <= count <= 64 for count in counted):
        assert kept.tables == reference.tables


@pytest.mark.parametrize("family", IPFamily)
@given(st.data())
def test_a_tree_decides_as_the_flat_chain_does_whatever_the_packet(family, data):
    """By address, or by port: among rules of both kinds those by address come first in a tree."""
    history = data.draw(histories(family))
    flat, tree = Kept(family, "flat"), Kept(family, "tree")
    for name, entries in history:
        marked = [
            e._replace(rule=e.rule.rpartition(" ")[0] + f" KUBE-SVC-{name.name}") for e in entries
        ]
        for kept in (flat, tree):
            kept.replace(name, marked)
            kept.keep()
    entries = [entry for _, made in history for entry in made]

    for table, chain in (NAT_SERVICES, NAT_NODE_PORTS):
        for entry in entries[:40]:
            destination = entry.address or address(1000, family)
            packet = Packet(destination, entry.port, entry.protocol)
            wanted = lookups.look_up(flat.tables, table, chain, packet).target
            assert lookups.look_up(tree.tables, table, chain, packet).target == wanted
        assert sorted(lookups.shared_rules(tree.tables, table, chain)) == sorted(
            flat.tables[table][chain]
        )


# Names of chains ---------------------------------------------------------------------------------


def prefixes(bits):
    """Draw a prefix of a key of *bits*; the root has no chain of its own."""
    return st.builds(
        lambda value, length: trees.Prefix(value >> (bits - length) << (bits - length), length),
        st.integers(0, (1 << bits) - 1),
        st.integers(1, bits // 4).map(lambda levels: 4 * levels),
    )


_CHAIN_PREFIXES = st.sampled_from(["KUBE-SVC", "KUBE-SVL", "KUBE-EXT", "KUBE-FW"])


@pytest.mark.parametrize(("family", "bits"), [(IPFamily.V4, 32), (IPFamily.V6, 128)])
@given(data=st.data(), chain=_CHAIN_PREFIXES)
def test_chain_for_addresses_has_a_name_that_fits_and_tells_its_depth(family, bits, data, chain):
    prefix = data.draw(prefixes(bits))
    name = dispatch._address_chain(chain, family, prefix)

    assert len(name) <= 28
    assert dispatch.tree_depth(name) == prefix.length
    assert chains.is_ours(rules.NAT, name)
    assert chains.is_ours(rules.FILTER, name)


@given(prefixes(16), st.integers(0, 2), _CHAIN_PREFIXES)
def test_chain_for_ports_has_a_name_that_fits_and_tells_its_depth(ports, protocol, chain):
    prefix = trees.Prefix(protocol << 16 | ports.value, ports.length + 4)
    name = dispatch._port_chain(chain, prefix)

    assert len(name) <= 28
    assert dispatch.tree_depth(name) == prefix.length
    assert chains.is_ours(rules.NAT, name)
    assert chains.is_ours(rules.FILTER, name)


@pytest.mark.parametrize("family", IPFamily)
def test_no_two_prefixes_have_one_name(family):
    bits = 32 if family is IPFamily.V4 else 128
    base = int(ipaddress.ip_address("172.30.0.0" if bits == 32 else "fd00:172:30::"))
    by_address = {
        dispatch._address_chain(
            "KUBE-SVC", family, trees.Prefix(base | value << (bits - length), length)
        )
        for length in range(bits - 16, bits + 1, 4)
        for value in range(1 << (length - (bits - 16)) if length < bits else 4096)
    }
    by_port = {
        dispatch._port_chain(
            "KUBE-SVC", trees.Prefix(protocol << 16 | value << (20 - length), length)
        )
        for protocol in range(3)
        for length in range(4, 21, 4)
        for value in range(1 << (length - 4) if length < 20 else 4096)
    }

    assert len(by_address) == 1 + 16 + 256 + 4096 + 4096
    assert len(by_port) == 3 * (1 + 16 + 256 + 4096 + 4096)
    assert by_address.isdisjoint(by_port)


@given(
    st.from_regex(r"KUBE-(SVC|SVL|SEP|EXT|FW)-[A-Z2-7]{16}(-[0-9a-f]{2})?", fullmatch=True)
    | st.sampled_from([chain.chain for chain in SHARED])
    | st.sampled_from(
        [rules.MARK_MASQ, rules.POSTROUTING, rules.CANARY, rules.FIREWALL, rules.FORWARD]
    )
)
def test_no_chain_of_kube_proxy_or_of_a_service_looks_like_one_of_a_tree(name):
    assert dispatch.tree_depth(name) is None


@pytest.mark.parametrize("layout", ["flat", "tree"])
def test_trees_are_named_for_who_asks(layout):
    assert Dispatch(IPFamily.V4, layout).trees() == (SHARED if layout == "tree" else ())
