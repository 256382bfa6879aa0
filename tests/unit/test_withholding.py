"""Strikes in a peer's own life: what it opens late, whom it names and for how long, and what it is told."""

from __future__ import annotations

import dataclasses
import io
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from p2pasr import round as story
from p2pasr import withholding
from p2pasr.accusing import note_strike
from p2pasr.agreeing import hold
from p2pasr.auditing import kept_traces, offer
from p2pasr.member import Member
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal, Pending
from p2pasr.protocol.messages import seal
from p2pasr.protocol.state import State
from p2pasr.report import Report
from p2pasr.round import is_suspended, run_round, struck

from .builders import initial_params, make_claim, make_identity, make_manifest, make_roster, make_state

MANIFEST = make_manifest(rounds={"rounds": 100})
GENESIS = make_state(MANIFEST)
ME, EVE, ANNE = map(make_identity, (1, 2, 3))


def at(number: int, **ledger: Any) -> State:
    """A state before some round."""
    return dataclasses.replace(GENESIS, round=number, parent=bytes(31) + b"\1", **ledger)


@pytest.fixture
def calls() -> list[tuple[str, dict[str, Any]]]:
    """What was asked of the network process."""
    return []


@pytest.fixture
def member(store: BlobStore, journal: Journal, calls: list[tuple[str, dict[str, Any]]]) -> Member:
    """A peer before round 5."""

    def call(method: str, _seconds: float, **args: Any) -> dict[str, Any]:
        calls.append((method, args))
        return {}

    return Member(
        manifest=MANIFEST,
        identity=ME,
        task=cast("Any", SimpleNamespace(hardware_class="numpy")),
        link=cast("Any", SimpleNamespace(maddrs=(), call=call)),
        store=store,
        journal=journal,
        records=cast("Any", SimpleNamespace(announce_roster=lambda *_: None)),
        report=Report("json", io.StringIO()),
        like=initial_params(),
        state=at(5),
    )


def told(member: Member) -> list[str]:
    lines = cast("io.StringIO", member.report._out).getvalue().splitlines()
    return [json.loads(line)["message"] for line in lines]


def test_a_claim_that_was_merged_while_its_author_was_away_is_open_when_it_comes_back_and_stays_so(
    member: Member, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    claim = seal(ME, make_claim(ME, MANIFEST, at(3))).pack()
    member.journal.pend(Pending(3, at(3).digest, claim, b"d" * 32, (b"c" * 32,)))
    offer(member)
    ((opened,),) = [args["offers"] for method, args in calls if method == "offer"]
    assert (opened["claim"], opened["checkpoints"], opened["drawn"]) == (claim, [b"c" * 32], None)
    member.journal.pend(Pending(5, at(5).digest, claim, b"e" * 32, ()))
    assert list(kept_traces(member)) == [3]


@pytest.mark.parametrize("suspended", [False, True])
def test_a_peer_that_comes_back_opens_what_it_claimed_before_it_waits(
    member: Member,
    calls: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    suspended: bool,
) -> None:
    monkeypatch.setattr(story, "sync", lambda _member: False)
    monkeypatch.setattr(story, "is_suspended", lambda _member: suspended)
    monkeypatch.setattr(story, "ready_to_train", lambda _member: False)
    assert not run_round(member)
    assert [method for method, _ in calls] == ["offer", "ban"]
    member.fresh = False
    assert not run_round(member)
    assert [method for method, _ in calls] == ["offer", "ban"]


def test_whoever_did_wrong_is_named_in_two_rounds_or_until_it_is_struck(member: Member) -> None:
    note_strike(member, EVE.peer)
    note_strike(member, ANNE.peer)
    assert struck(member) == tuple(sorted((EVE.peer, ANNE.peer)))
    member.state = at(6, strikes={EVE.peer: (1, 5), ANNE.peer: (1, 4)})
    assert struck(member) == (ANNE.peer,)
    member.state = at(7)
    assert struck(member) == ()
    assert member.strikes == {}


@pytest.mark.parametrize(
    "ledger",
    [
        {"bans": {EVE.peer: 1}},
        {"strikes": {EVE.peer: (2, 0)}},
        {"bits": 10, "common": bytes(32)},
    ],
)
def test_nobody_is_named_that_is_out_or_elsewhere(member: Member, ledger: dict[str, Any]) -> None:
    note_strike(member, EVE.peer)
    member.state = at(5, **ledger)
    assert struck(member) == ()


@pytest.mark.parametrize("client_mode", [False, True])
def test_a_peer_is_told_of_its_strikes_once_and_what_client_mode_has_to_do_with_them(
    member: Member, client_mode: bool
) -> None:
    member.client_mode = client_mode
    for state in (
        at(6, strikes={EVE.peer: (1, 5)}),
        at(7, strikes={ME.peer: (1, 6)}),
        at(8, strikes={ME.peer: (1, 6)}),
    ):
        hold(member, state)
    (sentence,) = [sentence for sentence in told(member) if "struck" in sentence]
    assert "this peer was struck in round 6" in sentence
    assert "Until round 38 it weighs what a newcomer does" in sentence
    assert ("client mode" in sentence) == client_mode


def test_a_suspended_peer_waits_and_is_told_until_when(
    member: Member, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    looks = iter([False, True])
    monkeypatch.setattr(story, "overtaken", lambda _member: next(looks))
    assert not is_suspended(member)
    member.state = at(5, strikes={ME.peer: (2, 1)})
    assert is_suspended(member)
    assert [sentence for sentence in told(member) if "suspended until round 9, for 2 strikes" in sentence]
    member.state = at(10, strikes={ME.peer: (2, 1)})
    assert not is_suspended(member)


@pytest.mark.parametrize(("number", "asked"), [(4, True), (5, False), (6, False)])
def test_whoever_opens_nothing_is_asked_again_only_while_it_is_behind(member: Member, number: int, asked: bool) -> None:
    here: dict[str, Any] = {EVE.peer: make_roster(EVE, at(number))}
    cast("Any", member.records).roster = lambda _cohort: here
    assert withholding._is_behind(member, EVE.peer) is asked
    assert not withholding._is_behind(member, ANNE.peer)
