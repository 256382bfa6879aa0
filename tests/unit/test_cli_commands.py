"""The console script: what it prints when all is well, and the one sentence when it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile

from p2pasr import __version__, runs
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal
from p2pasr.protocol.manifest import RunManifest, read_config, read_manifest
from p2pasr.speech.audio import SAMPLE_RATE
from p2pasr.speech.prepare import read_index

from .conftest import MODEL, Command, Result, plan, recordings, start_of, tone


def failed(result: Result, *parts: object) -> None:
    """It ended with one sentence on standard error that holds all of these."""
    assert result.code == 1
    assert "Traceback" not in result.err
    sentence = next(line for line in result.err.splitlines() if line.startswith("p2pasr: "))
    assert result.err.rstrip().endswith(sentence)
    for part in parts:
        assert str(part) in sentence


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, manifest: RunManifest, shard_files: Sequence[Path]) -> Path:
    """A peer's state folder after the run's first round."""
    home = tmp_path_factory.mktemp("home")
    task = runs.build_task(manifest)
    first = runs.initial_state(manifest, task)
    end, _ = task.segment(start_of(task), shard_files, plan(steps=6, samples=8))
    folder = runs.run_folder(home, manifest.run_id)
    journal, store = Journal(folder), BlobStore(folder / "blobs")
    store.put("manifest", manifest.canonical())
    for state in (first, replace(first, round=1, parent=first.digest, params=end.params)):
        journal.hold(state.round, store.put("state", state.blob))
    journal.close()
    return home


@pytest.fixture
def run_file(tmp_path: Path, manifest: RunManifest) -> Path:
    """The run's manifest."""
    manifest.write(tmp_path / "quick.run.json")
    return tmp_path / "quick.run.json"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration as a person writes it."""
    path = tmp_path / "quick.yaml"
    path.write_text(
        "name: quick\n"
        "task:\n"
        "  kind: lora\n"
        f"  config: {{model: {MODEL}, rank: 4, warmup_steps: 0, learning_rate: 1e-3}}\n"
        "rounds: {rounds: 3}\n",
        encoding="utf-8",
    )
    return path


# --- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "",
        "data",
        "data prepare",
        "run",
        "run new",
        "eval",
        "export",
        "demo",
        "demo run",
        "demo all",
        "demo corpus",
        "demo make-base",
    ],
)
def test_every_command_explains_itself(p2pasr: Command, command: str) -> None:
    result = p2pasr(*command.split(), "--help")

    assert result.code == 0
    assert f"{f'p2pasr {command}'.strip()} [OPTIONS]" in result.out


def test_the_version_is_told(p2pasr: Command) -> None:
    result = p2pasr("--version")

    assert (result.code, result.out) == (0, f"p2pasr {__version__}\n")


@pytest.mark.parametrize("command", ["", "data", "distill", "run", "demo", "verify"])
def test_a_list_of_commands_says_whole_sentences(p2pasr: Command, command: str) -> None:
    assert "..." not in p2pasr(*command.split(), "--help").out.split("Commands:")[1]


@pytest.mark.parametrize("command", ["fly", "data prepare", "run new a.yaml", "eval a.json", "demo corpus --clips 0"])
def test_wrong_usage_ends_with_code_2_and_no_traceback(p2pasr: Command, command: str) -> None:
    result = p2pasr(*command.split())

    assert result.code == 2
    assert result.err.startswith("Usage: ")
    assert "Traceback" not in result.err


def test_the_installed_script_fails_with_one_sentence(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("p2pasr")
    done = subprocess.run(
        [script, "data", "prepare", tmp_path, "--out", tmp_path / "out"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert done.stderr.strip() == f"p2pasr: {tmp_path} holds neither labels.json nor metadata.csv"
    assert done.stdout == ""


def test_an_interrupted_command_ends_with_code_130_and_no_traceback(
    p2pasr: Command, monkeypatch: pytest.MonkeyPatch, config: Path, shards: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("p2pasr.protocol.manifest.read_config", interrupt)
    result = p2pasr("run", "new", config, "--shards", shards)

    assert result.code == 130
    assert "Traceback" not in result.err


# --- data prepare -------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two good recordings and two that are refused."""
    folder = tmp_path / "in"
    folder.mkdir()
    soundfile.write(folder / "short [0.2 s].wav", tone(0.2), SAMPLE_RATE)
    rows = [
        {"audio": "1.wav", "text": "喝水"},
        {"audio": "missing.wav", "text": "喝水"},
        {"audio": "short [0.2 s].wav", "text": "喝水"},
        {"audio": "2.wav", "text": "开灯"},
    ]
    return recordings(folder, rows)


