"""Which state a peer looks for, and what it believes of the one that it gets."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from p2pasr.errors import Reject, TransportError
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal
from p2pasr.peers.sync import adopt, fetch_manifest, fetch_state, newest_state
from p2pasr.protocol.agreement import Agreement, agree
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.manifest import MAX_MANIFEST_BYTES
from p2pasr.protocol.messages import Attestation
from p2pasr.protocol.state import State, advance, max_state_bytes

from .builders import (
    digest_of,
    initial_params,
    make_attestation,
    make_claim,
    make_identity,
    make_manifest,
    make_state,
)

MANIFEST = make_manifest()
LIKE = initial_params()
S0 = make_state(MANIFEST)
ME, ANNE, BEN, EVE = map(make_identity, (1, 2, 3, 4))


def after(state: State, who: Any = ANNE, by: float = 0.5) -> State:
    params = {name: value + np.float32(by) for name, value in state.params.items()}
    return advance(state, MANIFEST, [make_claim(who, MANIFEST, state)], params, {})


S1 = after(S0)
S2 = after(S1)


class Link:
    """A network process that finds blobs on a shelf and puts them into the store."""

    def __init__(self, store: BlobStore, *blobs: bytes) -> None:
        self.store = store
        self.shelf = {blob_digest(blob): blob for blob in blobs}
        self.asked: list[dict[str, Any]] = []
        self.failures = 0

    def call(self, method: str, seconds: float, /, **args: Any) -> dict[str, Any]:
        assert method == "fetch"
        self.asked.append(args)
        if self.failures:
            self.failures -= 1
            raise TransportError("nobody on the network offers it")
        if args["digest"] not in self.shelf:
            raise TransportError("nobody on the network offers it")
        self.store.put(args["kind"], self.shelf[args["digest"]])
        return {}


def attested(**by: State) -> dict[str, Attestation]:
    """What others attest, by name."""
    names = {"anne": ANNE, "ben": BEN, "eve": EVE}
    return {names[name].peer: make_attestation(names[name], state) for name, state in by.items()}


def newest(own: State, journal: Journal, mine: State | None = None, *, electorate: Any = (), **others: State) -> Any:
    """What `newest_state` says to a peer that holds `own`, attests `mine` and sees what the others attest."""
    votes = [*attested(**others).values(), *([make_attestation(ME, mine)] if mine is not None else [])]
    return newest_state(own, votes, electorate, journal)


def test_alone_a_peer_keeps_its_own_state(journal: Journal) -> None:
    assert newest(S0, journal) is None
    assert newest(S1, journal, S1) is None


def test_a_peer_that_the_others_agree_with_keeps_its_own_state(journal: Journal) -> None:
    assert newest(S1, journal, S1, anne=S1, ben=S1) is None


def test_a_newcomer_looks_for_what_the_others_agree_on(journal: Journal) -> None:
    agreement = newest(S0, journal, anne=S2, ben=S2)
    assert (agreement.round, agreement.state) == (2, S2.digest)
    assert agreement.supporters == tuple(sorted((ANNE.peer, BEN.peer)))


def test_a_peer_in_the_minority_looks_for_the_majoritys_state(journal: Journal) -> None:
    mine = after(S0, by=0.25)
    journal.hold(0, S0.digest)
    journal.hold(1, mine.digest)
    assert newest(mine, journal, mine, anne=S1, ben=S1).state == S1.digest


def test_a_peer_that_is_ahead_does_not_go_back_to_where_it_has_been(journal: Journal) -> None:
    for state in (S0, S1):
        journal.hold(state.round, state.digest)
    assert newest(S1, journal, S1, anne=S0, ben=S0) is None


def test_a_peer_that_is_ahead_on_another_line_goes_to_the_majoritys(journal: Journal) -> None:
    journal.hold(1, S1.digest)
    journal.hold(2, S2.digest)
    other = after(S0, by=0.125)
    assert newest(S2, journal, S2, anne=other, ben=other).state == other.digest


def test_a_peer_that_missed_the_result_of_its_round_joins_it_whoever_else_waits(journal: Journal) -> None:
    """Ben and Eve came too late for the round and attest where it began: they have no say in what came of it."""
    journal.hold(0, S0.digest)
    assert newest(S0, journal, S0, anne=S1, ben=S0, eve=S0) is None
    agreement = newest(S0, journal, S0, anne=S1, ben=S0, eve=S0, electorate={ANNE.peer})
    assert (agreement.state, agreement.supporters) == (S1.digest, (ANNE.peer,))


def test_a_peer_that_missed_several_rounds_goes_to_where_the_others_are(journal: Journal) -> None:
    """Nobody may keep the result of its own round any more, though everybody's state grew from it."""
    journal.hold(0, S0.digest)
    far = after(S2)
    lines = {who: make_attestation(who, far, ancestors=(S2.digest, S1.digest, S0.digest)) for who in (ANNE, BEN)}
    behind = make_attestation(EVE, S2, ancestors=(S1.digest, S0.digest))
    votes = [*lines.values(), behind, make_attestation(ME, S0)]
    agreement = newest_state(S0, votes, {ANNE.peer, BEN.peer}, journal)
    assert agreement is not None
    assert (agreement.round, agreement.state) == (3, far.digest)
    assert agreement.supporters == tuple(sorted(who.peer for who in lines))


