"""Peer IDs that hold their key, and signatures that hold in one kind only."""

from __future__ import annotations

import re

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.errors import Reject
from p2pasr.peers.identity import Identity
from p2pasr.protocol.signing import (
    SIGNATURE_BYTES,
    peer_id,
    peer_id_bytes,
    peer_id_from_bytes,
    short,
    sign,
    verify,
)

from .builders import make_identity

# The Ed25519 test vector of the libp2p specification, peer-ids/peer-ids.md.
PRIVATE = bytes.fromhex(
    "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
    "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
)
PUBLIC = bytes.fromhex("080112201ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")

keys = st.binary(min_size=32, max_size=32)


def test_the_key_of_the_libp2p_specification_is_read_and_named_as_it_says() -> None:
    identity = Identity.from_bytes(PRIVATE)
    assert identity.to_bytes() == PRIVATE
    assert base58.b58decode(identity.peer) == b"\x00\x24" + PUBLIC


def test_hivemind_names_a_peer_as_we_do() -> None:
    from hivemind.p2p import PeerID

    identity = make_identity(1)
    assert PeerID.from_base58(identity.peer).to_bytes() == peer_id_bytes(identity.peer)


@given(keys)
def test_every_ed25519_key_has_an_id_of_one_form(key: bytes) -> None:
    peer = peer_id(key)
    assert re.fullmatch(r"12D3KooW[1-9A-HJ-NP-Za-km-z]{44}", peer)
    assert peer_id_bytes(peer).endswith(key)
    assert peer_id_from_bytes(peer_id_bytes(peer)) == peer


@pytest.mark.parametrize("key", [bytes(32), b"\xff" * 32])
def test_the_first_and_the_last_key_have_ids_of_that_form_too(key: bytes) -> None:
    assert peer_id(key).startswith("12D3KooW")
    assert len(peer_id(key)) == 52


@pytest.mark.parametrize(
    "peer",
    [
        "",
        "12D3KooW",
        "0OIl" * 13,
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        make_identity(1).peer[:-1],
        make_identity(1).peer + "1",
        make_identity(1).peer + " ",
        make_identity(1).peer + "\n",
        " " + make_identity(1).peer,
        "1" + make_identity(1).peer,
        "12D3KooW陳大文",
        base58.b58encode(b"\x12\x20" + bytes(36)).decode(),
    ],
)
def test_what_is_no_ed25519_peer_id_is_refused(peer: str) -> None:
    with pytest.raises(Reject):
        peer_id_bytes(peer)


@pytest.mark.parametrize("raw", [b"", bytes(38), peer_id_bytes(make_identity(1).peer)[:-1], b"\x12\x20" + bytes(36)])
def test_raw_bytes_that_are_no_ed25519_peer_id_are_refused(raw: bytes) -> None:
    with pytest.raises(Reject):
        peer_id_from_bytes(raw)


@given(st.binary(max_size=100), st.sampled_from(["claim", "receipt", "dht-record"]))
def test_a_signature_verifies_for_its_author_kind_and_body(body: bytes, kind: str) -> None:
    identity = make_identity(1)
    signature = sign(identity, kind, body)
    assert len(signature) == SIGNATURE_BYTES
    verify(identity.peer, kind, body, signature)


@given(st.binary(min_size=1, max_size=60), st.data())
def test_a_signature_fails_once_a_bit_of_it_or_of_the_body_is_flipped(body: bytes, data: st.DataObject) -> None:
    identity = make_identity(1)
    signature = sign(identity, "claim", body)
    signed = bytearray(signature + body)
    bit = data.draw(st.integers(0, 8 * len(signed) - 1))
    signed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Reject, match="the signature on a claim does not verify"):
        verify(identity.peer, "claim", bytes(signed[SIGNATURE_BYTES:]), bytes(signed[:SIGNATURE_BYTES]))


def test_a_signature_fails_for_another_author_or_kind() -> None:
    identity, other = make_identity(1), make_identity(2)
    signature = sign(identity, "claim", b"body")
    with pytest.raises(Reject, match=re.escape(short(other.peer))):
        verify(other.peer, "claim", b"body", signature)
    with pytest.raises(Reject, match="on a receipt"):
        verify(identity.peer, "receipt", b"body", signature)
    with pytest.raises(Reject):
        verify(identity.peer, "clai", b"mbody", signature)


def test_a_signature_under_the_bare_body_is_none() -> None:
    identity = make_identity(1)
    with pytest.raises(Reject):
        verify(identity.peer, "claim", b"body", identity.sign(b"body"))


@pytest.mark.parametrize("length", [0, 1, 63, 65, 128])
def test_a_signature_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(Reject):
        verify(make_identity(1).peer, "claim", b"body", bytes(length))


@given(keys, st.binary(min_size=64, max_size=64))
def test_any_key_that_a_peer_may_invent_is_refused_without_a_crash(key: bytes, signature: bytes) -> None:
    with pytest.raises(Reject):
        verify(peer_id(key), "claim", b"body", signature)


def test_a_signature_whose_scalar_was_shifted_by_the_group_order_is_refused() -> None:
    identity = make_identity(1)
    signature = sign(identity, "claim", b"body")
    order = (1 << 252) + 27742317777372353535851937790883648493
    shifted = int.from_bytes(signature[32:], "little") + order
    with pytest.raises(Reject):
        verify(identity.peer, "claim", b"body", signature[:32] + shifted.to_bytes(32, "little"))


def test_the_short_form_of_a_peer_is_its_end() -> None:
    assert short("12D3KooWabcdef") == "…abcdef"
