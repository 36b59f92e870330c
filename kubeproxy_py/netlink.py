"""
Talk netlink to the kernel: requests, dumps and events, over one raw socket.

Knows messages and attributes (RFC 3549) and no subsystem: what a payload means is its caller's
business. Payloads are views of one buffer that the next receive overwrites, so that a dump of any
length takes the same memory.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Final, Protocol, Self, TypeVar

_T = TypeVar("_T")

NETLINK_ROUTE: Final = 0
NETLINK_NETFILTER: Final = 12

NLM_F_CREATE: Final = 0x400
_NLM_F_REQUEST: Final = 0x001
_NLM_F_ACK: Final = 0x004
_NLM_F_DUMP_INTR: Final = 0x010
_NLM_F_DUMP: Final = 0x300

_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
# Types below this are netlink's own; a subsystem's begin here.
_NLMSG_MIN_TYPE: Final = 0x10

NLA_F_NESTED: Final = 0x8000
_NLA_TYPE_MASK: Final = 0x3FFF

_SOL_NETLINK: Final = 270
_NETLINK_ADD_MEMBERSHIP: Final = 1
_NETLINK_CAP_ACK: Final = 10
_SO_RCVBUFFORCE: Final = 33

# length, type, flags, sequence number, port; in host byte order.
_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_ERRNO: Final = struct.Struct("=i")

# The kernel fills at most 32 KiB per receive of a dump; a message of its own may be larger.
_RECEIVE_BYTES: Final = 64 * 1024
# Room for bursts of events. The usual 208 KiB overflows when a ruleset is exchanged as a whole.
_SOCKET_BUFFER_BYTES: Final = 4 * 1024 * 1024
# The kernel answers within the call that asks; a lost answer must not hang a thread for ever. One
# receive can take long only where a filtered dump of a huge table finds nothing (about a second).
_TIMEOUT_S: Final = 30


class NetlinkError(OSError):
    """The kernel refused a request, lost events (ENOBUFS) or changed under a dump (EINTR)."""

    def __init__(self, number: int, subject: str) -> None:
        super().__init__(number, f"cannot complete a netlink request for {subject}")

    def __str__(self) -> str:
        return f"{self.strerror}: {os.strerror(self.errno or 0)}"


class RawSocket(Protocol):
    """The part of ``socket.socket`` that is used: the seam at which tests play the kernel."""

    def fileno(self) -> int: ...

    def send(self, data: bytes, /) -> int: ...

    def recvmsg_into(
        self, buffers: list[bytearray], /
    ) -> tuple[int, list[tuple[int, int, bytes]], int, tuple[int, int]]: ...

    def close(self) -> None: ...


def connect(protocol: int, groups: Iterable[int] = ()) -> RawSocket:
    """Open a socket of this thread's network namespace and join the multicast *groups*."""
    raw = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        try:
            raw.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _SOCKET_BUFFER_BYTES)
        except PermissionError:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _TIMEOUT_S, 0))
        # Refusals then quote the header of the request only, so that many fit the buffer.
        raw.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        raw.bind((0, 0))
        for group in groups:
            raw.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
    except BaseException:
        raw.close()
        raise
    return raw