def test_prepare_writes_shards_and_lists_what_it_refused(p2pasr: Command, source: Path, tmp_path: Path) -> None:
    result = p2pasr("data", "prepare", source, "--out", tmp_path / "out", "--model", MODEL, "--dialect", "yue")

    assert result.code == 0
    assert result.out.splitlines() == [
        "refused: row 2, missing.wav: the file does not exist",
        "refused: row 3, short [0.2 s].wav: 0.20 s is shorter than 0.5 s",
        f"2 clips, 0.0 minutes of audio in 1 shards in {tmp_path / 'out'}; 2 recordings refused",
    ]
    assert [shard.dialect for shard in read_index(tmp_path / "out").shards] == ["yue"]


def test_prepare_takes_its_settings_from_the_command_line(p2pasr: Command, source: Path, tmp_path: Path) -> None:
    options = ("--model", MODEL, "--window-seconds", "1.5", "--clips-per-shard", "2", "--dialect", "hak")
    result = p2pasr("data", "prepare", source, "--out", tmp_path / "out", *options)

    index = read_index(tmp_path / "out")
    assert result.code == 0
    assert index.features.window_seconds == 1.5
    assert [(shard.clips, shard.dialect) for shard in index.shards] == [(1, "hak"), (1, "hak")]


def test_strict_prepare_stops_at_the_first_refused_recording(p2pasr: Command, source: Path, tmp_path: Path) -> None:
    result = p2pasr("data", "prepare", source, "--out", tmp_path / "out", "--model", MODEL, "--strict")

    failed(result, "p2pasr: row 2, missing.wav: the file does not exist")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("nowhere", "--out", "out"), ("nowhere holds neither labels.json nor metadata.csv",)),
        (("in", "--out", "out", "--model", "openai/nowhere"), ("'openai/nowhere' cannot be loaded", "hf download")),
        (("in", "--out", "out", "--model", MODEL, "--window-seconds", "4"), ("a window of 4 s does not fit",)),
        (("in", "--out", "out", "--model", MODEL, "--dialect", "fr"), ("no language token for dialect 'fr'",)),
        (("in", "--out", "in/1.wav", "--model", MODEL), ("in/1.wav",)),
        (("in", "--out", "in/1.wav/out", "--model", MODEL), ("in/1.wav/out",)),
        (("in/1.wav", "--out", "out", "--model", MODEL), ("in/1.wav holds neither",)),
    ],
)
def test_prepare_says_what_is_wrong_in_one_sentence(
    p2pasr: Command,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)

    failed(p2pasr("data", "prepare", *arguments), *parts)


# --- run new ------------------------------------------------------------------------------------


def test_a_new_run_prints_its_id_and_how_to_start(
    p2pasr: Command, config: Path, shards: Path, manifest: RunManifest
) -> None:
    result = p2pasr("run", "new", config, "--shards", shards)

    path = config.with_suffix(".run.json")
    made = read_manifest(path)
    assert result.code == 0
    assert result.out.splitlines()[0] == f"run id: {made.run_id.hex()}"
    assert f"manifest: {path} (3 shards, 0.01 h of audio, 14,336 trained values)" in result.out
    assert f"python -m p2pasr.peer --run {path} --seed-data {shards}" in result.out
    assert made.run_id == manifest.run_id


def test_a_new_run_is_written_where_it_is_wanted(p2pasr: Command, config: Path, shards: Path, tmp_path: Path) -> None:
    result = p2pasr("run", "new", config, "--shards", shards, "--out", tmp_path / "there.json")

    assert result.code == 0
    assert read_manifest(tmp_path / "there.json").name == "quick"
    assert not config.with_suffix(".run.json").exists()


