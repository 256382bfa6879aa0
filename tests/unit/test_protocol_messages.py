"""Records: read back as they were sealed, or refused with the field that is wrong."""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.errors import Reject
from p2pasr.peers.streams import MAX_MESSAGE_BYTES
from p2pasr.protocol.encoding import pack, unpack
from p2pasr.protocol.manifest import MAX_PARTS
from p2pasr.protocol.messages import (
    MAX_RECEIPT_BYTES,
    MAX_RECORD_BYTES,
    Attestation,
    Claim,
    Message,
    PartReceipt,
    Receipt,
    Roster,
    Signed,
    message_digest,
    read_fields,
    seal,
    unseal,
)
from p2pasr.protocol.signing import sign

from .builders import (
    digest_of,
    make_attestation,
    make_claim,
    make_identity,
    make_manifest,
    make_receipt,
    make_roster,
    make_state,
)

MANIFEST = make_manifest()
STATE = make_state(MANIFEST)
WHO, OTHER = make_identity(1), make_identity(2)
CLAIM = make_claim(WHO, MANIFEST, STATE)
MESSAGES: dict[str, Message] = {
    "roster": make_roster(WHO, STATE),
    "claim": CLAIM,
    "attestation": make_attestation(WHO, STATE),
    "receipt": make_receipt(WHO, STATE, [seal(WHO, CLAIM)], {0: b"result", 1: b"other"}),
}
EACH = pytest.mark.parametrize("message", [pytest.param(message, id=kind) for kind, message in MESSAGES.items()])

digests = st.binary(min_size=32, max_size=32)
rounds = st.integers(0, 1 << 31)
amounts = st.floats(0, 1e15)
losses = st.floats(-1e9, 1e9)
words = st.text(max_size=128)


def drawn(kind: type[Message], **fields: Any) -> st.SearchStrategy[Any]:
    return st.builds(kind, run=digests, peer=st.just(WHO.peer), round=rounds, state=digests, **fields)


rosters = drawn(
    Roster,
    stage=st.sampled_from(["waiting", "training", "claimed", "leaving"]),
    segments=st.integers(0, 1 << 48),
    closes_at=amounts,
    client_mode=st.booleans(),
    hardware=words,
    version=words,
    addresses=st.lists(st.text(max_size=256), max_size=3).map(tuple),
)
named = st.lists(st.sampled_from([make_identity(number).peer for number in (2, 3, 4)]), max_size=3).map(tuple)
claims = drawn(
    Claim,
    shards=st.lists(digests, min_size=1, max_size=8).map(tuple),
    tier=st.integers(0, 255),
    seconds=amounts,
    segments=st.integers(1, 1 << 16),
    steps=st.integers(1, 1 << 24),
    samples=st.integers(1, 1 << 40),
    trace_root=digests,
    delta_root=digests,
    delta_norm=amounts,
    loss_before=losses,
    loss_after=losses,
    hardware=words,
    against=named,
    undo=st.lists(digests, max_size=3).map(tuple),
    strikes=named,
)
attestations = drawn(Attestation, ancestors=st.lists(digests, max_size=3).map(tuple), work=amounts)
parts = st.builds(
    PartReceipt,
    index=st.integers(0, 1 << 48),
    senders=st.lists(st.integers(0, 1023), min_size=1, max_size=5).map(tuple),
    result=digests,
)
receipts = drawn(
    Receipt,
    group=st.binary(min_size=8, max_size=64),
    members=st.lists(digests, min_size=1, max_size=5).map(tuple),
    parts=st.lists(parts, max_size=5).map(tuple),
)


def as_map(message: Any) -> dict[str, Any]:
    return dataclasses.asdict(message)


def forge(kind: str, body: Any) -> bytes:
    """A record whose signature is right, whatever its body is."""
    return pack({"body": body, "kind": kind, "signature": sign(WHO, kind, pack(body))})


