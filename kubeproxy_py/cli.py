"""argv → settings → one of the sub-commands → exit status. What they do is other modules' business."""

import dataclasses
import functools
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn, cast

import click
import msgspec
import structlog

import kubeproxy_py
from kubeproxy_py import (
    addresses,
    config,
    daemon,
    desired,
    explain_command,
    flag_types,
    flags,
    host,
    hostnet,
    nfacct,
    preview,
    preview_text,
    privileges,
    status_command,
    status_socket,
    status_text,
    sync,
    sysctls,
    top,
    top_command,
)
from kubeproxy_py import cleanup as cleaning
from kubeproxy_py import log as logging
from kubeproxy_py import rules as rule_names
from kubeproxy_py.errors import BackendMissing, ConfigError, KubeProxyError
from kubeproxy_py.iptables import plan, runner
from kubeproxy_py.model import IPFamily, Problem
from kubeproxy_py.preflight import command as preflight
from kubeproxy_py.preflight import findings
from kubeproxy_py.preflight import text as preflight_text
from kubeproxy_py.ruleset import Ruleset
from kubeproxy_py.store import Store

log = structlog.get_logger()

#: As terraform plan -detailed-exitcode: nothing would change, something would.
_EXIT_NOTHING: Final = 0
_EXIT_CHANGES: Final = 2
_EXIT_ERROR: Final = 1


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(kubeproxy_py.__version__, message=flags.VERSION)
def cli() -> None:
    """A kube-proxy for Linux nodes (iptables mode) that diffs, explains and repairs its rules."""


def _settings(flag_values: flags.FlagValues) -> flags.Settings:
    """Return the settings and let logging follow them. Raises ConfigError."""
    settings = flags.settings_from_flags(flag_values)
    chosen = settings.config.logging
    logging.configure(fmt="json" if chosen.format == "json" else "text", verbosity=chosen.verbosity)
    for warning in settings.warnings:
        log.warning("config.warned", message=warning)
    return settings


@cli.command(
    "run", cls=flag_types.Command, short_help="Program this node's Services, until stopped."
)
@flags.proxy_flags
def run(flag_values: flags.FlagValues) -> None:
    """Program this node's Services, until stopped; rules stay in place then.

    Objects come from the API server named by --kubeconfig (or the Pod's service account), or from
    files with --manifests. All flags of kube-proxy are accepted.
    """
    settings = _settings(flag_values)
    if settings.write_config_to:
        _write_config(settings)
        return
    if settings.cleanup:
        _clean_all("both")
        return
    config.require_iptables_mode(settings.config)
    sys.exit(daemon.Daemon(settings).run())


def _write_config(settings: flags.Settings) -> None:
    path = Path(settings.write_config_to)
    try:
        path.write_text(config.to_yaml(settings.config))
    except OSError as error:
        raise ConfigError(f"cannot write configuration to {path}: {error.strerror}") from error
    log.info("config.written", path=str(path))


@cli.command(
    "render", cls=flag_types.Command, short_help="Print all rules there would be, changing nothing."
)
@flags.rule_flags
@flags.host_fact_flags
def render(flag_values: flags.FlagValues, host_facts: flags.HostFacts) -> None:
    """Print the complete rules of one family for an otherwise empty host, as iptables-restore input.

    Objects come from --manifests, or from the API server named by --kubeconfig. What `run` would learn
    from the host is stated with flags (--node-ip, --interface-address, ...), so that the same command
    prints the same everywhere.
    """
    settings = _settings(flag_values)
    family = host_facts.ip_family or IPFamily.V4
    ruleset = _build(settings, _load(settings), host_facts, family)
    # The canary chains hold no rule; they tell the daemon of a flush, and a listing of nothing.
    tables = {
        table: {name: texts for name, texts in found.items() if name != rule_names.CANARY}
        for table, found in ruleset.tables.items()
    }
    for batch in plan.plan(tables, {}, groups=ruleset.groups()):
        click.echo(batch.render(), nl=False)


