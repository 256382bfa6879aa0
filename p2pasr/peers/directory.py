"""The directory: small signed records in the DHT, which only their owner can write, and which expire.

Every record lies under a sub-key that is its owner's raw peer ID. Its value carries the owner's
signature over key, sub-key, expiry and value. A node that stores or returns a record checks it, and
whatever is not exactly of this form is refused: plain values without an owner too.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, Final

from hivemind.dht.node import DHTNode
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils import MSGPackSerializer

from p2pasr.errors import P2pasrError, Reject
from p2pasr.protocol.messages import MAX_RECORD_BYTES
from p2pasr.protocol.signing import SIGNATURE_BYTES, Signer, peer_id_bytes, peer_id_from_bytes, sign, verify

MAX_TTL_SECONDS: Final = 3600.0
"""No record may outlive this: what is still true is renewed."""

SIGNED_KIND: Final = "dht-record"


class OwnerValidator(RecordValidatorBase):  # type: ignore[misc]
    """Signs what this peer stores, and refuses every record that its sub-key's owner did not sign.

    Args:
        signer: this peer's key; None for a node that stores for others only.
    """

    def __init__(self, signer: Signer | None) -> None:
        self._signer = signer

    def sign_value(self, record: DHTRecord) -> bytes:
        """The value with the owner's signature behind it."""
        if self._signer is None or _owner(record) != self._signer.peer:
            raise ValueError("a record can be stored under one's own sub-key only")
        return bytes(record.value) + sign(self._signer, SIGNED_KIND, _signed_body(record, record.value))

    def strip_value(self, record: DHTRecord) -> bytes:
        """The value without the signature."""
        return bytes(record.value[:-SIGNATURE_BYTES])

    def validate(self, record: DHTRecord) -> bool:
        """Whether the owner signed exactly this record; never raises."""
        try:
            self.check(record, time.time())
        except P2pasrError:
            return False
        return True

    def check(self, record: DHTRecord, now: float) -> None:
        """The same, saying what is wrong.

        Raises:
            Reject: with the reason.
        """
        if len(record.value) > MAX_RECORD_BYTES + SIGNATURE_BYTES + 16:
            raise Reject(f"a directory record has {len(record.value)} bytes")
        if len(record.value) <= SIGNATURE_BYTES:
            raise Reject("a directory record has no signature")
        if not now - 60 < record.expiration_time < now + MAX_TTL_SECONDS:
            raise Reject("a directory record expires too late or long ago")
        value, signature = record.value[:-SIGNATURE_BYTES], record.value[-SIGNATURE_BYTES:]
        verify(_owner(record), SIGNED_KIND, _signed_body(record, value), signature)
        _check_readable(value)


class Directory:
    """The records of one run.

    Args:
        node: the DHT node, made with an :class:`OwnerValidator`.
        run: the run's id.
        on_trouble: told, in one sentence, when a record could not be renewed; it is tried again.
    """

    def __init__(self, node: DHTNode, run: bytes, on_trouble: Callable[[str], None]) -> None:
        self._node = node
        self._run = run
        self._on_trouble = on_trouble
        self._owner = peer_id_bytes(str(node.peer_id))
        self._kept: dict[str, asyncio.Task[None]] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._calls: Counter[str] = Counter()

    def key(self, kind: str, scope: str) -> str:
        """The DHT key of all records of a kind in a scope."""
        return f"p2pasr/1/{self._run.hex()}/{kind}/{scope}"

    async def put(self, kind: str, scope: str, record: bytes, ttl: float) -> bool:
        """Store our record; returns whether at least one node took it."""
        expires = time.time() + min(ttl, MAX_TTL_SECONDS - 60)
        stored = await self._node.store(self.key(kind, scope), record, expires, subkey=self._owner)
        return bool(stored)

    async def get(self, kind: str, scope: str) -> list[tuple[str, bytes]]:
        """All current records: (owner's peer ID, value), by owner. Their signatures were checked on the way."""
        found = await self._node.get(self.key(kind, scope), latest=True)
        if found is None or not isinstance(found.value, dict):
            return []
        records = [
            (peer_id_from_bytes(owner), entry.value)
            for owner, entry in found.value.items()
            if isinstance(entry.value, bytes)
        ]
        return sorted(records)

    async def keep(self, slot: str, kind: str, scope: str, record: bytes, ttl: float) -> bool:
        """Store our record and renew it at a third of its life until the slot is used again.

        A slot is written to by one at a time, in the order of the calls: what was kept before never comes back, and
        what is replaced before its turn is never stored.
        """
        self._calls[slot] += 1
        call = self._calls[slot]
        async with self._locks[slot]:
            if call < self._calls[slot]:
                return False
            if (previous := self._kept.get(slot)) is not None:
                previous.cancel()
            self._kept[slot] = asyncio.create_task(self._renew(slot, kind, scope, record, ttl))
            return await self.put(kind, scope, record, ttl)

    async def stop(self) -> None:
        """Stop renewing."""
        for task in self._kept.values():
            task.cancel()
        self._kept.clear()

    async def _renew(self, slot: str, kind: str, scope: str, record: bytes, ttl: float) -> None:
        while True:
            await asyncio.sleep(ttl / 3)
            async with self._locks[slot]:
                try:
                    await self.put(kind, scope, record, ttl)
                except Exception as error:  # noqa: BLE001 (whatever it was, without renewal the record would be gone)
                    self._on_trouble(f"this peer's {kind} was not renewed ({str(error) or type(error).__name__})")


def _owner(record: DHTRecord) -> str:
    try:
        subkey: Any = MSGPackSerializer.loads(record.subkey)
    except Exception as error:
        raise Reject("a directory record has an unreadable sub-key") from error
    if not isinstance(subkey, bytes):
        raise Reject("a directory record has no owner")
    if MSGPackSerializer.dumps(subkey) != record.subkey:
        raise Reject("a directory record's sub-key is not in its shortest form")
    return peer_id_from_bytes(subkey)


def _check_readable(value: bytes) -> None:
    """hivemind reads values without a guard: one that cannot be read would hang every lookup of its key."""
    try:
        MSGPackSerializer.loads(value)
    except Exception as error:
        raise Reject("a directory record has an unreadable value") from error


def _signed_body(record: DHTRecord, value: bytes) -> bytes:
    expiry = struct.pack(">d", record.expiration_time)
    pieces = (record.key, record.subkey, expiry, value)
    return b"".join(len(piece).to_bytes(4, "big") + piece for piece in pieces)