def altered(message: Message, field: str, value: Any) -> bytes:
    return forge(message.kind, {**as_map(message), field: value})


@given(rosters | claims | attestations | receipts)
def test_a_record_survives_its_journey(message: Message) -> None:
    sealed = seal(WHO, message)
    assert unseal(sealed.pack(), type(message), MAX_RECEIPT_BYTES) == sealed


@EACH
def test_a_forged_record_of_these_tests_is_read_when_nothing_is_wrong_with_it(message: Message) -> None:
    data = forge(message.kind, as_map(message))
    assert unseal(data, type(message)) == seal(WHO, message)
    assert data == seal(WHO, message).pack()


@EACH
def test_a_record_without_one_of_its_fields_is_refused(message: Message) -> None:
    for field in as_map(message):
        body = as_map(message)
        del body[field]
        with pytest.raises(Reject, match=f"a {message.kind}'s {field} is malformed"):
            unseal(forge(message.kind, body), type(message))


@EACH
def test_a_record_with_a_further_field_is_refused(message: Message) -> None:
    with pytest.raises(Reject, match=f"a {message.kind}'s extra is malformed"):
        unseal(altered(message, "extra", 1), type(message))


@EACH
def test_a_field_of_another_type_is_refused(message: Message) -> None:
    for field, value in as_map(message).items():
        for stranger in (None, True, 7, 1.5, "text", b"bytes", (), {}, {"a": 1}):
            if type(stranger) is not type(value):
                with pytest.raises(Reject):
                    unseal(altered(message, field, stranger), type(message))


@EACH
def test_a_value_that_would_have_to_be_coerced_is_refused(message: Message) -> None:
    for field, value in as_map(message).items():
        if isinstance(value, bool):
            coerced: list[Any] = [int(value), str(value), float(value)]
        elif isinstance(value, int):
            coerced = [float(value), str(value), str(value).encode(), bool(value)]
        elif isinstance(value, float):
            coerced = [int(value), str(value), bool(value)]
        elif isinstance(value, bytes):
            coerced = [value.hex(), "x" * len(value)]
        elif isinstance(value, str):
            coerced = [value.encode()]
        else:
            continue
        for other in coerced:
            with pytest.raises(Reject):
                unseal(altered(message, field, other), type(message))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        *(
            (kind, field, value)
            for kind in MESSAGES
            for field, value in (
                ("run", b""),
                ("run", bytes(31)),
                ("run", bytes(33)),
                ("state", bytes(31)),
                ("round", -1),
                ("round", (1 << 31) + 1),
                ("peer", ""),
                ("peer", WHO.peer[:-1]),
                ("peer", WHO.peer + "1"),
                ("peer", WHO.peer + "\n"),
                ("peer", "12D3KooW" + "0" * 44),
            )
        ),
        ("roster", "stage", "idle"),
        ("roster", "segments", -1),
        ("roster", "segments", (1 << 48) + 1),
        ("roster", "closes_at", -0.5),
        ("roster", "closes_at", 1e16),
        ("roster", "hardware", "x" * 129),
        ("roster", "version", "x" * 129),
        ("roster", "addresses", ("x" * 257,)),
        ("roster", "addresses", ("x",) * 9),
        ("roster", "addresses", (7,)),
        ("claim", "shards", ()),
        ("claim", "shards", (bytes(32),) * 129),
        ("claim", "shards", (bytes(31),)),
        ("claim", "shards", ("x" * 32,)),
        ("claim", "segments", 0),
        ("claim", "segments", (1 << 16) + 1),
        ("claim", "steps", 0),
        ("claim", "steps", (1 << 24) + 1),
        ("claim", "samples", 0),
        ("claim", "samples", (1 << 40) + 1),
        ("claim", "trace_root", bytes(31)),
        ("claim", "delta_root", bytes(33)),
        ("claim", "delta_norm", -1.0),
        ("claim", "delta_norm", 1e300),
        ("claim", "loss_before", 1e10),
        ("claim", "loss_after", -1e10),
        ("claim", "hardware", "x" * 129),
        ("attestation", "ancestors", (bytes(31),)),
        ("attestation", "ancestors", (bytes(32),) * 17),
        ("attestation", "work", -1.0),
        ("attestation", "work", 1e16),
        ("receipt", "group", bytes(7)),
        ("receipt", "group", bytes(65)),
        ("receipt", "members", ()),
        ("receipt", "members", (bytes(31),)),
        ("receipt", "parts", ({"index": 0, "senders": (0,)},)),
        ("receipt", "parts", ({"index": 0, "senders": (), "result": bytes(32)},)),
        ("receipt", "parts", ({"index": -1, "senders": (0,), "result": bytes(32)},)),
        ("receipt", "parts", ({"index": 0, "senders": (1024,), "result": bytes(32)},)),
        ("receipt", "parts", ({"index": 0, "senders": (-1,), "result": bytes(32)},)),
        ("receipt", "parts", ({"index": 0, "senders": (0.0,), "result": bytes(32)},)),
        ("receipt", "parts", ({"index": 0, "senders": (True,), "result": bytes(32)},)),
        ("receipt", "parts", ({"index": 0, "senders": (0,), "result": bytes(31)},)),
        ("receipt", "parts", ({"index": 0, "senders": (0,), "result": bytes(32), "more": 1},)),
        ("receipt", "parts", ((0, (0,), bytes(32)),)),
    ],
)
def test_a_field_out_of_bounds_is_refused(kind: str, field: str, value: Any) -> None:
    message = MESSAGES[kind]
    with pytest.raises(Reject):
        unseal(altered(message, field, value), type(message))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_fields_that_are_not_finite_are_refused_even_before_they_are_encoded(value: float) -> None:
    for kind, field in (("claim", "delta_norm"), ("claim", "loss_after"), ("attestation", "work")):
        message = MESSAGES[kind]
        with pytest.raises(Reject):
            read_fields({**as_map(message), field: value}, type(message))


