"""States: equal rounds give equal bits, and nothing else passes for one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.averaging import outer
from p2pasr.errors import Reject
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.manifest import OuterSection, RunManifest
from p2pasr.protocol.messages import NO_UNDO, Claim
from p2pasr.protocol.state import (
    NO_PARENT,
    State,
    advance,
    condemn,
    describe,
    genesis,
    max_state_bytes,
    params_digest,
    parse_state,
    remember,
    trained_seconds,
    undone,
)
from p2pasr.protocol.state import shard_seconds as seconds_of
from p2pasr.protocol.tensors import Tensors, pack_tensors, unpack_tensors

from .builders import SHARDS, digest_of, initial_params, make_claim, make_identity, make_manifest, make_state

MANIFEST = make_manifest()
LIKE = initial_params()
GENESIS = make_state(MANIFEST)
SHARD = MANIFEST.shards[0].digest
PEER = make_identity(1).peer


def moved(state: State, claims: list[Claim], manifest: RunManifest = MANIFEST) -> State:
    params = {name: value + np.float32(0.5) for name, value in state.params.items()}
    return advance(state, manifest, claims, params, {name: value * 0 for name, value in params.items()})


def claims_of(state: State, count: int, manifest: RunManifest = MANIFEST, **changes: Any) -> list[Claim]:
    return [make_claim(make_identity(number + 1), manifest, state, **changes) for number in range(count)]


LATER = moved(GENESIS, claims_of(GENESIS, 2))

CENTERED = make_manifest(averaging={"rule": {"kind": "centered-clip"}})
AVERAGE = {name: value * np.float32(0.25) for name, value in LIKE.items()}


def centered(kind: Any = "fedadam", rounds: int = 2) -> State:
    """The state after some rounds with a rule that starts from the last round's aggregate."""
    state = make_state(CENTERED)
    for number in range(rounds):
        section = OuterSection(kind=kind)
        params, moments = outer.step(state.params, state.moments, AVERAGE, section, number)
        moments = remember(moments, AVERAGE, CENTERED.averaging.rule)
        state = advance(state, CENTERED, [], params, moments)
    return state


def test_the_first_state_follows_from_the_manifest_alone() -> None:
    state = genesis(MANIFEST, LIKE)
    assert (state.run, state.round, state.parent, state.epoch) == (MANIFEST.run_id, 0, NO_PARENT, 0)
    assert state.digest == genesis(MANIFEST, dict(reversed(LIKE.items()))).digest
    assert params_digest(state.params).hex() == MANIFEST.initial
    assert state.work == 0


@pytest.mark.parametrize("state", [GENESIS, LATER])
def test_a_state_survives_its_blob(state: State) -> None:
    read = parse_state(state.blob, MANIFEST, LIKE)
    assert read.digest == state.digest == blob_digest(state.blob)
    assert (read.round, read.parent, read.epoch) == (state.round, state.parent, state.epoch)
    assert (read.covered, read.credit, read.work) == (state.covered, state.credit, state.work)
    for name, value in state.params.items():
        np.testing.assert_array_equal(read.params[name], value)
    assert read.moments.keys() == state.moments.keys()


def test_a_round_leads_to_a_child_of_the_state() -> None:
    assert (LATER.round, LATER.parent, LATER.run) == (1, GENESIS.digest, GENESIS.run)
    assert GENESIS.round == 0, "the state before is not touched"
    assert not GENESIS.credit


@given(st.permutations(claims_of(GENESIS, 4)))
def test_the_order_of_the_claims_does_not_matter(claims: list[Claim]) -> None:
    assert moved(GENESIS, claims).digest == moved(GENESIS, claims_of(GENESIS, 4)).digest


def test_every_part_of_a_state_enters_its_digest() -> None:
    others = [
        dataclasses.replace(LATER, run=digest_of("other")),
        dataclasses.replace(LATER, round=2),
        dataclasses.replace(LATER, parent=digest_of("other")),
        dataclasses.replace(LATER, epoch=1),
        dataclasses.replace(LATER, covered={**LATER.covered, SHARD: 9}),
        dataclasses.replace(LATER, credit={**LATER.credit, PEER: 1.5}),
        dataclasses.replace(LATER, moments={}),
        dataclasses.replace(LATER, params={**LATER.params, "decoder.b": LATER.params["decoder.b"] * 2}),
        dataclasses.replace(LATER, params=LATER.moments, moments=LATER.params),
    ]
    assert len({state.digest for state in (LATER, *others)}) == 1 + len(others)


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_credit_is_the_audio_of_the_shards_scaled_by_the_segments(segments: int) -> None:
    claim = make_claim(make_identity(1), MANIFEST, GENESIS, segments=segments)
    audio = sum(seconds_of(MANIFEST)[shard.hex()] for shard in claim.shards)
    after = moved(GENESIS, [claim])
    assert after.credit == {PEER: pytest.approx(audio * segments / 4)}
    assert after.credit[PEER] == trained_seconds(claim, MANIFEST, seconds_of(MANIFEST)) == after.work


