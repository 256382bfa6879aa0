"""How long cheats last: simulated with the draws and the ledger of real rounds, and by real peers.

The simulation has no training: a cheat's segments are wrong where the attack says so, an honest auditor that trains
one of them again finds it, everybody hears of the proof before the next claims, and cheats neither audit nor speak
against anybody. Beside what came out stands what follows from `detection_probability`.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, mean, quantiles
from typing import Final

import base58

from benchmarks.swarm import RUN_SECONDS
from p2pasr import runs
from p2pasr.demo.fleet import Event, Fleet, Process
from p2pasr.demo.swarm import demo_config, prepare_speech
from p2pasr.errors import TransportError
from p2pasr.protocol.audits import detection_probability, segments_to_rerun
from p2pasr.protocol.encoding import blob_digest, keyed_bytes
from p2pasr.protocol.manifest import VerifySection
from p2pasr.protocol.messages import Claim, Signed
from p2pasr.protocol.state import condemn, genesis
from p2pasr.speech.prepare import Settings, prepare
from p2pasr.speech.synthetic import write_corpus
from p2pasr.tasks.base import Checkpoint, SegmentPlan
from p2pasr.verify.evidence import Judge, compare_ends

SEGMENTS: Final = 4
RATES: Final = (1 / 16, 1 / 4, 1.0)
MOST_ROUNDS: Final = 600

CAPABILITIES: Final = ("default", "avx2", "avx512")
"""What torch can be told to take of a CPU's instructions, by `ATEN_CPU_CAPABILITY`."""

BASE: Final = "p2pasr/demo-base"
CLIPS: Final = 96

Triple = tuple[bytes, bytes, bytes]
"""Packed checkpoints: the start of a segment, its end as claimed, its end when trained again."""


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
    """One line of the table, as `--json` prints it: rounds until all cheats are banned.

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
    return [_row(scene, [play(scene, seed) for seed in range(seeds)]) for scene in SCENES]


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
            for duty in segments_to_rerun(section, after, claims, auditor):
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


def _peer(seed: int, number: int) -> str:
    key = keyed_bytes(b"peer" + seed.to_bytes(4, "big") + number.to_bytes(4, "big"), 32)
    return base58.b58encode(bytes.fromhex("002408011220") + key).decode()


def _claim(peer: str, number: int, state: bytes, against: set[str] | tuple[str, ...]) -> Signed[Claim]:
    nothing = bytes(32)
    claim = Claim(
        run=nothing,
        peer=peer,
        round=number,
        state=state,
        shards=(nothing,),
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
    )
    return Signed(claim, b"")


# --- honest audits --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HonestRow:
    """What came of training honest segments again.

    Attributes:
        audits: how many.
        largest_error: relative, of any of them.
        different: how many would have been called proof of cheating; each would ban somebody honest.
    """

    task: str
    hardware: str
    audits: int
    same: int
    close: int
    unclear: int
    different: int
    largest_error: float


def honest(audits: int, segments: int) -> list[HonestRow]:
    """Train honest segments again: many tiny ones here, and some of the demo's with other instructions and threads.

    Args:
        audits: tiny segments.
        segments: of the demo's model, for each kind of hardware.
    """
    with tempfile.TemporaryDirectory(prefix="p2pasr-bench-") as name:
        folder = Path(name)
        write_corpus(folder / "corpus", dialect="yue", split="train", clips=CLIPS, people=6)
        prepare(folder / "corpus", folder / "shards", Settings(BASE, dialect="yue", clips_per_shard=CLIPS // 4))
        manifest = runs.new_run(demo_config(3), folder / "shards")
        judge = Judge(manifest, runs.build_task(manifest).initial_params())
        rows = [_tally(judge, "tiny classifier", "this machine", _tiny_segments(audits))]
        kinds = [(capability, threads) for capability in CAPABILITIES for threads in (1, 2)]
        ends = {kind: _train_elsewhere(folder, *kind, segments) for kind in kinds}
        claimed = kinds[-1]
        start = Checkpoint(judge.like).pack()
        for kind in kinds[:-1]:
            title = f"{_title(kind)} for {_title(claimed)}"
            pairs = zip(ends[claimed], ends[kind], strict=True)
            triples = [(start, ours.read_bytes(), theirs.read_bytes()) for ours, theirs in pairs]
            rows.append(_tally(judge, "the demo's LoRA", title, triples))
    return rows


def _title(kind: tuple[str, int]) -> str:
    return f"{kind[0]}, {kind[1]} thread{'s' if kind[1] > 1 else ''}"


def _tiny_segments(audits: int) -> Iterator[Triple]:
    from tests.attacks.tiny import TinyTask

    task, auditor = TinyTask(), TinyTask()
    with tempfile.TemporaryDirectory(prefix="p2pasr-bench-") as name:
        shard = Path(name) / "shard"
        shard.write_bytes(bytes(32))
        now = Checkpoint(task.initial_params())
        for number in range(audits):
            plan = SegmentPlan(blob_digest(number.to_bytes(4, "big")), 8, 16, 0, 1000)
            start = now.pack()
            end, _ = task.segment(now, [shard], plan)
            rerun, _ = auditor.segment(Checkpoint.unpack(start), [shard], plan)
            yield start, end.pack(), rerun.pack()
            now = end if number % SEGMENTS else Checkpoint(task.initial_params())


def _tally(judge: Judge, task: str, hardware: str, triples: Iterable[Triple]) -> HonestRow:
    tally: Counter[str] = Counter()
    largest = 0.0
    before = genesis(judge.manifest, judge.like)
    for start, claimed, rerun in triples:
        found = compare_ends(before, start, claimed, rerun, judge)
        tally[found.finding] += 1
        largest = max(largest, found.error)
    counts = (tally[kind] for kind in ("same", "close", "unclear", "different"))
    return HonestRow(task, hardware, tally.total(), *counts, largest)


def _train_elsewhere(folder: Path, capability: str, threads: int, segments: int) -> list[Path]:
    """The packed ends of some segments, trained by a process that uses these instructions and threads."""
    out = folder / f"{capability}-{threads}"
    out.mkdir()
    arguments = [str(out), str(folder / "shards"), str(threads), str(segments)]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-m", "benchmarks.attacks", *arguments], env=environment, check=True)
    return [out / str(number) for number in range(segments)]


def train_segments(out: Path, shards: Path, threads: int, segments: int) -> None:
    """Train some segments of the demo's model, each by another seed and on other shards, and write where they end."""
    import torch

    torch.set_num_threads(threads)
    manifest = runs.new_run(demo_config(3), shards)
    task = runs.build_task(manifest)
    start = Checkpoint(task.initial_params())
    files = runs.shard_paths(shards)
    rounds = manifest.rounds
    for number in range(segments):
        plan = SegmentPlan.of(rounds, 2, blob_digest(number.to_bytes(4, "big")), "somebody", 0)
        end, _ = task.segment(start, files[number % len(files) :][:2], plan)
        (out / str(number)).write_bytes(end.pack())


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


if __name__ == "__main__":
    train_segments(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
