"""Each rule, by its number: what keeps it passes, what breaks it is refused for that reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.errors import Ignore, Reject, RemoteError
from p2pasr.protocol.assignment import assign
from p2pasr.protocol.cohorts import Cohort, cohort_of
from p2pasr.protocol.messages import NO_UNDO, Claim, PartReceipt, Receipt, Signed, seal
from p2pasr.protocol.rules import check_attestation, check_claim, check_part, check_receipts, check_roster
from p2pasr.protocol.tiers import EVERY, TIERS

from .builders import (
    GROUP,
    digest_of,
    finish_round,
    make_attestation,
    make_claim,
    make_identity,
    make_manifest,
    make_receipt,
    make_roster,
    make_state,
    manifest_content,
    view_of,
)

MANIFEST = make_manifest()
STATE = make_state(MANIFEST)
VIEW = view_of(MANIFEST, STATE)
WHO = make_identity(1)
CLAIM = make_claim(WHO, MANIFEST, STATE)
ROUND = finish_round(MANIFEST, STATE)
PARTS = 3


@pytest.mark.parametrize("segments", [1, 2, 3, 4])
def test_a_claim_that_keeps_every_rule_passes(segments: int) -> None:
    check_claim(make_claim(WHO, MANIFEST, STATE, segments=segments), VIEW)


@pytest.mark.parametrize(
    ("rule", "changes", "error", "message"),
    [
        ("C1", {"run": digest_of("other")}, Reject, "is for another run"),
        ("C2", {"round": 1}, Ignore, "is for round 1, this is round 0"),
        ("C2", {"round": 10**9}, Ignore, "is for round 1000000000"),
        ("C3", {"state": digest_of("other")}, Ignore, "starts from another state"),
        ("C4", {"shards": CLAIM.shards[:1]}, Reject, "names other shards"),
        ("C4", {"shards": CLAIM.shards[::-1]}, Reject, "names other shards"),
        ("C4", {"shards": (*CLAIM.shards, CLAIM.shards[0])}, Reject, "names other shards"),
        ("C4", {"shards": (digest_of("easy"), digest_of("easier"))}, Reject, "names other shards"),
        ("C5", {"segments": 5}, Reject, "states 5 segments, a round has 4"),
        ("C5", {"steps": 7}, Reject, "states 7 steps in 2 segments"),
        ("C5", {"steps": 1 << 20}, Reject, "steps in 2 segments"),
        ("C5", {"samples": 13}, Reject, "states 13 samples in 6 steps"),
        ("C5", {"samples": 1 << 30}, Reject, "samples in 6 steps"),
    ],
)
def test_a_claim_that_breaks_a_rule_is_refused(
    rule: str, changes: dict[str, Any], error: type[RemoteError], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_claim(make_claim(WHO, MANIFEST, STATE, **changes), VIEW)


MIXED = make_manifest(
    rounds={"shards_per_peer": 6},
    shards=tuple(
        {**shard, "longest": longest}
        for shard, longest in zip(manifest_content()["shards"], (None, 3.0, 5.0, 5.001, 12.5, 30.0), strict=True)
    ),
)
MIXED_STATE = make_state(MIXED)


@given(st.sampled_from((EVERY, *TIERS)), st.sampled_from((EVERY, *TIERS)))
def test_c4_a_claim_names_the_shards_of_the_tier_that_it_states(stated: int, trained: int) -> None:
    view = view_of(MIXED, MIXED_STATE)
    shards = view.assigned(WHO.peer, trained)
    claim = make_claim(WHO, MIXED, MIXED_STATE, tier=stated, shards=shards)
    if shards == assign(MIXED, MIXED_STATE.digest, {}, WHO.peer, tier=stated):
        check_claim(claim, view)
        lengths = [MIXED.clip_lengths.get(shard.hex()) for shard in claim.shards]
        assert stated == EVERY or all(length is None or length <= stated for length in lengths)
    else:
        with pytest.raises(Reject, match="names other shards"):
            check_claim(claim, view)


@given(st.integers(0, 255).filter(lambda tier: tier not in (EVERY, *TIERS)))
def test_c4_a_tier_that_there_is_not_is_refused_even_where_it_changes_nothing(tier: int) -> None:
    with pytest.raises(Reject, match=f"states tier {tier}; there are only 0, 5, 10, 15, 20, 30"):
        check_claim(dataclasses.replace(CLAIM, tier=tier), VIEW)


def test_c9_a_claim_counts_in_the_cohort_of_its_author_alone() -> None:
    for cohort in (Cohort(1, 0), Cohort(1, 1)):
        view = dataclasses.replace(VIEW, cohort=cohort)
        claim = make_claim(WHO, MANIFEST, STATE, shards=view.assigned(WHO.peer))
        if cohort == cohort_of(STATE.run, WHO.peer, 1):
            check_claim(claim, view)
        else:
            with pytest.raises(Reject, match="is by a peer of another cohort"):
                check_claim(claim, view)


def test_c7_a_claim_speaks_against_peers_of_its_own_cohort() -> None:
    others = [make_identity(number).peer for number in range(2, 20)]
    ours = cohort_of(STATE.run, WHO.peer, 1)
    view = dataclasses.replace(VIEW, cohort=ours)
    claim = make_claim(WHO, MANIFEST, STATE, shards=view.assigned(WHO.peer))
    mate = next(peer for peer in others if ours.has(STATE.run, peer))
    stranger = next(peer for peer in others if not ours.has(STATE.run, peer))
    check_claim(dataclasses.replace(claim, against=(mate,), undo=(NO_UNDO,)), view)
    with pytest.raises(Reject, match="speaks against peers of another cohort"):
        check_claim(dataclasses.replace(claim, against=(stranger,), undo=(NO_UNDO,)), view)


EVE, ANNE = make_identity(2).peer, make_identity(3).peer
AGAINST = tuple(sorted((EVE, ANNE)))


def speaking(against: tuple[str, ...], *undo: bytes) -> Claim:
    return dataclasses.replace(CLAIM, against=against, undo=undo or (NO_UNDO,) * len(against))


@pytest.mark.parametrize("against", [(), (EVE,), AGAINST])
def test_c7_a_claim_may_speak_against_others(against: tuple[str, ...]) -> None:
    check_claim(speaking(against), VIEW)


@pytest.mark.parametrize("against", [AGAINST[::-1], (EVE, EVE), (WHO.peer,)])
def test_c7_it_speaks_in_order_once_and_not_against_itself(against: tuple[str, ...]) -> None:
    with pytest.raises(Reject, match="out of order, twice, or in vain"):
        check_claim(speaking(against), VIEW)


@pytest.mark.parametrize(("against", "undos"), [((), 1), ((EVE,), 2), (AGAINST, 1)])
def test_c7a_it_has_one_undo_for_each_that_it_speaks_against(against: tuple[str, ...], undos: int) -> None:
    with pytest.raises(Reject, match=f"names {undos} undos for {len(against)} peers"):
        check_claim(speaking(against, *[digest_of("undo")] * undos), VIEW)


@pytest.mark.parametrize(
    "averaging", [{"rule": {"kind": "median"}}, {"outer": {"kind": "fedavgm"}}, {"outer": {"kind": "nesterov"}}]
)
def test_c7a_it_names_an_undo_only_where_what_was_merged_is_a_term_of_a_sum(averaging: dict[str, Any]) -> None:
    check_claim(speaking((EVE,), digest_of("undo")), VIEW)
    manifest = make_manifest(averaging={**manifest_content()["averaging"], **averaging})
    view = dataclasses.replace(VIEW, manifest=manifest)
    check_claim(speaking((EVE,)), view)
    with pytest.raises(Reject, match="nothing that was merged is taken out again"):
        check_claim(speaking((EVE,), digest_of("undo")), view)


def test_c6_and_c7_who_was_banned_claims_nothing_and_is_not_spoken_against_again() -> None:
    view = dataclasses.replace(VIEW, bans={EVE: 3})
    with pytest.raises(Ignore, match="was banned in round 3"):
        check_claim(make_claim(make_identity(2), MANIFEST, STATE), view)
    with pytest.raises(Reject, match="in vain"):
        check_claim(speaking((EVE,)), view)


def test_c6_and_c10_who_is_suspended_claims_nothing_and_is_not_named_again() -> None:
    view = dataclasses.replace(VIEW, suspended={EVE: 9})
    with pytest.raises(Ignore, match="is suspended until round 9"):
        check_claim(make_claim(make_identity(2), MANIFEST, STATE), view)
    with pytest.raises(Reject, match="for a strike out of order, twice, or in vain"):
        check_claim(dataclasses.replace(CLAIM, strikes=(EVE,)), view)


@pytest.mark.parametrize("strikes", [AGAINST[::-1], (EVE, EVE), (WHO.peer,)])
def test_c10_a_claim_names_others_for_a_strike_in_order_and_once(strikes: tuple[str, ...]) -> None:
    check_claim(dataclasses.replace(CLAIM, strikes=AGAINST), VIEW)
    with pytest.raises(Reject, match="for a strike out of order, twice, or in vain"):
        check_claim(dataclasses.replace(CLAIM, strikes=strikes), VIEW)
    cohort = next(cohort for cohort in (Cohort(1, 0), Cohort(1, 1)) if cohort.has(STATE.run, WHO.peer))
    others = [make_identity(number).peer for number in range(2, 20)]
    stranger = next(peer for peer in others if not cohort.has(STATE.run, peer))
    view = dataclasses.replace(VIEW, cohort=cohort)
    claim = make_claim(WHO, MANIFEST, STATE, shards=view.assigned(WHO.peer), strikes=(stranger,))
    with pytest.raises(Reject, match="peers of another cohort for a strike"):
        check_claim(claim, view)


def test_c8_and_a5_a_run_may_admit_listed_peers_only() -> None:
    listed = make_manifest(admission={"kind": "allowlist", "peers": (WHO.peer,)})
    state = make_state(listed)
    stranger = make_identity(2)
    check_claim(make_claim(WHO, listed, state), view_of(listed, state))
    check_attestation(make_attestation(WHO, state), view_of(listed, state))
    with pytest.raises(Ignore, match="is not among the peers"):
        check_claim(make_claim(stranger, listed, state), view_of(listed, state))
    with pytest.raises(Ignore, match="is not among the peers"):
        check_attestation(make_attestation(stranger, state), view_of(listed, state))


def test_a_claim_with_the_shards_of_somebody_else_is_refused() -> None:
    others = make_claim(make_identity(2), MANIFEST, STATE).shards
    assert others != CLAIM.shards
    with pytest.raises(Reject, match="names other shards"):
        check_claim(make_claim(WHO, MANIFEST, STATE, shards=others), VIEW)


def test_a_claim_is_judged_by_what_is_covered() -> None:
    covered = {shard.hex(): 1 for shard in CLAIM.shards}
    with pytest.raises(Reject, match="names other shards"):
        check_claim(CLAIM, dataclasses.replace(VIEW, covered=covered))


def test_whoever_is_merely_behind_is_ignored_whatever_else_he_states() -> None:
    with pytest.raises(Ignore):
        check_claim(make_claim(WHO, MANIFEST, STATE, round=3, shards=(digest_of("old"),), samples=1), VIEW)


def test_what_a_claim_says_about_its_own_quality_is_not_judged() -> None:
    check_claim(make_claim(WHO, MANIFEST, STATE, loss_before=-1e9, loss_after=1e9, delta_norm=1e15), VIEW)


@pytest.mark.parametrize(("segments", "limit"), [(1, 0.5), (2, 1.0), (4, 1.5)])
def test_d1_a_part_whose_values_moved_further_than_its_segments_can_move_one_is_refused(
    segments: int, limit: float
) -> None:
    limits, claim = (0.5, 1.0, 1.25, 1.5), make_claim(WHO, MANIFEST, STATE, segments=segments)
    check_part(7, limit, claim, limits)
    sentence = rf"part 7 of \S+ moves a value by {limit + 0.25:g}, which {segments} segments .* more than {limit:g}$"
    with pytest.raises(Reject, match=sentence):
        check_part(7, limit + 0.25, claim, limits)


def test_where_no_limit_is_known_a_part_may_hold_any_value() -> None:
    check_part(0, 1e38, CLAIM, None)


def test_a_roster_record_of_this_run_passes() -> None:
    check_roster(make_roster(WHO, STATE), STATE.run)


def test_r1_a_roster_record_of_another_run_is_refused() -> None:
    with pytest.raises(Reject, match="is for another run"):
        check_roster(make_roster(WHO, STATE, run=digest_of("other")), STATE.run)


@pytest.mark.parametrize("round_number", [0, 1, MANIFEST.rounds.rounds])
def test_an_attestation_that_keeps_every_rule_passes(round_number: int) -> None:
    ancestors = tuple(digest_of(f"before {number}") for number in range(round_number))
    work = round_number * MANIFEST.most_seconds_per_round
    attestation = make_attestation(WHO, STATE, round=round_number, ancestors=ancestors, work=work)
    check_attestation(attestation, VIEW)


@pytest.mark.parametrize(
    ("rule", "changes", "message"),
    [
        ("A1", {"run": digest_of("other")}, "is for another run"),
        (
            "A2",
            {"round": MANIFEST.rounds.rounds + 1, "ancestors": (digest_of("p"),)},
            "is for round 9, the run has 8",
        ),
        ("A2", {"round": 10**9, "ancestors": (digest_of("p"),)}, "is for round 1000000000"),
        ("A3", {"ancestors": (digest_of("p"),)}, "impossible ancestors"),
        ("A3", {"round": 1}, "impossible ancestors"),
        ("A3", {"round": 1, "ancestors": (digest_of("p"), digest_of("q"))}, "impossible ancestors"),
        ("A3", {"round": 1, "ancestors": (STATE.digest,)}, "impossible ancestors"),
        ("A3", {"round": 2, "ancestors": (digest_of("p"), digest_of("p"))}, "impossible ancestors"),
        ("A4", {"work": 1.0}, "which 0 rounds cannot hold"),
        ("A4", {"round": 1, "ancestors": (digest_of("p"),), "work": 1e12}, "which 1 rounds cannot hold"),
    ],
)
def test_an_attestation_that_breaks_a_rule_is_refused(rule: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Reject, match=message):
        check_attestation(make_attestation(WHO, STATE, **changes), VIEW)


def check(*receipts: Receipt, group: bytes = GROUP, parts: int = PARTS) -> None:
    check_receipts([Signed(receipt, bytes(64)) for receipt in receipts], group, ROUND.record.members, parts)


def receipts() -> tuple[Receipt, Receipt]:
    first, second = (signed.message for signed in ROUND.record.receipts)
    return first, second


def with_parts(receipt: Receipt, *parts: PartReceipt) -> Receipt:
    return dataclasses.replace(receipt, parts=parts)


def test_receipts_that_cover_every_part_once_pass_in_any_order() -> None:
    first, second = receipts()
    check(first, second)
    check(second, first)
    check(with_parts(first, *first.parts, *second.parts))
    check(with_parts(first, *second.parts, *first.parts), with_parts(second))


def test_p1_a_receipt_about_another_group_or_by_a_stranger_is_refused() -> None:
    first, second = receipts()
    stranger = make_identity(9).peer
    for other in (
        dataclasses.replace(second, group=b"another group"),
        dataclasses.replace(second, members=second.members[::-1]),
        dataclasses.replace(second, members=second.members[:2]),
        dataclasses.replace(second, peer=stranger),
    ):
        with pytest.raises(Reject, match="is about another group"):
            check(first, other)
    with pytest.raises(Reject, match="is about another group"):
        check(first, second, group=b"another group")


@pytest.mark.parametrize("changes", [{"run": digest_of("other")}, {"round": 5}, {"state": digest_of("other")}])
def test_p1_a_receipt_for_another_round_than_its_claims_is_refused(changes: dict[str, Any]) -> None:
    first, second = receipts()
    with pytest.raises(Reject):
        check(first, dataclasses.replace(second, **changes))


def test_p2_a_part_that_two_peers_reduced_is_refused() -> None:
    first, second = receipts()
    with pytest.raises(Reject, match="part 0 is in the receipts of"):
        check(first, with_parts(second, *first.parts, *second.parts))


def test_p2_a_part_that_one_peer_reduced_twice_is_refused() -> None:
    first, second = receipts()
    with pytest.raises(Reject, match="part 0 is in the receipts of"):
        check(with_parts(first, *first.parts, *first.parts), second)
    with pytest.raises(Reject, match="part 0 is in the receipts of"):
        check(first, first, second)


@pytest.mark.parametrize("senders", [(1, 0), (0, 0), (0, 1, 1), (3,), (0, 1023)])
def test_p3_senders_that_are_no_members_or_out_of_order_are_refused(senders: tuple[int, ...]) -> None:
    first, second = receipts()
    part = dataclasses.replace(first.parts[0], senders=senders)
    with pytest.raises(Reject, match="impossible senders for part 0"):
        check(with_parts(first, part), second)


@pytest.mark.parametrize("senders", [(0,), (2,), (0, 2), (0, 1, 2)])
def test_p3_any_members_in_order_may_be_the_senders_of_a_part(senders: tuple[int, ...]) -> None:
    first, second = receipts()
    check(with_parts(first, dataclasses.replace(first.parts[0], senders=senders)), second)


def test_p4_a_missing_part_is_named() -> None:
    first, second = receipts()
    with pytest.raises(Reject, match="no receipt covers part 0"):
        check(second)
    with pytest.raises(Reject, match="no receipt covers part 1"):
        check(first)
    with pytest.raises(Reject, match="no receipt covers part 3"):
        check(first, second, parts=4)
    with pytest.raises(Reject, match="no receipt covers part 0"):
        check()


def test_p4_a_part_that_does_not_exist_is_refused_and_not_called_missing() -> None:
    first, second = receipts()
    extra = dataclasses.replace(first.parts[0], index=7)
    with pytest.raises(Reject, match="part 7") as caught:
        check(with_parts(first, *first.parts, extra), second)
    assert "no receipt covers" not in str(caught.value)


def test_a_signed_receipt_of_these_tests_names_its_members_by_digest() -> None:
    members = [seal(WHO, CLAIM)]
    assert make_receipt(WHO, STATE, members, {0: b""}).members == (members[0].digest,)
