"""Taking out again what was merged of a peer: the arithmetic, and the blob that holds its result.

In a run whose rule is the mean and whose outer optimizer is FedAvg, the state is a sum. What a round
added is the decoded average times the learning rate; what the others had in it is computed again from
their deltas, with the shares that they had. The rest was the banned peer's, and is subtracted. Its
own delta is not needed: the parts that it reduced itself it has never sent to anybody, and how far
its others were scaled down depends on everybody's.

Everything is element-wise numpy in float32, one rounding an operation, rounds in ascending order, so
that whoever holds the same deltas computes the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from p2pasr.averaging import rules
from p2pasr.averaging.codec import Layout, Vector
from p2pasr.averaging.partfile import PartFile
from p2pasr.errors import Reject
from p2pasr.protocol.encoding import MEBIBYTE
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.tensors import Tensors, forms, tensor_pieces, unpack_tensors
from p2pasr.verify.record import RoundRecord

FORMAT: Final = "p2pasr-undo/1"

Entry = tuple[int, str]
"""A round, and a peer whose delta in it is taken out."""


@dataclass(frozen=True, slots=True)
class Undo:
    """What takes a banned peer's last work out of the state.

    Attributes:
        peer: the banned one.
        removed: whose deltas of which rounds it takes out, ascending: the peer's, and those that nobody gave any more.
        change: name → float32, what is subtracted from the parameters.
    """

    peer: str
    removed: tuple[Entry, ...]
    change: Tensors

    @property
    def rounds(self) -> tuple[int, ...]:
        """The rounds in which something of the peer was merged that is taken out, ascending."""
        return tuple(number for number, peer in self.removed if peer == self.peer)

    @property
    def pieces(self) -> tuple[bytes | memoryview, ...]:
        """Its canonical bytes in pieces."""
        removed = [list(entry) for entry in self.removed]
        return tensor_pieces(self.change, {"format": FORMAT, "peer": self.peer, "removed": removed})

    def taken_from(self, params: Tensors) -> Tensors:
        """Parameters without it, one rounding a value."""
        return {name: np.subtract(value, self.change[name]) for name, value in params.items()}


def max_undo_bytes(manifest: RunManifest) -> int:
    """The longest blob that can be an undo of this run: four bytes a value, and a header."""
    return 4 * manifest.parameters + 4 * MEBIBYTE


def read_undo(blob: bytes, like: Tensors) -> Undo:
    """Read an undo that came from a peer.

    Args:
        like: the parameters, whose names, shapes and dtypes it must have.

    Raises:
        Reject: it is none, or its values are not finite.
    """
    change, meta = unpack_tensors(blob)
    if forms(change) != forms(like) or not all(np.isfinite(value).all() for value in change.values()):
        raise Reject("an undo holds other values than this run's parameters, or some that are not finite")
    peer, removed = meta.get("peer"), meta.get("removed")
    if meta.keys() != {"format", "peer", "removed"} or meta["format"] != FORMAT or not isinstance(peer, str):
        raise Reject("an undo's description is malformed")
    if not isinstance(removed, list) or not all(map(_is_entry, removed)):
        raise Reject("an undo does not say what it takes out")
    entries = tuple((number, name) for number, name in removed)
    if list(entries) != sorted(set(entries)) or peer not in (name for _, name in entries):
        raise Reject("an undo takes something out twice, out of order, or nothing of its peer")
    return Undo(peer, entries, change)


def _is_entry(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and type(value[0]) is int and isinstance(value[1], str)


@dataclass(frozen=True, slots=True)
class MergedRound:
    """A round that is undone in part.

    Attributes:
        record: checked before.
        weights: of its members, as its reducers used them.
        average: the encoded average.
        deltas: position → encoded delta, of the members that stay in; all were checked against their claims.
        newcomers: positions of those that had no say in how long a part may be.
    """

    record: RoundRecord
    weights: Sequence[float]
    average: PartFile
    deltas: Mapping[int, PartFile]
    newcomers: frozenset[int] = frozenset()

    @property
    def removed(self) -> tuple[Entry, ...]:
        """Who is taken out of it: all that weigh something and are not among the deltas."""
        members = enumerate(self.record.members)
        names = (claim.message.peer for at, claim in members if at not in self.deltas and self.weights[at] > 0)
        return tuple((self.record.round, name) for name in sorted(names))


def is_merged(record: RoundRecord, peer: str) -> bool:
    """Whether any part of a peer's delta is in a round's average."""
    peers = [claim.message.peer for claim in record.members]
    parts = (part for receipt in record.receipts for part in receipt.message.parts)
    return peer in peers and any(peers.index(peer) in part.senders for part in parts)


def undo_of(peer: str, rounds: Sequence[MergedRound], manifest: RunManifest, like: Tensors) -> Undo:
    """What takes a peer out of some rounds.

    Args:
        rounds: ascending, at least one; what of their members is not among their deltas is taken out.
        like: the parameters, for names and shapes.

    Raises:
        Reject: a member's part cannot be decoded, so that its reducer should not have taken it.
    """
    layout = Layout.of(manifest.parameters, manifest.averaging)
    total = np.zeros(layout.values, dtype=np.float32)
    for index, cut in enumerate(layout.cuts()):
        for each in rounds:
            total[cut] = total[cut] + removed_part(each, manifest, layout, index)
    change: Tensors = {}
    start = 0
    for name in sorted(like):
        change[name] = total[start : start + like[name].size].reshape(like[name].shape)
        start += like[name].size
    return Undo(peer, tuple(sorted(entry for each in rounds for entry in each.removed)), change)


def removed_part(merged: MergedRound, manifest: RunManifest, layout: Layout, index: int) -> Vector:
    """What one part of a round's average moved the parameters by, less what those that stay in had in it.

    They keep the shares that they had, and are scaled down to a multiple of the median length among themselves.
    """
    codec, size = layout.codec, layout.part_size(index)
    receipts = (receipt.message for receipt in merged.record.receipts)
    senders = next(part.senders for receipt in receipts for part in receipt.parts if part.index == index)
    average = codec.decode(merged.average.read(index), size)
    stay = {at: codec.decode(merged.deltas[at].read(index), size) for at in senders if at in merged.deltas}
    if stay:
        stay = rules.clip(stay, manifest.averaging.rule.clip_norm, merged.newcomers)
    rest = rules.weighted_mean(dict.fromkeys(senders, np.zeros(size, dtype=np.float32)) | stay, merged.weights)
    removed: Vector = np.multiply(np.float32(manifest.averaging.outer.learning_rate), average - rest)
    return removed