def test_credit_adds_up_over_rounds_and_work_is_its_sum() -> None:
    second = moved(LATER, claims_of(LATER, 3))
    assert set(second.credit) == {make_identity(number).peer for number in (1, 2, 3)}
    for peer in LATER.credit:
        assert second.credit[peer] > LATER.credit[peer]
    assert second.work == pytest.approx(sum(second.credit.values()))


def test_a_round_that_nobody_is_in_still_leads_on() -> None:
    after = moved(GENESIS, [])
    assert (after.round, after.covered, after.credit, after.epoch) == (1, {}, {}, 0)


def test_shards_are_counted_once_for_every_claim_that_names_them() -> None:
    claims = claims_of(GENESIS, 2)
    named = [shard.hex() for claim in claims for shard in claim.shards]
    assert moved(GENESIS, claims).covered == {shard: named.count(shard) for shard in named}


@pytest.mark.parametrize("wanted", [1, 2])
def test_an_epoch_ends_when_every_shard_is_covered_as_often_as_wanted(wanted: int) -> None:
    manifest = make_manifest(data={"redundancy": wanted})
    state = make_state(manifest)
    rounds = 0
    while state.epoch == 0:
        before = state
        state = moved(state, claims_of(state, 1, manifest), manifest)
        rounds += 1
        assert rounds <= wanted * SHARDS
        covered_often = [before.covered.get(shard.digest, 0) >= wanted for shard in manifest.shards]
        assert not all(covered_often), "the epoch should have ended a round before"
    assert state.epoch == 1
    assert state.covered == {}
    assert rounds * 2 >= wanted * SHARDS


def test_a_ledger_written_in_another_order_is_the_same_state() -> None:
    covered = dict(reversed(LATER.covered.items()))
    credit = dict(reversed(LATER.credit.items()))
    assert dataclasses.replace(LATER, covered=covered, credit=credit).digest == LATER.digest


def repacked(change_meta: dict[str, Any] | None = None, change_tensors: Tensors | None = None) -> bytes:
    tensors, meta = unpack_tensors(LATER.blob)
    return pack_tensors({**tensors, **(change_tensors or {})}, {**meta, **(change_meta or {})})


def test_a_state_that_these_tests_repack_is_the_same_blob() -> None:
    assert repacked() == LATER.blob


def test_a_state_of_another_run_is_refused() -> None:
    other = make_manifest(name="another run")
    with pytest.raises(Reject, match="not a canonical state of this run"):
        parse_state(make_state(other).blob, MANIFEST, LIKE)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"encoder.a": LIKE["encoder.a"]},
        {**LIKE, "extra": np.zeros(3, np.float32)},
        {"encoder.a": LIKE["encoder.a"], "decoder.c": LIKE["decoder.b"]},
        {**LIKE, "encoder.a": LIKE["encoder.a"].reshape(10, 20)},
        {**LIKE, "encoder.a": LIKE["encoder.a"].astype(np.float16)},
        {**LIKE, "decoder.b": LIKE["decoder.b"][:-1]},
    ],
)
def test_a_state_with_other_parameters_is_refused(params: Tensors) -> None:
    with pytest.raises(Reject, match="other parameters"):
        parse_state(dataclasses.replace(LATER, params=params).blob, MANIFEST, LIKE)


