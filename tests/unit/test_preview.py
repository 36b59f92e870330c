"""What batches would change, by Service, and how that is printed."""

import json

import msgspec
import pytest

from kubeproxy_py import preview, preview_text, rules
from kubeproxy_py.iptables import plan
from kubeproxy_py.model import IPFamily
from kubeproxy_py.ruleset import Ruleset
from tests.support import states
from tests.support.builders import make_service, make_slice

V4 = IPFamily.V4
ENDPOINTS = ["10.180.1.11", "10.180.1.12"]
WEB = (make_service("web"), make_slice("web", endpoints=ENDPOINTS))
DNS = (
    make_service("dns", cluster_ip="172.30.0.53"),
    make_slice("dns", endpoints=["10.180.1.53"]),
)


def ruleset(*items):
    built = Ruleset(states.golden_options(V4))
    built.apply(states.service_states(items, V4))
    return built


def after(desired):
    """Return the tables of a kernel that has *desired*."""
    live = {}
    for batch in plan.plan(desired.tables, live, groups=desired.groups()):
        batch.apply_to(live)
    return live


def look(live, desired):
    batches = plan.plan(desired.tables, live, groups=desired.groups())
    return preview.preview(
        live,
        batches,
        owners=desired.owners(),
        ip_family="IPv4",
        backend="nft",
        services=desired.service_count,
    )


def actions(found):
    return {change.service: change.action for change in found.changes}


def only(found, service):
    (change,) = [change for change in found.changes if change.service == service]
    return change


def test_on_an_empty_host_every_service_is_new():
    found = look({}, ruleset(*WEB, *DNS))

    assert actions(found) == {"default/dns": "create", "default/web": "create", "": "change"}
    assert only(found, "default/web").endpoints_added == ("10.180.1.11:8080", "10.180.1.12:8080")


def test_with_everything_in_place_nothing_changes():
    desired = ruleset(*WEB)
    found = look(after(desired), desired)

    assert (found.changes, found.restores, found.services) == ((), 0, 1)


def test_it_leaves_the_live_tables_as_they_are():
    live = after(ruleset(*WEB))
    before = {table: dict(chains) for table, chains in live.items()}
    look(live, ruleset(*DNS))

    assert live == before


def test_an_endpoint_more_and_one_less_change_the_service_alone():
    changed = (WEB[0], make_slice("web", endpoints=["10.180.1.12", "10.180.1.13"]))
    found = look(after(ruleset(*WEB, *DNS)), ruleset(*changed, *DNS))

    assert actions(found) == {"default/web": "change"}
    change = only(found, "default/web")
    assert change.endpoints_added == ("10.180.1.13:8080",)
    assert change.endpoints_removed == ("10.180.1.11:8080",)
    assert change.chains[0].action == "change"
    assert {chain.action for chain in change.chains[1:]} == {"create", "delete"}
    assert (found.chains_written, found.chains_deleted) == (2, 1)


def test_a_service_that_goes_is_known_by_the_comments_of_its_rules():
    found = look(after(ruleset(*WEB, *DNS)), ruleset(*WEB))

    assert actions(found) == {"default/dns": "delete"}
    assert only(found, "default/dns").endpoints_removed == ("10.180.1.53:8080",)


def test_a_service_that_loses_all_endpoints_is_changed_not_new():
    found = look(after(ruleset(*WEB)), ruleset(WEB[0]))

    assert actions(found) == {"default/web": "change"}


def test_a_lost_jump_and_an_emptied_chain_belong_to_nobody():
    desired = ruleset(*WEB)
    live = after(desired)
    live["nat"]["OUTPUT"] = ()
    live["nat"][rules.MARK_MASQ] = ()
    found = look(live, desired)

    assert actions(found) == {"": "change"}
    assert [chain.chain for chain in only(found, "").chains] == [rules.MARK_MASQ, "OUTPUT"]


