"""Free riders and flipped signs in every kind of task: an auditor finds them, and its proof convinces a stranger.

Claims are made by the steps of a round, in a run as `p2pasr run new` makes it, and audited as in a round; what is left
out is that work is averaged. Limits are the manifest's defaults.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from examples.characters import Characters, cut
from p2pasr import new_run, write_shards
from p2pasr import round as story
from p2pasr.auditing import Opened, check_opened
from p2pasr.averaging.merkle import Tree
from p2pasr.member import Work
from p2pasr.protocol.audits import Duty
from p2pasr.protocol.manifest import RunConfig
from p2pasr.protocol.signing import short
from p2pasr.protocol.tensors import forms
from p2pasr.runs import build_task
from p2pasr.speech.prepare import read_index
from p2pasr.tasks import Checkpoint, Task
from p2pasr.verify.evidence import Opening, unpack_proof
from tests.attacks.adversary import dressed_up, mirrored, nothing_at_all, scaled, trains
from tests.attacks.arena import Arena, Attack, Player, World
from tests.attacks.stranger import verdict
from tests.unit.every_kind import CONFIGS, kind_of, with_folders

SEGMENTS = 2
ROUNDS = {"rounds": 3, "segments": SEGMENTS, "steps_per_segment": 1, "samples_per_step": 2, "shards_per_peer": 1}


@dataclass(frozen=True)
class Cheat:
    """One way to cheat.

    Attributes:
        found: what an auditor of each segment finds.
        proof: the kind of proof that it comes to.
    """

    attack: Attack
    found: tuple[str, ...]
    proof: str


CHEATS = {
    "a free rider": Cheat(trains(dressed_up), ("different", "different"), "segment"),
    "a free rider after one segment": Cheat(
        trains(nothing_at_all, lambda at: at > 0), ("same", "different"), "segment"
    ),
    "a flipped sign": Cheat(scaled(-1), ("different", "different"), "link"),
    "a flipped sign, ten times as large": Cheat(scaled(-10), ("different", "different"), "link"),
    "a flipped sign in the checkpoints too": Cheat(trains(mirrored), ("different", "different"), "segment"),
}

AUDITOR, HONEST, FIRST_CHEAT = range(3)


@pytest.fixture(scope="module", params=[*CONFIGS, "characters"])
def world(
    request: pytest.FixtureRequest, labelled: Path, language_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> World:
    """A run of each kind, and of the example that is a task of one's own."""
    name = request.param
    if name == "characters":
        shards = tmp_path_factory.mktemp("text")
        write_shards(shards, cut(Path(__file__).read_bytes()))
        return run_of({"kind": name}, shards, Characters())
    return run_of({"kind": kind_of(name), "config": with_folders(name, language_model)}, labelled)


def run_of(task: dict[str, Any], shards: Path, own: Task | None = None) -> World:
    config = RunConfig.model_validate({"name": "every task", "task": task, "rounds": ROUNDS})
    manifest = new_run(config, shards, task=own)
    files = {bytes.fromhex(shard.digest): shards / shard.file for shard in read_index(shards).shards}
    return World(manifest, (lambda: build_task(manifest)) if own is None else type(own), files)


@pytest.fixture(scope="module")
def arena(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    attacks = {FIRST_CHEAT + place: cheat.attack for place, cheat in enumerate(CHEATS.values())}
    with Arena(tmp_path_factory.mktemp("arena"), FIRST_CHEAT + len(CHEATS), attacks, world) as opened:
        yield opened


@pytest.fixture(scope="module")
def stranger(world: World) -> Task:
    """The run's task, made by somebody who saw none of the training."""
    return world.make()


@pytest.fixture(scope="module")
def honest(arena: Arena) -> Work:
    return claim_of(arena.players[HONEST])


def claim_of(player: Player) -> Work:
    """What a member claims after training in its own way."""
    member = player.member
    with player.turn():
        shards = story.assign_shards(member)
        trained = story.train(member, shards, SEGMENTS)
        assert trained is not None
        return story.commit(member, shards, *trained)


def audited(arena: Arena, author: Player, work: Work) -> tuple[str, ...]:
    """What the auditor finds that trains each segment of a claim again."""
    claim, member = work.claim, arena.players[AUDITOR].member
    tree = Tree.of("trace", claim.message)

    def opening(index: int) -> Opening:
        return Opening(author.member.store.get(work.checkpoints[index]), tree.prove(work.checkpoints, index))

    def found(segment: int) -> str:
        opened = Opened(opening(segment - 1) if segment else None, opening(segment), opening(SEGMENTS - 1))
        return check_opened(member, member.state, claim, Duty(author.peer, claim.digest, segment), opened).finding

    return tuple(map(found, range(SEGMENTS)))


def test_an_honest_claim_is_what_its_auditor_trains_again(arena: Arena, honest: Work) -> None:
    author = arena.players[HONEST]
    assert audited(arena, author, honest) == ("same", "same")
    assert author.peer not in arena.players[AUDITOR].member.charges


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_found_and_its_proof_convinces_a_stranger(
    arena: Arena, honest: Work, stranger: Task, name: str
) -> None:
    cheat, author = CHEATS[name], arena.players[FIRST_CHEAT + list(CHEATS).index(name)]
    work, auditor = claim_of(author), arena.players[AUDITOR].member
    for claimed, trained in zip(work.checkpoints, honest.checkpoints, strict=True):
        assert form_of(author, claimed) == form_of(arena.players[HONEST], trained)  # which would give it away
    assert audited(arena, author, work) == cheat.found
    packed = auditor.store.get(auditor.charges[author.peer].proof)
    proof = unpack_proof(packed)
    assert (proof.kind, proof.accused) == (cheat.proof, author.peer)
    assert short(author.peer) in verdict(arena.manifest, stranger, arena.shards, packed)


def form_of(player: Player, checkpoint: bytes) -> Any:
    """Names, shapes and dtypes of a checkpoint's arrays, and its step."""
    read = Checkpoint.unpack(player.member.store.get(checkpoint))
    return forms(read.params), forms(read.moments), read.step
