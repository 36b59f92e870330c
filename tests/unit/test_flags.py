"""The command line: how flags are spelled, what they amount to, and who wins."""

import json

import click
import pytest
import yaml
from click.testing import CliRunner

from kubeproxy_py import config, flag_types, flags, label_selector
from kubeproxy_py.config import KubeProxyConfiguration, VModule
from kubeproxy_py.errors import ConfigError
from kubeproxy_py.model import IPFamily

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

# From kube-proxy 1.36.2, run with the flags of the test below.
CONFIGZ = (
    '{"kubeproxy.config.k8s.io":{"kind":"KubeProxyConfiguration",'
    '"apiVersion":"kubeproxy.config.k8s.io/v1alpha1","clientConnection":{"kubeconfig":"kubeconfig",'
    '"acceptContentTypes":"","contentType":"application/vnd.kubernetes.protobuf","qps":5,"burst":10},'
    '"logging":{"format":"text","flushFrequency":"5s","verbosity":4,"options":{"text":'
    '{"infoBufferSize":"0"},"json":{"infoBufferSize":"0"}}},"hostnameOverride":"node1",'
    '"bindAddress":"0.0.0.0","healthzBindAddress":"0.0.0.0:10256",'
    '"metricsBindAddress":"127.0.0.1:10249","bindAddressHardFail":false,"enableProfiling":false,'
    '"showHiddenMetricsForVersion":"","mode":"iptables","iptables":{"masqueradeBit":14,'
    '"masqueradeAll":false,"localhostNodePorts":true,"syncPeriod":"30s","minSyncPeriod":"1s"},'
    '"ipvs":{"syncPeriod":"0s","minSyncPeriod":"0s","scheduler":"","excludeCIDRs":null,'
    '"strictARP":false,"tcpTimeout":"0s","tcpFinTimeout":"0s","udpTimeout":"0s"},"nftables":'
    '{"masqueradeBit":14,"masqueradeAll":false,"syncPeriod":"0s","minSyncPeriod":"0s"},"winkernel":'
    '{"networkName":"","sourceVip":"","enableDSR":false,"rootHnsEndpointName":"",'
    '"forwardHealthCheckVip":false},"detectLocalMode":"ClusterCIDR","detectLocal":'
    '{"bridgeInterface":"","interfaceNamePrefix":""},"clusterCIDR":"10.180.0.0/16",'
    '"nodePortAddresses":null,"oomScoreAdj":-999,"conntrack":{"maxPerCore":0,"min":131072,'
    '"tcpEstablishedTimeout":"0s","tcpCloseWaitTimeout":"0s","tcpBeLiberal":false,'
    '"udpTimeout":"0s","udpStreamTimeout":"0s"},"configSyncPeriod":"15m0s","portRange":""}}'
)
FLAGZ = """\
bind-address=0.0.0.0
bind-address-hard-fail=false
boot-id-file=/proc/sys/kernel/random/boot_id
cleanup=false
cluster-cidr=10.180.0.0/16
config=
config-sync-period=15m0s
conntrack-max-per-core=0
conntrack-min=131072
conntrack-tcp-be-liberal=false
conntrack-tcp-timeout-close-wait=0s
conntrack-tcp-timeout-established=0s
conntrack-udp-timeout=0s
conntrack-udp-timeout-stream=0s
detect-local-mode=ClusterCIDR
feature-gates=
healthz-bind-address=0.0.0.0:10256
healthz-port=10256
help=false
hostname-override=node1
init-only=false
iptables-localhost-nodeports=true
iptables-masquerade-bit=14
iptables-min-sync-period=1s
iptables-sync-period=30s
ipvs-exclude-cidrs=[]
ipvs-min-sync-period=1s
ipvs-scheduler=
ipvs-strict-arp=false
ipvs-sync-period=30s
ipvs-tcp-timeout=0s
ipvs-tcpfin-timeout=0s
ipvs-udp-timeout=0s
kube-api-burst=10
kube-api-content-type=application/vnd.kubernetes.protobuf
kube-api-qps=5
kubeconfig=kubeconfig
log-flush-frequency=5s
log-json-info-buffer-size=0
log-json-split-stream=false
log-text-info-buffer-size=0
log-text-split-stream=false
logging-format=text
machine-id-file=/etc/machine-id,/var/lib/dbus/machine-id
masquerade-all=false
master=
metrics-bind-address=127.0.0.1:10249
metrics-port=10249
nodeport-addresses=[]
oom-score-adj=-999
pod-bridge-interface=
pod-interface-name-prefix=
profiling=false
proxy-mode=iptables
show-hidden-metrics-for-version=
v=4
version=false
vmodule=
write-config-to=
"""
OUR_FLAGS = {
    "dispatch",
    "external-ips-allow",
    "iptables-backend",
    "manifests",
    "state-file",
    "status-socket",
    "traffic-metrics",
    "traffic-metrics-bytes",
    "traffic-metrics-max-series",
    "traffic-metrics-namespaces",
    "traffic-metrics-selector",
    "traffic-metrics-state",
}


