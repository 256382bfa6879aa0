"""A small run and the processes that train in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from p2pasr.demo.fleet import Fleet, Process
from p2pasr.protocol.manifest import RunConfig, RunManifest
from p2pasr.runs import new_run
from p2pasr.speech.prepare import Settings, prepare
from p2pasr.speech.synthetic import write_corpus

MODEL = "p2pasr/demo-base"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("swarm")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six shards of synthetic Cantonese."""
    corpus, out = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("shards")
    write_corpus(corpus, dialect="yue", split="train", clips=48, people=6)
    prepare(corpus, out, Settings(MODEL, dialect="yue", clips_per_shard=8))
    return out


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder with a short path, as sockets need."""
    path = Path(tempfile.mkdtemp(prefix="swarm-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def make_run(shards: Path, folder: Path) -> Callable[..., Path]:
    """Write the manifest of a quick run; keyword arguments change its `rounds` section."""

    def make(name: str = "run", verify: Mapping[str, Any] | None = None, **rounds: Any) -> Path:
        config = RunConfig.model_validate(
            {
                "name": name,
                "task": {"kind": "lora", "config": {"model": MODEL, "rank": 4, "warmup_steps": 2}},
                "rounds": {
                    "rounds": 3,
                    "segments": 1,
                    "steps_per_segment": 2,
                    "samples_per_step": 4,
                    "shards_per_peer": 1,
                    "max_seconds": 30.0,
                    "grace_seconds": 15.0,
                    **rounds,
                },
                "verify": dict(verify or {}),
            }
        )
        manifest = new_run(config, shards)
        path = folder / f"{name}.run.json"
        manifest.write(path)
        return path

    return make


@pytest.fixture
def fleet(folder: Path) -> Iterator[Fleet]:
    """Processes that end with the test, with a folder of their own for temporary files."""
    with Fleet(folder) as started:
        yield started
    for process in started.processes:  # shown when the test has failed
        print(f"--- {process.name} ended with code {process.exit_code}")
        print("\n".join(str(event["message"]) for event in process.events[-12:]))


def final_states(*processes: Process) -> set[str]:
    """The digests of the states with which processes left the run."""
    return {str(process.wait_for("done")["state"]) for process in processes}


def manifest_of(path: Path) -> RunManifest:
    """The manifest in a file."""
    return RunManifest.model_validate_json(path.read_bytes())
