"""A run's life outside training: made, opened, scored, exported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2pasr import runs
from p2pasr.errors import LocalError
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal
from p2pasr.protocol.manifest import RunManifest, parse_manifest, read_manifest
from p2pasr.protocol.state import State, params_digest
from p2pasr.speech.prepare import Settings, prepare, read_index
from p2pasr.speech.pretrained import weights_digest
from p2pasr.speech.shards import read_shard
from p2pasr.tasks import Task

from .conftest import LORA, MODEL, plan, recordings, run_config, start_of


@pytest.fixture(scope="module")
def task(manifest: RunManifest) -> Task:
    """The run's task."""
    return runs.build_task(manifest)


@pytest.fixture(scope="module")
def states(manifest: RunManifest, task: Task, shard_files: Sequence[Path]) -> tuple[State, State]:
    """The states before rounds 0 and 1."""
    first = runs.initial_state(manifest, task)
    end, _ = task.segment(start_of(task), shard_files, plan(steps=6, samples=8))
    return first, replace(first, round=1, parent=first.digest, params=end.params, credit={"12D3KooW": 21.5})


@pytest.fixture
def home(tmp_path: Path, manifest: RunManifest, states: tuple[State, State]) -> Path:
    """A peer's state folder after the run's first round."""
    folder = runs.run_folder(tmp_path / "home", manifest.run_id)
    journal, store = Journal(folder), BlobStore(folder / "blobs")
    store.put("manifest", manifest.canonical())
    for state in states:
        journal.hold(state.round, store.put("state", state.blob))
    journal.close()
    return tmp_path / "home"


@pytest.fixture
def run_file(tmp_path: Path, manifest: RunManifest) -> str:
    """The manifest as a person shares it."""
    manifest.write(tmp_path / "quick.run.json")
    return str(tmp_path / "quick.run.json")


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return params_digest(dict(one)) == params_digest(dict(other))


# --- making -------------------------------------------------------------------------------------


def test_a_new_run_lists_the_shards_and_pins_the_task(manifest: RunManifest, shards: Path) -> None:
    index = read_index(shards)

    assert [s.digest for s in manifest.shards] == [s.digest for s in index.shards]
    assert [s.seconds for s in manifest.shards] == [s.seconds for s in index.shards]
    assert {s.dialect for s in manifest.shards} == {"yue"}
    assert manifest.task.config["weights"] == weights_digest(MODEL)
    assert manifest.task.config["rank"] == LORA["rank"]
    assert manifest.task.config["beta2"] == 0.999


def test_a_new_runs_initial_state_is_what_its_task_computes(manifest: RunManifest, task: Task) -> None:
    params = task.initial_params()
    state = runs.initial_state(manifest, task)

    assert manifest.initial == params_digest(params).hex()
    assert manifest.parameters == sum(value.size for value in params.values())
    assert (state.round, state.run, state.work) == (0, manifest.run_id, 0.0)
    assert same(state.params, params)


def test_the_same_configuration_and_shards_make_the_same_run(manifest: RunManifest, shards: Path) -> None:
    assert runs.new_run(run_config(), shards).run_id == manifest.run_id


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"name": "other"},
        {"rounds": {"rounds": 4}},
        {"task": {"kind": "lora", "config": {**LORA, "rank": 2}}},
    ],
    ids=str,
)
def test_whatever_differs_makes_another_run(manifest: RunManifest, shards: Path, change: dict[str, Any]) -> None:
    assert runs.new_run(run_config(**change), shards).run_id != manifest.run_id


def test_a_manifest_is_the_same_run_through_its_file_and_over_the_wire(manifest: RunManifest, run_file: str) -> None:
    assert read_manifest(Path(run_file)) == manifest
    assert read_manifest(Path(run_file)).run_id == manifest.run_id
    assert parse_manifest(manifest.canonical()).run_id == manifest.run_id


def test_a_manifest_from_a_peer_holds_the_same_values_as_the_one_from_a_file(manifest: RunManifest) -> None:
    # A task may check its configuration strictly, and must find lists in it everywhere.
    assert parse_manifest(manifest.canonical()).task.config == manifest.task.config


def test_a_base_in_a_local_folder_makes_the_same_run(manifest: RunManifest, shards: Path, steady_base: Path) -> None:
    assert runs.new_run(run_config(), shards, str(steady_base)).run_id == manifest.run_id


