"""What a configuration may hold; the messages are kube-proxy's, which people search for."""

import pytest

from kubeproxy_py import config, config_validation
from kubeproxy_py.config import KubeProxyConfiguration, Logging, LogOptions, LogOutput, VModule
from kubeproxy_py.durations import Duration
from kubeproxy_py.errors import ConfigError

CONNTRACK = "KubeProxyLinuxConfiguration.KubeProxyConntrackConfiguration"
NOT_NEGATIVE = "must be greater than or equal to 0"
PAIR = (
    "must be a either a single CIDR or dual-stack pair of CIDRs "
    "(e.g. [10.100.0.0/16, fde4:8dba:82e1::/48]"
)
BLOCK = "must be a valid CIDR block (e.g. 10.100.0.0/16 or fde4:8dba:82e1::/48)"


def configuration(**fields):
    """Build a configuration; ``__`` stands for the dot in a field's path."""
    result = KubeProxyConfiguration()
    for name, value in fields.items():
        result = config.replace(result, name.replace("__", "."), value)
    return result


def test_the_defaults_are_valid():
    assert config_validation.validate(KubeProxyConfiguration()) == []


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (
            {"iptables__masquerade_bit": 32},
            "KubeProxyIPTablesConfiguration.MasqueradeBit: Invalid value: 32: "
            "must be within the range [0, 31]",
        ),
        (
            {"iptables__masquerade_bit": -1},
            "KubeProxyIPTablesConfiguration.MasqueradeBit: Invalid value: -1: "
            "must be within the range [0, 31]",
        ),
        (
            {"conntrack__max_per_core": -1},
            f"{CONNTRACK}.MaxPerCore: Invalid value: -1: {NOT_NEGATIVE}",
        ),
        ({"conntrack__min": -1}, f"{CONNTRACK}.Min: Invalid value: -1: {NOT_NEGATIVE}"),
        (
            {"conntrack__tcp_established_timeout_s": Duration(-1)},
            f'{CONNTRACK}.TCPEstablishedTimeout: Invalid value: "-1s": {NOT_NEGATIVE}',
        ),
        (
            {"conntrack__tcp_close_wait_timeout_s": Duration(-1)},
            f'{CONNTRACK}.TCPCloseWaitTimeout: Invalid value: "-1s": {NOT_NEGATIVE}',
        ),
        (
            {"conntrack__udp_timeout_s": Duration(-1)},
            f'{CONNTRACK}.UDPTimeout: Invalid value: "-1s": {NOT_NEGATIVE}',
        ),
        (
            {"conntrack__udp_stream_timeout_s": Duration(-1)},
            f'{CONNTRACK}.UDPStreamTimeout: Invalid value: "-1s": {NOT_NEGATIVE}',
        ),
        (
            {"oom_score_adj": 2000},
            "KubeProxyLinuxConfiguration.OOMScoreAdj: Invalid value: 2000: "
            "must be within the range [-1000, 1000]",
        ),
        (
            {"mode": "foo"},
            'Mode.ProxyMode: Invalid value: "foo": must be iptables, ipvs, nftables or blank '
            "(blank means the best-available proxy [currently iptables])",
        ),
        (
            {"mode": "kernelspace"},
            'Mode.ProxyMode: Invalid value: "kernelspace": must be iptables, ipvs, nftables or '
            "blank (blank means the best-available proxy [currently iptables])",
        ),
        (
            {"client_connection__burst": -1},
            f"ClientConnection.Burst: Invalid value: -1: {NOT_NEGATIVE}",
        ),
        (
            {"config_sync_period_s": Duration(0)},
            'ConfigSyncPeriod: Invalid value: "0s": must be greater than 0',
        ),
        (
            {"iptables__min_sync_period_s": Duration(-1)},
            f'MinSyncPeriod: Invalid value: "-1s": {NOT_NEGATIVE}',
        ),
        (
            {"iptables__min_sync_period_s": Duration(40)},
            'SyncPeriod: Invalid value: "40s": must be greater than or equal to '
            "KubeProxyConfiguration.MinSyncPeriod",
        ),
        (
            {"iptables__sync_period_s": Duration(0.5)},
            'SyncPeriod: Invalid value: "1s": must be greater than or equal to '
            "KubeProxyConfiguration.MinSyncPeriod",
        ),
        (
            {"bind_address": "foo"},
            'BindAddress: Invalid value: "foo": not a valid textual representation of an IP address',
        ),
        (
            {"healthz_bind_address": "abc"},
            'HealthzBindAddress: Invalid value: "abc": must be IP:port',
        ),
        ({"metrics_bind_address": ""}, 'MetricsBindAddress: Invalid value: "": must be IP:port'),
        (
            {"metrics_bind_address": "::1:10249"},
            'MetricsBindAddress: Invalid value: "::1:10249": must be IP:port',
        ),
        (
            {"metrics_bind_address": "foo:1"},
            'MetricsBindAddress: Invalid value: "foo": must be a valid IP',
        ),
        (
            {"metrics_bind_address": "[::1]:0"},
            'MetricsBindAddress: Invalid value: "0": must be a valid port',
        ),
        (
            {"metrics_bind_address": "1.2.3.4:65536"},
            'MetricsBindAddress: Invalid value: "65536": must be a valid port',
        ),
        (
            {"metrics_bind_address": "1.2.3.4:http"},
            'MetricsBindAddress: Invalid value: "http": must be a valid port',
        ),
        (
            {"node_port_addresses": ("primary", "10.0.0.0/8")},
            "NodePortAddresses[0]: Invalid value: \"primary\": can't use both 'primary' and CIDRs",
        ),
        (
            {"node_port_addresses": ("10.0.0.0/8", "abc")},
            'NodePortAddresses[1]: Invalid value: "abc": must be a valid CIDR',
        ),
        (
            {"show_hidden_metrics_for_version": "1.30"},
            'ShowHiddenMetricsForVersion: Invalid value: "1.30": invalid '
            'showHiddenMetricsForVersion: showHiddenMetricsForVersion: Invalid value: "1.30": must '
            "be omitted or have the value '1.35'; only the previous minor version is allowed",
        ),
        (
            {"detect_local_mode": "foo"},
            'DetectLocalMode: Unsupported value: "foo": supported values: "ClusterCIDR", '
            '"NodeCIDR", "BridgeInterface", "InterfaceNamePrefix", ""',
        ),
        (
            {"detect_local_mode": "BridgeInterface"},
            'DetectLocalConfiguration.InterfaceName: Invalid value: "": must not be empty',
        ),
        (
            {"detect_local_mode": "InterfaceNamePrefix"},
            'DetectLocalConfiguration.InterfacePrefix: Invalid value: "": must not be empty',
        ),
        (
            {"cluster_cidr": "10.0.0.0/8,11.0.0.0/8"},
            "DetectLocalConfiguration.ClusterCIDRs: Invalid value: "
            f'["10.0.0.0/8","11.0.0.0/8"]: {PAIR}',
        ),
        (
            {"cluster_cidr": "10.0.0.0/8,fd00::/64,11.0.0.0/8"},
            "DetectLocalConfiguration.ClusterCIDRs: Invalid value: "
            f'["10.0.0.0/8","fd00::/64","11.0.0.0/8"]: {PAIR}',
        ),
        (
            {"cluster_cidr": "abc"},
            f'DetectLocalConfiguration.ClusterCIDRs[0]: Invalid value: "abc": {BLOCK}',
        ),
        (
            {"cluster_cidr": "10.0.0.0/8, fd00::/64"},
            f'DetectLocalConfiguration.ClusterCIDRs[1]: Invalid value: " fd00::/64": {BLOCK}',
        ),
    ],
)
def test_it_is_refused(fields, error):
    assert config_validation.validate(configuration(**fields)) == [
        f"KubeProxyConfiguration.{error}"
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "ipvs"},
        {"mode": "nftables"},
        {"healthz_bind_address": ""},
        {"metrics_bind_address": "[::1]:10249"},
        {"node_port_addresses": ("primary",)},
        {"node_port_addresses": ("10.0.0.0/8", "fd00::/64")},
        {"show_hidden_metrics_for_version": "1.35"},
        {"cluster_cidr": "10.0.0.0/8,fd00::/64"},
        {"cluster_cidr": "abc", "detect_local_mode": "NodeCIDR"},
        {"detect_local_mode": "BridgeInterface", "detect_local__bridge_interface": "cbr0"},
        {"iptables__sync_period_s": Duration(0.5), "iptables__min_sync_period_s": Duration(0)},
    ],
)
def test_it_is_accepted(fields):
    assert config_validation.validate(configuration(**fields)) == []


