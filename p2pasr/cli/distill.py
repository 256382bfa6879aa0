"""`p2pasr distill`: a teacher's labels for shards, made once for all peers, and checked."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from p2pasr.cli.score import StateDir
from p2pasr.errors import LocalError
from p2pasr.report import progress_bar

if TYPE_CHECKING:
    from p2pasr.tasks.teacher import Teacher

app = typer.Typer(help="Label shards with what a teacher expects, and check such labels.", no_args_is_help=True)

TeacherOption = Annotated[str, typer.Option(metavar="MODEL", help="the teacher: hub id or folder")]
RevisionOption = Annotated[str | None, typer.Option(metavar="COMMIT", help="commit of the teacher's hub repository")]
RecordingsOption = Annotated[
    Path | None, typer.Option(metavar="IN", help="what the shards were prepared from, for a teacher with other mels")
]
DialectOption = Annotated[str, typer.Option(help="dialect of recordings that name none")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda …")]


@app.command()
def label(
    teacher: TeacherOption,
    shards: Annotated[Path, typer.Option(metavar="SHARDS", help="folder of prepared shards")],
    out: Annotated[Path, typer.Option(metavar="LABELLED", help="folder to write labelled shards to")],
    revision: RevisionOption = None,
    top_k: Annotated[int, typer.Option(min=1, max=4096, help="tokens to name at each place")] = 64,
    max_cer: Annotated[
        float | None, typer.Option(min=0, help="leave out clips that the teacher hears worse than this")
    ] = None,
    pseudo_labels: Annotated[
        bool, typer.Option("--pseudo-labels", help="learn the teacher's transcripts instead of the shards'")
    ] = False,
    recordings: RecordingsOption = None,
    dialect: DialectOption = "cmn",
    device: DeviceOption = "cpu",
    state_dir: StateDir = None,
    identity_path: Annotated[Path | None, typer.Option(help="the key that signs, if it lies elsewhere")] = None,
) -> None:
    """Write shards with a teacher's labels beside their clips.

    They are signed with this peer's key.

    The teacher reads each transcript and says at each place which tokens it expects next. A run of the kind distill
    is made of the labelled shards, so that no peer needs the teacher. An interrupted call goes on where it stopped.
    """
    from p2pasr.peers.identity import load_or_create
    from p2pasr.runs import default_home
    from p2pasr.tasks.labelling import LabelSettings, label_shards

    running = _running(teacher, revision, shards, recordings, dialect, device)
    signer = load_or_create(identity_path or (state_dir or default_home()) / "identity.key")
    settings = LabelSettings(top_k, max_cer, pseudo_labels)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with progress_bar("labelling shards") as on_progress:
        made, kept = label_shards(running, shards, out, settings, signer, on_progress)
    for refusal in made.refused:
        console.print(f"left out: clip {refusal.row} of {refusal.file}: {refusal.reason}", style="yellow")
    console.print(f"{made.clips} clips in {len(made.shards)} shards in {out}; {len(made.refused)} clips left out")
    if kept.targets:
        console.print(
            f"{kept.bytes / kept.targets:.0f} bytes a token, 1/{kept.full_bytes / kept.bytes:.0f} of all logits as "
            f"float16, hold {kept.mass / kept.targets:.3%} of the probability (at least {kept.mass_min:.3%}), "
            f"{kept.gap / kept.targets:.2g} nats a token from the teacher's own"
        )


@app.command()
def check(
    teacher: TeacherOption,
    shards: Annotated[Path, typer.Option(metavar="LABELLED", help="folder of labelled shards")],
    revision: RevisionOption = None,
    rate: Annotated[float, typer.Option(min=0, max=1, help="share of each shard's clips, at least one")] = 0.05,
    tolerance: Annotated[float, typer.Option(min=0, help="how far a log-probability may be off")] = 0.05,
    recordings: RecordingsOption = None,
    dialect: DialectOption = "cmn",
    device: DeviceOption = "cpu",
) -> None:
    """Ask the teacher again about clips drawn by lot.

    Exits with 1 if a label is not the teacher's, and says in which shard and clip, and who signed it.
    """
    from p2pasr.tasks.labelling import check_shards

    running = _running(teacher, revision, shards, recordings, dialect, device)
    with progress_bar("checking labels") as on_progress:
        found = check_shards(running, shards, rate, tolerance, secrets.token_bytes(32), on_progress)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for each in found.differences:
        console.print(f"clip {each.clip} of {each.shard}, signed by {each.peer}: {each.reason}", style="bold red")
    verdict = f"{len(found.differences)} are not" if found.differences else "all are"
    console.print(f"{found.clips} of {found.of} clips were asked about again; {verdict} labelled as the teacher says")
    if found.differences:
        raise typer.Exit(1)


def _running(
    teacher: str, revision: str | None, shards: Path, recordings: Path | None, dialect: str, device: str
) -> Teacher:
    """The teacher, ready for a folder of shards."""
    from p2pasr.speech.prepare import read_index
    from p2pasr.tasks.teacher import Teacher

    index = read_index(shards)
    if index.features is None:
        raise LocalError(f"{shards} holds shards of a task of one's own; a teacher labels clips of speech")
    return Teacher(
        teacher,
        index.features,
        index.model,
        revision=revision,
        device=device,
        recordings=recordings,
        dialect=dialect,
    )
