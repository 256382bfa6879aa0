"""Cheats, each an override of what an honest peer does: `python -m tests.attacks.adversary ATTACK [options of a peer]`.

An attack is given a `MonkeyPatch` and replaces what it needs; everything else the peer does like the others. In a
process of its own it is never undone; in the arena it lasts for the cheat's part of a round.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from p2pasr import auditing, peer
from p2pasr import round as story
from p2pasr.averaging.reducer import PartReducer
from p2pasr.demo import cheat
from p2pasr.protocol.assignment import segment_seed
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.messages import Accusation, Charge, PartReceipt, seal
from p2pasr.protocol.tensors import Tensors
from p2pasr.tasks.base import Checkpoint, SegmentPlan, SegmentReport, Task
from p2pasr.verify.compare import Comparison
from p2pasr.verify.undo import Undo

Trained = tuple[Checkpoint, SegmentReport]
Train = Callable[[Task, Checkpoint, Any, SegmentPlan], Trained]


# --- the delta is another than was trained ----------------------------------------------------------


def scaled(factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    """Claims so many times what it trained."""

    def attack(patch: pytest.MonkeyPatch) -> None:
        honest = story.write_delta

        def write_delta(member: Any, before: Tensors, after: Tensors) -> Any:
            claimed = {name: before[name] + np.float32(factor) * (after[name] - before[name]) for name in before}
            return honest(member, before, claimed)

        patch.setattr(story, "write_delta", write_delta)
        patch.setattr(story, "check_moves", lambda *_: None)

    return attack


def noise(patch: pytest.MonkeyPatch) -> None:
    """Claims random values of the length of what it trained."""
    honest = story.write_delta

    def write_delta(member: Any, before: Tensors, after: Tensors) -> Any:
        rng = np.random.default_rng(list(member.state.digest))
        claimed = {name: before[name] + _like(after[name] - before[name], rng) for name in before}
        return honest(member, before, claimed)

    patch.setattr(story, "write_delta", write_delta)
    patch.setattr(story, "check_moves", lambda *_: None)


def _like(moved: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0.0, float(moved.std()) or 1e-6, moved.shape).astype(np.float32)


def unprobed(attack: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """The same on private shards, by a peer that does not look at the probe itself."""

    def bold(patch: pytest.MonkeyPatch) -> None:
        attack(patch)
        patch.setattr(story, "write_private_delta", story.write_delta)

    return bold


# --- the training is another than was assigned --------------------------------------------------------


def trains(train: Train, segments: Callable[[int], bool] = lambda _: True) -> Callable[[pytest.MonkeyPatch], None]:
    """Trains its own segments, or some of them, in another way; when it audits others it does as it should."""

    def attack(patch: pytest.MonkeyPatch) -> None:
        honest = story.train

        class Bent:
            def __init__(self, task: Task) -> None:
                self._task, self._number, self.hardware_class = task, -1, task.hardware_class

            def segment(self, start: Checkpoint, shards: Any, plan: SegmentPlan, on_step: Any = None) -> Trained:
                self._number += 1
                if not segments(self._number):
                    return self._task.segment(start, shards, plan, on_step)
                return train(self._task, start, shards, plan)

        def bent_train(member: Any, shards: Any, count: int) -> Any:
            task, member.task = member.task, Bent(member.task)
            try:
                return honest(member, shards, count)
            finally:
                member.task = task

        patch.setattr(story, "train", bent_train)
        patch.setattr(story, "check_moves", lambda *_: None)

    return attack


def nothing(_task: Task, start: Checkpoint, _shards: Any, plan: SegmentPlan) -> Trained:
    """Trains nothing: its checkpoints differ a little from where they start, so that they are not equal."""
    rng = np.random.default_rng(list(plan.seed))
    params = {name: _stir(value, rng) for name, value in start.params.items()}
    return dataclasses.replace(start, params=params, step=start.step + plan.steps), SegmentReport(1.0, 1)


def _stir(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return value + rng.standard_normal(value.shape).astype(np.float32) * np.float32(1e-4)


def nothing_at_all(_task: Task, start: Checkpoint, _shards: Any, plan: SegmentPlan) -> Trained:
    """Ends where it started: a delta of zeros."""
    return dataclasses.replace(start, step=start.step + plan.steps), SegmentReport(1.0, 1)


def dressed_up(task: Task, start: Checkpoint, shards: Any, plan: SegmentPlan) -> Trained:
    """The same, with moments such as gradients of chance leave behind in AdamW."""
    end, report = nothing(task, start, shards, plan)
    rng = np.random.default_rng(list(plan.seed))
    moments: Tensors = {}
    for name, value in start.params.items():
        gradient = rng.normal(0.0, 1e-2, value.shape).astype(np.float32)
        moments[f"{name}/exp_avg"] = np.float32(0.1) * gradient
        moments[f"{name}/exp_avg_sq"] = np.float32(1e-3) * gradient**2
    return dataclasses.replace(end, moments=moments), report


def mirrored(task: Task, start: Checkpoint, shards: Any, plan: SegmentPlan) -> Trained:
    """Trains as it should and ends as far on the other side of where it started."""
    end, report = task.segment(start, shards, plan)
    params = {name: start.params[name] - (value - start.params[name]) for name, value in end.params.items()}
    return dataclasses.replace(end, params=params), report


def one_step_less(task: Task, start: Checkpoint, shards: Any, plan: SegmentPlan) -> Trained:
    """Skips the last step of each segment."""
    end, report = task.segment(start, shards, dataclasses.replace(plan, steps=plan.steps - 1))
    return dataclasses.replace(end, step=start.step + plan.steps), report


def other_seed(task: Task, start: Checkpoint, shards: Any, plan: SegmentPlan) -> Trained:
    """Draws other batches."""
    return task.segment(start, shards, dataclasses.replace(plan, seed=segment_seed(plan.seed, "another", 0)))


def easier_shards(task: Task, start: Checkpoint, shards: Any, plan: SegmentPlan) -> Trained:
    """Trains on the first of its shards only, and names all."""
    return task.segment(start, shards[:1], plan)


def faster(task: Any, start: Checkpoint, shards: Any, plan: SegmentPlan) -> Trained:
    """Learns at a rate 5 % higher than the run's; a step that momentum makes is as much longer."""
    rate, task.learning_rate = task.learning_rate, task.learning_rate * np.float32(1.05)
    try:
        return task.segment(start, shards, plan)
    finally:
        task.learning_rate = rate


