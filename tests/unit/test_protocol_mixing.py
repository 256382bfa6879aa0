"""Mixing: equal inputs give equal states, nothing is lost or counted twice, and two sets never both win."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.errors import Reject
from p2pasr.protocol import mixing
from p2pasr.protocol.cohorts import Cohort, cohort_of
from p2pasr.protocol.encoding import pack, unpack
from p2pasr.protocol.messages import MAX_ANCESTORS, NO_TICKET, Attestation, Mix
from p2pasr.protocol.mixing import NO_CHOICE, Ledger, Part, Tally, choice, decide
from p2pasr.protocol.state import State, advance, mix_due, parse_state

from .builders import digest_of, initial_params, make_claim, make_identity, make_manifest, make_mix, make_state, view_of

MANIFEST = make_manifest(
    rounds={"rounds": 13}, averaging={"mix_rounds": 4, "max_group": 8, "first_bits": 1}, data={"redundancy": 3}
)
COMMON = make_state(MANIFEST)
LIKE = initial_params()
HALVES = [
    [who for who in map(make_identity, range(1, 40)) if cohort_of(COMMON.run, who.peer, 1).index == index][:4]
    for index in (0, 1)
]


def grown(index: int, rounds: int = 2, start: State = COMMON) -> State:
    """The state of one half of the swarm after some rounds of its own."""
    state = start
    for number in range(rounds):
        view = dataclasses.replace(view_of(MANIFEST, state), cohort=Cohort(1, index))
        claims = [make_claim(who, MANIFEST, state, shards=view.assigned(who.peer)) for who in HALVES[index]]
        params = {name: value + np.float32(0.25 * (index + 1) + number) for name, value in state.params.items()}
        state = advance(state, MANIFEST, claims, params, {})
    return state


STATES = [grown(0), grown(1)]
LEDGERS = [mixing.ledger_since(state, COMMON) for state in STATES]
DELTA = {name: np.full_like(value, 0.5) for name, value in LIKE.items()}


def mixed(order: tuple[int, ...] = (0, 1)) -> State:
    states = [STATES[index].digest for index in order]
    return mixing.mixed(COMMON, MANIFEST, 4, states, LEDGERS, DELTA)


# --- states ---------------------------------------------------------------------------------------


def test_cohorts_remember_the_state_that_they_have_in_common() -> None:
    assert COMMON.is_common
    assert [state.common for state in STATES] == [COMMON.digest] * 2
    assert [state.bits for state in STATES] == [1, 1]
    assert grown(0, 3).common == COMMON.digest
    assert parse_state(STATES[0].blob, MANIFEST, LIKE).digest == STATES[0].digest


def test_cohorts_mix_at_a_boundary_unless_they_have_just_parted() -> None:
    due = [mix_due(grown(0, rounds), MANIFEST) for rounds in range(8)]
    assert due == [False, False, False, False, True, False, False, False]
    assert not mix_due(dataclasses.replace(grown(0, 4), bits=0), MANIFEST)


@pytest.mark.parametrize(("peers", "bits"), [(7, 0), (8, 1)])
def test_a_full_group_splits_at_a_boundary(peers: int, bits: int) -> None:
    manifest = make_manifest(rounds={"rounds": 13}, averaging={"mix_rounds": 4, "max_group": 8})
    state = make_state(manifest)
    claims = [make_claim(make_identity(number + 1), manifest, state) for number in range(peers)]
    after = advance(state, manifest, claims, state.params, {})
    assert (after.bits, after.is_common) == (bits, True)
    later = advance(after, manifest, [], state.params, {})
    assert later.common == (after.digest if bits else bytes(32))
    assert advance(dataclasses.replace(state, round=1), manifest, claims, state.params, {}).bits == 0


@pytest.mark.parametrize(
    "change", [{"bits": 11}, {"bits": -1}, {"bits": 1.0}, {"common": "00"}, {"bits": 0}, {"common": None}]
)
def test_a_state_with_impossible_cohorts_is_refused(change: dict[str, Any]) -> None:
    from p2pasr.protocol.tensors import pack_tensors, unpack_tensors

    tensors, meta = unpack_tensors(STATES[0].blob)
    with pytest.raises(Reject):
        parse_state(pack_tensors(tensors, {**meta, **change}), MANIFEST, LIKE)


def test_a_mix_is_the_common_state_moved_by_the_mean_with_everything_that_was_merged() -> None:
    after = mixed()
    assert (after.round, after.is_common, after.run) == (5, True, COMMON.run)
    assert all(np.array_equal(after.params[name], LIKE[name] + np.float32(0.5)) for name in LIKE)
    assert after.credit == STATES[0].credit | STATES[1].credit
    counts = {shard: STATES[0].covered.get(shard, 0) + STATES[1].covered.get(shard, 0) for shard in after.covered}
    assert after.covered == counts or after.epoch == 1
    assert parse_state(after.blob, MANIFEST, LIKE).digest == after.digest


def test_everybody_who_mixes_the_same_computes_the_same_and_others_do_not() -> None:
    assert mixed((0, 1)).digest == mixed((1, 0)).digest
    other = mixing.mixed(COMMON, MANIFEST, 4, [STATES[0].digest], LEDGERS[:1], DELTA)
    assert len({mixed().digest, other.digest, mixed((0, 0)).digest}) == 3


@pytest.mark.parametrize(("every", "kept"), [(None, True), (5, True), (4, False), (3, False)])
def test_a_mix_keeps_the_moments_unless_the_optimizer_restarted(every: int | None, kept: bool) -> None:
    outer = {"kind": "fedavgm", "restart_rounds": every}
    manifest = make_manifest(
        averaging={"max_group": 8, "first_bits": 1, "outer": outer, "rule": {"kind": "centered-clip"}}
    )
    reference = {f"reference/{name}": value for name, value in LIKE.items()}
    common = dataclasses.replace(COMMON, moments={**LIKE, **reference})
    after = mixing.mixed(common, manifest, 4, [], LEDGERS, DELTA)
    assert after.moments.keys() == ({*LIKE, *reference} if kept else reference.keys())


@pytest.mark.parametrize(("most", "bits"), [(4, 2), (8, 1), (32, 0)])
def test_a_mix_says_how_many_cohorts_there_are_from_then_on(most: int, bits: int) -> None:
    manifest = make_manifest(averaging={"max_group": most, "first_bits": 1})
    assert mixing.mixed(COMMON, manifest, 4, [], LEDGERS, DELTA).bits == bits


def test_a_cohort_that_is_in_the_last_epoch_counts_alone() -> None:
    ahead = Ledger(1, {MANIFEST.shards[0].digest: 2}, {})
    behind = Ledger(0, {MANIFEST.shards[1].digest: 1}, {})
    assert mixing.fold(COMMON, [ahead, behind], MANIFEST) == (1, {MANIFEST.shards[0].digest: 2})
    everything = Ledger(1, {shard.digest: 3 for shard in MANIFEST.shards}, {})
    assert mixing.fold(COMMON, [ahead, everything], MANIFEST) == (2, {})


# --- a cohort that was left out -------------------------------------------------------------------

WITHOUT = mixing.mixed(COMMON, MANIFEST, 4, [STATES[0].digest], LEDGERS[:1], DELTA)
WITHOUT = dataclasses.replace(WITHOUT, bits=1)


def test_a_cohort_that_was_left_out_puts_its_work_on_top_of_the_mix_and_brings_it_along_to_the_next() -> None:
    after = mixing.caught_up(STATES[1], COMMON, WITHOUT, MANIFEST)
    assert (after.round, after.parent, after.common, after.bits) == (6, WITHOUT.digest, WITHOUT.digest, 1)
    for name in LIKE:
        learned = STATES[1].params[name] - COMMON.params[name]
        assert np.array_equal(after.params[name], WITHOUT.params[name] + learned)
    assert after.credit == WITHOUT.credit | STATES[1].credit
    assert mixing.ledger_since(after, WITHOUT).credit == LEDGERS[1].credit
    assert parse_state(after.blob, MANIFEST, LIKE).digest == after.digest


@pytest.mark.parametrize("case", ["in it", "other cohorts", "the last round", "idle"])
def test_a_mix_is_taken_as_it_is_where_work_would_count_twice_or_never_again(case: str) -> None:
    state, after = STATES[1], WITHOUT
    if case == "in it":
        state = STATES[0]
    elif case == "other cohorts":
        after = dataclasses.replace(WITHOUT, bits=2)
    elif case == "the last round":
        after = dataclasses.replace(WITHOUT, round=MANIFEST.rounds.rounds)
    else:
        state = dataclasses.replace(COMMON, round=4, common=COMMON.digest)
    assert mixing.caught_up(state, COMMON, after, MANIFEST) is after


# --- ledgers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_a_ledger_survives_its_bytes(index: int) -> None:
    read = Ledger.unpack(LEDGERS[index].pack(MANIFEST), MANIFEST, Cohort(1, index), 4)
    assert read == LEDGERS[index]
    assert read.seconds == pytest.approx(STATES[index].work)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"epoch": -1}, "malformed"),
        ({"epoch": True}, "malformed"),
        ({"covered": {}}, "malformed"),
        ({"covered": [[6, 1]]}, "no shard"),
        ({"covered": [[0, 0]]}, "no shard"),
        ({"covered": [[0]]}, "no shard"),
        ({"covered": [[1, 1], [0, 1]]}, "out of order"),
        ({"covered": [[1, 1], [1, 1]]}, "twice"),
        ({"credit": {HALVES[0][0].peer: -1.0}}, "no time"),
        ({"credit": {HALVES[0][0].peer: 1}}, "no time"),
        ({"credit": {HALVES[1][0].peer: 1.0}}, "another cohort"),
        ({"credit": {HALVES[0][0].peer: 1e9}}, "cannot hold"),
        ({"bans": {HALVES[0][0].peer: -1}}, "no round"),
        ({"bans": {HALVES[0][0].peer: 1.0}}, "no round"),
        ({"bans": {HALVES[1][0].peer: 1}}, "another cohort"),
        ({"strikes": []}, "no strike"),
        ({"strikes": {HALVES[0][0].peer: [0, 1]}}, "no strike"),
        ({"strikes": {HALVES[1][0].peer: [1, 1]}}, "another cohort"),
        ({"more": 1}, "is not {bans, covered, credit, epoch, guests, strikes}"),
    ],
)
def test_a_ledger_that_cannot_be_is_refused(change: dict[str, Any], sentence: str) -> None:
    content = {**unpack(LEDGERS[0].pack(MANIFEST), 1 << 20), **change}
    with pytest.raises(Reject, match=sentence):
        Ledger.unpack(pack(content), MANIFEST, Cohort(1, 0), 4)


def test_whom_a_cohort_bans_is_banned_everywhere_from_the_mix_on() -> None:
    bad = HALVES[1][0].peer
    banned = dataclasses.replace(STATES[1], bans={bad: 1})
    ledger = mixing.ledger_since(banned, COMMON)
    assert Ledger.unpack(ledger.pack(MANIFEST), MANIFEST, Cohort(1, 1), 4) == ledger
    after = mixing.mixed(COMMON, MANIFEST, 4, [], [LEDGERS[0], ledger], DELTA)
    assert after.bans == {bad: 1}
    assert mixing.ledger_since(dataclasses.replace(after, common=after.digest), after).bans == {}
    assert mixing.caught_up(banned, COMMON, WITHOUT, MANIFEST).bans == {bad: 1}


def test_strikes_are_mixed_like_bans_and_forgotten_in_time() -> None:
    bad, other = HALVES[1][0].peer, HALVES[0][0].peer
    common = dataclasses.replace(COMMON, strikes={bad: (1, 0), other: (1, 0)})
    struck = dataclasses.replace(STATES[1], strikes={bad: (2, 3), other: (1, 0)})
    ledger = mixing.ledger_since(struck, common)
    assert ledger.strikes == {bad: (2, 3)}
    assert Ledger.unpack(ledger.pack(MANIFEST), MANIFEST, Cohort(1, 1), 4) == ledger
    assert mixing.mixed(common, MANIFEST, 4, [], [LEDGERS[0], ledger], DELTA).strikes == struck.strikes
    assert mixing.caught_up(struck, common, WITHOUT, MANIFEST).strikes == {bad: (2, 3)}
    late = mixing.mixed(common, MANIFEST, MANIFEST.verify.strike_rounds, [], [LEDGERS[0], ledger], DELTA)
    assert late.strikes == {bad: (2, 3)}


def test_no_cohort_weighs_more_than_the_cap_allows() -> None:
    ledgers = [Ledger(0, {}, {"peer": seconds}) for seconds in (100.0, 100.0, 1e6)]
    assert mixing.weights(ledgers, MANIFEST) == (100.0, 100.0, 400.0)
    assert mixing.weights([Ledger(0, {}, {})], MANIFEST) == (0.0,)


# --- agreement ------------------------------------------------------------------------------------

VOTES = st.dictionaries(
    st.text(max_size=3),
    st.sampled_from([NO_CHOICE, *(digest_of(name) for name in "abcd")]),
    max_size=12,
)


@given(VOTES)
def test_a_set_wins_with_more_than_half_and_all_change_only_when_none_can(votes: dict[str, bytes]) -> None:
    decided, better = decide(votes)
    cast = [vote for vote in votes.values() if vote != NO_CHOICE]
    if decided is not None:
        assert 2 * cast.count(decided) > len(votes)
        assert better is None
    elif better is not None:
        undecided = len(votes) - len(cast)
        assert all(2 * (cast.count(vote) + undecided) <= len(votes) for vote in set(cast)), "one could still have won"
    else:
        assert not cast or any(2 * (cast.count(vote) + len(votes) - len(cast)) > len(votes) for vote in set(cast))


@given(votes=VOTES, data=st.data())
def test_whoever_counts_at_whatever_moment_counts_the_same_winner(votes: dict[str, bytes], data: st.DataObject) -> None:
    winners = set()
    votes = dict(votes)
    for _ in range(4 * len(votes) + 1):
        decided, better = decide(votes)
        winners |= {decided} - {None}
        movers = [p for p, vote in votes.items() if vote == NO_CHOICE or (better is not None and vote != better)]
        if not movers:
            break
        mover = data.draw(st.sampled_from(movers))
        votes[mover] = better or data.draw(st.sampled_from([digest_of(name) for name in "abcd"]))
    assert len(winners) == (1 if votes else 0)


def tally_of(votes: dict[int, int], stated: dict[int, int], chosen: tuple[int, ...] = ()) -> Tally:
    """What is seen of a mix of two halves: in each so many that attest, and so many of them that state their part."""
    tally = Tally(4, COMMON.digest, 0)
    for index, state in enumerate((grown(0, 4), grown(1, 4))):
        line = (digest_of("3"), digest_of("2"), digest_of("1"), COMMON.digest)
        peers = HALVES[index]
        voters = [who.peer for who in peers[: votes[index]]]
        tally.see_attestations(
            index, [Attestation(COMMON.run, peer, NO_TICKET, 4, state.digest, line, 1.0) for peer in voters]
        )
        mixes = [mix_of(who, state) for who in peers[: stated[index]]]
        tally.see_mixes(index, mixes)
    if chosen:
        parts = tuple(part for part in tally.parts if part.index in chosen)
        for index, mixes in tally.stated.items():
            tally.see_mixes(
                index,
                [dataclasses.replace(m, cohorts=chosen, chosen=choice(COMMON.digest, parts)) for m in mixes.values()],
            )
    return tally


def mix_of(who: Any, state: State, **changes: Any) -> Mix:
    fields = {"common": COMMON.digest, "cohorts": (), "chosen": NO_CHOICE, **changes}
    return make_mix(who, state, **fields)


@pytest.mark.parametrize(("stated", "known"), [(0, False), (1, False), (2, False), (3, True), (4, True)])
def test_a_cohorts_part_is_what_more_than_half_of_it_state(stated: int, known: bool) -> None:
    tally = tally_of({0: 4, 1: 4}, {0: stated, 1: 4})
    assert (tally.part(0) is not None) == known
    assert tally.missing == (() if known else (0,))


def test_a_cohort_that_states_different_things_has_no_part() -> None:
    tally = tally_of({0: 4, 1: 4}, {0: 4, 1: 4})
    mixes = list(tally.stated[0].values())
    lies = [dataclasses.replace(mix, root=digest_of("a lie")) for mix in mixes[:2]]
    tally.see_mixes(0, [*lies, *mixes[2:]])
    assert tally.part(0) is None
    assert tally.missing == (0,)


def test_nobody_is_waited_for_in_a_cohort_without_members() -> None:
    assert tally_of({0: 4, 1: 0}, {0: 4, 1: 0}).missing == ()


@pytest.mark.parametrize(
    "change", [{"round": 3}, {"common": digest_of("another line")}], ids=["another round", "another line"]
)
def test_what_is_about_another_mix_does_not_count(change: dict[str, Any]) -> None:
    tally = tally_of({0: 4, 1: 4}, {0: 4, 1: 4})
    tally.see_mixes(0, [dataclasses.replace(mix, **change) for mix in tally.stated[0].values()])
    assert tally.part(0) is None


def test_peers_of_another_line_have_no_say_and_those_that_came_later_do() -> None:
    tally = tally_of({0: 4, 1: 4}, {0: 4, 1: 4})
    state = grown(0, 4).digest
    who = [identity.peer for identity in HALVES[0]]
    line = (digest_of("3"), digest_of("2"), digest_of("1"), digest_of("another start"))
    strangers = [Attestation(COMMON.run, peer, NO_TICKET, 4, state, line, 1.0) for peer in who[:2]]
    newcomers = [Attestation(COMMON.run, peer, NO_TICKET, 4, state, line[:1], 1.0) for peer in who[2:]]
    tally.see_attestations(0, strangers + newcomers)
    assert tally.attesters[0] == set(who[2:])


def test_a_set_is_named_by_what_is_in_it() -> None:
    tally = tally_of({0: 4, 1: 4}, {0: 4, 1: 4}, chosen=(0, 1))
    (chosen,) = set(tally.votes.values())
    assert decide(tally.votes) == (chosen, None)
    assert tally.named(chosen) == tally.parts
    assert choice(COMMON.digest, reversed(tally.parts)) == chosen
    assert choice(digest_of("another line"), tally.parts) != chosen
    first, second = tally.parts
    assert choice(COMMON.digest, [first, Part(second.index, second.state, digest_of("a lie"))]) != chosen
    tally.see_mixes(1, [dataclasses.replace(m, root=digest_of("else")) for m in tally.stated[1].values()])
    assert tally.named(chosen) is None, "what is known here is not what was voted for"


def test_the_result_of_others_counts_when_more_than_half_of_all_attest_it() -> None:
    tally = tally_of({0: 4, 1: 4}, {0: 4, 1: 4})
    after = WITHOUT.digest
    line = (grown(0, 4).digest, digest_of("3"), digest_of("2"), digest_of("1"), COMMON.digest)
    done = [Attestation(COMMON.run, who.peer, NO_TICKET, 5, after, line, 1.0) for who in HALVES[0]]
    tally.see_attestations(0, done)
    assert tally.result() is None, "half is not more than half"
    longer = (after, *line)[:MAX_ANCESTORS]
    third = [Attestation(COMMON.run, HALVES[1][0].peer, NO_TICKET, 6, digest_of("later"), longer, 1.0)]
    rest = [Attestation(COMMON.run, who.peer, NO_TICKET, 4, digest_of("4"), line[1:], 1.0) for who in HALVES[1][1:]]
    tally.see_attestations(1, third + rest)
    assert tally.result() == after