BAD_CONFIGS = {
    "name: [": "is not YAML",
    "name: quick\n": "quick.yaml: task is missing",
    "": "quick.yaml: input should be a map of keys to values (found None)",
    "name: quick\ntask: {kind: lora}\nrounds: {rounds: 3}\n": "task.config: model is missing",
    "name: quick\ntask: {kind: lora}\nrounds: {rounds: many}\n": "rounds.rounds: input should be a valid integer",
    "name: quick\ntask: {kind: lora}\nrounds: {rounds: 3}\nround: 3\n": "round is not a known key; remove it or check",
    "name: quick\ntask: {kind: ctc}\nrounds: {rounds: 3}\n": "task.kind 'ctc' is not one of lora",
    f"name: quick\ntask: {{kind: lora, config: {{model: {MODEL}, rnk: 4}}}}\nrounds: {{rounds: 3}}\n": "rnk is not a",
    "name: quick\ntask: {kind: lora, config: {model: openai/nowhere}}\nrounds: {rounds: 3}\n": "'openai/nowhere'",
}


@pytest.mark.parametrize("content", BAD_CONFIGS)
def test_a_wrong_configuration_is_one_sentence(p2pasr: Command, config: Path, shards: Path, content: str) -> None:
    config.write_text(content, encoding="utf-8")

    failed(p2pasr("run", "new", config, "--shards", shards), BAD_CONFIGS[content])
    assert not config.with_suffix(".run.json").exists()


def test_a_configuration_in_another_encoding_is_one_sentence(p2pasr: Command, config: Path, shards: Path) -> None:
    config.write_bytes(config.read_text(encoding="utf-8").replace("quick", "粤语").encode("gb18030"))

    failed(p2pasr("run", "new", config, "--shards", shards), "quick.yaml is not YAML")


