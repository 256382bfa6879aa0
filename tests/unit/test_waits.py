"""How long others are waited for while a peer checks what they did."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr import waits
from p2pasr.errors import LinkDown, TransportError
from p2pasr.waits import ENDLESS, NotDone, Waits, seconds_of, within

from .builders import make_manifest


class Clock:
    """A clock that only waiting moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waits, "time", clock)
    return clock


def wait(clock: Clock, left: Waits, peer: str, needed: float, enough: float) -> str:
    """Wait for a peer that needs so long; returns what follows from it."""
    try:
        with left.turn(peer, enough) as turn:
            allowed = within(1e9, turn.until)
            clock.now += min(needed, allowed)
            if needed > allowed:
                raise TransportError("nothing came")
    except TransportError:
        return "unavailable"
    except NotDone:
        return "not done"
    return "had"


TURNS = st.lists(
    st.tuples(st.sampled_from("abc"), st.floats(0, 200), st.floats(1, 200), st.floats(0, 50)), min_size=1, max_size=20
)


@given(TURNS)
def test_nobody_takes_more_than_a_share_and_who_had_less_than_its_own_is_not_blamed(
    turns: list[tuple[str, float, float, float]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(waits, "time", clock)
        left, used, own = Waits(100.0), dict.fromkeys("abc", 0.0), 0.0
        for peer, needed, enough, trained in turns:
            before = clock.now
            found = wait(clock, left, peer, needed, enough)
            spent = clock.now - before
            used[peer] += spent
            if found == "unavailable":
                assert spent >= enough - 1e-6 or used[peer] >= 50.0 - 1e-6
            with suppress(NotDone, TransportError), left.turn("d", 1.0) as turn, turn.paused():
                clock.now += trained
                own += trained
        assert max(used.values()) <= 50.0 + 1e-6
        assert clock.now - 1000.0 - own <= 100.0 + 1e-6


def test_a_peer_that_was_given_less_than_its_share_is_not_blamed_for_it(clock: Clock) -> None:
    left = Waits(100.0)
    assert wait(clock, left, "slow", 49.0, 60.0) == "had"
    assert wait(clock, left, "silent", 999.0, 60.0) == "unavailable"
    assert wait(clock, left, "honest", 2.0, 60.0) == "not done"
    assert wait(clock, left, "another", 0.0, 60.0) == "not done"


def test_whoever_has_used_up_its_share_is_not_asked_once_more(clock: Clock) -> None:
    left = Waits(100.0)
    assert wait(clock, left, "silent", 999.0, 60.0) == "unavailable"
    before = clock.now
    assert wait(clock, left, "silent", 0.0, 60.0) == "unavailable"
    assert clock.now == before
    assert wait(clock, left, "honest", 1.0, 60.0) == "had"


def test_what_a_peer_trains_itself_is_nobodys_waiting(clock: Clock) -> None:
    left = Waits(100.0)
    with left.turn("honest", 60.0) as turn:
        with turn.paused():
            clock.now += 1000.0
        assert within(1e9, turn.until) == 50.0
        clock.now += 10.0
    assert wait(clock, left, "honest", 39.0, 60.0) == "had"
    assert wait(clock, left, "other", 49.0, 60.0) == "had"


@pytest.mark.parametrize("error", [TransportError("no shard"), LinkDown("died")])
def test_nobody_is_blamed_for_what_others_did_not_give_or_for_our_own_network(
    clock: Clock, error: TransportError
) -> None:
    left = Waits(100.0)
    with pytest.raises(NotDone, match=str(error)), left.turn("honest", 60.0) as turn, turn.paused():
        raise error
    with pytest.raises(NotDone, match="died"), left.turn("honest", 60.0):
        raise LinkDown("died")


def test_a_step_waits_half_a_round_and_where_rounds_are_short_as_long_as_a_slow_answer_takes() -> None:
    assert seconds_of(make_manifest(rounds={"max_seconds": 600.0}).rounds) == 300.0
    assert seconds_of(make_manifest(rounds={"max_seconds": 5.0}).rounds) == 120.0


def test_without_an_end_everybody_has_what_is_enough_for_a_slow_link() -> None:
    for _ in range(3):
        with ENDLESS.turn("anybody", 60.0) as turn:
            assert 59.0 < within(1e9, turn.until) <= 60.0
