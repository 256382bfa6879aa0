"""Private shards: which are drawn, what they are called, what may be said of them, and what it counts for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.averaging.rules import weights
from p2pasr.errors import LocalError, Reject
from p2pasr.protocol.manifest import RunConfig, RunManifest, validated
from p2pasr.protocol.messages import Claim
from p2pasr.protocol.private import NO_TRACE, conceal, counted_seconds, draw
from p2pasr.protocol.rules import check_attestation, check_claim
from p2pasr.protocol.state import advance, cover, parse_state, shard_seconds, trained_seconds

from .builders import (
    digest_of,
    initial_params,
    make_attestation,
    make_claim,
    make_identity,
    make_manifest,
    make_state,
    manifest_content,
    view_of,
)

CAP = 300.0
WHO = make_identity(1)


def private_manifest(**changes: Any) -> RunManifest:
    return make_manifest(data={"policy": "private", "private_weight_seconds": CAP}, **changes)


MANIFEST = private_manifest()
STATE = make_state(MANIFEST)
VIEW = view_of(MANIFEST, STATE)

digests = st.binary(min_size=32, max_size=32)
seconds = st.floats(0, 1e9)


def private_claim(number: int = 1, /, **changes: Any) -> Claim:
    names = (digest_of("one"), digest_of("two"))
    fields = {"shards": names, "seconds": 120.0, "trace_root": NO_TRACE, **changes}
    return make_claim(make_identity(number), MANIFEST, STATE, **fields)


# --- draws and names ----------------------------------------------------------------------------------------------


@given(st.sets(digests, min_size=1, max_size=12), digests, st.integers(1, 12))
def test_as_many_own_shards_as_the_round_takes_are_drawn_in_an_order_that_only_state_and_peer_decide(
    shards: set[bytes], state: bytes, count: int
) -> None:
    drawn = draw(sorted(shards), state, WHO.peer, count)
    assert len(drawn) == len(set(drawn)) == min(count, len(shards))
    assert set(drawn) <= shards
    assert drawn == draw(sorted(shards, reverse=True), state, WHO.peer, count)
    assert draw(shards, state, WHO.peer, 12)[:count] == drawn


def test_every_shard_is_drawn_in_some_round() -> None:
    shards = {digest_of(f"own {number}") for number in range(10)}
    drawn = {shard for number in range(60) for shard in draw(shards, digest_of(f"state {number}"), WHO.peer, 2)}
    assert drawn == shards


@given(digests, digests, digests, digests)
def test_a_name_tells_neither_shard_nor_round_without_the_secret(
    shard: bytes, state: bytes, other_state: bytes, secret: bytes
) -> None:
    (name,) = conceal([shard], state, secret)
    assert len(name) == 32
    assert (name,) == conceal([shard], state, secret), "whoever is told the secret can check it"
    assert name not in (shard, *conceal([shard], state, bytes(32 * [secret[0] ^ 1])))
    if state != other_state:
        assert name not in conceal([shard], other_state, secret)


# --- what a claim may say -------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=2))
def test_what_a_peer_says_of_its_audio_is_what_the_rules_accept(lengths: list[float]) -> None:
    stated = counted_seconds(lengths, MANIFEST)
    check_claim(private_claim(seconds=stated), VIEW)
    assert stated == min(CAP, max(1.0, sum(lengths)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": (digest_of("one"), digest_of("two"), digest_of("three"))}, "names a private shard twice, or more"),
        ({"shards": (digest_of("one"),) * 2}, "names a private shard twice, or more than 2"),
        ({"seconds": 0.0}, "states 0 s of private audio; a claim counts for 1 to 300"),
        ({"seconds": CAP + 0.1}, "states 300.1 s of private audio"),
        ({"seconds": 1e15}, "of private audio"),
        ({"tier": 5}, "states tier 5, and nobody sees how long private clips are"),
        ({"trace_root": digest_of("trace")}, "commits to checkpoints, which tell of private shards"),
    ],
)
def test_c4_a_private_claim_that_says_too_much_is_refused(changes: dict[str, Any], message: str) -> None:
    check_claim(private_claim(), VIEW)
    with pytest.raises(Reject, match=message):
        check_claim(private_claim(**changes), VIEW)


def test_c4_a_claim_of_shared_shards_states_no_audio_of_its_own() -> None:
    manifest = make_manifest()
    state = make_state(manifest)
    with pytest.raises(Reject, match="states 1 s of audio, which follow from its shards"):
        check_claim(make_claim(WHO, manifest, state, seconds=1.0), view_of(manifest, state))


# --- what it counts for ---------------------------------------------------------------------------------------------


@given(st.lists(st.floats(1, CAP), min_size=1, max_size=8), st.lists(st.integers(1, 4), min_size=8, max_size=8))
def test_no_private_claim_weighs_or_earns_more_than_the_run_counts(stated: list[float], segments: list[int]) -> None:
    claims = [
        private_claim(n + 1, seconds=s, segments=c) for n, (s, c) in enumerate(zip(stated, segments, strict=False))
    ]
    assert max(weights(claims, MANIFEST, {}, {})) <= CAP
    after = advance(STATE, MANIFEST, claims, initial_params(), {})
    for claim in claims:
        assert after.credit[claim.peer] == claim.seconds * claim.segments / 4
        assert after.credit[claim.peer] == trained_seconds(claim, MANIFEST, shard_seconds(MANIFEST))
    check_attestation(make_attestation(WHO, after), view_of(MANIFEST, after))
    assert parse_state(after.blob, MANIFEST, initial_params()).credit == after.credit


def test_private_claims_cover_nothing_and_end_no_epoch() -> None:
    probe = tuple(bytes.fromhex(shard.digest) for shard in MANIFEST.shards[:2])
    claims = [private_claim(n, shards=names) for n, names in ((1, probe), (2, (digest_of("own"),)))]
    assert cover({}, claims, MANIFEST) == ({}, False)
    after = advance(STATE, MANIFEST, claims, initial_params(), {})
    assert (after.covered, after.epoch) == ({}, 0)


def test_the_bounds_on_what_a_group_merges_follow_from_what_a_claim_counts_for() -> None:
    assert MANIFEST.most_seconds_per_group == MANIFEST.averaging.max_group * CAP
    assert MANIFEST.seconds_per_assignment == CAP


# --- manifests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": {"policy": "private", "redundancy": 2}}, "redundancy and duplicates are about shared shards"),
        ({"data": {"policy": "private", "duplicates": "first"}}, "leave them out with policy: private"),
        (
            {"data": {"policy": "private"}, "averaging": {"rule": {"clip_norm": None}}},
            "averaging.rule.clip_norm is null; with data.policy: private a number must limit",
        ),
        ({"data": {"policy": "private", "probe_margin": 0}}, "data.probe_margin: input should be greater than 0"),
        ({"data": {"policy": "private", "private_weight_seconds": 0.5}}, "greater than or equal to 1"),
    ],
)
def test_a_private_run_that_would_not_hold_what_it_says_is_refused_in_one_sentence(
    changes: dict[str, Any], sentence: str
) -> None:
    content = {key: manifest_content(**changes)[key] for key in ("name", "task", "rounds", "averaging", "data")}
    with pytest.raises(LocalError) as caught:
        validated(RunConfig, content, "run.yaml")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
