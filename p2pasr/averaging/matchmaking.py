"""Forming a group: hivemind's `Matchmaking`, over streams whose messages are bounded."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final

from google.protobuf.message import DecodeError
from hivemind.averaging.matchmaking import Matchmaking
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P, P2PContext, P2PDaemonError, PeerID, ServicerBase
from hivemind.proto import averaging_pb2
from hivemind.utils import get_dht_time

from p2pasr.errors import P2pasrError, Reject, RemoteError, TransportError
from p2pasr.peers.host import Host
from p2pasr.peers.streams import Stream
from p2pasr.protocol.cohorts import EVERYBODY, Cohort
from p2pasr.protocol.messages import MAX_RECORD_BYTES
from p2pasr.protocol.signing import short

REQUEST_SECONDS: Final = 3.0
"""How long a leader may take to answer; shorter than the window, or two peers wait for each other."""

GROUP_ID_BYTES: Final = 20
"""Length of a group's name, as hivemind's leaders make it."""

MAX_GATHER_BYTES: Final = 2 * MAX_RECORD_BYTES
"""A claim, and as much again for what its author knows of other members."""

MAX_JOIN_BYTES: Final = MAX_GATHER_BYTES + 1024
MAX_GROUP_BYTES: Final = 64 * (MAX_GATHER_BYTES + 64) + 1024

_WHY_NOT: Final = {
    "NOT_LOOKING_FOR_GROUP": "is not averaging now",
    "BAD_SCHEMA_HASH": "holds another state or round",
    "GROUP_IS_FULL": "has a full group",
    "BAD_EXPIRATION_TIME": "cannot begin in time",
    "NOT_DECLARED": "has not declared itself yet",
    "NOT_A_LEADER": "follows another leader",
    "DUPLICATE_PEER_ID": "already has a follower with this identity",
    "PROTOCOL_VIOLATION": "refuses this peer's claim",
    "GROUP_DISBANDED": "disbanded its group",
}


@dataclass(frozen=True, slots=True)
class Group:
    """Peers that will average together.

    Attributes:
        id: made by the leader, unique.
        peers: their IDs, in the order that positions refer to.
        gathered: what each brought along, in the same order.
        leader: who said so; None if that was this peer.
    """

    id: bytes
    peers: tuple[str, ...]
    gathered: tuple[bytes, ...]
    leader: str | None = field(default=None, compare=False)


@dataclass(slots=True)
class _Step:
    """What hivemind's `Matchmaking` wants of a step, and no more."""

    scheduled_time: float
    deadline: float
    data_for_gather: bytes

    def get_timeout(self) -> float:
        """Seconds left."""
        return max(0.0, self.deadline - float(get_dht_time()))


class _AwaitableDht:
    """A DHT node as `Matchmaking` expects it: hivemind's process-bound `DHT` takes `return_future`."""

    def __init__(self, node: DHTNode) -> None:
        self.peer_id = node.peer_id
        self._node = node

    async def store(self, *, return_future: bool, **record: Any) -> bool:  # noqa: ARG002
        """As :meth:`hivemind.dht.node.DHTNode.store`."""
        return bool(await self._node.store(**record))

    async def get(self, key: str, *, latest: bool, return_future: bool) -> Any:  # noqa: ARG002
        """As :meth:`hivemind.dht.node.DHTNode.get`."""
        return await self._node.get(key, latest=latest)


class Matchmaker:
    """Finds groups for one peer.

    Args:
        host: where it runs.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._current: Matchmaking | None = None
        self._admit: Callable[[str, bytes], object] = _admit_nobody
        self._why: dict[str, str] = {}
        self._fallen: str | None = None

    async def start(self) -> None:
        """Answer peers that ask to join our group."""
        await self._host.serve("join", self._answer)

    async def find(
        self,
        *,
        cohort: Cohort = EVERYBODY,
        schema: bytes,
        gather: bytes,
        expected: Collection[str],
        size: int,
        min_size: int,
        window: float,
        timeout: float,
        admit: Callable[[str, bytes], object],
    ) -> Group:
        """Find a group.

        Args:
            cohort: the part of the swarm that is looked for, which declares itself in a place of its own.
            schema: digest that all members must share.
            gather: what we bring along.
            expected: peers that are known to have something for this round; no other is followed.
            size: a group of this size starts at once.
            min_size: after `window` seconds a group of at least this size starts.
            timeout: seconds after which we give up.
            admit: raises for a peer (its ID and what it gathers) that may not be in our group.

        Raises:
            TransportError: no group, saying what each candidate answered.
        """
        if size == 1:
            return Group(secrets.token_bytes(GROUP_ID_BYTES), (self._host.peer,), (gather,))
        self._admit = admit
        self._why = {}
        leaders: dict[bytes, str] = {}
        self._current = Matchmaking(
            self._host.p2p,
            schema,
            _AwaitableDht(self._host.node.dht),
            servicer_type=_bounded_servicer(self._host, self._why, leaders, self._refusals(expected), admit),
            prefix=f"p2pasr-{self._host.run.hex()[:32]}" + (f"-{cohort.name}" if cohort.bits else ""),
            target_group_size=None,  # set below: passed here, hivemind would advise powers of two
            min_group_size=max(2, min_size),
            min_matchmaking_time=window,
            request_timeout=min(REQUEST_SECONDS, window / 2),
            client_mode=self._host.config.node.client_mode,
        )
        self._current.target_group_size = size
        now = get_dht_time()
        try:
            info = await self._current.look_for_group(_Step(now, now + timeout, gather))
        except Exception as error:  # hivemind asserts and raises what it likes; the next attempt may succeed
            raise TransportError(f"no group could be formed ({str(error) or type(error).__name__})") from error
        finally:
            self._current = None
            self._admit = _admit_nobody
            self._fallen = None
        if info is None:
            raise TransportError(f"no group of {size} within {timeout:.0f} s: {self._reasons()}")
        leader = leaders.get(info.group_id)
        return Group(info.group_id, tuple(map(str, info.peer_ids)), tuple(info.gathered), leader)

    def mistrust(self, group: Group) -> None:
        """Do not follow this group's leader next time: it fell apart, perhaps for members had different rosters."""
        self._fallen = group.leader

    def _refusals(self, expected: Collection[str]) -> Callable[[str], str | None]:
        """Why a peer is not followed, if so."""
        fallen = self._fallen

        def refuse(peer: str) -> str | None:
            if peer not in expected:
                return "nothing is known of it in this round"
            return "its last group fell apart" if peer == fallen else None

        return refuse

    def _reasons(self) -> str:
        if not self._why:
            return "no other peer was found averaging this round"
        return ", ".join(f"{short(peer)} {why}" for peer, why in sorted(self._why.items()))

    async def _answer(self, stream: Stream) -> None:
        """A peer asks to follow us."""
        data = await stream.receive_frame(MAX_JOIN_BYTES)
        try:
            request = averaging_pb2.JoinRequest.FromString(data)
        except DecodeError as error:
            raise Reject(f"{short(stream.peer)} sent a join request that cannot be read") from error
        current = self._current
        if current is None:
            code = averaging_pb2.NOT_LOOKING_FOR_GROUP
            await stream.send_frame(averaging_pb2.MessageFromLeader(code=code).SerializeToString())
            return
        if request.schema_hash == current.schema_hash:
            try:
                self._admit(stream.peer, request.gather)
            except P2pasrError as error:
                code = averaging_pb2.PROTOCOL_VIOLATION
                await stream.send_frame(averaging_pb2.MessageFromLeader(code=code).SerializeToString())
                self._why[stream.peer] = f"was not let in: {error}"
                raise
        context = P2PContext("join", self._host.p2p.peer_id, PeerID.from_base58(stream.peer))
        answering = asyncio.create_task(_relay(current.rpc_join_group(request, context), stream))
        leaving = asyncio.create_task(stream.closed())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)


