"""What of a round's time is training when peers have links of a home's speed.

Every peer lives in a network namespace of its own, behind a token bucket on its uplink; a bridge in another one joins
them. Training is replaced by waiting (`benchmarks.idle`), so that many peers fit on few cores: what is measured is
what the protocol adds at the size of a real delta, that of Whisper small with LoRA of rank 16 on q_proj and v_proj
(1,769,472 values), sent as int8. Needs root, `ip` and `tc`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Final

from benchmarks.idle import COMMAND, new_idle_run
from benchmarks.swarm import auditing_seconds, bytes_sent, later_seconds, training_seconds
from p2pasr.demo.fleet import NODE, Event, Fleet, Process
from p2pasr.errors import LocalError, TransportError
from p2pasr.peer import interrupt_on_terminate

VALUES: Final = 1_769_472
SEGMENTS: Final = 4
SUBNET: Final = "10.213.7"
MARKS: Final = ("step", "group", "round")
ROUND_SECONDS: Final = 60.0
"""What a round may take beyond its training before it has gone wrong."""

BURST_BYTES: Final = 65_536
QUEUE_MILLISECONDS: Final = 50


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table, as `--json` prints it."""

    peers: int
    mbit: float
    seconds_a_round: float
    training_percent: float
    auditing_percent: float
    megabytes_sent_a_round: float


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a round, and its seconds in the mean of all rounds and peers."""

    step: str
    seconds: float


def measure(peers: int, mbit: float, seconds: float, rounds: int) -> tuple[Row, list[Step]]:
    """Train `rounds` rounds of `seconds` seconds, and one before them in which shards are fetched.

    Raises:
        LocalError: this is not root, or the machine cannot make network namespaces.
        TransportError: a peer failed.
    """
    if os.geteuid() != 0:
        raise LocalError("only root can make network namespaces: run this benchmark as root")
    if shutil.which("ip") is None or shutil.which("tc") is None:
        raise LocalError("this benchmark needs the commands ip and tc: install iproute2")
    interrupt_on_terminate()
    with tempfile.TemporaryDirectory(prefix="p2pasr-bench-") as name, _namespaces(peers + 1, mbit) as spaces:
        processes = _train(Path(name), spaces, seconds, rounds)
    row = Row(
        peers=peers,
        mbit=mbit,
        seconds_a_round=mean(later_seconds(p) / rounds for p in processes),
        training_percent=100 * mean(training_seconds(p) / later_seconds(p) for p in processes),
        auditing_percent=100 * mean(auditing_seconds(p) / later_seconds(p) for p in processes),
        megabytes_sent_a_round=mean(bytes_sent(p) / rounds for p in processes) / 1e6,
    )
    lengths = [lengths_of_steps(p.events) for p in processes]
    steps = dict.fromkeys(name for length in lengths for name in length)
    return row, [Step(name, mean(length.get(name, 0.0) for length in lengths) / rounds) for name in steps]


def lengths_of_steps(events: Sequence[Event]) -> dict[str, float]:
    """Seconds that a peer spent in each step, from the end of its first round to the end of its last.

    A step lasts from its event to the next one's; `group` is the exchange with the group that `average` found,
    `round` what passes between two rounds.
    """
    marks = [(e["event"] if e["event"] != "step" else e["step"], e["time"]) for e in events if e["event"] in MARKS]
    ends = [number for number, (name, _) in enumerate(marks) if name == "round"]
    lengths: Counter[str] = Counter()
    for (name, began), (_, ended) in itertools.pairwise(marks[ends[0] + 1 : ends[-1] + 1]):
        lengths[name] += ended - began
    return dict(lengths)


def _train(folder: Path, spaces: Sequence[str], seconds: float, rounds: int) -> list[Process]:
    """Let a bootstrap node in the first namespace and peers in the others train; returns the peers' processes."""
    steps = max(1, round(seconds / SEGMENTS))
    section = {"rounds": rounds + 1, "segments": SEGMENTS, "steps_per_segment": steps, "min_peers": len(spaces) - 1}
    run = new_idle_run(folder, VALUES, seconds / SEGMENTS / steps, "int8", {**section, "max_seconds": 2 * seconds})
    with Fleet(folder) as fleet:
        node = fleet.bootstrap("bootstrap", *_listen(0), command=(*_inside(spaces[0]), *NODE))
        peers = [
            fleet.peer(
                f"peer-{number}",
                run,
                *_listen(number),
                *(("--seed-data", str(folder / "shards")) if number == 1 else ()),
                initial_peers=[node.maddr],
                command=(*_inside(space), *COMMAND),
            )
            for number, space in enumerate(spaces[1:], 1)
        ]
        for peer in peers:
            if peer.wait((rounds + 1) * (seconds + ROUND_SECONDS)) != 0:
                raise TransportError(f"{peer.name} failed: {peer.last_words()}")
    return peers


def _listen(number: int) -> tuple[str, str]:
    return "--host-maddrs", f"/ip4/{SUBNET}.{number + 1}/tcp/0"


def _inside(space: str) -> tuple[str, ...]:
    return "ip", "netns", "exec", space


@contextlib.contextmanager
def _namespaces(count: int, mbit: float) -> Iterator[list[str]]:
    """Namespaces that a bridge joins, each with an uplink of `mbit` Mbit/s; nothing of them is left.

    Interfaces and the bridge lie in the namespaces alone and go with them.
    """
    hub, *spaces = names = [f"p2pasr-{os.getpid()}-{number}" for number in range(count + 1)]
    try:
        for name in names:
            _command("ip", "netns", "add", name)
            _command("ip", "-n", name, "link", "set", "lo", "up")
        _command("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        _command("ip", "-n", hub, "link", "set", "bridge", "up")
        for number, space in enumerate(spaces):
            port = f"port{number}"
            _command("ip", "-n", hub, "link", "add", port, "type", "veth", "peer", "name", "uplink", "netns", space)
            _command("ip", "-n", hub, "link", "set", port, "master", "bridge", "up")
            _command("ip", "-n", space, "address", "add", f"{SUBNET}.{number + 1}/24", "dev", "uplink")
            _command("ip", "-n", space, "link", "set", "uplink", "up")
            limits = ("rate", f"{mbit}mbit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_MILLISECONDS}ms")
            _command("tc", "-n", space, "qdisc", "add", "dev", "uplink", "root", "tbf", *limits)
        yield spaces
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _command(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise LocalError(f"'{' '.join(command)}' failed ({done.stderr.strip()}): this machine cannot limit links")
