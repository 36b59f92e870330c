"""Services of both families with a number for a name: made, asked, and who answered."""

import ipaddress
from collections.abc import Sequence

from kubeproxy_py.model import IPFamily
from tests.support.addresses import PLANS
from tests.support.builders import Json, make_endpoint, make_service, make_slice
from tests.support.netns import Namespace
from tests.support.traffic import connect


def service_ip(family: IPFamily, number: int) -> str:
    """Return the cluster IP of Service *number*."""
    return str(ipaddress.ip_address(PLANS[family].cluster_ip) + number)


def names(number: int) -> dict[IPFamily, str]:
    """Return what Service *number* is called in each family."""
    return {family: f"web{number}-{family.value.lower()}" for family in IPFamily}


def web(number: int, *endpoints: Namespace) -> list[Json]:
    """Return Service *number* on port 80, one of each family, and its slices with *endpoints*."""
    items: list[Json] = []
    for family, name in names(number).items():
        found = [make_endpoint(endpoint.address(family)) for endpoint in endpoints]
        items.append(make_service(name, cluster_ip=service_ip(family, number)))
        items.append(make_slice(name, endpoints=found, ports=[80], address_type=family.value))
    return items


def answers(client: Namespace, number: int) -> dict[IPFamily, str]:
    """Return the address of who answers *client* at Service *number*, by family; "": nobody."""
    return {
        family: connect(client, service_ip(family, number), 80, timeout_s=0.5).server_ip
        for family in IPFamily
    }


def addresses(pod: Namespace) -> dict[IPFamily, str]:
    """Return what ``answers`` returns if *pod* answers."""
    return {family: pod.address(family) for family in IPFamily}


def node_ips() -> Sequence[str]:
    """Return the addresses of the lab's node, for its Node object."""
    return [PLANS[family].node for family in IPFamily]
