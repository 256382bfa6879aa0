"""The chain of a run's round records: it holds from the first state on, and any broken link is found."""

from __future__ import annotations

import dataclasses

from p2pasr.protocol.state import State, advance
from p2pasr.verify.lineage import Checked, follow
from p2pasr.verify.record import RoundRecord

from .builders import FinishedRound, digest_of, finish_round, make_manifest, make_state

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
