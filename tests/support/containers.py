"""
Runs a container of a rendered Pod in a namespace of the lab, nearly as a runtime would.

Arguments, environment, mounts, capabilities, the read-only file system and a read-only /proc/sys are the
manifest's; the file system is this host's instead of an image's, and there is no seccomp profile.
Mounts are made in a mount namespace of the process alone.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tests.support.netns import Namespace

Json = dict[str, Any]
Files = Mapping[str, str]  # content by name

ACCOUNT: Final = "/var/run/secrets/kubernetes.io/serviceaccount"

_REPOSITORY: Final = Path(__file__).parents[2]
_STAGE: Final = "/run/.stage"  # where the host's side of all mounts is found while they are made
_OVERLAYS: Final = "/run/.overlays"  # what mount points that this host lacks are written to


class ContainerRunner:
    """One Pod on one node: its volumes, and a way to start its containers."""

    def __init__(
        self,
        pod: Json,
        *,
        node: Namespace,
        directory: Path,
        config_maps: Mapping[str, Files],
        account: Files,
        environ: Mapping[str, str],
    ) -> None:
        """Write the volumes' files; nothing is started yet.

        Args:
            pod: the Pod's spec
            node: where it runs
            directory: for the host's side of volumes
            config_maps: content by name
            account: the files of the service account's volume
            environ: in addition to what the containers set themselves; weaker than that
        """
        self._pod = pod
        self._node = node
        self._directory = directory
        self._environ = dict(environ)
        for volume in pod["volumes"]:
            place = directory / volume["name"]
            match volume:
                case {"configMap": {"name": name}}:
                    _write(place, config_maps[name])
                case {"hostPath": {"type": "FileOrCreate"}}:
                    place.touch()
                case _:
                    place.mkdir()
        _write(directory / "service-account", account)

    def start(self, name: str, log: Path) -> subprocess.Popen[str]:
        """Start the container *name*; what it says goes to *log*."""
        container = next(
            c for c in [*self._pod["initContainers"], *self._pod["containers"]] if c["name"] == name
        )
        environ = self._environ | {
            variable["name"]: variable.get("value") or self._node_name(variable)
            for variable in container["env"]
        }
        program, *rest = container["command"]
        assert program == "kubeproxy-py", program
        arguments = [_expanded(text, environ) for text in [*rest, *container["args"]]]
        script = self._script(
            container, [sys.executable, "-m", "kubeproxy_py", *arguments], privileges(container)
        )
        paths = {"PATH": os.environ["PATH"], "PYTHONPATH": str(_REPOSITORY)}
        with log.open("ab") as stream:
            return self._node.popen(
                ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script],
                env=paths | environ,
                cwd="/",
                stdout=subprocess.DEVNULL,
                stderr=stream,
            )

    def _node_name(self, variable: Json) -> str:
        assert variable["valueFrom"]["fieldRef"]["fieldPath"] == "spec.nodeName", variable
        return self._environ["NODE_NAME"]

    def _script(self, container: Json, command: list[str], prefix: list[str]) -> str:
        lines = [
            "mount -t tmpfs tmpfs /run",
            f"mkdir {_STAGE} {_OVERLAYS}",
            f"mount --bind {self._directory} {_STAGE}",
        ]
        mounts = [
            (m["mountPath"], m["name"], m.get("readOnly", False)) for m in container["volumeMounts"]
        ]
        # What would hide the program itself is left out. Outer directories come first.
        mounts = sorted(
            mount
            for mount in [*mounts, (ACCOUNT, "service-account", True)]
            if not any(own.is_relative_to(mount[0]) for own in (_REPOSITORY, Path(sys.executable)))
        )
        # All mount points before all mounts: an overlay hides what was mounted below it before.
        for path, volume, _ in mounts:
            lines += _mount_point(path, is_file=(self._directory / volume).is_file())
        for path, volume, is_read_only in mounts:
            lines.append(f"mount --bind {_STAGE}/{volume} {path}")
            if is_read_only:
                lines.append(f"mount -o remount,bind,ro {path}")
        context = container["securityContext"]
        if not context.get("privileged"):
            # As runtimes mount them where nobody is privileged.
            lines += ["mount --bind /proc/sys /proc/sys", "mount -o remount,bind,ro /proc/sys"]
            lines.append("mount -o remount,bind,ro /sys")
        lines.append(f"umount {_STAGE}")
        if context.get("readOnlyRootFilesystem"):
            lines.append("mount -o remount,bind,ro /")
        lines.append("exec " + shlex.join([*prefix, *command]))
        return "\n".join(lines)


def privileges(container: Json) -> list[str]:
    """Return the command that takes away what the container's security context takes away."""
    context = container["securityContext"]
    if context.get("privileged"):
        return []
    assert context["capabilities"]["drop"] == ["ALL"]
    kept = ",".join(["-all", *(f"+{name.lower()}" for name in context["capabilities"]["add"])])
    prefix = ["setpriv", f"--bounding-set={kept}", "--inh-caps=-all"]
    return [*prefix, "--no-new-privs"] if not context["allowPrivilegeEscalation"] else prefix


def _mount_point(path: str, *, is_file: bool) -> list[str]:
    """Return commands that bring *path* into being, without writing to this host's disk."""
    lines = []
    if not Path(path).resolve().is_relative_to("/run"):
        existing = next(p for p in (Path(path), *Path(path).parents) if p.exists()).resolve()
        layer = f"{_OVERLAYS}/{path.strip('/').replace('/', '-')}"
        # Directories can be made in an overlay; below it, everything stays visible.
        lines.append(
            f"[ -e {path} ] || {{ mkdir -p {layer}/upper {layer}/work;"
            f" mount -t overlay overlay {existing}"
            f" -o lowerdir={existing},upperdir={layer}/upper,workdir={layer}/work; }}"
        )
    lines.append(f"mkdir -p {Path(path).parent if is_file else path}")
    return [*lines, f"touch {path}"] if is_file else lines


def _write(directory: Path, files: Files) -> None:
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_text(content)


def _expanded(text: str, environ: Mapping[str, str]) -> str:
    for name, value in environ.items():
        text = text.replace(f"$({name})", value)
    assert "$(" not in text, text
    return text
