"""Netlink messages, against a raw socket that plays the kernel."""

import errno
import socket
import struct

import pytest

from kubeproxy_py import netlink

ERROR, DONE = 2, 3
ITEM = 0x105
DUMP_INTR = 0x10


def message(kind, payload=b"", *, seq=1, flags=0):
    size = 16 + len(payload)
    return struct.pack("=IHHII", size, kind, flags, seq, 0) + payload + bytes(-size % 4)


def answer(number, *, seq=1):
    return message(ERROR, struct.pack("=i", -number) + bytes(16), seq=seq)


class ScriptedSocket:
    """Answers each receive with the next of *datagrams*; an OSError among them is raised."""

    def __init__(self, *datagrams, sender=0, flags=0):
        self.datagrams = list(datagrams)
        self.sender = sender
        self.flags = flags
        self.sent = []
        self.is_closed = False

    def fileno(self):
        return 7

    def send(self, data):
        self.sent.append(data)
        return len(data)

    def recvmsg_into(self, buffers):
        datagram = self.datagrams.pop(0)
        if isinstance(datagram, OSError):
            raise datagram
        buffers[0][: len(datagram)] = datagram
        return len(datagram), [], self.flags, (self.sender, 0)

    def close(self):
        self.is_closed = True


def opened(*datagrams, **options):
    return netlink.NetlinkSocket(ScriptedSocket(*datagrams, **options), "tests")


def items(sock):
    return [bytes(payload) for _, _, payload in sock.dump(ITEM, b"")]


def test_an_acknowledged_request_returns_what_came_before():
    sock = opened(message(ITEM, b"abcd") + answer(0))

    assert sock.request(ITEM, b"") == [b"abcd"]


def test_a_refused_request_raises_with_the_kernels_errno():
    sock = opened(answer(errno.EPERM))

    with pytest.raises(netlink.NetlinkError) as caught:
        sock.request(ITEM, b"")

    assert caught.value.errno == errno.EPERM


def batch(sock, *messages):
    sock.request_batch(begin=(0x10, b"from"), messages=messages, end=(0x11, b"to::"))


def test_a_batch_is_one_datagram_and_waits_for_each_of_its_messages():
    # The beginning has number 1, and it is not acknowledged.
    raw = ScriptedSocket(answer(0, seq=2), answer(0, seq=9), answer(0, seq=3))
    batch(netlink.NetlinkSocket(raw, "tests"), (ITEM, b"abcd"), (ITEM, b"efgh"))
    [sent] = raw.sent
    kinds = [struct.unpack_from("=IHH", sent, at)[1:] for at in (0, 20, 40, 60)]

    assert kinds == [
        (0x10, 1), (ITEM, 5), (ITEM, 5), (0x11, 1),
    ]  # fmt: skip
    assert raw.datagrams == []


def test_a_batch_of_which_anything_is_refused_raises():
    with pytest.raises(netlink.NetlinkError, match="Operation not permitted"):
        batch(opened(answer(errno.EPERM, seq=1)), (ITEM, b""))


def test_an_error_says_what_could_not_be_done():
    error = netlink.NetlinkError(errno.EPERM, "conntrack entries")

    wanted = "cannot complete a netlink request for conntrack entries: Operation not permitted"
    assert str(error) == wanted


def test_answers_to_an_earlier_request_are_passed_over():
    sock = opened(message(ITEM, b"late", seq=9) + answer(errno.EPERM, seq=9), answer(0))

    assert sock.request(ITEM, b"") == []


def test_what_another_process_sends_is_ignored():
    raw = ScriptedSocket(answer(0), sender=4242)
    sock = netlink.NetlinkSocket(raw, "tests")

    with pytest.raises(IndexError):  # the forged answer was not taken, and the script ended
        sock.request(ITEM, b"")


def test_requests_at_once_tell_which_of_them_were_refused():
    sock = opened(answer(errno.ENOENT, seq=2), answer(errno.EBUSY, seq=3) + answer(0, seq=4))

    assert sock.request_all(ITEM, [b"", b"", b"", b""]) == [0, errno.ENOENT, errno.EBUSY, 0]


def test_only_the_last_request_of_many_asks_for_an_acknowledgement():
    raw = ScriptedSocket(answer(0, seq=2))

    netlink.NetlinkSocket(raw, "tests").request_all(ITEM, [b"abc", b"d"])

    first = struct.pack("=IHHII", 19, ITEM, 1, 1, 0) + b"abc\0"
    last = struct.pack("=IHHII", 17, ITEM, 1 | 4, 2, 0) + b"d\0\0\0"
    assert raw.sent == [first + last]


def test_no_requests_at_once_send_nothing():
    raw = ScriptedSocket()

    assert netlink.NetlinkSocket(raw, "tests").request_all(ITEM, []) == []
    assert raw.sent == []


def test_a_dump_goes_on_over_datagrams_until_the_kernel_says_done():
    sock = opened(message(ITEM, b"1") + message(ITEM, b"22"), message(ITEM, b"333"), message(DONE))

    assert items(sock) == [b"1", b"22", b"333"]