@click.command(cls=flag_types.Command)
@flags.proxy_flags
def run(flag_values):
    return flags.settings_from_flags(flag_values)


@click.command(cls=flag_types.Command)
@click.argument("target", required=False)
@flags.rule_flags
@flags.host_fact_flags
def explain(target, flag_values, host_facts):
    return target, flags.settings_from_flags(flag_values), host_facts


def settings(*args):
    return run.main([*args], standalone_mode=False)


def changed(**fields):
    result = KubeProxyConfiguration()
    for name, value in fields.items():
        result = config.replace(result, name.replace("__", "."), value)
    return result


@pytest.fixture
def config_file(tmp_path):
    def write(text=""):
        path = tmp_path / "config.conf"
        path.write_text(HEAD + text)
        return f"--config={path}"

    return write


# --- what flags amount to


def test_no_flags_are_the_default_configuration():
    assert settings().config == KubeProxyConfiguration()


@pytest.mark.parametrize(
    ("arg", "path", "value"),
    [
        ("--kubeconfig=/k", "client_connection__kubeconfig", "/k"),
        ("--kube-api-content-type=x", "client_connection__content_type", "x"),
        ("--kube-api-burst=7", "client_connection__burst", 7),
        ("--kube-api-qps=7.5", "client_connection__qps", 7.5),
        ("--hostname-override= Node1 ", "hostname_override", "node1"),
        ("--bind-address=::1", "bind_address", "::1"),
        ("--bind-address=", "bind_address", "0.0.0.0"),
        ("--healthz-bind-address=1.2.3.4", "healthz_bind_address", "1.2.3.4:10256"),
        ("--healthz-bind-address=", "healthz_bind_address", "0.0.0.0:10256"),
        ("--metrics-bind-address=[::1]:5", "metrics_bind_address", "[::1]:5"),
        ("--metrics-bind-address=::1", "metrics_bind_address", "[::1]:10249"),
        ("--metrics-bind-address=", "metrics_bind_address", "127.0.0.1:10249"),
        ("--bind-address-hard-fail", "bind_address_hard_fail", True),
        ("--profiling", "enable_profiling", True),
        ("--show-hidden-metrics-for-version=1.35", "show_hidden_metrics_for_version", "1.35"),
        ("--feature-gates=Foo=true,Bar=F", "feature_gates", {"Foo": True, "Bar": False}),
        ("--proxy-mode=nftables", "mode", "nftables"),
        ("--proxy-mode=", "mode", "iptables"),
        ("--iptables-masquerade-bit=0x1f", "iptables__masquerade_bit", 31),
        ("--masquerade-all", "iptables__masquerade_all", True),
        ("--iptables-localhost-nodeports=false", "iptables__localhost_node_ports", False),
        ("--iptables-sync-period=1m", "iptables__sync_period_s", 60),
        ("--iptables-min-sync-period=2s", "iptables__min_sync_period_s", 2),
        ("--detect-local-mode=NodeCIDR", "detect_local_mode", "NodeCIDR"),
        ("--detect-local-mode=", "detect_local_mode", "ClusterCIDR"),
        ("--cluster-cidr=10.0.0.0/8", "cluster_cidr", "10.0.0.0/8"),
        ("--pod-bridge-interface=b", "detect_local__bridge_interface", "b"),
        ("--pod-interface-name-prefix=p", "detect_local__interface_name_prefix", "p"),
        ("--nodeport-addresses=primary", "node_port_addresses", ("primary",)),
        ("--oom-score-adj=-5", "oom_score_adj", -5),
        ("--conntrack-max-per-core=0", "conntrack__max_per_core", 0),
        ("--conntrack-min=0", "conntrack__min", 0),
        ("--conntrack-tcp-timeout-established=0", "conntrack__tcp_established_timeout_s", 0),
        ("--conntrack-tcp-timeout-close-wait=1s", "conntrack__tcp_close_wait_timeout_s", 1),
        ("--conntrack-tcp-be-liberal", "conntrack__tcp_be_liberal", True),
        ("--conntrack-udp-timeout=1s", "conntrack__udp_timeout_s", 1),
        ("--conntrack-udp-timeout-stream=1s", "conntrack__udp_stream_timeout_s", 1),
        ("--config-sync-period=1s", "config_sync_period_s", 1),
        ("--ipvs-scheduler=rr", "ipvs__scheduler", "rr"),
        ("--logging-format=json", "logging__format", "json"),
        ("--v=3", "logging__verbosity", 3),
        ("-v=3", "logging__verbosity", 3),
        ("-v3", "logging__verbosity", 3),
        (
            "--vmodule=a*=1,b=2",
            "logging__vmodule",
            (VModule(file_pattern="a*", verbosity=1), VModule(file_pattern="b", verbosity=2)),
        ),
        ("--log-flush-frequency=1s", "logging__flush_frequency_s", 1),
    ],
)
def test_flag_sets_its_field(arg, path, value):
    assert settings(arg).config == changed(**{path: value})


