"""The same work by three peers and by one: how far apart their error rates end.

Every seed speaks another corpus and draws other adapters and batches. The one peer trains as many
segments and shards a round as the three together.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from p2pasr import runs
from p2pasr.demo.fleet import fleet_of
from p2pasr.demo.swarm import demo_config, prepare_speech
from p2pasr.errors import TransportError
from p2pasr.protocol.manifest import RunConfig

PEERS = 3
RUN_SECONDS = 1200.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table, as `--json` prints it."""

    seed: int
    peers: int
    samples: int
    cer_before_percent: float
    cer_after_percent: float
    seconds: float


def measure(seeds: list[int]) -> list[Row]:
    """Train and score each seed with three peers and with one."""
    rows: list[Row] = []
    for seed in seeds:
        with tempfile.TemporaryDirectory(prefix="p2pasr-bench-") as name:
            folder = Path(name)
            prepare_speech(folder, seed)
            together = demo_config(PEERS, seed=seed)
            for peers, config in ((PEERS, together), (1, _alone(together))):
                row = _train(folder, peers, config)
                rows.append(row)
                print(f"seed {seed}, {peers} peers: CER {row.cer_after_percent:.2f} %", file=sys.stderr, flush=True)
    return rows


def _alone(config: RunConfig) -> RunConfig:
    rounds = config.rounds
    alike = {
        "min_peers": 1,
        "segments": PEERS * rounds.segments,
        "shards_per_peer": PEERS * rounds.shards_per_peer,
        "max_seconds": PEERS * rounds.max_seconds,
    }
    return config.model_copy(update={"rounds": rounds.model_copy(update=alike)})


def _train(folder: Path, peers: int, config: RunConfig) -> Row:
    manifest = runs.new_run(config, folder / "shards")
    home = folder / f"{peers}-peers"
    home.mkdir()
    run = home / "run.json"
    manifest.write(run)
    started = time.monotonic()
    with fleet_of(home, run, peers, folder / "shards") as (_, processes):
        for process in processes:
            if process.wait(RUN_SECONDS) != 0:
                raise TransportError(f"{process.name} failed: {process.last_words()}")
    seconds = time.monotonic() - started
    task = runs.build_task(manifest)
    state = runs.open_run(str(run), home / "peer-1").state(None, task.initial_params())
    held_out = runs.shard_paths(folder / "held-out")
    before, after = task.evaluate(None, held_out), task.evaluate(state.params, held_out)
    rounds = manifest.rounds
    samples = peers * rounds.rounds * rounds.segments * rounds.steps_per_segment * rounds.samples_per_step
    return Row(manifest.seed, peers, samples, 100 * before["cer"], 100 * after["cer"], seconds)
