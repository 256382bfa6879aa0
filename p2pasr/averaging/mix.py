"""Mixing cohorts: each member reduces a share of the parts of all cohorts' deltas, and gets the rest from its mates.

All members of a cohort hold the same delta, to the bit, so that any of them can give any part of it,
and a part counts if it lies under the root that the cohort agreed on. What a member reduces follows
from the same inputs for everybody: whoever mistrusts a result can compute it. A cohort's members get
about one delta's worth of parts from other cohorts together with one of results from each other,
however many cohorts there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from p2pasr.averaging import rules
from p2pasr.averaging.codec import Layout
from p2pasr.averaging.merkle import Tree
from p2pasr.averaging.partfile import PartFile
from p2pasr.averaging.waiting import entry, in_thread, soon
from p2pasr.errors import LocalError, P2pasrError, Reject, TransportError
from p2pasr.peers.blobs import file_digest
from p2pasr.peers.host import Host
from p2pasr.peers.streams import Stream, patience
from p2pasr.peers.streams import field as field_of
from p2pasr.protocol import mixing
from p2pasr.protocol.cohorts import Cohort
from p2pasr.protocol.encoding import DIGEST_BYTES, blob_digest, digest, pack
from p2pasr.protocol.messages import MAX_RECEIPT_BYTES, PartReceipt, Receipt, Signed, seal, unseal
from p2pasr.protocol.mixing import MAX_LEDGER_BYTES, Ledger
from p2pasr.protocol.signing import short

T = TypeVar("T")

JOIN_SECONDS: Final = 20.0
"""How long a member is given to come to what others ask of it."""

RESULT_PATIENCE: Final = 3
"""A mate that waits for the slowest cohort may take so many times as long as one part of each takes."""

MAX_SOURCES: Final = 8
"""How many members of a cohort are asked for its delta."""


def mix_tree(run: bytes, number: int, cohort: Cohort) -> Tree:
    """What a cohort's commitment for a mix is bound to; the last leaf is its ledger, the others its parts."""
    return Tree("mix", run, number, cohort.name)