@pytest.mark.parametrize("model", ["./models/whisper", "models/whisper/small"])
def test_a_base_model_that_is_not_there_is_one_sentence(
    p2pasr: Command, config: Path, shards: Path, model: str
) -> None:
    config.write_text(config.read_text(encoding="utf-8").replace(MODEL, model), encoding="utf-8")

    failed(p2pasr("run", "new", config, "--shards", shards), model)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("nowhere.yaml", "--shards", "SHARDS"), ("the configuration nowhere.yaml cannot be read",)),
        (("quick.yaml", "--shards", "nowhere"), ("nowhere holds no shards",)),
        (("quick.yaml", "--shards", "SHARDS", "--out", "no/where.json"), ("no/where.json",)),
        (("quick.yaml", "--shards", "SHARDS", "--out", "."), (": Is a directory",)),
        (("quick.yaml", "--shards", "SHARDS", "--out", "./quick.yaml"), ("is the configuration itself",)),
        ((".", "--shards", "SHARDS"), ("the configuration . cannot be read",)),
    ],
)
def test_a_run_that_cannot_be_made_is_one_sentence(
    p2pasr: Command,
    config: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = tuple(str(shards) if argument == "SHARDS" else argument for argument in arguments)

    failed(p2pasr("run", "new", *arguments), *parts)


def test_a_folders_name_is_printed_as_it_is(p2pasr: Command, config: Path, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "[bold]x" / "[/y]"
    ready = p2pasr("data", "prepare", source, "--out", folder, "--model", MODEL)
    made = p2pasr("run", "new", config, "--shards", folder, "--out", folder / "run.json")

    assert (ready.code, made.code) == (0, 0)
    assert f"in 1 shards in {folder};" in ready.out
    assert made.out.endswith(f"--run {folder / 'run.json'} --seed-data {folder}\n")


# --- eval ---------------------------------------------------------------------------------------


def test_eval_prints_the_rates_of_the_base_and_of_the_model_as_json(
    p2pasr: Command, run_file: Path, home: Path, shards: Path, manifest: RunManifest
) -> None:
    result = p2pasr("eval", run_file, "--shards", shards, "--state-dir", home, "--json")

    scores = json.loads(result.out)
    assert (result.code, scores["round"]) == (0, 1)
    assert scores["base"] == runs.evaluate(manifest, None, shards)
    assert scores["trained"].keys() == {"cer", "wer", "clips", "exact", "empty", "invented"}
    assert scores["trained"] != scores["base"]


def test_eval_of_round_zero_scores_the_base_twice(
    p2pasr: Command, home: Path, shards: Path, manifest: RunManifest
) -> None:
    run_id = manifest.run_id.hex()
    result = p2pasr("eval", run_id, "--shards", shards, "--state-dir", home, "--json", "--round", "0")

    scores = json.loads(result.out)
    assert scores["round"] == 0
    assert scores["base"] == scores["trained"]


def test_eval_prints_a_table_for_people(p2pasr: Command, run_file: Path, home: Path, shards: Path) -> None:
    result = p2pasr("eval", run_file, "--shards", shards, "--state-dir", home)

    assert result.code == 0
    assert "quick, before round 1" in result.out
    rows = [line for line in result.out.splitlines() if "base" in line or "trained" in line]
    assert len(rows) == 2
    assert all("%" in row and "–" in row and "24" in row for row in rows)


def test_eval_prints_a_runs_name_as_it_is(p2pasr: Command, config: Path, shards: Path, tmp_path: Path) -> None:
    named = read_config(config).model_copy(update={"name": "[bold]a[/x] run"})
    manifest = runs.new_run(named, shards)
    manifest.write(tmp_path / "run.json")
    first = runs.initial_state(manifest, runs.build_task(manifest))
    folder = runs.run_folder(tmp_path, manifest.run_id)
    journal, store = Journal(folder), BlobStore(folder / "blobs")
    journal.hold(0, store.put("state", first.blob))
    journal.close()

    result = p2pasr("eval", tmp_path / "run.json", "--shards", shards, "--state-dir", tmp_path)

    assert result.code == 0
    assert "[bold]a[/x] run, before round 0" in result.out


FAILING = [
    (("nowhere.json",), ("'nowhere.json' is neither a manifest file nor a run id (64 hex digits)",)),
    (("ab" * 32,), ("knows nothing of run abababababababab; name a peer's folder with --state-dir",)),
    (("quick.yaml",), ("the manifest quick.yaml is not JSON",)),
    (("RUN", "--round", "7"), ("the state before round 7 is not kept here; rounds 0 to 1 are",)),
    (("RUN", "--state-dir", "elsewhere"), ("elsewhere knows nothing of run",)),
    (("RUN", "--model", "nowhere"), ("the model 'nowhere' cannot be loaded",)),
]


def filled(arguments: Sequence[str], run_file: Path, home: Path) -> list[str]:
    named = [str(run_file) if argument == "RUN" else argument for argument in arguments]
    return named if "--state-dir" in named else [*named, "--state-dir", str(home)]


@pytest.mark.parametrize(("arguments", "parts"), FAILING)
@pytest.mark.parametrize("command", ["eval", "export"])
def test_eval_and_export_say_what_is_wrong_in_one_sentence(
    p2pasr: Command,
    run_file: Path,
    config: Path,
    home: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    arguments: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ("--shards", shards) if command == "eval" else ("--out", tmp_path / "adapter")

    failed(p2pasr(command, *filled(arguments, run_file, home), *more), *parts)


def test_eval_without_shards_is_one_sentence(p2pasr: Command, run_file: Path, home: Path, tmp_path: Path) -> None:
    failed(p2pasr("eval", run_file, "--state-dir", home, "--shards", tmp_path), "holds no shards")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:x"])
def test_eval_on_a_device_that_is_not_there_is_one_sentence(
    p2pasr: Command, run_file: Path, home: Path, shards: Path, device: str
) -> None:
    failed(p2pasr("eval", run_file, "--state-dir", home, "--shards", shards, "--device", device), f"device {device!r}")


@pytest.mark.parametrize("key", ["format", "shards", "initial", "task"])
def test_a_manifest_that_lacks_something_is_one_sentence(
    p2pasr: Command, run_file: Path, home: Path, shards: Path, key: str
) -> None:
    content = json.loads(run_file.read_text(encoding="utf-8"))
    content = {**content, key: None}
    run_file.write_text(json.dumps(content), encoding="utf-8")

    failed(p2pasr("eval", run_file, "--state-dir", home, "--shards", shards), f"quick.run.json: {key}: ")


# --- export -------------------------------------------------------------------------------------


def test_export_writes_an_adapter_folder(p2pasr: Command, home: Path, tmp_path: Path, manifest: RunManifest) -> None:
    result = p2pasr("export", manifest.run_id.hex(), "--out", tmp_path / "adapter", "--state-dir", home)

    notes = json.loads((tmp_path / "adapter" / "p2pasr.json").read_text(encoding="utf-8"))
    state = f"(state {notes['state'][:16]})"
    assert (result.code, result.out) == (0, f"wrote the model before round 1 {state} to {tmp_path / 'adapter'}\n")
    assert (notes["run"], notes["round"]) == (manifest.run_id.hex(), 1)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_export_of_an_earlier_round_is_that_rounds(p2pasr: Command, run_file: Path, home: Path, tmp_path: Path) -> None:
    p2pasr("export", run_file, "--out", tmp_path / "new", "--state-dir", home)
    p2pasr("export", run_file, "--out", tmp_path / "old", "--state-dir", home, "--round", "0")

    new, old = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("new", "old"))
    assert new != old
    assert json.loads((tmp_path / "old" / "p2pasr.json").read_text(encoding="utf-8"))["round"] == 0


def test_export_to_a_file_is_one_sentence(p2pasr: Command, run_file: Path, home: Path) -> None:
    failed(p2pasr("export", run_file, "--out", run_file, "--state-dir", home), run_file)


# --- demo ---------------------------------------------------------------------------------------


def test_demo_corpus_writes_what_prepare_reads(p2pasr: Command, tmp_path: Path) -> None:
    made = p2pasr("demo", "corpus", "--out", tmp_path / "in", "--dialect", "hak", "--clips", "4", "--people", "2")
    ready = p2pasr("data", "prepare", tmp_path / "in", "--out", tmp_path / "out", "--model", MODEL)

    labels = tmp_path / "in" / "labels.json"
    assert (made.code, made.out) == (0, f"4 synthetic recordings by 2 synthetic speakers: {labels}\n")
    assert ready.code == 0
    assert read_index(tmp_path / "out").shards[0].dialect == "hak"


def test_demo_corpus_in_a_dialect_that_espeak_does_not_speak_is_one_sentence(p2pasr: Command, tmp_path: Path) -> None:
    failed(p2pasr("demo", "corpus", "--out", tmp_path, "--dialect", "tlh-x", "--clips", "1"), "espeak-ng has no voice")


def test_demo_corpus_of_a_split_that_does_not_exist_is_one_sentence(p2pasr: Command, tmp_path: Path) -> None:
    result = p2pasr("demo", "corpus", "--out", tmp_path, "--split", "dev", "--clips", "1")

    assert result.code == 2
    assert result.err.startswith("Usage: ")
    assert "'dev' is not one of 'train', 'test'" in result.err


def test_demo_corpus_into_a_file_is_one_sentence(p2pasr: Command, run_file: Path) -> None:
    failed(p2pasr("demo", "corpus", "--out", run_file, "--clips", "1"), run_file)


def test_the_demo_does_not_write_among_other_things(p2pasr: Command, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine").touch()
    (tmp_path / "notes.txt").touch()

    failed(p2pasr("demo", "run", "--out", tmp_path), f"{tmp_path} holds other things than a demo, such as notes.txt")
    assert (tmp_path / "shards" / "mine").exists()


def test_the_demos_configuration_is_valid() -> None:
    from p2pasr.demo.swarm import demo_config

    config = demo_config(peers=2, rounds=5)

    assert (config.rounds.rounds, config.rounds.min_peers) == (5, 2)
    assert config.task.config["model"] == MODEL
    assert config.task.config["learning_rate"] == pytest.approx(5e-3)
