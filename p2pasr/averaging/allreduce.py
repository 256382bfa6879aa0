"""Butterfly all-reduce over committed parts.

Each member reduces a share of the parts. A part that arrives is hashed and must lie under its
sender's signed root; the reducer aggregates in a fixed order, encodes the result once and sends the
same bytes, under the same receipt, to everybody. So members decode equal bits, and a claim binds its
author to what was averaged. hivemind's runner instead re-encodes a difference for every receiver and
keeps a member's own values where a reducer fails, after which no two members agree. Here a reducer's
results are then asked of the members that have them, and without them nobody has a result.

Deltas and averages lie on disk; a few parts of each sender are in memory at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from p2pasr.averaging.codec import Layout
from p2pasr.averaging.group import MAX_RATE, Brought, Members, check_gathered, check_group
from p2pasr.averaging.matchmaking import Matchmaker
from p2pasr.averaging.merkle import Tree
from p2pasr.averaging.partfile import PartFile
from p2pasr.averaging.reducer import PartReducer
from p2pasr.averaging.waiting import entry, in_thread, soon
from p2pasr.errors import LocalError, P2pasrError, Reject, TransportError
from p2pasr.peers import streams
from p2pasr.peers.blobs import file_digest
from p2pasr.peers.host import Host
from p2pasr.peers.streams import Stream, patience
from p2pasr.protocol.cohorts import cohort_of
from p2pasr.protocol.encoding import blob_digest, digest
from p2pasr.protocol.messages import MAX_RECEIPT_BYTES, Claim, PartReceipt, Receipt, Signed, seal, unseal
from p2pasr.protocol.rules import RoundView, check_part, check_receipts, check_result
from p2pasr.protocol.signing import short

JOIN_SECONDS: Final = 20.0
"""How long a member of a group is waited for, and a group that a member names."""

RESULT_PATIENCE: Final = 3
"""A reducer that waits for its slowest senders may take so many times as long as one of them."""

KEEP_SECONDS: Final = 120.0
"""How long a reduction is kept for members that ask late."""

PROGRESS_SECONDS: Final = 1.0

MAX_KNOWN: Final = 64
"""Of how many peers something is told to a group."""

MIN_MEASURED_BYTES: Final = 64 * 1024
"""Fewer bytes than this say nothing about a link."""


@dataclass(slots=True)
class Session:
    """One group's reduction, as seen by one member.

    Attributes:
        ours: this peer's position.
        delta: its encoded delta.
        digests: those of the delta's parts.
        average: the result, which fills up.
        reference: the encoded last aggregate, if the rule starts from it and there is one.
        reducer: for our share of the parts.
        feeding: hands our own parts to it, also for the others when our attempt has failed.
        receipts: for every reducer its receipt, once all of its results are here; None if it failed us.
        connected: positions of members that send to us.
        arrived: parts of the result that are here.
    """

    members: Members
    layout: Layout
    view: RoundView
    ours: int
    delta: PartFile
    digests: tuple[bytes, ...]
    average: PartFile
    reference: PartFile | None = None
    reducer: PartReducer = field(init=False)
    feeding: asyncio.Task[None] = field(init=False)
    receipts: dict[int, asyncio.Future[Signed[Receipt] | None]] = field(init=False)
    connected: set[int] = field(init=False)
    arrived: int = 0

    def __post_init__(self) -> None:
        everybody = set(range(len(self.members.claims)))
        share = self.members.shares[self.ours]
        self.reducer = PartReducer(self.members, self.layout, share, everybody, self.keep, self.reference)
        self.connected = {self.ours}
        loop = asyncio.get_running_loop()
        self.receipts = {position: loop.create_future() for position in self.members.reducers}
        self.feeding = loop.create_task(self._feed())

    async def _feed(self) -> None:
        for index in self.reducer.indices:
            await self.reducer.room(index)
            self.reducer.submit(self.ours, index, self.delta.read(index))

    def keep(self, index: int, data: bytes) -> None:
        """A part of the result is here."""
        self.average.write(index, data)
        self.arrived += 1

    def close(self) -> None:
        """Let go of the files; members that ask from now on are told that nothing is here."""
        self.feeding.cancel()
        for receipt in self.receipts.values():
            if not receipt.done():
                receipt.set_result(None)
        self.delta.close()
        self.average.close()
        if self.reference is not None:
            self.reference.close()
        self.average.path.unlink(missing_ok=True)


class AllReduce:
    """The all-reduce service. Calls: `average`, see :meth:`_call_average`; `receipts`, see :meth:`_call_receipts`."""

    def __init__(self) -> None:
        self._host: Host
        self._matchmaker: Matchmaker
        self._sessions: dict[bytes, Session] = {}
        self._opened = asyncio.Condition()
        self._rates: dict[str, float] = {}
        self._failed: tuple[bytes, set[str]] = (b"", set())

    async def start(self, host: Host) -> None:
        """Register on a host."""
        self._host = host
        self._matchmaker = Matchmaker(host)
        await self._matchmaker.start()
        await host.serve("reduce", self._serve_sender)
        await host.serve("results", self._serve_results)
        await host.serve("receipts", self._serve_receipts)
        host.calls["average"] = self._call_average
        host.calls["receipts"] = self._call_receipts
        host.at_stop.append(self._stop)

    def _stop(self) -> None:
        for session in self._sessions.values():
            session.close()

    # --- calls of the training process --------------------------------------------------------------

    async def _call_average(self, args: dict[str, Any]) -> dict[str, Any]:
        """Find a group and average with it.

        Args:
            args: round, state, covered, credit, bans, suspended, guests, bits (the view); claim (packed, ours); delta
                (digest of the encoded one); reference (digest of the encoded last aggregate, None where the rule needs
                none or before the first); limits (see :class:`Members`); expected (peers, ours among them), shunned
                (peers that are not averaged with), min_size, window, timeout (of the group).

        Returns:
            group, members (packed claims), receipts (packed), average (digest of the encoded result).
        """
        manifest, run = self._host.manifest, self._host.run
        cohort = cohort_of(run, self._host.peer, args["bits"])
        round_of = args["round"], args["state"]
        ledger = args["covered"], args["credit"], args["bans"]
        view = RoundView(manifest, run, *round_of, *ledger, cohort, args["suspended"], args["guests"])
        layout = Layout.of(view.manifest.parameters, view.manifest.averaging)
        claim = unseal(args["claim"], Claim)
        with contextlib.ExitStack() as files:
            delta = files.enter_context(self._open_parts(args["delta"], layout))
            reference = None
            if args["reference"] is not None:
                reference = files.enter_context(await self._open_reference(args["reference"], layout))
            digests = await in_thread(_part_digests, delta)
            if Tree.of("delta", claim.message).root(digests) != claim.message.delta_root:
                raise LocalError("the stored delta is not the one this peer's claim commits to")
            schema = digest("group", view.run + view.round.to_bytes(8, "big") + view.state)
            if self._failed[0] != schema:
                self._failed = (schema, set())
            reduces, expected = not self._host.config.node.client_mode, args["expected"]
            brought = Brought(claim, reduces, self._known_rates(expected), tuple(sorted(self._failed[1])[:MAX_KNOWN]))
            group = await self._matchmaker.find(
                cohort=cohort,
                schema=schema,
                gather=brought.pack(),
                expected=expected,
                size=min(len(expected), view.manifest.averaging.max_group),
                min_size=args["min_size"],
                window=args["window"],
                timeout=args["timeout"],
                admit=lambda peer, gather: check_gathered(peer, gather, view, args["shunned"]),
            )
            members = check_group(group, view, claim, args["limits"], args["shunned"])
            self._host.emit({"event": "group", "peers": list(group.peers), "id": members.group})
            session = await self._open(members, layout, view, delta, digests, reference)
            files.pop_all()  # the session closes them
        try:
            receipts = await self._run(session)
        except BaseException:
            self._matchmaker.mistrust(group)
            raise
        average = await in_thread(file_digest, session.average.path)
        if self._host.store.find(average) is None:
            self._host.store.make_room(layout.total_bytes)
            self._host.store.commit(session.average.path, average, "average", durable=False)
        return {
            "group": members.group,
            "members": [member.pack() for member in members.claims],
            "receipts": [receipt.pack() for receipt in receipts],
            "average": average,
        }

    async def _call_receipts(self, args: dict[str, Any]) -> dict[str, Any]:
        """The receipts of a group that its other members hold, wherever these can be had.

        Args:
            args: group.

        Returns:
            receipts (packed), each once.
        """
        session = self._sessions.get(args["group"])
        if session is None:
            raise TransportError("that group's reduction is kept no longer")
        found: set[bytes] = set()

        async def ask(position: int) -> None:
            with contextlib.suppress(P2pasrError):  # who does not answer adds nothing
                async with self._host.open(session.members.peer(position), "receipts") as stream:
                    await stream.send({"group": session.members.group})
                    for _ in session.members.reducers:
                        packed = await stream.receive_frame(MAX_RECEIPT_BYTES)
                        unseal(packed, Receipt, MAX_RECEIPT_BYTES)
                        found.add(packed)

        await asyncio.gather(*map(ask, session.members.reachable - {session.ours}))
        return {"receipts": sorted(found)}

    # --- a reduction, as a member ---------------------------------------------------------------------

    async def _run(self, session: Session) -> list[Signed[Receipt]]:
        """Exchange parts with every reducer, ourselves among them; returns their receipts.

        Raises:
            TransportError: the results of a reducer cannot be had.
            Reject: the receipts do not account for the delta.
        """
        members = session.members
        telling = asyncio.create_task(self._tell_progress(session))
        others = [position for position in members.reducers if position != session.ours]
        try:
            outcomes = await asyncio.gather(
                *(self._obtain(session, position) for position in others), return_exceptions=True
            )
            receipts: list[Signed[Receipt]] = []
            failures: list[str] = []
            for position, outcome in zip(others, outcomes, strict=True):
                if isinstance(outcome, P2pasrError):
                    self._failed[1].add(members.peer(position))
                    failures.append(f"{short(members.peer(position))} reduced nothing ({outcome})")
                elif isinstance(outcome, BaseException):
                    raise outcome
                else:
                    receipts.append(outcome)
            if failures:
                raise TransportError("; ".join(failures))
            if session.ours in members.reducers:
                receipts.append(await self._own_receipt(session))
        finally:
            telling.cancel()
        check_receipts(receipts, members.group, members.claims, session.layout.parts)
        return receipts

    async def _obtain(self, session: Session, position: int) -> Signed[Receipt]:
        """One reducer's results: its own word, or where it fails us, that of a member which has them."""
        kept = session.receipts[position]
        try:
            receipt = await self._exchange(session, position)
        except P2pasrError as error:
            if not kept.done():
                kept.set_result(None)
            return await self._ask_others(session, position, error)
        if not kept.done():
            kept.set_result(receipt)
        return receipt

    async def _exchange(self, session: Session, position: int) -> Signed[Receipt]:
        """Send one reducer our parts of its share and receive its results."""
        members, layout = session.members, session.layout
        share, peer = members.shares[position], members.peer(position)
        wait = RESULT_PATIENCE * self._patience(peer, layout)
        async with self._host.open(peer, "reduce", wait) as stream:
            await stream.send({"group": members.group, "digests": session.digests})
            await stream.receive()
            sending = asyncio.create_task(_send_parts(stream, session.delta, share))
            try:
                results: dict[int, bytes] = {}
                for index in share:
                    data = await stream.receive_data(layout.part_bytes(index), wait)
                    await _check_result(session, index, data)  # a receipt for nonsense is nonsense
                    session.keep(index, data)
                    results[index] = blob_digest(data)
                receipt = unseal(await stream.receive_frame(MAX_RECEIPT_BYTES), Receipt, MAX_RECEIPT_BYTES)
                await sending
            finally:
                sending.cancel()
        _check_receipt(receipt, peer, members.group, results)
        return receipt

    async def _ask_others(self, session: Session, position: int, why: P2pasrError) -> Signed[Receipt]:
        """A reducer's results from any member that it gave them to.

        Raises:
            TransportError: nobody has them; with what went wrong at first.
        """
        members = session.members
        count = len(members.claims)
        for step in range(1, count):
            other = (session.ours + step) % count
            if other == position or other not in members.reachable:
                continue
            try:
                receipt = await self._fetch_results(session, position, other)
            except P2pasrError:
                continue  # what is told in the end is why the reducer itself failed
            self._host.warn(
                f"{short(members.peer(position))} reduced nothing for this peer ({why}): "
                f"its results came from {short(members.peer(other))}"
            )
            return receipt
        raise TransportError(str(why)) from why

    async def _fetch_results(self, session: Session, position: int, other: int) -> Signed[Receipt]:
        members, layout = session.members, session.layout
        peer = members.peer(position)
        wait = RESULT_PATIENCE * self._patience(members.peer(other), layout)
        async with self._host.open(members.peer(other), "results", wait) as stream:
            await stream.send({"group": members.group, "reducer": position})
            receipt = unseal(await stream.receive_frame(MAX_RECEIPT_BYTES), Receipt, MAX_RECEIPT_BYTES)
            stated = {part.index: part.result for part in receipt.message.parts}
            if stated.keys() != set(members.shares[position]):
                raise Reject(f"the receipt of {short(peer)} is not about its share")
            _check_receipt(receipt, peer, members.group, stated)
            for index in members.shares[position]:
                data = await stream.receive_data(layout.part_bytes(index), wait)
                if blob_digest(data) != stated[index]:
                    raise Reject(f"part {index} from {short(stream.peer)} is not the one {short(peer)} reduced")
                await _check_result(session, index, data)
                session.keep(index, data)
        return receipt

    async def _own_receipt(self, session: Session) -> Signed[Receipt]:
        """Our receipt, when all of our parts are reduced; the same one for everybody."""
        kept = session.receipts[session.ours]
        lines = [await asyncio.shield(session.reducer.results[index]) for index in session.reducer.indices]
        if not kept.done():
            kept.set_result(self._seal_receipt(session, lines))
        receipt = kept.result()
        if receipt is None:
            raise TransportError("this reduction is over")
        return receipt

    def _seal_receipt(self, session: Session, lines: Sequence[PartReceipt]) -> Signed[Receipt]:
        view, members = session.view, session.members
        claims = tuple(claim.digest for claim in members.claims)
        receipt = Receipt(view.run, self._host.peer, view.round, view.state, members.group, claims, tuple(lines))
        return seal(self._host.identity, receipt)

    async def _open(
        self,
        members: Members,
        layout: Layout,
        view: RoundView,
        delta: PartFile,
        digests: tuple[bytes, ...],
        reference: PartFile | None = None,
    ) -> Session:
        self._host.store.make_room(layout.total_bytes)
        average = PartFile(self._host.store.scratch("average"), layout)
        ours = members.position(self._host.peer)
        session = Session(members, layout, view, ours, delta, digests, average, reference)
        async with self._opened:
            self._sessions[members.group] = session
            self._opened.notify_all()
        loop = asyncio.get_running_loop()
        loop.call_later(JOIN_SECONDS, self._drop_absent, session)
        loop.call_later(KEEP_SECONDS + self._most_seconds(layout), self._forget, session)
        return session

    def _drop_absent(self, session: Session) -> None:
        for position in range(len(session.members.claims)):
            if position not in session.connected:
                session.reducer.drop(position)

    def _forget(self, session: Session) -> None:
        self._sessions.pop(session.members.group, None)
        session.close()

    # --- a reduction, as a reducer --------------------------------------------------------------------

    async def _serve_sender(self, stream: Stream) -> None:
        """A member sends us its parts of our share and wants the results."""
        opening = await stream.receive()
        session = await self._find(streams.field(opening, "group", bytes))
        position = session.members.position(stream.peer)
        claim = session.members.claims[position].message
        digests = streams.field(opening, "digests", tuple)
        if not _are_digests(digests, session.layout.parts) or Tree.of("delta", claim).root(digests) != claim.delta_root:
            session.reducer.drop(position)
            raise Reject(f"{short(stream.peer)} announces other parts than its claim commits to")
        if position in session.connected:
            raise Reject(f"{short(stream.peer)} sends its parts twice")
        session.connected.add(position)
        stream.timeout = self._patience(stream.peer, session.layout)
        await stream.send({"ok": True})
        answering = asyncio.create_task(self._send_results(stream, session))
        try:
            await self._receive_parts(stream, session, position, digests)
            await answering
        except BaseException:
            session.reducer.drop(position)
            raise
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def _receive_parts(self, stream: Stream, session: Session, position: int, digests: Sequence[bytes]) -> None:
        measured, seconds = 0, 0.0
        for index in session.reducer.indices:
            await session.reducer.room(index)
            size = session.layout.part_bytes(index)
            began = time.monotonic()
            data = await stream.receive_frame(size)
            if index > session.reducer.indices.start:  # before the first, the sender had other things to do
                measured, seconds = measured + size, seconds + time.monotonic() - began
            if len(data) != size or blob_digest(data) != digests[index]:
                raise Reject(f"part {index} of {short(stream.peer)} is not the one it committed to")
            largest = await _check_decodes(session.layout, index, data)  # later it would cost everybody the part
            check_part(index, largest, session.members.claims[position].message, session.members.limits)
            session.reducer.submit(position, index, data)
        if measured >= MIN_MEASURED_BYTES:
            rate = min(measured / max(seconds, 1e-6), float(MAX_RATE))
            self._rates[stream.peer] = (self._rates.get(stream.peer, rate) + rate) / 2

    async def _send_results(self, stream: Stream, session: Session) -> None:
        for index in session.reducer.indices:
            await asyncio.shield(session.reducer.results[index])
            await stream.send_frame(session.average.read(index))
        await stream.send_frame((await self._own_receipt(session)).pack())

    async def _serve_results(self, stream: Stream) -> None:
        """A member wants the results of a reducer that failed it."""
        opening = await stream.receive()
        session = await self._find(streams.field(opening, "group", bytes))
        session.members.position(stream.peer)
        kept = session.receipts.get(streams.field(opening, "reducer", int))
        if kept is None:
            raise Reject(f"{short(stream.peer)} asks for the results of a member that does not reduce")
        stream.timeout = self._patience(stream.peer, session.layout)
        receipt = await soon(kept, RESULT_PATIENCE * stream.timeout)
        if receipt is None:
            raise TransportError("its results are not here either")
        await stream.send_frame(receipt.pack())
        for index in session.members.shares[session.members.position(receipt.message.peer)]:
            await stream.send_frame(session.average.read(index))

    async def _serve_receipts(self, stream: Stream) -> None:
        """A member compares receipts: it gets all that are here."""
        opening = await stream.receive()
        session = self._sessions.get(streams.field(opening, "group", bytes))
        if session is None:
            raise TransportError("this peer is not in such a group")
        session.members.position(stream.peer)
        for kept in session.receipts.values():
            if kept.done() and (receipt := kept.result()) is not None:
                await stream.send_frame(receipt.pack())

    async def _find(self, group: bytes) -> Session:
        """The session of a group; a member may reach us before our leader's message does."""
        return await entry(self._sessions, group, self._opened, JOIN_SECONDS, "this peer is not in such a group")

    # --- what this peer knows -------------------------------------------------------------------------

    def _known_rates(self, peers: Sequence[str]) -> dict[str, int]:
        """Bytes per second that each of these peers sent to us, as far as that was measured."""
        known = sorted(self._rates.keys() & set(peers))[:MAX_KNOWN]
        return {peer: max(1, int(self._rates[peer])) for peer in known}

    def _patience(self, peer: str, layout: Layout) -> float:
        """Seconds that a peer may take for its next part."""
        return patience(layout.part_bytes(0), self._rates.get(peer))

    def _most_seconds(self, layout: Layout) -> float:
        """Seconds after which a reduction is over, however slow its links."""
        return patience(2 * layout.total_bytes)

    async def _tell_progress(self, session: Session) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            self._host.emit({"event": "averaging", "done": session.arrived, "size": session.layout.parts})

    def _open_parts(self, blob: bytes, layout: Layout) -> PartFile:
        path = self._host.store.find(blob)
        if path is None:
            raise LocalError(f"the encoded delta {blob.hex()[:12]}… is not in {self._host.store.root}")
        return PartFile(path, layout)

    async def _open_reference(self, blob: bytes, layout: Layout) -> PartFile:
        """The encoded last aggregate; unlike a delta's, nobody else compares its bytes.

        Raises:
            TransportError: it was damaged on disk; the next attempt finds it written anew.
        """
        reference = self._open_parts(blob, layout)
        if await in_thread(file_digest, reference.path) != blob:
            reference.close()
            self._host.store.discard(blob)
            raise TransportError("the last round's aggregate was damaged on disk and has been removed")
        return reference


