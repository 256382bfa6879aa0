"""A small run, its peers, their claims and a finished round: what most tests start from."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hivemind.p2p import P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from p2pasr.averaging import rules
from p2pasr.averaging.codec import Flat, Layout, Vector
from p2pasr.averaging.merkle import Tree, part_digests
from p2pasr.peers.config import LinkConfig, NodeConfig
from p2pasr.peers.host import Host
from p2pasr.peers.identity import Identity
from p2pasr.peers.streams import Pacer, Stream
from p2pasr.protocol.admission import newcomers
from p2pasr.protocol.assignment import assign
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import (
    NO_TICKET,
    NO_UNDO,
    Attestation,
    Claim,
    Mix,
    PartReceipt,
    Receipt,
    Roster,
    Signed,
    seal,
)
from p2pasr.protocol.rules import RoundView
from p2pasr.protocol.rules import view_of as round_view
from p2pasr.protocol.state import State, genesis, params_digest
from p2pasr.protocol.tensors import Tensors
from p2pasr.protocol.tiers import EVERY
from p2pasr.rerunning import train_segment
from p2pasr.tasks.base import Checkpoint, OnStep, SegmentPlan, SegmentReport
from p2pasr.verify.record import RoundRecord

GROUP: Final = b"group of the tests"
SHARDS: Final = 6
PARAMETERS: Final = 600


def digest_of(text: str) -> bytes:
    """A digest that stands for something."""
    return blob_digest(text.encode())


def make_identity(number: int) -> Identity:
    """The same key for the same number, from 0 to 255."""
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


def initial_params() -> Tensors:
    """600 values in two arrays: two whole parts of 256 and one of 88."""
    return {
        "encoder.a": (np.arange(-100, 100) / 128).astype(np.float32).reshape(20, 10),
        "decoder.b": (np.arange(-200, 200) / 4096).astype(np.float32),
    }


def manifest_content(**changes: Any) -> dict[str, Any]:
    """The content of a manifest; a dict among the changes is merged into its section."""
    content: dict[str, Any] = {
        "name": "a small run",
        "task": {"kind": "toy", "config": {"learning_rate": 0.5}},
        "rounds": {
            "rounds": 8,
            "segments": 4,
            "steps_per_segment": 3,
            "samples_per_step": 2,
            "shards_per_peer": 2,
        },
        "averaging": {"codec": "float32", "block": 16, "part_values": 256},
        "shards": tuple(
            {
                "digest": digest_of(f"shard {number}").hex(),
                "bytes": 1000 + number,
                "clips": 10,
                "seconds": 60.0 + number,
                "dialect": "yue",
            }
            for number in range(SHARDS)
        ),
        "initial": params_digest(initial_params()).hex(),
        "parameters": PARAMETERS,
    }
    for name, change in changes.items():
        content[name] = {**content.get(name, {}), **change} if isinstance(change, dict) else change
    return content


def make_manifest(**changes: Any) -> RunManifest:
    """A manifest of six shards and 600 parameters."""
    return RunManifest.model_validate(manifest_content(**changes))


def make_state(manifest: RunManifest) -> State:
    """The state before round 0."""
    return genesis(manifest, initial_params())


def view_of(manifest: RunManifest, state: State) -> RoundView:
    """What a peer that holds this state judges the round by."""
    return round_view(state, manifest)


def make_claim(who: Identity, manifest: RunManifest, held: State, /, **changes: Any) -> Claim:
    """A claim that the rules accept, but for the changes."""
    segments = changes.pop("segments", 2)
    steps = segments * manifest.rounds.steps_per_segment
    fields: dict[str, Any] = {
        "run": held.run,
        "peer": who.peer,
        "ticket": NO_TICKET,
        "round": held.round,
        "state": held.digest,
        "shards": assign(manifest, held.digest, held.covered, who.peer, tier=changes.get("tier", EVERY)),
        "tier": EVERY,
        "seconds": 0.0,
        "segments": segments,
        "steps": steps,
        "samples": steps * manifest.rounds.samples_per_step,
        "trace_root": digest_of(f"trace of {who.peer}"),
        "delta_root": digest_of(f"delta of {who.peer}"),
        "delta_norm": 1.5,
        "loss_before": 4.0,
        "loss_after": 3.5,
        "hardware": "cpu x86-64",
        "against": (),
        "strikes": (),
        "undo": (NO_UNDO,) * len(changes.get("against", ())),
    }
    return Claim(**{**fields, **changes})


def make_attestation(who: Identity, held: State, /, **changes: Any) -> Attestation:
    """The attestation of an honest peer that holds this state, but for the changes."""
    fields: dict[str, Any] = {
        "run": held.run,
        "peer": who.peer,
        "ticket": NO_TICKET,
        "round": held.round,
        "state": held.digest,
        "ancestors": (held.parent,) if held.round else (),
        "work": float(held.work),
    }
    return Attestation(**{**fields, **changes})


def make_roster(who: Identity, held: State, /, **changes: Any) -> Roster:
    """What an honest peer says while it trains, but for the changes."""
    fields: dict[str, Any] = {
        "run": held.run,
        "peer": who.peer,
        "ticket": NO_TICKET,
        "round": held.round,
        "state": held.digest,
        "stage": "training",
        "segments": 1,
        "closes_at": 1_700_000_000.5,
        "client_mode": False,
        "hardware": "cpu x86-64",
        "version": "0.1.0",
        "addresses": ("/ip4/203.0.113.5/tcp/31337/p2p/" + who.peer,),
    }
    return Roster(**{**fields, **changes})


def make_mix(who: Identity, held: State, /, **changes: Any) -> Mix:
    """What a peer that votes for two cohorts states about a mix, but for the changes."""
    fields: dict[str, Any] = {
        "run": held.run,
        "peer": who.peer,
        "ticket": NO_TICKET,
        "round": held.round,
        "state": held.digest,
        "common": digest_of("the state before the cohorts parted"),
        "root": digest_of("what the cohort learned"),
        "serves": True,
        "cohorts": (0, 1),
        "chosen": digest_of("both cohorts"),
    }
    return Mix(**{**fields, **changes})


def random_delta(seed: int, values: int = PARAMETERS) -> Vector:
    """A delta of normal values."""
    return np.random.default_rng(seed).normal(size=values).astype(np.float32)


def delta_claim(who: Identity, manifest: RunManifest, held: State, delta: Vector, /, **changes: Any) -> Claim:
    """A claim whose root commits to a delta."""
    parts = Layout.of(manifest.parameters, manifest.averaging).encode(delta)
    root = Tree("delta", held.run, held.round, who.peer).root(part_digests(parts))
    return make_claim(who, manifest, held, delta_root=root, **changes)


def make_receipt(
    who: Identity,
    held: State,
    members: Sequence[Signed[Claim]],
    results: Mapping[int, bytes],
    senders: Mapping[int, Sequence[int]] | None = None,
    /,
    **changes: Any,
) -> Receipt:
    """The receipt of a reducer for parts with these results, from everybody unless said otherwise."""
    everybody = range(len(members))
    fields: dict[str, Any] = {
        "run": held.run,
        "peer": who.peer,
        "round": held.round,
        "state": held.digest,
        "group": GROUP,
        "members": tuple(member.digest for member in members),
        "parts": tuple(
            PartReceipt(index, tuple((senders or {}).get(index, everybody)), blob_digest(result))
            for index, result in sorted(results.items())
        ),
    }
    return Receipt(**{**fields, **changes})


@dataclass(frozen=True)
class FinishedRound:
    """A round of three honest peers."""

    manifest: RunManifest
    before: State
    view: RoundView
    identities: tuple[Identity, ...]
    record: RoundRecord
    average: bytes


def finish_round(manifest: RunManifest, before: State, after: bytes | None = None) -> FinishedRound:
    """Average three random deltas; the first two peers reduce."""
    identities = tuple(map(make_identity, (1, 2, 3)))
    layout = Layout.of(manifest.parameters, manifest.averaging)
    deltas = [random_delta(number) for number in range(3)]
    members = tuple(
        seal(who, delta_claim(who, manifest, before, delta)) for who, delta in zip(identities, deltas, strict=True)
    )
    claims = [member.message for member in members]
    weights = rules.weights(claims, manifest, before.standing, before.guests)
    order = rules.drawn_order(before.digest, [who.peer for who in identities])
    center = rules.Center(None, order, newcomers(claims, manifest, before.standing))
    encoded = [layout.encode(delta) for delta in deltas]
    results = {}
    for index in range(layout.parts):
        size = layout.part_size(index)
        parts = {position: layout.codec.decode(encoded[position][index], size) for position in range(3)}
        results[index] = layout.codec.encode(rules.aggregate(parts, weights, manifest.averaging.rule, center))
    shares = ({0: results[0]}, {index: results[index] for index in range(1, layout.parts)})
    receipts = tuple(
        seal(who, make_receipt(who, before, members, share)) for who, share in zip(identities[:2], shares, strict=True)
    )
    average = b"".join(results[index] for index in range(layout.parts))
    after = after or digest_of("the state after")
    attestations = tuple(
        seal(
            who,
            make_attestation(who, before, round=before.round + 1, state=after, ancestors=(before.digest,), work=300.0),
        )
        for who in identities
    )
    record = RoundRecord(
        run=before.run,
        round=before.round,
        before=before.digest,
        after=after,
        group=GROUP,
        members=members,
        receipts=receipts,
        average=blob_digest(average),
        attestations=attestations,
    )
    return FinishedRound(manifest, before, view_of(manifest, before), identities, record, average)


class ToyTask:
    """A task that draws its steps from the seed of the segment.

    Args:
        rate: how long they are.
    """

    hardware_class = "none"

    def __init__(self, rate: float = 0.01) -> None:
        self.rate = np.float32(rate)

    def segment(
        self, start: Checkpoint, _shards: Sequence[Path], plan: SegmentPlan, _on_step: OnStep | None = None
    ) -> tuple[Checkpoint, SegmentReport]:
        """Train one segment."""
        draw = np.random.default_rng(int.from_bytes(plan.seed[:8], "big"))
        steps = {k: draw.normal(size=v.shape).astype(np.float32) for k, v in sorted(start.params.items())}
        params = {name: start.params[name] + self.rate * step for name, step in steps.items()}
        moments = {f"{name}/exp_avg": step for name, step in steps.items()}
        return Checkpoint(params, moments, start.step + plan.steps), SegmentReport(1.0, plan.steps)


def train_toy(manifest: RunManifest, claim: Claim, segment: int, before: State, start: bytes | None) -> bytes:
    """The packed checkpoint at the end of one segment of a claim."""
    return train_segment(ToyTask(), manifest, claim, segment, before, start, (), None)


@dataclass(frozen=True)
class Trained:
    """A claim of a toy task with everything that it commits to: packed checkpoints and the encoded delta."""

    claim: Signed[Claim]
    checkpoints: tuple[bytes, ...]
    delta: bytes

    def way(self, index: int) -> tuple[bytes, ...]:
        """From a checkpoint to the trace's root."""
        message = self.claim.message
        tree = Tree("trace", message.run, message.round, message.peer)
        return tree.prove(part_digests(self.checkpoints), index)