def shares_of(parts: int, peers: Collection[str], name: bytes) -> dict[str, list[int]]:
    """Which members reduce which parts, by rendezvous: each part falls to the one that a hash ranks first.

    Members who see different ones of each other still agree on most parts; nobody reduces more than an
    equal share, rounded up.

    Args:
        peers: at least one.
        name: the mix.

    Returns:
        Peer → ascending indices of its parts; every part once.
    """
    shares: dict[str, list[int]] = {peer: [] for peer in peers}
    most = -(-parts // len(shares))
    for index in range(parts):
        place = name + index.to_bytes(8, "big")
        free = [peer for peer, share in shares.items() if len(share) < most]
        shares[min(free, key=lambda peer: digest("mix-share", place + peer.encode()))].append(index)
    return shares


def share_name(name: bytes, indices: Iterable[int]) -> bytes:
    """Names a share of a mix: 32 bytes. Under one such name all honest members state the same results.

    Args:
        name: the mix.
    """
    return digest("mix-share-name", name + pack(sorted(indices)))


@dataclass(frozen=True, slots=True)
class Offer:
    """What this peer gives for its cohort: the encoded delta and the ledger, under one root."""

    root: bytes
    tree: Tree
    delta: PartFile
    ledger: bytes
    digests: tuple[bytes, ...]

    @classmethod
    def of(cls, tree: Tree, delta: PartFile, ledger: bytes) -> Offer:
        """The offer of these contents."""
        parts = (blob_digest(delta.read(index)) for index in range(delta.layout.parts))
        digests = (*parts, blob_digest(ledger))
        return cls(tree.root(digests), tree, delta, ledger, digests)

    def read(self, index: int) -> bytes:
        """A part, or the ledger, which comes behind them."""
        return self.ledger if index == self.delta.layout.parts else self.delta.read(index)


@dataclass(frozen=True, slots=True)
class Source:
    """A cohort that is mixed, and who gives its delta."""

    cohort: Cohort
    state: bytes
    root: bytes
    peers: tuple[str, ...]


@dataclass(slots=True)
class Session:
    """One mix, as seen by one member.

    Attributes:
        name: the digest of what is mixed.
        cohort: ours.
        sources: all cohorts in it, in their order.
        shares: member of ours → the parts that it reduces.
        average: the result, which fills up.
        results: for every part of our share what will be, or is, the digest of its result.
    """

    name: bytes
    round: int
    state: bytes
    cohort: Cohort
    sources: tuple[Source, ...]
    shares: dict[str, list[int]]
    average: PartFile
    results: dict[int, asyncio.Future[bytes]]
    weights: tuple[float, ...] = field(default=())

    def close(self) -> None:
        """Let go of the files; members that still wait are told that nothing comes."""
        for result in self.results.values():
            if not result.done():
                result.set_exception(TransportError("this mix is over"))
                result.exception()  # that nobody waits for it any more is no mistake
        self.average.close()
        self.average.path.unlink(missing_ok=True)


class MixExchange:
    """The service. Calls: `contribute`, see :meth:`_call_contribute`; `mix`, see :meth:`_call_mix`."""

    def __init__(self) -> None:
        self._host: Host
        self._offers: dict[bytes, Offer] = {}
        self._sessions: dict[bytes, Session] = {}
        self._changed = asyncio.Condition()

    async def start(self, host: Host) -> None:
        """Register on a host."""
        self._host = host
        await host.serve("mix-parts", self._serve_parts)
        await host.serve("mix-results", self._serve_results)
        host.calls["contribute"] = self._call_contribute
        host.calls["mix"] = self._call_mix
        host.at_stop.append(self._stop)

    def _stop(self) -> None:
        for offer in self._offers.values():
            offer.delta.close()
        for session in self._sessions.values():
            session.close()

    # --- calls of the training process --------------------------------------------------------------

    async def _call_contribute(self, args: dict[str, Any]) -> dict[str, Any]:
        """Give this cohort's delta to others from now on, in the place of the one before.

        Args:
            args: round, cohort (bits and index); delta (digest of the encoded one); ledger (packed).

        Returns:
            root, the Merkle root over both.
        """
        path = self._host.store.find(args["delta"])
        if path is None:
            raise LocalError(f"the cohort's delta {args['delta'].hex()[:12]}… is not in {self._host.store.root}")
        tree = mix_tree(self._host.run, args["round"], Cohort(*args["cohort"]))
        offer = await in_thread(Offer.of, tree, PartFile(path, self._layout), args["ledger"])
        if offer.root in self._offers:
            offer.delta.close()
            return {"root": offer.root}
        async with self._changed:
            for previous in self._offers.values():
                previous.delta.close()
            self._offers.clear()
            self._offers[offer.root] = offer
            self._changed.notify_all()
        return {"root": offer.root}

    async def _call_mix(self, args: dict[str, Any]) -> dict[str, Any]:
        """Mix cohorts.

        Args:
            args: name (digest of what is mixed), round, since (the common state's round), state (ours);
                cohort (ours: bits and index); sources (for each cohort in the mix, in order: index, state,
                root, peers that give its delta); mates (members of ours that reduce, this peer perhaps
                among them).

        Returns:
            average (digest of the encoded result), ledgers (packed, of each cohort), receipts (packed, of mates).
        """
        session = await self._open(args)
        try:
            ledgers = await asyncio.gather(*(self._fetch_ledger(session, source) for source in session.sources))
            rounds = args["round"] - args["since"]
            read = [
                Ledger.unpack(data, self._host.manifest, source.cohort, rounds)
                for data, source in zip(ledgers, session.sources, strict=True)
            ]
            session.weights = mixing.weights(read, self._host.manifest)
            receipts = await self._run(session)
        except BaseException:
            session.close()
            raise
        average = await in_thread(file_digest, session.average.path)
        if self._host.store.find(average) is None:
            self._host.store.make_room(self._layout.total_bytes)
            self._host.store.commit(session.average.path, average, "average", durable=False)
        return {"average": average, "ledgers": ledgers, "receipts": [receipt.pack() for receipt in receipts]}

    # --- as a member ----------------------------------------------------------------------------------

    async def _open(self, args: Mapping[str, Any]) -> Session:
        cohort = Cohort(*args["cohort"])
        shares = shares_of(self._layout.parts, args["mates"] or [self._host.peer], args["name"])
        self._host.store.make_room(self._layout.total_bytes)
        loop = asyncio.get_running_loop()
        session = Session(
            name=args["name"],
            round=args["round"],
            state=args["state"],
            cohort=cohort,
            sources=tuple(
                Source(Cohort(cohort.bits, index), state, root, self._ranked(peers))
                for index, state, root, peers in args["sources"]
            ),
            shares=shares,
            average=PartFile(self._host.store.scratch("average"), self._layout),
            results={index: loop.create_future() for index in shares.get(self._host.peer, ())},
        )
        async with self._changed:
            for previous in self._sessions.values():
                previous.close()
            self._sessions.clear()
            self._sessions[session.name] = session
            self._changed.notify_all()
        return session

    async def _run(self, session: Session) -> list[Signed[Receipt]]:
        """Reduce our share, get the others', and reduce what nobody gives us; returns the receipts of mates."""
        mates = [peer for peer, share in session.shares.items() if share and peer != self._host.peer]
        reducing = asyncio.create_task(self._reduce(session, session.results))
        try:
            outcomes = await asyncio.gather(
                *(self._fetch_results(session, mate) for mate in mates), return_exceptions=True
            )
            await reducing
        finally:
            reducing.cancel()
        receipts: list[Signed[Receipt]] = []
        left: list[int] = []
        for mate, outcome in zip(mates, outcomes, strict=True):
            if isinstance(outcome, P2pasrError):
                self._host.warn(f"{short(mate)} mixed nothing for this peer ({outcome}): its share is mixed here")
                left += session.shares[mate]
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                receipts.append(outcome)
        await self._reduce(session, sorted(left))
        return receipts

    async def _reduce(self, session: Session, indices: Iterable[int]) -> None:
        """Get these parts of all cohorts, each in turn, and reduce them."""
        wanted = tuple(indices)
        pulls = [self._pull(session, source, wanted) for source in session.sources]
        try:
            for index in wanted:
                parts = await asyncio.gather(*(anext(pull) for pull in pulls))
                data = await in_thread(self._reduce_part, session, index, parts)
                session.average.write(index, data)
                if (result := session.results.get(index)) is not None and not result.done():
                    result.set_result(blob_digest(data))
        finally:
            for pull in pulls:
                await pull.aclose()

    def _reduce_part(self, session: Session, index: int, parts: Sequence[bytes]) -> bytes:
        codec, size = self._layout.codec, self._layout.part_size(index)
        decoded = {position: codec.decode(data, size) for position, data in enumerate(parts)}
        clipped = rules.clip(decoded, self._host.manifest.averaging.rule.clip_norm)
        return codec.encode(rules.weighted_mean(clipped, session.weights))

    async def _fetch_ledger(self, session: Session, source: Source) -> bytes:
        pull = self._pull(session, source, (self._layout.parts,))
        try:
            return await anext(pull)
        finally:
            await pull.aclose()

    async def _pull(self, session: Session, source: Source, indices: Sequence[int]) -> AsyncGenerator[bytes, None]:
        """Items of a cohort's offer, checked against its root, from one member after the other.

        Raises:
            TransportError: nobody gives them.
        """
        if (offer := self._offers.get(source.root)) is not None:
            for index in indices:
                yield offer.read(index)
            return
        left, reasons = list(indices), ["nobody there can be reached"]
        tree = mix_tree(self._host.run, session.round, source.cohort)
        for peer in source.peers[:MAX_SOURCES]:
            if not left:
                return
            try:
                async with self._host.open(peer, "mix-parts", self._patience()) as stream:
                    await stream.send({"root": source.root, "items": tuple(left)})
                    while left:
                        data = await self._receive_item(stream, tree, source.root, left[0])
                        yield data
                        left.pop(0)
            except P2pasrError as error:
                reasons.append(str(error))
        if left:
            raise TransportError(f"cohort {source.cohort.name} gives no part {left[0]}: {reasons[-1]}")

    async def _receive_item(self, stream: Stream, tree: Tree, root: bytes, index: int) -> bytes:
        parts = self._layout.parts
        proof = field_of(await stream.receive(), "proof", tuple)
        if index < parts:
            data = await stream.receive_data(self._layout.part_bytes(index))
            await in_thread(self._layout.codec.decode, data, self._layout.part_size(index))
        else:
            data = await stream.receive_frame(MAX_LEDGER_BYTES)
        if not all(isinstance(sibling, bytes) and len(sibling) == DIGEST_BYTES for sibling in proof):
            raise Reject(f"{short(stream.peer)} sends a proof that is none")
        tree.check(root, index, parts + 1, blob_digest(data), proof)
        return data

    async def _fetch_results(self, session: Session, mate: str) -> Signed[Receipt]:
        """What a mate reduced, with its word for it."""
        wanted = session.shares[mate]
        wait = self._result_patience(session)
        results: dict[int, bytes] = {}
        async with self._host.open(mate, "mix-results", wait) as stream:
            await stream.send({"name": session.name, "items": tuple(wanted)})
            for index in wanted:
                data = await stream.receive_data(self._layout.part_bytes(index), wait)
                await in_thread(self._layout.codec.decode, data, self._layout.part_size(index))
                session.average.write(index, data)
                results[index] = blob_digest(data)
            receipt = unseal(await stream.receive_frame(MAX_RECEIPT_BYTES), Receipt, MAX_RECEIPT_BYTES)
        stated = {part.index: part.result for part in receipt.message.parts}
        signed = receipt.message.peer, receipt.message.group
        if signed != (mate, share_name(session.name, stated)) or not results.items() <= stated.items():
            raise Reject(f"the results of {short(mate)} are not those that its receipt states")
        return receipt

    # --- for others -----------------------------------------------------------------------------------

    async def _serve_parts(self, stream: Stream) -> None:
        """Somebody wants items of our cohort's offer."""
        opening = await stream.receive()
        root = field_of(opening, "root", bytes)
        items = _indices(opening, self._layout.parts + 1)
        offer = await self._find(self._offers, root)
        stream.timeout = self._patience()
        for index in items:
            await stream.send({"proof": await in_thread(offer.tree.prove, offer.digests, index)})
            await stream.send_frame(offer.read(index))

    async def _serve_results(self, stream: Stream) -> None:
        """A mate wants what we reduced."""
        opening = await stream.receive()
        name = field_of(opening, "name", bytes)
        items = _indices(opening, self._layout.parts)
        session = await self._find(self._sessions, name)
        if not session.cohort.has(self._host.run, stream.peer):
            raise Reject(f"{short(stream.peer)} is of another cohort")
        if not session.results.keys() >= set(items):
            raise Reject(f"{short(stream.peer)} asks for parts that this peer does not reduce")
        stream.timeout = self._patience()
        for index in items:
            await soon(session.results[index], self._result_patience(session))
            await stream.send_frame(session.average.read(index))
        await stream.send_frame((await self._receipt(session)).pack())

    async def _find(self, table: dict[bytes, T], name: bytes) -> T:
        """An offer or a mix; others may reach us before our training process has come to it."""
        return await entry(table, name, self._changed, JOIN_SECONDS, "this peer is not in such a mix")

    async def _receipt(self, session: Session) -> Signed[Receipt]:
        """Our receipt, when all of our share is reduced; equal shares have equal receipts."""
        lines = [
            (index, await soon(result, self._result_patience(session))) for index, result in session.results.items()
        ]
        everybody = tuple(range(len(session.sources)))
        receipt = Receipt(
            run=self._host.run,
            peer=self._host.peer,
            round=session.round,
            state=session.state,
            group=share_name(session.name, session.results),
            members=tuple(source.state for source in session.sources),
            parts=tuple(PartReceipt(index, everybody, result) for index, result in lines),
        )
        return seal(self._host.identity, receipt)

    # --- what this peer knows -------------------------------------------------------------------------

    @property
    def _layout(self) -> Layout:
        manifest = self._host.manifest
        return Layout.of(manifest.parameters, manifest.averaging)

    def _ranked(self, peers: Iterable[str]) -> tuple[str, ...]:
        """Members of a cohort in the order in which this peer asks them: others ask in another."""
        ours = self._host.peer.encode()
        return tuple(sorted(peers, key=lambda peer: digest("mix-source", ours + peer.encode())))

    def _patience(self) -> float:
        return patience(self._layout.part_bytes(0))

    def _result_patience(self, session: Session) -> float:
        return RESULT_PATIENCE * patience(self._layout.part_bytes(0) * len(session.sources))


def _indices(opening: dict[str, Any], count: int) -> tuple[int, ...]:
    """The items that a peer asks for.

    Raises:
        Reject: they are not ascending numbers below `count`.
    """
    items: tuple[Any, ...] = field_of(opening, "items", tuple)
    if not all(type(index) is int and 0 <= index < count for index in items) or list(items) != sorted(set(items)):
        raise Reject("a peer asks for items that there are not")
    return items