def test_half_of_a_rounds_peers_do_not_decide_what_came_of_it(journal: Journal) -> None:
    assert newest(S0, journal, S0, anne=S1, electorate={ANNE.peer, ME.peer}) is None
    assert newest(S0, journal, S0, anne=S1, ben=after(S0, by=0.1), electorate={ANNE.peer, BEN.peer, ME.peer}) is None


def test_a_state_is_fetched_within_its_limit_and_parsed(store: BlobStore) -> None:
    link = Link(store, S1.blob)
    state = fetch_state(link, store, MANIFEST, LIKE, S1.digest, {BEN.peer, ANNE.peer})
    assert state.digest == S1.digest
    (asked,) = link.asked
    assert asked["max_bytes"] == max_state_bytes(MANIFEST)
    assert asked["kind"] == "state"
    assert sorted(asked["peers"]) == sorted((ANNE.peer, BEN.peer))


def test_what_is_no_state_of_the_run_is_not_kept(store: BlobStore) -> None:
    for blob in (b"no state", make_state(make_manifest(name="another run")).blob):
        link = Link(store, blob)
        (digest,) = link.shelf
        with pytest.raises(Reject):
            fetch_state(link, store, MANIFEST, LIKE, digest, ())
        assert store.find(digest) is None


def test_a_state_is_adopted_when_it_is_what_its_supporters_attest(store: BlobStore) -> None:
    others = attested(anne=S1, ben=S1)
    state = adopt(Link(store, S1.blob), store, MANIFEST, LIKE, agree(others.values()), others.values())
    assert state.digest == S1.digest


def test_a_state_of_another_round_than_attested_is_refused(store: BlobStore) -> None:
    others = {who.peer: make_attestation(who, S1, round=7, ancestors=(S0.digest,)) for who in (ANNE, BEN)}
    with pytest.raises(Reject, match="is not what its supporters attest"):
        adopt(Link(store, S1.blob), store, MANIFEST, LIKE, agree(others.values()), others.values())


def test_a_state_of_other_work_than_attested_is_refused(store: BlobStore) -> None:
    others = {who.peer: make_attestation(who, S1, work=1e15) for who in (ANNE, BEN)}
    with pytest.raises(Reject, match="is not what its supporters attest"):
        adopt(Link(store, S1.blob), store, MANIFEST, LIKE, agree(others.values()), others.values())


def test_one_supporter_that_lies_about_the_work_does_not_keep_others_from_adopting(store: BlobStore) -> None:
    others = attested(anne=S1, ben=S1)
    others[EVE.peer] = make_attestation(EVE, S1, work=1e15)
    assert (
        adopt(Link(store, S1.blob), store, MANIFEST, LIKE, agree(others.values()), others.values()).digest == S1.digest
    )


def test_where_nothing_holds_nothing_is_adopted(store: BlobStore) -> None:
    with pytest.raises(TransportError, match="nobody attests a state yet"):
        adopt(Link(store), store, MANIFEST, LIKE, Agreement(None, None, (), "nobody attests a state yet"), ())


def test_a_state_that_nobody_gives_is_a_transport_error(store: BlobStore) -> None:
    others = attested(anne=S1, ben=S1)
    with pytest.raises(TransportError):
        adopt(Link(store), store, MANIFEST, LIKE, agree(others.values()), others.values())


def test_a_state_whose_work_is_written_down_wrongly_has_another_digest() -> None:
    forged = dataclasses.replace(S1, credit={EVE.peer: 1e15})
    assert forged.digest != S1.digest
    assert forged.work == 1e15


def test_a_manifest_is_fetched_once_by_the_runs_id(store: BlobStore) -> None:
    link = Link(store, MANIFEST.canonical())
    for _ in range(2):
        assert fetch_manifest(link, store, MANIFEST.run_id, 0.0, pytest.fail) == MANIFEST
    assert [asked["max_bytes"] for asked in link.asked] == [MAX_MANIFEST_BYTES]


def test_a_manifest_is_asked_for_again_while_there_is_time(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pasr.peers.sync.POLL_SECONDS", 0.0)
    link = Link(store, MANIFEST.canonical())
    link.failures = 3
    told: list[str] = []
    assert fetch_manifest(link, store, MANIFEST.run_id, 3600.0, told.append) == MANIFEST
    assert told == ["nobody on the network offers it; asking again"] * 3


def test_a_manifest_that_nobody_gives_in_time_is_a_transport_error(store: BlobStore) -> None:
    with pytest.raises(TransportError, match="nobody on the network"):
        fetch_manifest(Link(store), store, digest_of("another run"), -1.0, pytest.fail)


def test_an_id_that_names_no_manifest_is_refused(store: BlobStore) -> None:
    link = Link(store, b"no manifest")
    (digest,) = link.shelf
    with pytest.raises(Reject):
        fetch_manifest(link, store, digest, 0.0, pytest.fail)
