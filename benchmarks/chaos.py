"""What becomes of a run whose peers are killed at any moment and started again.

Real peers on loopback train rounds of about four seconds (`benchmarks.idle`). In every round each peer is killed with
a given probability, at a moment drawn from the length of a round: the training process alone, or in every other case
with its network process and libp2p's daemon. It is started again at once with the same state folder. In the last
rounds nobody is killed, so that everybody can end together.
"""

from __future__ import annotations

import contextlib
import queue
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from benchmarks.idle import COMMAND, new_idle_run
from p2pasr.demo.fleet import Event, Fleet, Process
from p2pasr.errors import TransportError
from p2pasr.peers.journal import Journal
from p2pasr.protocol.manifest import read_manifest
from p2pasr.runs import run_folder

VALUES: Final = 4096
STEP_SECONDS: Final = 0.25
"""So that a segment takes longer than a peer that comes back needs to fetch the state, as it does in earnest."""

STUCK_SECONDS: Final = 60.0
"""Far beyond a round's length: when nobody commits for so long, the round counts as stuck."""

GIVE_UP_SECONDS: Final = 300.0
END_SECONDS: Final = 5.0
QUIET_ROUNDS: Final = 4
"""Rounds at the end in which nobody is killed."""

FIRST_ROUND_SECONDS: Final = 4.0
"""What a round is taken to last before one has been seen."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table, as `--json` prints it."""

    peers: int
    rounds: int
    kills: int
    divergent_states: int
    stuck_rounds: int
    most_rounds_to_be_back: int
    seconds_a_round: float


@dataclass(frozen=True, slots=True)
class Commit:
    """A peer reported that a round is committed; `time` in seconds since 1970."""

    peer: str
    round: int
    time: float


def measure(peers: int, rounds: int, percent: float, seed: int) -> Row:
    """Run a swarm in which each peer is killed in `percent` per cent of the rounds.

    Raises:
        TransportError: a peer ended by itself, or nobody commits a round any more.
    """
    with tempfile.TemporaryDirectory(prefix="p2pasr-bench-") as name:
        return run(Path(name), peers, rounds, percent, seed)


def run(folder: Path, peers: int, rounds: int, percent: float, seed: int) -> Row:
    """The same in a folder that is kept."""
    section = {"rounds": rounds, "segments": 2, "steps_per_segment": 5, "max_seconds": 5.0, "grace_seconds": 5.0}
    manifest = new_idle_run(folder, VALUES, STEP_SECONDS, "int8", {**section, "min_peers": 2})
    events: queue.SimpleQueue[tuple[Process, Event]] = queue.SimpleQueue()
    with Fleet(folder, lambda process, event: events.put((process, event))) as fleet:
        chaos = _Chaos(fleet, manifest, peers, rounds, percent, random.Random(seed))
        chaos.watch(events)
        chaos.returns += chaos.away.items()
    run_id = read_manifest(manifest).run_id
    held = [Journal.read_held(run_folder(folder / peer, run_id)) for peer in chaos.lives]
    return Row(
        peers=peers,
        rounds=rounds,
        kills=chaos.kills,
        divergent_states=divergent(held),
        stuck_rounds=chaos.stuck,
        most_rounds_to_be_back=max(rounds_to_be_back(*life, chaos.commits) for life in chaos.returns),
        seconds_a_round=chaos.seconds_a_round(),
    )


def divergent(held: Sequence[Mapping[int, bytes]]) -> int:
    """In how many rounds the lineages of peers differ.

    Args:
        held: for each peer, round → digest of the state that it holds before it.
    """
    numbers = {number for lineage in held for number in lineage}
    return sum(len({lineage[number] for lineage in held if number in lineage}) > 1 for number in numbers)


def rounds_to_be_back(peer: str, since: float, commits: Sequence[Commit]) -> int:
    """How many rounds the swarm committed until a peer that came back committed one with it, that one included.

    Args:
        since: when the peer was up again, seconds since 1970.
        commits: of all peers, oldest first; a round counts when the first of them reports it.
    """
    first: dict[int, float] = {}
    for commit in commits:
        first.setdefault(commit.round, commit.time)
    own = min((c.round for c in commits if c.peer == peer and c.time >= since), default=max(first, default=-1) + 1)
    return sum(number <= own and at >= since for number, at in first.items())