@pytest.mark.parametrize("name", ["param/encoder.a", "moment/encoder.a"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_state_with_a_value_that_is_not_finite_is_refused(name: str, value: float) -> None:
    spoilt = np.zeros((20, 10), np.float32)
    spoilt[3, 4] = value
    with pytest.raises(Reject, match="not finite"):
        parse_state(repacked(change_tensors={name: spoilt}), MANIFEST, LIKE)


@pytest.mark.parametrize(
    "moments",
    [
        {"encoder.a": np.zeros((10, 20), np.float32)},
        {"encoder.a": np.zeros(1, np.float32)},
        {"encoder.a": np.zeros((20, 10), np.float16)},
        {"encoder.a": np.zeros((20, 10), np.int64)},
        {"unknown": np.zeros((20, 10), np.float32)},
    ],
)
def test_a_state_whose_moments_do_not_fit_its_parameters_is_refused(moments: Tensors) -> None:
    with pytest.raises(Reject):
        parse_state(dataclasses.replace(LATER, moments=moments).blob, MANIFEST, LIKE)


@pytest.mark.parametrize("kind", ["fedavg", "fedavgm", "nesterov", "fedadam"])
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_state_with_a_reference_survives_its_blob(kind: Any, rounds: int) -> None:
    state = centered(kind, rounds)
    read = parse_state(state.blob, CENTERED, LIKE)
    assert read.digest == state.digest
    assert read.reference.keys() == (AVERAGE.keys() if rounds else set())
    assert all(read.reference[name].tobytes() == AVERAGE[name].tobytes() for name in read.reference)
    assert read.moments.keys() == state.moments.keys()


def test_the_reference_leaves_with_its_round_and_the_outer_optimizers_moments_stay() -> None:
    state = centered("nesterov")
    other = {name: value + np.float32(1) for name, value in AVERAGE.items()}
    _, moments = outer.step(state.params, state.moments, other, OuterSection(kind="nesterov"), 2)
    _, plain = outer.step(
        state.params, {name: state.moments[name] for name in LIKE}, other, OuterSection(kind="nesterov"), 2
    )
    assert moments.keys() == plain.keys() == LIKE.keys()
    assert all(moments[name].tobytes() == plain[name].tobytes() for name in LIKE)
    after = advance(state, CENTERED, [], state.params, remember(moments, other, CENTERED.averaging.rule))
    assert all(after.reference[name].tobytes() == other[name].tobytes() for name in LIKE)


def test_a_rule_that_needs_no_reference_keeps_none() -> None:
    assert remember(LATER.moments, AVERAGE, MANIFEST.averaging.rule) == LATER.moments
    assert LATER.reference == {}


def test_a_state_with_a_reference_is_none_of_a_run_whose_rule_needs_none() -> None:
    moments = remember({}, AVERAGE, CENTERED.averaging.rule)
    with pytest.raises(Reject, match="moments do not fit"):
        parse_state(dataclasses.replace(LATER, moments=moments).blob, MANIFEST, LIKE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference/encoder.a": None}, "holds its reference in part"),
        ({"reference/decoder.b": AVERAGE["decoder.b"][:-1]}, "moments do not fit"),
        ({"reference/decoder.b": AVERAGE["decoder.b"].astype(np.float16)}, "moments do not fit"),
        ({"reference/decoder.c": AVERAGE["decoder.b"]}, "moments do not fit"),
        ({"reference/first/decoder.b": AVERAGE["decoder.b"]}, "moments do not fit"),
        ({"reference/decoder.b": AVERAGE["decoder.b"] + np.float32(np.inf)}, "not finite"),
    ],
)
def test_a_state_whose_reference_does_not_fit_its_parameters_is_refused(change: dict[str, Any], message: str) -> None:
    state = centered()
    moments = {name: value for name, value in {**state.moments, **change}.items() if value is not None}
    with pytest.raises(Reject, match=message):
        parse_state(dataclasses.replace(state, moments=moments).blob, CENTERED, LIKE)


def test_the_limit_of_a_state_counts_its_reference() -> None:
    sizes = [
        max_state_bytes(make_manifest(parameters=10**6, averaging={"part_values": 1 << 17, "rule": {"kind": kind}}))
        for kind in ("mean", "centered-clip")
    ]
    assert sizes[1] - sizes[0] == 4 * 10**6


def test_arrays_that_are_neither_parameters_nor_moments_are_refused() -> None:
    with pytest.raises(Reject, match="not a canonical state"):
        parse_state(repacked(change_tensors={"other/a": np.zeros(2, np.float32)}), MANIFEST, LIKE)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "p2pasr-state/2"},
        {"format": None},
        {"run": "zz"},
        {"run": 7},
        {"run": MANIFEST.run_id.hex().upper()},
        {"run": ""},
        {"round": "1"},
        {"round": 1.0},
        {"round": True},
        {"round": None},
        {"parent": "x"},
        {"parent": None},
        {"note": "x"},
    ],
)
def test_a_description_that_is_malformed_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Reject, match="state"):
        parse_state(repacked(change), MANIFEST, LIKE)


