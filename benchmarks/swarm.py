"""What a swarm costs: time until the first step, share of time spent training, bytes a round.

Real peers and a bootstrap node on loopback train the demo's run on this machine, so they share its
cores: the share of time is what the protocol leaves to training, the rest is finding, averaging and
waiting for each other.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from p2pasr import runs
from p2pasr.demo.fleet import Process, fleet_of
from p2pasr.demo.swarm import demo_config, prepare_speech
from p2pasr.errors import TransportError

RUN_SECONDS = 1200.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table, as `--json` prints it."""

    peers: int
    seconds_to_first_step: float
    seconds_a_round: float
    training_percent: float
    auditing_percent: float
    megabytes_sent_a_round: float
    adapter_megabytes: float


def measure(peers: list[int], rounds: int) -> list[Row]:
    """Run a swarm of each size."""
    with tempfile.TemporaryDirectory(prefix="p2pasr-bench-") as name:
        prepare_speech(Path(name))
        return [_measure(Path(name), count, rounds) for count in peers]


def _measure(folder: Path, peers: int, rounds: int) -> Row:
    config = demo_config(peers, rounds)
    config = config.model_copy(update={"rounds": config.rounds.model_copy(update={"min_peers": peers})})
    manifest = runs.new_run(config, folder / "shards")
    home = folder / f"{peers}-peers"
    home.mkdir()
    run = home / "run.json"
    manifest.write(run)
    with fleet_of(home, run, peers, folder / "shards") as (_, processes):
        for process in processes:
            if process.wait(RUN_SECONDS) != 0:
                raise TransportError(f"{process.name} failed: {process.last_words()}")
    return Row(
        peers=peers,
        seconds_to_first_step=mean(p.wait_for("step", step="train")["time"] - p.started for p in processes),
        seconds_a_round=mean(later_seconds(p) / (rounds - 1) for p in processes),
        training_percent=100 * mean(training_seconds(p) / later_seconds(p) for p in processes),
        auditing_percent=100 * mean(auditing_seconds(p) / later_seconds(p) for p in processes),
        megabytes_sent_a_round=mean(bytes_sent(p) / (rounds - 1) for p in processes) / 1e6,
        adapter_megabytes=2 * manifest.parameters / 1e6,
    )


def later_seconds(process: Process) -> float:
    """Seconds from the end of the first round, in which shards are fetched, to the end of the last."""
    rounds = process.seen("round")
    return float(rounds[-1]["time"] - rounds[0]["time"])


def training_seconds(process: Process) -> float:
    """Seconds of these that it trained."""
    return float(sum(event["seconds"] for event in process.seen("segment") if event["round"] > 0))


def auditing_seconds(process: Process) -> float:
    """Seconds of these that it trained segments of others again."""
    return float(sum(event["seconds"] for event in process.seen("audit", what="segment")))


def bytes_sent(process: Process) -> float:
    """Bytes that it sent in them."""
    rounds = process.seen("round")
    return float(rounds[-1]["bytes_sent"] - rounds[0]["bytes_sent"])
