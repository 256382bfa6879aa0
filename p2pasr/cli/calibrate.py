"""`p2pasr verify calibrate`: measure how far honest re-runs of a run's segments lie apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from p2pasr.cli.score import ModelDir, StateDir
from p2pasr.errors import LocalError

if TYPE_CHECKING:
    from p2pasr.calibration import Measured, Verdict
    from p2pasr.protocol.manifest import RunManifest
    from p2pasr.protocol.state import State


def calibrate(
    run: Annotated[str, typer.Option(metavar="RUN", help="a manifest file or a run id")],
    shards: Annotated[Path, typer.Option(metavar="SHARDS", help="folder of prepared shards")],
    segments: Annotated[int, typer.Option(min=1, help="segments to train in every class")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="how often to train each in this process's class")] = 2,
    state_dir: StateDir = None,
    model: ModelDir = None,
    device: Annotated[str, typer.Option(help="cpu, cuda …")] = "cpu",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="write what was measured there too, as JSON")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Measure by how much honest hardware differs.

    Trains the same segments in all classes that this machine can play, from the run's first state and, if a peer's
    folder has one, from its newest, and proposes `verify.close` and `verify.far`. Refuses classes that differ so much
    that a small cheat could hide among them, and a `verify.far` that is more than a fifth of such a cheat. In a task
    that computes in fewer bits than float32 small cheats hide anyway: only classes that could be blamed are refused.
    """
    from p2pasr import calibration, runs
    from p2pasr.report import progress_bar
    from p2pasr.tolerances import coarse_settings

    manifest, _ = runs.read_run(run)
    manifest = manifest or runs.open_run(run, state_dir).manifest
    task = runs.build_task(manifest, device, model)
    states = starting_states(run, state_dir, runs.initial_state(manifest, task))
    files = runs.shard_paths(shards)
    own, *others = calibration.classes_here(device)
    measured: list[Measured] = []
    references = []
    controls = 2 if manifest.rounds.steps_per_segment > 1 else 1
    total = segments * (repeats + len(others) + controls)
    with progress_bar("training") as on_progress:
        for segment in calibration.reference_segments(manifest, task, states, files, segments):
            references.append(segment)
            on_progress(len(references), total)

        def compare(name: str, segment: calibration.Segment, rerun: bytes) -> None:
            measured.append(calibration.Measured(name, segment.phase, calibration.errors_of(segment, rerun)))
            on_progress(len(references) + len(measured), total)

        cheat = calibration.control_task(manifest, device, model)
        for segment in references:
            for _ in range(repeats - 1):
                compare(own.name, segment, calibration.train(task, segment))
            compare(calibration.CONTROL, segment, calibration.train(cheat, segment))
            if controls > 1:
                compare(calibration.SKIPPED, segment, calibration.train_less(task, segment))
        for hardware in others:
            with calibration.trainer(manifest, hardware, model) as train:
                for segment in references:
                    compare(hardware.name, segment, train(segment))
    coarse = coarse_settings(manifest.task.config)
    verdict = calibration.judge(measured, manifest.verify.far, bool(coarse))
    found = _found(manifest, task.hardware_class, measured, verdict)
    if out is not None:
        _write(out, found)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(manifest, found, verdict)
    if coarse and verdict.refused:
        raise LocalError(
            f"three times the error of {' and of '.join(verdict.refused)} is more than verify.far "
            f"({manifest.verify.far:g}) in a task with {coarse}; make the run again with {verdict.far:.2g} or more"
        )
    if not coarse and manifest.verify.far > verdict.most_far:
        raise LocalError(
            f"verify.far ({manifest.verify.far:g}) is more than a fifth of what the smallest cheat differs by "
            f"({verdict.cheat:.1e}, {verdict.cheat_name}), so that it could hide; make the run again with "
            f"{0.95 * verdict.most_far:.1e} or less"
        )
    if verdict.refused:
        raise LocalError(
            f"three times the error of {' and of '.join(verdict.refused)} is more than a fifth of verify.far "
            f"({manifest.verify.far:g}) or of the smallest cheat ({verdict.cheat:.1e}); peers of these classes cannot "
            f"audit each other"
        )


def starting_states(run: str, state_dir: Path | None, first: State) -> list[State]:
    """The first state, and the newest that this machine holds of those that a round starts from."""
    from p2pasr import runs

    try:
        saved = runs.open_run(run, state_dir)
    except LocalError:
        if state_dir is not None:
            raise
        return [first]
    later = [number for number in saved.held if 0 < number < saved.manifest.rounds.rounds]
    return [first, saved.state(max(later), first.params)] if later else [first]


def _found(manifest: RunManifest, hardware: str, measured: list[Measured], verdict: Verdict) -> dict[str, Any]:
    """What was measured and what follows from it, for programs: one row for each class, start and group of arrays."""
    from p2pasr.tolerances import coarse_settings

    largest: dict[tuple[str, str, str], float] = {}
    for item in measured:
        for group, error in item.errors.items():
            key = (item.name, item.phase, group)
            largest[key] = max(largest.get(key, 0.0), error)
    rows = [
        {"class": name, "from": phase, "group": group, "error": error}
        for (name, phase, group), error in largest.items()
    ]
    return {
        "run": manifest.run_id.hex(),
        "task": manifest.task.kind,
        "precision": coarse_settings(manifest.task.config) or "fp32",
        "steps_per_segment": manifest.rounds.steps_per_segment,
        "hardware": hardware,
        "errors": rows,
        "close": verdict.close,
        "far": verdict.far,
        "smallest_cheat": verdict.cheat,
        "most_far": verdict.most_far,
        "refused": list(verdict.refused),
    }


def _write(path: Path, found: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise LocalError(f"the measurements cannot be written to {path} ({error.strerror})") from error


def _show(manifest: RunManifest, found: dict[str, Any], verdict: Verdict) -> None:
    title = f"{manifest.name}, in {found['precision']}, against {found['hardware']}"
    table = Table(title=title, title_justify="left")
    for column in ("class", "from", "group", "largest error"):
        table.add_column(column, justify="right" if column == "largest error" else "left")
    for row in found["errors"]:
        error = f"{row['error']:.1e}" if row["error"] else "0 (same bits)"
        table.add_row(row["class"], row["from"], row["group"], error)
    console = Console(markup=False, soft_wrap=True)
    console.print(table)
    if verdict.close is None:
        console.print(f"all classes gave the same bits: verify.close ({manifest.verify.close:g}) can stay")
    else:
        console.print(
            f"verify: {{close: {verdict.close:.1e}, far: {verdict.far:.1e}}}  # from the largest honest error"
        )
    console.print(f"the smallest cheat measured, {verdict.cheat_name}, differs by {verdict.cheat:.1e}")
