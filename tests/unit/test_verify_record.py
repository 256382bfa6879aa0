"""Round records: a stranger can check them from the manifest, and finds out what was changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from p2pasr.averaging.codec import Layout
from p2pasr.errors import Reject, RemoteError
from p2pasr.protocol.encoding import blob_digest, pack, unpack
from p2pasr.protocol.messages import PartReceipt, Signed, seal
from p2pasr.verify.record import MAX_RECORD_BYTES, RoundRecord, check_record, in_every_part

from .builders import (
    digest_of,
    finish_round,
    make_attestation,
    make_claim,
    make_identity,
    make_manifest,
    make_receipt,
    make_state,
)

MANIFEST = make_manifest()
STATE = make_state(MANIFEST)
ROUND = finish_round(MANIFEST, STATE)
RECORD = ROUND.record
PACKED = RECORD.pack()


def content() -> dict[str, Any]:
    return unpack(PACKED, MAX_RECORD_BYTES)


def test_a_record_survives_its_bytes() -> None:
    assert RoundRecord.unpack(PACKED) == RECORD
    assert RoundRecord.unpack(PACKED).pack() == PACKED


@pytest.mark.parametrize("codec", ["float32", "float16", "int8", "int4"])
def test_the_record_of_an_honest_round_checks_out(codec: str) -> None:
    manifest = make_manifest(averaging={"codec": codec})
    finished = finish_round(manifest, make_state(manifest))
    check_record(RoundRecord.unpack(finished.record.pack()), finished.view, finished.average)


def test_everybody_is_in_every_part_of_an_honest_round() -> None:
    assert in_every_part(RECORD.receipts) == (0, 1, 2)
    assert RECORD.merged() == tuple(member.message for member in RECORD.members)


def test_whoever_is_missing_in_one_part_is_not_merged() -> None:
    who = ROUND.identities[0]
    results = dict.fromkeys(range(3), b"")
    receipt = seal(who, make_receipt(who, STATE, RECORD.members, results, {1: (0, 2)}))
    record = dataclasses.replace(RECORD, receipts=(receipt,))
    assert in_every_part(record.receipts) == (0, 2)
    assert [claim.peer for claim in record.merged()] == [ROUND.identities[0].peer, ROUND.identities[2].peer]


def test_a_record_without_receipts_merges_nobody() -> None:
    assert dataclasses.replace(RECORD, receipts=()).merged() == ()


@pytest.mark.parametrize("key", sorted(unpack(PACKED, MAX_RECORD_BYTES)))
def test_a_record_that_lacks_something_is_refused(key: str) -> None:
    left = {name: value for name, value in content().items() if name != key}
    with pytest.raises(Reject, match="round record is malformed"):
        RoundRecord.unpack(pack(left))


@pytest.mark.parametrize("value", [None, 7, (), "text", b"bytes", {}])
def test_bytes_that_hold_no_record_are_refused(value: Any) -> None:
    with pytest.raises(Reject):
        RoundRecord.unpack(pack(value))


@pytest.mark.parametrize("data", [b"", b"\xc1", PACKED[:-1], PACKED + b"\x00"])
def test_bytes_that_are_not_canonical_are_refused(data: bytes) -> None:
    with pytest.raises(Reject):
        RoundRecord.unpack(data)


@pytest.mark.parametrize("key", ["members", "receipts", "attestations"])
@pytest.mark.parametrize("value", [None, 7, (7,), ("text",), (b"bytes",), b"bytes", "text", {"a": 1}])
def test_lists_that_hold_no_records_are_refused(key: str, value: Any) -> None:
    with pytest.raises(Reject):
        RoundRecord.unpack(pack({**content(), key: value}))


def test_records_of_another_kind_in_a_list_are_refused() -> None:
    with pytest.raises(Reject, match="where a 'claim' belongs"):
        RoundRecord.unpack(pack({**content(), "members": content()["attestations"]}))


def test_every_signature_in_a_record_is_checked() -> None:
    for key in ("members", "receipts", "attestations"):
        for position in range(len(getattr(RECORD, key))):
            items = list(getattr(RECORD, key))
            items[position] = Signed(items[position].message, bytes(64))
            forged = dataclasses.replace(RECORD, **{key: tuple(items)})
            with pytest.raises(Reject, match="does not verify"):
                RoundRecord.unpack(forged.pack())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run", 7),
        ("run", bytes(31)),
        ("round", "0"),
        ("round", -1),
        ("round", None),
        ("before", bytes(31)),
        ("after", "text"),
        ("group", 7),
        ("average", None),
        ("note", "x"),
    ],
)
def test_a_record_whose_own_fields_are_malformed_is_refused(key: str, value: Any) -> None:
    with pytest.raises(Reject):
        RoundRecord.unpack(pack({**content(), key: value}))


def resealed(record: RoundRecord, position: int, **changes: Any) -> RoundRecord:
    """The record with one claim changed by its author, and receipts about the changed group."""
    who = ROUND.identities[position]
    claim = seal(who, dataclasses.replace(record.members[position].message, **changes))
    members = (*record.members[:position], claim, *record.members[position + 1 :])
    receipts = tuple(
        seal(author, dataclasses.replace(receipt.message, members=tuple(member.digest for member in members)))
        for author, receipt in zip(ROUND.identities, record.receipts, strict=False)
    )
    return dataclasses.replace(record, members=members, receipts=receipts)


def test_the_claims_of_a_record_are_judged_by_the_rules() -> None:
    check_record(resealed(RECORD, 1, loss_after=1.0), ROUND.view, ROUND.average)
    for changes in (
        {"samples": 1},
        {"round": 3},
        {"state": bytes(32)},
        {"shards": RECORD.members[0].message.shards},
    ):
        with pytest.raises(RemoteError):
            check_record(resealed(RECORD, 1, **changes), ROUND.view, ROUND.average)


def test_a_claim_that_was_put_in_place_of_another_is_found_out() -> None:
    who = ROUND.identities[1]
    other = seal(who, make_claim(who, MANIFEST, STATE, segments=1))
    record = dataclasses.replace(RECORD, members=(RECORD.members[0], other, RECORD.members[2]))
    with pytest.raises(Reject, match="is about another group"):
        check_record(record, ROUND.view, ROUND.average)


@pytest.mark.parametrize(
    "change",
    [
        lambda members: members[:2],
        lambda members: members[::-1],
        lambda members: (*members, members[0]),
    ],
)
def test_members_that_were_left_out_or_reordered_are_found_out(change: Callable[[Any], Any]) -> None:
    record = dataclasses.replace(RECORD, members=change(RECORD.members))
    with pytest.raises(Reject):
        check_record(record, ROUND.view, ROUND.average)


def test_a_missing_receipt_is_found_out() -> None:
    for kept in RECORD.receipts:
        with pytest.raises(Reject, match="no receipt covers part"):
            check_record(dataclasses.replace(RECORD, receipts=(kept,)), ROUND.view, ROUND.average)


@pytest.mark.parametrize("position", [0, 4 * 255, 4 * 256, 4 * 599])
def test_an_average_that_differs_in_one_bit_is_found_out(position: int) -> None:
    average = bytearray(ROUND.average)
    average[position] ^= 1
    with pytest.raises(Reject, match=f"part {position // 1024} of the average is not the one"):
        check_record(RECORD, ROUND.view, bytes(average))


@pytest.mark.parametrize("off", [-4, 4])
def test_an_average_of_another_length_is_found_out(off: int) -> None:
    average = ROUND.average[:off] if off < 0 else ROUND.average + bytes(off)
    with pytest.raises(Reject, match="an encoded delta has"):
        check_record(RECORD, ROUND.view, average)


def test_a_receipt_for_another_result_is_found_out() -> None:
    who = ROUND.identities[0]
    first = RECORD.receipts[0].message
    lie = dataclasses.replace(first, parts=(PartReceipt(0, (0, 1, 2), digest_of("another result")),))
    record = dataclasses.replace(RECORD, receipts=(seal(who, lie), RECORD.receipts[1]))
    with pytest.raises(Reject, match="part 0 of the average is not the one"):
        check_record(record, ROUND.view, ROUND.average)


@pytest.mark.parametrize(
    "change",
    [
        {"run": digest_of("another run")},
        {"round": 5},
        {"before": digest_of("another state")},
        {"after": digest_of("another state")},
        {"average": digest_of("another average")},
    ],
)
def test_a_record_that_says_something_else_than_its_parts_is_found_out(change: dict[str, Any]) -> None:
    with pytest.raises(RemoteError):
        check_record(dataclasses.replace(RECORD, **change), ROUND.view, ROUND.average)


def test_attestations_of_another_state_in_a_record_are_found_out() -> None:
    who = make_identity(9)
    strangers = seal(
        who, make_attestation(who, STATE, round=5, state=digest_of("elsewhere"), ancestors=(digest_of("p"),))
    )
    record = dataclasses.replace(RECORD, attestations=(strangers,))
    with pytest.raises(RemoteError):
        check_record(record, ROUND.view, ROUND.average)


def test_the_helper_of_these_tests_averages_what_the_layout_cuts() -> None:
    layout = Layout.of(MANIFEST.parameters, MANIFEST.averaging)
    assert len(layout.cut(ROUND.average)) == 3
    assert blob_digest(ROUND.average) == RECORD.average
