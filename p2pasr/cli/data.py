"""`p2pasr data`: recordings in, shards out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from p2pasr.report import progress_bar

app = typer.Typer(help="Turn recordings into shards.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `prepare` a subcommand while it is the only one."""


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(metavar="IN", help="folder with labels.json or metadata.csv")],
    out: Annotated[Path, typer.Option(metavar="SHARDS", help="folder to write shards to")],
    model: Annotated[
        str, typer.Option(help="the Whisper model to prepare for: hub id or folder")
    ] = "openai/whisper-small",
    dialect: Annotated[
        str, typer.Option(help="dialect of rows that name none, such as cmn, yue, nan, hak, en-us")
    ] = "cmn",
    window_seconds: Annotated[
        float | None, typer.Option(help="longest clip; the model's own window if not given")
    ] = None,
    clips_per_shard: Annotated[int, typer.Option(min=1, help="rows of the input in one shard")] = 64,
    variants: Annotated[
        int, typer.Option(min=0, max=9, help="variants of each recording: other pace, room, noise, loudness")
    ] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="stop at the first recording that is refused")] = False,
) -> None:
    """Make shards of log-mels and token ids.

    The folder holds recordings and either labels.json, a list such as [{"audio": "audio/001.wav", "text": "我想喝水"}]
    with "speaker" and "dialect" where known, or metadata.csv with the same columns.

    Recordings that are too short, too long, silent, clipped or unreadable are left out and listed.
    An interrupted call goes on where it stopped. Prepare held-out recordings without variants.
    """
    from p2pasr.speech.prepare import Settings
    from p2pasr.speech.prepare import prepare as prepare_shards

    settings = Settings(
        model=model,
        dialect=dialect,
        window_seconds=window_seconds,
        clips_per_shard=clips_per_shard,
        strict=strict,
        variants=variants,
    )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with progress_bar("preparing recordings") as on_progress:
        index = prepare_shards(source, out, settings, on_progress)
    for refusal in index.refused:
        console.print(f"refused: row {refusal.row}, {refusal.file}: {refusal.reason}", style="yellow")
    console.print(
        f"{index.clips} clips, {index.seconds / 60:.1f} minutes of audio in {len(index.shards)} shards in {out}; "
        f"{len(index.refused)} recordings refused"
    )
