"""Up to a thousand Services whose one endpoint answers, by number; of both families."""

from kubeproxy_py.model import IPFamily
from tests.support.builders import Json, make_endpoint, make_service, make_slice
from tests.support.netns import Namespace


def cluster_ip(family: IPFamily, number: int) -> str:
    """Return an address of the address plan's Services, a thousand of which exist."""
    if family is IPFamily.V4:
        return f"172.30.{1 + number // 250}.{1 + number % 250}"
    return f"fd00:172:30::{1 + number // 250:x}:{1 + number % 250:x}"


def web(family: IPFamily, number: int, pod: Namespace, silent: int = 0) -> tuple[Json, Json]:
    """Return a Service with one endpoint that answers, as the API has it, and *silent* others."""
    name = f"{family.value.lower()}-{number}"
    nobody = "10.180.7.{}" if family is IPFamily.V4 else "fd00:10:180:7::{}"
    return (
        make_service(name, cluster_ip=cluster_ip(family, number)),
        make_slice(
            name,
            endpoints=[
                make_endpoint(pod.address(family)),
                *(make_endpoint(nobody.format(n + 1)) for n in range(silent)),
            ],
            address_type=family.value,
        ),
    )