@pytest.mark.parametrize("body", [None, 7, "text", b"bytes", (), {}])
def test_a_body_that_is_no_record_is_refused(body: Any) -> None:
    with pytest.raises(Reject, match=r"a claim's .* is malformed"):
        unseal(forge("claim", body), Claim)


@EACH
def test_a_record_is_read_as_its_own_kind_only(message: Message) -> None:
    data = seal(WHO, message).pack()
    for other in MESSAGES.values():
        if other.kind != message.kind:
            with pytest.raises(Reject, match=f"a record is a '{message.kind}' where a '{other.kind}' belongs"):
                unseal(data, type(other))


def test_a_signature_does_not_carry_over_to_another_kind() -> None:
    body = as_map(MESSAGES["attestation"])
    signature = sign(WHO, "claim", pack(body))
    with pytest.raises(Reject, match="does not verify"):
        unseal(pack({"body": body, "kind": "attestation", "signature": signature}), Attestation)


@EACH
def test_a_record_in_the_name_of_somebody_else_is_refused(message: Message) -> None:
    with pytest.raises(Reject, match="does not verify"):
        unseal(altered(message, "peer", OTHER.peer), type(message))


def test_nobody_seals_in_the_name_of_somebody_else() -> None:
    with pytest.raises(ValueError, match="cannot sign for"):
        seal(OTHER, CLAIM)


@EACH
def test_every_changed_byte_of_a_record_is_noticed(message: Message) -> None:
    data = seal(WHO, message).pack()
    for position in range(0, len(data), 3):
        changed = bytearray(data)
        changed[position] ^= 0x01
        with pytest.raises(Reject):
            unseal(bytes(changed), type(message))


