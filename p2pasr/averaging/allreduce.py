"""Butterfly all-reduce over committed parts.

Each member reduces a share of the parts. A part that arrives is hashed and must lie under its
sender's signed root; the reducer aggregates in a fixed order, encodes the result once and sends the
same bytes, under the same receipt, to everybody. So members decode equal bits, and a claim binds its
author to what was averaged. hivemind's runner instead re-encodes a difference for every receiver and
keeps a member's own values where a reducer fails, after which no two members agree.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from p2pasr.averaging import rules
from p2pasr.averaging.codec import Layout
from p2pasr.averaging.matchmaking import Group, Matchmaker
from p2pasr.averaging.merkle import Tree, part_digests
from p2pasr.errors import LocalError, P2pasrError, Reject, TransportError
from p2pasr.peers import streams
from p2pasr.peers.host import Host
from p2pasr.peers.streams import Stream
from p2pasr.protocol.encoding import blob_digest, digest, pack, unpack
from p2pasr.protocol.manifest import RuleSection, RunManifest, parse_manifest
from p2pasr.protocol.messages import (
    MAX_RECEIPT_BYTES,
    MAX_RECORD_BYTES,
    Claim,
    PartReceipt,
    Receipt,
    Signed,
    seal,
    unseal,
)
from p2pasr.protocol.rules import RoundView, check_claim, check_part, check_receipts
from p2pasr.protocol.signing import short

SENDER_SECONDS: Final = 20.0
"""How long a reducer waits for a sender's next part before it goes on without that sender."""

RESULT_SECONDS: Final = 60.0
"""How long a member waits for a reducer's next result: longer, for the reducer may wait for others."""

KEEP_SECONDS: Final = 120.0
"""How long a finished reduction is kept for members that ask late."""