def test_all_errors_are_reported_together_in_kube_proxys_order():
    errors = config_validation.validate(
        configuration(
            iptables__sync_period_s=Duration(0),
            client_connection__burst=-1,
            conntrack__min=-1,
            oom_score_adj=2000,
            iptables__masquerade_bit=32,
        )
    )

    assert config_validation.aggregate(errors) == (
        "[KubeProxyConfiguration.KubeProxyIPTablesConfiguration.MasqueradeBit: Invalid value: 32: must "
        "be within the range [0, 31], KubeProxyConfiguration.KubeProxyLinuxConfiguration."
        "KubeProxyConntrackConfiguration.Min: Invalid value: -1: must be greater than or equal to 0, "
        "KubeProxyConfiguration.KubeProxyLinuxConfiguration.OOMScoreAdj: Invalid value: 2000: must be "
        "within the range [-1000, 1000], KubeProxyConfiguration.ClientConnection.Burst: Invalid value: "
        "-1: must be greater than or equal to 0, KubeProxyConfiguration.SyncPeriod: Invalid value: "
        '"0s": must be greater than 0, KubeProxyConfiguration.SyncPeriod: Invalid value: "1s": must be '
        "greater than or equal to KubeProxyConfiguration.MinSyncPeriod]"
    )


@pytest.mark.parametrize(
    ("logging", "error"),
    [
        (Logging(format="foo"), 'format: Invalid value: "foo": Unsupported log format'),
        (
            Logging(flush_frequency_s=Duration(-1)),
            'flushFrequency: Invalid value: "-1s": Must be greater than zero',
        ),
        (
            Logging(format="json", vmodule=(VModule(file_pattern="a", verbosity=1),)),
            "vmodule: Forbidden: Only supported for text log format",
        ),
        (
            Logging(vmodule=(VModule(verbosity=1),)),
            "vmodule[0].filePattern: Required value: File pattern must not be empty",
        ),
        (
            Logging(vmodule=(VModule(file_pattern="a=b"),)),
            'vmodule[0].filePattern: Invalid value: "a=b": '
            "File pattern must not contain equal sign or comma",
        ),
        (
            Logging(options=LogOptions(json=LogOutput(split_stream=True))),
            "options.json.splitStream: Forbidden: Feature LoggingAlphaOptions is disabled",
        ),
        (
            Logging(options=LogOptions(text=LogOutput(info_buffer_size="64Ki"))),
            "options.text.infoBufferSize: Forbidden: Feature LoggingAlphaOptions is disabled",
        ),
        (
            Logging(options=LogOptions(text=LogOutput(info_buffer_size="much"))),
            'options.text.infoBufferSize: Invalid value: "much": must be a quantity like 64Ki',
        ),
    ],
)
def test_logging_is_refused(logging, error):
    errors = config_validation.validate_logging(configuration(logging=logging))

    assert errors == [f"logging.{error}"]