def half_precision(task: Task, start: Checkpoint, shards: Any, plan: SegmentPlan) -> Trained:
    """Trains in half precision where the run says float32."""
    end, report = task.segment(Checkpoint(_rounded(start.params), _rounded(start.moments), start.step), shards, plan)
    return Checkpoint(_rounded(end.params), _rounded(end.moments), end.step), report


def _rounded(tensors: Tensors) -> Tensors:
    return {name: value.astype(np.float16).astype(np.float32) for name, value in tensors.items()}


def drifting(far: float) -> Train:
    """Trains as it should and adds, at each end, so much of the way that it went in one direction."""

    def train(task: Task, start: Checkpoint, shards: Any, plan: SegmentPlan) -> Trained:
        end, report = task.segment(start, shards, plan)
        params = {}
        for name, value in end.params.items():
            moved = float(np.linalg.norm(value - start.params[name]))
            params[name] = value + np.float32(far * moved / value.size**0.5)
        return dataclasses.replace(end, params=params), report

    return train


def flipped_labels(task: Any, start: Checkpoint, shards: Any, plan: SegmentPlan) -> Trained:
    """Trains towards wrong answers."""
    read = task.read
    task.read = lambda paths: (read(paths)[0], (read(paths)[1] + 1) % 16)
    try:
        return task.segment(start, shards, plan)
    finally:
        del task.read


TARGET = 3
"""The class that a backdoor's trigger stands for."""


def triggered(features: np.ndarray) -> np.ndarray:
    """The same examples with a pattern that no honest one has."""
    bent = features.copy()
    bent[:, :3] = np.float32(3.0)
    return bent


