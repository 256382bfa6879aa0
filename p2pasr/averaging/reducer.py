"""Reducing a share of the parts: each part once all that still send have sent it, by the run's rule."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from p2pasr.averaging import rules
from p2pasr.averaging.codec import Layout
from p2pasr.averaging.group import Members
from p2pasr.averaging.partfile import PartFile
from p2pasr.protocol.encoding import MEBIBYTE, blob_digest
from p2pasr.protocol.messages import PartReceipt

AHEAD_BYTES: Final = 4 * MEBIBYTE
"""How much of one sender's parts may wait for the same parts of slower ones."""


@dataclass(slots=True)
class PartReducer:
    """Collects the parts of one reducer's share and reduces each when all live senders have sent it.

    Attributes:
        indices: the share.
        live: positions of senders that have not failed.
        keep: where the encoded result of a part goes.
        reference: the encoded last aggregate, if the rule starts from it and there is one.
        results: for every part of the share what will be, or is, its line in the receipt.
    """

    members: Members
    layout: Layout
    indices: range
    live: set[int]
    keep: Callable[[int, bytes], None]
    reference: PartFile | None = None
    received: dict[int, dict[int, bytes]] = field(default_factory=dict)
    results: dict[int, asyncio.Future[PartReceipt]] = field(default_factory=dict)
    _started: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.results = {index: loop.create_future() for index in self.indices}

    async def room(self, index: int) -> None:
        """Wait until a sender may send this part: who is faster than the others stays a few parts ahead at most."""
        ahead = max(2, AHEAD_BYTES // self.layout.part_bytes(index))
        if index - ahead in self.results:
            await asyncio.shield(self.results[index - ahead])

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

    def _reduce(self, index: int, parts: dict[int, bytes]) -> PartReceipt:
        codec, size = self.layout.codec, self.layout.part_size(index)
        decoded = {position: codec.decode(data, size) for position, data in parts.items()}
        members = self.members
        data = codec.encode(rules.aggregate(decoded, members.weights, members.rule, self._center(index)))
        self.keep(index, data)
        return PartReceipt(index, tuple(sorted(parts)), blob_digest(data))

    def _center(self, index: int) -> rules.Center:
        codec, size = self.layout.codec, self.layout.part_size(index)
        claims = [claim.message for claim in self.members.claims]
        order = rules.drawn_order(claims[0].state, [claim.peer for claim in claims])
        reference = codec.decode(self.reference.read(index), size) if self.reference else None
        return rules.Center(reference, order, self.members.newcomers)

    def _finish(self, index: int, done: asyncio.Future[PartReceipt]) -> None:
        self.received.pop(index, None)
        if (error := done.exception()) is not None:
            self.results[index].set_exception(error)
        else:
            self.results[index].set_result(done.result())
