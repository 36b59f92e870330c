"""Traffic metrics, on a kernel whose counters are a dict."""

import threading
from collections import Counter

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from kubeproxy_py.errors import IptablesError
from kubeproxy_py.iptables import plan
from kubeproxy_py.model import IPFamily, ServiceName, ServicePortName
from kubeproxy_py.traffic import Series
from kubeproxy_py.traffic_meter import FamilyMeter, TrafficCollector
from kubeproxy_py.traffic_state import StateFile

V4, V6 = IPFamily.V4, IPFamily.V6
CONNECTIONS = "kubeproxy_service_connections_total"
REFUSED = "kubeproxy_service_refused_packets_total"
ENDPOINT = "kubeproxy_endpoint_connections_total"
BYTES = "kubeproxy_service_bytes_total"


class Kernel:
    """Chains with counters, as many as there are rules."""

    def __init__(self):
        self.tables = {"nat": {}, "filter": {}}
        self.counts = {}
        self.error = None
        self.reads = []

    def endpoint(self, service, number=1, count=0):
        """Return the chain of an endpoint that there is from now on."""
        chain = f"KUBE-SEP-{service.upper():A<15}{number}"
        rule = f'-p tcp -m comment --comment "ns/{service}" -j DNAT --to-destination 10.0.0.{number}:80'
        self.tables["nat"][chain] = (rule,)
        self.counts[chain] = (count,)
        return chain

    def refuse(self, service, count=0):
        rule = f'-p tcp -m comment --comment "ns/{service} has no endpoints" -j REJECT'
        self.tables["filter"]["KUBE-SERVICES"] = (rule,)
        self.counts["KUBE-SERVICES"] = (count,)

    def save(self, *, known=None):
        if self.error is not None:
            raise self.error
        return {table: dict(chains) for table, chains in self.tables.items()}

    def read(self, table, chains):
        if self.error is not None:
            raise self.error
        self.reads.append(sorted(chains))
        return {
            chain: self.counts[chain] for chain in chains if chain in self.tables.get(table, {})
        }

    def write(self, meter, *, delete=(), fail=False, **sections):
        """Write chains as a sync does; sections by table."""
        batch = plan.Batch(
            tuple(
                plan.Section(table, write, delete=tuple(delete) if table == "nat" else ())
                for table, write in sections.items()
            )
        )
        with meter.writing(batch):
            if fail:
                raise IptablesError("refused")
            for table, write in sections.items():
                self.tables[table].update(write)
                self.counts.update({chain: (0,) * len(rules) for chain, rules in write.items()})
            for chain in delete:
                del self.tables["nat"][chain]


class Flows:
    """What connections have counted, as a test says."""

    def __init__(self):
        self.has_begun = False
        self.more = {V4: Counter(), V6: Counter()}
        self.standing = {V4: Counter(), V6: Counter()}
        self.next = None

    def count(self, service, octets, *, standing=0):
        """Let the next look find so many bytes more, and so many of living connections."""
        series = Series("bytes", ServicePortName("ns", service, "", "tcp"), "to_service")
        self.more[V4][series] += octets
        self.standing[V4][series] = standing

    def look(self):
        return True

    def take(self, family):
        taken, self.more[family] = self.more[family], Counter()
        return taken, self.standing[family]


class Stage:
    """A collector of one or two families, whose clock stands still."""

    def __init__(self, metrics, path=None, **options):
        self.now = 0.0
        self.kernels = {V4: Kernel(), V6: Kernel()}
        self.collector = TrafficCollector(
            state=StateFile(path),
            clock=lambda: self.now,
            deadline_s=10.0,
            **{"detail": "service", "max_series": 10} | options,
        )
        self.meters = {
            family: FamilyMeter(
                family,
                kernel,
                kernel.save,
                metrics=metrics,
                wake=self.collector.wake,
                clock=lambda: self.now,
            )
            for family, kernel in self.kernels.items()
        }
        for family, meter in self.meters.items():
            self.collector.add(family, meter)
        self.registry = CollectorRegistry()
        self.registry.register(self.collector)
        self.collector.start()

    @property
    def kernel(self):
        return self.kernels[V4]

    @property
    def meter(self):
        return self.meters[V4]

    def scrape(self):
        """Return all samples, by name and the labels that differ here."""
        self.now += 10
        return {
            (sample.name, *(sample.labels[key] for key in ("service", "ip_family")),
             next((sample.labels[key] for key in ("reason", "endpoint", "direction")
                   if key in sample.labels), "")): sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
        }  # fmt: skip

    def count(self, service, *, metric=CONNECTIONS, family=V4, detail=""):
        return self.scrape().get((metric, service, family.value, detail))


