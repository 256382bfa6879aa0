"""Merkle roots over what a claim commits to: delta parts and trace checkpoints.

Leaves and nodes are hashed in different domains (0x00 and 0x01), so that a node can never pass for a
leaf, and each leaf binds what it is a leaf of: kind, run, round, peer and index. A level of odd
length passes its last node up unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2pasr.errors import Reject
from p2pasr.protocol.encoding import blob_digest, digest
from p2pasr.protocol.messages import Claim


@dataclass(frozen=True, slots=True)
class Tree:
    """What the leaves of a tree are bound to.

    Args:
        kind: "delta", "trace" or "mix".
        run: 32 bytes.
        round: the round.
        peer: whose commitment it is: a peer's ID, or a cohort's name.
    """

    kind: str
    run: bytes
    round: int
    peer: str

    @classmethod
    def of(cls, kind: str, claim: Claim) -> Tree:
        """The tree of what a claim commits to."""
        return cls(kind, claim.run, claim.round, claim.peer)

    def leaf(self, index: int, content: bytes) -> bytes:
        """The leaf for an item whose digest is `content`."""
        place = self.run + self.round.to_bytes(8, "big") + self.peer.encode() + index.to_bytes(8, "big")
        return digest(f"leaf-{self.kind}", b"\x00" + place + content)

    def root(self, contents: Sequence[bytes]) -> bytes:
        """The root over items with these digests, in order.

        Raises:
            ValueError: there are none.
        """
        if not contents:
            raise ValueError("a Merkle tree has at least one leaf")
        level = [self.leaf(index, content) for index, content in enumerate(contents)]
        while len(level) > 1:
            level = _parents(level)
        return level[0]

    def prove(self, contents: Sequence[bytes], index: int) -> tuple[bytes, ...]:
        """The siblings from one leaf to the root."""
        level = [self.leaf(i, content) for i, content in enumerate(contents)]
        proof: list[bytes] = []
        while len(level) > 1:
            if (sibling := index ^ 1) < len(level):
                proof.append(level[sibling])
            level, index = _parents(level), index // 2
        return tuple(proof)

    def check(self, root: bytes, index: int, count: int, content: bytes, proof: Sequence[bytes]) -> None:
        """Does item `index` of `count`, whose digest is `content`, lie under `root`?

        Raises:
            Reject: it does not.
        """
        if not 0 <= index < count:
            raise Reject(f"item {index} is not one of {count}")
        node, position, width, siblings = self.leaf(index, content), index, count, list(proof)
        while width > 1:
            if position ^ 1 < width:
                if not siblings:
                    raise Reject("a Merkle proof is too short")
                sibling = siblings.pop(0)
                node = _node(sibling, node) if position % 2 else _node(node, sibling)
            position, width = position // 2, (width + 1) // 2
        if siblings or node != root:
            raise Reject(f"item {index} of a {self.kind} does not lie under its root")


def part_digests(parts: Sequence[bytes | memoryview]) -> list[bytes]:
    """BLAKE3 of each part."""
    return [blob_digest(part) for part in parts]


def _parents(level: list[bytes]) -> list[bytes]:
    pairs = [_node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
    return pairs + level[len(pairs) * 2 :]


def _node(left: bytes, right: bytes) -> bytes:
    return digest("node", b"\x01" + left + right)
