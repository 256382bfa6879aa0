"""`p2pasr demo all`: every kind of task, each trained by a small swarm of its own on this machine."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from p2pasr import runs
from p2pasr.demo.fleet import fleet_of
from p2pasr.demo.language_model import Recipe, make_language_model
from p2pasr.errors import LocalError, TransportError
from p2pasr.peer import interrupt_on_terminate
from p2pasr.protocol.manifest import RunConfig, read_config
from p2pasr.report import progress_bar
from p2pasr.speech.prepare import Settings, prepare, read_index
from p2pasr.speech.synthetic import write_corpus

CONFIGS: Final = Path(__file__).parent / "tasks"
MODEL: Final = "p2pasr/demo-base"
PEERS: Final = 2
SECONDS_A_RUN: Final = 600.0
"""A run that takes longer has gone wrong."""

LANGUAGE_MODEL: Final = "language-model"
"""Folder of the one that is made for the tasks that need it."""

CLIPS: Final = {"train": 240, "test": 60}
PEOPLE: Final = {"train": 12, "test": 8}
"""Of each dialect; nobody who is tested is trained on."""


@dataclass(frozen=True, slots=True)
class Aim:
    """What a task's demo is to show.

    Attributes:
        dialect: what it trains on; None for all.
        score: the keys that lead to its figure in what `evaluate` returns.
        rises: whether more is better.
        starts_from: key of `task.config` → the folder it names, below the demo's own: :data:`LANGUAGE_MODEL`, or in
            that of another task, which is trained before.
    """

    dialect: str | None
    score: tuple[str, ...]
    rises: bool = False
    starts_from: Mapping[str, str] = field(default_factory=dict)


AIMS: Final[Mapping[str, Aim]] = {
    "distill": Aim("cmn", ("cer",)),
    "features": Aim(None, ("accent", "accuracy"), rises=True),
    "full": Aim("yue", ("cer",)),
    "llm-projector": Aim("cmn", ("cer",), starts_from={"language_model": LANGUAGE_MODEL}),
    "llm-adapters": Aim(
        "cmn", ("cer",), starts_from={"language_model": LANGUAGE_MODEL, "projector": "llm-projector/model"}
    ),
    "lora": Aim("yue", ("cer",)),
    "student": Aim("cmn", ("cer",)),
}
"""Name of a configuration in :data:`CONFIGS` → its aim, in the order of training. The demo's base model knows `cmn`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one task.

    Attributes:
        score: what it is scored by.
        before, after: of the first and of the last state, on speakers that nobody trained on.
        learned: whether the last is the better one.
    """

    task: str
    name: str
    trained: int
    rounds: int
    score: str
    before: float
    after: float
    learned: bool
    seconds: float


def run_all(out: Path, only: Sequence[str] = ()) -> int:
    """Train every kind of task and write `out/report.json`; returns the exit code.

    Args:
        only: train these alone, by their names in :data:`AIMS`, and what they start from; all if empty.

    Raises:
        LocalError: there is no such task, one did not learn, or the peers of one ended with different states.
    """
    needed = with_what_they_start_from(only or list(AIMS))
    interrupt_on_terminate()
    console = Console(highlight=False, markup=False)
    shutil.rmtree(out / "speech", ignore_errors=True)
    train, test = speak(out / "speech")
    if LANGUAGE_MODEL in needed:
        write_language_model(out / "speech" / "recordings" / "train", out / LANGUAGE_MODEL)
    table = Table(title=f"each trained by {PEERS} peers; synthetic speech, held-out speakers", title_justify="left")
    for column in ("task", "trained", "rounds", "score", "before", "after", "time"):
        table.add_column(column, justify="left" if column in ("task", "score") else "right")
    outcomes = []
    for name in filter(needed.__contains__, AIMS):
        console.print(f"{name}: {read_config(CONFIGS / f'{name}.yaml').name}")
        outcome = run_one(name, out, train, test)
        outcomes.append(outcome)
        figures = f"{outcome.before:.1%}", f"{outcome.after:.1%}"
        size = f"{outcome.trained / 1e6:.2f} M"
        table.add_row(name, size, str(outcome.rounds), outcome.score, *figures, f"{outcome.seconds:.0f} s")
    console.print(table)
    (out / "report.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n", encoding="utf-8")
    if idle := [outcome.task for outcome in outcomes if not outcome.learned]:
        raise LocalError(f"{', '.join(idle)} did not get better; see {out / 'report.json'} and the logs beside it")
    return 0


def with_what_they_start_from(names: Sequence[str]) -> set[str]:
    """Tasks by their names in :data:`AIMS`, and those and the models that they start from.

    Raises:
        LocalError: there is no such task.
    """
    needed = set(names)
    if unknown := sorted(needed - AIMS.keys()):
        raise LocalError(f"the demo trains nothing by the name {unknown[0]!r}; choose from {', '.join(AIMS)}")
    for name in reversed(list(AIMS)):
        if name in needed:
            needed |= {Path(folder).parts[0] for folder in AIMS[name].starts_from.values()}
    return needed


def write_language_model(recordings: Path, out: Path) -> None:
    """Make the language model from the transcripts of recordings in the dialect that its tasks hear."""
    rows = json.loads((recordings / "labels.json").read_text(encoding="utf-8"))
    shutil.rmtree(out, ignore_errors=True)
    with progress_bar("making a language model") as on_progress:
        make_language_model(out, [row["text"] for row in rows if row["dialect"] == "cmn"], Recipe(), on_progress)


def config_of(name: str, out: Path) -> RunConfig:
    """The configuration of a task, with what it starts from in the demo's folder."""
    config = read_config(CONFIGS / f"{name}.yaml")
    made = {key: str((out / folder).resolve()) for key, folder in AIMS[name].starts_from.items()}
    task = config.task.model_copy(update={"config": {**config.task.config, **made}})
    return config.model_copy(update={"task": task})


