"""
`kubeproxy-py check`: look at this host and, where one is named, at the cluster; judge; say it.

Only puts together: what is read, in which order, and what is left out when something is missing.
"""

from collections.abc import Callable

import msgspec

from kubeproxy_py import config, desired, flags, host, options
from kubeproxy_py.config import KubeProxyConfiguration
from kubeproxy_py.errors import ApiError, ConfigError
from kubeproxy_py.flags import Settings
from kubeproxy_py.model import IPFamily, Problem
from kubeproxy_py.preflight import ask, cluster, collect
from kubeproxy_py.preflight import host as host_judge
from kubeproxy_py.preflight.facts import ApiFacts, ClusterFacts
from kubeproxy_py.preflight.findings import Finding


def check(flag_values: flags.FlagValues, files: collect.Files | None = None) -> list[Finding]:
    """Return all findings. Raises only what is a bug."""
    settings, found = _settings(flag_values)
    # With settings that cannot be used, the host is still worth a look, with the defaults.
    usable = settings or Settings(config=KubeProxyConfiguration())
    facts = collect.collect(
        usable.config,
        backend=usable.iptables_backend,
        # Files are on disk already.
        state_file="" if usable.manifests else usable.state_file,
        files=files,
    )
    api, objects = _cluster(settings, found.append)
    ips = options.node_ips(
        usable.config.bind_address, objects.node.ips if objects and objects.node else ()
    )
    pod_cidrs = objects.node.pod_cidrs if objects and objects.node else ()
    found += host_judge.judge(facts, usable.config, ips)
    if settings is not None and objects is not None:
        # They depend on the Node's IPs.
        families = tuple(
            family
            for family in IPFamily
            if any(
                (program.backend, program.family) == (facts.backend, family)
                for program in facts.programs
            )
        )
        found += cluster.judge_doubts(settings.config, ips, pod_cidrs, families or tuple(IPFamily))
    if api is not None:
        found += cluster.judge_api(api)
    if objects is not None:
        found += cluster.judge(objects, facts, api, usable.config, ips)
    node_ports = cluster.node_ports_of(objects) if objects else ()
    port_range = host_judge.judge_port_range(facts, node_ports)
    return [*found, *([port_range] if port_range else [])]


def _settings(flag_values: flags.FlagValues) -> tuple[Settings | None, list[Finding]]:
    try:
        settings = flags.settings_from_flags(flag_values)
        config.require_iptables_mode(settings.config)
    except ConfigError as error:
        return None, [Finding("config", "error", str(error))]
    said = f"{settings.config_file} is valid" if settings.config_file else "flags are valid"
    doubts = [Finding("config-doubts", "warning", text) for text in settings.warnings]
    return settings, [Finding("config", "ok", said), *doubts]


def _cluster(
    settings: Settings | None, note: Callable[[Finding], None]
) -> tuple[ApiFacts | None, ClusterFacts | None]:
    """Read the objects, from files or the API server; note what could not be looked at."""
    if settings is None:
        note(Finding("unchecked", "info", "the cluster, until the configuration is valid"))
        return None, None
    if settings.manifests:
        return None, _objects(settings, lambda text: note(Finding("manifests", "error", text)))
    if not ask.has_source(settings):
        text = "the cluster: none of --kubeconfig, --master, --config and --manifests names one"
        note(Finding("unchecked", "info", text))
        return None, None
    api = ask.ask(settings)
    # Lists are read as `run` reads them, for which both verbs are needed.
    may_read = all(
        is_allowed
        for what, is_allowed in api.permissions.items()
        if what.startswith(("list ", "watch "))
    )
    if api.config_failure or api.failure or not may_read:
        note(Finding("unchecked", "info", "Services, Node and addresses: no objects can be read"))
        return api, None
    failures: list[str] = []
    objects = _objects(settings, failures.append)
    return msgspec.structs.replace(api, listing_failure="; ".join(failures)), objects


def _objects(settings: Settings, fail: Callable[[str], None]) -> ClusterFacts | None:
    problems: list[Problem] = []
    try:
        name = host.node_name(settings.hostname_override)
        store = desired.load(settings, name, problems.append)
    except (ConfigError, ApiError) as error:
        fail(str(error))
        return None
    states = {}
    for family in IPFamily:
        changes = store.take(family)
        assert changes is not None  # everything was listed
        states[family] = {
            service: state for service, state in changes.services.items() if state is not None
        }
    return ClusterFacts(
        node_name=name,
        node=store.node,
        services=states,
        refusals=store.refusals(),
        problems=tuple(problems),
        are_files=bool(settings.manifests),
    )
