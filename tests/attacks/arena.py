"""A swarm in one process: real members, audits, proofs, reducers and ledgers; streams are pairs of sockets.

What is left out is the DHT, matchmaking and waiting: every member is in every round, and a round takes milliseconds.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from p2pasr import round as story
from p2pasr.agreeing import attestations, claims_shown
from p2pasr.averaging import rules, shares
from p2pasr.averaging.codec import Layout
from p2pasr.averaging.group import Members
from p2pasr.averaging.partfile import PartFile
from p2pasr.averaging.reducer import PartReducer
from p2pasr.member import Member, Merged, Work
from p2pasr.peers import blobs, journal
from p2pasr.peers.exchange import BlobExchange
from p2pasr.peers.host import Host
from p2pasr.peers.journal import Journal
from p2pasr.peers.records import Records
from p2pasr.private import PrivateShards
from p2pasr.protocol.admission import newcomers
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import Receipt, Signed, seal
from p2pasr.protocol.state import State, genesis, params_digest
from p2pasr.report import Report
from p2pasr.tasks.base import Task
from p2pasr.verify.evidence import Proof, unpack_proof
from p2pasr.verify.openings import Openings
from tests.attacks.tiny import TinyTask
from tests.unit.builders import LocalNetwork, make_identity, make_manifest

SHARDS = 8
Attack = Callable[[pytest.MonkeyPatch], None]
"""Makes a cheat of the peer in whose turn it is called."""


@dataclass(frozen=True)
class World:
    """What a run trains, and on what.

    Attributes:
        make: makes the run's task anew, as each peer does.
        shards: digest → file.
    """

    manifest: RunManifest
    make: Callable[[], Task]
    shards: dict[bytes, Path]


class ArenaReport(Report):
    """Keeps the events."""

    def __init__(self) -> None:
        super().__init__("json")
        self.events: list[dict[str, Any]] = []

    def emit(self, event: str, message: str, **fields: Any) -> None:
        self.events.append({"event": event, "message": message, **fields})

    def seen(self, event: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each["event"] == event]


class ArenaLink:
    """What a training process calls, answered by a host in the same process."""

    maddrs: tuple[str, ...] = ()

    def __init__(self, loop: asyncio.AbstractEventLoop, host: Host) -> None:
        self._loop, self._host = loop, host

    def call(self, method: str, _seconds: float, /, *, needless: Any = None, **args: Any) -> dict[str, Any]:
        if method == "status":
            return {"bytes_sent": 0, "bytes_received": 0, "connections": 0}
        return self._loop.run_until_complete(self._host.calls[method](args))

    def announce(self, _slot: str, kind: str, scope: str, record: bytes, ttl: float, *, wait: bool = True) -> None:
        self._loop.run_until_complete(self._host.directory.put(kind, scope, record, ttl))


@dataclass
class Player:
    """One member, and how it cheats, if it does."""

    member: Member
    host: Host
    attack: Attack | None = None
    checked: int = 0
    work: Work | None = None
    trained: Any = field(default=None)

    @property
    def peer(self) -> str:
        return self.member.peer

    def turn(self) -> Any:
        """The block in which this peer does its part of a round."""
        if self.attack is None:
            return nullcontext()
        return _Cheating(self.attack)


class _Cheating:
    def __init__(self, attack: Attack) -> None:
        self._attack, self._patch = attack, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        self._attack(self._patch)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


class Arena:
    """A run and its members. Use it as a context manager.

    Args:
        attacks: of the members' positions, how each cheats; the others are honest.
        world: what they train; the classifier if None.
        changes: to the classifier's manifest, see `make_manifest`; with `data: {policy: private}` each member has
            shards of its own.
    """

    def __init__(
        self,
        folder: Path,
        peers: int,
        attacks: dict[int, Attack] | None = None,
        world: World | None = None,
        **changes: Any,
    ) -> None:
        self._folder = folder
        self._patch = pytest.MonkeyPatch()
        for module in (blobs, journal):
            self._patch.setattr(module, "sync", lambda _path: None)  # nobody cuts the power here
        world = world or _tiny_world(folder / "shards", changes)
        self.manifest, self.task, self.shards = world.manifest, world.make(), world.shards
        self._loop = asyncio.new_event_loop()
        self._network = LocalNetwork(folder, self.manifest.run_id)
        self._journals: list[Journal] = []
        self.players = [self._join(folder, number, (attacks or {}).get(number)) for number in range(peers)]

    def arrive(self, count: int, attack: Attack | None = None) -> list[Player]:
        """New keys join with the state that everybody holds."""
        held, first = self.state, len(self.players)
        fresh = [self._join(self._folder, number, attack) for number in range(first, first + count)]
        for player in fresh:
            story.hold(player.member, held)
        self.players += fresh
        return fresh

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self._loop.run_until_complete(self._network.__aexit__(kind, error, None))
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()
            self._patch.undo()
            for opened in self._journals:
                opened.close()

    def _join(self, folder: Path, number: int, attack: Attack | None) -> Player:
        host = self._network.host(number + 1)
        for service in (BlobExchange(), Openings()):
            self._loop.run_until_complete(service.start(host))
        host.store.put("manifest", self.manifest.canonical())
        for digest, path in self.shards.items():
            host.store.lend(path, digest)
        link: Any = ArenaLink(self._loop, host)
        report, identity = ArenaReport(), make_identity(number + 1)
        opened = Journal(folder / f"run {number + 1}")
        self._journals.append(opened)
        state = genesis(self.manifest, self.task.initial_params())
        private = _private_shards(folder, number) if self.manifest.data.policy == "private" else None
        records = Records(link, identity, state.run, report.warn)
        member = Member(
            self.manifest, identity, self.task, link, host.store, opened, records, report, state.params, state
        )
        member.private = private
        story.hold(member, state)
        return Player(member, host, attack)

    @property
    def state(self) -> State:
        """What everybody holds."""
        (digest,) = {player.member.state.digest for player in self.active}
        state = self.active[0].member.state
        assert state.digest == digest
        return state

    @property
    def active(self) -> list[Player]:
        """Those who are neither banned nor suspended, in the order of their positions."""
        return [player for player in self.players if player.peer not in player.member.out]

    @property
    def banned(self) -> set[int]:
        """Positions of those who are banned."""
        return {number for number, player in enumerate(self.players) if player.peer in player.member.state.bans}

    @property
    def suspended(self) -> set[int]:
        """Positions of those who are suspended now."""
        return {number for number, player in enumerate(self.players) if player.peer in player.member.view.suspended}

    @property
    def strikes(self) -> dict[int, int]:
        """Position → strikes that count."""
        counted = self.state.strikes
        return {n: counted[player.peer][0] for n, player in enumerate(self.players) if player.peer in counted}

    @property
    def records(self) -> dict[tuple[str, str], dict[str, bytes]]:
        """All that was put into the directory: (kind, scope) → owner → record."""
        return self._network.records

    def publish(self, kind: str, scope: str, owner: str, record: bytes) -> None:
        """Put a record into the directory, as a stranger may."""
        self._network.records.setdefault((kind, scope), {})[owner] = record

    def play(self, rounds: int) -> None:
        """So many rounds, each with everybody who is neither banned nor suspended."""
        for _ in range(rounds):
            self._play_round()

    def rounds_to_ban(self, position: int, most: int) -> int:
        """Play until a member is banned; returns in how many rounds that was."""
        for number in range(1, most + 1):
            self._play_round()
            if position in self.banned:
                return number
        raise AssertionError(f"not banned in {most} rounds")

    def _play_round(self) -> None:
        players = self.active
        segments = self.manifest.rounds.segments
        for player in players:
            with player.turn():
                player.checked = story.check_last_round(player.member) + story.ask_again(player.member)
        for player in players:
            with player.turn():
                shards = story.assign_shards(player.member)
                trained = story.train(player.member, shards, max(1, segments - player.checked))
                player.trained = (shards, *trained)
        for player in players:
            with player.turn():
                player.work = story.commit(player.member, *player.trained)
        for player in players:
            with player.turn():
                claims_shown(player.member)
        merged = self._reduce(players)
        peers = {player.peer for player in players}
        results = [story.apply(player.member, player.work, merged, peers) for player in players]
        for player, result in zip(players, results, strict=True):
            player.member.store.put("state", *result.after.pieces)
            story.publish_attestation(player.member, result.after)
        for player, result in zip(players, results, strict=True):
            with player.turn():
                story.audit(player.member, result, tuple(attestations(player.member).values()))
                story.settle(player.member, result)
        for number in self.suspended:
            waiting = self.players[number]
            if waiting not in players:
                with waiting.turn():
                    story.hold(waiting.member, results[0].after)
                    story.offer(waiting.member)

    def _reduce(self, players: Sequence[Player]) -> Merged:
        claims = tuple(player.work.claim for player in players)
        layout = Layout.of(self.manifest.parameters, self.manifest.averaging)
        messages, held = [claim.message for claim in claims], players[0].member.state
        weights = rules.weights(messages, self.manifest, held.standing, held.guests)
        new = newcomers(messages, self.manifest, held.standing)
        out = rules.banned(messages, self.manifest, held.standing, held.guests)
        trusted = [player.peer not in out for player in players]
        split = shares.split(layout.parts, [float(each or not any(trusted)) for each in trusted])
        group = blob_digest(b"".join(claim.digest for claim in claims))
        everybody = frozenset(range(len(players)))
        rule = self.manifest.averaging.rule
        members = Members(group, claims, split, weights, everybody, rule, newcomers=new)
        kept: dict[int, bytes] = {}
        receipts: list[Signed[Receipt]] = []
        for position in members.reducers:
            with players[position].turn():
                receipts.append(self._loop.run_until_complete(_reduce_share(players, position, members, layout, kept)))
        average = b"".join(kept[index] for index in range(layout.parts))
        for player in players:
            player.member.store.put("average", average, durable=False)
        return Merged(group, claims, tuple(receipts), blob_digest(average))

    def proofs(self) -> list[Proof]:
        """Every proof that a member keeps, read from its bytes."""
        files = itertools.chain.from_iterable(
            sorted((player.member.journal.folder / "evidence").glob("*.msgpack")) for player in self.players
        )
        return [unpack_proof(path.read_bytes()) for path in files]


async def _reduce_share(
    players: Sequence[Player], position: int, members: Members, layout: Layout, kept: dict[int, bytes]
) -> Signed[Receipt]:
    """One reducer's share, by the reducer that peers run."""
    everybody = set(range(len(players)))
    reducer = PartReducer(members, layout, members.shares[position], everybody, kept.__setitem__)
    for index in reducer.indices:
        for sender, player in enumerate(players):
            with PartFile(player.member.store.find(player.work.delta), layout) as delta:
                reducer.submit(sender, index, delta.read(index))
    parts = tuple([await reducer.results[index] for index in reducer.indices])
    member = players[position].member
    digests = tuple(claim.digest for claim in members.claims)
    state = member.state
    return seal(
        member.identity, Receipt(state.run, member.peer, state.round, state.digest, members.group, digests, parts)
    )


