"""`p2pasr demo run`: from an empty folder to a run whose error rate falls, on one machine."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from p2pasr import runs
from p2pasr.demo.fleet import Event, Fleet, Process, fleet_of
from p2pasr.errors import LocalError, TransportError
from p2pasr.peer import interrupt_on_terminate
from p2pasr.protocol.manifest import RunConfig, RunManifest, VerifySection, read_config
from p2pasr.report import error_rate_table, progress_bar
from p2pasr.speech.prepare import Settings, prepare
from p2pasr.speech.synthetic import write_corpus

CONFIG: Final = Path(__file__).parent / "config.yaml"
CURVE_POINTS: Final = 4
"""States that are scored besides the first."""

FOLDERS: Final = ("corpus", "shards", "held-out", "swarm", "adapter")
FILES: Final = ("run.json", "report.json", "curve.png")
"""What a demo leaves in its output folder, and a new one replaces."""

TRAIN_CLIPS, TRAIN_PEOPLE, TEST_CLIPS, TEST_PEOPLE = 1200, 24, 300, 20
SECONDS_A_ROUND: Final = 120.0
"""A round that takes longer than this on average has gone wrong."""

CHEAT: Final = "cheat"
CHEAT_COMMAND: Final = (sys.executable, "-m", "p2pasr.demo.cheat")
AUDIT_RATE: Final = 1.0
"""Share of the claims that are audited where there is a cheat, so that it is caught in minutes, whatever is drawn."""

LEAST_PEERS, LEAST_ROUNDS = 2, 4
"""Who is in the minority bans nobody; a cheat is audited in its second round, banned then or one later, and may have
missed the first."""


@dataclass
class Board:
    """What the live table shows: one row a process, updated from its events.

    Attributes:
        rounds: of the run.
        banned: peer → the round in which it was banned.
    """

    rounds: int
    banned: dict[str, int] = field(default_factory=dict)
    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def on_event(self, process: Process, event: Event) -> None:
        """Note what a process reports."""
        row = self.rows.setdefault(
            process.name, dict.fromkeys(("peer", "step", "segment", "loss", "state", "sent", "round"), "")
        )
        kind = event["event"]
        row["note"] = event["message"] if kind in ("wait", "warning", "error") else ""
        if kind == "ready":
            row["peer"] = event["peer"][-6:]
            row["id"] = event["peer"]
            row["step"] = "up"
        elif kind == "step":
            row["step"], row["round"] = event["step"], f"{event['round']}/{self.rounds}"
            row["state"] = event["state"][:8]
            if event["step"] == "train":
                row["segment"] = ""
        elif kind == "segment":
            row["segment"], row["loss"] = f"{event['segment']}/{event['segments']}", f"{event['loss']:.3f}"
        elif kind == "round":
            row["state"], row["sent"] = event["state"][:8], f"{event['bytes_sent'] / 1e6:.1f} MB"
            row["round"] = f"{event['round'] + 1}/{self.rounds}"
            self.banned |= dict.fromkeys(event["banned"], event["round"])
        elif kind in ("done", "stopped"):
            row["step"] = kind

    def __rich__(self) -> Group:
        table = Table(title=f"the swarm, {time.monotonic() - self.started:.0f} s", title_justify="left")
        for column in ("process", "peer", "round", "step", "segment", "loss", "state", "sent"):
            table.add_column(column, no_wrap=True)
        notes = []
        for name, row in sorted(self.rows.items()):
            banned = self.banned.get(row.get("id", ""))
            note = row.get("note", "") if banned is None else f"banned in round {banned}: others hold the proof"
            step = row["step"] if banned is None else "banned"
            cells = (row.get(column, "") for column in ("segment", "loss", "state", "sent"))
            table.add_row(name, row["peer"], row["round"], step, *cells, style="" if banned is None else "red")
            notes += [Text(f"{name}: {note}", style="cyan" if banned is None else "red")] if note else []
        return Group(table, *notes)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the peer that cheats.

    Attributes:
        peer: its ID.
        round: the round in which it was banned.
        rounds_to_ban: rounds in which it took part, that one included.
        evidence: a proof against it, complete in itself.
    """

    peer: str
    round: int
    rounds_to_ban: int
    evidence: str

    def __str__(self) -> str:
        return (
            f"peer {self.peer[-6:]} claimed training that it had not done and was banned in round {self.round}, "
            f"after {self.rounds_to_ban} rounds"
        )


