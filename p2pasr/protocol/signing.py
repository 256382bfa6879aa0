"""Who said it: Ed25519 signatures that the peer ID alone can check.

A libp2p peer ID made from an Ed25519 key contains the public key itself (an "identity" multihash),
so no key is ever looked up, and a record proves its author to anyone who can read his name.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, Protocol

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from p2pasr.errors import Reject
from p2pasr.protocol.encoding import DOMAIN, blob_digest

SIGNATURE_BYTES: Final = 64

_MULTIHASH_PREFIX: Final = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])
"""Identity multihash of 36 bytes, holding a protobuf PublicKey: type Ed25519, 32 bytes of data.

Source: libp2p specs, peer-ids/peer-ids.md.
"""


class Signer(Protocol):
    """Something that can sign in a peer's name."""

    @property
    def peer(self) -> str:
        """The signer's peer ID, base58."""

    def sign(self, message: bytes) -> bytes:
        """An Ed25519 signature, 64 bytes."""


def peer_id(public_key: bytes) -> str:
    """The libp2p peer ID (``12D3KooW…``) of a raw Ed25519 public key of 32 bytes."""
    return str(base58.b58encode(_MULTIHASH_PREFIX + public_key), "ascii")


@lru_cache(maxsize=4096)
def peer_id_bytes(peer: str) -> bytes:
    """The 38 raw bytes of a peer ID.

    Raises:
        Reject: it is not the ID of an Ed25519 key.
    """
    try:
        raw = bytes(base58.b58decode(peer))
    except ValueError:
        raise Reject(f"{peer!r} is not a peer ID") from None
    if len(raw) != len(_MULTIHASH_PREFIX) + 32 or not raw.startswith(_MULTIHASH_PREFIX):
        raise Reject(f"{peer!r} is not the peer ID of an Ed25519 key")
    if peer_id_from_bytes(raw) != peer:  # base58 ignores white space, and one key must not have two names
        raise Reject(f"{peer!r} is not the canonical form of a peer ID")
    return raw


@lru_cache(maxsize=4096)
def peer_id_from_bytes(raw: bytes) -> str:
    """The base58 form of a raw peer ID.

    Raises:
        Reject: it is not the ID of an Ed25519 key.
    """
    if len(raw) != len(_MULTIHASH_PREFIX) + 32 or not raw.startswith(_MULTIHASH_PREFIX):
        raise Reject("a peer ID is not that of an Ed25519 key")
    return str(base58.b58encode(raw), "ascii")


def sign(signer: Signer, kind: str, body: bytes) -> bytes:
    """Sign the canonical body of a record of this kind."""
    return signer.sign(_signed_bytes(kind, body))


def verify(peer: str, kind: str, body: bytes, signature: bytes) -> None:
    """Check that `peer` signed `body` as a record of this kind.

    Raises:
        Reject: it did not.
    """
    if not _is_signed(peer, _signed_bytes(kind, body), signature):
        raise Reject(f"the signature on a {kind} does not verify against {short(peer)}")


def short(peer: str) -> str:
    """The last six characters of a peer ID, enough for a person to tell peers apart."""
    return f"…{peer[-6:]}"


def _signed_bytes(kind: str, body: bytes) -> bytes:
    return DOMAIN + kind.encode() + b"\x00" + blob_digest(body)


@lru_cache(maxsize=8192)
def _is_signed(peer: str, signed: bytes, signature: bytes) -> bool:
    """Cached, since the DHT returns the same records again and again."""
    try:
        _public_key(peer).verify(signature, signed)
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=4096)
def _public_key(peer: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(peer_id_bytes(peer)[len(_MULTIHASH_PREFIX) :])
