"""One round of averaging among peers on loopback, beside hivemind's own averager with float16.

Both sides find a group over a real DHT and then average; the clock covers both. Every peer has its
own network process and libp2p daemon. Megabytes are those that crossed the loopback interface.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from p2pasr.averaging.codec import Layout
from p2pasr.averaging.merkle import Tree, part_digests
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.config import LinkConfig, NodeConfig
from p2pasr.peers.identity import Identity, load_or_create
from p2pasr.peers.link import Link
from p2pasr.protocol.assignment import assign
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import NO_TICKET, Claim, seal
from p2pasr.protocol.tiers import EVERY

VALUES = 1_769_472
"""Trained values of whisper-small with LoRA of rank 16 on q_proj and v_proj."""

STATE = bytes(32)
WARM_UP_ROUNDS = 2
WINDOW_SECONDS = 8.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table, as `--json` prints it."""

    system: str
    peers: int
    codec: str
    seconds: float
    megabytes: float
    relative_error: float
    bits_equal: bool


def measure(peers: int, codecs: list[str], rounds: int) -> list[Row]:
    """Average random deltas: hivemind with float16 and ours with each codec, turn by turn."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="p2pasr-bench-")))
        swarms: list[_Hivemind | _Ours] = [stack.enter_context(_hivemind(peers))]
        swarms += [stack.enter_context(swarm_of(peers, codec, folder / codec)) for codec in codecs]
        tallies = [_Tally(swarm) for swarm in swarms]
        for number in range(rounds + WARM_UP_ROUNDS):
            deltas = _deltas(peers, number)
            for tally in tallies:
                tally.add(deltas, number)
        return [tally.row(peers) for tally in tallies]


@dataclass(slots=True)
class _Tally:
    """What one system's rounds came to."""

    swarm: _Hivemind | _Ours
    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    equal: bool = True

    def add(self, deltas: list[np.ndarray], number: int) -> None:
        """Run a round; the first ones, in which connections are opened, count for equality only."""
        run = self.swarm.prepare(deltas, number)
        before, started = _loopback_bytes(), time.perf_counter()
        run()
        elapsed, sent = time.perf_counter() - started, _loopback_bytes() - before
        results = self.swarm.results()
        self.equal &= all(np.array_equal(results[0], result) for result in results)
        if number >= WARM_UP_ROUNDS:
            wanted = np.mean(deltas, axis=0)
            self.seconds.append(elapsed)
            self.megabytes.append(sent / 1e6)
            self.errors.append(max(_relative_error(result, wanted) for result in results))

    def row(self, peers: int) -> Row:
        """The line of the table."""
        name, codec = self.swarm.name, self.swarm.codec
        return Row(name, peers, codec, median(self.seconds), median(self.megabytes), max(self.errors), self.equal)


@dataclass(slots=True)
class _Ours:
    """Network processes that know a run of the benchmark's size."""

    codec: str
    manifest: RunManifest
    links: list[Link]
    identities: list[Identity]
    stores: list[BlobStore]
    averages: list[bytes] = field(default_factory=list)
    name: str = "p2pasr"

    def prepare(self, deltas: list[np.ndarray], number: int) -> Callable[[], None]:
        """Commit to the deltas, as training processes do before anybody looks for a group."""
        calls = [self._commit(index, delta, number) for index, delta in enumerate(deltas)]

        def run() -> None:
            with ThreadPoolExecutor(len(calls)) as pool:
                answers = pool.map(lambda link, call: link.call("average", 120.0, **call), self.links, calls)
                self.averages = [answer["average"] for answer in answers]

        return run

    def results(self) -> list[np.ndarray]:
        """The decoded average of every peer."""
        layout = Layout.of(VALUES, self.manifest.averaging)
        return [layout.decode(store.get(average)) for store, average in zip(self.stores, self.averages, strict=True)]

    def _commit(self, index: int, delta: np.ndarray, number: int) -> dict[str, Any]:
        parts = Layout.of(VALUES, self.manifest.averaging).encode(delta)
        blob = self.stores[index].put("delta", *parts)
        return self.call(index, number, blob, part_digests(parts), float(np.linalg.norm(delta)))

    def call(self, index: int, number: int, delta: bytes, digests: Sequence[bytes], length: float) -> dict[str, Any]:
        """The arguments of `average` for a delta that one of the peers committed to."""
        manifest, identity = self.manifest, self.identities[index]
        steps = manifest.rounds.segments * manifest.rounds.steps_per_segment
        claim = Claim(
            run=manifest.run_id,
            peer=identity.peer,
            ticket=NO_TICKET,
            round=number,
            state=STATE,
            shards=assign(manifest, STATE, {}, identity.peer),
            tier=EVERY,
            seconds=0.0,
            segments=manifest.rounds.segments,
            steps=steps,
            samples=steps * manifest.rounds.samples_per_step,
            trace_root=STATE,
            delta_root=Tree("delta", manifest.run_id, number, identity.peer).root(digests),
            delta_norm=length,
            loss_before=1.0,
            loss_after=1.0,
            hardware="benchmark",
            against=(),
            strikes=(),
            undo=(),
        )
        return {
            "round": number,
            "state": STATE,
            "covered": {},
            "credit": {},
            "bans": {},
            "suspended": {},
            "guests": {},
            "bits": 0,
            "claim": seal(identity, claim).pack(),
            "delta": delta,
            "reference": None,
            "limits": None,
            "expected": [identity.peer for identity in self.identities],
            "shunned": (),
            "min_size": len(self.links),
            "window": WINDOW_SECONDS,
            "timeout": 60.0,
        }