def test_the_bind_address_flag_leaves_the_servers_where_they_are():
    effective = settings("--bind-address=::1").config

    assert effective.healthz_bind_address == "0.0.0.0:10256"
    assert effective.metrics_bind_address == "127.0.0.1:10249"


@pytest.mark.parametrize(
    "args",
    [
        ("--boot-id-file=/x",),
        ("--machine-id-file=/x",),
        ("--ipvs-sync-period=1s",),
        ("--ipvs-min-sync-period=1s",),
        ("--log-text-info-buffer-size=0",),
        ("--log-json-split-stream=false",),
    ],
)
def test_flag_is_accepted_and_changes_nothing(args):
    assert settings(*args).config == KubeProxyConfiguration()


def test_ipvs_flags_are_warned_of():
    assert settings("--ipvs-scheduler=rr").warnings == (
        "--ipvs-scheduler has no effect in iptables mode",
    )


def test_our_own_flags():
    given = settings(
        "--manifests=/a,b", "--manifests", "/c", "--dispatch=flat", "--iptables-backend=nft"
    )

    assert given.manifests == ("/a,b", "/c")
    assert (given.dispatch, given.iptables_backend) == ("flat", "nft")


def test_traffic_is_counted_where_that_is_asked_for():
    assert settings().traffic is None
    assert settings("--traffic-metrics=service").traffic == flags.Traffic(
        detail="service", max_series=500, state_file="/run/kubeproxy-py/traffic.json"
    )
    assert settings(
        "--traffic-metrics=endpoint",
        "--traffic-metrics-max-series=10",
        "--traffic-metrics-namespaces=a,b",
        "--traffic-metrics-state=",
    ).traffic == flags.Traffic(detail="endpoint", max_series=10, namespaces=("a", "b"))


def test_services_to_count_may_be_chosen_by_label():
    text = "team=payments,tier in (web, api)"
    found = settings("--traffic-metrics=service", f"--traffic-metrics-selector={text}")

    assert found.traffic is not None
    assert found.traffic.selector == label_selector.parse(text)
    assert found.flag_values["traffic-metrics-selector"] == text


def test_bytes_are_counted_with_connections_only():
    counted = settings("--traffic-metrics=service", "--traffic-metrics-bytes").traffic

    assert counted is not None
    assert counted.has_bytes
    with pytest.raises(ConfigError, match="cannot use --traffic-metrics-bytes without"):
        settings("--traffic-metrics-bytes")


def test_flags_that_choose_what_run_does():
    given = settings("--init-only", "--cleanup", "--write-config-to=/w", "--master=http://m")

    assert (given.init_only, given.cleanup) == (True, True)
    assert (given.write_config_to, given.master) == ("/w", "http://m")