async def _relay(messages: AsyncIterator[Any], stream: Stream) -> None:
    async for message in messages:
        await stream.send_frame(message.SerializeToString())


def _bounded_servicer(
    host: Host,
    why: dict[str, str],
    leaders: dict[bytes, str],
    refuse: Callable[[str], str | None],
    admit: Callable[[str, bytes], object],
) -> type[ServicerBase]:
    """A servicer type whose stubs speak over our streams, to peers that may be followed, and check what these say.

    hivemind's own stubs read whatever length a peer announces into memory, and its `Matchmaking`
    follows whoever declares itself and takes a leader's group as it comes.
    """

    class Stub:
        def __init__(self, peer: str) -> None:
            self._peer = peer

        async def rpc_join_group(self, request: averaging_pb2.JoinRequest) -> AsyncIterator[Any]:
            return self._messages(request)

        async def _messages(self, request: averaging_pb2.JoinRequest) -> AsyncIterator[Any]:
            try:
                if (reason := refuse(self._peer)) is not None:
                    raise Reject(reason)
                async with host.open(self._peer, "join") as stream:
                    await stream.send_frame(request.SerializeToString())
                    while True:
                        data = await stream.receive_frame(MAX_GROUP_BYTES, timeout=3600.0)
                        message = averaging_pb2.MessageFromLeader.FromString(data)
                        _check_message(message, host.peer, request.gather, admit)
                        code = averaging_pb2.MessageCode.Name(message.code)
                        if code in _WHY_NOT:
                            why[self._peer] = _WHY_NOT[code]
                        if message.code == averaging_pb2.BEGIN_ALLREDUCE:
                            leaders[message.group_id] = self._peer
                        yield message
            except (RemoteError, DecodeError) as error:
                why[self._peer] = f"cannot be followed ({error})"
                raise P2PDaemonError(str(error)) from error
            except P2pasrError as error:
                why[self._peer] = f"did not answer ({error})"
                raise P2PDaemonError(str(error)) from error

    class Servicer(ServicerBase):  # type: ignore[misc]
        @classmethod
        def get_stub(cls, _p2p: P2P, peer: PeerID, *, namespace: str | None = None) -> Stub:  # noqa: ARG003
            return Stub(str(peer))

    return Servicer


def _check_message(
    message: averaging_pb2.MessageFromLeader, ours: str, gather: bytes, admit: Callable[[str, bytes], object]
) -> None:
    """Is this something that a leader may say?

    Args:
        gather: what this peer brings along.

    Raises:
        Ignore, Reject: no: a word that there is not, or a group that this peer cannot average with.
    """
    if message.code not in averaging_pb2.MessageCode.values():
        raise Reject(f"it answers {message.code}, which means nothing")
    if message.code != averaging_pb2.BEGIN_ALLREDUCE:
        return
    peers = [str(PeerID(peer)) for peer in message.ordered_peer_ids]
    if ours not in peers or len(set(peers)) != len(peers) or len(message.gathered) != len(peers):
        raise Reject("its group is malformed")
    if len(message.group_id) != GROUP_ID_BYTES:
        raise Reject(f"its group has a name of {len(message.group_id)} bytes")
    if message.gathered[peers.index(ours)] != gather:
        raise Reject("its group holds something else than this peer brings along")
    for peer, gathered in zip(peers, message.gathered, strict=True):
        admit(peer, gathered)


def _admit_nobody(_peer: str, _gather: bytes) -> None:
    raise Reject("not forming a group")