def train_claim(
    who: Identity,
    manifest: RunManifest,
    before: State,
    segments: int = 3,
    *,
    spoil: Callable[[int, bytes], bytes] = lambda _index, checkpoint: checkpoint,
    lie: float = 0.0,
    **changes: Any,
) -> Trained:
    """The claim of a peer that trained.

    Args:
        spoil: what it makes of the checkpoint at the end of a segment.
        lie: what it adds to every value of its delta.
    """
    claim = make_claim(who, manifest, before, segments=segments, **changes)
    checkpoints: list[bytes] = []
    for index in range(segments):
        start = checkpoints[-1] if checkpoints else None
        checkpoints.append(spoil(index, train_toy(manifest, claim, index, before, start)))
    after = Checkpoint.unpack(checkpoints[-1]).params
    delta = Flat(after)[slice(0, manifest.parameters)] - Flat(before.params)[slice(0, manifest.parameters)]
    parts = Layout.of(manifest.parameters, manifest.averaging).encode(delta + np.float32(lie))
    roots = {
        kind: Tree(kind, before.run, before.round, who.peer).root(part_digests(items))
        for kind, items in (("trace", checkpoints), ("delta", parts))
    }
    claim = replace(claim, trace_root=roots["trace"], delta_root=roots["delta"], delta_norm=rules.norm(delta))
    return Trained(seal(who, claim), tuple(checkpoints), b"".join(parts))