class _Chaos:
    """Kills and restarts until the run is over.

    Attributes:
        lives: peer → its process, the newest.
        commits: what was committed, in the order of the reports.
        returns: (peer, when it was up again) for each restart whose peer came back into a round.
        away: the same for those that are not back yet; a peer that is killed again before is left out.
    """

    def __init__(self, fleet: Fleet, run: Path, peers: int, rounds: int, percent: float, rng: random.Random) -> None:
        self._fleet, self._run, self._rounds, self._share, self._rng = fleet, run, rounds, percent / 100, rng
        self._entry = fleet.bootstrap().maddr
        self._kill_at: dict[str, float] = {}
        self.kills = self.stuck = 0
        self.commits: list[Commit] = []
        self.returns: list[tuple[str, float]] = []
        self.away: dict[str, float] = {}
        self.lives = {name: self._start(name) for name in (f"peer-{number}" for number in range(1, peers + 1))}

    def watch(self, events: queue.SimpleQueue[tuple[Process, Event]]) -> None:
        """Take part in the run's fate until every peer has left it.

        Raises:
            TransportError: a peer ended by itself, or nobody commits a round any more.
        """
        last = time.time()
        counted = False
        while any(process.exit_code is None for process in self.lives.values()):
            with contextlib.suppress(queue.Empty):
                process, event = events.get(timeout=0.02)
                if self._take(process, event):
                    last, counted = time.time(), False
            silent = time.time() - last
            if silent > STUCK_SECONDS and not counted:
                self.stuck, counted = self.stuck + 1, True
            if silent > GIVE_UP_SECONDS:
                said = "; ".join(f"{process.name}: {process.last_words()}" for process in self.lives.values())
                raise TransportError(f"no peer has committed a round for {silent:.0f} s ({said})")
            self._kill_due()
            for process in self.lives.values():
                if process.exit_code not in (None, 0):
                    raise TransportError(f"{process.name} ended by itself: {process.last_words()}")
        for process in self.lives.values():
            process.wait(END_SECONDS)  # until all that it said is read
        while not events.empty():
            self._take(*events.get())

    def seconds_a_round(self) -> float:
        """Mean time from one round's first commit to the next's."""
        first, last = self.commits[0], max(self.commits, key=lambda commit: commit.round)
        if last.round == first.round:
            return FIRST_ROUND_SECONDS
        return (last.time - first.time) / (last.round - first.round)

    def _start(self, name: str) -> Process:
        seeds = ("--seed-data", str(self._fleet.folder / "shards"))
        return self._fleet.peer(name, self._run, *seeds, initial_peers=[self._entry], command=COMMAND)

    def _take(self, process: Process, event: Event) -> bool:
        """Note an event; returns whether it is a commit."""
        if process is not self.lives.get(process.name):
            return False
        if event["event"] == "ready":
            self.away[process.name] = event["time"]
        if event["event"] != "round":
            return False
        if process.name in self.away:
            self.returns.append((process.name, self.away.pop(process.name)))
        begins_a_round = all(event["round"] > commit.round for commit in self.commits)
        self.commits.append(Commit(process.name, event["round"], event["time"]))
        if begins_a_round:
            self._plan(event["round"] + 1)
        return True

    def _plan(self, number: int) -> None:
        """Draw who is killed in a round, and when."""
        for name in self.lives:
            chosen, moment = self._rng.random() < self._share, self._rng.random()
            if chosen and number < self._rounds - QUIET_ROUNDS:
                self._kill_at.setdefault(name, time.time() + moment * self.seconds_a_round())

    def _kill_due(self) -> None:
        for name in [name for name, at in self._kill_at.items() if at <= time.time()]:
            del self._kill_at[name]
            if self.lives[name].exit_code is None:
                self.kills += 1
                _kill(self.lives[name], whole=self.kills % 2 == 0)
                self.away.pop(name, None)
                self.lives[name] = self._start(name)


def _kill(process: Process, *, whole: bool) -> None:
    """End a peer's training process as a power cut would, with all that it started if `whole`."""
    others = psutil.Process(process.popen.pid).children(recursive=True) if whole else []
    process.kill()
    for other in others:
        with contextlib.suppress(psutil.NoSuchProcess):
            other.kill()