@pytest.mark.parametrize(
    ("args", "min_sync_period_s"),
    [
        ((), None),
        (("--iptables-min-sync-period=0",), None),
        (("--iptables-min-sync-period=1s",), 1),
    ],
)
def test_pacing_is_adaptive_unless_a_minimum_is_set(args, min_sync_period_s):
    assert settings(*args).min_sync_period_s == min_sync_period_s


# --- spelling


def test_underscores_stand_for_dashes():
    given = settings("--proxy_mode=ipvs", "--masquerade_all", "--oom_score_adj", "-7")

    assert given.config == changed(mode="ipvs", iptables__masquerade_all=True, oom_score_adj=-7)


@pytest.mark.parametrize("text", ["1", "t", "T", "true", "TRUE", "True"])
def test_a_boolean_may_be_written_as_true(text):
    assert settings(f"--masquerade-all={text}").config.iptables.masquerade_all


@pytest.mark.parametrize("text", ["0", "f", "F", "false", "FALSE", "False"])
def test_a_boolean_may_be_written_as_false(text):
    given = settings(f"--iptables-localhost-nodeports={text}")

    assert not given.config.iptables.localhost_node_ports


def test_a_boolean_does_not_swallow_the_next_argument():
    target, given, _ = explain.main(["--masquerade-all", "default/web"], standalone_mode=False)

    assert target == "default/web"
    assert given.config.iptables.masquerade_all


def test_arguments_after_two_dashes_are_no_flags():
    target, given, _ = explain.main(["--", "--masquerade-all"], standalone_mode=False)

    assert target == "--masquerade-all"
    assert not given.config.iptables.masquerade_all


def test_the_last_of_several_occurrences_wins():
    given = settings("--cluster-cidr=10.0.0.0/8", "--cluster-cidr=11.0.0.0/8")

    assert given.config.cluster_cidr == "11.0.0.0/8"


def test_list_flags_accumulate():
    given = settings(
        "--nodeport-addresses=10.0.0.0/8,11.0.0.0/8", "--nodeport-addresses=12.0.0.0/8"
    )

    assert given.config.node_port_addresses == ("10.0.0.0/8", "11.0.0.0/8", "12.0.0.0/8")


def test_cidrs_are_kept_in_their_canonical_spelling():
    given = settings("--external-ips-allow=192.0.2.9/24, FD00:0::/64", "--external-ips-allow=")

    assert given.external_ips_allow == ("192.0.2.0/24", "fd00::/64")
    assert given.flag_values["external-ips-allow"] == "[192.0.2.0/24,fd00::/64]"


def test_feature_gates_are_merged():
    given = settings("--feature-gates=A=true,B=true", "--feature-gates", "B=false, C=true")

    assert given.config.feature_gates == {"A": True, "B": False, "C": True}


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("--bind-address=foo", '"foo" is not a valid IP address'),
        ("--metrics-bind-address=foo", '"foo" is not a valid IP address'),
        ("--metrics-bind-address=127.0.0.1:99999999", '"99999999" is not a valid number'),
        ("--masquerade-all=maybe", '"maybe" is not a boolean'),
        ("--iptables-sync-period=30", 'time: missing unit in duration "30"'),
        ("--iptables-masquerade-bit=x", '"x" is not an integer'),
        ("--oom-score-adj=4294967296", '"4294967296" is out of range'),
        ("--kube-api-qps=nan", '"nan" is not a number'),
        ("--feature-gates=A", '"A" is malformed'),
        ("--feature-gates=A=2", 'invalid value of A: "2"'),
        ("--vmodule=a", '"a" does not have the pattern=N format'),
        ("--v=-1", '"-1" is out of range'),
        ("--dispatch=round", '"round" is not one of auto, flat, tree'),
        ("--traffic-metrics=all", '"all" is not one of off, service, endpoint'),
        ("--traffic-metrics-max-series=0", '"0" is out of range'),
        ("--traffic-metrics-selector=team in web", 'cannot parse label selector "team in web"'),
        ("--traffic-metrics-namespaces=a,B", '"B" is not the name of a namespace'),
        ("--manifests=", "a path must not be empty"),
        ('--nodeport-addresses="a', "unexpected end of data"),
        ("--external-ips-allow=10.0.0.0/8,x", '"x" is not a CIDR'),
        ("--external-ips-allow=10.0.0.1", '"10.0.0.1" is not a CIDR'),
    ],
)
def test_bad_text_is_a_usage_error_that_names_the_flag(arg, message):
    with pytest.raises(click.BadParameter) as raised:
        settings(arg)

    assert message in raised.value.message
    assert arg.partition("=")[0] in raised.value.format_message()