async def _send_parts(stream: Stream, delta: PartFile, share: range) -> None:
    for index in share:
        await stream.send_frame(delta.read(index))


async def _check_decodes(layout: Layout, index: int, data: bytes) -> float:
    """Decode a part, off the event loop, to see that it can be, and how large its largest magnitude is.

    Raises:
        Reject: it cannot.
    """
    return float(np.abs(await in_thread(layout.codec.decode, data, layout.part_size(index))).max())


async def _check_result(session: Session, index: int, data: bytes) -> None:
    """Can this part have come of the group's? A rule that starts from a reference may go where no part is.

    Raises:
        Reject: no.
    """
    largest, members = await _check_decodes(session.layout, index, data), session.members
    if not members.rule.needs_reference:
        check_result(index, largest, [claim.message for claim in members.claims], members.limits)


def _check_receipt(receipt: Signed[Receipt], peer: str, group: bytes, results: Mapping[int, bytes]) -> None:
    """Is this the receipt of a peer for these results (part → digest) of a group?

    Raises:
        Reject: no.
    """
    message = receipt.message
    stated = {part.index: part.result for part in message.parts}
    if message.peer != peer or message.group != group or stated != results:
        raise Reject(f"the results of {short(peer)} are not those that its receipt states")


def _part_digests(delta: PartFile) -> tuple[bytes, ...]:
    return tuple(blob_digest(delta.read(index)) for index in range(delta.layout.parts))


def _are_digests(value: Any, count: int) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == count
        and all(isinstance(item, bytes) and len(item) == 32 for item in value)
    )