def test_what_stands_in_between_and_in_the_end_is_the_same_is_no_change():
    # filter grows before nat and shrinks after it; what is told is the difference in the end.
    live = after(ruleset(WEB[0]))
    found = look(live, ruleset(*WEB))

    (reject,) = [
        chain for chain in only(found, "default/web").chains if chain.table == rules.FILTER
    ]
    assert (len(reject.removed), reject.added) == (1, ())


def test_a_chain_that_a_rule_of_others_holds_is_no_deletion():
    live = after(ruleset(*WEB))
    (chain,) = [name for name in live["nat"] if name.startswith("KUBE-SVC-")]
    live["nat"]["CNI"] = (f"-j {chain}",)
    found = look(live, ruleset())

    held = [part for part in only(found, "default/web").chains if part.chain == chain]
    assert [part.action for part in held] == ["change"]


def test_an_empty_section_that_restores_what_was_is_left_out():
    live = {"nat": {"KUBE-MARK-MASQ": ("-j MARK",)}}
    batch = plan.Batch((plan.Section("nat", {"KUBE-MARK-MASQ": ("-j MARK",)}),))
    found = preview.preview(live, [batch], owners={}, ip_family="IPv4", backend="nft", services=0)

    assert found.changes == ()


@pytest.mark.parametrize(
    ("text", "owner"),
    [
        ('-m comment --comment "ns/web:http cluster IP" -j X', "ns/web"),
        ('-m comment --comment "masquerade traffic for ns/web external destinations"', "ns/web"),
        ("-m comment --comment ns/web -j X", "ns/web"),
        ("-m comment --comment ns/web", "ns/web"),
        ('-m comment --comment "kubernetes service portals" -j KUBE-SERVICES', ""),
        ("-s 10.0.0.0/8 -j ACCEPT", ""),
    ],
)
def test_the_owner_of_a_rule_stands_in_its_comment(text, owner):
    assert preview._owner(text) == owner


# As text -----------------------------------------------------------------------------------------


def test_text_has_a_line_for_each_service_and_each_rule():
    changed = (WEB[0], make_slice("web", endpoints=["10.180.1.12"]))
    found = look(after(ruleset(*WEB)), ruleset(*changed))
    lines = preview_text.changes_text(found).splitlines()

    assert lines[:2] == [
        "IPv4, iptables-nft",
        "~ default/web (2 chains; endpoints -10.180.1.11:8080)",
    ]
    assert any(line.startswith("    ~ nat KUBE-SVC-") for line in lines)
    assert any(line.startswith("        - -m comment") for line in lines)
    assert preview_text.changes_text(found, has_rules=False).splitlines() == lines[:2]


def test_many_endpoints_are_counted():
    many = [f"10.180.1.{number}" for number in range(11, 18)]
    found = look({}, ruleset(WEB[0], make_slice("web", endpoints=many)))

    assert "+10.180.1.14:8080 and 3 more" in preview_text.changes_text(found, has_rules=False)


def test_every_line_is_painted_by_its_sign():
    found = look({}, ruleset(*WEB))
    text = preview_text.changes_text(found, lambda text, sign: f"<{sign}>{text}")

    assert {line[:3] for line in text.splitlines()[1:]} == {"<+>", "<~>"}


def test_the_sum_is_one_line():
    found = look(after(ruleset(*WEB, *DNS)), ruleset(*WEB))
    nothing = look(after(ruleset(*WEB)), ruleset(*WEB))

    assert preview_text.summary_text(found) == (
        "IPv4: 0 new, 0 changed, 1 gone (of 1 Service); 1 chain to write, 2 to delete;"
        " 0 rules added, 5 removed; 1 restore"
    )
    assert preview_text.summary_text(nothing) == "IPv4: nothing to change (1 Service)"


def test_as_json_it_has_the_names_of_the_api():
    document = json.loads(msgspec.json.encode(look({}, ruleset(*WEB))))

    assert document.keys() >= {"ipFamily", "chainsWritten", "rulesAdded", "changes"}
    assert document["changes"][0].keys() >= {"service", "action", "endpointsAdded", "chains"}