@pytest.fixture
def own_shards(corpus: Path, tmp_path: Path) -> Path:
    """Shards that a test may damage."""
    prepare(corpus, tmp_path / "own", Settings(MODEL, dialect="yue", clips_per_shard=8))
    return tmp_path / "own"


def test_no_run_is_made_of_a_corrupt_shard(own_shards: Path) -> None:
    path = own_shards / read_index(own_shards).shards[1].file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(LocalError, match=rf"^shard {path} is corrupt: its digest is "):
        runs.new_run(run_config(), own_shards)


def test_no_run_is_made_of_a_missing_shard(own_shards: Path) -> None:
    path = own_shards / read_index(own_shards).shards[2].file
    path.unlink()

    with pytest.raises(LocalError, match=rf"^shard {path} is missing"):
        runs.new_run(run_config(), own_shards)


def test_no_run_is_made_without_shards(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="holds no shards"):
        runs.new_run(run_config(), tmp_path)


def test_no_run_is_made_of_shards_for_another_window(own_shards: Path) -> None:
    config = run_config(task={"kind": "lora", "config": {**LORA, "window_seconds": 2.0}})

    # Every peer of such a run would fail at its first segment.
    with pytest.raises(LocalError, match="prepared for other features"):
        runs.new_run(config, own_shards)


def test_no_run_is_made_of_the_same_shard_twice(tmp_path: Path) -> None:
    rows = [{"audio": f"{n}.wav", "text": "水"} for n in range(2)]
    recordings(tmp_path / "in", rows)
    (tmp_path / "in" / "1.wav").write_bytes((tmp_path / "in" / "0.wav").read_bytes())
    prepare(tmp_path / "in", tmp_path / "out", Settings(MODEL, clips_per_shard=1))

    with pytest.raises(LocalError, match=r"^the run: shards are listed twice; leave recordings that repeat others out"):
        runs.new_run(run_config(), tmp_path / "out")


def test_no_run_is_made_for_a_dialect_whose_name_has_no_end(tmp_path: Path) -> None:
    recordings(tmp_path / "in", [{"audio": "0.wav", "text": "水", "dialect": "en-" + "x" * 80}])
    prepare(tmp_path / "in", tmp_path / "out", Settings(MODEL))

    with pytest.raises(LocalError, match=r"^the run: shards\.0\.dialect: string should have at most 64 characters"):
        runs.new_run(run_config(), tmp_path / "out")


class Nothing:
    """A task of somebody's own that trains three numbers."""

    hardware_class = "none"

    def initial_params(self) -> dict[str, np.ndarray]:
        return {"numbers": np.arange(3, dtype=np.float32)}


def test_a_program_can_bring_its_own_task(shards: Path) -> None:
    config = run_config(task={"kind": "nothing", "config": {"its": "own"}})

    made = runs.new_run(config, shards, task=Nothing())

    assert made.parameters == 3
    assert made.initial == params_digest(Nothing().initial_params()).hex()
    assert made.task.config == {"its": "own"}
    assert runs.initial_state(made, Nothing()).params["numbers"].tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(LocalError, match=r"task\.kind 'nothing' is not one of lora"):
        runs.new_run(config, shards)


def test_another_machine_that_computes_another_start_says_so(manifest: RunManifest, task: Task) -> None:
    other = manifest.model_copy(update={"initial": "00" * 32})

    with pytest.raises(
        LocalError, match=r"this machine computes other initial parameters .*; install the p2pasr version"
    ):
        runs.initial_state(other, task)


# --- opening ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["file", "run id", "RUN ID"])
def test_a_run_is_opened_by_its_file_or_its_id(
    home: Path, run_file: str, manifest: RunManifest, states: tuple[State, State], by: str
) -> None:
    names = {"file": run_file, "run id": manifest.run_id.hex(), "RUN ID": manifest.run_id.hex().upper()}

    saved = runs.open_run(names[by], home)

    assert saved.manifest.run_id == manifest.run_id
    assert saved.held == {state.round: state.digest for state in states}


def test_a_run_is_looked_for_in_the_default_folder(
    home: Path, run_file: str, manifest: RunManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(home.parent))
    assert runs.default_home() == home.parent / ".p2pasr"
    home.rename(home.parent / ".p2pasr")

    assert runs.open_run(run_file).manifest == manifest


def test_the_newest_state_is_given_unless_a_round_is_named(
    home: Path, run_file: str, task: Task, states: tuple[State, State]
) -> None:
    saved = runs.open_run(run_file, home)

    for number, state in ((None, states[1]), (0, states[0]), (1, states[1])):
        found = saved.state(number, task.initial_params())
        assert found.digest == state.digest
        assert same(found.params, state.params)


