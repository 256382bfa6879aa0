"""Peers that give nothing, or give it as slowly as they can: what of others' time they take, and who is blamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest

from p2pasr import accusing, auditing, waits, withholding
from p2pasr.errors import TransportError
from p2pasr.protocol.audits import Duty
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.messages import Accusation, Charge, Claim, seal, unseal
from p2pasr.verify.conflict import Conflict
from p2pasr.verify.evidence import ConflictProof
from p2pasr.verify.record import RoundRecord
from p2pasr.waits import seconds_of
from p2pasr.withholding import Doubt
from tests.attacks.arena import Arena, Player

SLOW, SILENT, HONEST, ACCUSED = 0, 1, 2, 3
FOREVER = 1e9


class SlowNetwork:
    """A network on which only waiting takes time, for one peer that looks at the others.

    Attributes:
        needs: peer → seconds that it takes for whatever is asked of it.
        asked: how often each was asked.
    """

    def __init__(self, eye: Player, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.needs: dict[str, float] = {}
        self.asked: Counter[str] = Counter()
        self._honest = eye.member.link.call
        patch.setattr(eye.member.link, "call", self.call)
        for module in (accusing, waits):
            patch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self.now

    def call(self, method: str, seconds: float, /, **args: Any) -> dict[str, Any]:
        peer = None
        if method == "fetch" and args["peers"]:
            (peer,) = args["peers"]
        elif method == "part":
            peer = unseal(args["claim"], Claim).message.peer
        if peer is not None:
            self.asked[peer] += 1
            self.now += min(seconds, self.needs.get(peer, 0.0))
            if self.needs.get(peer, 0.0) > seconds:
                raise TransportError("nothing came")
        return self._honest(method, seconds, **args)


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    """Five honest peers after two rounds."""
    with ExitStack() as opened:
        verify = {"rate": 1.0, "auditors": 4, "parts": 3}
        swarm = opened.enter_context(Arena(Path(mkdtemp(dir=tmp_path)), 5, verify=verify))
        swarm.play(2)
        yield swarm


def warnings(player: Player) -> str:
    return "\n".join(event["message"] for event in player.member.report.seen("warning"))


def test_peers_that_give_nothing_take_half_of_a_round_and_nobody_else_is_called_unavailable_for_it(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    eye = arena.players[4]
    network = SlowNetwork(eye, monkeypatch)
    network.needs = {arena.players[SLOW].peer: FOREVER, arena.players[SILENT].peer: FOREVER}
    monkeypatch.setattr(auditing, "seconds_of", lambda _: 60.0)
    auditing.check_last_round(eye.member)
    assert network.now <= 60.0
    found = [event for event in eye.member.report.seen("audit") if event["finding"] == "unavailable"]
    assert {event["peer"] for event in found} == network.needs.keys()
    assert "is not checked: no time is left in this round" in warnings(eye)


def test_an_honest_peer_is_not_struck_because_others_used_up_the_time_to_ask_it(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    eye = arena.players[4]
    record = RoundRecord.unpack(eye.member.journal.read_record(0))
    claims = {claim.message.peer: claim for claim in record.members}
    asked = [claims[arena.players[position].peer] for position in (SILENT, SLOW, HONEST)]
    doubts = [Doubt(claim, Duty(claim.message.peer, claim.digest, 1), eye.peer, None) for claim in asked]
    monkeypatch.setattr(withholding, "find_doubts", lambda *_: iter(doubts))
    monkeypatch.setattr(withholding, "RETRY_SECONDS", 0.0)
    network = SlowNetwork(eye, monkeypatch)
    silent, slow, honest = (claim.message.peer for claim in asked)
    network.needs = {silent: FOREVER, slow: 49.0, honest: 5.0}
    eye.member.asked = b""
    withholding.ask_again(eye.member)
    assert network.asked.keys() == {silent, slow, honest}
    assert eye.member.strikes.keys() == {silent}
    assert network.now <= seconds_of(arena.manifest.rounds)


def accuse(player: Player, digests: list[bytes], accused: str) -> None:
    charges = tuple(Charge(accused, digest, 1000) for digest in digests)
    accusation = Accusation(player.member.state.run, player.peer, charges)
    player.member.records.announce_accusation(seal(player.member.identity, accusation), player.member.cohort)


def test_accusers_that_give_no_proof_are_asked_once_a_round_and_ever_more_seldom(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    eye, liars = arena.players[4], arena.players[:2]
    for liar in liars:
        accuse(liar, [blob_digest(liar.peer.encode(), bytes([at])) for at in range(16)], arena.players[ACCUSED].peer)
    network = SlowNetwork(eye, monkeypatch)
    network.needs = {liar.peer: FOREVER for liar in liars}
    heard = []
    for number in range(2, 12):
        eye.member.state = replace(eye.member.state, round=number)
        before, began = network.asked[liars[0].peer], network.now
        for _ in range(2):
            accusing.hear(eye.member, 30.0)
        heard.append(network.asked[liars[0].peer] - before)
        assert network.now - began <= 30.0
    assert heard == [1, 1, 0, 1, 0, 0, 0, 1, 0, 0]
    assert eye.member.distrusted == set()


def test_a_proof_is_heard_however_long_others_take_that_accuse_too(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    eye, witness, accused = arena.players[4], arena.players[HONEST], arena.players[ACCUSED]
    record = RoundRecord.unpack(witness.member.journal.read_record(1))
    first = next(receipt for receipt in record.receipts if receipt.message.peer == accused.peer)
    part, *others = first.message.parts
    changed = replace(first.message, parts=(replace(part, result=bytes(32)), *others))
    proof = ConflictProof(Conflict(first, seal(accused.member.identity, changed)))
    accusing.convict(witness.member, proof, "two results")
    for liar in arena.players[:2]:
        accuse(liar, [blob_digest(liar.peer.encode())], accused.peer)
    network = SlowNetwork(eye, monkeypatch)
    network.needs = {liar.peer: FOREVER for liar in arena.players[:2]} | {witness.peer: 9.0}
    witness_last = SimpleNamespace(shuffle=lambda peers: peers.sort(key=lambda peer: peer == witness.peer))
    monkeypatch.setattr(accusing, "CHANCE", witness_last)
    accusing.hear(eye.member, 30.0)
    assert eye.member.proved == {accused.peer}