@contextlib.contextmanager
def swarm_of(peers: int, codec: str, folder: Path, values: int = VALUES) -> Iterator[_Ours]:
    """Network processes of peers that know a run with so many trained values."""
    manifest = RunManifest.model_validate(
        {
            "name": "averaging benchmark",
            "task": {"kind": "lora"},
            "rounds": {"rounds": 1000, "shards_per_peer": 1},
            "averaging": {"codec": codec},
            "shards": ({"digest": "ab" * 32, "bytes": 1, "clips": 1, "seconds": 60.0, "dialect": "yue"},),
            "initial": "00" * 32,
            "parameters": values,
        }
    )
    swarm = _Ours(codec, manifest, [], [], [])
    with contextlib.ExitStack() as stack:
        entry: tuple[str, ...] = ()
        for number in range(peers):
            home = folder / str(number)
            store = BlobStore(home / "blobs")
            store.put("manifest", manifest.canonical())
            key = home / "identity.key"
            swarm.identities.append(load_or_create(key))
            swarm.stores.append(store)
            node = NodeConfig(
                identity_path=str(key), socket_dir="", host_maddrs=("/ip4/127.0.0.1/tcp/0",), initial_peers=entry
            )
            config = LinkConfig(node=node, run=manifest.run_id, store_root=str(store.root))
            link = Link(config, lambda _event: None, home)
            stack.callback(link.stop)
            link.start()
            link.joined()
            entry = entry or link.maddrs[:1]
            swarm.links.append(link)
        yield swarm


@dataclass(slots=True)
class _Hivemind:
    """hivemind's averager as its documentation uses it: float16, a group of all peers."""

    averagers: list[Any]
    name: str = "hivemind"
    codec: str = "float16"

    def prepare(self, deltas: list[np.ndarray], _number: int) -> Callable[[], None]:
        """Set every averager's tensors."""
        import torch

        for averager, delta in zip(self.averagers, deltas, strict=True):
            with averager.get_tensors() as tensors:
                tensors[0][:] = torch.from_numpy(delta)

        def run() -> None:
            steps = [averager.step(wait=False, timeout=60.0) for averager in self.averagers]
            for step in steps:
                step.result(timeout=60.0)

        return run

    def results(self) -> list[np.ndarray]:
        """What every averager holds."""
        values = []
        for averager in self.averagers:
            with averager.get_tensors() as tensors:
                values.append(tensors[0].numpy().copy())
        return values


@contextlib.contextmanager
def _hivemind(peers: int) -> Iterator[_Hivemind]:
    import torch
    from hivemind import DHT
    from hivemind.averaging import DecentralizedAverager
    from hivemind.compression import Float16Compression

    logging.getLogger("hivemind").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        dhts: list[Any] = []
        for _ in range(peers):
            entry = [str(maddr) for maddr in dhts[0].get_visible_maddrs()] if dhts else None
            dhts.append(DHT(initial_peers=entry, host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True))
            stack.callback(dhts[-1].shutdown)
        averagers = []
        for dht in dhts:
            averagers.append(
                DecentralizedAverager(
                    [torch.zeros(VALUES)],
                    dht,
                    prefix="benchmark",
                    target_group_size=peers,
                    min_group_size=peers,
                    min_matchmaking_time=WINDOW_SECONDS,
                    request_timeout=3.0,
                    compression=Float16Compression(),
                    start=True,
                )
            )
            stack.callback(averagers[-1].shutdown)
        yield _Hivemind(averagers)


def _deltas(peers: int, number: int) -> list[np.ndarray]:
    draw = np.random.default_rng(number)
    return [draw.standard_normal(VALUES, dtype=np.float32) * np.float32(1e-3) for _ in range(peers)]


def _relative_error(actual: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(actual - wanted) / np.linalg.norm(wanted))


def _loopback_bytes() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    return 0