@pytest.mark.parametrize(
    "arg",
    [
        "--nope",
        "--ipv6-dual-stack",
        "--cleanup-ipvs",
        "--proxy-port-range=1-2",
        "--udp-timeout=1s",
        "--logtostderr",
    ],
)
def test_flags_that_were_removed_are_unknown(arg):
    with pytest.raises(click.NoSuchOption):
        settings(arg)


@pytest.mark.parametrize("kind", ["healthz", "metrics"])
def test_deprecated_port_flags_say_what_to_use(kind):
    result = CliRunner().invoke(run, [f"--{kind}-port=1"])

    assert result.stderr == (
        f"Flag --{kind}-port has been deprecated, This flag is deprecated and will be removed in a "
        f"future release. Please use --{kind}-bind-address instead.\n"
    )


def test_flags_that_are_not_given_are_not_told_of():
    result = CliRunner().invoke(run, [])

    assert result.output == ""


def test_deprecated_port_flags_complete_an_address_without_port():
    effective = settings(
        "--healthz-port=1",
        "--metrics-port=2",
        "--healthz-bind-address=1.2.3.4",
        "--metrics-bind-address=1.2.3.4:9",
    ).config

    assert effective.healthz_bind_address == "1.2.3.4:1"
    assert effective.metrics_bind_address == "1.2.3.4:9"


def test_healthz_port_zero_disables_the_health_server():
    assert settings("--healthz-port=0").healthz_disabled
    assert not settings("--healthz-bind-address=").healthz_disabled


def test_hidden_flags_are_not_in_the_help_and_every_other_one_is():
    shown = CliRunner().invoke(run, ["-h"]).output

    assert "--healthz-port" not in shown
    assert "--ipvs-scheduler" not in shown
    assert "--conntrack-tcp-timeout-established DURATION" in shown
    assert "[default: 24h0m0s]" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arg", "output"),
    [
        ("--version", "Kubernetes v1.36.2\n"),
        ("--version=raw", "kubeproxy-py 0.1.0, behaving as Kubernetes v1.36.2\n"),
    ],
)
def test_the_version_is_printed(arg, output):
    result = CliRunner().invoke(run, [arg, "--metrics-port=0"])

    assert (result.exit_code, result.stdout) == (0, output)


# --- problems


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--metrics-port=0",),
            'failed validate: KubeProxyConfiguration.MetricsBindAddress: Invalid value: "": '
            "must be IP:port",
        ),
        (
            ("--hostname-override=  ",),
            "failed complete: empty hostname-override is invalid",
        ),
        (
            ("--logging-format=foo",),
            'initialize logging: logging.format: Invalid value: "foo": Unsupported log format',
        ),
        (
            ("--logging-format=json", "--log-json-split-stream"),
            "initialize logging: logging.options.json.splitStream: Forbidden: "
            "Feature LoggingAlphaOptions is disabled",
        ),
        (
            ("--feature-gates=PreferSameTrafficDistribution=false",),
            "failed complete: cannot set feature gate PreferSameTrafficDistribution to false, "
            "feature is locked to true",
        ),
        (
            ("--config=/nonexistent", "--metrics-port=0"),
            "failed complete: open /nonexistent: no such file or directory",
        ),
    ],
)
def test_problem_is_reported_as_kube_proxy_reports_it(args, message):
    with pytest.raises(ConfigError) as raised:
        settings(*args)

    assert str(raised.value) == message


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as raised:
        settings(
            "--hostname-override= ",
            "--feature-gates=NFTablesProxyMode=false",
            "--logging-format=foo",
            "--iptables-masquerade-bit=32",
            "--oom-score-adj=2000",
        )

    assert str(raised.value) == (
        "failed complete: [empty hostname-override is invalid, cannot set feature gate "
        "NFTablesProxyMode to false, feature is locked to true]; "
        'initialize logging: logging.format: Invalid value: "foo": Unsupported log format; '
        "failed validate: [KubeProxyConfiguration.KubeProxyIPTablesConfiguration.MasqueradeBit: "
        "Invalid value: 32: must be within the range [0, 31], "
        "KubeProxyConfiguration.KubeProxyLinuxConfiguration.OOMScoreAdj: Invalid value: 2000: must "
        "be within the range [-1000, 1000]]"
    )