class LocalNetwork:
    """Real hosts in one event loop, without daemon or DHT: a stream is a pair of sockets."""

    def __init__(self, folder: Path, run: bytes) -> None:
        self.folder = folder
        self.run = run
        self.hosts: dict[str, Host] = {}
        self.records: dict[tuple[str, str], dict[str, bytes]] = {}
        self.events: list[dict[str, Any]] = []
        self.serving: set[asyncio.Task[None]] = set()
        self.writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> LocalNetwork:
        return self

    async def __aexit__(self, *_: object) -> None:
        for writer in self.writers:
            writer.close()
        served = await asyncio.gather(*self.serving, return_exceptions=True)
        await asyncio.gather(*(writer.wait_closed() for writer in self.writers), return_exceptions=True)
        for outcome in served:
            if isinstance(outcome, Exception):
                raise outcome  # a handler must turn whatever a stranger sends into an answer

    def host(self, number: int, *, client_mode: bool = False) -> Host:
        """A new member of the network."""
        key = self.folder / f"{number}.key"
        key.write_bytes(make_identity(number).to_bytes())
        key.chmod(0o600)
        node = NodeConfig(identity_path=str(key), socket_dir="", client_mode=client_mode)
        host = Host(LinkConfig(node, self.run, str(self.folder / f"blobs {number}")), self.events.append)
        host.node._p2p = _LocalDaemon(self, host.peer)
        host.directory = _LocalDirectory(self, host.peer)
        self.hosts[host.peer] = host
        return host

    async def pair(self) -> tuple[tuple[asyncio.StreamReader, asyncio.StreamWriter], ...]:
        """Both ends of a stream; they are closed at the end although whoever asked is cancelled meanwhile."""
        return await asyncio.shield(self._open_pair())

    async def _open_pair(self) -> tuple[tuple[asyncio.StreamReader, asyncio.StreamWriter], ...]:
        ends = [await asyncio.open_connection(sock=end) for end in socket.socketpair()]
        self.writers += [writer for _, writer in ends]
        return tuple(ends)

    async def stream(self, peer: str = "12D3KooWfriend", timeout: float = 10.0) -> tuple[Stream, Stream]:
        """A stream of ours and its other end."""
        return tuple(Stream(peer, *end, Pacer(None), timeout) for end in await self.pair())


