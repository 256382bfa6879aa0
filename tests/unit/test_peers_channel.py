"""The channel between the two processes of a peer."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr import errors
from p2pasr.errors import LocalError, P2pasrError, Reject, TransportError
from p2pasr.peers.channel import (
    ERRORS,
    HEADER,
    MAX_FRAME_BYTES,
    decode_body,
    encode_frame,
    error_from_wire,
    error_to_wire,
    read_frame,
)
from p2pasr.protocol.encoding import pack, unpack


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    left.settimeout(10)
    right.settimeout(10)
    with left, right:
        yield left, right


MESSAGES: list[dict[str, Any]] = [
    {},
    {"id": 1, "call": "fetch", "args": {"digest": bytes(32), "peers": ("a", "b"), "max_bytes": 1 << 40}},
    {"event": "ready", "maddrs": ()},
    {"id": 2, "result": {"data": b"x" * 5000, "nested": {"a": None, "b": True, "c": 1.5}}},
]


def test_messages_arrive_in_order_and_then_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    for message in MESSAGES:
        left.sendall(encode_frame(message))
    left.shutdown(socket.SHUT_WR)
    assert [read_frame(right) for _ in MESSAGES] == MESSAGES
    assert read_frame(right) is None


def test_a_message_arrives_whatever_the_pieces(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    frame = encode_frame(MESSAGES[1])
    for cut in range(0, len(frame), 3):
        left.sendall(frame[cut : cut + 3])
    assert read_frame(right) == MESSAGES[1]


@pytest.mark.parametrize("cut", [1, 3, 4, 5, -1])
def test_a_frame_that_is_cut_short_is_the_end(pair: tuple[socket.socket, socket.socket], cut: int) -> None:
    left, right = pair
    left.sendall(encode_frame(MESSAGES[1])[:cut])
    left.shutdown(socket.SHUT_WR)
    assert read_frame(right) is None


def test_a_closed_socket_is_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    right.close()
    assert read_frame(right) is None
    assert read_frame(left) is None


@pytest.mark.parametrize("size", [MAX_FRAME_BYTES + 1, (1 << 32) - 1])
def test_a_frame_that_announces_too_much_is_refused_before_it_is_read(
    pair: tuple[socket.socket, socket.socket], size: int
) -> None:
    left, right = pair
    left.sendall(HEADER.pack(size) + b"x")
    left.shutdown(socket.SHUT_WR)
    with pytest.raises(LocalError, match="out of step"):
        read_frame(right)


def test_a_message_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(LocalError, match="too long"):
        encode_frame({"data": bytes(MAX_FRAME_BYTES)})


@given(st.dictionaries(st.text(max_size=5), st.integers(0, 9) | st.text(max_size=5) | st.none(), max_size=5))
def test_a_frame_is_its_length_and_its_canonical_body(message: dict[str, Any]) -> None:
    frame = encode_frame(message)
    assert struct.unpack(">I", frame[:4])[0] == len(frame) - 4
    assert frame[4:] == pack(message)
    assert decode_body(frame[4:]) == message


@pytest.mark.parametrize("value", [None, 7, "text", b"bytes", (1, 2)])
def test_a_body_that_is_no_map_is_out_of_step(value: Any) -> None:
    with pytest.raises(LocalError, match="out of step"):
        decode_body(pack(value))


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x81\xa1a", b"\x82\xa1b\x01\xa1a\x01"])
def test_a_body_that_is_not_canonical_is_refused(body: bytes) -> None:
    with pytest.raises(Reject):
        decode_body(body)


def concrete_errors() -> list[type[P2pasrError]]:
    found = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, P2pasrError)]
    return [kind for kind in found if kind not in (P2pasrError, errors.RemoteError)]


@pytest.mark.parametrize("kind", concrete_errors())
def test_every_error_crosses_as_itself_with_its_sentence(kind: type[P2pasrError]) -> None:
    assert ERRORS[kind.__name__] is kind
    wire = unpack(pack(error_to_wire(kind("it is raining"))), 1000)
    error = error_from_wire(wire)
    assert type(error) is kind
    assert str(error) == "it is raining"


def test_an_error_that_was_not_meant_crosses_as_a_failure_of_the_network_process() -> None:
    error = error_from_wire(error_to_wire(KeyError("digest")))
    assert type(error) is TransportError
    assert str(error) == "the network process failed (KeyError: 'digest')"


def test_an_error_of_an_unknown_kind_crosses_as_a_transport_error() -> None:
    assert type(error_from_wire(("NoSuchError", "text"))) is TransportError
    assert type(error_from_wire(error_to_wire(P2pasrError("text")))) is TransportError