@cli.command(
    "plan", cls=flag_types.Command, short_help="Print what would change on this host, by Service."
)
@flags.rule_flags
@flags.host_fact_flags
@click.option(
    "--output",
    type=click.Choice(["text", "summary", "restore", "json"]),
    default="text",
    show_default=True,
    help="text: rules by Service; summary: a line for each Service; restore: the input for "
    "iptables-restore; json: all of it, for programs.",
)
@click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Whether text is coloured; auto: on a terminal, unless NO_COLOR is set.",
)
def plan_command(
    flag_values: flags.FlagValues, host_facts: flags.HostFacts, output: str, color: str
) -> None:
    """Print what `run` would change on this host now, and change nothing.

    Objects come from the API server named by --kubeconfig, or from --manifests. Exit status: 0 nothing
    would change, 2 something would, 1 error.
    """
    settings = _settings(flag_values)
    config.require_iptables_mode(settings.config)
    privileges.require_netfilter()
    backend = host.choose_backend(settings.iptables_backend)
    found = list(_previews(settings, host_facts, backend))
    if output == "json":
        click.echo(msgspec.json.format(msgspec.json.encode([one for one, _ in found])))
    elif output == "restore":
        for one, batches in found:
            for batch in batches:
                click.echo(f"# {one.ip_family}, {one.backend}\n{batch.render()}", nl=False)
    else:
        paint = _painted if _is_coloured(color) else preview_text.plain
        for one, batches in found:
            if batches:
                text = preview_text.changes_text(one, paint, has_rules=output == "text")
                click.echo(f"{text}\n", color=True)
        for one, _ in found:
            click.echo(preview_text.summary_text(one))
    sys.exit(_EXIT_CHANGES if any(batches for _, batches in found) else _EXIT_NOTHING)


def _previews(
    settings: flags.Settings, host_facts: flags.HostFacts, backend: runner.Backend
) -> Iterator[tuple[preview.Preview, list[plan.Batch]]]:
    programs = _programs(backend, host_facts.ip_family)
    kernels = {family: runner.Iptables(found) for family, found in programs.items()}
    store = _load(settings)
    for family, kernel in kernels.items():
        ruleset = _build(settings, store, _facts_of_host(host_facts, kernel), family)
        live = kernel.save()
        # In batches of the size that `run` writes.
        limit = sync.NFT_BATCH_RULES if backend == "nft" else None
        batches = plan.plan(ruleset.tables, live, groups=ruleset.groups(), max_rules=limit)
        yield (
            preview.preview(
                live,
                batches,
                owners=ruleset.owners(),
                ip_family=family.value,
                backend=backend,
                services=ruleset.service_count,
            ),
            batches,
        )


_PAINT: Final = {"+": "green", "-": "red", "~": "yellow"}


def _painted(text: str, sign: str) -> str:
    return click.style(text, fg=_PAINT[sign])


def _is_coloured(wanted: str) -> bool:
    if wanted == "auto":
        # https://no-color.org
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return wanted == "always"


def _programs(
    backend: runner.Backend, asked_for: IPFamily | None
) -> dict[IPFamily, runner.Programs]:
    """Return the programs of the family *asked_for*, else of those that `run` would program."""
    if asked_for is not None:
        return {asked_for: runner.find_programs(asked_for, backend)}
    found: dict[IPFamily, runner.Programs] = {}
    missing: list[str] = []
    for family in host.usable_families():
        try:
            found[family] = runner.find_programs(family, backend)
        except BackendMissing as error:
            missing.append(str(error))
    if not found:
        raise BackendMissing("; ".join(missing))
    return found


