"""`p2pasr id`: who this peer is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from p2pasr.cli.score import StateDir
from p2pasr.peers.identity import load_or_create
from p2pasr.runs import default_home


def identity(
    state_dir: StateDir = None,
    identity_path: Annotated[Path | None, typer.Option(help="the key, if it lies elsewhere")] = None,
) -> None:
    """Print this peer's ID.

    Others list it in runs that admit listed peers only. Makes the key if there is none.
    """
    typer.echo(load_or_create(identity_path or (state_dir or default_home()) / "identity.key").peer)
