"""The console script `p2pasr`: everything around training. Training itself is `python -m p2pasr.peer`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from p2pasr import __version__
from p2pasr.cli import data, demo, distill, identity, invite, lineage, merge, plan, route, run, score, task, verify
from p2pasr.errors import P2pasrError
from p2pasr.report import Report
from p2pasr.speech.pretrained import quiet_libraries

app = typer.Typer(
    help="Train speech recognition together, from home, with nobody in charge.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"p2pasr {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of `p2pasr` itself."""


app.add_typer(data.app, name="data")
app.add_typer(distill.app, name="distill")
app.add_typer(run.app, name="run")
app.add_typer(demo.app, name="demo")
app.add_typer(verify.app, name="verify")
app.add_typer(task.app, name="task")
app.command("eval")(score.evaluate)
app.command("export")(score.export)
app.command("route")(route.route)
app.command("id")(identity.identity)
app.command("invite")(invite.invite)
app.command("lineage")(lineage.lineage)
app.command("merge")(merge.merge)
app.command("plan")(plan.plan)


def main() -> None:
    """Run the command; an expected failure is one sentence and exit code 1."""
    run_app(app)


def run_app(commands: typer.Typer, name: str | None = None) -> None:
    """Run a group of commands as a program.

    Args:
        name: how the program is called in its help; the file's name if None.
    """
    try:
        quiet_libraries()
        commands(prog_name=name)
    except (P2pasrError, OSError) as error:
        Report().fail(error)
        sys.exit(1)
    except KeyboardInterrupt:
        print("p2pasr: stopped", file=sys.stderr)
        sys.exit(130)
