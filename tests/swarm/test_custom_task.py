"""A program's own task, trained by a real peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from p2pasr import Checkpoint, Peer, PeerOptions, RunConfig, SegmentPlan, SegmentReport, Task, new_run
from p2pasr.speech.shards import read_shard


class MeanMel:
    """Learns the mean log-mel of the clips, one value a band: the smallest thing that can be trained."""

    hardware_class = "numpy"

    def initial_params(self) -> dict[str, np.ndarray]:
        return {"mean": np.zeros(80, dtype=np.float32)}

    def segment(
        self, start: Checkpoint, shards: Sequence[Path], plan: SegmentPlan, on_step: Any = None
    ) -> tuple[Checkpoint, SegmentReport]:
        mean = start.params["mean"]
        target = self._target(shards)
        for _ in range(plan.steps):
            mean = mean + np.float32(0.1) * (target - mean)
        loss = float(np.abs(target - mean).mean())
        return Checkpoint({"mean": mean}, {}, start.step + plan.steps), SegmentReport(loss, plan.steps)

    def evaluate(self, params: Any, shards: Sequence[Path], on_progress: Any = None) -> Mapping[str, Any]:
        mean = self.initial_params()["mean"] if params is None else params["mean"]
        return {"distance": float(np.abs(self._target(shards) - mean).mean())}

    def export(self, params: Any, out: Path, about: Mapping[str, Any]) -> None:
        np.save(out / "mean.npy", params["mean"])

    def _target(self, shards: Sequence[Path]) -> np.ndarray:
        mels = [clip.mel.astype(np.float32) for shard in shards for clip in read_shard(shard).clips]
        return np.concatenate(mels, axis=1).mean(axis=1, dtype=np.float32)


def test_a_peer_trains_a_task_of_ones_own(shards: Path, folder: Path) -> None:
    task = MeanMel()
    assert isinstance(task, Task)
    config = RunConfig.model_validate(
        {
            "name": "mean",
            "task": {"kind": "mean-mel"},
            "rounds": {"rounds": 4, "segments": 2, "shards_per_peer": 3},
            "averaging": {"rule": {"kind": "centered-clip"}, "outer": {"kind": "nesterov", "momentum": 0.1}},
        }
    )
    manifest = new_run(config, shards, task=task)
    options = PeerOptions(state_dir=folder, seed_data=shards, host_maddrs=("/ip4/127.0.0.1/tcp/0",))
    paths = sorted(shards.glob("*.safetensors"))
    for rounds in ([0, 1], [2, 3]):  # twice in one process: the second goes on where the first left
        options = PeerOptions(state_dir=folder, seed_data=shards, host_maddrs=("/ip4/127.0.0.1/tcp/0",), max_rounds=2)
        with Peer(manifest, options, task=task) as peer:
            assert list(peer.rounds()) == rounds
            state = peer.state
        assert state.reference.keys() == state.params.keys(), "the next round starts from this one's average"
    assert task.evaluate(state.params, paths)["distance"] < 0.2 * task.evaluate(None, paths)["distance"]
