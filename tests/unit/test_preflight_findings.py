"""Findings in order, as text, as JSON and as an exit status."""

import json

import pytest

from kubeproxy_py.preflight import findings, text
from kubeproxy_py.preflight.findings import Finding

OK = Finding("kernel", "ok", "Linux 6.1")
INFO = Finding("unchecked", "info", "the cluster")
WARNING = Finding(
    "rp-filter", "warning", "strict on eth0", "sysctl -w net.ipv4.conf.eth0.rp_filter=2"
)
ERROR = Finding(
    "ip-forward", "error", "net.ipv4.ip_forward is 0", "sysctl -w net.ipv4.ip_forward=1"
)


@pytest.mark.parametrize(
    ("found", "worst", "status"),
    [
        ([], "ok", 0),
        ([OK], "ok", 0),
        ([OK, INFO], "info", 0),
        ([INFO, WARNING, OK], "warning", 2),
        ([WARNING, ERROR, OK], "error", 1),
    ],
)
def test_the_worst_decides_the_exit_status(found, worst, status):
    assert (findings.worst(found), findings.exit_status(found)) == (worst, status)


def test_the_worst_comes_first_and_then_the_catalogue_s_order():
    other = Finding("config", "warning", "x")

    assert findings.worst_first([OK, WARNING, INFO, other, ERROR]) == [
        ERROR, other, WARNING, INFO, OK,
    ]  # fmt: skip


def test_text_says_what_was_found_what_it_means_and_what_to_do():
    assert text.as_text([OK, ERROR, INFO], width=120).splitlines() == [
        "error    ip-forward           net.ipv4.ip_forward is 0",
        "                              Without forwarding nothing goes between pods, other nodes and Services.",
        "                              To do: Switch it on, also in /etc/sysctl.d.",
        "                                $ sysctl -w net.ipv4.ip_forward=1",
        "info     unchecked            the cluster",
        "                              What could not be looked at.",
        "",
        "1 error, 0 warnings, 1 for information, 1 ok (--verbose shows them)",
    ]


def test_what_is_well_is_shown_when_asked_for():
    assert text.as_text([OK], verbose=True).splitlines() == [
        "ok       kernel               Linux 6.1",
        "",
        "0 errors, 0 warnings, 0 for information, 1 ok",
    ]


def test_nothing_to_show_is_a_summary_alone():
    assert (
        text.as_text([OK]) == "0 errors, 0 warnings, 0 for information, 1 ok (--verbose shows them)"
    )


def test_a_topic_found_often_is_explained_once_and_cut():
    many = [Finding("objects", "warning", f"Service {number}", "mend") for number in range(13)]
    lines = text.as_text(many).splitlines()

    assert sum("left out because they are invalid" in line for line in lines) == 1
    assert sum("$ mend" in line for line in lines) == 1
    assert sum(": Service" in line or "  Service " in line for line in lines) == 10
    assert any("and 3 more" in line for line in lines)


def test_an_information_with_a_command_says_what_to_do():
    found = Finding("node-port-range", "info", "not reserved", "sysctl -w x=1")

    assert "To do: Reserve the node ports." in text.as_text([found])


def test_long_lines_are_wrapped_and_commands_are_not():
    command = "sysctl -w " + "x" * 200
    lines = text.as_text(
        [Finding("rp-filter", "warning", "word " * 40, command)], width=80
    ).splitlines()

    assert max(len(line) for line in lines if "$" not in line) <= 80
    assert any(line.endswith(command) for line in lines)


def test_severities_may_be_styled():
    shown = text.as_text([ERROR], style=lambda word, severity: f"<{word}:{severity}>")

    assert shown.startswith("<error:error>    ip-forward")


def test_json_has_everything():
    document = json.loads(text.as_json([OK, ERROR]))

    assert document["worst"] == "error"
    assert document["counts"] == {"error": 1, "warning": 0, "info": 0, "ok": 1}
    assert [entry["id"] for entry in document["findings"]] == ["ip-forward", "kernel"]
    assert document["findings"][0] == {
        "id": "ip-forward",
        "severity": "error",
        "found": "net.ipv4.ip_forward is 0",
        "meaning": findings.TOPICS["ip-forward"].meaning,
        "action": findings.TOPICS["ip-forward"].action,
        "command": "sysctl -w net.ipv4.ip_forward=1",
    }
