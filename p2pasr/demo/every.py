"""`p2pasr demo all`: every kind of task, each trained by a small swarm of its own on this machine."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from p2pasr import runs
from p2pasr.demo.fleet import fleet_of
from p2pasr.errors import LocalError, TransportError
from p2pasr.peer import interrupt_on_terminate
from p2pasr.protocol.manifest import read_config
from p2pasr.report import progress_bar
from p2pasr.speech.prepare import Settings, prepare, read_index
from p2pasr.speech.synthetic import write_corpus

CONFIGS: Final = Path(__file__).parent / "tasks"
MODEL: Final = "p2pasr/demo-base"
PEERS: Final = 2
SECONDS_A_RUN: Final = 600.0
"""A run that takes longer has gone wrong."""

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
    """

    dialect: str | None
    score: tuple[str, ...]
    rises: bool = False


AIMS: Final[Mapping[str, Aim]] = {
    "distill": Aim("cmn", ("cer",)),
    "features": Aim(None, ("accent", "accuracy"), rises=True),
    "full": Aim("yue", ("cer",)),
    "lora": Aim("yue", ("cer",)),
    "student": Aim("cmn", ("cer",)),
}
"""Name of a configuration in :data:`CONFIGS` → its aim. The demo's base model knows `cmn`."""


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


def run_all(out: Path) -> int:
    """Train every kind of task and write `out/report.json`; returns the exit code.

    Raises:
        LocalError: a task did not learn, or the peers of one ended with different states.
    """
    interrupt_on_terminate()
    console = Console(highlight=False, markup=False)
    shutil.rmtree(out / "speech", ignore_errors=True)
    train, test = speak(out / "speech")
    table = Table(title=f"each trained by {PEERS} peers; synthetic speech, held-out speakers", title_justify="left")
    for column in ("task", "trained", "rounds", "score", "before", "after", "time"):
        table.add_column(column, justify="left" if column in ("task", "score") else "right")
    outcomes = []
    for name in sorted(AIMS):
        console.print(f"{name}: {read_config(CONFIGS / f'{name}.yaml').name}")
        outcome = run_one(name, out / name, train, test)
        outcomes.append(outcome)
        figures = f"{outcome.before:.1%}", f"{outcome.after:.1%}"
        size = f"{outcome.trained / 1e6:.2f} M"
        table.add_row(name, size, str(outcome.rounds), outcome.score, *figures, f"{outcome.seconds:.0f} s")
    console.print(table)
    (out / "report.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n", encoding="utf-8")
    if idle := [outcome.task for outcome in outcomes if not outcome.learned]:
        raise LocalError(f"{', '.join(idle)} did not get better; see {out / 'report.json'} and the logs beside it")
    return 0


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

    Raises:
        LocalError: the peers ended with different states.
        TransportError: a peer failed.
    """
    began, aim = time.monotonic(), AIMS[name]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    manifest = runs.new_run(read_config(CONFIGS / f"{name}.yaml"), train, dialect=aim.dialect)
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