@pytest.mark.parametrize(
    "change",
    [
        {"round": -1},
        {"parent": ""},
        {"parent": "00"},
        {"epoch": "1"},
        {"epoch": None},
        {"epoch": -1},
        {"covered": None},
        {"covered": [1]},
        {"covered": {SHARD: "1"}},
        {"covered": {SHARD: None}},
        {"covered": {SHARD: -1}},
        {"credit": None},
        {"credit": [1.0]},
        {"credit": {PEER: "1"}},
        {"credit": {PEER: None}},
        {"credit": {PEER: -1.0}},
    ],
)
def test_a_ledger_that_is_malformed_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Reject):
        parse_state(repacked(change), MANIFEST, LIKE)


@pytest.mark.parametrize("missing", ["format", "run", "round", "parent", "epoch", "covered", "credit"])
def test_a_description_that_lacks_something_is_refused(missing: str) -> None:
    tensors, meta = unpack_tensors(LATER.blob)
    del meta[missing]
    with pytest.raises(Reject, match="description is malformed"):
        parse_state(pack_tensors(tensors, meta), MANIFEST, LIKE)


@pytest.mark.parametrize("blob", [b"", bytes(8), bytes(100), b"\xff" * 64])
def test_bytes_that_are_no_tensor_file_are_refused(blob: bytes) -> None:
    with pytest.raises(Reject):
        parse_state(blob, MANIFEST, LIKE)


