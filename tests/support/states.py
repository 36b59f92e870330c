"""
Cluster states in the API's JSON → objects, and what the rules need of them.

``service_states`` is the short way that does without a Store: the reference for tests that compare.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from kubeproxy_py import objects, records, rules
from kubeproxy_py.model import IPFamily, ServiceName, ServiceState
from tests.support.builders import Json

#: Cluster states with the rules that kube-proxy made of them; see the README there.
GOLDEN: Final = Path(__file__).parent.parent / "unit" / "golden"


def golden_items(name: str) -> list[Json]:
    """Return the objects of golden/NAME.json."""
    items: list[Json] = json.loads((GOLDEN / f"{name}.json").read_text())["items"]
    return items


def decode(item: Json) -> objects.Object:
    """Return an API object as the watch would decode it; its kind must be one that is watched."""
    return msgspec.convert(item, objects.TYPES[item["kind"]])


def service_states(
    items: Iterable[Json], family: IPFamily, *, node_name: str = "node1"
) -> dict[ServiceName, ServiceState]:
    """Return the Services among *items* that exist in *family*, with their endpoints."""
    ports, slices = {}, []
    for item in items:
        if item["kind"] == "Service":
            service = msgspec.convert(item, objects.Service)
            record = records.service_record(service)
            if family in record.ports:
                ports[record.name] = record.ports[family]
        elif item["kind"] == "EndpointSlice":
            eps = msgspec.convert(item, objects.EndpointSlice)
            slice_record, _ = records.slice_record(eps, node_name=node_name)
            if slice_record is not None and slice_record.family is family:
                slices.append(slice_record)
    return {
        name: ServiceState(
            of_service,
            records.merge_slices([record for record in slices if record.service == name]),
        )
        for name, of_service in ports.items()
    }


def golden_options(family: IPFamily) -> rules.Options:
    """Return the options of the node on which the golden rules were made."""
    if family is IPFamily.V6:
        return rules.Options(family=family, node_name="node1", zone="zone-a", has_nfacct=True)
    return rules.Options(
        family=family,
        node_name="node1",
        zone="zone-a",
        node_ip="192.168.0.2",
        local_detector=rules.LocalDetector("-s", "10.180.0.0/16"),
        localhost_node_ports=True,
        has_nfacct=True,
    )
