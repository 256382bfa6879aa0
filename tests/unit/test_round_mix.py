"""What a peer does about cohorts: where it looks, what it votes for, and what it keeps."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from p2pasr import agreeing
from p2pasr import cohort_mix as module
from p2pasr.agreeing import hold
from p2pasr.cohort_mix import Contribution, agree_on_mix, catch_up, mix_cohorts
from p2pasr.errors import TransportError
from p2pasr.member import Member
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal
from p2pasr.protocol.cohorts import EVERYBODY, MAX_BITS, Cohort, cohort_of
from p2pasr.protocol.messages import Attestation, Mix, Roster, Signed, seal
from p2pasr.protocol.mixing import NO_CHOICE, Tally
from p2pasr.protocol.state import State, advance
from p2pasr.report import Report
from p2pasr.round import sync

from .builders import (
    digest_of,
    initial_params,
    make_attestation,
    make_claim,
    make_identity,
    make_manifest,
    make_mix,
    make_state,
    view_of,
)

MANIFEST = make_manifest(
    rounds={"rounds": 5, "max_seconds": 1.0, "grace_seconds": 1.0}, averaging={"mix_rounds": 4, "first_bits": 1}
)
COMMON = make_state(MANIFEST)
HALVES = [
    [who for who in map(make_identity, range(1, 40)) if cohort_of(COMMON.run, who.peer, 1).index == half][:3]
    for half in (0, 1)
]
ME = HALVES[0][0]
OURS, THEIRS = Cohort(1, 0), Cohort(1, 1)


def grown(half: int, rounds: int) -> list[State]:
    """The states of one half of the swarm, from the common one on."""
    line = [COMMON]
    for _ in range(rounds):
        state = line[-1]
        view = dataclasses.replace(view_of(MANIFEST, state), cohort=Cohort(1, half))
        claims = [make_claim(who, MANIFEST, state, shards=view.assigned(who.peer)) for who in HALVES[half]]
        params = {name: value + np.float32(half + 1) for name, value in state.params.items()}
        line.append(advance(state, MANIFEST, claims, params, {}))
    return line


LINES = [grown(half, 4) for half in (0, 1)]
ROOTS = [digest_of(f"the root of {half}") for half in (0, 1)]
BOUNDARY = LINES[0][4]


class Directory:
    """What lies in the directory, in the place of `Records`; what this peer publishes is added."""

    def __init__(self) -> None:
        self.attested: dict[Cohort, dict[str, Signed[Attestation]]] = {}
        self.mixed: dict[Cohort, dict[str, Signed[Mix]]] = {}
        self.looked: list[tuple[str, Cohort]] = []
        self.announced: list[tuple[Cohort, Any]] = []
        self.before_each_look: list[Callable[[], None]] = []

    def attestations(self, view: Any, cohort: Cohort) -> dict[str, Signed[Attestation]]:
        self.looked.append(("attestation", cohort))
        return {peer: signed for peer, signed in self.attested.get(cohort, {}).items() if peer != ME.peer}

    def mixes(self, cohort: Cohort, number: int) -> dict[str, Signed[Mix]]:
        if cohort == OURS and self.before_each_look:
            self.before_each_look.pop(0)()
        return dict(self.mixed.get(cohort, {}))

    def roster(self, cohort: Cohort) -> dict[str, Roster]:
        return {}

    def claims(self, view: Any) -> dict[str, Any]:
        return {}

    def accusations(self, cohort: Cohort) -> dict[str, Any]:
        return {}

    def announce_roster(self, roster: Roster, cohort: Cohort) -> None: ...

    def announce_attestation(self, attestation: Signed[Attestation], cohort: Cohort) -> None:
        self.announced.append((cohort, attestation.message))

    def announce_mix(self, mix: Signed[Mix], cohort: Cohort) -> None:
        self.announced.append((cohort, mix.message))
        self.mixed.setdefault(cohort, {})[ME.peer] = mix

    # --- what others do -----------------------------------------------------------------------------

    def attest(self, half: int, rounds: int = 4) -> None:
        """All of a half attest the state after so many rounds of their own."""
        line = LINES[half]
        ancestors = tuple(state.digest for state in reversed(line[:rounds]))
        for who in HALVES[half]:
            said = make_attestation(who, line[rounds], ancestors=ancestors)
            self.attested.setdefault(Cohort(1, half), {})[who.peer] = seal(who, said)

    def state(self, half: int, like: Mix | None = None) -> None:
        """All of a half state their part, and vote as somebody does."""
        for who in HALVES[half]:
            vote = {"cohorts": like.cohorts, "chosen": like.chosen} if like else {"cohorts": (), "chosen": NO_CHOICE}
            stated = make_mix(who, LINES[half][4], common=COMMON.digest, root=ROOTS[half], **vote)
            if who != ME:
                self.mixed.setdefault(Cohort(1, half), {})[who.peer] = seal(who, stated)

    @property
    def votes(self) -> list[Mix]:
        return [said for _, said in self.announced if isinstance(said, Mix)]


@pytest.fixture
def directory() -> Directory:
    return Directory()


MakeMember = Callable[..., Member]


@pytest.fixture
def make_member(
    store: BlobStore, journal: Journal, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> MakeMember:
    """A peer of the first half that holds some state of its line."""
    monkeypatch.setattr(agreeing, "FIRST_POLL_SECONDS", 0.0)
    for each in (agreeing, module):
        monkeypatch.setattr(each, "POLL_SECONDS", 0.0)

    def make(rounds: int = 4, **changes: Any) -> Member:
        fields = {
            "manifest": MANIFEST,
            "identity": ME,
            "task": cast(Any, SimpleNamespace(hardware_class="none")),
            "link": cast(Any, SimpleNamespace(maddrs=())),
            "store": store,
            "journal": journal,
            "records": cast(Any, directory),
            "report": Report("json", io.StringIO()),
            "like": initial_params(),
            "state": COMMON,
            "fresh": False,
            **changes,
        }
        member = Member(**fields)
        hold(member, COMMON)
        for state in LINES[0][1 : rounds + 1]:
            hold(member, state)
        if rounds:
            ancestors = tuple(state.digest for state in reversed(LINES[0][:rounds]))
            member.attested = seal(ME, make_attestation(ME, member.state, ancestors=ancestors))
            member.attested_in = OURS
        return member

    return make


def agree(member: Member) -> Any:
    tally = Tally(4, COMMON.digest, 0)
    return agree_on_mix(member, Contribution(COMMON, ROOTS[0]), tally)


def test_a_peer_votes_when_all_cohorts_have_stated_their_part_and_waits_for_a_majority(
    make_member: MakeMember, directory: Directory
) -> None:
    for half in (0, 1):
        directory.attest(half)
        directory.state(half)
    member = make_member()
    directory.before_each_look = [
        lambda: None,
        lambda: directory.state(0, directory.votes[-1]),
        lambda: directory.state(1, directory.votes[-1]),
    ]
    parts = agree(member)
    assert [(part.index, part.state, part.root) for part in parts] == [
        (half, LINES[half][4].digest, ROOTS[half]) for half in (0, 1)
    ]
    first, vote = directory.votes
    assert (first.cohorts, first.chosen, first.root) == ((), NO_CHOICE, ROOTS[0])
    assert vote.cohorts == (0, 1)
    assert directory.before_each_look == []


def test_a_late_cohort_is_waited_for_no_longer_than_a_round_takes(
    make_member: MakeMember, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.attest(0)
    directory.state(0)
    directory.attest(1, rounds=3)
    clock = [1000.0]
    monkeypatch.setattr(module.time, "time", lambda: clock[0])
    member = make_member()

    def later() -> None:
        assert len(directory.votes) == 1, "it votes before its time"
        clock[0] += 2.5

    def others_leave() -> None:
        directory.attested[THEIRS].clear()
        directory.state(0, directory.votes[-1])

    directory.before_each_look = [lambda: None, later, others_leave]
    assert [part.index for part in agree(member)] == [0]
    assert [mix.cohorts for mix in directory.votes] == [(), (0,)]


def test_a_peer_that_starts_again_votes_as_it_voted_before(make_member: MakeMember, directory: Directory) -> None:
    for half in (0, 1):
        directory.attest(half)
        directory.state(half)
    member = make_member()
    vote = make_mix(
        ME, BOUNDARY, common=COMMON.digest, root=ROOTS[0], cohorts=(0,), chosen=digest_of("what it chose before")
    )
    member.journal.state_mix(seal(ME, vote).pack())
    directory.before_each_look = [lambda: directory.attest(0, 4), _stop]
    with pytest.raises(_Stopped):
        agree(member)
    assert directory.votes == [vote]


@pytest.mark.parametrize("change", [{"round": 3}, {"root": digest_of("other")}, {"common": digest_of("other")}])
def test_what_it_stated_about_another_mix_binds_it_to_nothing(
    make_member: MakeMember, directory: Directory, change: dict[str, Any]
) -> None:
    member = make_member()
    before = make_mix(ME, BOUNDARY, **{"common": COMMON.digest, "root": ROOTS[0], **change})
    member.journal.state_mix(seal(ME, before).pack())
    directory.before_each_look = [_stop]
    with pytest.raises(_Stopped):
        agree(member)
    assert [(mix.cohorts, mix.chosen) for mix in directory.votes] == [((), NO_CHOICE)]


def test_a_peer_takes_what_others_mixed_without_its_cohort(
    make_member: MakeMember, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = make_member()
    after = dataclasses.replace(LINES[1][4], round=5, common=bytes(32))
    directory.attest(0)
    for who in [*HALVES[1], *extra_members(THEIRS, 2)]:
        said = make_attestation(who, after, ancestors=tuple(state.digest for state in reversed(LINES[1])))
        directory.attested.setdefault(THEIRS, {})[who.peer] = seal(who, said)
    tally = Tally(4, COMMON.digest, 0)
    ours = Contribution(COMMON, ROOTS[0])
    assert agree_on_mix(member, ours, tally) == ()
    fetched: list[Any] = []

    def fetch(link: Any, store: Any, manifest: Any, like: Any, state: bytes, peers: Any) -> State:
        fetched.append((state, len(peers)))
        return after

    monkeypatch.setattr(module.syncing, "fetch_state", fetch)
    assert catch_up(member, ours, tally) is after, "the run's last round: nothing is mixed after it"
    assert fetched == [(after.digest, 5)]


def test_a_mix_that_fails_is_tried_again_and_then_alone(
    make_member: MakeMember, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = make_member()
    tried: list[bool] = []

    def exchange(*_: Any, alone: bool) -> State:
        tried.append(alone)
        raise TransportError("nobody gives anything")

    monkeypatch.setattr(module, "check_last_round", lambda _: 0)
    monkeypatch.setattr(module, "contribute", lambda _: Contribution(COMMON, ROOTS[0]))
    monkeypatch.setattr(module, "agree_on_mix", lambda *_: (module.Part(0, BOUNDARY.digest, ROOTS[0]),))
    monkeypatch.setattr(module, "exchange", exchange)
    with pytest.raises(module.RoundFailed, match="was not mixed in 3 attempts: nobody gives anything"):
        mix_cohorts(member)
    assert tried == [False, True, True]


def test_the_common_state_is_kept_however_many_rounds_ago_it_was(make_member: MakeMember) -> None:
    member = make_member(
        manifest=make_manifest(
            rounds={"rounds": 5}, averaging={"mix_rounds": 4, "first_bits": 1}, retention={"state_rounds": 2}
        )
    )
    assert set(member.store.holds("state")) == {COMMON.digest, LINES[0][3].digest, LINES[0][4].digest}


def test_a_line_leads_through_a_mix_and_through_one_that_others_made(make_member: MakeMember) -> None:
    member = make_member()
    line = tuple(state.digest for state in reversed(LINES[0]))
    mixed = dataclasses.replace(BOUNDARY, round=5, parent=digest_of("several states"), common=bytes(32))
    caught_up = dataclasses.replace(BOUNDARY, round=6, parent=mixed.digest, common=mixed.digest)
    assert member.line_to(mixed) == line
    assert member.line_to(caught_up) == (mixed.digest, *line)
    assert member.line_to(dataclasses.replace(mixed, round=7)) == (mixed.parent,)
    assert make_member(rounds=3).line_to(dataclasses.replace(mixed, round=4)) == (mixed.parent,)


def test_a_newcomer_looks_wherever_it_may_belong_and_others_next_to_where_they_are(
    make_member: MakeMember, directory: Directory
) -> None:
    member = make_member(rounds=2)
    directory.attest(0, rounds=2)
    sync(member)
    near = [cohort_of(COMMON.run, ME.peer, bits) for bits in (0, 1, 2)]
    assert {cohort for kind, cohort in directory.looked if kind == "attestation"} == set(near)
    directory.looked.clear()
    member.fresh = True
    sync(member)
    everywhere = {cohort_of(COMMON.run, ME.peer, bits) for bits in range(MAX_BITS + 1)}
    assert {cohort for kind, cohort in directory.looked if kind == "attestation"} == everywhere


def test_who_comes_into_another_cohort_attests_there_too(make_member: MakeMember, directory: Directory) -> None:
    member = make_member(rounds=1)
    directory.attest(0, rounds=1)
    sync(member)
    assert directory.announced == []
    member.attested_in = EVERYBODY
    sync(member)
    assert [(cohort, said.state) for cohort, said in directory.announced] == [(OURS, LINES[0][1].digest)]
    assert member.attested_in == OURS


def extra_members(cohort: Cohort, count: int) -> list[Any]:
    known = {who.peer for half in HALVES for who in half}
    others = [make_identity(number) for number in range(40, 120)]
    return [who for who in others if cohort.has(COMMON.run, who.peer) and who.peer not in known][:count]


class _Stopped(Exception):
    """The story is told."""


def _stop() -> None:
    raise _Stopped
