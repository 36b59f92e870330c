"""
`kubeproxy-py check` again and again in one process, with some of the host's files replaced.

As a program, inside a namespace: ``python -m tests.support.preflight``. Each line of standard input is
a request as JSON: ``arguments``, ``overlay`` (a directory below which each file is looked for first:
what a namespace shares with the machine), ``path`` (where programs are). Each is answered by a line,
what ``check --output json`` would print, because starting Python takes longer than a check.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from kubeproxy_py import flag_types, flags
from kubeproxy_py import log as logging
from kubeproxy_py.preflight import collect, command, text
from tests.support.netns import Namespace


class Checker:
    """Such a process in *namespace*; for one thread at a time."""

    def __init__(self, namespace: Namespace) -> None:
        self._process = namespace.popen(
            [sys.executable, "-m", "tests.support.preflight"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def check(self, arguments: Sequence[str], overlay: Path, path: str) -> list[dict[str, Any]]:
        """Return the findings, as JSON has them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"arguments": list(arguments), "overlay": str(overlay), "path": path}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        found: list[dict[str, Any]] = json.loads(self._process.stdout.readline())["findings"]
        return found


@click.command(cls=flag_types.Command)
@flags.proxy_flags
@click.option("--overlay", required=True)
def _check(flag_values: flags.FlagValues, overlay: str) -> None:
    files = collect.Files([Path(overlay), Path("/")])
    answer = json.loads(text.as_json(command.check(flag_values, files)))
    click.echo(json.dumps(answer))


def _serve() -> None:
    logging.configure(verbosity=-1)
    for line in sys.stdin:
        request = json.loads(line)
        os.environ["PATH"] = request["path"]
        arguments = ["--overlay", request["overlay"], *request["arguments"]]
        _check.main(args=arguments, standalone_mode=False)
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