@pytest.fixture
def build(metrics, tmp_path):
    stages = []

    def build(**options):
        stages.append(Stage(metrics, tmp_path / "traffic.json", **options))
        return stages[-1]

    yield build
    for stage in stages:
        stage.collector.stop()


@pytest.fixture
def stage(build):
    return build()


def test_what_is_there_at_the_start_is_zero_and_goes_on_from_there(stage):
    chain = stage.kernel.endpoint("web", count=100)
    assert stage.count("web") == 0
    stage.kernel.counts[chain] = (105,)

    assert stage.count("web") == 5


def test_families_are_counted_for_themselves(stage):
    for kernel in stage.kernels.values():
        kernel.endpoint("web")
    stage.scrape()
    stage.kernels[V6].counts = dict.fromkeys(stage.kernels[V6].counts, (3,))

    assert stage.count("web", family=V6) == 3
    assert stage.count("web") == 0


def test_endpoints_are_shown_where_they_are_asked_for(build):
    stage = build(detail="endpoint")
    chains = [stage.kernel.endpoint("web", number) for number in (1, 2)]
    stage.scrape()
    stage.kernel.counts |= {chains[0]: (3,), chains[1]: (4,)}
    samples = stage.scrape()

    assert samples[CONNECTIONS, "web", "IPv4", ""] == 7
    assert samples[ENDPOINT, "web", "IPv4", "10.0.0.2:80"] == 4
    stage.kernel.write(stage.meter, nat={}, delete=[chains[1]])
    samples = stage.scrape()
    assert samples[CONNECTIONS, "web", "IPv4", ""] == 7
    assert (ENDPOINT, "web", "IPv4", "10.0.0.2:80") not in samples


def test_what_a_removed_endpoint_had_counted_stays(stage):
    chain = stage.kernel.endpoint("web")
    stage.kernel.endpoint("web", 2)
    stage.scrape()
    stage.kernel.counts[chain] = (9,)
    stage.kernel.write(stage.meter, nat={}, delete=[chain])

    assert stage.count("web") == 9


def test_endpoints_that_come_and_go_between_two_scrapes_are_counted(stage):
    stage.kernel.endpoint("web")
    stage.scrape()
    other = Kernel()
    new = other.endpoint("web", 2)
    stage.kernel.write(stage.meter, nat=other.tables["nat"])
    stage.kernel.counts[new] = (4,)
    stage.kernel.write(stage.meter, nat={}, delete=[new])

    assert stage.count("web") == 4


def test_before_the_first_scrape_what_we_wrote_is_counted_too(stage):
    other = Kernel()
    first, second = other.endpoint("web"), other.endpoint("web", 2)
    stage.kernel.write(stage.meter, nat=other.tables["nat"])
    stage.kernel.counts |= {first: (2,), second: (3,)}
    stage.kernel.write(stage.meter, nat={}, delete=[first])

    assert stage.count("web") == 5


def test_a_write_that_fails_is_no_reset(stage):
    chain = stage.kernel.endpoint("web")
    stage.scrape()
    stage.kernel.counts[chain] = (9,)
    with pytest.raises(IptablesError):
        stage.kernel.write(stage.meter, nat={}, delete=[chain], fail=True)
    stage.kernel.counts[chain] = (10,)

    assert stage.count("web") == 10


def test_a_write_reads_only_what_counts(stage):
    chain = stage.kernel.endpoint("web")
    stage.scrape()
    stage.kernel.reads.clear()
    other = Kernel()
    new = other.endpoint("web", 2)
    stage.kernel.write(stage.meter, nat={**other.tables["nat"], "KUBE-SVC-X": ()}, delete=[chain])

    assert stage.kernel.reads == [[chain]]
    stage.kernel.write(stage.meter, nat={new: ()})
    assert stage.kernel.reads == [[chain], [new]]


def test_refused_packets_have_a_reason_and_stay(stage):
    stage.kernel.refuse("none")
    stage.scrape()
    stage.kernel.counts["KUBE-SERVICES"] = (3,)
    samples = stage.scrape()
    assert samples[REFUSED, "none", "IPv4", "no_endpoints"] == 3
    assert samples[CONNECTIONS, "none", "IPv4", ""] == 0
    # It gets endpoints, and the rule goes.
    stage.kernel.endpoint("none")
    stage.kernel.counts["KUBE-SERVICES"] = (4,)
    stage.kernel.write(
        stage.meter, nat=dict(stage.kernel.tables["nat"]), filter={"KUBE-SERVICES": ()}
    )

    assert stage.count("none", metric=REFUSED, detail="no_endpoints") == 4


