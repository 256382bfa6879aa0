"""An observer finds what peers did wrong in a round, and nothing where they did not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2pasr import observer
from p2pasr.averaging.codec import Layout
from p2pasr.averaging.merkle import Tree, part_digests
from p2pasr.errors import TransportError
from p2pasr.member import Member
from p2pasr.observer import Line, Look, check_round, line_of, open_rounds
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal
from p2pasr.peers.records import Records
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.messages import Claim, seal, unseal
from p2pasr.protocol.state import State, advance
from p2pasr.report import Report
from p2pasr.tasks import Checkpoint
from p2pasr.verify.evidence import Judge, reduce_again, unpack_proof
from p2pasr.verify.record import RoundRecord

from .builders import (
    GROUP,
    SHARDS,
    ToyTask,
    Trained,
    digest_of,
    make_attestation,
    make_identity,
    make_manifest,
    make_receipt,
    make_state,
    train_claim,
    train_toy,
)

MANIFEST = make_manifest()
STATE = make_state(MANIFEST)
LAYOUT = Layout.of(MANIFEST.parameters, MANIFEST.averaging)
PEERS = tuple(map(make_identity, (1, 2, 3)))
WATCHER = make_identity(9)


class Swarm:
    """Three peers after a round, as an observer reaches them; each lie is a keyword."""

    maddrs: tuple[str, ...] = ()

    def __init__(self, store: BlobStore, lazy: int | None = None, lie: int | None = None, wrong: int | None = None):
        self.store = store
        self.works = [
            train_claim(
                who,
                MANIFEST,
                STATE,
                segments=2,
                spoil=_spoil if position == lazy else lambda _index, checkpoint: checkpoint,
                lie=0.25 if position == lie else 0.0,
            )
            for position, who in enumerate(PEERS)
        ]
        self.record = _record(self.works, wrong)
        self.records = {who.peer: self.record for who in PEERS}
        self.closed: set[str] = set()
        self.announced: list[str] = []
        self.blobs = {blob_digest(data): data for work in self.works for data in (*work.checkpoints, work.delta)}
        self.blobs |= {
            blob_digest(data): data for data in (STATE.blob, *(f"shard {n}".encode() for n in range(SHARDS)))
        }

    def announce(self, slot: str, *_: Any, **_options: Any) -> None:
        self.announced.append(slot)

    def call(self, method: str, _seconds: float, /, **args: Any) -> dict[str, Any]:
        return dict(getattr(self, f"_{method}")(**args))

    def _provide(self, **_: Any) -> dict[str, Any]:
        return {}

    def _record(self, peer: str, round: int) -> dict[str, Any]:  # noqa: A002
        assert round == STATE.round
        packed = self.records[peer].pack()
        self.blobs[blob_digest(packed)] = packed
        return {"digest": blob_digest(packed)}

    def _fetch(self, digest: bytes, kind: Any, max_bytes: int, peers: Any) -> dict[str, Any]:
        if digest not in self.blobs:
            raise TransportError("nobody gives it")
        assert len(self.blobs[digest]) <= max_bytes
        self.store.put(kind, self.blobs[digest])
        return {"size": len(self.blobs[digest])}

    def _open(self, claim: bytes, checkpoint: int, commitment: Any) -> dict[str, Any]:
        work = self._work(claim)
        return {"digest": blob_digest(work.checkpoints[checkpoint]), "proof": work.way(checkpoint)}

    def _part(self, claim: bytes, index: int) -> dict[str, Any]:
        work = self._work(claim)
        parts, message = LAYOUT.cut(work.delta), work.claim.message
        tree = Tree("delta", message.run, message.round, message.peer)
        return {"data": bytes(parts[index]), "proof": tree.prove(part_digests(parts), index)}

    def _work(self, claim: bytes) -> Trained:
        peer = unseal(claim, Claim).message.peer
        if peer in self.closed:
            raise TransportError("this claim is not open here")
        return next(work for work in self.works if work.claim.message.peer == peer)


def _spoil(index: int, checkpoint: bytes) -> bytes:
    read = Checkpoint.unpack(checkpoint)
    moved = {name: value + np.float32(0.5 if index == 0 else 0.0) for name, value in read.params.items()}
    return dataclasses.replace(read, params=moved).pack()


def _record(works: list[Trained], wrong: int | None) -> RoundRecord:
    members = tuple(work.claim for work in works)
    claims = [member.message for member in members]
    parts = [[bytes(part) for part in LAYOUT.cut(work.delta)] for work in works]
    results = {}
    for index in range(LAYOUT.parts):
        made = reduce_again(claims, STATE, MANIFEST, index, {at: cut[index] for at, cut in enumerate(parts)})
        assert made is not None
        results[index] = made if index != wrong else made[::-1]
    shares = ({0: results[0]}, {1: results[1], 2: results[2]})
    receipts = tuple(
        seal(who, make_receipt(who, STATE, members, share)) for who, share in zip(PEERS[:2], shares, strict=True)
    )
    after = advance(STATE, MANIFEST, claims, STATE.params, {})
    attestations = tuple(seal(who, make_attestation(who, after)) for who in PEERS)
    average = blob_digest(*(results[index] for index in range(LAYOUT.parts)))
    return RoundRecord(
        STATE.run, STATE.round, STATE.digest, after.digest, GROUP, members, receipts, average, attestations
    )


@pytest.fixture
def watching(store: BlobStore, journal: Journal) -> Iterator[Callable[..., Any]]:
    """Look at one round of a swarm; returns the swarm, the looks and the proofs."""

    def look(
        rate: float = 1.0, change: Callable[[Swarm], None] = lambda _swarm: None, held: State = STATE, **lies: int
    ) -> Any:
        swarm = Swarm(store, **lies)
        change(swarm)
        link: Any = swarm
        task: Any = ToyTask()
        records = Records(link, WATCHER, STATE.run, lambda _sentence: None)
        report = Report("json")
        member = Member(MANIFEST, WATCHER, task, link, store, journal, records, report, STATE.params, held)
        line = Line(1, {0: STATE.digest, 1: swarm.record.after}, tuple(who.peer for who in PEERS))
        looks = list(check_round(member, line, 0, rate))
        return swarm, looks, [unpack_proof(path.read_bytes()) for path in Journal.read_proofs(journal.folder)]

    return look


def found(looks: list[Look], finding: str) -> set[tuple[str, str, int]]:
    return {(look.finding.peer, look.what, look.finding.item) for look in looks if look.finding.finding == finding}


JUDGE = Judge(MANIFEST, STATE.params, lambda *args: train_toy(MANIFEST, *args))


def test_an_honest_round_is_done_again_whole_and_found_the_same(watching: Callable[..., Any]) -> None:
    swarm, looks, proofs = watching()
    assert {look.finding.finding for look in looks} == {"same"}
    segments = {(who.peer, "segment", segment) for who in PEERS for segment in range(2)}
    parts = {(PEERS[0].peer, "part", 0), (PEERS[1].peer, "part", 1), (PEERS[1].peer, "part", 2)}
    assert found(looks, "same") == segments | parts
    assert (proofs, swarm.announced) == ([], [])


def test_a_made_up_segment_is_found_and_proved(watching: Callable[..., Any]) -> None:
    swarm, looks, proofs = watching(lazy=1)
    assert found(looks, "different") == {(PEERS[1].peer, "segment", 0)}
    (proof,) = proofs
    assert (proof.kind, proof.accused) == ("segment", PEERS[1].peer)
    assert proof.check(JUDGE)
    assert swarm.announced == ["accusation"]


@pytest.mark.parametrize("lie", ["lazy", "lie", "wrong"])
def test_a_proof_is_named_after_the_round_that_it_is_about(
    watching: Callable[..., Any], journal: Journal, lie: str
) -> None:
    watching(held=dataclasses.replace(STATE, round=7), **{lie: 1})
    (path,) = Journal.read_proofs(journal.folder)
    assert path.name.startswith(f"{STATE.round:08d}-")


def test_a_delta_of_something_else_is_found_and_proved(watching: Callable[..., Any]) -> None:
    _, looks, proofs = watching(lie=2)
    assert found(looks, "different") == {(PEERS[2].peer, "segment", 0), (PEERS[2].peer, "segment", 1)}
    assert {(proof.kind, proof.accused) for proof in proofs} == {("link", PEERS[2].peer)}


def test_a_wrong_reduction_is_found_and_proved(watching: Callable[..., Any]) -> None:
    _, looks, proofs = watching(wrong=2)
    assert found(looks, "different") == {(PEERS[1].peer, "part", 2)}
    (proof,) = proofs
    assert (proof.kind, proof.accused) == ("reduction", PEERS[1].peer)
    assert proof.check(Judge(MANIFEST))


def test_who_opens_nothing_is_not_accused(watching: Callable[..., Any]) -> None:
    _, looks, proofs = watching(change=lambda swarm: swarm.closed.add(PEERS[0].peer))
    assert {key for key in found(looks, "unavailable") if key[1] == "segment"} == {
        (PEERS[0].peer, "segment", 0),
        (PEERS[0].peer, "segment", 1),
    }
    assert not found(looks, "different")
    assert proofs == []


def test_records_that_do_not_hold_are_passed_over_for_another_peers(watching: Callable[..., Any]) -> None:
    def forge(swarm: Swarm) -> None:
        swarm.records[PEERS[0].peer] = dataclasses.replace(swarm.record, members=swarm.record.members[:2])
        swarm.records[PEERS[1].peer] = dataclasses.replace(swarm.record, attestations=())

    _, looks, _ = watching(change=forge)
    assert len(found(looks, "same")) == 9


def test_a_round_whose_record_nobody_gives_is_not_checked(watching: Callable[..., Any]) -> None:
    def forge(swarm: Swarm) -> None:
        other = dataclasses.replace(swarm.record, before=digest_of("elsewhere"))
        swarm.records = dict.fromkeys(swarm.records, other)

    assert watching(change=forge)[1] == []


def test_so_many_are_checked_as_the_rate_says(watching: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Draw:
        def __init__(self) -> None:
            self.next = 0.0

        def random(self) -> float:
            self.next = (self.next + 0.25) % 1.0
            return self.next

    monkeypatch.setattr(observer, "CHANCE", Draw())
    assert watching(rate=0.0)[1] == []
    monkeypatch.setattr(observer, "CHANCE", Draw())
    assert len(watching(rate=0.3)[1]) == 5  # 0.25 and 0.0 of every four draws, of nine


# --- what is open -----------------------------------------------------------------------------------


def votes(rounds: int, *, forked: int = 0) -> list[Any]:
    """What three peers attest after so many rounds, and others that trained apart."""
    states = [digest_of(f"state {number}") for number in range(rounds + 1)]
    apart = [digest_of(f"other {number}") for number in range(rounds + 1)]
    return [
        dataclasses.replace(
            make_attestation(make_identity(number + 1), STATE),
            round=rounds,
            state=line[-1],
            ancestors=tuple(line[-2::-1])[:16],
        )
        for number, line in enumerate([states] * 3 + [apart] * forked)
    ]


def test_the_line_is_that_of_the_majority() -> None:
    line = line_of(votes(5, forked=2))
    assert line is not None
    assert line.round == 5
    assert line.states == {number: digest_of(f"state {number}") for number in range(6)}
    assert set(line.peers) == {make_identity(number).peer for number in (1, 2, 3)}
    assert line_of([]) is None


@pytest.mark.parametrize(
    ("kept", "number", "expected"), [(3, 5, [2, 3]), (4, 5, [1, 2, 3]), (3, 1, []), (3, 2, [0]), (8, 4, [0, 1, 2])]
)
def test_a_round_is_open_when_the_next_one_is_over_and_while_its_traces_are_kept(
    store: BlobStore, journal: Journal, kept: int, number: int, expected: list[int]
) -> None:
    manifest = make_manifest(retention={"checkpoint_rounds": kept})
    state, none = make_state(manifest), Any
    member: Any = Member(manifest, WATCHER, none, none, store, journal, none, none, state.params, state)
    line = line_of(votes(number))
    assert line is not None
    assert open_rounds(member, line) == expected


def test_rounds_beyond_the_attested_line_are_not_open(tmp_path: Path, store: BlobStore, journal: Journal) -> None:
    manifest = make_manifest(retention={"checkpoint_rounds": 8})
    state, none = make_state(manifest), Any
    member: Any = Member(manifest, WATCHER, none, none, store, journal, none, none, state.params, state)
    line = Line(6, {4: b"4", 5: b"5", 6: b"6"}, ())
    assert open_rounds(member, line) == [4]


def test_rounds_are_watched_as_they_open_and_what_closed_meanwhile_is_passed_over(
    store: BlobStore, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = iter([1, 2, 2, 3, 7, 8, 9])

    def look(_member: Any) -> dict[str, Any]:
        """The directory of a run that goes on whenever somebody looks."""
        return {vote.peer: seal(make_identity(n + 1), vote) for n, vote in enumerate(votes(next(heads)))}

    checked: list[int] = []

    def check(_member: Any, _line: Line, number: int, _rate: float) -> list[Look]:
        checked.append(number)
        return []

    monkeypatch.setattr(observer, "check_round", check)
    monkeypatch.setattr(observer, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(observer, "attestations_around", look)
    none: Any = None
    member = Member(MANIFEST, WATCHER, none, none, store, journal, none, Report("json"), STATE.params, STATE)
    assert list(observer.watch(member, 0, 5, 1.0)) == []
    assert checked == [0, 1, 4, 5]
