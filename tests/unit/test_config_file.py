"""Configuration files: defaults, tolerance, and what is refused."""

import json

import pytest

from kubeproxy_py import config, config_file
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.errors import ConfigError
from tests.support import kubeadm

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"


@pytest.fixture
def load(tmp_path):
    """Load a file with the given content; the header is added unless the text has one."""

    def load_text(text, *, head=HEAD):
        path = tmp_path / "config.conf"
        path.write_text(head + text)
        return config_file.load_file(path)

    return load_text


def test_a_file_with_nothing_but_its_kind_is_the_default_configuration(load):
    assert load("") == (KubeProxyConfiguration(), [])


def test_kubeadms_file_is_the_default_configuration_with_its_two_settings(load):
    wanted = config.replace(KubeProxyConfiguration(), "cluster_cidr", "10.244.0.0/16")
    wanted = config.replace(
        wanted, "client_connection.kubeconfig", "/var/lib/kube-proxy/kubeconfig.conf"
    )

    assert load(kubeadm.CONFIG, head="") == (wanted, [])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("client_connection.content_type", "application/vnd.kubernetes.protobuf"),
        ("client_connection.qps", 5),
        ("client_connection.burst", 10),
        ("logging.format", "text"),
        ("logging.flush_frequency_s", 5),
        ("bind_address", "0.0.0.0"),
        ("healthz_bind_address", "0.0.0.0:10256"),
        ("metrics_bind_address", "127.0.0.1:10249"),
        ("mode", "iptables"),
        ("iptables.masquerade_bit", 14),
        ("iptables.localhost_node_ports", True),
        ("iptables.sync_period_s", 30),
        ("iptables.min_sync_period_s", None),
        ("nftables.masquerade_bit", 14),
        ("detect_local_mode", "ClusterCIDR"),
        ("cluster_cidr", ""),
        ("node_port_addresses", ()),
        ("oom_score_adj", -999),
        ("conntrack.max_per_core", 32768),
        ("conntrack.min", 131072),
        ("conntrack.tcp_established_timeout_s", 86400),
        ("conntrack.tcp_close_wait_timeout_s", 3600),
        ("conntrack.udp_timeout_s", 0),
        ("config_sync_period_s", 900),
    ],
)
def test_default_of(load, path, value):
    decoded, _ = load("")
    for name in path.split("."):
        decoded = getattr(decoded, name)

    assert decoded == value


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("conntrack: {maxPerCore: 0}", "conntrack.max_per_core", 0),
        ("conntrack: {min: 0}", "conntrack.min", 0),
        ("conntrack: {tcpEstablishedTimeout: 0s}", "conntrack.tcp_established_timeout_s", 0),
        ("conntrack: {tcpCloseWaitTimeout: 0s}", "conntrack.tcp_close_wait_timeout_s", 0),
        ("iptables: {masqueradeBit: 0}", "iptables.masquerade_bit", 0),
        ("iptables: {localhostNodePorts: false}", "iptables.localhost_node_ports", False),
        ("oomScoreAdj: 0", "oom_score_adj", 0),
    ],
)
def test_an_explicit_zero_is_kept_where_absent_means_something_else(load, text, path, value):
    decoded, _ = load(text)

    assert decoded == config.replace(KubeProxyConfiguration(), path, value)


def test_an_explicit_min_sync_period_is_told_from_none(load):
    decoded, _ = load("iptables: {minSyncPeriod: 1s}")

    assert decoded.iptables.min_sync_period_s == 1


@pytest.mark.parametrize(
    ("text", "healthz", "metrics"),
    [
        ("bindAddress: '::'", "[::]:10256", "[::1]:10249"),
        ("bindAddress: 192.168.0.2", "0.0.0.0:10256", "127.0.0.1:10249"),
        ("healthzBindAddress: 1.2.3.4", "1.2.3.4:10256", "127.0.0.1:10249"),
        ("metricsBindAddress: '::1'", "0.0.0.0:10256", "[::1]:10249"),
        ("healthzBindAddress: 1.2.3.4:99", "1.2.3.4:99", "127.0.0.1:10249"),
        ("metricsBindAddress: 0.0.0.0", "0.0.0.0:10256", "0.0.0.0:10249"),
        ("metricsBindAddress: nonsense", "0.0.0.0:10256", "nonsense"),
    ],
)
def test_server_addresses_follow_the_bind_address_and_get_a_port(load, text, healthz, metrics):
    decoded, _ = load(text)

    assert (decoded.healthz_bind_address, decoded.metrics_bind_address) == (healthz, metrics)


