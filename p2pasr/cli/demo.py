"""`p2pasr demo`: the swarm on one machine, and what it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="A real swarm on this machine, on synthetic speech.", no_args_is_help=True)


@app.command()
def run(
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder for everything that the demo writes")] = Path(
        "demo-out"
    ),
    peers: Annotated[int, typer.Option(min=1, max=16, help="training peers")] = 3,
    rounds: Annotated[int | None, typer.Option(min=1, help="rounds, if not the configuration's")] = None,
    cheater: Annotated[bool, typer.Option(help="with one more peer, which cheats and is to be banned")] = True,
) -> None:
    """Train a small Whisper with real peers.

    A bootstrap node and training peers on loopback adapt it from Mandarin to Cantonese. One more peer claims training
    that it did not do, until the others have proved it.
    """
    from p2pasr.demo.swarm import run_demo

    raise typer.Exit(run_demo(out, peers, rounds, cheater=cheater))


@app.command("all")
def every(
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder for everything that the demo writes")] = Path(
        "demo-all-out"
    ),
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="train this alone, and what it starts from; may be repeated"),
    ] = None,
) -> None:
    """Train every kind of task, each with real peers.

    Prints what each is scored by before and after, on speakers that nobody trained on.
    """
    from p2pasr.demo.every import run_all

    raise typer.Exit(run_all(out, only or ()))


@app.command()
def corpus(
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder for recordings and labels.json")],
    dialect: Annotated[str, typer.Option(help="cmn, yue, hak, en-us, en-gb-scotland …")] = "yue",
    split: Annotated[Literal["train", "test"], typer.Option(help="their speakers differ")] = "train",
    clips: Annotated[int, typer.Option(min=1, help="recordings")] = 1200,
    people: Annotated[int, typer.Option(min=1, help="synthetic speakers")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="what is said, and by whom, follows from it")] = 0,
) -> None:
    """Write synthetic recordings.

    espeak-ng speaks them; `p2pasr data prepare` reads them.
    """
    from p2pasr.report import progress_bar
    from p2pasr.speech.synthetic import write_corpus

    with progress_bar("speaking") as on_progress:
        labels = write_corpus(
            out,
            dialect=dialect,
            split=split,
            clips=clips,
            people=people,
            seed=seed,
            on_progress=on_progress,
        )
    typer.echo(f"{clips} synthetic recordings by {people} synthetic speakers: {labels}")


@app.command("make-base")
def make_base(
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder for the model")] = Path("demo-base"),
    steps: Annotated[int | None, typer.Option(min=1, help="training steps, if not the recipe's")] = None,
    clips: Annotated[int | None, typer.Option(min=1, help="training clips, if not the recipe's")] = None,
) -> None:
    """Train the demo's base model from scratch.

    It learns synthetic Mandarin in about five minutes on two cores.
    """
    from dataclasses import replace

    from p2pasr.demo.base import Recipe, make_base
    from p2pasr.report import progress_bar

    recipe = Recipe()
    recipe = replace(recipe, steps=steps or recipe.steps, clips=clips or recipe.clips)
    with progress_bar("training the base model") as on_progress:
        rates = make_base(out, recipe, lambda step, total, _loss: on_progress(step, total))
    typer.echo(f"{out}: CER {rates.cer:.1%} on {rates.clips} clips of speakers that were not in training")
