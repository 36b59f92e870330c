"""
API objects for tests and benchmarks: valid by default, changed by keyword.

What is returned has the API's shape and spelling, with the defaults an API server would have filled
in. Nothing here is random: same arguments, same objects. Addresses follow addresses.py; only
``cluster`` needs more pods than it plans and takes them from all of 10.0.0.0/8.
"""

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from tests.support import addresses

Json = dict[str, Any]

# The EndpointSlice controller's --max-endpoints-per-slice.
_ENDPOINTS_PER_SLICE: Final = 100
_SERVICE_PORT: Final = 80
_TARGET_PORT: Final = 8080
MAX_NODES: Final = 250  # node N is 192.168.0.(N+1) and has the pods 10.N.0.0/16


def make_service(
    name: str = "svc1",
    *,
    namespace: str = "default",
    cluster_ip: str = addresses.V4.cluster_ip,
    ports: Sequence[int | Json] = (_SERVICE_PORT,),
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    lb_ips: Sequence[str | Json] = (),
    **spec: Any,
) -> Json:
    """Return a Service of type ClusterIP.

    Args:
        name: metadata.name.
        namespace: metadata.namespace.
        cluster_ip: may be IPv6, "None" or "": then there are no ipFamilies.
        ports: numbers, or ports as the API spells them; see ``make_port``.
        labels: metadata.labels.
        annotations: metadata.annotations.
        lb_ips: status.loadBalancer.ingress: addresses, or entries as the API spells them.
        spec: any field of spec, by its API name (``externalTrafficPolicy="Local"``); None removes it.
    """
    families = _families([cluster_ip])
    return {
        "kind": "Service",
        "apiVersion": "v1",
        "metadata": _metadata(name, namespace, labels, annotations),
        "spec": _without_none(
            {
                "type": "ClusterIP",
                "clusterIP": cluster_ip,
                "clusterIPs": [cluster_ip] if cluster_ip else None,
                "ipFamilies": families or None,
                "ipFamilyPolicy": "SingleStack",
                "internalTrafficPolicy": "Cluster",
                "ports": _ports(ports),
                "selector": {"app": name},
                "sessionAffinity": "None",
            }
            | spec
        ),
        "status": {"loadBalancer": _ingress(lb_ips)},
    }


def make_port(
    port: int,
    *,
    name: str | None = None,
    protocol: str = "TCP",
    **fields: Any,
) -> Json:
    """Return a port of a Service or an EndpointSlice; *fields* by API name (``nodePort=30080``)."""
    named = {} if name is None else {"name": name}
    return {**named, "port": port, "protocol": protocol, **fields}


def make_slice(
    service: str = "svc1",
    *,
    namespace: str = "default",
    name: str | None = None,
    endpoints: Sequence[str | Json] = (addresses.V4.local_pod(1),),
    ports: Sequence[int | Json] | None = (_TARGET_PORT,),
    address_type: str | None = None,
    labels: Mapping[str, str] | None = None,
    **fields: Any,
) -> Json:
    """Return an EndpointSlice of *service*.

    Args:
        service: value of the label kubernetes.io/service-name.
        namespace: metadata.namespace.
        name: metadata.name; ``SERVICE-abcde`` unless told.
        endpoints: addresses (ready, on node1), or endpoints from ``make_endpoint``.
        ports: numbers, or ports as the API spells them; None stands for "all ports".
        address_type: of the first endpoint unless told; IPv4 if there is none.
        labels: in addition to those of the controller; an empty value for a key stays empty.
        fields: any other top-level field, by its API name.
    """
    entries = [make_endpoint(item) if isinstance(item, str) else item for item in endpoints]
    first = next((address for entry in entries for address in entry.get("addresses") or ()), "")
    families = _families([first])
    controller = {
        "kubernetes.io/service-name": service,
        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
    }
    return {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": _metadata(
            name or f"{service}-abcde", namespace, controller | dict(labels or {}), None
        ),
        "addressType": address_type or (families[0] if families else "IPv4"),
        "ports": None if ports is None else [{"name": "", **port} for port in _ports(ports)],
        "endpoints": entries,
        **fields,
    }


def make_endpoint(
    *addresses_: str,
    node: str | None = "node1",
    ready: bool | None = True,
    serving: bool | None = True,
    terminating: bool | None = False,
    zone: str | None = None,
    zone_hints: Sequence[str] = (),
    node_hints: Sequence[str] = (),
) -> Json:
    """Return an endpoint of an EndpointSlice; None leaves a field or condition out."""
    conditions = {"ready": ready, "serving": serving, "terminating": terminating}
    hints = {
        "forZones": [{"name": hint} for hint in zone_hints] or None,
        "forNodes": [{"name": hint} for hint in node_hints] or None,
    }
    return _without_none(
        {
            "addresses": list(addresses_),
            "conditions": _without_none(conditions),
            "nodeName": node,
            "zone": zone,
            "hints": _without_none(hints) or None,
        }
    )