class NetlinkSocket:
    """A netlink socket; for one thread at a time.

    Args:
        raw: what ``connect`` returns; owned and closed by this object.
        subject: what errors say the requests were for.
    """

    def __init__(self, raw: RawSocket, subject: str) -> None:
        self._raw = raw
        self._subject = subject
        self._buffer = bytearray(_RECEIVE_BYTES)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._raw.close()

    def fileno(self) -> int:
        """Return the descriptor, to wait on with ``select``."""
        return self._raw.fileno()

    def request(self, kind: int, payload: bytes, *, flags: int = 0) -> list[bytes]:
        """Send one request, wait for its acknowledgement, and return what came before that.

        Raises:
            NetlinkError: the kernel refused; ``errno`` says why.
        """
        sequence = self._send([(kind, _NLM_F_REQUEST | _NLM_F_ACK | flags, payload)])
        answers: list[bytes] = []
        while True:
            for got, _, seq, body in self._receive():
                if seq != sequence:
                    continue
                if got == _NLMSG_ERROR:
                    self._check(body)
                    return answers
                if got >= _NLMSG_MIN_TYPE:
                    answers.append(bytes(body))

    def request_all(self, kind: int, payloads: Sequence[bytes]) -> list[int]:
        """Send requests of one *kind* at once; return an errno for each, 0 where it was done.

        The kernel carries them out one by one: a refusal does not stop those after it.
        """
        if not payloads:
            return []
        # Refusals are always answered, so only the last asks for an acknowledgement.
        messages = [(kind, _NLM_F_REQUEST, payload) for payload in payloads[:-1]]
        last = self._send([*messages, (kind, _NLM_F_REQUEST | _NLM_F_ACK, payloads[-1])])
        first = last - len(payloads) + 1
        results = [0] * len(payloads)
        while True:
            for got, _, seq, body in self._receive():
                if got == _NLMSG_ERROR and first <= seq <= last:
                    results[seq - first] = -_ERRNO.unpack_from(body)[0]
                    if seq == last:
                        return results

    def request_batch(
        self,
        *,
        begin: tuple[int, bytes],
        messages: Sequence[tuple[int, bytes]],
        end: tuple[int, bytes],
    ) -> None:
        """Send *messages* as one transaction, each a kind and a payload, and wait until it is done.

        Raises:
            NetlinkError: the kernel refused one, and so has done none.
        """
        sent = [
            (begin[0], _NLM_F_REQUEST, begin[1]),
            *((kind, _NLM_F_REQUEST | _NLM_F_ACK, payload) for kind, payload in messages),
            (end[0], _NLM_F_REQUEST, end[1]),
        ]
        last = self._send(sent)
        waiting = len(messages)
        while waiting > 0:
            for got, _, seq, body in self._receive():
                if got == _NLMSG_ERROR and last - len(sent) < seq <= last:
                    self._check(body)
                    waiting -= 1

    def dump(self, kind: int, payload: bytes) -> Iterator[tuple[int, int, memoryview]]:
        """Send one request that is answered by a list; yield type, flags and payload of each item.

        A payload is valid until the next one is asked for. A dump that is not read to its end
        leaves the socket unfit for another: close it.

        Raises:
            NetlinkError: the kernel refused; or, after all items, EINTR: the list was changed
                while it was read, and items may be missing or twice in it.
        """
        sequence = self._send([(kind, _NLM_F_REQUEST | _NLM_F_DUMP, payload)])
        is_interrupted = False
        while True:
            for got, flags, seq, body in self._receive():
                if seq != sequence:
                    continue
                if flags & _NLM_F_DUMP_INTR:
                    is_interrupted = True
                if got >= _NLMSG_MIN_TYPE:
                    yield got, flags, body
                elif got in (_NLMSG_DONE, _NLMSG_ERROR):
                    self._check(body)
                    if is_interrupted:
                        raise NetlinkError(errno.EINTR, self._subject)
                    return

    def dump_each(
        self, kind: int, payloads: Iterable[bytes], parse: Callable[[bytearray, int, int], _T]
    ) -> Iterator[list[_T] | None]:
        """Dump for each request; yield what *parse* makes of its items, each given as a buffer's part.

        As ``dump``, at a third of the time for each item: for tens of thousands of small lists. None
        stands for a list that was changed while it was read.

        Raises:
            NetlinkError: the kernel refused; which request it was, nobody knows.
        """
        unpack, buffer, head = _HEADER.unpack_from, self._buffer, _HEADER.size
        for payload in payloads:
            sequence = self._send([(kind, _NLM_F_REQUEST | _NLM_F_DUMP, payload)])
            found: list[_T] = []
            is_interrupted = is_done = False
            while not is_done:
                offset, size = 0, self._receive_datagram()
                while offset < size:
                    length, got, flags, seq, _ = unpack(buffer, offset)
                    end = offset + length
                    if length < head or end > size:
                        raise NetlinkError(errno.EBADMSG, self._subject)
                    if seq == sequence:
                        is_interrupted = is_interrupted or bool(flags & _NLM_F_DUMP_INTR)
                        if got >= _NLMSG_MIN_TYPE:
                            found.append(parse(buffer, offset + head, end))
                        elif got in (_NLMSG_DONE, _NLMSG_ERROR):
                            self._check(memoryview(buffer)[offset + head : end])
                            is_done = True
                    offset = end + -end % 4
            yield None if is_interrupted else found

    def events(self) -> Iterator[tuple[int, int, memoryview]]:
        """Wait for one datagram of the joined groups; yield type, flags and payload of its messages.

        Raises:
            NetlinkError: ENOBUFS: events were lost, so what they described must be listed anew.
                EAGAIN: nothing came for half a minute; wait with ``select`` instead.
        """
        for got, flags, _, body in self._receive():
            if got >= _NLMSG_MIN_TYPE:
                yield got, flags, body

    def each_event(self, parse: Callable[[bytearray, int, int], object]) -> None:
        """Receive one datagram of the joined groups; give *parse* each message, as a buffer's part.

        As ``events``, for tens of thousands a second.
        """
        unpack, buffer, head = _HEADER.unpack_from, self._buffer, _HEADER.size
        offset, size = 0, self._receive_datagram()
        while offset < size:
            length, got, _, _, _ = unpack(buffer, offset)
            end = offset + length
            if length < head or end > size:
                raise NetlinkError(errno.EBADMSG, self._subject)
            if got >= _NLMSG_MIN_TYPE:
                parse(buffer, offset + head, end)
            offset = end + -end % 4

    def _send(self, messages: Sequence[tuple[int, int, bytes]]) -> int:
        # Returns the sequence number of the last; those before it count up to it.
        parts: list[bytes] = []
        for kind, flags, payload in messages:
            self._sequence = self._sequence % 0x7FFFFFFF + 1
            size = _HEADER.size + len(payload)
            parts += (
                _HEADER.pack(size, kind, flags, self._sequence, 0), payload, bytes(-size % 4),
            )  # fmt: skip
        try:
            self._raw.send(b"".join(parts))
        except OSError as error:
            raise NetlinkError(error.errno or errno.EIO, self._subject) from error
        return self._sequence

    def _receive(self) -> Iterator[tuple[int, int, int, memoryview]]:
        # Yields type, flags, sequence number and payload of each message of one datagram.
        size = self._receive_datagram()
        view = memoryview(self._buffer)
        unpack = _HEADER.unpack_from
        offset = 0
        while offset < size:
            length, kind, flags, sequence, _ = unpack(view, offset)
            end = offset + length
            if length < _HEADER.size or end > size:
                raise NetlinkError(errno.EBADMSG, self._subject)
            yield kind, flags, sequence, view[offset + _HEADER.size : end]
            offset = end + -end % 4

    def _receive_datagram(self) -> int:
        # Returns the size of what is in the buffer now; 0 if it is not from the kernel.
        try:
            size, _, flags, (sender, _) = self._raw.recvmsg_into([self._buffer])
        except OSError as error:
            raise NetlinkError(error.errno or errno.EIO, self._subject) from error
        if sender != 0:
            return 0
        if flags & socket.MSG_TRUNC:
            raise NetlinkError(errno.EMSGSIZE, self._subject)
        return size

    def _check(self, body: memoryview) -> None:
        # The end of a dump and an acknowledgement both begin with 0 or a negative errno.
        (number,) = _ERRNO.unpack_from(body) if len(body) >= _ERRNO.size else (0,)
        if number:
            raise NetlinkError(-number, self._subject)


def attribute(kind: int, value: bytes) -> bytes:
    """Return one attribute, padded to four bytes."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """Return one attribute that holds *attributes*."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def attributes(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield type and value of each attribute in *data*; stops where the rest is malformed."""
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _NLA_TYPE_MASK, data[offset + _ATTRIBUTE.size : offset + length]
        offset += length + -length % 4
