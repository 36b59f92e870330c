"""
Cluster state ↔ the text of a state file: what a node goes on with after a reboot without an API server.

Pure: bytes in, values out, and the other way round. What is read back is trusted no more than what the
API server sends: every string that becomes part of a rule is judged again, and a file that is damaged,
of another program version, node or cluster is refused as a whole, with the reason.
"""

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Final, Literal

import msgspec

import kubeproxy_py
from kubeproxy_py import addresses, records
from kubeproxy_py.model import (
    Endpoint,
    IPFamily,
    Node,
    PortKey,
    ServiceName,
    ServicePort,
    ServiceState,
)

#: What a file may have at most, packed. 10,000 Services with 5 endpoints each take 0.4 MB.
MAX_BYTES: Final = 64 << 20
# Unpacked, which is what has to fit into memory: a damaged or hostile file must not fill it.
_MAX_PLAIN: Final = 512 << 20
# The year 5138: a moment that every reader of it can show as a date.
_LATEST: Final = 1e11
# Grows whenever an older program would misunderstand what is written.
_FORMAT: Final = 1
_MAGIC: Final = "kubeproxy-py state"
# The header is one line of JSON, for people: `head -1` tells whose file it is and how old.
_MAX_HEADER: Final = 4096
# Fast rather than small: it runs beside the daemon's real work, and level 6 gains a tenth.
_LEVEL: Final = 1


class Unusable(ValueError):
    """The file is not for us; the text says why, after "cannot use the state file"."""


class State(msgspec.Struct, frozen=True):
    """All that rules depend on, of what the API server knows."""

    node: Node
    services: dict[IPFamily, dict[ServiceName, ServiceState]]


class Snapshot(msgspec.Struct, frozen=True):
    """A state and when (Unix time) it was current."""

    state: State
    saved_at: float


class _Header(msgspec.Struct):
    magic: str
    format: int
    version: str
    node: str
    identity: str
    saved_at: float
    size: int
    sha256: str


class _Port(msgspec.Struct, array_like=True):
    port: ServicePort
    endpoints: tuple[Endpoint, ...]


class _Content(msgspec.Struct):
    node: Node
    services: dict[Literal["IPv4", "IPv6"], list[list[_Port]]]


# Sets in a fixed order: what did not change is not written again.
_ENCODER: Final = msgspec.json.Encoder(order="deterministic")
# Before there are threads, see watch.py.
_HEADER_DECODER: Final = msgspec.json.Decoder(_Header)
_CONTENT_DECODER: Final = msgspec.json.Decoder(_Content)


def identity(*facts: object) -> str:
    """Return a digest of *facts*: which cluster is watched, and what decides how objects are read.

    Settings that only decide what rules are made of the state are not among them: rules are never
    kept, so such settings hold for an old state as for a new one.
    """
    return hashlib.sha256(msgspec.json.encode([str(fact) for fact in facts])).hexdigest()


def pack(node: Node, services: Mapping[IPFamily, Iterable[ServiceState]]) -> bytes:
    """Return the content of a file, without its header. Equal states give equal bytes.

    Service by Service, so that the whole is never in memory unpacked.
    """
    packer = zlib.compressobj(_LEVEL)
    parts = [packer.compress(b'{"node":' + _ENCODER.encode(node) + b',"services":{')]
    for number, (family, states) in enumerate(services.items()):
        parts.append(packer.compress(b"," * bool(number) + _ENCODER.encode(family.value) + b":["))
        for index, state in enumerate(states):
            text = _ENCODER.encode(_ports(state))
            parts.append(packer.compress(b"," * bool(index) + text))
        parts.append(packer.compress(b"]"))
    return b"".join([*parts, packer.compress(b"}}"), packer.flush()])


def _ports(state: ServiceState) -> list[_Port]:
    return [_Port(port, state.endpoints.get(key, ())) for key, port in state.ports.items()]


def render(packed: bytes, *, node: str, identity: str, saved_at: float) -> bytes:
    """Return a whole file for what ``pack`` gave."""
    header = _Header(
        _MAGIC,
        _FORMAT,
        kubeproxy_py.__version__,
        node,
        identity,
        saved_at,
        len(packed),
        hashlib.sha256(packed).hexdigest(),
    )
    return msgspec.json.encode(header) + b"\n" + packed