class _LocalDaemon:
    """As much of hivemind's `P2P` as a host needs."""

    def __init__(self, network: LocalNetwork, peer: str) -> None:
        self._network = network
        self.peer_id = PeerID.from_base58(peer)
        self.handlers: dict[str, Any] = {}

    async def add_binary_stream_handler(self, name: str, handler: Any) -> None:
        self.handlers[name] = handler

    async def call_binary_stream_handler(self, peer: PeerID, name: str) -> Any:
        host = self._network.hosts.get(str(peer))
        if host is None or name not in host.p2p.handlers:
            raise P2PHandlerError("connection refused")
        ours, theirs = await self._network.pair()
        serving = asyncio.create_task(host.p2p.handlers[name](StreamInfo(self.peer_id, None, name), *theirs))
        self._network.serving.add(serving)
        return None, *ours


class _LocalDirectory:
    """As much of a directory as a service needs."""

    def __init__(self, network: LocalNetwork, peer: str) -> None:
        self._network = network
        self._peer = peer

    async def put(self, kind: str, scope: str, record: bytes, _ttl: float) -> bool:
        self._network.records.setdefault((kind, scope), {})[self._peer] = record
        return True

    async def get(self, kind: str, scope: str) -> list[tuple[str, bytes]]:
        return sorted(self._network.records.get((kind, scope), {}).items())