@cli.command(
    "explain",
    cls=flag_types.Command,
    short_help="Tell what becomes of a packet or a Service's clients.",
)
@flags.rule_flags
@flags.host_fact_flags
@click.argument("service", required=False, default="", metavar="[NAMESPACE/NAME]")
@click.option(
    "--from", "source", default="", metavar="IP", help="Who sends; this node if not said."
)
@click.option("--to", default="", metavar="IP:PORT/PROTO", help="Where to; tcp if not said.")
@click.option("--in-interface", default="", metavar="DEV", help="By which interface it comes.")
@click.option("--live", "is_live", is_flag=True, help="Look at the rules this host has now.")
@click.option(
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Text for people, or JSON for programs.",
)
def explain(
    flag_values: flags.FlagValues, host_facts: flags.HostFacts, output: str, **asked: Any
) -> None:
    r"""Walk a packet, or all who may use a Service, through the rules: what becomes of it, and why.

    The rules are those that `run` would write, for the objects of --manifests or of the API server, or
    with --live those that this host has. Exit status: 0 explained, 1 error.

    \b
    kubeproxy-py explain default/web --kubeconfig ...
    kubeproxy-py explain --live --from 10.244.1.7 --to 10.96.0.10:53/udp
    """
    settings = _settings(flag_values)
    question = explain_command.Question(**asked)
    if question.is_live and settings.manifests:
        raise ConfigError("cannot use --manifests with --live: this host's rules are looked at")

    # Once for both families, and only where they are asked for.
    load = functools.cache(lambda: _load(settings))

    def find(family: IPFamily) -> explain_command.Situation:
        if question.is_live:
            return explain_command.live(settings, host_facts, family)
        return explain_command.desired(_build(settings, load(), host_facts, family), host_facts)

    families = [host_facts.ip_family] if host_facts.ip_family else list(IPFamily)
    if question.is_live and not hostnet.has_ipv6():
        families = [family for family in families if family is not IPFamily.V6]
    bold = functools.partial(click.style, bold=True) if sys.stdout.isatty() else str
    click.echo(
        explain_command.answer(question, find, families, as_json=output == "json", bold=bold)
    )


#: Where the commands that ask the running daemon find it.
_status_socket_flag = click.option(
    "--status-socket",
    "path",
    default=status_socket.DEFAULT_PATH,
    show_default=True,
    metavar="PATH",
    help="Where the daemon listens (its flag of the same name).",
)


@cli.command("status", short_help="Ask the running daemon how it is.")
@_status_socket_flag
@click.option(
    "--last-failure",
    is_flag=True,
    help="Show the last iptables call that failed, with the rules around the refused one.",
)
@click.option(
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Text for people, or JSON for programs (docs/status.schema.json).",
)
def status(path: str, output: str, *, last_failure: bool) -> None:
    """Ask the daemon of this node how it is: syncs, watches, drift, and what is wrong.

    Exit status: 0 ready, 2 not ready or degraded, 1 it cannot be asked. Only root may ask.
    """
    if last_failure:
        click.echo(status_command.tell_failures(path, as_json=output == "json"))
        return
    colour = _coloured if sys.stdout.isatty() else status_text.plain
    text, exit_status = status_command.tell(path, as_json=output == "json", colour=colour)
    click.echo(text)
    sys.exit(exit_status)


_COLOURS: Final = {"ready": "green", "degraded": "yellow", "not ready": "red"}


def _coloured(text: str, state: str) -> str:
    return click.style(text, fg=_COLOURS[state], bold=True)


@cli.command("top")
@click.option(
    "--interval", type=float, default=2.0, show_default=True, help="Seconds between two looks."
)
@click.option(
    "--namespace",
    type=flag_types.Namespaces(),
    multiple=True,
    help="Only Services of this namespace; may be repeated.",
)
@click.option("--sort", type=click.Choice(top.SORTS), default="rate", show_default=True)
@click.option("--once", is_flag=True, help="Print what happened in one interval, and end.")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--ip-family", type=flag_types.Choice("ipv4", "ipv6"), help="Only this family.")
@click.option(
    "--iptables-backend",
    type=flag_types.Choice("auto", "nft", "legacy"),
    default="auto",
    show_default=True,
    help="Which iptables programs to use; auto takes the ones this node's other programs use.",
)
def top_of_services(
    interval: float,
    namespace: tuple[tuple[str, ...], ...],
    sort: top.Sort,
    *,
    once: bool,
    output: top_command.Output,
    ip_family: str | None,
    iptables_backend: str,
) -> None:
    """Show which Services get new connections, and how many: live, or --once.

    From the counters of this host's rules, whoever wrote them: no daemon is needed.
    """
    privileges.require_netfilter()
    family = None if ip_family is None else flags.FAMILIES[ip_family]
    asked = top_command.Asked(
        interval, tuple(name for names in namespace for name in names), sort, once, output
    )
    programs = _programs(host.choose_backend(iptables_backend), family)
    top_command.run(asked, top_command.sources(programs))


