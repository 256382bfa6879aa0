"""How long cheats last: simulated with the draws and the ledger of real rounds, and by real peers.

The simulation has no training: a cheat's segments are wrong where the attack says so, an honest auditor that trains
one of them again finds it, everybody hears of the proof before the next claims, and cheats neither audit nor speak
against anybody. Beside what came out stands what follows from `detection_probability`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist, mean, quantiles
from typing import Final

import base58

from benchmarks.swarm import RUN_SECONDS
from p2pasr import calibration, runs
from p2pasr.demo.fleet import PEER, Event, Fleet, Process
from p2pasr.demo.swarm import demo_config, prepare_speech
from p2pasr.errors import TransportError
from p2pasr.protocol.audits import Drawing, detection_probability
from p2pasr.protocol.encoding import blob_digest, keyed_bytes
from p2pasr.protocol.manifest import RunManifest, VerifySection
from p2pasr.protocol.messages import NO_TICKET, NO_UNDO, Claim, Signed
from p2pasr.protocol.state import State, condemn, genesis
from p2pasr.protocol.strikes import Strike, audit_rate, strike, suspended
from p2pasr.protocol.tensors import Tensors
from p2pasr.protocol.tiers import EVERY
from p2pasr.speech.prepare import Settings, prepare
from p2pasr.speech.synthetic import write_corpus
from p2pasr.tasks.base import Checkpoint, SegmentPlan, Task
from p2pasr.verify.compare import Comparison, compare
from p2pasr.verify.evidence import checkpoint_groups

SEGMENTS: Final = 4
RATES: Final = (1 / 16, 1 / 4, 1.0)
MOST_ROUNDS: Final = 600
WITHHOLDERS_SWARM: Final = 8

CAPABILITIES: Final = ("default", "avx2", "avx512")
"""What torch can be told to take of a CPU's instructions, by `ATEN_CPU_CAPABILITY`."""

BASE: Final = "p2pasr/demo-base"
CLIPS: Final = 96
AT_ONCE: Final = 16
"""Segments that each class trains before they are compared."""


# --- simulated ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scene:
    """A swarm with cheats in it.

    Attributes:
        cheated: segments of each claim, of four, that its cheat did not train.
        rate: `verify.rate`.
    """

    peers: int
    cheats: int
    cheated: int
    rate: float