@pytest.mark.parametrize(("text", "seconds"), [("2s", 2), ("2000000000", 2), ("0", 5)])
def test_the_flush_frequency_may_be_a_number_of_nanoseconds(load, text, seconds):
    decoded, _ = load(f"logging: {{flushFrequency: {text}}}")

    assert decoded.logging.flush_frequency_s == seconds


def test_the_periods_of_modes_that_do_not_run_are_zero(load):
    decoded, warnings = load("ipvs: {syncPeriod: 30s}\nnftables: {minSyncPeriod: 1s}")

    assert (decoded, warnings) == (KubeProxyConfiguration(), [])


def test_settings_of_modes_that_do_not_run_are_named_as_ignored(load, tmp_path):
    path = tmp_path / "config.conf"

    _, warnings = load(
        "ipvs: {scheduler: rr, syncPeriod: 5s}\n"
        "nftables: {masqueradeAll: true}\n"
        "winkernel: {enableDSR: true}"
    )

    assert warnings == [
        f"{path}: {field} has no effect in iptables mode"
        for field in (
            "ipvs.syncPeriod",
            "ipvs.scheduler",
            "nftables.masqueradeAll",
            "winkernel.enableDSR",
        )
    ]


def test_a_file_may_be_json(load):
    text = json.dumps(
        {"apiVersion": config.API_VERSION, "kind": config.KIND, "clusterCIDR": "10.0.0.0/8"},
        indent="\t",
    )

    assert load(text, head="")[0].cluster_cidrs == ("10.0.0.0/8",)


def test_a_file_may_be_yaml_that_begins_like_json(load):
    text = "{apiVersion: kubeproxy.config.k8s.io/v1alpha1, kind: KubeProxyConfiguration}"

    assert load(text, head="")[0] == KubeProxyConfiguration()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("foo: 1\n", 'unknown field "foo"'),
        ("iptables: {bar: 1}\n", 'unknown field "iptables.bar"'),
        (
            "logging: {vmodule: [{filePattern: a, x: 1}]}\n",
            'unknown field "logging.vmodule[0].x"',
        ),
        ("mode: ''\nmode: iptables\n", 'line 4: key "mode" already set in map'),
        ("---\nmore: 1\n", "only the first YAML document is used"),
    ],
)
def test_what_only_a_strict_reader_refuses_is_a_warning(load, tmp_path, text, problem):
    path = tmp_path / "config.conf"

    _, warnings = load(text)

    assert warnings == [
        f"{path}: using lenient decoding as strict decoding failed: strict decoding error: {problem}"
    ]


def test_the_last_of_duplicate_fields_wins(load):
    decoded, _ = load("clusterCIDR: 10.0.0.0/8\nclusterCIDR: 11.0.0.0/8\n")

    assert decoded.cluster_cidr == "11.0.0.0/8"


def test_duplicate_fields_of_a_json_file_are_a_warning(load):
    head = f'{{"apiVersion": "{config.API_VERSION}", "kind": "{config.KIND}", '

    decoded, warnings = load('"mode": "a", "mode": "b"}', head=head)

    assert decoded.mode == "b"
    assert 'duplicate field "mode"' in warnings[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("iptables: {masqueradeBit: x}", "iptables.masqueradeBit: Expected `int`, got `str`"),
        (
            "iptables: {masqueradeBit: 4294967296}",
            "iptables.masqueradeBit: Expected `int` <= 21474",
        ),
        ("hostnameOverride: 5", "hostnameOverride: Expected `str`, got `int`"),
        ("iptables: []", "iptables: Expected `object`, got `array`"),
        ("featureGates: {A: 'yes'}", "featureGates[...]: Expected `bool`, got `str`"),
        (
            "iptables: {syncPeriod: 30}",
            "iptables.syncPeriod: Expected a duration like `30s`, got `int`",
        ),
        ("configSyncPeriod: 5", "configSyncPeriod: Expected a duration like `30s`, got `int`"),
        ("configSyncPeriod: '5'", 'configSyncPeriod: time: missing unit in duration "5"'),
        ("logging: {flushFrequency: x}", 'logging.flushFrequency: time: invalid duration "x"'),
        ("mode: [", "yaml: line 3: "),
        ("mode: \t{", "yaml: line 3: "),
        ("mode: \x00", "yaml: "),
        ("a: &a [*a]", "nested too deeply"),
    ],
)
def test_wrong_types_and_syntax_name_file_and_field(load, tmp_path, text, problem):
    with pytest.raises(ConfigError) as raised:
        load(text)

    beginning = f"cannot use '{tmp_path / 'config.conf'}': failed to decode: "
    assert str(raised.value).startswith(beginning + problem)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "Object 'Kind' is missing"),
        ("kind: KubeProxyConfiguration", "Object 'apiVersion' is missing"),
        (
            "kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v1alpha2",
            'no kind "KubeProxyConfiguration" is registered for version '
            '"kubeproxy.config.k8s.io/v1alpha2"',
        ),
        ("kind: Pod\napiVersion: v1", 'no kind "Pod" is registered for version "v1"'),
        ("- kind: Pod", "the top level must be a mapping"),
    ],
)
def test_another_kind_of_file_is_refused(load, text, problem):
    with pytest.raises(ConfigError, match="failed to decode: ") as raised:
        load(text, head="")

    assert str(raised.value).endswith(problem)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "config.conf"
    path.write_bytes(b"\xff\xfe\xfa")

    with pytest.raises(ConfigError, match="failed to decode"):
        config_file.load_file(path)


