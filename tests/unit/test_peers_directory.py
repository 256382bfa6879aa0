"""The directory: only the owner of a sub-key writes under it, and nothing a stranger stores is believed."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any, ClassVar

import pytest
from hivemind.dht.validation import DHTRecord
from hivemind.utils import MSGPackSerializer
from hivemind.utils.timed_storage import ValueWithExpiration
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.errors import Reject
from p2pasr.peers.directory import MAX_TTL_SECONDS, Directory, OwnerValidator
from p2pasr.protocol.messages import MAX_RECORD_BYTES
from p2pasr.protocol.signing import SIGNATURE_BYTES, peer_id_bytes

from .builders import make_identity

WHO, OTHER = make_identity(1), make_identity(2)
NOW = 1_700_000_000.0
VALIDATOR = OwnerValidator(WHO)
VALUE = MSGPackSerializer.dumps(b"value")


def subkey_of(peer: str) -> bytes:
    return MSGPackSerializer.dumps(peer_id_bytes(peer))


def unsigned(**changes: Any) -> DHTRecord:
    fields = {"key": b"key", "subkey": subkey_of(WHO.peer), "value": VALUE, "expiration_time": NOW + 60}
    return DHTRecord(**{**fields, **changes})


def signed(**changes: Any) -> DHTRecord:
    record = unsigned(**changes)
    return dataclasses.replace(record, value=VALIDATOR.sign_value(record))


def test_what_the_owner_signed_passes_and_loses_its_signature() -> None:
    record = signed()
    VALIDATOR.check(record, NOW)
    OwnerValidator(None).check(record, NOW)
    OwnerValidator(OTHER).check(record, NOW)
    assert VALIDATOR.strip_value(record) == VALUE
    assert len(record.value) == len(VALUE) + SIGNATURE_BYTES


def test_validating_looks_at_the_clock() -> None:
    assert VALIDATOR.validate(signed(expiration_time=time.time() + 60))
    assert not VALIDATOR.validate(signed(expiration_time=NOW))


@pytest.mark.parametrize(
    "change",
    [
        {"key": b"another key"},
        {"key": b""},
        {"subkey": subkey_of(OTHER.peer)},
        {"value": b"Value"},
        {"value": b""},
        {"expiration_time": NOW + 60.000001},
        {"expiration_time": NOW + 600},
    ],
)
def test_a_record_that_was_changed_in_any_part_is_refused(change: dict[str, Any]) -> None:
    record = signed()
    if "value" in change:
        change = {"value": change["value"] + record.value[-SIGNATURE_BYTES:]}
    with pytest.raises(Reject):
        VALIDATOR.check(dataclasses.replace(record, **change), NOW)


@pytest.mark.parametrize("value", [b"\xc1", b"two values", b""])
def test_a_value_that_hivemind_could_not_read_is_refused(value: bytes) -> None:
    with pytest.raises(Reject):
        VALIDATOR.check(signed(value=value), NOW)


@given(st.data())
def test_a_flipped_bit_of_the_value_is_refused(data: st.DataObject) -> None:
    record = signed()
    value = bytearray(record.value)
    bit = data.draw(st.integers(0, 8 * len(value) - 1))
    value[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Reject, match="does not verify"):
        VALIDATOR.check(dataclasses.replace(record, value=bytes(value)), NOW)


def test_what_moves_between_the_fields_is_refused() -> None:
    record = signed(key=b"key", value=VALUE)
    with pytest.raises(Reject):
        VALIDATOR.check(dataclasses.replace(record, key=b"keyv", value=record.value[1:]), NOW)


@pytest.mark.parametrize(
    "subkey",
    [
        b"",
        b"\xc1",
        b"\x91" * 5000,
        MSGPackSerializer.dumps(None),
        MSGPackSerializer.dumps(WHO.peer),
        MSGPackSerializer.dumps(b"somebody"),
        MSGPackSerializer.dumps(peer_id_bytes(WHO.peer)[:-1]),
        MSGPackSerializer.dumps([peer_id_bytes(WHO.peer)]),
        peer_id_bytes(WHO.peer),
    ],
)
def test_a_record_without_an_owner_is_refused(subkey: bytes) -> None:
    record = dataclasses.replace(signed(), subkey=subkey)
    with pytest.raises(Reject):
        VALIDATOR.check(record, NOW)
    assert not VALIDATOR.validate(dataclasses.replace(record, expiration_time=time.time() + 60))


@pytest.mark.parametrize("value", [b"", b"x", bytes(SIGNATURE_BYTES), bytes(SIGNATURE_BYTES - 1)])
def test_a_value_without_a_signature_is_refused(value: bytes) -> None:
    with pytest.raises(Reject, match="has no signature"):
        VALIDATOR.check(unsigned(value=value), NOW)


def test_a_value_that_is_too_long_is_refused_whoever_signed_it() -> None:
    VALIDATOR.check(signed(value=MSGPackSerializer.dumps(bytes(MAX_RECORD_BYTES))), NOW)
    with pytest.raises(Reject, match="a directory record has"):
        VALIDATOR.check(signed(value=bytes(MAX_RECORD_BYTES + 100)), NOW)


@pytest.mark.parametrize(
    "expires", [NOW - 60, NOW - 1e6, NOW + MAX_TTL_SECONDS, 1e300, float("inf"), float("nan"), 0.0]
)
def test_a_record_that_lives_too_long_or_is_long_dead_is_refused_whoever_signed_it(expires: float) -> None:
    with pytest.raises(Reject, match="expires too late or long ago"):
        VALIDATOR.check(signed(expiration_time=expires), NOW)


@pytest.mark.parametrize("expires", [NOW - 59, NOW, NOW + MAX_TTL_SECONDS - 1])
def test_a_record_that_lives_now_passes(expires: float) -> None:
    VALIDATOR.check(signed(expiration_time=expires), NOW)


@given(
    st.builds(
        DHTRecord,
        key=st.binary(max_size=40),
        subkey=st.binary(max_size=60) | st.just(subkey_of(WHO.peer)),
        value=st.binary(max_size=200),
        expiration_time=st.floats() | st.just(time.time() + 60),
    )
)
def test_anything_at_all_is_refused_without_an_exception(record: DHTRecord) -> None:
    assert not VALIDATOR.validate(record)
    assert not OwnerValidator(None).validate(record)


def test_nobody_signs_under_a_sub_key_that_is_not_his() -> None:
    for validator in (OwnerValidator(OTHER), OwnerValidator(None)):
        with pytest.raises(ValueError, match="one's own sub-key"):
            validator.sign_value(unsigned())


class Shelf:
    """As much of a DHT node as a directory needs."""

    def __init__(self, peer: str) -> None:
        self.peer_id = peer
        self.shelf: dict[str, dict[Any, ValueWithExpiration]] = {}
        self.plain: Any = None

    async def store(self, key: str, value: bytes, expiration_time: float, subkey: bytes) -> bool:
        self.shelf.setdefault(key, {})[subkey] = ValueWithExpiration(value, expiration_time)
        return True

    async def get(self, key: str, latest: bool) -> Any:
        if self.plain is not None:
            return self.plain
        return ValueWithExpiration(self.shelf[key], 0.0) if key in self.shelf else None


def test_records_are_found_by_owner_kind_and_scope() -> None:
    async def main() -> None:
        shelf = Shelf(WHO.peer)
        directory = Directory(shelf, bytes(32), pytest.fail)
        await directory.put("roster", "all", b"record", 20.0)
        assert await directory.get("roster", "all") == [(WHO.peer, b"record")]
        assert await directory.get("roster", "7") == []
        assert await directory.get("claim", "all") == []
        assert await Directory(shelf, b"\x01" * 32, pytest.fail).get("roster", "all") == []

    asyncio.run(main())


def test_no_record_is_stored_for_longer_than_its_validators_allow() -> None:
    async def main() -> None:
        shelf = Shelf(WHO.peer)
        directory = Directory(shelf, bytes(32), pytest.fail)
        await directory.put("provider", "x", b"record", 10 * MAX_TTL_SECONDS)
        ((owner, stored),) = shelf.shelf[directory.key("provider", "x")].items()
        assert owner == peer_id_bytes(WHO.peer)
        assert stored.expiration_time < time.time() + MAX_TTL_SECONDS

    asyncio.run(main())


def test_what_is_no_dictionary_of_records_is_nothing() -> None:
    async def main() -> None:
        shelf = Shelf(WHO.peer)
        directory = Directory(shelf, bytes(32), pytest.fail)
        for plain in (b"bytes", 7, None):
            shelf.plain = ValueWithExpiration(plain, 0.0)
            assert await directory.get("roster", "all") == []
        shelf.plain = ValueWithExpiration({peer_id_bytes(WHO.peer): ValueWithExpiration("no bytes", 0.0)}, 0.0)
        assert await directory.get("roster", "all") == []

    asyncio.run(main())


def test_a_slot_that_is_used_again_renews_only_the_new_record() -> None:
    async def main() -> None:
        directory = Directory(Shelf(WHO.peer), bytes(32), pytest.fail)
        await directory.keep("claim", "claim", "0", b"first", 20.0)
        (first,) = directory._kept.values()
        await directory.keep("claim", "claim", "1", b"second", 20.0)
        (second,) = directory._kept.values()
        await asyncio.gather(first, return_exceptions=True)
        assert first.cancelled()
        assert not second.done()
        await directory.stop()
        await asyncio.gather(second, return_exceptions=True)
        assert second.cancelled()

    asyncio.run(main())


def test_who_keeps_an_older_record_never_gets_before_a_newer_one() -> None:
    class SlowOnce(Shelf):
        """Takes long to store the first record."""

        async def store(self, key: str, value: bytes, expiration_time: float, subkey: bytes) -> bool:
            if value == b"first":
                await asyncio.sleep(0.05)
            return await super().store(key, value, expiration_time, subkey)

    async def main() -> None:
        shelf = SlowOnce(WHO.peer)
        directory = Directory(shelf, bytes(32), pytest.fail)
        await asyncio.gather(*(directory.keep("roster", "roster", "all", r, 0.06) for r in (b"first", b"second")))
        await asyncio.sleep(0.2)
        assert await directory.get("roster", "all") == [(WHO.peer, b"second")]
        await directory.stop()

    asyncio.run(main())


def test_what_is_replaced_before_its_turn_is_never_stored() -> None:
    class Slow(Shelf):
        """Notes what it stores."""

        stored: ClassVar[list[bytes]] = []

        async def store(self, key: str, value: bytes, expiration_time: float, subkey: bytes) -> bool:
            self.stored.append(value)
            await asyncio.sleep(0.01)
            return await super().store(key, value, expiration_time, subkey)

    async def main() -> None:
        directory = Directory(Slow(WHO.peer), bytes(32), pytest.fail)
        first = asyncio.create_task(directory.keep("roster", "roster", "all", b"first", 20.0))
        await asyncio.sleep(0)
        await asyncio.gather(first, *(directory.keep("roster", "roster", "all", r, 20.0) for r in (b"2", b"3", b"4")))
        assert Slow.stored == [b"first", b"4"]
        await directory.stop()

    asyncio.run(main())


def test_renewal_survives_whatever_goes_wrong_and_tells_it() -> None:
    class Broken(Shelf):
        """Stores every second time only."""

        tries = 0

        async def store(self, key: str, value: bytes, expiration_time: float, subkey: bytes) -> bool:
            self.tries += 1
            if self.tries % 2:
                raise RuntimeError("the daemon is gone")
            return await super().store(key, value, expiration_time, subkey)

    async def main() -> None:
        shelf, told = Broken(WHO.peer), []
        directory = Directory(shelf, bytes(32), told.append)
        with pytest.raises(RuntimeError):
            await directory.keep("roster", "roster", "all", b"record", 0.03)
        async with asyncio.timeout(10):
            while shelf.tries < 4:
                await asyncio.sleep(0.01)
        assert told[0] == "this peer's roster was not renewed (the daemon is gone)"
        assert await directory.get("roster", "all") == [(WHO.peer, b"record")]
        await directory.stop()

    asyncio.run(main())