@given(st.data())
def test_a_state_with_a_flipped_bit_is_another_state_or_none(data: st.DataObject) -> None:
    blob = bytearray(LATER.blob)
    bit = data.draw(st.integers(0, 8 * len(blob) - 1))
    blob[bit // 8] ^= 1 << bit % 8
    try:
        state = parse_state(bytes(blob), MANIFEST, LIKE)
    except Reject:
        return
    assert state.digest == blob_digest(bytes(blob)) != LATER.digest


def test_no_state_of_ten_thousand_peers_is_longer_than_the_limit() -> None:
    shard = MANIFEST.shards[0].model_dump()
    shards = tuple({**shard, "digest": digest_of(f"shard {n}").hex()} for n in range(3000))
    manifest = make_manifest(shards=shards, data={"redundancy": 64})
    state = dataclasses.replace(
        make_state(manifest),
        round=1_000_000,
        epoch=1 << 40,
        moments={f"{moment}/{name}": value for moment in "mv" for name, value in LIKE.items()},
        covered={shard.digest: 1 << 30 for shard in manifest.shards},
        credit={f"12D3KooW{number:044d}": 123456.789012345678 + number for number in range(10_000)},
    )
    assert len(state.blob) <= max_state_bytes(manifest)


def test_the_limit_grows_with_parameters_and_shards() -> None:
    assert max_state_bytes(make_manifest(parameters=10**6)) >= 3 * 4 * 10**6
    assert max_state_bytes(MANIFEST) < 5 << 20


def test_a_description_for_people_has_the_ledger_in_it() -> None:
    assert describe(LATER) == {
        "round": 1,
        "state": LATER.digest.hex(),
        "epoch": 0,
        "shards_covered": len(LATER.covered),
        "seconds_merged": round(LATER.work, 1),
        "peers_credited": 2,
        "peers_banned": 0,
        "peers_struck": 0,
        "cohorts": 1,
    }


def accusing(number: int, *accused: int) -> Claim:
    against = tuple(sorted(make_identity(each).peer for each in accused))
    return make_claim(make_identity(number), MANIFEST, GENESIS, against=against)


@pytest.mark.parametrize(("claims", "votes", "banned"), [(1, 1, True), (2, 1, False), (3, 2, True), (4, 2, False)])
def test_more_than_half_of_a_rounds_claims_ban(claims: int, votes: int, banned: bool) -> None:
    merged = [accusing(number, *((99,) if number <= votes else ())) for number in range(1, claims + 1)]
    after = advance(GENESIS, MANIFEST, merged, GENESIS.params, {})
    assert after.bans == ({make_identity(99).peer: GENESIS.round} if banned else {})
    assert parse_state(after.blob, MANIFEST, LIKE).bans == after.bans


@given(st.integers(2, 9), st.data())
def test_whoever_is_left_out_of_a_part_votes_all_the_same_and_earns_nothing(count: int, data: st.DataObject) -> None:
    eve, against = make_identity(99).peer, data.draw(st.integers(0, count))
    voters = [accusing(number, *((99,) if number <= against else ())) for number in range(1, count + 1)]
    merged = data.draw(st.lists(st.sampled_from(voters), unique_by=id, min_size=1))
    after = advance(GENESIS, MANIFEST, merged, GENESIS.params, {}, voters)
    assert (eve in after.bans) == (2 * against > count)
    assert after.credit.keys() == {claim.peer for claim in merged}


def undoing(number: int, undo: bytes) -> Claim:
    return dataclasses.replace(accusing(number, 99), undo=(undo,))


UNDO, OTHER = blob_digest(b"undo"), blob_digest(b"another undo")


@pytest.mark.parametrize(
    ("named", "taken"),
    [
        ((UNDO,), True),
        ((UNDO, UNDO, OTHER), True),
        ((UNDO, UNDO, None), True),
        ((UNDO, OTHER, NO_UNDO), False),
        ((UNDO, UNDO, OTHER, NO_UNDO), False),
        ((UNDO, UNDO, None, None), False),
        ((NO_UNDO, NO_UNDO, NO_UNDO), False),
    ],
)
def test_an_undo_counts_when_more_than_half_of_all_merged_claims_name_that_very_one(
    named: tuple[bytes | None, ...], taken: bool
) -> None:
    eve = make_identity(99).peer
    claims = [undoing(number, undo) if undo else accusing(number) for number, undo in enumerate(named, start=1)]
    assert undone(claims) == ({eve: UNDO} if taken else {})
    after = advance(dataclasses.replace(GENESIS, credit={eve: 100.0}), MANIFEST, claims, GENESIS.params, {})
    assert after.credit[eve] == (0.0 if taken else 100.0)
    assert not taken or eve in after.bans


def test_a_ban_stays_with_the_round_in_which_it_was_decided() -> None:
    eve, anne = make_identity(99).peer, make_identity(98).peer
    bans = condemn({eve: 2}, [accusing(1, 98)], 7)
    assert bans == {eve: 2, anne: 7}
    assert list(bans) == sorted(bans)


@pytest.mark.parametrize("bans", [None, [], {"x": -1}, {"x": True}, {"x": 1.0}])
def test_a_state_with_malformed_bans_is_refused(bans: Any) -> None:
    tensors, meta = unpack_tensors(LATER.blob)
    with pytest.raises(Reject):
        parse_state(pack_tensors(tensors, {**meta, "bans": bans}), MANIFEST, LIKE)


@pytest.mark.parametrize(
    "strikes", [None, [], {"x": 1}, {"x": [1]}, {"x": [0, 1]}, {"x": [1, -1]}, {"x": [1, 2.0]}, {"x": [1, 1 << 32]}]
)
def test_a_state_with_malformed_strikes_is_refused(strikes: Any) -> None:
    tensors, meta = unpack_tensors(LATER.blob)
    with pytest.raises(Reject):
        parse_state(pack_tensors(tensors, {**meta, "strikes": strikes}), MANIFEST, LIKE)


def test_a_struck_peer_keeps_its_credit_and_is_trusted_like_a_newcomer_while_the_strike_counts() -> None:
    eve, anne = make_identity(99).peer, make_identity(98).peer
    claims = [dataclasses.replace(accusing(number), strikes=(eve,)) for number in (1, 2)]
    before = dataclasses.replace(GENESIS, credit={eve: 7.0, anne: 5.0})
    after = advance(before, MANIFEST, claims, GENESIS.params, {})
    assert after.strikes == {eve: (1, GENESIS.round)}
    assert parse_state(after.blob, MANIFEST, LIKE).strikes == after.strikes
    assert after.credit[eve] == 7.0
    assert after.work > before.work
    assert after.standing.keys() == after.credit.keys() - {eve}
    last = GENESIS.round + MANIFEST.verify.strike_rounds
    later = [
        advance(dataclasses.replace(after, round=number), MANIFEST, [], GENESIS.params, {})
        for number in (last - 1, last)
    ]
    assert [eve in state.standing for state in later] == [False, True]
