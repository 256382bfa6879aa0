"""Opening what a claim committed to, to those who were drawn to check it, and in an order that forbids copying.

A claim holds roots only. Its author keeps the digests beneath them and opens them over a stream:

* the checkpoint before a drawn segment, to its auditor;
* the checkpoint after it, and the last one, against the auditor's signed commitment to its own
  result, so that nobody can hand in the claimed result as a re-run;
* of a claim without auditor, the last checkpoint to the member that was drawn to compare it with the delta;
* parts of the delta with their way to the root, or all of it, to any member, for those were sent to reducers anyway;
* everything, to anybody, from the next round on, when the drawn auditors have committed;
* the record of the claim's round, to anybody, so that strangers learn whose claims and receipts there are.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from p2pasr.averaging.codec import Layout
from p2pasr.averaging.merkle import Tree
from p2pasr.averaging.partfile import PartFile
from p2pasr.averaging.waiting import entry, in_thread
from p2pasr.errors import LocalError, Reject, RemoteError, TransportError
from p2pasr.peers import streams
from p2pasr.peers.blobs import file_digest
from p2pasr.peers.streams import Stream
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.messages import Claim, Commitment, Signed, unseal
from p2pasr.protocol.signing import short

if TYPE_CHECKING:
    from p2pasr.peers.host import Host

OFFER_SECONDS: Final = 10.0
"""How long a claim that is not open yet is waited for."""

DELTAS_AT_ONCE: Final = 8
"""How many whole deltas are fetched at a time."""

OTHER_HOLDERS: Final = 2
"""How many others are asked for a delta that its author does not give."""

MAX_WAY: Final = 64
"""Siblings on the way to a root."""

DELTAS_HASHED: Final = 16
"""Deltas whose parts' digests are kept, 256 KiB each at most, so that parts asked for in turn read the file once."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What one claim of ours committed to, or of a claim of somebody else its delta.

    Attributes:
        checkpoints: digests of its trace.
        delta: digest of the encoded delta.
        drawn: auditor → the segments drawn for it; None when everything is open to everybody.
        link: who may see the last checkpoint although no segment was drawn for it, if anybody.
        readers: who may have the delta; None for everybody.
        record: digest of the packed record of its round; None where this peer has none.
    """

    claim: Signed[Claim]
    checkpoints: tuple[bytes, ...]
    delta: bytes
    drawn: dict[str, tuple[int, ...]] | None
    link: str | None
    readers: frozenset[str] | None
    record: bytes | None


class Openings:
    """The service. Calls: `offer`, `open`, `part`, `deltas`, `record`; see the methods."""

    def __init__(self) -> None:
        self._host: Host
        self._offers: dict[bytes, Offer] = {}
        self._offered = asyncio.Condition()
        self._digests: dict[bytes, tuple[bytes, ...]] = {}  # root of a delta → digests of its parts, the latest last

    async def start(self, host: Host) -> None:
        """Register on a host."""
        self._host = host
        await host.serve("open", self._serve)
        host.calls["offer"] = self._call_offer
        host.calls["open"] = self._call_open
        host.calls["part"] = self._call_part
        host.calls["deltas"] = self._call_deltas
        host.calls["record"] = self._call_record

    async def _call_offer(self, args: dict[str, Any]) -> dict[str, Any]:
        """Open these claims of this peer from now on, and no others.

        Args:
            args: offers, of each: claim (packed), checkpoints, delta (digests), drawn (auditor → segments, or None),
                link (peer, or None), readers (peers that the delta is given to; everybody if absent or None), record
                (digest, or None).
        """
        offers = {}
        for each in args["offers"]:
            claim, drawn, link = unseal(each["claim"], Claim), each["drawn"], each["link"]
            readers = None if each.get("readers") is None else frozenset(each["readers"])
            checkpoints = tuple(each["checkpoints"])
            offers[claim.digest] = Offer(claim, checkpoints, each["delta"], drawn, link, readers, each["record"])
        async with self._offered:
            self._offers.clear()
            self._offers.update(offers)
            self._offered.notify_all()
        return {}

    async def _call_open(self, args: dict[str, Any]) -> dict[str, Any]:
        """Have a checkpoint of another peer's trace opened.

        Args:
            args: claim (packed), checkpoint (its index), commitment (packed; None for a segment's start).

        Returns:
            digest, proof.

        Raises:
            TransportError: it is not opened.
            Reject: what is opened does not lie under the claim's root.
        """
        claim = unseal(args["claim"], Claim)
        async with self._host.open(claim.message.peer, "open") as stream:
            await stream.send(
                {"claim": claim.digest, "checkpoint": args["checkpoint"], "commitment": args["commitment"]}
            )
            answer = await stream.receive()
        digest, proof = streams.field(answer, "digest", bytes), _way(answer)
        tree = Tree.of("trace", claim.message)
        tree.check(claim.message.trace_root, args["checkpoint"], claim.message.segments, digest, proof)
        return {"digest": digest, "proof": proof}

    async def _call_part(self, args: dict[str, Any]) -> dict[str, Any]:
        """Get one part of another peer's delta.

        Args:
            args: claim (packed), index.

        Returns:
            data (the encoded part), proof.

        Raises:
            TransportError: it is not given.
            Reject: it does not lie under the claim's root.
        """
        claim, layout = unseal(args["claim"], Claim), self._layout()
        async with self._host.open(claim.message.peer, "open") as stream:
            await stream.send({"claim": claim.digest, "part": args["index"]})
            proof = _way(await stream.receive())
            data = await stream.receive_data(layout.part_bytes(args["index"]))
        tree = Tree.of("delta", claim.message)
        tree.check(claim.message.delta_root, args["index"], layout.parts, blob_digest(data), proof)
        return {"data": data, "proof": proof}

    async def _call_deltas(self, args: dict[str, Any]) -> dict[str, Any]:
        """Get whole deltas of other peers into the store, as many as come in time.

        What came is given to others in its author's place, until the next offer: whoever gives its delta to some gives
        it to all.

        Args:
            args: claims (packed), holders (peers that may have fetched them too), seconds.

        Returns:
            deltas: for each claim the digest of the encoded delta, None where nobody gave it.
        """
        claims = [unseal(packed, Claim) for packed in args["claims"]]
        gate = asyncio.Semaphore(DELTAS_AT_ONCE)
        found: dict[bytes, bytes] = {}

        async def obtain(claim: Signed[Claim]) -> None:
            author = claim.message.peer
            others = [peer for peer in args["holders"] if peer not in (author, self._host.peer)]
            for peer in (author, *others[:OTHER_HOLDERS]):
                with contextlib.suppress(TransportError, RemoteError):
                    async with gate:
                        found[claim.digest] = await self._fetch_delta(claim, peer)
                    return

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(args["seconds"]):
                await asyncio.gather(*map(obtain, claims))
        return {"deltas": [found.get(claim.digest) for claim in claims]}

    async def _fetch_delta(self, claim: Signed[Claim], peer: str) -> bytes:
        """A delta from a peer that has it; returns its digest.

        Raises:
            TransportError: it is not given.
            Reject: it does not lie under the claim's root.
        """
        layout, store = self._layout(), self._host.store
        if (known := self._offers.get(claim.digest)) is not None and store.find(known.delta) is not None:
            return known.delta
        store.make_room(layout.total_bytes)
        path, digests = store.scratch("delta"), []
        try:
            async with self._host.open(peer, "open") as stream:
                await stream.send({"claim": claim.digest, "delta": True})
                await stream.receive()
                with PartFile(path, layout) as file:
                    for index in range(layout.parts):
                        data = await stream.receive_data(layout.part_bytes(index))
                        file.write(index, data)
                        digests.append(blob_digest(data))
            if Tree.of("delta", claim.message).root(digests) != claim.message.delta_root:
                raise Reject(f"{short(peer)} gives another delta than {short(claim.message.peer)} committed to")
            delta = await in_thread(file_digest, path)
            store.commit(path, delta, "delta", durable=False)
        finally:
            path.unlink(missing_ok=True)
        async with self._offered:
            readers = frozenset[str]() if self._host.manifest.data.policy == "private" else None
            self._offers[claim.digest] = Offer(claim, (), delta, None, None, readers, None)
            self._offered.notify_all()
        return delta

    async def _call_record(self, args: dict[str, Any]) -> dict[str, Any]:
        """Ask a peer what its record of a round is.

        Args:
            args: peer, round.

        Returns:
            digest: of the packed record, which can be fetched as a blob.

        Raises:
            TransportError: it does not say.
        """
        async with self._host.open(args["peer"], "open") as stream:
            await stream.send({"record": args["round"]})
            return {"digest": streams.field(await stream.receive(), "record", bytes)}

    async def _serve(self, stream: Stream) -> None:
        request = await stream.receive()
        if "record" in request:
            await self._name_record(stream, streams.field(request, "record", int))
            return
        offer = await self._find(streams.field(request, "claim", bytes))
        if "part" in request:
            await self._give_part(stream, offer, streams.field(request, "part", int))
            return
        if "delta" in request:
            await self._give_delta(stream, offer)
            return
        index = streams.field(request, "checkpoint", int)
        if not 0 <= index < len(offer.checkpoints):
            raise Reject(f"{short(stream.peer)} asks for checkpoint {index} of {len(offer.checkpoints)}")
        self._check_right(stream.peer, offer, index, request.get("commitment"))
        tree = Tree.of("trace", offer.claim.message)
        await stream.send({"digest": offer.checkpoints[index], "proof": tree.prove(offer.checkpoints, index)})

    async def _find(self, claim: bytes) -> Offer:
        """The offer for a claim; an auditor may have finished the round a moment before its author."""
        return await entry(self._offers, claim, self._offered, OFFER_SECONDS, "this claim is not open here")

    async def _name_record(self, stream: Stream, number: int) -> None:
        offers = (offer for offer in self._offers.values() if offer.claim.message.round == number)
        records = [offer.record for offer in offers if offer.record is not None]
        if not records:
            raise TransportError(f"no record of round {number} is open here")
        await stream.send({"record": records[0]})

    def _check_right(self, peer: str, offer: Offer, index: int, commitment: Any) -> None:
        """May this peer see this checkpoint now?

        Raises:
            TransportError: not yet.
            Reject: never so.
        """
        if offer.drawn is None:
            return
        drawn = offer.drawn.get(peer, ())
        if commitment is None and index + 1 in drawn and index not in drawn:  # where a drawn segment starts
            return
        last = len(offer.checkpoints) - 1
        if peer == offer.link and index == last:
            return
        if not drawn or index not in (*drawn, last):
            raise TransportError("it is opened when the next round is over")
        if not isinstance(commitment, bytes):
            raise Reject(f"{short(peer)} asks for a result before it commits to its own")
        committed = unseal(commitment, Commitment).message
        if committed.peer != peer or committed.claim != offer.claim.digest or committed.segment not in drawn:
            raise Reject(f"{short(peer)} commits to something else than it was drawn for")
        if index in drawn and committed.segment != index:
            raise Reject(f"{short(peer)} asks for the result of another segment than it commits to")

    async def _give_part(self, stream: Stream, offer: Offer, index: int) -> None:
        layout = self._layout()
        _check_reader(stream.peer, offer)
        if not 0 <= index < layout.parts:
            raise Reject(f"{short(stream.peer)} asks for part {index} of {layout.parts}")
        path = self._host.store.find(offer.delta)
        if path is None:
            raise TransportError("this delta is kept no longer")
        claim = offer.claim.message
        if (digests := self._digests.get(claim.delta_root)) is None:
            digests = await asyncio.to_thread(part_digests_of, path, layout)
            self._remember(claim, digests)
        data, proof = await asyncio.to_thread(prove_part, path, layout, claim, index, digests)
        await stream.send({"proof": proof})
        await stream.send_frame(data)

    def _remember(self, claim: Claim, digests: tuple[bytes, ...]) -> None:
        if Tree.of("delta", claim).root(digests) != claim.delta_root:  # of a file that is damaged, and may be replaced
            return
        self._digests[claim.delta_root] = digests
        if len(self._digests) > DELTAS_HASHED:
            del self._digests[next(iter(self._digests))]

    async def _give_delta(self, stream: Stream, offer: Offer) -> None:
        _check_reader(stream.peer, offer)
        layout, path = self._layout(), self._host.store.find(offer.delta)
        if path is None:
            raise TransportError("this delta is kept no longer")
        await stream.send({"parts": layout.parts})
        with PartFile(path, layout) as delta:
            for index in range(layout.parts):
                await stream.send_frame(delta.read(index))

    def _layout(self) -> Layout:
        manifest = self._host.manifest
        return Layout.of(manifest.parameters, manifest.averaging)


def _check_reader(peer: str, offer: Offer) -> None:
    if offer.readers is not None and peer not in offer.readers:
        raise TransportError("what was made of private shards is given to those who were in its round only")


def part_digests_of(path: Path, layout: Layout) -> tuple[bytes, ...]:
    """Digests of the parts of a stored delta, all of which is read.

    Raises:
        TransportError: it is gone.
    """
    try:
        with PartFile(path, layout) as delta:
            return tuple(blob_digest(delta.read(at)) for at in range(layout.parts))
    except LocalError as error:
        raise TransportError("this delta is kept no longer") from error


def prove_part(
    path: Path, layout: Layout, claim: Claim, index: int, digests: Sequence[bytes] | None = None
) -> tuple[bytes, tuple[bytes, ...]]:
    """One part of a stored delta, and its way to the claim's root.

    Args:
        digests: those of all parts, where they are known; the whole file is read otherwise.

    Raises:
        TransportError: the delta is gone.
    """
    if digests is None:
        digests = part_digests_of(path, layout)
    try:
        with PartFile(path, layout) as delta:
            return delta.read(index), Tree.of("delta", claim).prove(digests, index)
    except LocalError as error:
        raise TransportError("this delta is kept no longer") from error


def _way(answer: dict[str, Any]) -> tuple[bytes, ...]:
    way: tuple[Any, ...] = streams.field(answer, "proof", tuple)
    if len(way) > MAX_WAY or not all(isinstance(item, bytes) and len(item) == 32 for item in way):
        raise Reject("an opening's way to the root is malformed")
    return way