def test_above_the_cap_the_rest_is_one_series(build):
    stage = build(max_series=1)
    one, two = stage.kernel.endpoint("one"), stage.kernel.endpoint("two")
    assert stage.scrape() == {}
    stage.kernel.counts |= {one: (1,), two: (5,)}
    samples = stage.scrape()

    assert samples == {
        (CONNECTIONS, "two", "IPv4", ""): 5,
        (CONNECTIONS, "other", "IPv4", ""): 1,
    }


def test_a_kernel_that_cannot_be_read_is_counted_and_tried_again(stage, metrics):
    chain = stage.kernel.endpoint("web")
    stage.scrape()
    stage.kernel.counts[chain] = (5,)
    for error in (OSError("no"), IptablesError("no")):
        stage.kernel.error = error
        with capture_logs() as logs:
            assert stage.count("web") == 0
        assert [log["event"] for log in logs] == ["traffic.look_failed"]
    stage.kernel.error = None

    assert stage.count("web") == 5
    assert metrics.registry.get_sample_value(
        "kubeproxy_traffic_look_failures_total", {"ip_family": "IPv4"}
    ) == 2  # fmt: skip


def test_a_write_goes_on_where_counters_cannot_be_read(stage):
    chain = stage.kernel.endpoint("web")
    stage.scrape()
    stage.kernel.error = OSError("no")
    with capture_logs() as logs:
        stage.kernel.write(stage.meter, nat={}, delete=[chain])

    assert [log["event"] for log in logs] == ["traffic.look_failed"]


def test_numbers_that_cannot_be_had_for_long_are_not_shown(stage):
    stage.kernel.endpoint("web")
    assert stage.count("web") == 0
    for kernel in stage.kernels.values():
        kernel.error = OSError("no")
    stage.now += 300

    assert stage.scrape() == {}


def test_a_bug_is_logged_and_the_next_look_is_made(stage):
    stage.kernel.endpoint("web")
    stage.kernel.error = KeyError("a bug")
    stage.collector._deadline_s = 0.1
    with capture_logs() as logs:
        assert stage.count("web") is None
        stage.kernel.error = None
        stage.collector._deadline_s = 10.0
        assert stage.count("web") == 0

    assert [log["event"] for log in logs] == ["traffic.failed"]


def test_many_who_scrape_are_given_one_look(stage):
    chain = stage.kernel.endpoint("web")
    stage.scrape()
    reads = len(stage.kernel.reads)
    stage.kernel.counts[chain] = (5,)
    stage.now -= 10

    assert stage.count("web") == 0
    assert len(stage.kernel.reads) == reads


def test_who_waits_too_long_gets_the_last_numbers(stage, metrics):
    chain = stage.kernel.endpoint("web")
    assert stage.count("web") == 0
    gate = threading.Event()
    read = stage.kernel.read

    def slow(table, chains):
        gate.wait(10)
        return read(table, chains)

    stage.kernel.read = slow
    stage.kernel.counts[chain] = (5,)
    stage.collector._deadline_s = 0.05
    assert stage.count("web") == 0
    gate.set()
    stage.collector._deadline_s = 10.0

    assert stage.count("web") == 5


def test_another_process_goes_on_with_totals_and_what_was_missed(build, stage):
    chain = stage.kernel.endpoint("web", count=50)
    stage.kernel.endpoint("web", 2)
    stage.scrape()
    stage.kernel.counts[chain] = (57,)
    assert stage.count("web") == 7
    stage.collector.stop()
    # While nobody runs.
    stage.kernel.counts[chain] = (60,)
    other = build()
    other.kernel.tables, other.kernel.counts = stage.kernel.tables, stage.kernel.counts

    assert other.count("web") == 10


def test_another_process_never_falls_behind_the_last(build, stage):
    chain = stage.kernel.endpoint("web")
    stage.scrape()
    stage.kernel.counts[chain] = (7,)
    assert stage.count("web") == 7
    stage.collector.stop()
    other = build()
    other.kernel.endpoint("web", count=2)  # written by somebody meanwhile

    assert other.count("web") == 7


def test_a_family_that_cannot_be_read_leaves_its_totals_to_the_next_process(build, stage):
    chain = stage.kernel.endpoint("web")
    stage.scrape()
    stage.kernel.counts[chain] = (7,)
    assert stage.count("web") == 7
    stage.collector.stop()
    broken = build()
    broken.kernel.error = OSError("no")
    broken.scrape()
    broken.collector.stop()
    third = build()
    third.kernel.endpoint("web", count=8)

    assert third.count("web") == 8


