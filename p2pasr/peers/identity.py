"""One Ed25519 key a peer: its libp2p identity and its signature under everything it says."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pasr.errors import LocalError
from p2pasr.peers.blobs import sync
from p2pasr.protocol.signing import peer_id

_PROTOBUF_PREFIX: Final = bytes([0x08, 0x01, 0x12, 0x40])
"""libp2p's crypto.PrivateKey: type Ed25519 (1), then 64 bytes of data: seed and public key.

Source: libp2p specs, peer-ids/peer-ids.md.
"""


class Identity:
    """A peer's key. Implements :class:`p2pasr.protocol.signing.Signer`."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.peer = peer_id(key.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        """An Ed25519 signature, 64 bytes."""
        return self._key.sign(message)

    def to_bytes(self) -> bytes:
        """The key as libp2p's daemon reads it."""
        return _PROTOBUF_PREFIX + self._key.private_bytes_raw() + self._key.public_key().public_bytes_raw()

    @classmethod
    def from_bytes(cls, data: bytes) -> Identity:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            ValueError: it is no Ed25519 key in libp2p's form, or its halves do not belong together.
        """
        if len(data) != len(_PROTOBUF_PREFIX) + 64 or not data.startswith(_PROTOBUF_PREFIX):
            raise ValueError("not an Ed25519 private key in libp2p's form")
        identity = cls(Ed25519PrivateKey.from_private_bytes(data[4:36]))
        if identity.to_bytes() != data:
            raise ValueError("the private and the public half do not belong together")
        return identity


def load_or_create(path: Path) -> Identity:
    """Read the key at `path`, or make one there that only this user can read.

    Raises:
        LocalError: the file is no key, or others can read it, or none can be written there.
    """
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _create(path)
        except OSError as error:
            raise LocalError(f"no identity can be written to {path} ({error.strerror})") from error
    return load(path)


def _create(path: Path) -> None:
    """Make a key under a temporary name and link it to `path`, so that a kill leaves a whole key or none."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")  # mode 600
    part = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(Identity(Ed25519PrivateKey.generate()).to_bytes())
        sync(part)
        with contextlib.suppress(FileExistsError):  # another process was faster: its key is the one
            path.hardlink_to(part)
        sync(path.parent)
    finally:
        part.unlink()


def lock(path: Path) -> int:
    """Hold the key at `path` for this process alone, until the process ends.

    Returns:
        A file descriptor that must stay open.

    Raises:
        LocalError: another process on this machine uses the identity.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise LocalError(
            f"the identity {path} is in use by another process; give this one its own with --identity-path"
        ) from error
    return descriptor


def load(path: Path) -> Identity:
    """Read the key at `path`.

    Raises:
        LocalError: there is none, the file is no key, or others can read it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        data = path.read_bytes()
    except OSError as error:
        raise LocalError(f"the identity {path} cannot be read ({error.strerror})") from error
    if mode & 0o077:
        raise LocalError(f"the identity {path} can be read by others (mode {mode:03o}): run chmod 600 {path}")
    try:
        return Identity.from_bytes(data)
    except ValueError as error:
        raise LocalError(f"the identity {path} is damaged ({error}); restore it, or delete it for a new one") from error