@pytest.mark.parametrize(
    "change",
    [
        {"signature": bytes(64)},
        {"signature": bytes(63)},
        {"signature": b""},
        {"signature": "x" * 64},
        {"signature": None},
        {"kind": None},
        {"kind": b"claim"},
        {"kind": "Claim"},
        {"note": "x"},
    ],
)
def test_an_envelope_with_anything_else_in_it_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Reject):
        unseal(pack({**unpack(seal(WHO, CLAIM).pack(), MAX_RECORD_BYTES), **change}), Claim)


@pytest.mark.parametrize("outer", [None, 7, (), {}, {"body": 1}, {"body": 1, "kind": "claim"}, "claim"])
def test_an_envelope_that_is_none_is_refused(outer: Any) -> None:
    with pytest.raises(Reject, match=r"is not \{body, kind, signature\}"):
        unseal(pack(outer), Claim)


def test_an_envelope_that_is_not_canonical_is_refused() -> None:
    data = seal(WHO, CLAIM).pack()
    assert data[:6] == b"\x83\xa4body"
    body_end = data.index(b"\xa4kind")
    swapped = data[:1] + data[body_end : data.index(b"\xa9signature")] + data[1:body_end]
    with pytest.raises(Reject, match="canonical form"):
        unseal(swapped + data[data.index(b"\xa9signature") :], Claim)


def test_a_record_over_its_limit_is_refused() -> None:
    data = seal(WHO, CLAIM).pack()
    assert unseal(data, Claim, len(data)).message == CLAIM
    with pytest.raises(Reject, match="exceeds the limit"):
        unseal(data, Claim, len(data) - 1)


def test_the_longest_claim_and_roster_fit_into_a_record() -> None:
    claim = make_claim(
        WHO,
        MANIFEST,
        STATE,
        round=1 << 31,
        shards=tuple(digest_of(str(number)) for number in range(128)),
        steps=1 << 24,
        samples=1 << 40,
        hardware="x" * 128,
    )
    assert unseal(seal(WHO, claim).pack(), Claim).message == claim
    roster = make_roster(WHO, STATE, hardware="x" * 128, version="x" * 128, addresses=("/" + "x" * 255,) * 8)
    assert unseal(seal(WHO, roster).pack(), Roster).message == roster


def test_a_digest_names_the_message_whatever_the_signature() -> None:
    assert Signed(CLAIM, bytes(64)).digest == seal(WHO, CLAIM).digest == message_digest(CLAIM)


@EACH
def test_every_field_enters_the_digest(message: Message) -> None:
    digests_seen = {message_digest(message)}
    for field, value in as_map(message).items():
        if isinstance(value, bool):
            other: Any = not value
        elif isinstance(value, int | float):
            other = value + 1
        elif isinstance(value, bytes):
            other = bytes(len(value))
        elif isinstance(value, str):
            other = value + "x"
        else:
            other = () if value else (bytes(32),)
        digests_seen.add(message_digest(dataclasses.replace(message, **{field: other})))
    assert len(digests_seen) == 1 + len(as_map(message))


def test_the_same_body_of_another_kind_has_another_digest() -> None:
    class Impostor(Claim):
        kind = "impostor"

    assert message_digest(Impostor(**as_map(CLAIM))) != message_digest(CLAIM)


def test_a_manifest_has_no_more_parts_than_the_messages_about_them_can_name() -> None:
    # A run with more would train, and then none of its rounds would ever be averaged.
    def accepted(parts: int) -> bool:
        try:
            make_manifest(parameters=256 * parts, averaging={"part_values": 256})
        except ValueError:
            return False
        return True

    most = bisect.bisect_left(range(1, 1 << 26), True, key=lambda parts: not accepted(parts))
    assert most == MAX_PARTS
    everybody = tuple(range(MANIFEST.averaging.max_group))
    part = pack(as_map(PartReceipt(most - 1, everybody, bytes(32))))
    assert most * len(part) < MAX_RECEIPT_BYTES - 4096
    assert most * len(pack(bytes(32))) < MAX_MESSAGE_BYTES - 128