def test_a_file_is_judged_with_its_own_defaults(config_file):
    arg = config_file("mode: kernelspace\nbindAddress: foo\nhealthzBindAddress: abc\n")

    with pytest.raises(ConfigError) as raised:
        settings(arg)

    assert str(raised.value) == (
        'failed validate: [KubeProxyConfiguration.Mode.ProxyMode: Invalid value: "kernelspace": must '
        "be iptables, ipvs, nftables or blank (blank means the best-available proxy [currently "
        'iptables]), KubeProxyConfiguration.BindAddress: Invalid value: "foo": not a valid textual '
        "representation of an IP address, KubeProxyConfiguration.HealthzBindAddress: Invalid value: "
        '"abc": must be IP:port]'
    )


# --- flags and file


@pytest.mark.parametrize(
    "arg",
    [
        "--kubeconfig=/k",
        "--feature-gates=AllowServiceExternalIPs=false",
        "--proxy-mode=ipvs",
        "--cluster-cidr=10.0.0.0/8",
        "--nodeport-addresses=primary",
        "--profiling",
        "--bind-address-hard-fail",
        "--iptables-masquerade-bit=99",
        "--healthz-port=0",
        "--metrics-port=0",
        "--ipvs-scheduler=rr",
    ],
)
def test_a_file_makes_the_flag_void_and_this_is_said(config_file, arg):
    given = settings(config_file(), arg)

    assert given.config == KubeProxyConfiguration()
    assert given.warnings == (
        f"--config is given, so these flags are ignored: {arg.partition('=')[0]}",
    )


def test_flags_that_still_count_beside_a_file(config_file):
    file = config_file(
        "hostnameOverride: other\nlogging: {verbosity: 1, vmodule: [{filePattern: f, verbosity: 1}]}"
    )

    given = settings(
        file,
        "--hostname-override=Node1",
        "-v=4",
        "--vmodule=g=2",
        "--log-flush-frequency=1s",
        "--master=http://m",
        "--init-only",
        "--dispatch=flat",
        "--external-ips-allow=192.0.2.0/24",
        "--manifests=/m",
    )

    assert given.warnings == ()
    assert given.config == changed(
        hostname_override="node1",
        logging__verbosity=4,
        logging__flush_frequency_s=1,
        logging__vmodule=(
            VModule(file_pattern="g", verbosity=2),
            VModule(file_pattern="f", verbosity=1),
        ),
    )
    assert (given.master, given.init_only) == ("http://m", True)
    assert (given.dispatch, given.manifests) == ("flat", ("/m",))
    assert given.external_ips_allow == ("192.0.2.0/24",)


def test_defaults_of_flags_do_not_override_the_file(config_file):
    given = settings(config_file("logging: {verbosity: 3}\nhostnameOverride: node1"))

    assert given.config.logging.verbosity == 3
    assert given.hostname_override == "node1"


def test_warnings_of_the_file_are_passed_on(config_file):
    (warning,) = settings(config_file("foo: 1")).warnings

    assert 'unknown field "foo"' in warning


# --- pages and files about the settings


SAMPLE_ARGS = (
    "--kubeconfig=kubeconfig",
    "--hostname-override=node1",
    "--cluster-cidr=10.180.0.0/16",
    "--conntrack-max-per-core=0",
    "--conntrack-tcp-timeout-established=0",
    "--conntrack-tcp-timeout-close-wait=0",
    "-v=4",
)


def test_configz_is_kube_proxys():
    assert config.to_json(settings(*SAMPLE_ARGS).config).decode() == CONFIGZ


def test_flagz_is_kube_proxys_and_our_own_flags():
    shown = settings(*SAMPLE_ARGS).flag_values

    assert list(shown) == sorted(shown)
    assert shown.keys() >= OUR_FLAGS
    text = "".join(f"{name}={shown[name]}\n" for name in shown if name not in OUR_FLAGS)
    assert text == FLAGZ


