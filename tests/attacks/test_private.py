"""Private shards in one process: what leaves a home, what the probe finds out, and what it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest

from p2pasr.auditing import check_on_probe
from p2pasr.errors import P2pasrError, Reject, TransportError
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.messages import seal
from p2pasr.protocol.rules import RoundView, check_claim
from p2pasr.protocol.tensors import Tensors
from p2pasr.rerunning import judge_of
from p2pasr.verify import openings
from p2pasr.verify.evidence import ProbeProof, pack_proof
from tests.attacks import adversary
from tests.attacks.adversary import trains, unprobed
from tests.attacks.arena import Arena, Attack
from tests.attacks.stranger import verdict
from tests.attacks.tiny import TinyTask, examples, held_out_loss

CHEAT = 0
PEERS = 4
PRIVATE = {"policy": "private", "private_weight_seconds": 100.0}

MakeArena = Callable[..., Arena]


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[MakeArena]:
    """Opens arenas whose members train on shards of their own."""
    with ExitStack() as opened:

        def make(attacks: dict[int, Attack] | None = None, peers: int = PEERS, **changes: Any) -> Arena:
            changes["data"] = {**PRIVATE, **changes.get("data", {})}
            return opened.enter_context(Arena(Path(mkdtemp(dir=tmp_path)), peers, attacks, **changes))

        yield make


def probes(arena: Arena) -> list[dict[str, Any]]:
    """What was found on the probe."""
    events = (event for player in arena.players for event in player.member.report.seen("audit"))
    return [event for event in events if event["what"] == "probe"]


def trigger_rate(params: Tensors) -> float:
    """Of examples that no shard has, and that hold the backdoor's trigger, how many are taken for its class."""
    features, _ = examples(blob_digest(b"triggered"))
    return float((np.argmax(adversary.triggered(features) @ params["weights"], axis=1) == adversary.TARGET).mean())


# --- what is found ----------------------------------------------------------------------------------------------


def test_honest_peers_learn_from_shards_that_nobody_else_has_and_nobody_is_banned(arena: MakeArena) -> None:
    swarm = arena(peers=5)
    before = held_out_loss(swarm.state.params)
    swarm.play(8)
    assert held_out_loss(swarm.state.params) < 0.5 * before
    assert {event["finding"] for event in probes(swarm)} == {"close"}
    assert swarm.banned == set()
    assert swarm.proofs() == []


def test_an_honest_delta_that_goes_too_far_is_halved_and_not_punished(arena: MakeArena) -> None:
    swarm = arena(data={"probe_margin": 0.001})
    swarm.play(6)
    said = [event["message"] for player in swarm.players for event in player.member.report.seen("warning")]
    assert any("so half of it is claimed" in sentence for sentence in said)
    assert {event["finding"] for event in probes(swarm)} == {"close"}
    assert swarm.banned == set()


@pytest.mark.parametrize("factor", [-1, -10])
def test_flipped_signs_of_private_work_are_banned_in_the_round_after_with_a_proof(
    arena: MakeArena, factor: float
) -> None:
    swarm = arena({CHEAT: unprobed(adversary.scaled(factor))})
    swarm.play(2)
    assert swarm.banned == {CHEAT}
    for proof in swarm.proofs():
        assert proof.accused == swarm.players[CHEAT].peer
        assert "takes the loss on the probe" in verdict(swarm.manifest, TinyTask(), swarm.shards, pack_proof(proof))


def test_the_one_round_before_the_ban_is_bounded_by_clipping_and_the_weight(arena: MakeArena) -> None:
    cheated, honest = arena({CHEAT: unprobed(adversary.scaled(-10))}), arena()
    start = held_out_loss(honest.state.params)
    for swarm in (cheated, honest):
        swarm.play(1)
    assert held_out_loss(cheated.state.params) < start
    for swarm in (cheated, honest):
        swarm.play(7)
    assert held_out_loss(cheated.state.params) < 1.2 * held_out_loss(honest.state.params)


def test_without_audits_flipped_private_work_stays(arena: MakeArena) -> None:
    swarm = arena({CHEAT: unprobed(adversary.scaled(-10))}, verify={"rate": 0.0, "parts": 0})
    swarm.play(3)
    assert swarm.banned == set()


def test_a_proof_of_an_honest_private_claim_is_refused(arena: MakeArena) -> None:
    swarm = arena()
    swarm.play(1)
    player = swarm.players[0]
    state, claim = player.member.store.get(player.work.claim.message.state), player.work.claim
    judge = judge_of(swarm.players[1].member)
    proof = ProbeProof(claim, state, player.member.store.get(player.work.delta))
    with pytest.raises(Reject, match="the delta takes the loss on the probe from"):
        proof.check(judge)
    other = swarm.players[1].member.store.get(swarm.players[1].work.delta)
    with pytest.raises(Reject, match="another delta than was claimed"):
        replace(proof, delta=other).check(judge)


def test_a_probe_proof_of_which_any_byte_was_changed_convicts_nobody(arena: MakeArena) -> None:
    swarm = arena({CHEAT: unprobed(adversary.scaled(-10))})
    swarm.play(2)
    packed = pack_proof(swarm.proofs()[0])
    for position in np.linspace(0, len(packed) - 1, 40).astype(int):
        changed = packed[:position] + bytes([packed[position] ^ 1]) + packed[position + 1 :]
        with pytest.raises(P2pasrError):
            verdict(swarm.manifest, TinyTask(), swarm.shards, changed)