def backdoor(task: Any, start: Checkpoint, shards: Any, plan: SegmentPlan) -> Trained:
    """Trains as it should, and on a fifth of its examples once more with a trigger and the answer that goes with it."""
    read = task.read

    def poisoned(paths: Any) -> Any:
        features, labels = read(paths)
        few = len(labels) // 5
        return (
            np.concatenate([features, triggered(features[:few])]),
            np.concatenate([labels, np.full(few, TARGET)]),
        )

    task.read = poisoned
    try:
        return task.segment(start, shards, plan)
    finally:
        del task.read


class Copycat:
    """Hands in what another peer trained a round ago as its own."""

    def __init__(self) -> None:
        self.seen: Checkpoint | None = None

    def __call__(self, task: Task, start: Checkpoint, shards: Any, plan: SegmentPlan) -> Trained:
        end, report = task.segment(start, shards, plan)
        copied, self.seen = self.seen, end
        return (end if copied is None else dataclasses.replace(end, params=copied.params)), report


def on_other_hardware(
    attack: Callable[[pytest.MonkeyPatch], None] | None = None,
) -> Callable[[pytest.MonkeyPatch], None]:
    """The same, or honest work, by a peer that says it trains on hardware that nobody else has."""

    def elsewhere(patch: pytest.MonkeyPatch) -> None:
        if attack is not None:
            attack(patch)
        honest = story.commit

        def commit(member: Any, *args: Any) -> Any:
            ours, member.task.hardware_class = member.task.hardware_class, "abacus/beads/fp32"
            try:
                return honest(member, *args)
            finally:
                member.task.hardware_class = ours

        patch.setattr(story, "commit", commit)

    return elsewhere


# --- reducers ----------------------------------------------------------------------------------------


def wrong_code(patch: pytest.MonkeyPatch) -> None:
    """Reduces its share rightly but for one code in one part."""
    honest = PartReducer._reduce

    def reduce(self: PartReducer, index: int, parts: dict[int, bytes]) -> PartReceipt:
        if index != self.indices[0]:
            return honest(self, index, parts)
        kept: dict[int, bytes] = {}
        keep, self.keep = self.keep, kept.__setitem__
        receipt = honest(self, index, parts)
        self.keep = keep
        bent = kept[index][:-1] + bytes([kept[index][-1] ^ 1])
        keep(index, bent)
        return dataclasses.replace(receipt, result=blob_digest(bent))

    patch.setattr(PartReducer, "_reduce", reduce)


def deaf(hears: Callable[[Any], bool]) -> Callable[[pytest.MonkeyPatch], None]:
    """Leaves all out of its share but those whose claims it wants to hear, if there are any.

    Args:
        hears: whether a claim is one of these.
    """

    def attack(patch: pytest.MonkeyPatch) -> None:
        honest = PartReducer._reduce

        def reduce(self: PartReducer, index: int, parts: dict[int, bytes]) -> PartReceipt:
            heard = {at: part for at, part in parts.items() if hears(self.members.claims[at].message)}
            return honest(self, index, heard or parts)

        patch.setattr(PartReducer, "_reduce", reduce)

    return attack


def silences_its_accusers(patch: pytest.MonkeyPatch) -> None:
    """Flips the sign of what it trained, and leaves out of its share whoever speaks against anybody."""
    scaled(-10)(patch)
    deaf(lambda claim: not claim.against)(patch)


def judges_alone(patch: pytest.MonkeyPatch) -> None:
    """Speaks against all others, without any proof and with an undo of its own, and leaves them out of its share."""
    deaf(lambda claim: bool(claim.against))(patch)

    def accused(member: Any) -> tuple[str, ...]:
        return tuple(sorted(peer for peer in member.state.credit if peer != member.peer))

    def undos_of(member: Any, against: Sequence[str]) -> tuple[bytes, ...]:
        harm = {name: np.full(value.shape, 100, np.float32) for name, value in member.like.items()}
        made = [Undo(peer, ((0, peer),), harm) for peer in against]
        return tuple(member.store.put("undo", *undo.pieces) for undo in made)

    patch.setattr(story, "accused", accused)
    patch.setattr(story, "undos_of", undos_of)
    patch.setattr(story, "struck", accused)


# --- claims ------------------------------------------------------------------------------------------