@pytest.mark.parametrize(
    ("arg", "text"),
    [
        ("--feature-gates=B=false,A=true", "A=true,B=false"),
        ("--nodeport-addresses=10.0.0.0/8,fd00::/64", "[10.0.0.0/8,fd00::/64]"),
        ("--kube-api-qps=2.5", "2.5"),
        ("--iptables-min-sync-period=500ms", "500ms"),
        ("--vmodule=a=1", "a=1"),
    ],
)
def test_flagz_shows_a_value_as_go_does(arg, text):
    name = arg.partition("=")[0].removeprefix("--")

    assert settings(arg).flag_values[name] == text


def test_flagz_shows_the_command_line_where_a_file_has_taken_its_place(config_file):
    shown = settings(config_file("mode: iptables"), "--cluster-cidr=10.0.0.0/8").flag_values

    assert (shown["proxy-mode"], shown["cluster-cidr"]) == ("", "10.0.0.0/8")


def test_the_written_configuration_is_kube_proxys():
    written = config.to_yaml(settings("--iptables-masquerade-bit=3", "--v=3").config)

    shown = json.loads(config.to_json(changed(iptables__masquerade_bit=3, logging__verbosity=3)))
    wanted = shown["kubeproxy.config.k8s.io"]
    # The one deviation: unset stays unset when the file is read again.
    wanted["iptables"]["minSyncPeriod"] = "0s"
    assert yaml.safe_load(written) == wanted
    assert written.startswith(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nbindAddress: 0.0.0.0\n"
    )
    assert '  acceptContentTypes: ""\n' in written
    assert '      infoBufferSize: "0"\n' in written
    assert "nodePortAddresses: null\n" in written


def test_the_written_configuration_is_the_same_when_read_again(tmp_path):
    path = tmp_path / "written.yaml"
    given = settings("--bind-address=::1", "--cluster-cidr=10.0.0.0/8,fd00::/64", *SAMPLE_ARGS[3:])
    path.write_text(config.to_yaml(given.config))

    assert settings(f"--config={path}").config == given.config


# --- facts of the host


def facts(*args):
    _, _, host_facts = explain.main([*args], standalone_mode=False)
    return host_facts


def test_a_host_has_everything_unless_told_otherwise():
    assert facts() == flags.HostFacts(
        nfacct=True, random_fully=True, conntrack_tcp_be_liberal=False, ip_family=None
    )


def test_facts_of_the_host_are_collected():
    given = facts(
        "--ip-family=ipv6",
        "--node-ip=192.168.0.2",
        "--node-ip=FD00::2",
        "--interface-address=eth0=192.168.0.2/24",
        "--interface-address=eth0=FD00::2/64",
        "--topology-label=topology.kubernetes.io/zone=zone-a",
        "--no-nfacct",
        "--no-random-fully",
        "--conntrack-tcp-be-liberal",
    )

    assert given == flags.HostFacts(
        node_ips=("192.168.0.2", "fd00::2"),
        interface_addresses=(("eth0", "192.168.0.2/24"), ("eth0", "fd00::2/64")),
        topology_labels={"topology.kubernetes.io/zone": "zone-a"},
        nfacct=False,
        random_fully=False,
        conntrack_tcp_be_liberal=True,
        ip_family=IPFamily.V6,
    )


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("--node-ip=foo", '"foo" is not a valid IP address'),
        ("--interface-address=192.168.0.2/24", "is not DEV=CIDR"),
        ("--interface-address==192.168.0.2/24", "is not DEV=CIDR"),
        ("--interface-address=eth0=192.168.0.2", "is not DEV=CIDR"),
        ("--interface-address=eth0=192.168.0.2/33", "is not DEV=CIDR"),
        ("--topology-label=zone", "is not KEY=VALUE"),
        ("--topology-label==zone", "is not KEY=VALUE"),
        ("--ip-family=ipv5", '"ipv5" is not one of ipv4, ipv6'),
    ],
)
def test_a_bad_fact_is_a_usage_error_that_names_the_flag(arg, message):
    with pytest.raises(click.BadParameter) as raised:
        facts(arg)

    assert message in raised.value.message
    assert arg.partition("=")[0] in raised.value.format_message()


def test_cleanup_takes_few_flags():
    @click.command(cls=flag_types.Command)
    @flags.cleanup_flags
    def cleanup(flag_values):
        return flags.settings_from_flags(flag_values)

    given = cleanup.main(["-v", "4"], standalone_mode=False)

    assert given.config.logging.verbosity == 4
    with pytest.raises(click.NoSuchOption):
        cleanup.main(["--conntrack-min=1"], standalone_mode=False)
