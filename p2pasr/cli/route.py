"""`p2pasr route`: which adapter is for a recording, and what comes of choosing by ear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from p2pasr.errors import LocalError
from p2pasr.report import error_rate_table, progress_bar


def route(
    recordings: Annotated[list[Path] | None, typer.Argument(metavar="AUDIO", help="recordings to transcribe")] = None,
    *,
    accent: Annotated[Path, typer.Option(metavar="DIR", help="exported model with the head accent")],
    adapters: Annotated[Path, typer.Option(metavar="DIR", help="folder of exported adapters")],
    shards: Annotated[Path | None, typer.Option(metavar="SHARDS", help="folder of held-out shards")] = None,
    model: Annotated[str | None, typer.Option(metavar="DIR", help="local folder of the base model")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda …")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Choose an adapter by ear.

    Prints the dialect, the adapter and the transcript of recordings, or with --shards how many choices are right
    and the error rates with no adapter, the chosen and the right ones.
    """
    if bool(recordings) == (shards is not None):
        raise LocalError("p2pasr route takes either recordings or --shards")
    from p2pasr import runs
    from p2pasr.tasks.routing import Router

    router = Router(accent, adapters, device, model)
    if shards is not None:
        with progress_bar("transcribing") as on_progress:
            scores = router.evaluate(runs.shard_paths(shards), on_progress)
        if as_json:
            typer.echo(json.dumps(scores, ensure_ascii=False))
        else:
            Console(markup=False).print(error_rate_table("adapters chosen by ear", scores))
        return
    clips = [router.clip(path) for path in recordings or ()]
    choices = router.route(clips)
    for path, choice, text in zip(recordings or (), choices, router.transcribe(clips, choices), strict=True):
        found = {
            "audio": str(path),
            "dialect": choice.dialect,
            "probability": round(choice.probability, 4),
            "adapter": str(choice.adapter.folder),
            "text": text,
        }
        typer.echo(json.dumps(found, ensure_ascii=False) if as_json else "\t".join(map(str, found.values())))
