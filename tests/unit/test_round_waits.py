"""When a peer begins a round, and when it leaves it to others."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from p2pasr.agreeing import POLL_SECONDS, attest, between_looks, hold, tell_what_is_left
from p2pasr.errors import TransportError
from p2pasr.member import Averaged, Member
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal
from p2pasr.protocol.agreement import agree
from p2pasr.protocol.messages import Attestation, Claim, Roster, Signed, seal
from p2pasr.protocol.state import State, advance
from p2pasr.report import Report
from p2pasr.round import ready_to_train, wait_for_claims

from .builders import (
    initial_params,
    make_attestation,
    make_claim,
    make_identity,
    make_manifest,
    make_roster,
    make_state,
)

MANIFEST = make_manifest(rounds={"rounds": 10, "min_peers": 2})
S0 = make_state(MANIFEST)
ME, ANNE, BEN, EVE = map(make_identity, (1, 2, 3, 4))


def after_first(by: float) -> State:
    """A result of the first round."""
    params = {name: value + np.float32(by) for name, value in S0.params.items()}
    return advance(S0, MANIFEST, [make_claim(ANNE, MANIFEST, S0)], params, {})


S1 = after_first(0.5)


class Directory:
    """What others have published, in the place of `Records`."""

    def __init__(self) -> None:
        self.here: dict[str, Roster] = {}
        self.claimed: dict[str, Signed[Claim]] = {}
        self.attested: dict[str, Signed[Attestation]] = {}
        self.before_each_look: list[Callable[[], None]] = []

    def roster(self, cohort: Any) -> dict[str, Roster]:
        if self.before_each_look:
            self.before_each_look.pop(0)()
        return self.here

    def claims(self, view: Any) -> dict[str, Signed[Claim]]:
        return self.claimed

    def attestations(self, view: Any, cohort: Any) -> dict[str, Signed[Attestation]]:
        return self.attested

    def announce_roster(self, roster: Roster, cohort: Any) -> None: ...

    def announce_attestation(self, attestation: Signed[Attestation], cohort: Any) -> None: ...

    def wait(self, who: Any, state: State) -> None:
        """A peer that is here, attests a state and waits for its round."""
        self.here[who.peer] = make_roster(who, state, stage="waiting", segments=0)
        self.attested[who.peer] = seal(who, make_attestation(who, state))

    def finish(self, who: Any) -> None:
        """A peer that claimed in the first round, attests its result and trains in the next."""
        self.here[who.peer] = make_roster(who, S1)
        self.claimed[who.peer] = seal(who, make_claim(who, MANIFEST, S0))
        self.attested[who.peer] = seal(who, make_attestation(who, S1))


@pytest.fixture
def directory() -> Directory:
    return Directory()


@pytest.fixture
def member(directory: Directory, store: BlobStore, journal: Journal) -> Member:
    """A peer that has just come back, with the state that the first round begins with."""
    return Member(
        manifest=MANIFEST,
        identity=ME,
        task=cast("Any", SimpleNamespace(hardware_class="numpy")),
        link=cast("Any", SimpleNamespace(maddrs=(), call=lambda *_, **__: {"receipts": ()})),
        store=store,
        journal=journal,
        records=cast("Any", directory),
        report=Report("json", io.StringIO()),
        like=initial_params(),
        state=S0,
    )


def test_a_round_begins_when_enough_peers_wait_for_it(member: Member, directory: Directory) -> None:
    directory.wait(EVE, S0)
    assert ready_to_train(member)


def test_two_late_peers_do_not_train_a_round_anew_that_others_have_just_finished(
    member: Member, directory: Directory
) -> None:
    directory.wait(EVE, S0)
    for who in (ANNE, BEN):
        directory.finish(who)
    assert not ready_to_train(member)


def test_one_peer_that_says_it_is_ahead_keeps_nobody_from_training(member: Member, directory: Directory) -> None:
    directory.wait(EVE, S0)
    directory.here[ANNE.peer] = make_roster(ANNE, S1, round=5)
    assert ready_to_train(member)


def test_a_peer_that_misses_everybody_in_one_look_does_not_average_alone(member: Member, directory: Directory) -> None:
    def claim() -> None:
        directory.here[ANNE.peer] = make_roster(ANNE, S0, stage="claimed")
        directory.claimed[ANNE.peer] = seal(ANNE, make_claim(ANNE, MANIFEST, S0))

    member.manifest = make_manifest(rounds={"rounds": 10, "min_peers": 1})
    directory.here[ANNE.peer] = make_roster(ANNE, S0)
    directory.before_each_look = [lambda: None, directory.here.clear, claim]
    assert wait_for_claims(member) == {ME.peer, ANNE.peer}


def result_of_the_first_round(after: State, *electorate: Any) -> Averaged:
    """A result of which nobody has another receipt than this peer."""
    merged = cast("Any", SimpleNamespace(group=b"", receipts=()))
    return Averaged(after, frozenset(who.peer for who in electorate), cast("Any", None), merged)


def test_a_peer_does_not_wait_for_votes_when_the_others_have_agreed_on_another_result(
    member: Member, directory: Directory
) -> None:
    """A reducer that died half-way served this peer and none of the others, who averaged without it."""
    for who in (ANNE, BEN, EVE):
        directory.finish(who)
    result = result_of_the_first_round(after_first(0.25), ME, ANNE, BEN, EVE)
    with pytest.raises(TransportError, match=r"the round ended otherwise: 3 of 4 peers attest"):
        attest(member, result)


def test_half_of_a_rounds_peers_do_not_keep_a_peer_from_waiting_for_the_others(
    member: Member, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pasr.agreeing.QUORUM_SECONDS", 0.0)
    for who in (ANNE, BEN):
        directory.finish(who)
    with pytest.raises(TransportError, match="no quorum within"):
        attest(member, result_of_the_first_round(after_first(0.25), ME, ANNE, BEN, EVE))


def test_a_result_that_more_than_half_of_a_rounds_peers_attest_is_committed(
    member: Member, directory: Directory
) -> None:
    directory.finish(ANNE)
    directory.wait(BEN, S0)
    votes = attest(member, result_of_the_first_round(S1, ME, ANNE, BEN))
    assert {vote.message.peer for vote in votes} == {ME.peer, ANNE.peer}


def test_two_groups_of_one_round_that_did_not_expect_each_other_do_not_both_commit(
    member: Member, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pasr.agreeing.QUORUM_SECONDS", 0.0)
    ours = after_first(0.25)
    directory.wait(EVE, ours)
    for who in (ANNE, BEN):
        directory.finish(who)
    with pytest.raises(TransportError, match="no quorum within"):
        attest(member, result_of_the_first_round(ours, ME, EVE))


def test_a_peer_whose_rounds_are_not_in_the_state_that_holds_says_so(member: Member, directory: Directory) -> None:
    ours = after_first(0.25)
    for state in (S0, ours):
        hold(member, state)
    for who in (ANNE, BEN):
        directory.finish(who)
    votes = [signed.message for signed in directory.attested.values()]
    tell_what_is_left(member, agree(votes), votes)
    assert "apart from the others since round 0" in said(member)


def test_a_peer_that_only_fell_behind_has_left_nothing(member: Member, directory: Directory) -> None:
    hold(member, S0)
    for who in (ANNE, BEN):
        directory.finish(who)
    votes = [signed.message for signed in directory.attested.values()]
    tell_what_is_left(member, agree(votes), votes)
    assert not said(member)


def said(member: Member) -> str:
    """What a member has reported."""
    return cast("io.StringIO", member.report._out).getvalue()


def test_strangers_that_attest_something_else_without_a_claim_do_not_stop_a_round(
    member: Member, directory: Directory
) -> None:
    ours = after_first(0.25)
    directory.wait(EVE, ours)
    for who in (ANNE, BEN):
        directory.finish(who)
    directory.claimed.clear()
    assert len(attest(member, result_of_the_first_round(ours, ME, EVE))) == 2


def test_looks_at_the_directory_become_rarer_the_longer_a_peer_waits() -> None:
    pauses = list(itertools.islice(between_looks(), 30))
    assert pauses == sorted(pauses)
    assert pauses[-1] == POLL_SECONDS
    for number, pause in enumerate(pauses[1:], 1):
        assert pause <= sum(pauses[:number]) * 0.25 + pauses[0]


def test_ctrl_c_that_was_swallowed_ends_the_round_at_its_next_step(member: Member) -> None:
    member.step("sync", "looking")
    member.report.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        member.step("train", "training")