def test_a_dump_that_ends_with_an_error_raises_it():
    sock = opened(message(ITEM, b"1"), message(DONE, struct.pack("=i", -errno.EIO)))

    with pytest.raises(netlink.NetlinkError) as caught:
        items(sock)

    assert caught.value.errno == errno.EIO


def test_a_dump_of_a_list_that_changed_gives_all_items_and_then_raises_eintr():
    sock = opened(message(ITEM, b"1", flags=DUMP_INTR) + message(ITEM, b"2"), message(DONE))
    seen = []

    with pytest.raises(netlink.NetlinkError) as caught:
        seen.extend(bytes(payload) for _, _, payload in sock.dump(ITEM, b""))

    assert (seen, caught.value.errno) == ([b"1", b"2"], errno.EINTR)


def test_a_change_told_only_at_the_end_of_a_dump_is_noticed():
    sock = opened(message(DONE, struct.pack("=i", 0), flags=DUMP_INTR))

    with pytest.raises(netlink.NetlinkError) as caught:
        items(sock)

    assert caught.value.errno == errno.EINTR


def test_lost_events_are_told():
    sock = opened(OSError(errno.ENOBUFS, "no room"))

    with pytest.raises(netlink.NetlinkError) as caught:
        list(sock.events())

    assert caught.value.errno == errno.ENOBUFS


def test_events_are_given_whatever_request_caused_them():
    sock = opened(message(ITEM, b"1", seq=0) + message(ITEM, b"2", seq=77))

    assert [bytes(payload) for _, _, payload in sock.events()] == [b"1", b"2"]


def test_a_message_larger_than_the_buffer_is_an_error_not_a_loss():
    sock = opened(message(ITEM), flags=socket.MSG_TRUNC)

    with pytest.raises(netlink.NetlinkError) as caught:
        items(sock)

    assert caught.value.errno == errno.EMSGSIZE


def test_a_length_beyond_the_datagram_is_refused():
    sock = opened(struct.pack("=IHHII", 400, ITEM, 0, 1, 0))

    with pytest.raises(netlink.NetlinkError) as caught:
        items(sock)

    assert caught.value.errno == errno.EBADMSG


def test_leaving_the_context_closes_the_socket():
    raw = ScriptedSocket()

    with netlink.NetlinkSocket(raw, "tests") as sock:
        assert sock.fileno() == 7

    assert raw.is_closed


def test_attributes_come_back_as_they_were_written():
    data = netlink.attribute(1, b"abc") + netlink.nested(2, netlink.attribute(3, b"defgh"))

    (first, text), (second, inner) = netlink.attributes(memoryview(data))

    assert (first, bytes(text), second) == (1, b"abc", 2)
    assert [(kind, bytes(value)) for kind, value in netlink.attributes(inner)] == [(3, b"defgh")]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x08", id="less than a header"),
        pytest.param(struct.pack("=HH", 0, 1) * 3, id="a length of zero"),
    ],
)
def test_malformed_attributes_end_the_walk(data):
    assert list(netlink.attributes(memoryview(data))) == []


def lists(sock, *payloads):
    return list(sock.dump_each(ITEM, payloads, lambda buffer, begin, end: bytes(buffer[begin:end])))


def test_many_lists_are_dumped_one_after_the_other():
    sock = opened(
        message(ITEM, b"aaaa") + message(ITEM, b"bbbbb"),
        message(DONE, bytes(4)),
        message(ITEM, b"late") + message(DONE, bytes(4), seq=2),
    )

    assert lists(sock, b"one", b"two") == [[b"aaaa", b"bbbbb"], []]
    assert b"two" in sock._raw.sent[1]


def test_a_list_that_changed_is_no_list_and_the_next_one_is():
    sock = opened(
        message(ITEM, b"aaaa", flags=DUMP_INTR),
        message(DONE, bytes(4)),
        message(DONE, bytes(4), seq=2),
    )

    assert lists(sock, b"one", b"two") == [None, []]


@pytest.mark.parametrize(
    "datagram",
    [answer(errno.EPERM), struct.pack("=IHHII", 8, ITEM, 0, 1, 0), message(ITEM, b"aaaa")[:-1]],
    ids=["refused", "too short", "cut off"],
)
def test_a_refusal_or_damage_ends_all_lists(datagram):
    with pytest.raises(netlink.NetlinkError):
        lists(opened(datagram), b"one", b"two")


def test_what_others_send_is_in_no_list():
    sock = opened(message(ITEM, b"evil"), OSError(errno.EAGAIN, "silence"), sender=5)

    with pytest.raises(netlink.NetlinkError):
        lists(sock, b"one")


def test_each_event_is_given_as_a_part_of_the_buffer():
    sock = opened(message(ITEM, b"abcd") + message(ERROR, bytes(20)) + message(ITEM, b"efg"))
    found = []

    sock.each_event(lambda buffer, begin, end: found.append(bytes(buffer[begin:end])))

    assert found == [b"abcd", b"efg"]


def test_a_malformed_event_is_an_error():
    sock = opened(struct.pack("=IHHII", 99, ITEM, 0, 0, 0))

    with pytest.raises(netlink.NetlinkError) as caught:
        sock.each_event(lambda *_: None)

    assert caught.value.errno == errno.EBADMSG
