"""The chain of a run's round records: it holds from the first state on, and any broken link is found."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from p2pasr.errors import Reject
from p2pasr.protocol.assignment import assign
from p2pasr.protocol.cohorts import Cohort
from p2pasr.protocol.encoding import pack, unpack
from p2pasr.protocol.messages import Attestation, Claim, Receipt, Signed, seal
from p2pasr.protocol.state import State, advance, mix_due
from p2pasr.verify.lineage import Checked, follow
from p2pasr.verify.record import MixRecord, RoundRecord, check_mix_record, read_record

from .builders import (
    GROUP,
    FinishedRound,
    digest_of,
    finish_round,
    make_attestation,
    make_claim,
    make_identity,
    make_manifest,
    make_receipt,
    make_state,
    view_of,
)

MANIFEST = make_manifest(rounds={"shards_per_peer": 3})
START = make_state(MANIFEST)


def chain(rounds: int) -> tuple[list[RoundRecord], dict[bytes, bytes], list[State]]:
    """Records of honest rounds, their averages by digest, and the states before and after them."""
    states, records, averages = [START], [], {}
    for _ in range(rounds):
        before = states[-1]
        claims = [member.message for member in finish_round(MANIFEST, before).record.members]
        after = advance(before, MANIFEST, claims, before.params, {})
        finished: FinishedRound = finish_round(MANIFEST, before, after.digest)
        records.append(finished.record)
        averages[finished.record.average] = finished.average
        states.append(after)
    return records, averages, states


RECORDS, AVERAGES, STATES = chain(4)


def followed(records: list[RoundRecord]) -> list[Checked]:
    return list(follow(MANIFEST, START, records, AVERAGES.get))


def test_an_honest_chain_holds_over_the_end_of_an_epoch() -> None:
    assert any(state.epoch for state in STATES)
    assert [item.problem for item in followed(RECORDS)] == [None] * 4


def test_it_holds_from_any_state_and_without_the_averages_that_are_no_longer_kept() -> None:
    checked = list(follow(MANIFEST, STATES[2], RECORDS[2:], lambda _: None))
    assert [(item.record.round, item.problem) for item in checked] == [(2, None), (3, None)]


def test_a_record_that_was_left_out_breaks_it() -> None:
    first, second = followed([RECORDS[0], RECORDS[2]])
    assert first.problem is None
    assert second.problem is not None
    assert "the record is of round 2" in second.problem


def test_a_record_that_begins_elsewhere_breaks_it_and_ends_the_check() -> None:
    forged = dataclasses.replace(RECORDS[1], before=digest_of("elsewhere"))
    first, second = followed([RECORDS[0], forged, *RECORDS[2:]])
    assert first.problem is None
    assert second.problem is not None


def test_an_average_that_was_exchanged_breaks_it() -> None:
    averages = {digest: average[::-1] for digest, average in AVERAGES.items()}
    (first,) = follow(MANIFEST, START, RECORDS, averages.get)
    assert first.problem is not None
    assert "average" in first.problem


# --- cohorts --------------------------------------------------------------------------------------

CROWD = make_manifest(rounds={"rounds": 8}, averaging={"mix_rounds": 4, "first_bits": 1})
HALF = [who for who in map(make_identity, range(1, 40)) if Cohort(1, 1).has(CROWD.run_id, who.peer)][:3]


def crowded(onwards: int) -> tuple[State, list[RoundRecord | MixRecord]]:
    """The records of one of two cohorts: rounds, a mix that leads on by so many rounds, and rounds again."""
    start = state = make_state(CROWD)
    line: list[bytes] = []
    records: list[RoundRecord | MixRecord] = []
    while state.round < 8:
        if mix_due(state, CROWD):
            further = min(onwards, 8 - state.round)
            after = dataclasses.replace(state, round=state.round + further, parent=digest_of("many"), common=bytes(32))
            seen = vouched(after, (digest_of("the mixed state"), state.digest, *line)[2 - further :])
            fields = {
                "covered": after.covered,
                "credit": after.credit,
                "bans": {},
                "strikes": {make_identity(9).peer: (1, 0)},
                "bits": after.bits,
                "guests": {},
                "receipts": (mix_receipt(state),),
                "attestations": seen,
            }
            records.append(MixRecord(CROWD.run_id, state.round, state.digest, after.digest, after.round, **fields))
        else:
            claims = [make_claim(who, CROWD, state, shards=shards_of(who.peer, state)) for who in HALF]
            after = advance(state, CROWD, claims, state.params, {})
            records.append(round_record(state, after, claims, line))
        line.insert(0, state.digest)
        if onwards == 2 and isinstance(records[-1], MixRecord):
            line.insert(0, digest_of("the mixed state"))
        state = after
    return start, records


def mix_receipt(state: State, **changes: Any) -> Signed[Receipt]:
    """What a mate states of the share that it reduced."""
    receipt = make_receipt(HALF[0], state, [], {0: b"a part"}, {0: [0, 1]}, **changes)
    return seal(HALF[0], dataclasses.replace(receipt, members=(digest_of("one state"), digest_of("other state"))))


def shards_of(peer: str, state: State) -> tuple[bytes, ...]:
    return assign(CROWD, state.digest, state.covered, peer, Cohort(1, 1))


def vouched(after: State, line: tuple[bytes, ...]) -> tuple[Signed[Attestation], ...]:
    return tuple(seal(who, make_attestation(who, after, ancestors=line)) for who in HALF)


def round_record(before: State, after: State, claims: list[Claim], line: list[bytes]) -> RoundRecord:
    members = tuple(seal(who, claim) for who, claim in zip(HALF, claims, strict=True))
    results = {index: b"part %d" % index for index in range(3)}
    receipt = seal(HALF[0], make_receipt(HALF[0], before, members, results))
    seen = vouched(after, (before.digest, *line))
    average = digest_of("an average that is not kept")
    return RoundRecord(
        CROWD.run_id, before.round, before.digest, after.digest, GROUP, members, (receipt,), average, seen
    )


@pytest.mark.parametrize("onwards", [1, 2])
def test_the_chain_of_a_cohort_holds_through_a_mix(onwards: int) -> None:
    start, records = crowded(onwards)
    assert [record.round for record in records if isinstance(record, MixRecord)] == [3, 7]
    checked = list(follow(CROWD, start, [read_record(record.pack()) for record in records], lambda _: None))
    assert [(item.record, item.problem) for item in checked] == [(record, None) for record in records]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"before": digest_of("elsewhere")}, "not of this one"),
        ({"round": 2}, "not of this one"),
        ({"next_round": 6}, "does not lead to round 6"),
        ({"attestations": ()}, "nobody attests"),
        ({"receipts": (mix_receipt(make_state(CROWD)),)}, "is about another mix"),
        ({"after": digest_of("elsewhere")}, "attests another state"),
    ],
)
def test_a_mix_that_does_not_hold_breaks_the_chain(change: dict[str, Any], sentence: str) -> None:
    start, records = crowded(1)
    forged = [dataclasses.replace(r, **change) if isinstance(r, MixRecord) else r for r in records]
    *whole, broken = follow(CROWD, start, forged, lambda _: None)
    assert [item.problem for item in whole] == [None] * 3
    assert sentence in str(broken.problem)


def test_a_mix_where_there_are_no_cohorts_or_between_boundaries_breaks_the_chain() -> None:
    _, records = crowded(1)
    mix = next(record for record in records if isinstance(record, MixRecord))
    for bits, number in ((0, 3), (1, 2)):
        view = dataclasses.replace(view_of(CROWD, make_state(CROWD)), round=number, state=mix.before)
        with pytest.raises(Reject, match="no cohorts are mixed"):
            check_mix_record(dataclasses.replace(mix, round=number), view, bits)


def test_a_ledger_that_was_changed_after_a_mix_shows_in_the_next_assignment() -> None:
    start, records = crowded(1)
    everything = {shard.digest: 1 for shard in CROWD.shards[:5]}
    forged = [dataclasses.replace(r, covered=everything) if isinstance(r, MixRecord) else r for r in records]
    assert "other shards than it was assigned" in str(list(follow(CROWD, start, forged, lambda _: None))[-1].problem)


@pytest.mark.parametrize("change", [{"bits": 11}, {"credit": {"peer": "1"}}, {"more": 1}])
def test_a_mix_record_that_is_malformed_is_refused(change: dict[str, Any]) -> None:
    _, records = crowded(1)
    mix = next(record for record in records if isinstance(record, MixRecord))
    with pytest.raises(Reject, match="a round record is malformed"):
        read_record(pack({**unpack(mix.pack(), 1 << 20), **change}))