def test_alpha_logging_options_are_accepted_with_their_gate():
    output = LogOutput(split_stream=True, info_buffer_size="64Ki")
    checked = configuration(
        logging=Logging(options=LogOptions(text=output)),
        feature_gates={"LoggingAlphaOptions": True},
    )

    assert config_validation.validate_logging(checked) == []


@pytest.mark.parametrize(
    "gate", ["PreferSameTrafficDistribution", "MultiCIDRServiceAllocator", "NFTablesProxyMode"]
)
def test_a_locked_feature_gate_cannot_be_switched_off(gate):
    errors, _ = config_validation.check_feature_gates(configuration(feature_gates={gate: False}))

    assert errors == [f"cannot set feature gate {gate} to false, feature is locked to true"]


def test_a_locked_feature_gate_may_be_set_to_what_it_is():
    gates = {"PreferSameTrafficDistribution": True}

    errors, _ = config_validation.check_feature_gates(configuration(feature_gates=gates))

    assert errors == []


def test_an_unknown_feature_gate_is_a_warning():
    errors, warnings = config_validation.check_feature_gates(
        configuration(feature_gates={"Foo": True})
    )

    assert (errors, warnings) == ([], ["unrecognized feature gate: Foo"])


def test_setting_a_gate_that_has_graduated_is_a_warning():
    gates = {"AllowServiceExternalIPs": False, "ComponentFlagz": True}

    errors, warnings = config_validation.check_feature_gates(configuration(feature_gates=gates))

    assert errors == []
    assert warnings == [
        "setting GA feature gate AllowServiceExternalIPs=false."
        " It will be removed in a future release."
    ]


def test_external_ips_are_allowed_unless_their_gate_is_off():
    allowed = KubeProxyConfiguration()
    forbidden = configuration(feature_gates={"AllowServiceExternalIPs": False})

    assert config.allows_service_external_ips(allowed)
    assert not config.allows_service_external_ips(forbidden)


@pytest.mark.parametrize("mode", ["ipvs", "nftables"])
def test_a_mode_that_is_not_built_in_never_becomes_iptables(mode):
    with pytest.raises(ConfigError, match=f"cannot run in mode '{mode}'"):
        config.require_iptables_mode(configuration(mode=mode))


def test_the_default_mode_can_run():
    config.require_iptables_mode(KubeProxyConfiguration())
