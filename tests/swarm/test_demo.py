"""The demo in miniature: fewer recordings and steps, the same processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from p2pasr.demo import swarm
from p2pasr.protocol.manifest import read_manifest
from p2pasr.runs import build_task
from p2pasr.speech.prepare import read_index
from tests.attacks.stranger import verdict


def make_small(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(swarm, "interrupt_on_terminate", lambda: None)
    for name, value in {"TRAIN_CLIPS": 96, "TRAIN_PEOPLE": 6, "TEST_CLIPS": 12, "TEST_PEOPLE": 3}.items():
        monkeypatch.setattr(swarm, name, value)
    config = yaml.safe_load(swarm.CONFIG.read_text(encoding="utf-8"))
    config["task"]["config"]["learning_rate"] = 0.005  # YAML 1.1 reads 5e-3 as text
    config["rounds"] |= {"segments": 2, "steps_per_segment": 4, "samples_per_step": 4, "shards_per_peer": 1}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.setattr(swarm, "CONFIG", path)


def test_the_demo_bans_its_cheat_and_reports_the_proof(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch, folder)
    out = folder / "out"
    assert swarm.run_demo(out, peers=2, rounds=8) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["cheater_banned"] is True
    assert report["state_digests_equal"] is True
    assert report["peers"] == 2
    assert 2 <= report["rounds_to_ban"] <= 7
    run = read_manifest(out / "run.json")
    files = {bytes.fromhex(shard.digest): out / "shards" / shard.file for shard in read_index(out / "shards").shards}
    assert "trained again, ends elsewhere" in verdict(
        run, build_task(run), files, Path(report["evidence"]).read_bytes()
    )
