"""Certificates for one run of the tests' API server, made with ``openssl`` and gone with it."""

import dataclasses
import subprocess
from pathlib import Path
from typing import Self


@dataclasses.dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files: an authority, and what it has signed for the server and for a client."""

    authority: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path

    @classmethod
    def make(cls, directory: Path, host: str) -> Self:
        """Write all files into *directory*; the server's certificate is for the IP address *host*.

        Raises FileNotFoundError without openssl, CalledProcessError if it fails.
        """
        # Without a keyUsage, as those of some real clusters.
        authority, authority_key = _sign(directory, "ca", "/CN=test-ca", None, [])
        signer = (authority, authority_key)
        alternative = f"subjectAltName=IP:{host},DNS:localhost,DNS:kubernetes.default.svc"
        server, server_key = _sign(
            directory, "server", "/CN=kube-apiserver", signer, ["-addext", alternative]
        )
        client, client_key = _sign(
            directory, "client", "/O=system:node-proxiers/CN=kube-proxy", signer, []
        )
        return cls(authority, server, server_key, client, client_key)


def _sign(
    directory: Path,
    name: str,
    subject: str,
    signer: tuple[Path, Path] | None,
    extra: list[str],
) -> tuple[Path, Path]:
    certificate, key = directory / f"{name}.crt", directory / f"{name}.key"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    argv += ["-nodes", "-days", "2", "-subj", subject, "-keyout", str(key), "-out"]
    argv += [str(certificate), *extra]
    if signer is not None:
        argv += ["-CA", str(signer[0]), "-CAkey", str(signer[1])]
        argv += ["-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run(argv, check=True, capture_output=True, text=True)
    return certificate, key