def _facts_of_host(stated: flags.HostFacts, kernel: runner.Iptables) -> flags.HostFacts:
    """Complete what was stated with what `run` would find out here."""
    found = tuple(
        (address.device, f"{address.address}/{address.prefix_length}")
        for address in hostnet.local_addresses(kernel.family)
    )
    return dataclasses.replace(
        stated,
        interface_addresses=stated.interface_addresses or found,
        nfacct=stated.nfacct and nfacct.supported() and host.knows_nfacct_match(kernel),
        random_fully=stated.random_fully and kernel.programs.has_random_fully,
        conntrack_tcp_be_liberal=stated.conntrack_tcp_be_liberal or sysctls.conntrack_is_liberal(),
    )


def _load(settings: flags.Settings) -> Store:
    config.require_iptables_mode(settings.config)
    problems: list[Problem] = []
    store = desired.load(settings, host.node_name(settings.hostname_override), problems.append)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        if settings.manifests:
            # Whoever wrote them is here and can mend them.
            raise ConfigError(f"cannot use the manifests:{listed}")
        click.echo(f"left out, because invalid:{listed}", err=True)
    return store


def _build(
    settings: flags.Settings, store: Store, host_facts: flags.HostFacts, family: IPFamily
) -> Ruleset:
    node_name = host.node_name(settings.hostname_override)
    ruleset = desired.build(settings, store, host_facts, node_name, family)
    refused = [found for found in store.refusals() if addresses.family_of(found.ip) is family]
    if refused:
        listed = "".join(f"\n  {refusal}" for refusal in refused)
        click.echo(f"left out, as the daemon would:{listed}", err=True)
    return ruleset


@cli.command(
    "check", cls=flag_types.Command, short_help="Look for what would trouble `run` on this host."
)
@flags.proxy_flags
@click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--verbose", is_flag=True, help="Show what is well, too.")
def check(flag_values: flags.FlagValues, output: str, *, verbose: bool) -> None:
    """Look for what would trouble `run` on this host and with these flags. Changes nothing.

    Takes the flags of `run`. Without any that names a cluster or files, the host alone is looked at.
    Exit status: 0 nothing above information, 2 warnings, 1 errors.
    """
    # Findings are the log of this command; --v=1 shows that of the parts it uses.
    logging.configure(verbosity=flag_values.value("v") or -1)
    found = preflight.check(flag_values)
    if output == "json":
        click.echo(preflight_text.as_json(found))
    else:
        width, _ = shutil.get_terminal_size()
        style = _severity_style if sys.stdout.isatty() else None
        click.echo(preflight_text.as_text(found, verbose=verbose, width=width, style=style))
    sys.exit(findings.exit_status(found))


def _severity_style(text: str, severity: findings.Severity) -> str:
    colours = {"error": "red", "warning": "yellow"}
    return click.style(text, fg=colours.get(severity), bold=severity in colours)


@cli.command(
    "cleanup",
    cls=flag_types.Command,
    short_help="Remove all rules of kube-proxy and of this program.",
)
@flags.cleanup_flags
@click.option(
    "--backend",
    type=click.Choice(["both", "nft", "legacy"]),
    default="both",
    show_default=True,
    help="Whose tables to look into.",
)
def cleanup(flag_values: flags.FlagValues, backend: str) -> None:
    """Remove all rules that kube-proxy or this program has written, and nothing else.

    Services stop working on this node, until a proxy is started again; stop the one that runs first.
    Exit status: 0 all is gone, 1 something could not be removed.
    """
    _settings(flag_values)
    _clean_all(backend)


def _clean_all(backend: str) -> None:
    privileges.require_netfilter()
    backends = runner.BACKENDS if backend == "both" else (cast("runner.Backend", backend),)
    if not cleaning.clean(tuple(IPFamily), backends):
        raise KubeProxyError("encountered an error while tearing down rules")


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: every deliberate error is told in one place, with status 1."""
    logging.configure()
    try:
        # Without click's own handling, whose status for a mistyped flag would be 2: `plan` means
        # something else by that, and kube-proxy's is 1.
        status = cli.main(args=argv, prog_name="kubeproxy-py", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        status = _EXIT_ERROR
    except click.Abort:
        # Ctrl-C: whoever pressed it knows why.
        status = _EXIT_ERROR
    except KubeProxyError as error:
        log.error("command.failed", error=str(error))  # noqa: TRY400 - the text says what to do
        status = _EXIT_ERROR
    sys.exit(status if isinstance(status, int) else 0)
