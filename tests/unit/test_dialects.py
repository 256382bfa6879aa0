"""Several dialects in one swarm: a run for each, and a file by which a peer finds its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from p2pasr import LocalError
from p2pasr.cli import app
from p2pasr.dialects import new_runs, run_of, write_runs
from p2pasr.protocol.manifest import read_manifest
from p2pasr.speech.prepare import Settings, prepare

from .conftest import MODEL, recordings, run_config


@pytest.fixture(scope="module")
def two_dialects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of three recordings each of Cantonese and Hakka."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "shards"))
    codes = ["yue", "hak", "yue", "hak", "yue", "hak"]
    rows = [{"audio": f"{n}.wav", "text": "我想喝水", "dialect": code} for n, code in enumerate(codes)]
    prepare(recordings(source, rows), out, Settings(MODEL, clips_per_shard=2))
    return out


def test_each_dialect_is_a_run_of_its_own_shards(two_dialects: Path) -> None:
    manifests = new_runs(run_config(), two_dialects)

    assert {code: {shard.dialect for shard in m.shards} for code, m in manifests.items()} == {
        "hak": {"hak"},
        "yue": {"yue"},
    }
    assert [manifest.name for manifest in manifests.values()] == ["quick (hak)", "quick (yue)"]
    assert len({manifest.run_id for manifest in manifests.values()}) == 2


def test_one_dialect_needs_no_runs_of_its_own(shards: Path) -> None:
    with pytest.raises(LocalError, match=r"holds one dialect only \(yue\); leave --per-dialect out$"):
        new_runs(run_config(), shards)


def test_a_peer_finds_the_manifest_of_its_dialect_and_elsewhere_its_run_id(two_dialects: Path, tmp_path: Path) -> None:
    manifests = new_runs(run_config(), two_dialects)
    files = write_runs(tmp_path / "home.dialects.json", manifests)

    assert run_of(tmp_path / "home.dialects.json", "yue") == str(files["yue"]) == str(tmp_path / "home.yue.run.json")
    assert read_manifest(files["yue"]) == manifests["yue"]
    (tmp_path / "away").mkdir()
    shared = tmp_path / "away" / "shared.json"
    shared.write_bytes((tmp_path / "home.dialects.json").read_bytes())
    assert run_of(shared, "hak") == manifests["hak"].run_id.hex()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("{", "does not name runs of dialects"),
        ("{}", "does not name runs of dialects"),
        ("[]", "does not name runs of dialects"),
        (json.dumps({"format": "p2pasr-dialects/1", "dialects": {"yue": 3}}), "does not name runs of dialects"),
        (json.dumps({"format": "p2pasr-dialects/1", "dialects": {}}), "has no dialect 'yue'"),
    ],
)
def test_a_file_that_names_no_runs_is_one_sentence(content: str | None, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")

    with pytest.raises(LocalError, match=sentence):
        run_of(path, "yue")


def test_the_command_writes_them(two_dialects: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("name: x\ntask: {kind: lora, config: {model: p2pasr/demo-base}}\nrounds: {rounds: 1}\n")
    result = CliRunner().invoke(app, ["run", "new", str(config), "--shards", str(two_dialects), "--per-dialect"])

    assert result.exception is None, result.output
    assert f"--run {tmp_path / 'run.dialects.json'} --dialect CODE" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.yaml",
        "run.dialects.json",
        "run.yue.run.json",
        "run.hak.run.json",
    }