SCENES: Final = (
    *(Scene(8, 1, cheated, rate) for cheated in (SEGMENTS, 1) for rate in RATES),
    Scene(16, 5, SEGMENTS, 1 / 4),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table, as `--json` prints it: rounds until all cheats are banned, or suspended.

    Attributes:
        found_percent: of the cheats' claims, how many were found in their round.
        predicted_percent: the same by `detection_probability`.
        agrees: whether the first lies in the binomial interval of 95 % around the second.
        audits_percent: what audits took of the training.
        honest_banned: in all seeds.
    """

    attack: str
    rate: float
    median: float
    predicted: int
    p95: float
    predicted_p95: int
    found_percent: float
    predicted_percent: float
    agrees: bool
    honest_banned: int
    audits_percent: float


@dataclass(slots=True)
class Tally:
    """What one simulated run came to.

    Attributes:
        rounds: until every cheat was banned.
        claims, found: claims of cheats that were audited by the draw, and those that were found out; of claims whose
            every possible auditor is honest these are independent trials.
        expected: sum of the predicted probabilities of these claims.
        audits, trained: segments.
    """

    rounds: int
    claims: int
    found: int
    expected: float
    audits: int
    trained: int
    honest_banned: int


def simulate(seeds: int) -> list[Row]:
    """Every scene, over so many seeds."""
    banned = [_row(scene, [play(scene, seed) for seed in range(seeds)]) for scene in SCENES]
    return banned + [_withholding_row(rate, [withhold(rate, seed) for seed in range(seeds)]) for rate in RATES]


def play(scene: Scene, seed: int) -> Tally:
    """One run, until no cheat is left in it."""
    peers = [_peer(seed, number) for number in range(scene.peers)]
    cheats = set(peers[: scene.cheats])
    section = VerifySection(rate=scene.rate)
    bans: dict[str, int] = {}
    proved: set[str] = set()
    tally = Tally(0, 0, 0, 0.0, 0, 0, 0)
    while not cheats <= bans.keys():
        if tally.rounds == MOST_ROUNDS:
            raise TransportError(f"a cheat was not banned in {MOST_ROUNDS} rounds of seed {seed}")
        state = blob_digest(b"state", seed.to_bytes(4, "big"), tally.rounds.to_bytes(4, "big"))
        present = [peer for peer in peers if peer not in bans]
        claims = [_claim(peer, tally.rounds, state, () if peer in cheats else proved - bans.keys()) for peer in present]
        bans = condemn(bans, [claim.message for claim in claims], tally.rounds)
        after = blob_digest(b"after", state)
        found: set[str] = set()
        for auditor in present:
            if auditor in cheats:
                continue
            for duty in Drawing(section, after, claims).segments(auditor):
                tally.audits += 1
                if duty.peer in cheats and duty.item < scene.cheated:
                    found.add(duty.peer)
        at_large = [peer for peer in present if peer in cheats]
        colluding = (len(at_large) - 1) / (len(present) - 1)
        probability = detection_probability(scene.rate, SEGMENTS, scene.cheated, section.auditors, colluding)
        tally.claims += len(at_large)
        tally.found += len(found)
        tally.expected += probability * len(at_large)
        tally.trained += SEGMENTS * len(present)
        tally.rounds += 1
        proved |= found
    tally.honest_banned = len(bans.keys() - cheats)
    return tally


def withhold(rate: float, seed: int) -> Tally:
    """One run of a peer that opens nothing among seven honest ones, until it is suspended.

    Whenever one of its claims is drawn, all others name it in the second round after.
    """
    peers = [_peer(seed, number) for number in range(WITHHOLDERS_SWARM)]
    section, who = VerifySection(rate=rate), peers[0]
    strikes: dict[str, Strike] = {}
    drawn: set[int] = set()
    tally = Tally(0, 0, 0, 0.0, 0, 0, 0)
    while not suspended(strikes, tally.rounds, section):
        number = tally.rounds
        state = blob_digest(b"state", seed.to_bytes(4, "big"), number.to_bytes(4, "big"))
        named = (who,) if number - 2 in drawn else ()
        claims = [_claim(peer, number, state, (), named if peer != who else ()) for peer in peers]
        strikes = strike(strikes, [claim.message for claim in claims], number, section)
        audits = list(map(Drawing(section, blob_digest(b"after", state), claims, strikes).auditors, claims))
        tally.claims += 1
        tally.expected += audit_rate(section, strikes, who)
        tally.audits += sum(map(len, audits))
        tally.trained += SEGMENTS * len(peers)
        tally.rounds += 1
        if audits[0]:
            drawn.add(number)
            tally.found += 1
    tally.honest_banned = len(strikes.keys() - {who})
    return tally


def rounds_until_suspended(share: float, rate: float) -> int:
    """Rounds after which a peer that opens nothing is suspended in such a share of runs.

    Its second drawn claim suspends it, two rounds later; from two rounds after the first on, its rate is doubled.
    """
    doubled = min(1.0, 2 * rate)

    def within(rounds: int) -> float:
        chance = 0.0
        for first in range(rounds - 3):
            left = rounds - 3 - first
            missed = (1 - rate) * (1 - doubled) ** (left - 1)
            chance += rate * (1 - rate) ** first * (1 - missed)
        return chance

    return next(rounds for rounds in itertools.count(4) if within(rounds) >= share)


def rounds_until(share: float, probability: float, cheats: int) -> int:
    """Rounds after which all cheats are banned in such a share of runs: found one by one, banned a round later."""
    each = share ** (1 / cheats)
    return 1 + (1 if probability >= 1 else math.ceil(math.log1p(-each) / math.log1p(-probability)))


def within_interval(found: int, trials: int, probability: float, confidence: float = 0.95) -> bool:
    """Whether so many successes lie in the central interval of a binomial distribution, by its normal approximation."""
    spread = math.sqrt(trials * probability * (1 - probability))
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * spread + 0.5
    return abs(found - trials * probability) <= reach


def _row(scene: Scene, tallies: Sequence[Tally]) -> Row:
    colluding = (scene.cheats - 1) / (scene.peers - 1)
    probability = detection_probability(scene.rate, SEGMENTS, scene.cheated, 1, colluding)
    rounds = [tally.rounds for tally in tallies]
    cuts = quantiles(rounds, n=20, method="inclusive")
    claims, found = sum(tally.claims for tally in tallies), sum(tally.found for tally in tallies)
    predicted = sum(tally.expected for tally in tallies) / claims
    return Row(
        attack=f"{scene.cheats} of {scene.peers}, {scene.cheated} of {SEGMENTS} segments",
        rate=scene.rate,
        median=cuts[9],
        predicted=rounds_until(0.5, probability, scene.cheats),
        p95=cuts[18],
        predicted_p95=rounds_until(0.95, probability, scene.cheats),
        found_percent=100 * found / claims,
        predicted_percent=100 * predicted,
        agrees=within_interval(found, claims, predicted),
        honest_banned=sum(tally.honest_banned for tally in tallies),
        audits_percent=100 * sum(tally.audits for tally in tallies) / sum(tally.trained for tally in tallies),
    )


def _withholding_row(rate: float, tallies: Sequence[Tally]) -> Row:
    cuts = quantiles([tally.rounds for tally in tallies], n=20, method="inclusive")
    claims, found = sum(tally.claims for tally in tallies), sum(tally.found for tally in tallies)
    predicted = sum(tally.expected for tally in tallies) / claims
    return Row(
        attack=f"1 of {WITHHOLDERS_SWARM}, opens nothing (suspended)",
        rate=rate,
        median=cuts[9],
        predicted=rounds_until_suspended(0.5, rate),
        p95=cuts[18],
        predicted_p95=rounds_until_suspended(0.95, rate),
        found_percent=100 * found / claims,
        predicted_percent=100 * predicted,
        agrees=within_interval(found, claims, predicted),
        honest_banned=sum(tally.honest_banned for tally in tallies),
        audits_percent=100 * sum(tally.audits for tally in tallies) / sum(tally.trained for tally in tallies),
    )


def _peer(seed: int, number: int) -> str:
    key = keyed_bytes(b"peer" + seed.to_bytes(4, "big") + number.to_bytes(4, "big"), 32)
    return base58.b58encode(bytes.fromhex("002408011220") + key).decode()


def _claim(
    peer: str, number: int, state: bytes, against: Iterable[str], strikes: tuple[str, ...] = ()
) -> Signed[Claim]:
    nothing = bytes(32)
    claim = Claim(
        run=nothing,
        peer=peer,
        ticket=NO_TICKET,
        round=number,
        state=state,
        shards=(nothing,),
        tier=EVERY,
        seconds=0.0,
        segments=SEGMENTS,
        steps=SEGMENTS,
        samples=SEGMENTS,
        trace_root=nothing,
        delta_root=nothing,
        delta_norm=1.0,
        loss_before=1.0,
        loss_after=1.0,
        hardware="simulated",
        against=tuple(sorted(against)),
        strikes=strikes,
        undo=(NO_UNDO,) * len(against),
    )
    return Signed(claim, b"")


# --- honest audits --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HonestRow:
    """What came of training honest segments again in another class of hardware.

    Attributes:
        claimed: the class of their author.
        again: the class of their auditor.
        largest_error: relative, of any of them.
        honest_banned: findings that are proof of cheating, `different`.
        seconds: that the auditor trained.
    """

    claimed: str
    again: str
    audits: int
    same: int
    close: int
    unclear: int
    different: int
    largest_error: float
    honest_banned: int
    seconds: float


Trained = tuple[list[bytes], float]
"""The packed ends of some segments, and the seconds that training them took."""


def honest(audits: int) -> list[HonestRow]:
    """Train honest segments of the demo's LoRA again in every class of hardware that this machine can play.

    Each class trains each segment from the same start, and of each pair one is taken for the author and the other for
    the auditor.

    Args:
        audits: how many at least, over all pairs.
    """
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that spin take the cores that the other classes train on
    best = torch.backends.cpu.get_cpu_capability().lower()
    with tempfile.TemporaryDirectory(prefix="p2pasr-bench-") as name, contextlib.ExitStack() as opened:
        manifest, files = _small_run(Path(name))
        task = runs.build_task(manifest)
        own = f"{best} 1t"
        trainers = {
            hardware.name if hardware.name != own else f"{own} again": opened.enter_context(
                calibration.trainer(manifest, hardware, None)
            )
            for hardware in _classes(best)
        }
        pairs = list(itertools.combinations([own, *trainers], 2))
        found: dict[tuple[str, str], list[Comparison]] = {pair: [] for pair in pairs}
        seconds = dict.fromkeys(trainers, 0.0)
        first = genesis(manifest, task.initial_params())
        states = [first, _later(first, task, files, manifest)]
        segments = calibration.reference_segments(manifest, task, states, files, math.ceil(audits / len(pairs)))
        pool = opened.enter_context(ThreadPoolExecutor(len(trainers)))
        while batch := list(itertools.islice(segments, AT_ONCE)):
            ends = {own: [segment.end for segment in batch]}
            trained = pool.map(_train_all, trainers.values(), itertools.repeat(batch))
            for hardware_name, (made, spent) in zip(trainers, trained, strict=True):
                ends[hardware_name] = made
                seconds[hardware_name] += spent
            starts = _read([segment.begin for segment in batch])
            read = {name: _read(packed) for name, packed in ends.items()}
            for one, other in pairs:
                found[one, other] += map(compare, starts, read[one], read[other], itertools.repeat(manifest.verify))
    return [_honest_row(*pair, comparisons, seconds[pair[1]]) for pair, comparisons in found.items()]


def _small_run(folder: Path) -> tuple[RunManifest, list[Path]]:
    """The demo's run with segments that take a fraction of a second, and its shards."""
    write_corpus(folder / "corpus", dialect="yue", split="train", clips=CLIPS, people=6)
    prepare(folder / "corpus", folder / "shards", Settings(BASE, dialect="yue", clips_per_shard=CLIPS // 8))
    config = demo_config(3)
    rounds = config.rounds.model_copy(update={"steps_per_segment": 4, "samples_per_step": 2, "shards_per_peer": 1})
    manifest = runs.new_run(config.model_copy(update={"rounds": rounds}), folder / "shards")
    return manifest, runs.shard_paths(folder / "shards")


def _classes(best: str) -> list[calibration.HardwareClass]:
    """Every set of instructions up to the CPU's best, on one thread and on two."""
    known = CAPABILITIES[: CAPABILITIES.index(best) + 1]
    kinds = itertools.product(known, (1, 2))
    return [calibration.HardwareClass(f"{name} {threads}t", "cpu", threads, name) for name, threads in kinds]


def _train_all(train: Callable[[calibration.Segment], bytes], batch: Sequence[calibration.Segment]) -> Trained:
    began = time.perf_counter()
    ends = [train(segment) for segment in batch]
    return ends, time.perf_counter() - began


def _later(first: State, task: Task, files: Sequence[Path], manifest: RunManifest) -> State:
    """A state in which the adapters have moved: that after forty steps of one peer."""
    plan = SegmentPlan.of(manifest.rounds, 0, first.digest, "somebody", 0)
    end, _ = task.segment(Checkpoint(first.params), files, replace(plan, steps=40))
    return replace(first, round=4, parent=first.digest, params=end.params)


def _read(checkpoints: Iterable[bytes]) -> list[Tensors]:
    return [checkpoint_groups(packed)[0] for packed in checkpoints]


def _honest_row(claimed: str, again: str, comparisons: Sequence[Comparison], seconds: float) -> HonestRow:
    tally = Counter(found.finding for found in comparisons)
    counts = (tally[kind] for kind in ("same", "close", "unclear", "different"))
    largest = max(found.error for found in comparisons)
    return HonestRow(claimed, again, tally.total(), *counts, largest, tally["different"], seconds)


# --- real peers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RealRow:
    """A run of real peers with one cheat.

    Attributes:
        rounds_to_ban: rounds that the cheat was in.
        honest_banned: peers that did not cheat and were banned.
        audits_percent: seconds in which honest peers trained others' segments again, beside all in which they trained.
    """

    attack: str
    peers: int
    rate: float
    rounds_to_ban: int
    honest_banned: int
    audits_percent: float


def real(attacks: Sequence[str], peers: int, rate: float) -> list[RealRow]:
    """Run each attack of `tests.attacks.adversary` among honest peers.

    Raises:
        TransportError: an honest peer failed, or the cheat was not banned.
    """
    with tempfile.TemporaryDirectory(prefix="p2pasr-bench-") as name:
        folder = Path(name)
        prepare_speech(folder)
        return [_real(folder, attack, peers, rate) for attack in attacks]


HOSTILE: Final = ("sign-flip", "free-rider")
"""Who joins six honest peers in :func:`harm`: one sends ten times its delta with the other sign, one trains nothing."""

HONEST: Final = 6
HARM_ROUNDS: Final = 8


@dataclass(frozen=True, slots=True)
class HarmRow:
    """What cheats do to a run's model.

    Attributes:
        hostile: how many of the peers cheat, as :data:`HOSTILE` says.
        defended: with audits, clipping and the bound on moves, as by default; without, nobody checks anything.
        banned: of those that cheat; `honest_banned`: of the others.
        cer_before, cer_after: on held-out speakers, of the first and the last state.
    """

    honest: int
    hostile: int
    defended: bool
    rounds: int
    banned: int
    honest_banned: int
    cer_before: float
    cer_after: float
    seconds: float


def harm() -> list[HarmRow]:
    """The same run without cheats, with them, and with them where nobody checks anything.

    Raises:
        TransportError: an honest peer failed.
    """
    with tempfile.TemporaryDirectory(prefix="p2pasr-bench-") as name:
        folder = Path(name)
        prepare_speech(folder)
        return [
            _harm(folder, hostile, defended) for hostile, defended in (((), True), (HOSTILE, True), (HOSTILE, False))
        ]


def _harm(folder: Path, hostile: Sequence[str], defended: bool) -> HarmRow:
    began = time.monotonic()
    config = demo_config(HONEST)
    rounds = {"rounds": HARM_ROUNDS, "segments": 2, "steps_per_segment": 6, "shards_per_peer": 2, "min_peers": HONEST}
    verify = {"rate": 1.0} if defended else {"rate": 0.0, "links": 0.0, "parts": 0}
    averaging = config.averaging
    if not defended:
        averaging = averaging.model_copy(update={"rule": averaging.rule.model_copy(update={"clip_norm": None})})
    update = {
        "rounds": config.rounds.model_copy(update=rounds),
        "verify": config.verify.model_copy(update=verify),
        "averaging": averaging,
    }
    manifest = runs.new_run(config.model_copy(update=update), folder / "shards")
    home = folder / f"{len(hostile)}-{defended}"
    home.mkdir()
    manifest.write(home / "run.json")
    data = ("--seed-data", str(folder / "shards"))
    adversary = (sys.executable, "-m", "tests.attacks.adversary")
    with Fleet(home) as fleet:
        entry = [fleet.bootstrap().maddr]
        command = PEER if defended else (*adversary, "trusting")
        good = [
            fleet.peer(f"peer-{number}", home / "run.json", *data, initial_peers=entry, command=command)
            for number in range(1, HONEST + 1)
        ]
        bad = [
            fleet.peer(attack, home / "run.json", *data, initial_peers=entry, command=(*adversary, attack))
            for attack in hostile
        ]
        for process in good:
            if process.wait(2 * RUN_SECONDS) != 0:
                raise TransportError(f"{process.name} failed: {process.last_words()}")
        cheats = {str(process.wait_for("ready")["peer"]) for process in bad}
    banned = {peer for process in good for event in process.seen("round") for peer in event["banned"]}
    saved = runs.open_run(str(home / "run.json"), home / "peer-1")
    task = runs.build_task(manifest)
    last = saved.state(None, task.initial_params())
    held_out = runs.shard_paths(folder / "held-out")
    before, after = (task.evaluate(params, held_out)["cer"] for params in (None, last.params))
    return HarmRow(
        honest=HONEST,
        hostile=len(hostile),
        defended=defended,
        rounds=last.round,
        banned=len(banned & cheats),
        honest_banned=len(banned - cheats),
        cer_before=before,
        cer_after=after,
        seconds=time.monotonic() - began,
    )


def _real(folder: Path, attack: str, peers: int, rate: float) -> RealRow:
    config = demo_config(peers)
    short = config.rounds.model_copy(
        update={"steps_per_segment": 4, "samples_per_step": 4, "shards_per_peer": 1, "min_peers": peers - 1}
    )
    verify = config.verify.model_copy(update={"rate": rate})
    manifest = runs.new_run(config.model_copy(update={"rounds": short, "verify": verify}), folder / "shards")
    home = folder / attack
    home.mkdir()
    run = home / "run.json"
    manifest.write(run)
    data = ("--seed-data", str(folder / "shards"))
    with Fleet(home) as fleet:
        entry = [fleet.bootstrap().maddr]
        good = [fleet.peer(f"peer-{number}", run, *data, initial_peers=entry) for number in range(1, peers)]
        command = (sys.executable, "-m", "tests.attacks.adversary", attack)
        cheat = fleet.peer("cheat", run, *data, initial_peers=entry, command=command)
        for process in good:
            if process.wait(RUN_SECONDS) != 0:
                raise TransportError(f"{process.name} failed: {process.last_words()}")
    who = cheat.wait_for("ready")["peer"]
    ended = [event for process in good for event in process.seen("round")]
    bans = {peer: event["round"] for event in ended for peer in event["banned"]}
    if who not in bans:
        raise TransportError(f"the peer that cheated by {attack} was not banned in {manifest.rounds.rounds} rounds")
    first = min(event["round"] for event in ended if who in event["peers"])
    share = mean(audit_seconds(process.events) / _training_seconds(process) for process in good)
    return RealRow(attack, peers, rate, bans[who] - first + 1, len(bans.keys() - {who}), 100 * share)


def audit_seconds(events: Iterable[Event]) -> float:
    """Seconds in which a peer trained segments of others again: from each such step to what it found."""
    total, began = 0.0, None
    for event in events:
        if event["event"] == "step":
            began = event["time"] if "training segment" in event["message"] else None
        elif event["event"] == "audit" and event["what"] == "segment" and began is not None:
            total += event["time"] - began
            began = None
    return total


def _training_seconds(process: Process) -> float:
    return audit_seconds(process.events) + float(sum(event["seconds"] for event in process.seen("segment")))
