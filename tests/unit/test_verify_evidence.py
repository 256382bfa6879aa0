"""Proofs: a true one convinces a stranger, and nothing that can be made of an honest peer's words does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.averaging.codec import Layout
from p2pasr.averaging.merkle import Tree, part_digests
from p2pasr.errors import LocalError, Reject, RemoteError
from p2pasr.protocol.assignment import assign
from p2pasr.protocol.cohorts import cohort_of
from p2pasr.protocol.encoding import blob_digest, pack, unpack
from p2pasr.protocol.messages import Claim, Receipt, Signed, seal
from p2pasr.protocol.state import State
from p2pasr.protocol.tensors import pack_tensors, unpack_tensors
from p2pasr.tasks.base import Checkpoint
from p2pasr.verify.conflict import Conflict
from p2pasr.verify.evidence import (
    MAX_PROOF_BYTES,
    ConflictProof,
    Judge,
    LinkProof,
    Opening,
    Proof,
    ReductionProof,
    SegmentProof,
    Undecided,
    WorkProof,
    compare_ends,
    pack_proof,
    unpack_proof,
)

from .builders import (
    FinishedRound,
    Trained,
    digest_of,
    finish_round,
    make_claim,
    make_identity,
    make_manifest,
    make_receipt,
    make_state,
    random_delta,
    train_claim,
    train_toy,
)

MANIFEST = make_manifest()
STATE = make_state(MANIFEST)
EVE, ANNE = make_identity(1), make_identity(2)


def rerun(claim: Claim, segment: int, before: State, start: bytes | None) -> bytes:
    return train_toy(MANIFEST, claim, segment, before, start)


JUDGE = Judge(MANIFEST, STATE.params, rerun)


def changed(checkpoint: bytes, by: float) -> bytes:
    """A checkpoint whose parameters lie elsewhere."""
    read = Checkpoint.unpack(checkpoint)
    return Checkpoint({k: v + np.float32(by) for k, v in read.params.items()}, read.moments, read.step).pack()


def lazy_from(first: int) -> Callable[[int, bytes], bytes]:
    """Spoils checkpoint `first` only; what is trained after it follows from it."""
    return lambda index, checkpoint: changed(checkpoint, 0.5) if index == first else checkpoint


def opening(work: Trained, index: int) -> Opening:
    return Opening(work.checkpoints[index], work.way(index))


def segment_proof(work: Trained, index: int) -> SegmentProof:
    start = opening(work, index - 1) if index else None
    return SegmentProof(work.claim, index, STATE.blob, start, opening(work, index))


def link_proof(work: Trained) -> LinkProof:
    return LinkProof(work.claim, STATE.blob, opening(work, len(work.checkpoints) - 1))


HONEST = train_claim(ANNE, MANIFEST, STATE)
LINK_LIAR = train_claim(EVE, MANIFEST, STATE, lie=0.25)
LAZY = [train_claim(EVE, MANIFEST, STATE, spoil=lazy_from(index)) for index in range(3)]


def parts_of(finished: FinishedRound, index: int) -> dict[int, tuple[bytes, tuple[bytes, ...]]]:
    """What the three members of the builders' round sent of one part, each with its way to its claim's root."""
    layout = Layout.of(finished.manifest.parameters, finished.manifest.averaging)
    parts = {}
    for position, member in enumerate(finished.record.members):
        claim, encoded = member.message, layout.encode(random_delta(position))
        tree = Tree("delta", claim.run, claim.round, claim.peer)
        parts[position] = encoded[index], tree.prove(part_digests(encoded), index)
    return parts


def reduction_proof(finished: FinishedRound, receipt: Signed[Receipt], index: int) -> ReductionProof:
    before = finished.before.blob
    return ReductionProof(receipt, finished.record.members, before, index, parts_of(finished, index))


ROUND = finish_round(MANIFEST, STATE)
WRONG_RECEIPT = seal(
    ROUND.identities[0], make_receipt(ROUND.identities[0], STATE, ROUND.record.members, {0: b"not it", 1: b"nor it"})
)

TWO_CLAIMS = Conflict(
    seal(EVE, make_claim(EVE, MANIFEST, STATE)), seal(EVE, make_claim(EVE, MANIFEST, STATE, loss_after=0.5))
)

GUILTY: dict[str, Proof] = {
    "conflict": ConflictProof(TWO_CLAIMS),
    "claim": WorkProof(seal(EVE, make_claim(EVE, MANIFEST, STATE, shards=(bytes(32),))), STATE.blob),
    "link": link_proof(LINK_LIAR),
    "reduction": reduction_proof(ROUND, WRONG_RECEIPT, 1),
    "first segment": segment_proof(LAZY[0], 0),
    "later segment": segment_proof(LAZY[1], 1),
    "last segment": segment_proof(LAZY[2], 2),
}
PACKED = {name: pack_proof(proof) for name, proof in GUILTY.items()}


def judged(packed: bytes, judge: Judge = JUDGE) -> str:
    return unpack_proof(packed).check(judge)


# --- true proofs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GUILTY)
def test_a_true_proof_convinces_a_stranger_and_names_the_cheat(name: str) -> None:
    proof = unpack_proof(PACKED[name])
    sentence = proof.check(JUDGE)
    assert proof.accused == EVE.peer
    assert EVE.peer[-6:] in sentence
    assert pack_proof(proof) == PACKED[name]


@pytest.mark.parametrize("name", ["conflict", "claim", "link", "reduction"])
def test_arithmetic_is_checked_from_the_manifest_alone(name: str) -> None:
    assert judged(PACKED[name], Judge(MANIFEST))


def test_a_segment_that_nobody_can_train_again_here_is_neither_proved_nor_refuted() -> None:
    with pytest.raises(LocalError, match="name the shards with --shards"):
        judged(PACKED["first segment"], Judge(MANIFEST))


@pytest.mark.parametrize("codec", ["float32", "float16", "int8", "int4"])
def test_a_wrong_delta_is_proved_with_every_codec_and_an_honest_one_with_none(codec: str) -> None:
    manifest = make_manifest(averaging={"codec": codec})
    state = make_state(manifest)
    liar, honest = train_claim(EVE, manifest, state, lie=0.25), train_claim(ANNE, manifest, state)
    guilty = LinkProof(liar.claim, state.blob, opening(liar, 2))
    assert "its own last checkpoint does not give" in judged(pack_proof(guilty), Judge(manifest))
    with pytest.raises(Reject, match="is the one that its last checkpoint gives"):
        LinkProof(honest.claim, state.blob, opening(honest, 2)).check(Judge(manifest))


def test_a_claimed_norm_that_the_delta_does_not_have_is_proved() -> None:
    honest = train_claim(EVE, MANIFEST, STATE)
    boast = seal(EVE, dataclasses.replace(honest.claim.message, delta_norm=2 * honest.claim.message.delta_norm))
    assert LinkProof(boast, STATE.blob, opening(honest, 2)).check(JUDGE)


def test_a_last_checkpoint_that_is_none_is_proof() -> None:
    junk = b"no checkpoint"
    claim = make_claim(EVE, MANIFEST, STATE, segments=1)
    tree = Tree("trace", claim.run, claim.round, claim.peer)
    signed = seal(EVE, dataclasses.replace(claim, trace_root=tree.root([blob_digest(junk)])))
    assert LinkProof(signed, STATE.blob, Opening(junk, ())).check(JUDGE)
    assert SegmentProof(signed, 0, STATE.blob, None, Opening(junk, ())).check(JUDGE)


def test_a_sender_that_the_group_does_not_have_is_proof_against_the_reducer() -> None:
    who, members = ROUND.identities[0], ROUND.record.members
    receipt = seal(who, make_receipt(who, STATE, members, {0: b"x"}, {0: (0, 7)}))
    parts = {0: parts_of(ROUND, 0)[0], 7: (b"", ())}
    proof = ReductionProof(receipt, members, STATE.blob, 0, parts)
    assert "senders" in judged(pack_proof(proof))


@pytest.mark.parametrize("codec", ["float32", "int8"])
@pytest.mark.parametrize("kind", ["mean", "centered-clip"])
def test_parts_whose_mean_overflows_are_a_reducers_fault_and_nobody_stumbles_over_them(codec: str, kind: str) -> None:
    rule = {"kind": kind, "clip_norm": None, "bucket": 1}
    manifest = make_manifest(averaging={"codec": codec, "rule": rule})
    state, layout = make_state(manifest), Layout.of(manifest.parameters, manifest.averaging)
    largest = np.finfo(np.float32).max if codec == "float32" else np.float32(2.67e36)
    who, claims, parts = [make_identity(number) for number in range(1, 4)], [], {}
    for position, each in enumerate(who):
        sign = -1 if kind == "centered-clip" and position % 2 else 1
        part = np.full(layout.part_bytes(0) // 4, sign * largest, "<f4").tobytes()
        if codec == "int8":
            blocks = -(-layout.part_size(0) // layout.codec.block)
            part = part[: 4 * blocks] + b"\x7f" * layout.part_size(0)
        digests = [blob_digest(part)] * layout.parts
        tree = Tree("delta", state.run, state.round, each.peer)
        claims.append(seal(each, make_claim(each, manifest, state, delta_root=tree.root(digests))))
        parts[position] = part, tree.prove(digests, 0)
    receipt = seal(who[0], make_receipt(who[0], state, claims, {0: b"whatever"}))
    proof = ReductionProof(receipt, tuple(claims), state.blob, 0, parts)
    assert "states a wrong result for part 0" in judged(pack_proof(proof), Judge(manifest))


# --- what a trace may hide ------------------------------------------------------------------------


def respelled(checkpoint: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """A checkpoint whose arrays or description were changed after packing."""
    tensors, description = unpack_tensors(checkpoint)
    arrays = dict(tensors)
    change(arrays, description)
    return pack_tensors(arrays, description)


def another_step(_arrays: dict[str, Any], description: dict[str, Any]) -> None:
    description["step"] = 0


def a_decoy(arrays: dict[str, Any], _description: dict[str, Any]) -> None:
    """The true moment under a name that nobody reads, a wrong one where the next segment starts."""
    arrays["x/encoder.a/exp_avg"] = arrays["moment/encoder.a/exp_avg"]
    arrays["moment/encoder.a/exp_avg"] = np.full((20, 10), 1e6, np.float32)


def a_moment_called_param(arrays: dict[str, Any], _description: dict[str, Any]) -> None:
    arrays["moment/encoder.a/param"] = arrays["param/encoder.a"]


@pytest.mark.parametrize("change", [another_step, a_decoy, a_moment_called_param])
def test_nothing_that_the_next_segment_starts_from_is_passed_over(change: Callable[..., None]) -> None:
    claim = HONEST.claim.message
    mine = train_toy(MANIFEST, claim, 0, STATE, None)
    assert compare_ends(STATE, None, mine, mine, MANIFEST).finding == "same"
    assert compare_ends(STATE, None, respelled(mine, change), mine, MANIFEST).finding == "different"


# --- honest peers ---------------------------------------------------------------------------------


def test_a_claim_of_the_work_that_was_given_is_no_proof_whatever_state_is_held_beside_it() -> None:
    claim = seal(ANNE, make_claim(ANNE, MANIFEST, STATE))
    with pytest.raises(Reject, match="names the work that its author was given"):
        WorkProof(claim, STATE.blob).check(JUDGE)
    with pytest.raises(Reject, match="another state than the claim starts from"):
        WorkProof(claim, dataclasses.replace(STATE, round=1).blob).check(JUDGE)
    elsewhere = seal(ANNE, dataclasses.replace(claim.message, round=STATE.round + 1))
    with pytest.raises(Reject, match="the state of another round"):
        WorkProof(elsewhere, STATE.blob).check(JUDGE)


@pytest.mark.parametrize("index", range(3))
def test_an_honest_segment_is_no_proof(index: int) -> None:
    with pytest.raises(Reject, match="trained again, is same"):
        judged(pack_proof(segment_proof(HONEST, index)))


@pytest.mark.parametrize(("off", "finding"), [(1e-9, "same|close"), (1e-6, "close"), (2e-5, "unclear")])
def test_an_honest_segment_of_other_hardware_is_no_proof(off: float, finding: str) -> None:
    def elsewhere(claim: Claim, segment: int, before: State, start: bytes | None) -> bytes:
        return changed(rerun(claim, segment, before, start), off)

    with pytest.raises(Reject, match=f"trained again, is ({finding})") as raised:
        segment_proof(HONEST, 1).check(Judge(MANIFEST, STATE.params, elsewhere))
    assert isinstance(raised.value, Undecided) == (finding == "unclear")


def test_a_segment_that_cannot_be_trained_here_decides_nothing() -> None:
    def fails(*_: Any) -> bytes:
        raise Reject("segment 2, trained again, comes to no end")

    with pytest.raises(Undecided, match="comes to no end"):
        segment_proof(HONEST, 1).check(Judge(MANIFEST, STATE.params, fails))


def test_a_cheat_in_a_cohort_is_proved_by_the_shards_that_its_cohort_prefers() -> None:
    manifest = make_manifest(averaging={"first_bits": 1})
    state = make_state(manifest)
    everybody = [make_identity(number) for number in range(1, 9)]
    apart = [assign(manifest, state.digest, {}, who.peer, cohort_of(state.run, who.peer, 1)) for who in everybody]
    as_one = [assign(manifest, state.digest, {}, who.peer) for who in everybody]
    who, shards = next(each for *each, other in zip(everybody, apart, as_one, strict=True) if each[1] != other)
    liar = train_claim(who, manifest, state, lie=0.25, shards=shards)
    last = len(liar.checkpoints) - 1
    proof = LinkProof(liar.claim, state.blob, Opening(liar.checkpoints[last], liar.way(last)))
    assert "claimed a delta in round 0" in proof.check(Judge(manifest, state.params))


def test_segments_after_a_spoilt_checkpoint_are_not_held_against_their_trainer_twice() -> None:
    with pytest.raises(Reject, match="is same"):
        judged(pack_proof(segment_proof(LAZY[0], 1)))


@pytest.mark.parametrize("kind", ["mean", "trimmed-mean", "median", "krum", "centered-clip"])
def test_an_honest_receipt_is_no_proof(kind: str) -> None:
    manifest = make_manifest(averaging={"rule": {"kind": kind}})
    finished = finish_round(manifest, make_state(manifest))
    for receipt in finished.record.receipts:
        for part in receipt.message.parts:
            with pytest.raises(Reject, match="the right one"):
                reduction_proof(finished, receipt, part.index).check(Judge(manifest))


def frames() -> Iterator[tuple[str, Proof]]:
    """Everything that a slanderer can put together from honest statements and honest bytes."""
    honest, blob = HONEST, STATE.blob
    later = dataclasses.replace(STATE, round=1, parent=STATE.digest)
    yield "the end of another segment", SegmentProof(honest.claim, 1, blob, opening(honest, 0), opening(honest, 2))
    yield "another start", SegmentProof(honest.claim, 2, blob, opening(honest, 0), opening(honest, 2))
    yield "no start", SegmentProof(honest.claim, 1, blob, None, opening(honest, 1))
    yield "a start where there is none", SegmentProof(honest.claim, 0, blob, opening(honest, 0), opening(honest, 0))
    yield "a segment that there is not", SegmentProof(honest.claim, 3, blob, opening(honest, 2), opening(honest, 2))
    yield "a negative segment", SegmentProof(honest.claim, -1, blob, opening(honest, 1), opening(honest, 2))
    yield "another state", SegmentProof(honest.claim, 0, later.blob, None, opening(honest, 0))
    yield "somebody else's end", SegmentProof(honest.claim, 0, blob, None, opening(LAZY[0], 0))
    yield "an earlier checkpoint as the last", LinkProof(honest.claim, blob, opening(honest, 1))
    yield "a link from another state", LinkProof(honest.claim, later.blob, opening(honest, 2))
    yield "somebody else's last checkpoint", LinkProof(honest.claim, blob, opening(LAZY[2], 2))
    members, receipt = ROUND.record.members, ROUND.record.receipts[1]
    parts = parts_of(ROUND, 1)
    yield "parts of another index", ReductionProof(receipt, members, blob, 1, parts_of(ROUND, 2))
    yield "a part less", ReductionProof(receipt, members, blob, 1, {0: parts[0], 1: parts[1]})
    yield "a part more", ReductionProof(receipt, members, blob, 1, {**parts, 3: parts[0]})
    yield "parts exchanged", ReductionProof(receipt, members, blob, 1, {0: parts[1], 1: parts[0], 2: parts[2]})
    yield "members in another order", ReductionProof(receipt, members[::-1], blob, 1, parts)
    yield "a member less", ReductionProof(receipt, members[:2], blob, 1, parts)
    yield "a part that it did not reduce", ReductionProof(receipt, members, blob, 0, parts_of(ROUND, 0))
    yield "a reduction from another state", ReductionProof(receipt, members, later.blob, 1, parts)


@pytest.mark.parametrize(("what", "proof"), frames(), ids=[what for what, _ in frames()])
def test_no_arrangement_of_an_honest_peers_words_is_a_proof(what: str, proof: Proof) -> None:
    with pytest.raises(RemoteError):
        proof.check(JUDGE)
    with pytest.raises(RemoteError):
        judged(pack_proof(proof))


@pytest.mark.parametrize("name", GUILTY)
def test_a_proof_of_another_run_is_refused(name: str) -> None:
    other = make_manifest(name="another run")
    with pytest.raises(RemoteError):
        judged(PACKED[name], Judge(other, STATE.params, rerun))


@pytest.mark.parametrize("name", GUILTY)
@given(data=st.data())
def test_whatever_is_changed_in_a_proof_is_noticed(name: str, data: st.DataObject) -> None:
    packed = bytearray(PACKED[name])
    at = data.draw(st.integers(0, len(packed) - 1))
    packed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RemoteError):
        judged(bytes(packed))


# --- junk ---------------------------------------------------------------------------------------


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.binary(max_size=200))
def test_bytes_that_are_no_proof_are_refused(junk: bytes) -> None:
    with pytest.raises(Reject):
        unpack_proof(junk)


@given(st.sampled_from([*(proof.kind for proof in GUILTY.values()), "other"]), VALUES)
def test_values_that_are_no_proof_are_refused(kind: str, body: Any) -> None:
    with pytest.raises(Reject):
        unpack_proof(pack({"kind": kind, "body": body}))


@pytest.mark.parametrize("name", GUILTY)
@given(data=st.data())
def test_a_field_that_holds_something_else_is_refused(name: str, data: st.DataObject) -> None:
    content = unpack(PACKED[name], MAX_PROOF_BYTES)
    key = data.draw(st.sampled_from(sorted(content["body"])))
    value = data.draw(VALUES)
    packed = pack({"kind": content["kind"], "body": {**content["body"], key: value}})
    if packed != PACKED[name]:
        with pytest.raises(RemoteError):
            judged(packed)


@pytest.mark.parametrize("name", GUILTY)
def test_a_proof_with_a_field_more_or_less_is_refused(name: str) -> None:
    content = unpack(PACKED[name], MAX_PROOF_BYTES)
    for body in ({**content["body"], "more": 1}, dict(list(content["body"].items())[1:])):
        with pytest.raises(Reject):
            unpack_proof(pack({"kind": content["kind"], "body": body}))


@pytest.mark.parametrize("segment", ["1", True, 1.0])
def test_a_proof_has_one_spelling(segment: Any) -> None:
    content = unpack(PACKED["later segment"], MAX_PROOF_BYTES)
    with pytest.raises(Reject):
        unpack_proof(pack({"kind": "segment", "body": {**content["body"], "segment": segment}}))


@pytest.mark.parametrize(
    "changes",
    [{"shards": (digest_of("no shard of the run"),)}, {"segments": 5}, {"round": 3}, {"against": (EVE.peer,)}],
    ids=str,
)
def test_claims_that_no_peer_takes_are_not_tried(changes: dict[str, Any]) -> None:
    def never(*_: Any) -> bytes:
        raise AssertionError("nothing is trained for a claim that breaks the rules")

    work = train_claim(EVE, MANIFEST, STATE, **{"segments": 2, **changes}, spoil=lazy_from(0))
    with pytest.raises(RemoteError):
        segment_proof(work, 0).check(Judge(MANIFEST, STATE.params, never))
    with pytest.raises(RemoteError):
        LinkProof(work.claim, STATE.blob, opening(work, len(work.checkpoints) - 1)).check(JUDGE)
    receipt = seal(EVE, make_receipt(EVE, STATE, (work.claim,), {0: b"x"}))
    layout = Layout.of(MANIFEST.parameters, MANIFEST.averaging)
    parts = layout.cut(work.delta)
    tree = Tree("delta", STATE.run, STATE.round, EVE.peer)
    sent = {0: (bytes(parts[0]), tree.prove(part_digests(parts), 0))}
    with pytest.raises(RemoteError):
        ReductionProof(receipt, (work.claim,), STATE.blob, 0, sent).check(JUDGE)
