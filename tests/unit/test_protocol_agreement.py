"""Agreement: the majority's state holds, whatever order its words come in and whatever a few peers say."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.protocol.agreement import Agreement, agree, quorum
from p2pasr.protocol.messages import NO_TICKET, Attestation

from .builders import digest_of

RUN = digest_of("run")


def attest(peer: str, round_number: int, state: str, parent: str | None = None, work: float = 0.0) -> Attestation:
    """`peer` attests the state of a name, and two before it of the same name, if not said otherwise."""
    ancestors = tuple(named(n, parent or state) for n in range(round_number - 1, max(round_number - 3, -1), -1))
    return Attestation(RUN, peer, NO_TICKET, round_number, named(round_number, state), ancestors, work)


def named(round_number: int, state: str) -> bytes:
    return digest_of(f"{state} before round {round_number}")


def outcome(agreement: Agreement) -> tuple[int | None, bytes | None, tuple[str, ...]]:
    return agreement.round, agreement.state, agreement.supporters


lines = st.sampled_from(["main", "side", "fork"])


@st.composite
def worlds(draw: st.DrawFn, most: int = 6) -> list[Attestation]:
    """Up to `most` peers, each somewhere on one of a few lines; what they say of one state is the same."""
    count = draw(st.integers(1, most))
    work = {key: draw(st.integers(0, 3)) for key in itertools.product(range(4), ("main", "side", "fork"))}
    places = draw(st.lists(st.tuples(st.integers(0, 3), lines), min_size=count, max_size=count))
    return [attest(f"peer {n}", place[0], place[1], work=float(work[place])) for n, place in enumerate(places)]


def test_without_attestations_nothing_holds() -> None:
    assert outcome(agree([])) == (None, None, ())
    assert agree([]).reason == "nobody attests a state yet"


def test_one_peer_alone_agrees_with_itself() -> None:
    agreement = agree([attest("a", 3, "main")])
    assert outcome(agreement) == (3, named(3, "main"), ("a",))
    assert agreement.reason == f"1 of 1 peers agree on state {named(3, 'main').hex()[:8]} before round 3"


@given(worlds(), st.randoms(use_true_random=False))
def test_the_order_of_the_attestations_does_not_matter(world: list[Attestation], random: object) -> None:
    shuffled = list(world)
    random.shuffle(shuffled)
    assert agree(shuffled) == agree(world)


@given(worlds(most=5), st.permutations(range(5)))
def test_the_names_of_the_peers_do_not_matter(world: list[Attestation], order: Sequence[int]) -> None:
    renamed = [dataclasses.replace(a, peer=f"peer {order[n]}") for n, a in enumerate(world)]
    one, other = agree(world), agree(renamed)
    assert (one.round, one.state) == (other.round, other.state)
    assert sorted(f"peer {order[int(peer[-1])]}" for peer in one.supporters) == list(other.supporters)


@given(worlds(), st.integers(0, 3), lines)
def test_a_state_that_more_than_half_attest_directly_holds_it_or_one_that_grew_from_it(
    world: list[Attestation], round_number: int, line: str
) -> None:
    converts = [attest(f"convert {n}", round_number, line, work=1.0) for n in range(len(world) + 1)]
    agreement = agree([*world, *converts])
    assert agreement.round is not None
    assert agreement.round >= round_number
    if agreement.round == round_number:
        assert agreement.state == named(round_number, line)
    assert 2 * len(agreement.supporters) > 2 * len(world) + 1


@given(worlds())
def test_what_holds_was_attested_by_somebody(world: list[Attestation]) -> None:
    agreement = agree(world)
    assert (agreement.round, agreement.state) in {(a.round, a.state) for a in world}
    assert {a.peer for a in world if (a.round, a.state) == (agreement.round, agreement.state)} <= set(
        agreement.supporters
    )
    assert list(agreement.supporters) == sorted(set(agreement.supporters))


def test_peers_that_are_a_round_ahead_speak_for_the_state_that_they_grew_from() -> None:
    ahead = [attest("a", 5, "main"), attest("b", 5, "main")]
    behind = [attest("c", 4, "main"), attest("d", 4, "main"), attest("e", 4, "side")]
    agreement = agree([*ahead, *behind])
    assert outcome(agreement) == (4, named(4, "main"), ("a", "b", "c", "d"))


def test_of_the_states_that_hold_the_latest_does() -> None:
    world = [attest("a", 6, "main"), attest("b", 6, "main"), attest("c", 5, "main")]
    assert outcome(agree(world)) == (6, named(6, "main"), ("a", "b"))


def test_exactly_half_is_no_majority() -> None:
    world = [attest("a", 5, "main", work=2.0), attest("b", 5, "side", work=1.0)]
    agreement = agree(world)
    assert agreement.state == named(5, "main")
    assert agreement.reason == f"1 of 2 peers are the most for state {named(5, 'main').hex()[:8]} before round 5"


@pytest.mark.parametrize("honest", [2, 3, 10])
def test_one_peer_that_claims_round_a_billion_convinces_nobody(honest: int) -> None:
    world = [attest(f"peer {n}", 5, "main", work=10.0) for n in range(honest)]
    liar = attest("liar", 10**9, "lie", work=1e15)
    assert outcome(agree([liar, *world]))[:2] == (5, named(5, "main"))
    assert outcome(agree([*world, liar]))[:2] == (5, named(5, "main"))


def test_ties_go_to_more_supporters_then_more_work_then_the_later_round_then_the_lower_digest() -> None:
    more = [
        attest("a", 5, "main"),
        attest("b", 5, "main"),
        attest("c", 9, "side", work=99.0),
        attest("d", 9, "fork"),
    ]
    assert agree(more).state == named(5, "main")
    work = [
        attest("a", 5, "main", work=2.0),
        attest("b", 7, "side", work=1.0),
        attest("c", 9, "fork", work=1.5),
    ]
    assert agree(work).state == named(5, "main")
    later = [attest("a", 5, "main", work=1.0), attest("b", 7, "side", work=1.0)]
    assert agree(later).state == named(7, "side")
    lower = [attest("a", 5, "main", work=1.0), attest("b", 5, "side", work=1.0)]
    assert agree(lower).state == min(named(5, "main"), named(5, "side"))


def test_peers_that_state_different_work_for_one_state_do_not_make_the_choice_depend_on_the_order() -> None:
    world = [
        attest("a", 5, "main", work=10.0),
        attest("liar", 5, "main", work=1e15),
        attest("b", 5, "side", work=20.0),
        attest("c", 5, "side", work=20.0),
    ]
    assert len({outcome(agree(order)) for order in itertools.permutations(world)}) == 1


def test_a_minority_that_lies_about_the_parent_of_the_honest_state_does_not_win() -> None:
    honest = [attest(f"ahead {n}", 5, "main") for n in range(3)] + [attest(f"behind {n}", 4, "main") for n in range(2)]
    liars = [attest(f"liar {n}", 4, "lie", work=1e15) for n in range(3)] + [attest("liar 3", 5, "main", parent="lie")]
    agreement = agree([*honest, *liars])
    assert agreement.state == named(4, "main")


@given(st.integers(2, 6), st.data())
def test_liars_that_are_fewer_than_the_peers_of_one_state_never_win(honest: int, data: st.DataObject) -> None:
    ahead = data.draw(st.integers(0, honest), label="honest peers that are a round ahead")
    world = [attest(f"honest {n}", 5 if n < ahead else 4, "main", work=40.0) for n in range(honest)]
    for number in range(data.draw(st.integers(0, honest - 1), label="liars")):
        round_number = data.draw(st.sampled_from([3, 4, 5, 6, 10**9]))
        state = data.draw(st.sampled_from(["main", "lie", "side"]) if round_number <= 5 else st.just("lie"))
        parent = data.draw(st.sampled_from(["main", "lie"]))
        world.append(attest(f"liar {number}", round_number, state, parent, work=1e15))
    agreement = agree(data.draw(st.permutations(world)))
    assert (agreement.round, agreement.state) in {(n, named(n, "main")) for n in (3, 4, 5)}


ELECTORATE = ("a", "b", "c", "d", "e")


def votes(*peers: str, state: str = "main", round_number: int = 5) -> list[Attestation]:
    return [attest(peer, round_number, state) for peer in peers]


def test_a_quorum_is_more_than_half_of_the_electorate() -> None:
    state = named(5, "main")
    assert quorum(5, state, votes("a", "b", "c"), ELECTORATE) == (
        True,
        f"3 of 5 peers attest state {state.hex()[:8]}",
    )
    assert quorum(5, state, votes("a", "b"), ELECTORATE) == (False, f"2 of 5 peers attest state {state.hex()[:8]}")
    assert not quorum(5, state, votes("a", "b"), ("a", "b", "c", "d"))[0]
    assert quorum(5, state, votes("a", "b", "c"), ("a", "b", "c", "d"))[0]
    assert quorum(5, state, votes("a"), ("a",))[0]


def test_only_the_electorate_votes_and_each_of_it_once() -> None:
    state = named(5, "main")
    assert not quorum(5, state, votes("a", "b", "x", "y", "z"), ELECTORATE)[0]
    assert not quorum(5, state, votes("a", "a", "a", "b"), ELECTORATE)[0]


def test_a_peer_that_has_gone_on_from_the_result_still_votes_for_it() -> None:
    assert quorum(5, named(5, "main"), votes("a", "b") + votes("c", round_number=7), ELECTORATE)[0]
    assert not quorum(5, named(5, "main"), votes("a", "b") + votes("c", round_number=8), ELECTORATE)[0]


def test_what_others_attest_instead_is_named() -> None:
    state, side, fork = named(5, "main"), named(5, "side"), named(5, "fork")
    dissent = votes("c", "d", state="side") + votes("e", state="fork")
    others = ", ".join(sorted((side.hex()[:8], fork.hex()[:8])))
    assert quorum(5, state, votes("a", "b") + dissent, ELECTORATE) == (
        False,
        f"2 of 5 peers attest state {state.hex()[:8]}; others attest {others}",
    )


def test_nobody_is_no_quorum() -> None:
    assert not quorum(5, named(5, "main"), [], ELECTORATE)[0]
    assert not quorum(5, named(5, "main"), [], ())[0]


@given(worlds(), st.sets(st.sampled_from([f"peer {n}" for n in range(6)])))
def test_two_results_of_one_round_never_both_reach_a_quorum(world: list[Attestation], electorate: set[str]) -> None:
    at_five = [dataclasses.replace(a, round=5) for a in world]
    states = {a.state for a in at_five}
    reached = [state for state in states if quorum(5, state, at_five, electorate)[0]]
    assert len(reached) <= 1
