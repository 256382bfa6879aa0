"""A peer whose training takes time and nothing else, for measuring what the protocol adds to it.

`python -m benchmarks.idle` takes the options of `python -m p2pasr.peer`; the run's `task.config` says how many values
are trained and how long a step takes. Steps sleep, so that many peers fit on few cores.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from p2pasr import Checkpoint, RunConfig, RunManifest, SegmentPlan, SegmentReport, Settings, new_run, prepare, runs
from p2pasr.peer import main
from p2pasr.speech.synthetic import write_corpus
from p2pasr.tasks.base import OnProgress, OnStep

COMMAND: Final = (sys.executable, "-m", "benchmarks.idle")
SHARDS: Final = 12


class IdleTask:
    """Sleeps for every step, then moves the parameters by noise drawn from the segment's seed.

    Args:
        values: number of trained values.
        seconds_a_step: how long a step takes.
    """

    hardware_class = "numpy"

    def __init__(self, values: int, seconds_a_step: float) -> None:
        self._values = values
        self._seconds_a_step = seconds_a_step

    def initial_params(self) -> dict[str, np.ndarray]:
        """Zeros."""
        return {"values": np.zeros(self._values, dtype=np.float32)}

    def segment(
        self, start: Checkpoint, shards: Sequence[Path], plan: SegmentPlan, on_step: OnStep | None = None
    ) -> tuple[Checkpoint, SegmentReport]:
        """Pass the time of a segment."""
        for done in range(1, plan.steps + 1):
            time.sleep(self._seconds_a_step)
            if on_step is not None:
                on_step(done, 1.0)
        noise = np.random.default_rng(list(plan.seed)).standard_normal(self._values, dtype=np.float32)
        params = {"values": start.params["values"] + np.float32(1e-3) * noise}
        return Checkpoint(params, {}, start.step + plan.steps), SegmentReport(1.0, plan.steps * plan.samples_per_step)

    def evaluate(self, params: Any, shards: Sequence[Path], on_progress: OnProgress | None = None) -> Mapping[str, Any]:
        """The root mean square of the parameters."""
        return {"rms": 0.0 if params is None else float(np.sqrt(np.mean(params["values"] ** 2)))}

    def export(self, params: Any, out: Path, about: Mapping[str, Any]) -> None:
        """Write the parameters as a numpy file."""
        np.save(out / "values.npy", params["values"])


def new_idle_run(folder: Path, values: int, seconds_a_step: float, codec: str, rounds: Mapping[str, Any]) -> Path:
    """Prepare shards in `folder/shards` and write the run's manifest.

    Args:
        codec: how deltas are encoded.
        rounds: the `rounds` section.

    Returns:
        The manifest's path.
    """
    write_corpus(folder / "corpus", dialect="yue", split="train", clips=SHARDS, people=2)
    prepare(folder / "corpus", folder / "shards", Settings("p2pasr/demo-base", dialect="yue", clips_per_shard=1))
    config = RunConfig.model_validate(
        {
            "name": "idle",
            "task": {"kind": "idle", "config": {"values": values, "seconds_a_step": seconds_a_step}},
            "rounds": {"samples_per_step": 1, "shards_per_peer": 1, **rounds},
            "averaging": {"codec": codec},
        }
    )
    manifest = new_run(config, folder / "shards", task=idle_task(config))
    path = folder / "run.json"
    manifest.write(path)
    return path


def idle_task(config: RunConfig | RunManifest) -> IdleTask:
    """The task of an idle run."""
    return IdleTask(**config.task.config)


if __name__ == "__main__":
    manifest, _ = runs.read_run(sys.argv[sys.argv.index("--run") + 1])
    assert manifest is not None, "an idle peer needs the run's manifest file"
    sys.exit(main(task=idle_task(manifest)))
