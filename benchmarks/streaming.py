"""A large student's delta through a round: how much memory it takes beyond the model.

Peers with real network processes commit to deltas of a Transformer's shape, average them and apply
the result, by the functions that a round calls. Peaks are what the operating system counted beyond
what was resident before: of a network process with its libp2p daemon (the mean of the peers), and of
the training side without the parameters that a step results in.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil

from benchmarks.averaging import swarm_of
from p2pasr.averaging import outer
from p2pasr.averaging.codec import Decoded, Layout
from p2pasr.deltas import write_delta
from p2pasr.member import Member
from p2pasr.protocol.tensors import Tensors

WIDTH = 1024
VOCABULARY = 51_865
MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table, as `--json` prints it; megabytes are 10⁶ bytes."""

    values: int
    peers: int
    codec: str
    encoded_megabytes: float
    commit_peak: float
    network_peak: float
    apply_peak: float
    worst_multiple: float
    seconds_commit: float
    seconds_average: float
    seconds_apply: float
    bits_equal: bool


def measure(values: int, peers: int, codecs: list[str]) -> list[Row]:
    """Pass a delta of so many values through a round with each codec."""
    return [_measure(values, peers, codec) for codec in codecs]


def _measure(values: int, peers: int, codec: str) -> Row:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="p2pasr-bench-")))
        swarm = stack.enter_context(swarm_of(peers, codec, folder, values))
        layout = Layout.of(values, swarm.manifest.averaging)
        before = model(values)
        calls, commit_peaks, commit_seconds = [], [], []
        for index in range(peers):
            after = _trained(before, index)
            with _Peak(None) as peak:
                encoded = write_delta(_member(swarm, index, before), before, after)
            commit_peaks.append(peak.bytes)
            commit_seconds.append(peak.seconds)
            calls.append(swarm.call(index, 0, encoded.digest, encoded.parts, encoded.norm))
            del after
        watched = [_Peak(process.pid) for process in psutil.Process().children(recursive=True)]
        with ExitStack() as watching, ThreadPoolExecutor(peers) as pool:
            for each in watched:
                watching.enter_context(each)
            answers = list(pool.map(lambda link, call: link.call("average", 1800.0, **call), swarm.links, calls))
        store, section = swarm.stores[0], swarm.manifest.averaging.outer
        with _Peak(None) as applied:
            delta = Decoded(store.get(answers[0]["average"]), layout, before)
            moved, _ = outer.step(before, {}, delta, section, 0)
        model_bytes = sum(array.nbytes for array in moved.values())
    total = layout.total_bytes
    network, apply_peak = sum(each.bytes for each in watched) // peers, applied.bytes - model_bytes
    return Row(
        values=values,
        peers=peers,
        codec=codec,
        encoded_megabytes=total / 1e6,
        commit_peak=max(commit_peaks) / 1e6,
        network_peak=network / 1e6,
        apply_peak=apply_peak / 1e6,
        worst_multiple=max(*commit_peaks, network, apply_peak) / total,
        seconds_commit=max(commit_seconds),
        seconds_average=max(each.seconds for each in watched),
        seconds_apply=applied.seconds,
        bits_equal=len({answer["average"] for answer in answers}) == 1,
    )


def model(values: int) -> Tensors:
    """Zeros in the shapes of a Transformer: an embedding, then layers of 4 · width² and of width, then the rest."""
    params: Tensors = {}
    left = values
    for number, shape in enumerate([(VOCABULARY, WIDTH), *[(4 * WIDTH, WIDTH), (WIDTH,)] * (values // WIDTH)]):
        size = int(np.prod(shape))
        if size <= left:
            params[f"layer.{number:05d}"] = np.zeros(shape, dtype=np.float32)
            left -= size
    if left:
        params["rest"] = np.zeros(left, dtype=np.float32)
    return params


def _trained(before: Tensors, seed: int) -> Tensors:
    draw = np.random.default_rng(seed)
    return {
        name: array + draw.standard_normal(array.shape, dtype=np.float32) * np.float32(1e-3)
        for name, array in before.items()
    }


def _member(swarm: Any, index: int, params: Tensors) -> Member:
    """As much of a member as writing a delta takes."""
    state = SimpleNamespace(params=params)
    return cast(Member, SimpleNamespace(manifest=swarm.manifest, store=swarm.stores[index], state=state))


class _Peak:
    """How far a process's resident memory rose above what it was at the beginning.

    Args:
        pid: the process; None for this one.
    """

    def __init__(self, pid: int | None) -> None:
        self._folder = Path("/proc") / (str(pid) if pid is not None else "self")
        self.bytes = 0
        self.seconds = 0.0

    def __enter__(self) -> _Peak:
        (self._folder / "clear_refs").write_text("5")  # the kernel's peak starts over
        self._before = self._status("VmRSS")
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self.bytes = max(0, self._status("VmHWM") - self._before)

    def _status(self, name: str) -> int:
        line = next(line for line in (self._folder / "status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024
