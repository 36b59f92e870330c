"""What kube-proxy itself does to the tables, as far as a node that changes hands depends on it."""

from typing import Final

from kubeproxy_py.model import Tables

#: The chains of its nat that kube-proxy takes for a Service's, and deletes if it knows no such one.
_PREFIXES: Final = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-FW-", "KUBE-EXT-")


def first_sync(wanted: Tables, live: Tables) -> str:
    """Return the input of kube-proxy's first sync: all chains anew, and stale ones of nat go.

    *wanted* are its chains; it makes its canaries by other means.
    """
    lines: list[str] = []
    for table in ("filter", "nat"):
        chains = {
            name: texts for name, texts in wanted[table].items() if not name.endswith("-CANARY")
        }
        stale = sorted(
            name
            for name in live[table]
            if table == "nat" and name.startswith(_PREFIXES) and name not in chains
        )
        lines.append(f"*{table}")
        lines += [f":{name} - [0:0]" for name in (*chains, *stale)]
        lines += [f"-A {name} {text}" for name, texts in chains.items() for text in texts]
        lines += [f"-X {name}" for name in stale]
        lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines)