def parse(data: bytes, *, node: str, identity: str) -> Snapshot:
    """Return what a file says, for the same *node* and *identity*. Raises Unusable."""
    head, newline, packed = data.partition(b"\n")
    try:
        if not newline or len(head) > _MAX_HEADER:
            raise Unusable("it has no header")
        header = _HEADER_DECODER.decode(head)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Unusable("its header is not readable") from error
    _check_header(header, packed, node=node, identity=identity)
    try:
        content = _CONTENT_DECODER.decode(_unpack(packed))
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Unusable(f"its content is not readable: {error}") from error
    if content.node.name != node:
        raise Unusable(f"its Node is {content.node.name[:80]!r}")
    services = {
        family: dict(_service(family, ports) for ports in listed if ports)
        for family, listed in ((IPFamily(text), found) for text, found in content.services.items())
    }
    return Snapshot(State(_checked_node(content.node), services), header.saved_at)


def _check_header(header: _Header, packed: bytes, *, node: str, identity: str) -> None:
    if header.magic != _MAGIC:
        raise Unusable("it is another program's")
    # Older ones as well: how objects become state is a release's own business.
    if (header.format, header.version) != (_FORMAT, kubeproxy_py.__version__):
        raise Unusable(
            f"it was written by version {header.version[:40]!r} (format {header.format}), "
            f"this is {kubeproxy_py.__version__!r} (format {_FORMAT})"
        )
    if header.node != node:
        raise Unusable(f"it is of node {header.node[:80]!r}")
    if header.identity != identity:
        raise Unusable("it is of another cluster or configuration")
    if header.size != len(packed) or header.sha256 != hashlib.sha256(packed).hexdigest():
        raise Unusable("it is damaged: size or checksum differ")
    if not 0 <= header.saved_at < _LATEST:
        raise Unusable(f"its time is {header.saved_at}")


def _unpack(packed: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(packed, _MAX_PLAIN)
    except zlib.error as error:
        raise Unusable(f"its content is not readable: {error}") from error
    if not unpacker.eof or unpacker.unused_data:
        raise Unusable(f"its content is incomplete, or more than {_MAX_PLAIN} bytes")
    return plain


def _checked_node(node: Node) -> Node:
    for ip in node.ips:
        _require(addresses.parse_ip(ip) == ip, "Node", "an address", ip)
    return node


def _service(family: IPFamily, ports: list[_Port]) -> tuple[ServiceName, ServiceState]:
    name = ServiceName(ports[0].port.name.namespace, ports[0].port.name.name)
    for text in name:
        _require(records.is_label(text), "Service", "a DNS label", text)
    state = ServiceState({}, {})
    for each in ports:
        of_port = each.port.name
        what = f"Service {name}"
        _require(of_port[:2] == name, what, "a port's Service", "/".join(of_port[:2]))
        _require(not of_port.port or records.is_label(of_port.port), what, "a name", of_port.port)
        _check_port(family, each.port, what)
        for endpoint in each.endpoints:
            _require_ips(family, (endpoint.ip,), what)
            _require_number(endpoint.port, 1, 65535, what)
        key = PortKey(of_port.port, of_port.protocol)
        state.ports[key] = each.port
        # Sorted and without duplicates, whatever the file has.
        merged = records.merge_slices([records.SliceRecord(name, family, {key: each.endpoints})])
        state.endpoints.update(merged)
    return name, state


def _check_port(family: IPFamily, port: ServicePort, what: str) -> None:
    _require_ips(family, (port.cluster_ip, *port.external_ips, *port.lb_vips), what)
    for cidr in port.source_ranges:
        is_right = addresses.parse_cidr(cidr) == cidr and addresses.family_of(cidr) is family
        _require(is_right, what, f"an {family.value} CIDR", cidr)
    _require_number(port.port, 1, 65535, what)
    _require_number(port.node_port, 0, 65535, what)
    _require_number(port.health_check_node_port, 0, 65535, what)
    if port.affinity_timeout_s is not None:
        _require_number(port.affinity_timeout_s, 1, records.MAX_AFFINITY_S, what)


def _require_ips(family: IPFamily, ips: Iterable[str], what: str) -> None:
    for ip in ips:
        is_right = addresses.parse_ip(ip) == ip and addresses.family_of(ip) is family
        _require(is_right, what, f"an {family.value} address", ip)


def _require_number(number: int, least: int, most: int, what: str) -> None:
    _require(least <= number <= most, what, f"a number from {least} to {most}", str(number))


def _require(is_right: bool, what: str, wanted: str, text: str) -> None:
    if not is_right:
        raise Unusable(f"{what[:200]}: {text[:80]!r} is not {wanted}")
