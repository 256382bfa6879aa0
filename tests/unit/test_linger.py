"""How long a peer stays when its last round is over, and for whom."""

from __future__ import annotations

import dataclasses
import io
from types import SimpleNamespace
from typing import Any, cast

import pytest

from p2pasr import peer as module
from p2pasr.member import Member
from p2pasr.peer import LINGER_SECONDS, Peer
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal
from p2pasr.protocol.messages import Roster, seal
from p2pasr.report import Report
from p2pasr.waits import seconds_of

from .builders import (
    initial_params,
    make_attestation,
    make_identity,
    make_manifest,
    make_roster,
    make_state,
)

MANIFEST = make_manifest(rounds={"rounds": 5})
END = dataclasses.replace(make_state(MANIFEST), round=5, parent=bytes(31) + b"\1")
BEFORE = dataclasses.replace(END, round=4)
ME, ANNE = map(make_identity, (1, 2))


class Others:
    """What the directory shows, one look after the other; the last stays. Looking takes no time, pauses do."""

    def __init__(self, *rosters: dict[str, Roster], attested: int) -> None:
        self.now, self.said = 0.0, list[str]()
        self._rosters = list(rosters)
        self._attested = dataclasses.replace(END, round=attested)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def attestations(self, *_: Any) -> Any:
        return {ANNE.peer: seal(ANNE, make_attestation(ANNE, self._attested))}

    def roster(self, _cohort: Any) -> dict[str, Roster]:
        return self._rosters.pop(0) if len(self._rosters) > 1 else self._rosters[0]

    def announce_roster(self, roster: Roster, _cohort: Any) -> None:
        self.said.append(f"{roster.stage} in round {roster.round}")


CHECKING, DONE = ({ANNE.peer: make_roster(ANNE, state)} for state in (BEFORE, END))


@pytest.fixture
def linger(store: BlobStore, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets a peer at the run's end, or before it, stay for others; returns how long it did."""

    def stay(others: Others, **changes: Any) -> float:
        member = Member(
            manifest=MANIFEST,
            identity=ME,
            task=cast("Any", SimpleNamespace(hardware_class="numpy")),
            link=cast("Any", SimpleNamespace(maddrs=())),
            store=store,
            journal=journal,
            records=cast("Any", others),
            report=Report("json", io.StringIO()),
            like=initial_params(),
            state=END,
        )
        for name, value in ({"fresh": False} | changes).items():
            setattr(member, name, value)
        monkeypatch.setattr(module, "time", others)
        peer = Peer(MANIFEST, report=member.report)
        peer.member = member
        peer._linger()
        return others.now

    return stay


def test_nobody_stays_when_everybody_has_checked_the_last_round(linger: Any) -> None:
    others = Others(DONE, attested=5)
    assert linger(others) == 0.0
    assert others.said == ["waiting in round 5", "leaving in round 5"]


def test_a_peer_stays_while_another_may_check_what_it_claimed(linger: Any) -> None:
    assert linger(Others(*[CHECKING] * 50, DONE, attested=5)) == 50.0
    assert linger(Others(CHECKING, attested=5)) == seconds_of(MANIFEST.rounds)


def test_a_peer_that_was_in_no_round_or_leaves_before_the_end_stays_for_no_checks(linger: Any) -> None:
    assert linger(Others(CHECKING, attested=5), fresh=True) == 0.0
    others = Others(CHECKING, attested=5)
    assert linger(others, state=BEFORE) == 0.0
    assert others.said == ["leaving in round 4"]


def test_a_peer_stays_for_those_that_are_behind_no_longer_than_before(linger: Any) -> None:
    assert linger(Others(CHECKING, attested=4), fresh=True) == LINGER_SECONDS