def run_demo(out: Path, peers: int, rounds: int | None, *, cheater: bool = True) -> int:
    """Run the demo and write its report; returns the exit code.

    Args:
        cheater: whether one more peer takes part that claims training which it did not do.

    Raises:
        LocalError: the peers ended with different states, the cheat was not banned, or somebody else was.
    """
    interrupt_on_terminate()
    console = Console(highlight=False, soft_wrap=True)
    if cheater:
        _check_that_it_can_be_caught(peers, rounds)
    _empty(out)
    console.print(
        "[bold]p2pasr demo[/bold]: a bootstrap node and "
        f"{peers} training peers, each its own process, adapt a small Whisper from Mandarin to Cantonese.\n"
        "The speech is synthetic (espeak-ng): it shows that the machinery works, not how well it recognises people.",
        soft_wrap=False,
    )
    if cheater:
        console.print(
            f"One more peer cheats: it trains one step in ten and claims them all. Here every claim is audited "
            f"(verify.rate {AUDIT_RATE:g}), so that it is caught early; "
            f"a run's default is {VerifySection().rate:g}. --no-cheater leaves it out.",
            soft_wrap=False,
        )
    manifest = _make_run(out, peers, rounds, cheater)
    console.print(f"run {manifest.run_id.hex()[:16]}: {manifest.rounds.rounds} rounds, {len(manifest.shards)} shards")
    board, processes, cheat = _train(out, manifest, peers, cheater, console)
    report = _score(out, manifest, processes, console)
    verdict = None
    if cheat is not None:
        verdict = judge(cheat, processes)
        report |= ban_report(verdict)
    report["seconds"] = round(time.monotonic() - board.started, 1)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(
        f"CER [bold]{report['cer_before']:.1%} → {report['cer_after']:.1%}[/bold] on speakers that nobody trained on"
    )
    console.print(
        f"curve:   {out / 'curve.png'}\nreport:  {out / 'report.json'}\nadapter: {report['adapter_dir']}", markup=False
    )
    if verdict is not None:
        console.print(f"caught:  {verdict}\nproof:   {verdict.evidence}", markup=False)
    if not report["state_digests_equal"]:
        raise LocalError("the peers ended with different states; their logs are in " + str(out / "swarm" / "logs"))
    if cheat is not None and verdict is None:
        raise LocalError(f"the peer that cheats was not banned; what the others said is in {out / 'swarm' / 'logs'}")
    if innocent := board.banned.keys() - {verdict.peer if verdict else ""}:
        raise LocalError(f"{len(innocent)} peers were banned that did not cheat; see {out / 'swarm'}")
    return 0


def _check_that_it_can_be_caught(peers: int, rounds: int | None) -> None:
    if peers < LEAST_PEERS or (rounds or LEAST_ROUNDS) < LEAST_ROUNDS:
        raise LocalError(
            f"a cheat is banned when more than half of a round's peers hold a proof, which takes {LEAST_PEERS} honest "
            f"peers and up to {LEAST_ROUNDS} rounds; give more, or --no-cheater"
        )


def judge(cheat: Process, processes: Sequence[Process]) -> Verdict | None:
    """What became of the cheat, from the events of all; None if it was not banned."""
    peer = str(cheat.wait_for("ready")["peer"])
    banned = [e["round"] for process in processes for e in process.seen("round") if peer in e["banned"]]
    proofs = [e["path"] for process in processes for e in process.seen("evidence", peer=peer)]
    took_part = [e["round"] for process in processes for e in process.seen("round") if peer in e["peers"]]
    if not banned or not proofs:
        return None
    return Verdict(peer, banned[0], banned[0] - min(took_part) + 1, str(Path(proofs[0]).resolve()))


def ban_report(verdict: Verdict | None) -> dict[str, Any]:
    """What the report says about it."""
    return {
        "cheater_banned": verdict is not None,
        "rounds_to_ban": None if verdict is None else verdict.rounds_to_ban,
        "evidence": None if verdict is None else verdict.evidence,
    }


def _empty(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in out.iterdir() if path.name not in FOLDERS + FILES)
    if others:
        raise LocalError(
            f"{out} holds other things than a demo, such as {others[0]}; name a folder of its own with --out"
        )
    for name in FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)


def _make_run(out: Path, peers: int, rounds: int | None, cheater: bool) -> RunManifest:
    config = demo_config(peers, rounds)
    if cheater:
        config = config.model_copy(update={"verify": config.verify.model_copy(update={"rate": AUDIT_RATE})})
    prepare_speech(out)
    manifest = runs.new_run(config, out / "shards")
    manifest.write(out / "run.json")
    return manifest