@dataclass(frozen=True, slots=True)
class Members:
    """A group whose claims were checked.

    Attributes:
        claims: in the group's order.
        reducers: positions of those that reduce (all but peers in client mode).
        weights: weight of each claim.
        rule: how their parts become one.
        limits: the most that a value of a delta can be after 1, 2, … segments; None if nothing is known of that.
    """

    group: bytes
    claims: tuple[Signed[Claim], ...]
    reducers: tuple[int, ...]
    weights: tuple[float, ...]
    rule: RuleSection = field(default_factory=RuleSection)
    limits: Sequence[float] | None = None

    def position(self, peer: str) -> int:
        """A member's position.

        Raises:
            Reject: the peer is no member.
        """
        for position, claim in enumerate(self.claims):
            if claim.message.peer == peer:
                return position
        raise Reject(f"{short(peer)} is not in this group")

    def share(self, position: int, parts: int) -> range:
        """The parts that one member reduces: a run of equal length for each reducer, give or take one."""
        if position not in self.reducers:
            return range(0)
        rank, count = self.reducers.index(position), len(self.reducers)
        return range(parts * rank // count, parts * (rank + 1) // count)


@dataclass(frozen=True, slots=True)
class Reduced:
    """The result of one part."""

    data: bytes
    receipt: PartReceipt


@dataclass(slots=True)
class PartReducer:
    """Collects the parts of one reducer's share and reduces each when all live senders have sent it.

    Attributes:
        live: positions of senders that have not failed.
    """

    members: Members
    layout: Layout
    indices: range
    live: set[int]
    received: dict[int, dict[int, bytes]] = field(default_factory=dict)
    results: dict[int, asyncio.Future[Reduced]] = field(default_factory=dict)
    _started: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.results = {index: loop.create_future() for index in self.indices}

    def submit(self, position: int, index: int, data: bytes) -> None:
        """A sender's part, already checked against its claim; one that comes after the reduction is not kept."""
        if index not in self._started:
            self.received.setdefault(index, {})[position] = data
            self._reduce_if_ready(index)

    def drop(self, position: int) -> None:
        """Go on without a sender; parts that it did send still count."""
        self.live.discard(position)
        for index in self.indices:
            self._reduce_if_ready(index)

    def _reduce_if_ready(self, index: int) -> None:
        have = self.received.get(index, {})
        if index in self._started or not have or not self.live <= have.keys():
            return
        self._started.add(index)
        work = asyncio.get_running_loop().run_in_executor(None, self._reduce, index, dict(have))
        work.add_done_callback(lambda done: self._finish(index, done))

    def _reduce(self, index: int, parts: dict[int, bytes]) -> Reduced:
        codec, size = self.layout.codec, self.layout.part_size(index)
        decoded = {position: codec.decode(data, size) for position, data in parts.items()}
        data = codec.encode(rules.aggregate(decoded, self.members.weights, self.members.rule))
        return Reduced(data, PartReceipt(index, tuple(sorted(parts)), blob_digest(data)))

    def _finish(self, index: int, done: asyncio.Future[Reduced]) -> None:
        self.received.pop(index, None)
        if (error := done.exception()) is not None:
            self.results[index].set_exception(error)
        else:
            self.results[index].set_result(done.result())


@dataclass(slots=True)
class Session:
    """One group's reduction, as seen by one member."""

    members: Members
    layout: Layout
    reducer: PartReducer
    seal_receipt: Callable[[Sequence[PartReceipt]], Signed[Receipt]]
    connected: set[int] = field(default_factory=set)
    _receipt: Signed[Receipt] | None = None

    async def receipt(self) -> Signed[Receipt]:
        """Our receipt, when all of our parts are reduced; the same one for everybody."""
        results = [await self.reducer.results[index] for index in self.reducer.indices]
        if self._receipt is None:
            self._receipt = self.seal_receipt([result.receipt for result in results])
        return self._receipt


class AllReduce:
    """The all-reduce service. Call: `average`, see :meth:`_call_average`."""

    def __init__(self) -> None:
        self._host: Host
        self._matchmaker: Matchmaker
        self._manifest: RunManifest | None = None
        self._sessions: dict[bytes, Session] = {}
        self._opened = asyncio.Condition()

    async def start(self, host: Host) -> None:
        """Register on a host."""
        self._host = host
        self._matchmaker = Matchmaker(host)
        await self._matchmaker.start()
        await host.serve("reduce", self._serve_sender)
        host.calls["average"] = self._call_average

    async def _call_average(self, args: dict[str, Any]) -> dict[str, Any]:
        """Find a group and average with it.

        Args:
            args: round, state, covered (the view); claim (packed, ours); delta (digest of the encoded
                one); limits (see :class:`Members`); expected (peers, ours among them), min_size, window,
                timeout (of the group).

        Returns:
            group, members (packed claims), receipts (packed), average (digest of the encoded result).
        """
        view = RoundView(self._read_manifest(), self._host.run, args["round"], args["state"], args["covered"])
        layout = Layout.of(view.manifest.parameters, view.manifest.averaging)
        claim = unseal(args["claim"], Claim)
        parts = layout.cut(self._host.store.get(args["delta"]))
        digests = part_digests(parts)
        if _delta_tree(claim.message).root(digests) != claim.message.delta_root:
            raise LocalError("the stored delta is not the one this peer's claim commits to")
        group = await self._matchmaker.find(
            schema=digest("group", view.run + view.round.to_bytes(8, "big") + view.state),
            gather=pack({"claim": args["claim"], "reduces": not self._host.config.node.client_mode}),
            expected=args["expected"],
            size=min(len(args["expected"]), view.manifest.averaging.max_group),
            min_size=args["min_size"],
            window=args["window"],
            timeout=args["timeout"],
            admit=lambda peer, gather: _check_gathered(peer, gather, view),
        )
        members = _check_group(group, view, claim, args["limits"])
        self._host.emit({"event": "group", "peers": list(group.peers), "id": group.id})
        results, receipts = await self._run(members, layout, parts, digests, view)
        average = self._host.store.put("average", b"".join(results), durable=False)
        return {
            "group": group.id,
            "members": [member.pack() for member in members.claims],
            "receipts": [receipt.pack() for receipt in receipts],
            "average": average,
        }

    async def _run(
        self,
        members: Members,
        layout: Layout,
        parts: list[memoryview],
        digests: list[bytes],
        view: RoundView,
    ) -> tuple[list[bytes], list[Signed[Receipt]]]:
        """Exchange parts with every reducer, ourselves among them."""
        ours = members.position(self._host.peer)
        session = await self._open(members, layout, view)
        share = session.reducer.indices
        for index in share:
            session.reducer.submit(ours, index, bytes(parts[index]))
        others = [position for position in members.reducers if position != ours]
        exchanges = await asyncio.gather(
            *(self._exchange(members, position, layout, parts, digests) for position in others),
            return_exceptions=True,
        )
        results: dict[int, bytes] = {}
        receipts: list[Signed[Receipt]] = []
        failures: list[str] = []
        for position, exchange in zip(others, exchanges, strict=True):
            if isinstance(exchange, P2pasrError):
                failures.append(f"{short(members.claims[position].message.peer)} reduced nothing ({exchange})")
            elif isinstance(exchange, BaseException):
                raise exchange
            else:
                results.update(exchange[0])
                receipts.append(exchange[1])
        if failures:
            raise TransportError("; ".join(failures))
        if share:
            async with asyncio.timeout(RESULT_SECONDS):
                receipts.append(await session.receipt())
            results.update({index: session.reducer.results[index].result().data for index in share})
        check_receipts(receipts, members.group, members.claims, layout.parts)
        return [results[index] for index in range(layout.parts)], receipts

    async def _open(self, members: Members, layout: Layout, view: RoundView) -> Session:
        ours = members.position(self._host.peer)
        share = members.share(ours, layout.parts)
        claim_digests = tuple(claim.digest for claim in members.claims)

        def seal_receipt(parts: Sequence[PartReceipt]) -> Signed[Receipt]:
            receipt = Receipt(
                view.run, self._host.peer, view.round, view.state, members.group, claim_digests, tuple(parts)
            )
            return seal(self._host.identity, receipt)

        session = Session(
            members=members,
            layout=layout,
            reducer=PartReducer(members, layout, share, set(range(len(members.claims)))),
            seal_receipt=seal_receipt,
            connected={ours},
        )
        async with self._opened:
            self._sessions[members.group] = session
            self._opened.notify_all()
        asyncio.get_running_loop().call_later(SENDER_SECONDS, self._drop_absent, session)
        asyncio.get_running_loop().call_later(KEEP_SECONDS, self._sessions.pop, members.group, None)
        return session

    def _drop_absent(self, session: Session) -> None:
        for position in range(len(session.members.claims)):
            if position not in session.connected:
                session.reducer.drop(position)

    async def _exchange(
        self, members: Members, position: int, layout: Layout, parts: list[memoryview], digests: list[bytes]
    ) -> tuple[dict[int, bytes], Signed[Receipt]]:
        """Send one reducer our parts of its share and receive its results."""
        share = members.share(position, layout.parts)
        async with self._host.open(members.claims[position].message.peer, "reduce") as stream:
            await stream.send({"group": members.group, "digests": digests})
            await stream.receive()
            sending = asyncio.create_task(_send_parts(stream, [parts[index] for index in share]))
            try:
                results: dict[int, bytes] = {}
                for index in share:
                    results[index] = await stream.receive_data(layout.part_bytes(index), RESULT_SECONDS)
                    await _check_decodes(layout, index, results[index])  # a receipt for nonsense is nonsense
                receipt = unseal(await stream.receive_frame(MAX_RECEIPT_BYTES), Receipt, MAX_RECEIPT_BYTES)
                await sending
            finally:
                sending.cancel()
        stated = {part.index: part.result for part in receipt.message.parts}
        if receipt.message.peer != stream.peer or stated != {i: blob_digest(d) for i, d in results.items()}:
            raise Reject(f"the results of {short(stream.peer)} are not those that its receipt states")
        return results, receipt

    async def _serve_sender(self, stream: Stream) -> None:
        """A member sends us its parts of our share and wants the results."""
        opening = await stream.receive()
        session = await self._find(streams.field(opening, "group", bytes))
        position = session.members.position(stream.peer)
        claim = session.members.claims[position].message
        digests = streams.field(opening, "digests", tuple)
        if not _are_digests(digests, session.layout.parts) or _delta_tree(claim).root(digests) != claim.delta_root:
            session.reducer.drop(position)
            raise Reject(f"{short(stream.peer)} announces other parts than its claim commits to")
        if position in session.connected:
            raise Reject(f"{short(stream.peer)} sends its parts twice")
        session.connected.add(position)
        await stream.send({"ok": True})
        answering = asyncio.create_task(_send_results(stream, session))
        try:
            await _receive_parts(stream, session, position, digests)
            await answering
        except BaseException:
            session.reducer.drop(position)
            raise
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def _find(self, group: bytes) -> Session:
        """The session of a group; a member may reach us before our leader's message does."""
        try:
            async with asyncio.timeout(SENDER_SECONDS), self._opened:
                await self._opened.wait_for(lambda: group in self._sessions)
                return self._sessions[group]
        except TimeoutError:
            raise TransportError("this peer is not in such a group") from None

    def _read_manifest(self) -> RunManifest:
        if self._manifest is None:
            self._manifest = parse_manifest(self._host.store.get(self._host.run))
        return self._manifest


async def _send_parts(stream: Stream, parts: Sequence[memoryview]) -> None:
    for part in parts:
        await stream.send_frame(part)


async def _send_results(stream: Stream, session: Session) -> None:
    for index in session.reducer.indices:
        await stream.send_frame((await asyncio.shield(session.reducer.results[index])).data)
    await stream.send_frame((await session.receipt()).pack())


async def _receive_parts(stream: Stream, session: Session, position: int, digests: Sequence[bytes]) -> None:
    for index in session.reducer.indices:
        size = session.layout.part_bytes(index)
        data = await stream.receive_frame(size, SENDER_SECONDS)
        if len(data) != size or blob_digest(data) != digests[index]:
            raise Reject(f"part {index} of {short(stream.peer)} is not the one it committed to")
        largest = await _check_decodes(session.layout, index, data)  # later it would cost everybody the part
        check_part(index, largest, session.members.claims[position].message, session.members.limits)
        session.reducer.submit(position, index, data)


async def _check_decodes(layout: Layout, index: int, data: bytes) -> float:
    """Decode a part, off the event loop, to see that it can be, and how large its largest magnitude is.

    Raises:
        Reject: it cannot.
    """

    def largest() -> float:
        return float(np.abs(layout.codec.decode(data, layout.part_size(index))).max())

    return await asyncio.get_running_loop().run_in_executor(None, largest)


def _delta_tree(claim: Claim) -> Tree:
    return Tree("delta", claim.run, claim.round, claim.peer)


def _check_gathered(peer: str, gathered: bytes, view: RoundView) -> tuple[Signed[Claim], bool]:
    """The claim that a peer brought along, and whether it reduces.

    Raises:
        Ignore, Reject: it may not be averaged with.
    """
    brought = unpack(gathered, MAX_RECORD_BYTES + 64)
    if not isinstance(brought, dict) or type(brought.get("reduces")) is not bool:
        raise Reject(f"{short(peer)} brought no claim")
    claim = unseal(streams.field(brought, "claim", bytes), Claim)
    if claim.message.peer != peer:
        raise Reject(f"{short(peer)} brought the claim of {short(claim.message.peer)}")
    check_claim(claim.message, view)
    return claim, brought["reduces"]


def _check_group(group: Group, view: RoundView, ours: Signed[Claim], limits: Sequence[float] | None = None) -> Members:
    """Check what the leader sent: every member's claim, and that ours is among them.

    Raises:
        Reject: it is no group that we can average with.
    """
    if len(group.peers) != len(group.gathered) or len(set(group.peers)) != len(group.peers):
        raise Reject("the leader's group is malformed")
    checked = [_check_gathered(peer, data, view) for peer, data in zip(group.peers, group.gathered, strict=True)]
    claims = tuple(claim for claim, _ in checked)
    reducers = tuple(position for position, (_, reduces) in enumerate(checked) if reduces or len(checked) == 1)
    if ours not in claims:
        raise Reject("the leader's group lacks this peer's claim")
    if not reducers:
        raise TransportError("all peers of the group are in client mode, and a group needs one that others can reach")
    weights = rules.weights([claim.message for claim in claims], view.manifest)
    return Members(group.id, claims, reducers, weights, view.manifest.averaging.rule, limits)


def _are_digests(value: Any, count: int) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == count
        and all(isinstance(item, bytes) and len(item) == 32 for item in value)
    )
