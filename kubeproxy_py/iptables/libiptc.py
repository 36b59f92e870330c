"""
Small reads of legacy tables through python-iptables: is a chain there?

The only importer of ``iptc``, which is imported when it is first asked for and may be missing: its C
part binds the host's libxtables when it is loaded, and a host without legacy tables needs none of it.
It is blind to nft, and takes milliseconds a rule, so it is never used for more than chain names.
"""

import contextlib
import importlib
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Final

import structlog

from kubeproxy_py.model import IPFamily

log = structlog.get_logger()

#: Where the kernel lists the legacy tables it has in this network namespace.
TABLE_LISTS: Final = {
    IPFamily.V4: Path("/proc/net/ip_tables_names"),
    IPFamily.V6: Path("/proc/net/ip6_tables_names"),
}


def has_any_chain(family: IPFamily, table: str, names: AbstractSet[str]) -> bool:
    """Tell whether legacy *table* has a chain of one of these names; False if it cannot be read.

    Reading creates a legacy table that does not exist: callers ask only for one that does.
    """
    iptc = _load()
    if iptc is None:
        return False
    kind = iptc.Table if family is IPFamily.V4 else iptc.Table6
    try:
        handle = kind(table)
        handle.refresh()
        found = any(handle.is_chain(name) for name in names)
        with contextlib.suppress(iptc.IPTCError):
            # Without this the snapshot of the table stays in memory as long as the process.
            handle.close()
    except iptc.IPTCError as error:
        log.warning("libiptc.read_failed", table=table, ip_family=family.value, error=str(error))
        return False
    return bool(found)


def _load() -> Any | None:
    try:
        return importlib.import_module("iptc")
    except Exception as error:  # noqa: BLE001 - loading C libraries fails in many ways; none matters
        log.info("libiptc.unavailable", error=str(error))
        return None
