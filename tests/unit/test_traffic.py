"""Whose connections a rule counts, and totals that only grow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeproxy_py import rules
from kubeproxy_py.model import IPFamily, ServicePortName
from kubeproxy_py.rules import Options
from kubeproxy_py.ruleset import Ruleset
from kubeproxy_py.traffic import Board, Index, Ledger, Series, Written
from tests.support import crowds

WEB = ServicePortName("default", "web", "http", "tcp")
SEP, SEP2 = "KUBE-SEP-AAAAAAAAAAAAAAAA", "KUBE-SEP-BBBBBBBBBBBBBBBB"
SVC = "KUBE-SVC-CCCCCCCCCCCCCCCC"
DNAT = "-p tcp -m tcp -j DNAT --to-destination 10.0.0.1:80"
NAMED_DNAT = (
    '-p tcp -m comment --comment "default/web:http" -m tcp -j DNAT --to-destination 10.0.0.1:80'
)
MASQUERADE = f"-s 10.0.0.1/32 -j {rules.MARK_MASQ}"
REJECT = (
    '-d 172.30.0.1/32 -p tcp -m comment --comment "default/web:http has no endpoints" '
    "-m tcp --dport 80 -j REJECT --reject-with icmp-port-unreachable"
)
CONNECTIONS = Series("connections", WEB, "10.0.0.1:80")
REFUSED = Series("refused", WEB, "no_endpoints")


def learnt(tables, *namespaces):
    index = Index(namespaces)
    index.learn(tables)
    return index


def series(index):
    return {meter.series for meters in index.meters.values() for meter in meters}


# Whose ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("layout", ["flat", "tree"])
def test_every_endpoint_of_every_port_has_a_meter(layout, is_large):
    options = Options(
        family=IPFamily.V4, node_name="node1", layout=layout, is_large=is_large,
        local_detector=rules.LocalDetector("-s", "10.180.0.0/16"),
    )  # fmt: skip
    found = crowds.state(1, "balancer with source ranges")
    many = crowds.state(2, "many endpoints")
    tables = _built({crowds.name(1): found, crowds.name(2): many}, options)
    index = learnt(tables)

    assert {s for s in series(index) if s.kind == "connections"} == {
        Series("connections", port.name, endpoint.address)
        for state in (found, many)
        for key, port in state.ports.items()
        for endpoint in state.endpoints[key]
    }
    assert {s.detail for s in series(index) if s.kind == "refused"} == {"source_ranges"}


def _built(found, options):
    ruleset = Ruleset(options)
    ruleset.apply(found)
    return ruleset.tables


def test_without_comments_the_way_to_an_endpoint_names_it():
    dispatch = f'-d 172.30.0.1/32 -p tcp -m comment --comment "default/web:http cluster IP" -m tcp --dport 80 -j {SVC}'
    group = f"{SVC}-0f"
    tables = {
        "nat": {
            SEP: (MASQUERADE, DNAT),
            SEP2: (MASQUERADE, DNAT.replace("10.0.0.1", "10.0.0.2")),
            SVC: (f"-m statistic --mode random --probability 0.5 -j {SEP}", f"-j {group}"),
            group: (f"-j {SEP2}",),
            "KUBE-SVL-172.30.0.0-28": (dispatch,),
        }
    }
    index = learnt(tables)

    assert series(index) == {CONNECTIONS, CONNECTIONS._replace(detail="10.0.0.2:80")}


def test_a_port_of_no_name_and_udp():
    text = NAMED_DNAT.replace("web:http", "web").replace("tcp", "udp")
    index = learnt({"nat": {SEP: (text,)}})

    assert index.ports() == {ServicePortName("default", "web", "", "udp"): 1}


def test_refusals_are_found_with_their_reason():
    none, port = "has no local endpoints", "-p tcp"
    tables = {
        "filter": {
            "KUBE-SERVICES": ("-j KUBE-SVL-172.30.0.0-16", REJECT),
            "KUBE-EXTERNAL-SERVICES": (REJECT.replace("has no endpoints", none),),
            "KUBE-PROXY-FIREWALL": (
                REJECT.replace("has no endpoints", "traffic not accepted by KUBE-FW-X"),
            ),
            "KUBE-NODEPORTS": (
                f'{port} -m comment --comment "default/web:http health check node port" -j ACCEPT',
            ),
            "OTHERS": ('-m comment --comment "a/b has no endpoints" -j DROP', f"{port} -j DROP"),
        }
    }
    index = learnt(tables)

    assert series(index) == {
        Series("refused", WEB, reason)
        for reason in ("no_endpoints", "no_local_endpoints", "source_ranges")
    }
    assert index.meters["KUBE-SERVICES"][0].position == 1
    assert index.ports() == {WEB: 0}


@pytest.mark.parametrize(
    "texts",
    [(), (MASQUERADE,), ("-j DNAT --to-destination 10.0.0.1:80",), ("-p tcp -j ACCEPT",)],
    ids=["empty", "no DNAT", "no protocol", "another target"],
)
def test_a_chain_that_is_no_endpoint_s_has_no_meter(texts):
    index = Index()

    assert not index.learn({"nat": {SEP: texts}})
    assert index.meters == {}


def test_an_endpoint_of_unknown_name_is_told():
    index = Index()

    assert not index.learn({"nat": {SEP: (DNAT,)}})
    assert index.meters == {}
    assert index.learn({"nat": {SEP: (NAMED_DNAT,)}})
    assert series(index) == {CONNECTIONS}


def test_only_the_namespaces_asked_for_are_counted():
    tables = {"nat": {SEP: (NAMED_DNAT,)}, "filter": {"KUBE-SERVICES": (REJECT,)}}

    assert learnt(tables, "other").meters == {}
    assert learnt(tables, "default").ports() == {WEB: 1}


def test_what_is_gone_is_forgotten():
    tables = {
        "nat": {
            SEP: (DNAT,),
            SVC: (
                f'-m comment --comment "default/web:http cluster IP" -j {rules.MARK_MASQ}',
                f"-j {SEP}",
            ),
        },
        "filter": {"KUBE-SERVICES": (REJECT,)},
    }
    index = learnt(tables)
    assert series(index) == {CONNECTIONS, REFUSED}
    index.forget({"nat": [SEP, SVC, "KUBE-MARK-MASQ"], "filter": ["KUBE-SERVICES"]})

    assert index.meters == {}
    # Nothing is left that names it.
    assert not index.learn({"nat": {SEP: (DNAT,), SVC: (f"-j {SEP}",)}})


def test_a_chain_that_loses_what_counts_loses_its_meter():
    index = learnt({"filter": {"KUBE-SERVICES": (REJECT,)}})
    index.learn({"filter": {"KUBE-SERVICES": ()}})

    assert index.chains() == {"nat": [], "filter": []}


def test_chains_that_were_written_meanwhile_keep_what_is_known_of_them():
    index = learnt({"nat": {SEP: (NAMED_DNAT,)}, "filter": {"KUBE-SERVICES": (REJECT,)}})
    old = {"nat": {SEP: (NAMED_DNAT.replace("web", "old"),)}, "filter": {"KUBE-SERVICES": ()}}
    index.learn(old, but=[SEP, "KUBE-SERVICES"])

    assert series(index) == {CONNECTIONS, REFUSED}


def test_comments_of_others_name_nothing():
    other = '-m comment --comment "a/b of ours" -j OTHERS'

    assert not Index().learn({"nat": {SEP: (DNAT,), "OTHERS": (other, f"-j {SEP}")}})


def test_chains_are_looked_for_where_they_count():
    index = learnt({"nat": {SEP: (NAMED_DNAT,)}, "filter": {"KUBE-SERVICES": (REJECT,)}})

    assert index.chains() == {"nat": [SEP], "filter": ["KUBE-SERVICES"]}


# How much ---------------------------------------------------------------------------------------------


WRITTEN = Written({"nat": {SEP: (MASQUERADE, NAMED_DNAT)}, "filter": {}}, {"nat": ()})


def write(ledger, written=WRITTEN):
    ledger.touch(written.counted)
    ledger.release(written.counted, written)


@pytest.fixture
def ledger():
    """Give a ledger that has seen an endpoint with ten connections."""
    ledger = Ledger()
    ledger.index.learn(WRITTEN.tables)
    ledger.begin()
    assert ledger.fold({SEP: (3, 10)}) == {}
    return ledger


def look(ledger, counts):
    ledger.begin()
    return ledger.fold(counts)


def test_what_was_there_at_first_is_not_counted(ledger):
    assert ledger.standing() == {CONNECTIONS: 10}
    assert look(ledger, {SEP: (3, 14)}) == {CONNECTIONS: 4}


def test_what_we_wrote_before_the_first_look_counts_from_zero():
    ledger = Ledger()
    write(ledger)

    assert look(ledger, {SEP: (0, 5)}) == {CONNECTIONS: 5}


def test_a_written_chain_goes_on_with_what_it_had(ledger):
    ledger.touch([SEP])
    assert ledger.take({SEP: (3, 12)}) == {CONNECTIONS: 2}
    ledger.release([SEP], WRITTEN)

    # More than before, though it began anew.
    assert look(ledger, {SEP: (0, 13)}) == {CONNECTIONS: 13}


def test_a_write_that_failed_changes_nothing(ledger):
    ledger.touch([SEP])
    assert ledger.take({SEP: (3, 12)}) == {CONNECTIONS: 2}
    ledger.release([SEP], None)

    assert look(ledger, {SEP: (3, 13)}) == {CONNECTIONS: 1}


@pytest.mark.parametrize("is_done", [False, True], ids=["still", "not any more"])
def test_a_look_leaves_out_what_is_written_meanwhile(ledger, is_done):
    ledger.begin()
    assert not ledger.touched
    # Read after, or before, what the writer reads.
    ledger.touch([SEP])
    assert ledger.take({SEP: (3, 12)}) == {CONNECTIONS: 2}
    assert set(ledger.touched) == {SEP}
    if is_done:
        ledger.release([SEP], WRITTEN)
    assert ledger.fold({SEP: (3, 13)}) == {}
    if not is_done:
        assert look(ledger, {SEP: (3, 14)}) == {}
        ledger.release([SEP], WRITTEN)

    assert look(ledger, {SEP: (0, 1)}) == {CONNECTIONS: 1}


def test_what_others_set_back_goes_on(ledger):
    assert look(ledger, {SEP: (0, 4)}) == {CONNECTIONS: 4}


def test_a_chain_that_others_changed_is_left_out(ledger):
    ledger.index.learn({"filter": {"KUBE-SERVICES": ("-j X", REJECT)}})
    look(ledger, {SEP: (3, 10), "KUBE-SERVICES": (0, 5)})

    assert look(ledger, {SEP: (), "KUBE-SERVICES": (9,)}) == {}
    assert look(ledger, {SEP: (3, 10), "KUBE-SERVICES": (0, 6)}) == {REFUSED: 1}


def test_a_chain_that_is_gone_and_comes_back_from_others_is_not_counted_again(ledger):
    assert look(ledger, {}) == {}
    assert ledger.standing() == {}
    assert look(ledger, {SEP: (0, 50)}) == {}
    assert look(ledger, {SEP: (0, 51)}) == {CONNECTIONS: 1}


def test_a_deleted_chain_is_forgotten(ledger):
    gone = Written({"nat": {}}, {"nat": (SEP,)})
    write(ledger, gone)

    assert ledger.index.meters == {}
    assert look(ledger, {SEP: (0, 5)}) == {}


def test_rules_without_names_ask_for_names(ledger):
    ledger.has_names = True
    write(ledger)
    assert ledger.has_names
    write(ledger, Written({"nat": {SEP2: (DNAT,)}}, {}))

    assert not ledger.has_names


def test_only_chains_that_count_are_held():
    written = Written(
        {"nat": {SEP: (), SVC: ()}, "filter": {"KUBE-SERVICES": ()}, "mangle": {"X": ()}},
        {"nat": (SEP2, "KUBE-SERVICES"), "filter": ("KUBE-SVL-172.30.0.0-16",)},
    )

    assert written.counted == [SEP, "KUBE-SERVICES", SEP2, "KUBE-SVL-172.30.0.0-16"]


class Node:
    """A kernel with one chain, and a daemon that looks at it and writes it, in any order of steps."""

    def __init__(self):
        self.ledger = Ledger()
        write(self.ledger)
        self.counter = 0
        self.connections = 0
        self.total = 0
        self.read = None
        self.taken = 0
        self.is_writing = False

    def connect(self):
        self.counter += 1
        self.connections += 1

    def begin(self):
        if self.read is None:
            self.ledger.begin()
            self.read = {}

    def read_all(self):
        if self.read is not None:
            self.read = {SEP: (0, self.counter)}

    def fold(self):
        if self.read:
            self._count(self.ledger.fold(self.read))
            self.read = None

    def start_write(self):
        if not self.is_writing:
            self.is_writing = True
            self.taken = self.counter
            self.ledger.touch([SEP])
            self._count(self.ledger.take({SEP: (0, self.counter)}))

    def fail_write(self):
        if self.is_writing:
            self.is_writing = False
            self.ledger.release([SEP], None)

    def end_write(self):
        if self.is_writing:
            # All that may be lost is what comes between the reading and the writing.
            self.connections -= self.counter - self.taken
            self.counter = 0
            self.is_writing = False
            self.ledger.release([SEP], WRITTEN)

    def _count(self, found):
        before = self.total
        self.total += found[CONNECTIONS]
        assert self.total >= before


STEPS = ("connect", "begin", "read_all", "fold", "start_write", "fail_write", "end_write")


@given(st.lists(st.sampled_from(STEPS)))
def test_in_whatever_order_all_happens_nothing_is_counted_twice(steps):
    node = Node()
    for step in steps:
        getattr(node, step)()
    if node.is_writing:
        node.fail_write()
    node.read = None
    for step in ("begin", "read_all", "fold"):
        getattr(node, step)()

    assert node.total == node.connections


# For whom ---------------------------------------------------------------------------------------------

A, B, C = ("a",), ("b",), ("c",)


def test_the_busiest_get_the_places_and_the_rest_is_counted_together():
    board = Board(2)
    board.add({A: 1, B: 3, C: 2}, 0.0)

    assert board.totals == {B: 3, C: 2}
    assert board.others == 1


def test_a_place_is_kept_while_there_is_traffic():
    board = Board(1)
    board.add({A: 1}, 0.0)
    board.add({B: 100}, 599.0)

    assert board.totals == {A: 1}
    assert board.others == 100


def test_the_idle_give_way_and_who_comes_begins_at_zero():
    board = Board(1)
    board.add({A: 1}, 0.0)
    board.add({B: 100}, 599.0)
    board.add({B: 5}, 600.0)

    assert board.totals == {B: 5}
    assert board.others == 100


def test_what_never_had_traffic_gives_way_at_once():
    board = Board(2)
    board.keep([A, B])
    assert board.totals == {A: 0, B: 0}
    board.add({C: 1}, 0.0)

    assert board.totals == {B: 0, C: 1}


def test_where_there_is_no_room_for_all_only_traffic_is_shown():
    board = Board(2)
    board.add({A: 1}, 0.0)
    board.keep([A, B, C])

    assert board.totals == {A: 1}


def test_what_is_gone_is_not_shown():
    board = Board(2)
    board.add({A: 1, B: 1}, 0.0)
    board.keep([B])

    assert board.totals == {B: 1}


def test_totals_of_another_process_go_on():
    board = Board(2)
    board.resume({A: 10, B: 20, C: 30}, 7, 0.0)
    board.add({A: 1}, 1.0)

    assert board.totals == {A: 11, B: 20}
    assert board.others == 7


AMOUNTS = st.dictionaries(st.sampled_from([(n,) for n in range(6)]), st.integers(1, 9))


@given(st.lists(AMOUNTS), st.integers(1, 6))
def test_places_are_few_and_nothing_is_lost(steps, room):
    board, total = Board(room), 0
    for number, more in enumerate(steps):
        board.add(more, float(number))
        total += sum(more.values())

        assert len(board.totals) <= room
        assert sum(board.totals.values()) + board.others == total