def make_node(
    name: str = "node1",
    *,
    ips: Sequence[str] = (addresses.V4.node,),
    pod_cidrs: Sequence[str] = (addresses.V4.pod_cidr,),
    zone: str | None = "zone-a",
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    **spec: Any,
) -> Json:
    """Return a Node with *ips* as InternalIPs; *spec* by API name (``taints=[...]``)."""
    own = {"kubernetes.io/hostname": name}
    if zone is not None:
        own["topology.kubernetes.io/zone"] = zone
    pods = {"podCIDR": pod_cidrs[0], "podCIDRs": list(pod_cidrs)} if pod_cidrs else {}
    hosts = [{"type": "InternalIP", "address": ip} for ip in ips]
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": _metadata(name, None, own | dict(labels or {}), annotations),
        "spec": _without_none(pods | spec),
        "status": {
            "addresses": [*hosts, {"type": "Hostname", "address": name}],
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
        },
    }


def cluster(services: int, endpoints: int, *, nodes: int = 3) -> Iterator[Json]:
    """Yield a cluster in the order it would grow: Nodes, Services, then their EndpointSlices.

    Service N (from 0) is ``default/svc-N`` at the (N+1)th address from 172.30.0.0, with port 80 and
    *endpoints* endpoints with port 8080. Endpoints go round the nodes, ``node1`` first.

    Raises ValueError for more than the address plan holds.
    """
    if not 1 <= nodes <= MAX_NODES:
        raise ValueError(f"cannot make {nodes} nodes: 1 to {MAX_NODES} are planned")
    # 172.30.0.0/15: the plan's /16 continued into 172.31; each node's pods are a /16.
    if services >= 1 << 17 or services * endpoints > nodes * ((1 << 16) - 2):
        raise ValueError(
            f"cannot make {services} Services with {endpoints} endpoints on {nodes} nodes: "
            "not enough addresses"
        )
    for number in range(1, nodes + 1):
        ip = str(ipaddress.IPv4Address(addresses.V4.node) + number - 1)
        yield make_node(f"node{number}", ips=(ip,), pod_cidrs=(f"10.{number}.0.0/16",))
    first = ipaddress.ip_network(addresses.V4.service_cidr)[1]
    for number in range(services):
        yield make_service(f"svc-{number}", cluster_ip=str(first + number))
    for number in range(services):
        pods = range(number * endpoints, (number + 1) * endpoints)
        for start in range(0, max(1, endpoints), _ENDPOINTS_PER_SLICE):
            yield make_slice(
                f"svc-{number}",
                name=f"svc-{number}-{start // _ENDPOINTS_PER_SLICE:05d}",
                endpoints=[_pod(pod, nodes) for pod in pods[start : start + _ENDPOINTS_PER_SLICE]],
            )


def _pod(number: int, nodes: int) -> Json:
    place, node = divmod(number, nodes)
    high, low = divmod(place + 1, 256)
    return make_endpoint(f"10.{node + 1}.{high}.{low}", node=f"node{node + 1}", zone="zone-a")


def _ports(ports: Sequence[int | Json]) -> list[Json]:
    # A name is required as soon as there are several ports.
    is_only = len(ports) == 1
    return [
        {"protocol": "TCP", **port}
        if isinstance(port, dict)
        else make_port(port, name=None if is_only else f"p{port}")
        for port in ports
    ]


def _families(ips: Sequence[str]) -> list[str]:
    return ["IPv6" if ":" in ip else "IPv4" for ip in ips if ip not in ("", "None")]


def _ingress(lb_ips: Sequence[str | Json]) -> Json:
    if not lb_ips:
        return {}
    return {
        "ingress": [
            {"ip": item, "ipMode": "VIP"} if isinstance(item, str) else item for item in lb_ips
        ]
    }


def _metadata(
    name: str,
    namespace: str | None,
    labels: Mapping[str, str] | None,
    annotations: Mapping[str, str] | None,
) -> Json:
    return _without_none(
        {
            "name": name,
            "namespace": namespace,
            "labels": dict(labels) if labels else None,
            "annotations": dict(annotations) if annotations else None,
        }
    )


def _without_none(fields: Mapping[str, Any]) -> Json:
    return {name: value for name, value in fields.items() if value is not None}