@pytest.mark.parametrize("number", [2, -1, 99])
def test_a_round_that_is_not_kept_is_an_error_that_says_which_are(
    home: Path, run_file: str, task: Task, number: int
) -> None:
    with pytest.raises(LocalError, match=rf"^the state before round {number} is not kept here; rounds 0 to 1 are$"):
        runs.open_run(run_file, home).state(number, task.initial_params())


def test_a_state_whose_file_is_gone_is_not_held(home: Path, run_file: str, states: tuple[State, State]) -> None:
    folder = runs.run_folder(home, states[0].run)
    BlobStore(folder / "blobs").discard(states[0].digest)

    assert runs.open_run(run_file, home).held == {1: states[1].digest}


def test_a_damaged_state_is_an_error(home: Path, run_file: str, task: Task, states: tuple[State, State]) -> None:
    path = BlobStore(runs.run_folder(home, states[0].run) / "blobs").find(states[1].digest)
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(LocalError, match="was damaged on disk"):
        runs.open_run(run_file, home).state(1, task.initial_params())


def test_a_folder_without_a_state_is_an_error(
    home: Path, run_file: str, task: Task, states: tuple[State, State]
) -> None:
    (runs.run_folder(home, states[0].run) / "states.json").unlink()

    with pytest.raises(LocalError, match="holds no state of this run yet"):
        runs.open_run(run_file, home).state(None, task.initial_params())


@pytest.mark.parametrize("by", ["file", "run id"])
def test_a_run_that_this_machine_knows_nothing_of_is_an_error(
    tmp_path: Path, run_file: str, manifest: RunManifest, by: str
) -> None:
    name = run_file if by == "file" else manifest.run_id.hex()

    with pytest.raises(LocalError, match=r"knows nothing of run [0-9a-f]{16}; name a peer's folder with --state-dir"):
        runs.open_run(name, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_id_whose_manifest_is_gone_is_an_error(home: Path, manifest: RunManifest) -> None:
    BlobStore(runs.run_folder(home, manifest.run_id) / "blobs").discard(manifest.run_id)

    with pytest.raises(LocalError, match=r"the blob [0-9a-f]{12}… is not in"):
        runs.open_run(manifest.run_id.hex(), home)


@pytest.mark.parametrize("name", ["", "run.json", "ab" * 31, "ab" * 33, "zz" * 32, "ab" * 200])
def test_a_name_that_is_neither_file_nor_run_id_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(LocalError, match=r"is neither a manifest file nor a run id \(64 hex digits\)"):
        runs.open_run(name, tmp_path)


# --- scoring and exporting ----------------------------------------------------------------------


def test_scoring_a_run_is_scoring_its_task(
    manifest: RunManifest, task: Task, states: tuple[State, State], shards: Path, shard_files: Sequence[Path]
) -> None:
    base = runs.evaluate(manifest, None, shards)
    trained = runs.evaluate(manifest, states[1].params, shards, task=task)

    assert base == task.evaluate(None, shard_files)
    assert base["clips"] == sum(len(read_shard(path).clips) for path in shard_files)
    assert trained == task.evaluate(states[1].params, shard_files)


def test_scoring_a_folder_without_shards_is_an_error(manifest: RunManifest, task: Task, tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="holds no shards"):
        runs.evaluate(manifest, None, tmp_path, task=task)


def test_an_export_says_which_run_and_state_it_is(
    manifest: RunManifest, states: tuple[State, State], tmp_path: Path
) -> None:
    runs.export(manifest, states[1], tmp_path / "deep" / "adapter")

    notes = json.loads((tmp_path / "deep" / "adapter" / "p2pasr.json").read_text(encoding="utf-8"))
    assert notes["run"] == manifest.run_id.hex()
    assert notes["state"] == states[1].digest.hex()
    assert (notes["name"], notes["round"], notes["dialects"]) == ("quick", 1, ["yue"])
    assert notes["seconds_merged"] == 21.5
    assert notes["base_weights"] == weights_digest(MODEL)
    assert (tmp_path / "deep" / "adapter" / "adapter_model.safetensors").is_file()


def test_shards_are_listed_in_the_order_of_their_index(shards: Path, shard_files: Sequence[Path]) -> None:
    assert runs.shard_paths(shards) == [shards / s.file for s in read_index(shards).shards] == list(shard_files)