def demo_config(peers: int, rounds: int | None = None, seed: int = 0) -> RunConfig:
    """The demo's run, for so many peers and rounds."""
    config = read_config(CONFIG)
    section = config.rounds.model_copy(
        update={"min_peers": min(peers, config.rounds.min_peers), "rounds": rounds or config.rounds.rounds}
    )
    return config.model_copy(update={"rounds": section, "seed": seed})


def prepare_speech(out: Path, seed: int = 0) -> None:
    """Speak the demo's Cantonese and make shards of it: `out/shards` to train on, `out/held-out` to test with."""
    model = str(read_config(CONFIG).task.config["model"])
    for name, split, clips, people in (
        ("shards", "train", TRAIN_CLIPS, TRAIN_PEOPLE),
        ("held-out", "test", TEST_CLIPS, TEST_PEOPLE),
    ):
        corpus = out / "corpus" / split
        with progress_bar(f"speaking {clips} Cantonese clips ({split})") as on_progress:
            write_corpus(
                corpus, dialect="yue", split=split, clips=clips, people=people, seed=seed, on_progress=on_progress
            )
        with progress_bar(f"preparing shards ({split})") as on_progress:
            prepare(corpus, out / name, Settings(model, dialect="yue"), on_progress)


def _train(
    out: Path, manifest: RunManifest, peers: int, cheater: bool, console: Console
) -> tuple[Board, list[Process], Process | None]:
    board = Board(manifest.rounds.rounds)
    deadline = time.monotonic() + SECONDS_A_ROUND * (manifest.rounds.rounds + 1)
    with (
        Live(board, console=console, refresh_per_second=4, transient=False),
        fleet_of(out / "swarm", out / "run.json", peers, out / "shards", board.on_event) as (fleet, processes),
    ):
        cheat = _start_cheat(fleet, out / "run.json") if cheater else None
        for process in processes:
            code = process.wait(max(deadline - time.monotonic(), 1.0))
            if code != 0:
                raise TransportError(f"{process.name} ended with code {code}: {process.last_words()}")
    return board, processes, cheat


def _start_cheat(fleet: Fleet, run: Path) -> Process:
    entry = fleet.processes[0].maddr
    return fleet.peer(CHEAT, run, initial_peers=[entry], command=CHEAT_COMMAND)


def _score(out: Path, manifest: RunManifest, processes: list[Process], console: Console) -> dict[str, Any]:
    """Score the first, the last and some states between on held-out speakers, draw the curve, write the adapter."""
    saved = runs.open_run(str(out / "run.json"), out / "swarm" / processes[0].name)
    task = runs.build_task(manifest)
    held_out = runs.shard_paths(out / "held-out")
    like = task.initial_params()
    held = sorted(saved.held, reverse=True)  # but for rounds that this peer was late for
    numbers = sorted({0, *held[:: math.ceil(max(saved.held) / CURVE_POINTS)]})
    curve = []
    rates: dict[int, Any] = {}
    with progress_bar("scoring states on held-out speakers") as on_progress:
        for done, number in enumerate(numbers):
            on_progress(done, len(numbers))
            params = None if number == 0 else saved.state(number, like).params
            rates[number] = task.evaluate(params, held_out)
            curve.append((number, rates[number]["cer"]))
    last = numbers[-1]
    adapter = out / "adapter"
    runs.export(manifest, saved.state(last, like), adapter, task=task)
    _draw(curve, out / "curve.png")
    console.print(
        error_rate_table("held-out Cantonese speakers", {"before": rates[0], f"after {last} rounds": rates[last]})
    )
    ends = {process.events[-1].get("state") for process in processes}
    return {
        "cer_before": rates[0]["cer"],
        "cer_after": rates[last]["cer"],
        "rounds": last,
        "peers": len(processes),
        "state_digests_equal": len(ends) == 1 and ends == {saved.held[last].hex()},
        "adapter_dir": str(adapter.resolve()),
        "curve": [{"round": number, "cer": cer} for number, cer in curve],
        "bytes_sent": sum(process.seen("round")[-1]["bytes_sent"] for process in processes),
    }


def _draw(curve: list[tuple[int, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    rounds = [number for number, _ in curve]
    errors = [100 * cer for _, cer in curve]
    axes.plot(rounds, errors, marker="o", color="#1f6f8b")
    for number, error in zip(rounds, errors, strict=True):
        axes.annotate(f"{error:.1f}", (number, error), textcoords="offset points", xytext=(6, 6), fontsize=8)
    axes.set(
        xlabel="rounds averaged",
        ylabel="character error rate, %",
        title="Held-out Cantonese speakers (synthetic speech)",
        ylim=(0, max(errors) * 1.12),
        xticks=rounds,
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=144)
    plt.close(figure)