def test_a_missing_file_is_named_as_go_names_it():
    with pytest.raises(ConfigError) as raised:
        config_file.load_file("/nonexistent")

    assert str(raised.value) == "open /nonexistent: no such file or directory"


def test_every_field_can_be_set_and_survives_being_written(load):
    # As unlike the defaults as possible, so that a field that is lost or misspelt shows.
    document = {
        "featureGates": {"AllowServiceExternalIPs": False},
        "clientConnection": {
            "kubeconfig": "/k",
            "acceptContentTypes": "a",
            "contentType": "c",
            "qps": 2.5,
            "burst": 3,
        },
        "logging": {
            "format": "json",
            "flushFrequency": "1s",
            "verbosity": 4,
            "vmodule": [{"filePattern": "a*", "verbosity": 2}],
            "options": {
                "text": {"splitStream": True, "infoBufferSize": "64Ki"},
                "json": {"splitStream": True, "infoBufferSize": "1"},
            },
        },
        "hostnameOverride": "true",
        "bindAddress": "::1",
        "healthzBindAddress": "[::1]:1",
        "metricsBindAddress": "[::1]:2",
        "bindAddressHardFail": True,
        "enableProfiling": True,
        "showHiddenMetricsForVersion": "1.35",
        "mode": "nftables",
        "iptables": {
            "masqueradeBit": 0,
            "masqueradeAll": True,
            "localhostNodePorts": False,
            "syncPeriod": "1m0s",
            "minSyncPeriod": "500ms",
        },
        "ipvs": {
            "scheduler": "rr",
            "excludeCIDRs": ["10.0.0.0/8"],
            "strictARP": True,
            "tcpTimeout": "1s",
            "tcpFinTimeout": "2s",
            "udpTimeout": "3s",
        },
        "nftables": {"masqueradeBit": 2, "masqueradeAll": True},
        "winkernel": {
            "networkName": "n",
            "sourceVip": "s",
            "enableDSR": True,
            "rootHnsEndpointName": "r",
            "forwardHealthCheckVip": True,
        },
        "detectLocalMode": "NodeCIDR",
        "detectLocal": {"bridgeInterface": "br0", "interfaceNamePrefix": "veth"},
        "clusterCIDR": "10.0.0.0/8,fd00::/64",
        "nodePortAddresses": ["primary"],
        "oomScoreAdj": 0,
        "conntrack": {
            "maxPerCore": 0,
            "min": 1,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "1s",
            "tcpBeLiberal": True,
            "udpTimeout": "2s",
            "udpStreamTimeout": "3s",
        },
        "configSyncPeriod": "1m0s",
        "portRange": "1-2",
        "windowsRunAsService": True,
    }
    head = {"apiVersion": config.API_VERSION, "kind": config.KIND}
    decoded, warnings = load(json.dumps(head | document), head="")
    assert warnings == []

    written = config.to_yaml(decoded)

    assert load(written, head="") == (decoded, [])
    shown = json.loads(config.to_json(decoded))["kubeproxy.config.k8s.io"]
    for section in ("ipvs", "nftables"):
        del shown[section]["syncPeriod"], shown[section]["minSyncPeriod"]
    assert shown == head | document
