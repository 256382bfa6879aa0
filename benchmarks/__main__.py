"""`python -m benchmarks NAME`: print a table, or JSON with `--json`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from p2pasr.errors import P2pasrError
from p2pasr.speech.pretrained import quiet_libraries


def _averaging(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.averaging import measure

    return [asdict(row) for peers in arguments.peers for row in measure(peers, arguments.codecs, arguments.rounds)]


def _training(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.training import measure

    return [asdict(row) for row in measure(arguments.steps, arguments.batch, arguments.turns)]


def _streaming(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.streaming import measure

    return [asdict(row) for row in measure(arguments.values, arguments.peers, arguments.codecs)]


def _swarm(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    if arguments.simulate:
        from benchmarks import simulation

        return [
            asdict(row) for row in simulation.measure(arguments.peers or [16, 64, 250, 1000], arguments.rounds or 25)
        ]
    from benchmarks.swarm import measure

    return [asdict(row) for row in measure(arguments.peers or [1, 2, 4], arguments.rounds or 4)]


def _convergence(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.convergence import measure

    return [asdict(row) for row in measure(arguments.seeds)]


def _robustness(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.robustness import measure

    return [asdict(row) for row in measure(arguments.rounds, arguments.percents)]


def _distillation(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.distillation import measure

    return [asdict(row) for row in measure(arguments.seeds, arguments.steps, arguments.wrong)]


def _chaos(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.chaos import measure

    return [asdict(measure(arguments.peers, arguments.rounds, arguments.percent, arguments.seed))]


def _links(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.links import measure

    row, steps = measure(arguments.peers, arguments.mbit, arguments.seconds, arguments.rounds)
    return [asdict(step) for step in steps] if arguments.steps else [asdict(row)]


def _attacks(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.attacks import harm, honest, real, simulate

    if arguments.harm:
        return [asdict(row) for row in harm()]

    if arguments.real:
        return [asdict(row) for row in real(arguments.attacks, arguments.peers, arguments.rate)]
    if arguments.honest:
        return [asdict(row) for row in honest(arguments.audits)]
    return [asdict(row) for row in simulate(arguments.seeds)]


def _excision(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.excision import measure

    return [asdict(row) for row in measure(arguments.peers)]


def _window(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.window import measure, speeds

    if arguments.speed:
        return [asdict(row) for row in speeds(arguments.turns or 2)]
    return [asdict(row) for row in measure(arguments.seeds, arguments.turns or 40)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    kinds = parser.add_subparsers(required=True, metavar="NAME")

    averaging = kinds.add_parser("averaging", help="a round of averaging, beside hivemind's averager")
    averaging.add_argument("--peers", type=int, nargs="+", default=[4, 8])
    averaging.add_argument("--codecs", nargs="+", default=["float32", "float16", "int8", "int4"])
    averaging.add_argument("--rounds", type=int, default=10)
    averaging.set_defaults(run=_averaging, title="averaging 1,769,472 values on loopback, a round")

    training = kinds.add_parser("training", help="a LoRA step and features, beside transformers' own")
    training.add_argument("--steps", type=int, default=20)
    training.add_argument("--batch", type=int, default=16)
    training.add_argument("--turns", type=int, default=8)
    training.set_defaults(run=_training, title="training, beside transformers in the same run")

    streaming = kinds.add_parser("streaming", help="memory that a large student's delta takes beyond the model")
    streaming.add_argument("--values", type=int, default=300_000_000)
    streaming.add_argument("--peers", type=int, default=2)
    streaming.add_argument("--codecs", nargs="+", default=["int8"], choices=["float32", "float16", "int8", "int4"])
    streaming.set_defaults(run=_streaming, title="a delta through a round: megabytes beyond the model")

    swarm = kinds.add_parser("swarm", help="time to the first step, share of time training, bytes a round")
    swarm.add_argument("--peers", type=int, nargs="+", help="default: 1 2 4; simulated: 16 64 250 1000")
    swarm.add_argument("--rounds", type=int, help="default: 4; simulated: 25")
    swarm.add_argument("--simulate", action="store_true", help="a swarm of any size, without network and training")
    swarm.set_defaults(run=_swarm, title="the run by real peers that share this machine, or by simulated ones")

    convergence = kinds.add_parser("convergence", help="the same work by three peers and by one (about 12 minutes)")
    convergence.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    convergence.set_defaults(run=_convergence, title="CER on held-out speakers")

    robustness = kinds.add_parser("robustness", help="what hostile members do to a model under each rule")
    robustness.add_argument("--rounds", type=int, default=20)
    robustness.add_argument("--percents", type=int, nargs="+", default=[10, 20, 30, 40])
    robustness.set_defaults(run=_robustness, title="accuracy of a classifier trained by 20 members, in percent")

    distillation = kinds.add_parser("distillation", help="a student with and without its teacher (about a minute)")
    distillation.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    distillation.add_argument("--steps", type=int, default=60)
    distillation.add_argument("--wrong", type=float, default=0.2, help="share of wrong characters in transcripts")
    distillation.set_defaults(run=_distillation, title="CER on held-out speakers")

    chaos = kinds.add_parser("chaos", help="what becomes of a run whose peers are killed and started again")
    chaos.add_argument("--rounds", type=int, default=200)
    chaos.add_argument("--peers", type=int, default=4)
    chaos.add_argument("--percent", type=float, default=10.0, help="how many of the peers are killed in a round")
    chaos.add_argument("--seed", type=int, default=0)
    chaos.set_defaults(run=_chaos, title="peers killed at random moments and started again")

    links = kinds.add_parser("links", help="share of time training on links of limited speed (needs root)")
    links.add_argument("--mbit", type=float, default=50.0, help="speed of each peer's uplink, Mbit/s")
    links.add_argument("--peers", type=int, default=4)
    links.add_argument("--seconds", type=float, default=60.0, help="how long a round is trained")
    links.add_argument("--rounds", type=int, default=3)
    links.add_argument("--steps", action="store_true", help="print the seconds of a round's steps instead")
    links.set_defaults(run=_links, title="1,769,472 values as int8 between peers with limited uplinks, a round")

    attacks = kinds.add_parser("attacks", help="how long cheats last, and whether honest peers are ever banned")
    attacks.add_argument("--seeds", type=int, default=200, help="simulated runs of each kind")
    attacks.add_argument("--honest", action="store_true", help="train honest segments again instead")
    attacks.add_argument("--audits", type=int, default=10_000, help="of honest segments (10 minutes and more)")
    attacks.add_argument("--real", action="store_true", help="run real peers instead (some minutes an attack)")
    attacks.add_argument("--harm", action="store_true", help="what two cheats do to a run of six honest peers instead")
    attacks.add_argument("--attacks", nargs="+", default=["sign-flip", "free-rider"], metavar="ATTACK")
    attacks.add_argument("--peers", type=int, default=8, help="of which one cheats")
    attacks.add_argument("--rate", type=float, default=1.0, help="verify.rate of real runs")
    attacks.set_defaults(run=_attacks, title="cheats, and rounds until they are banned")

    excision = kinds.add_parser("excision", help="how much of the harm a ban takes out of the parameters again")
    excision.add_argument("--peers", type=int, nargs="+", default=[4, 8], help="of which one cheats")
    excision.set_defaults(run=_excision, title="held-out loss of a tiny classifier, one of whose members cheats")

    window = kinds.add_parser(
        "window",
        help="recordings of 5 s in a window of 30 s and in one of 5 s (about 13 minutes, and 8 for each further seed)",
    )
    window.add_argument("--seeds", type=int, nargs="+", default=[0])
    window.add_argument("--turns", type=int, help="of five steps each; default: 40, with --speed 2")
    window.add_argument("--speed", action="store_true", help="only time steps, also of a model of whisper-tiny's shape")
    window.set_defaults(run=_window, title="recordings of 5 s in a window of 30 s and in one of 5 s")

    for kind in kinds.choices.values():
        kind.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parsed = parser.parse_args(arguments)
    quiet_libraries()
    try:
        rows = parsed.run(parsed)
    except KeyboardInterrupt:
        return 130
    except P2pasrError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    if parsed.json:
        print(json.dumps(rows, indent=1))
    else:
        _print(parsed.title, rows)
    return 0


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(highlight=False).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 0.01 else f"{value:.2f}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