def _tiny_world(folder: Path, changes: dict[str, Any]) -> World:
    shards = _write_shards(folder)
    return World(_manifest(shards, TinyTask(), changes), TinyTask, shards)


def _write_shards(folder: Path) -> dict[bytes, Path]:
    folder.mkdir()
    paths: dict[bytes, Path] = {}
    for number in range(SHARDS):
        content = bytes([number]) * 32
        path = folder / f"{number}.shard"
        path.write_bytes(content)
        paths[blob_digest(content)] = path
    return paths


def _private_shards(folder: Path, number: int) -> PrivateShards:
    """Ten shards of a member's own."""
    home = folder / f"home {number + 1}"
    home.mkdir()
    paths: dict[bytes, Path] = {}
    for place in range(10):
        content = f"shard {place} of member {number} alone".ljust(64, ".").encode()
        path = home / f"{place}.shard"
        path.write_bytes(content)
        paths[blob_digest(content)] = path
    return PrivateShards(paths, dict.fromkeys(paths, 60.0), bytes([number + 1]) * 32)


def _manifest(shards: dict[bytes, Path], task: TinyTask, changes: dict[str, Any]) -> RunManifest:
    params = task.initial_params()
    described = tuple(
        {"digest": digest.hex(), "bytes": 32, "clips": 10, "seconds": 60.0, "dialect": "yue"} for digest in shards
    )
    content: dict[str, Any] = {
        "rounds": {"rounds": 200, "samples_per_step": 16, "steps_per_segment": 8, "min_peers": 2},
        "averaging": {"codec": "int8", "block": 16, "part_values": 256},
        "retention": {"state_rounds": 200},
        "verify": {"rate": 1.0, "reductions": 1.0},
    }
    for name, change in changes.items():
        content[name] = {**content.get(name, {}), **change}
    return make_manifest(
        **content,
        shards=described,
        initial=params_digest(params).hex(),
        parameters=sum(value.size for value in params.values()),
    )