def test_the_names_of_endpoints_without_a_comment_are_looked_for_again(stage):
    stage.scrape()
    chain = "KUBE-SEP-AAAAAAAAAAAAAAAA"
    svc = "KUBE-SVC-BBBBBBBBBBBBBBBB"
    # As on nft in a large cluster: a batch with the chains, and only then what leads to them.
    stage.kernel.write(
        stage.meter,
        nat={chain: ("-p tcp -j DNAT --to-destination 10.0.0.1:80",), svc: (f"-j {chain}",)},
    )
    named = f'-p tcp -m comment --comment "ns/web cluster IP" -j {svc}'
    stage.kernel.write(stage.meter, nat={"KUBE-SERVICES": (named,)})
    stage.kernel.counts[chain] = (6,)

    assert stage.count("web") == 6


def test_a_collector_that_was_not_started_stops():
    TrafficCollector(detail="service", max_series=1, state=StateFile(None)).stop()


# Packets and bytes ---------------------------------------------------------------------------------


def octets(stage, service="web", direction="to_service"):
    return stage.count(service, metric=BYTES, detail=direction)


@pytest.fixture
def begin(build):
    """Start a process whose connections have been looked at; give its stage and connections."""

    def begin():
        flow_meter = Flows()
        stage = build(flow_meter=flow_meter)
        stage.kernel.endpoint("web")
        flow_meter.has_begun = True
        return stage, flow_meter

    return begin


def test_bytes_are_shown_by_direction_once_they_are_counted(begin):
    stage, flow_meter = begin()
    flow_meter.has_begun = False
    assert octets(stage) is None
    flow_meter.has_begun = True
    flow_meter.count("web", 1000)

    assert octets(stage) == 1000
    assert octets(stage, direction="from_service") == 0
    flow_meter.count("web", 500)
    assert octets(stage) == 1500


def test_without_counting_them_there_are_no_bytes(stage):
    stage.kernel.endpoint("web")

    assert octets(stage) is None


def test_bytes_of_a_service_that_is_gone_are_gone(begin):
    stage, flow_meter = begin()
    chain = stage.kernel.endpoint("old")
    flow_meter.count("old", 7)
    assert octets(stage, "old") == 7
    stage.kernel.write(stage.meter, delete=[chain], nat={})

    assert octets(stage, "old") is None


def test_bytes_go_on_after_a_restart_with_what_came_meanwhile(begin):
    stage, flow_meter = begin()
    flow_meter.count("web", 1000, standing=600)
    assert octets(stage) == 1000
    stage.collector.stop()
    again, flow_meter = begin()
    flow_meter.count("web", 0, standing=650)
    assert octets(again) == 1050
    flow_meter.count("web", 5, standing=655)
    assert octets(again) == 1055


def test_bytes_never_fall_if_connections_ended_meanwhile(begin):
    stage, flow_meter = begin()
    flow_meter.count("web", 1000, standing=600)
    assert octets(stage) == 1000
    stage.collector.stop()
    again, flow_meter = begin()
    flow_meter.count("web", 0, standing=10)

    assert octets(again) == 1000


def test_what_was_saved_is_kept_until_connections_are_counted_again(begin):
    stage, flow_meter = begin()
    flow_meter.count("web", 1000, standing=600)
    assert octets(stage) == 1000
    stage.collector.stop()
    again, flow_meter = begin()
    flow_meter.has_begun = False
    assert octets(again) is None
    again.collector.stop()
    third, flow_meter = begin()
    flow_meter.count("web", 0, standing=601)

    assert octets(third) == 1001


# Services chosen by label --------------------------------------------------------------------------


def test_only_the_services_chosen_are_shown(build):
    chosen = {ServiceName("ns", "web")}
    flow_meter = Flows()
    flow_meter.has_begun = True
    stage = build(choose=lambda: chosen, flow_meter=flow_meter)
    chains = [stage.kernel.endpoint(service) for service in ("web", "api")]
    stage.scrape()
    for chain, service in zip(chains, ("web", "api"), strict=True):
        stage.kernel.counts[chain] = (5,)
        flow_meter.count(service, 100)
    found = stage.scrape()
    assert {key[1] for key in found if key[0] in (CONNECTIONS, BYTES)} == {"web"}
    assert found[CONNECTIONS, "web", "IPv4", ""] == 5
    # A label changes; what was counted before is nobody's.
    chosen.add(ServiceName("ns", "api"))
    assert stage.count("api") == 0
    stage.kernel.counts[chains[1]] = (7,)
    assert stage.count("api") == 2
    chosen.clear()

    assert stage.count("web") is None


def test_until_it_is_known_which_are_chosen_totals_stay_as_they_were_saved(build):
    stage = build()
    chain = stage.kernel.endpoint("web")
    stage.count("web")
    stage.kernel.counts[chain] = (5,)
    assert stage.count("web") == 5
    stage.collector.stop()
    chosen = []
    again = build(choose=lambda: chosen[0] if chosen else None)
    again.kernel.endpoint("web", count=6)
    assert again.count("web") is None
    chosen.append({ServiceName("ns", "web")})

    assert again.count("web") == 6
