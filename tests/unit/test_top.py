"""What ``top`` makes of rules and counters."""

import itertools
import json

import pytest

from kubeproxy_py import top, top_command, top_screen
from kubeproxy_py.errors import ConfigError, KubeProxyError
from kubeproxy_py.model import ServicePortName
from kubeproxy_py.top_command import Asked, Source


class Host:
    """Rules of one family, each with a counter."""

    def __init__(self, **services):
        """Let there be SERVICE=ENDPOINTS."""
        self.tables = {"nat": {}, "filter": {}}
        self.counts = {}
        self.error = None
        for number, (service, endpoints) in enumerate(services.items()):
            for index in range(endpoints):
                chain = f"KUBE-SEP-{service.upper():A<15}{index}"
                comment = f'-p tcp -m comment --comment "ns/{service}:http"'
                rule = f"{comment} -j DNAT --to-destination 10.0.{number}.{index}:80"
                self.tables["nat"][chain] = (rule,)
                self.counts[chain] = (0,)
        for service, endpoints in services.items():
            if not endpoints:
                comment = f'-p tcp -m comment --comment "ns/{service}:http has no endpoints"'
                self.tables["filter"]["KUBE-SERVICES"] = (f"{comment} -j REJECT",)
                self.counts["KUBE-SERVICES"] = (0,)

    def connect(self, service, times):
        chain = next(name for name in self.counts if name.startswith(f"KUBE-SEP-{service.upper()}"))
        self.counts[chain] = (self.counts[chain][0] + times,)

    def refuse(self, times):
        self.counts["KUBE-SERVICES"] = (self.counts["KUBE-SERVICES"][0] + times,)

    def read(self, table, chains):
        if self.error is not None:
            raise self.error
        return {chain: self.counts[chain] for chain in chains if chain in self.tables[table]}

    @property
    def source(self):
        return Source(lambda: self.tables, self)


def looks(*hosts, **asked):
    """Return looks two seconds apart."""
    times = itertools.count(0, 1)
    # The clock is asked three times a look: at its start, at its end, and for the wait.
    return top_command.look(
        Asked(**asked),
        [host.source for host in hosts],
        clock=lambda: next(times) * 2 / 3,
        wait=lambda seconds: None,
    )


@pytest.fixture
def host():
    return Host(web=2, api=1, none=0)


def names(view):
    return [row.port.name for row in view.rows]


def test_the_first_look_has_totals_and_no_rates(host):
    host.connect("web", 5)
    view = next(looks(host))

    assert (view.seconds, view.per_s) == (0, 0)
    assert view.rows[0] == top.Row(ServicePortName("ns", "web", "http", "tcp"), 0, 5, 2, 0, 0, 0)


def test_rates_are_of_the_time_between_two_looks(host):
    each = looks(host)
    next(each)
    host.connect("web", 6)
    host.connect("api", 2)
    host.refuse(10)
    view = next(each)

    assert view.seconds == pytest.approx(2)
    assert view.per_s == pytest.approx(4)
    rows = {row.port.name: row for row in view.rows}
    assert rows["web"].per_s == pytest.approx(3)
    assert rows["web"].share == pytest.approx(0.75)
    assert rows["none"].refused_per_s == pytest.approx(5)
    assert rows["none"].refused == 10
    assert next(each).per_s == 0


def test_families_are_added_and_endpoints_are_not():
    one, two = Host(web=2), Host(web=3)
    one.connect("web", 1)
    two.connect("web", 2)
    (row,) = next(looks(one, two)).rows

    assert (row.total, row.endpoints) == (3, 3)


@pytest.mark.parametrize(
    ("sort", "wanted"),
    [
        ("rate", ["api", "web", "none"]),
        ("total", ["web", "api", "none"]),
        ("refused", ["none", "api", "web"]),
        ("endpoints", ["web", "api", "none"]),
        ("name", ["api", "none", "web"]),
    ],
)
def test_rows_are_sorted_as_asked(host, sort, wanted):
    host.connect("web", 100)
    each = looks(host, sort=sort)
    next(each)
    host.connect("api", 1)
    host.refuse(1)

    assert names(next(each)) == wanted


def test_other_namespaces_are_left_out(host):
    assert next(looks(host, namespaces=("other",))).rows == ()


def test_services_that_come_and_go_are_followed(host):
    each = looks(host)
    next(each)
    host.tables = Host(web=1, new=1).tables
    host.counts |= Host(new=1).counts

    assert set(names(next(each))) == {"web", "new"}


def test_counters_that_cannot_be_read_end_it(host):
    host.error = PermissionError("no")

    with pytest.raises(KubeProxyError, match="cannot read counters"):
        next(looks(host))


def test_json_has_all_columns(host):
    host.connect("web", 5)
    found = top.as_json(next(looks(host)))

    assert json.loads(json.dumps(found))["services"][0] == {
        "namespace": "ns",
        "service": "web",
        "port": "http",
        "protocol": "tcp",
        "connectionsPerSecond": 0,
        "connections": 5,
        "share": 0,
        "endpoints": 2,
        "refusedPacketsPerSecond": 0,
        "refusedPackets": 0,
    }


@pytest.mark.parametrize("interval_s", [0, -1, 0.1, float("nan"), float("inf")])
def test_an_interval_that_makes_no_sense_is_refused(interval_s):
    with pytest.raises(ConfigError, match="cannot look every"):
        top_command.run(Asked(interval_s=interval_s), [])


def test_a_live_view_needs_a_terminal(host, capsys):
    with pytest.raises(ConfigError, match="--once"):
        top_command.run(Asked(), [host.source])
    assert capsys.readouterr().out == ""


def test_once_prints_what_happened_in_one_interval(host, capsys):
    top_command.run(Asked(0.2, is_once=True), [host.source])
    out = capsys.readouterr().out

    assert out.splitlines()[0].rstrip() == "0.0 new connections/s to 3 Service ports"
    assert "ns/web" in out


def test_json_goes_on_until_interrupted(host, capsys):
    reads = itertools.count()

    def read(table, chains):
        if next(reads) > 6:
            raise KeyboardInterrupt
        return host.read(table, chains)

    source = Source(lambda: host.tables, type("Counters", (), {"read": staticmethod(read)})())
    top_command.run(Asked(0.2, output="json"), [source])
    lines = capsys.readouterr().out.splitlines()

    assert len(lines) == 2
    assert all("services" in json.loads(line) for line in lines)


def test_what_does_not_fit_the_screen_is_counted(host):
    each = looks(host)
    next(each)
    host.connect("web", 1)
    view = next(each)
    group = top_screen.render(view, 1)

    assert str(group.renderables[0]) == (
        "0.5 new connections/s to 3 Service ports, 2 more not shown"
    )
    assert group.renderables[1].row_count == 1