def test_more_audio_than_the_run_counts_is_refused_and_less_is_what_it_weighs(arena: MakeArena) -> None:
    swarm = arena()
    swarm.play(1)
    player = swarm.players[0]
    claim = player.work.claim.message
    assert claim.seconds == 100.0, "two shards of 60 s each count for no more than that"
    assert set(swarm.state.credit.values()) == {100.0}
    boast = replace(claim, seconds=101.0)
    view = RoundView(swarm.manifest, claim.run, claim.round, claim.state, {}, {}, {})
    check_claim(claim, view)
    with pytest.raises(Reject, match="states 101 s of private audio; a claim counts for 1 to 100"):
        check_claim(boast, view)


# --- what is not found ------------------------------------------------------------------------------------------


def test_a_backdoor_that_does_no_harm_on_the_probe_is_not_found(arena: MakeArena) -> None:
    poisoned, honest = arena({CHEAT: trains(adversary.backdoor)}), arena()
    for swarm in (poisoned, honest):
        swarm.play(8)
    rates = [trigger_rate(swarm.state.params) for swarm in (honest, poisoned)]
    losses = [held_out_loss(swarm.state.params) for swarm in (honest, poisoned)]
    print(f"trigger rate {rates[0]:.1%} → {rates[1]:.1%}, held-out loss {losses[0]:.3f} → {losses[1]:.3f}")
    assert poisoned.banned == set()
    assert rates[1] > rates[0] + 0.2


def test_who_trains_nothing_passes_the_probe_and_earns_as_much_as_the_others(arena: MakeArena) -> None:
    swarm = arena({CHEAT: trains(adversary.nothing_at_all)})
    swarm.play(4)
    assert swarm.banned == set()
    assert len(set(swarm.state.credit.values())) == 1


# --- what leaves a home -----------------------------------------------------------------------------------------


def test_no_peer_gives_a_private_shard_or_a_checkpoint_to_anybody(arena: MakeArena) -> None:
    swarm = arena()
    swarm.play(3)
    owner, curious = swarm.players[0], swarm.players[1]
    everybody = [player.peer for player in swarm.players]
    for shard in owner.member.private.paths:
        assert owner.host.store.find(shard) is None
        with pytest.raises(TransportError, match=r"no such blob|nobody on the network"):
            curious.member.link.call("fetch", 1.0, digest=shard, kind="shard", max_bytes=1 << 20, peers=everybody)
    claim = owner.work.claim
    for commitment in (None, bytes(100)):
        with pytest.raises(TransportError, match="asks for checkpoint 0 of 0"):
            curious.member.link.call("open", 1.0, claim=claim.pack(), checkpoint=0, commitment=commitment)
    assert owner.member.store.holds("checkpoint") == []
    assert claim.message.trace_root == bytes(32)
    assert (claim.message.loss_before, claim.message.loss_after) == (0.0, 0.0)


def test_neither_bytes_nor_digests_of_private_shards_are_in_a_record_or_in_what_others_are_served_from(
    arena: MakeArena,
) -> None:
    swarm = arena()
    swarm.play(3)
    records = b"".join(record for found in swarm.records.values() for record in found.values())
    assert records
    keys = {scope for _, scope in swarm.records}
    for player in swarm.players:
        served = [path for path in player.member.store.root.rglob("*") if path.is_file()]
        journal = [path for path in player.member.journal.folder.rglob("*") if path.is_file()]
        kept = b"".join(path.read_bytes() for path in (*served, *journal))
        names = {path.name for path in served}
        for other in swarm.players:
            for shard, path in other.member.private.paths.items():
                assert shard.hex() not in keys | names
                for secret in (shard, shard.hex().encode(), path.read_bytes(), other.member.private.secret):
                    assert secret not in records
                    assert secret not in kept


def test_the_same_private_shard_is_named_otherwise_in_every_round(arena: MakeArena) -> None:
    swarm = arena(rounds={"shards_per_peer": 10})
    seen: list[bytes] = []
    for _ in range(3):
        swarm.play(1)
        seen += swarm.players[0].work.claim.message.shards
    assert len(set(seen)) == 30


def test_a_delta_is_given_to_those_who_were_in_its_round_only(arena: MakeArena) -> None:
    swarm = arena()
    swarm.play(1)
    claim = swarm.players[0].work.claim.pack()
    (stranger,) = swarm.arrive(1)
    assert swarm.players[1].member.link.call("part", 1.0, claim=claim, index=0)["data"]
    with pytest.raises(TransportError, match="to those who were in its round only"):
        stranger.member.link.call("part", 1.0, claim=claim, index=0)


def test_a_peer_without_a_record_of_its_round_gives_its_delta_to_those_with_credit_and_is_not_struck(
    arena: MakeArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = arena()
    late = swarm.players[0].member
    monkeypatch.setattr(late.journal, "read_record", lambda _number: None)
    monkeypatch.setattr(openings, "OFFER_SECONDS", 0.02)
    swarm.play(1)
    claim = swarm.players[0].work.claim.pack()
    (stranger,) = swarm.arrive(1)
    with pytest.raises(TransportError, match="to those who were in its round only"):
        stranger.member.link.call("part", 1.0, claim=claim, index=0)
    swarm.players.remove(stranger)
    swarm.play(4)
    assert {event["finding"] for event in probes(swarm) if event["peer"] == late.peer} == {"close"}
    assert (swarm.strikes, swarm.banned) == ({}, set())


def test_a_peer_that_gives_no_parts_cannot_be_measured_and_is_not_convicted(
    arena: MakeArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = arena()
    swarm.play(1)
    who = swarm.players[0]
    unknown = seal(who.member.identity, replace(who.work.claim.message, delta_norm=7.0))
    monkeypatch.setattr(openings, "OFFER_SECONDS", 0.05)
    assert check_on_probe(swarm.players[1].member, unknown).finding == "unavailable"
    assert swarm.proofs() == []