def speak(folder: Path) -> tuple[Path, Path]:
    """Speak Mandarin and Cantonese and make shards of both: one folder to train on, one to test with."""
    for split, clips in CLIPS.items():
        rows: list[dict[str, Any]] = []
        for dialect in ("cmn", "yue"):
            source = folder / "recordings" / split / dialect
            with progress_bar(f"speaking {clips} clips of {dialect} ({split})") as on_progress:
                labels = write_corpus(
                    source, dialect=dialect, split=split, clips=clips, people=PEOPLE[split], on_progress=on_progress
                )
            for row in json.loads(labels.read_text(encoding="utf-8")):
                rows.append({**row, "audio": f"{dialect}/{row['audio']}", "dialect": dialect})
        (folder / "recordings" / split / "labels.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
        with progress_bar(f"preparing shards ({split})") as on_progress:
            prepare(folder / "recordings" / split, folder / split, Settings(MODEL, clips_per_shard=24), on_progress)
    return folder / "train", folder / "test"


def run_one(name: str, out: Path, train: Path, test: Path) -> Outcome:
    """Train one task with real peers, and score it.

    Args:
        out: the demo's folder; this task's is one of its own in it.

    Raises:
        LocalError: the peers ended with different states.
        TransportError: a peer failed.
    """
    began, aim, config = time.monotonic(), AIMS[name], config_of(name, out)
    out = out / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    manifest = runs.new_run(config, train, dialect=aim.dialect)
    manifest.write(out / "run.json")
    with fleet_of(out / "swarm", out / "run.json", PEERS, train) as (_, peers):
        for peer in peers:
            code = peer.wait(max(SECONDS_A_RUN - (time.monotonic() - began), 1.0))
            if code != 0:
                raise TransportError(f"{name}: {peer.name} ended with code {code}: {peer.last_words()}")
    ends = {peer.events[-1].get("state") for peer in peers}
    saved = runs.open_run(str(out / "run.json"), out / "swarm" / peers[0].name)
    last = max(saved.held)
    if ends != {saved.held[last].hex()}:
        raise LocalError(f"{name}: the peers ended with different states; their logs are in {out / 'swarm' / 'logs'}")
    task = runs.build_task(manifest)
    state = saved.state(last, task.initial_params())
    held_out = [test / s.file for s in read_index(test).shards if aim.dialect in (None, s.dialect)]
    before, after = (_score(task.evaluate(params, held_out), aim) for params in (None, state.params))
    runs.export(manifest, state, out / "model", task=task)
    return Outcome(
        task=name,
        name=manifest.name,
        trained=manifest.parameters,
        rounds=last,
        score=" ".join(aim.score),
        before=before,
        after=after,
        learned=after > before if aim.rises else after < before,
        seconds=round(time.monotonic() - began, 1),
    )


def _score(scores: Mapping[str, Any], aim: Aim) -> float:
    found: Any = scores
    for key in aim.score:
        found = found[key]
    return float(found)