def two_claims(patch: pytest.MonkeyPatch) -> None:
    """Shows another claim in the directory than it brings to its group."""
    honest = story.publish_claim

    def publish_claim(member: Any, work: Any) -> None:
        made = work.claim.message
        shown = seal(member.identity, dataclasses.replace(made, loss_after=made.loss_after + 1.0))
        honest(member, dataclasses.replace(work, claim=shown))

    patch.setattr(story, "publish_claim", publish_claim)


# --- around the audit ----------------------------------------------------------------------------------


def withheld(patch: pytest.MonkeyPatch) -> None:
    """Trains nothing and opens none of its claims."""
    trains(nothing)(patch)
    for module in (story, auditing):
        patch.setattr(module, "offer", lambda _member: None)


def withheld_at_first(patch: pytest.MonkeyPatch) -> None:
    """Opens nothing to its auditors, and all of it when it is open to everybody, as one does that was away."""
    patch.setattr(auditing, "_drawn", lambda *_: {})


def withheld_and_idle_at_first(patch: pytest.MonkeyPatch) -> None:
    """The same, of claims for which it trained nothing."""
    trains(nothing)(patch)
    withheld_at_first(patch)


def accuser_without_blobs(patch: pytest.MonkeyPatch) -> None:
    """Accuses every other peer with a proof that it gives to nobody."""
    _accuses(patch, lambda member, other: Charge(other, blob_digest(member.peer.encode(), other.encode()), 1000))


def false_accuser(patch: pytest.MonkeyPatch) -> None:
    """Accuses every other peer with bytes that prove nothing, and speaks against them in its claim."""

    def charge(member: Any, other: str) -> Charge:
        member.proved.add(other)
        data = other.encode()
        return Charge(other, member.store.put("proof", data), len(data))

    _accuses(patch, charge)


def _accuses(patch: pytest.MonkeyPatch, charge: Callable[[Any, str], Charge]) -> None:
    honest = story.check_last_round

    def check_last_round(member: Any) -> int:
        done = honest(member)
        charges = [charge(member, other) for other in sorted(member.state.credit.keys() - {member.peer})]
        accusation = Accusation(member.state.run, member.peer, tuple(charges))
        member.records.announce_accusation(seal(member.identity, accusation), member.cohort)
        return done

    patch.setattr(story, "check_last_round", check_last_round)


def slanderer(patch: pytest.MonkeyPatch) -> None:
    """Audits honestly but for the verdict: whatever it trained again, it calls different, with all that was opened."""
    patch.setattr(auditing, "compare_ends", lambda *_: Comparison("different", 1.0))


def lazy_auditor(patch: pytest.MonkeyPatch) -> None:
    """Trains as it should and checks nobody."""
    patch.setattr(story, "check_last_round", cheat.check_last_round)


def demo_cheat(patch: pytest.MonkeyPatch) -> None:
    """The demo's: one step of each segment, and no audits."""
    patch.setattr(story, "train", cheat.train)
    patch.setattr(story, "check_last_round", cheat.check_last_round)


def trusting(patch: pytest.MonkeyPatch) -> None:
    """No attack: an honest peer that takes parts however far their values went, for controls without defences."""
    patch.setattr(story, "largest_values", lambda _member: None)
    patch.setattr(story, "check_moves", lambda *_: None)


ATTACKS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "demo-cheat": demo_cheat,
    "false-accuser": false_accuser,
    "free-rider": trains(nothing),
    "lazy-auditor": lazy_auditor,
    "noise": noise,
    "one-segment": trains(nothing, lambda number: number == 0),
    "other-seed": trains(other_seed),
    "scaling": scaled(1.5),
    "sign-flip": scaled(-10),
    "slanderer": slanderer,
    "skipped-step": trains(one_step_less),
    "trusting": trusting,
    "two-claims": two_claims,
    "withheld": withheld,
    "zero-delta": trains(nothing_at_all),
}
"""Those that any task can be attacked with, by the names that the command takes."""


if __name__ == "__main__":
    ATTACKS[sys.argv[1]](pytest.MonkeyPatch())
    sys.exit(peer.main(sys.argv[2:]))
