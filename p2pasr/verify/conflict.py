"""Two different statements that one peer signed about one thing: proof against it that anyone can check.

A peer makes one claim in a round that starts from a state, and a reducer signs one receipt a group. Whoever
holds two needs nothing else to convince a third: no training, no other peer's word.

Where the swarm forks, honest peers follow the state that holds, and claim a round again from there. So statements
about different states are no conflict, and neither are two attestations or two records of other kinds: what a peer
holds or has found changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from p2pasr.errors import Reject
from p2pasr.protocol.encoding import pack, unpack
from p2pasr.protocol.messages import MAX_RECEIPT_BYTES, Claim, Receipt, Signed, unseal
from p2pasr.protocol.signing import short

Statement = Signed[Any]
"""Of a claim or a receipt."""

MAX_CONFLICT_BYTES: Final = 2 * MAX_RECEIPT_BYTES + 1024


@dataclass(frozen=True, slots=True)
class Conflict:
    """The two statements.

    Raises:
        ValueError: they do not contradict each other.
    """

    first: Statement
    second: Statement

    def __post_init__(self) -> None:
        if not contradict(self.first, self.second):
            raise ValueError("these statements do not contradict each other")

    @property
    def peer(self) -> str:
        """Who signed both."""
        return str(self.first.message.peer)

    def __str__(self) -> str:
        what = "receipts for one group" if isinstance(self.first.message, Receipt) else "claims"
        return f"{short(self.peer)} signed two different {what} in round {self.first.message.round}"

    def pack(self) -> bytes:
        """The bytes that convince a stranger."""
        kind = self.first.message.kind
        return pack({"first": self.first.pack(), "kind": kind, "second": self.second.pack()})

    @classmethod
    def unpack(cls, data: bytes) -> Conflict:
        """Read a proof; both signatures are checked.

        Raises:
            Reject: it is malformed, a signature does not verify, or it proves nothing.
        """
        content = unpack(data, MAX_CONFLICT_BYTES)
        if not isinstance(content, dict) or content.keys() != {"first", "kind", "second"}:
            raise Reject("a proof is not {first, kind, second}")
        kinds: dict[object, type[Claim] | type[Receipt]] = {Claim.kind: Claim, Receipt.kind: Receipt}
        packed = content["first"], content["second"]
        if content["kind"] not in kinds or not all(isinstance(item, bytes) for item in packed):
            raise Reject("a proof holds two claims or two receipts")
        first, second = (unseal(item, kinds[content["kind"]], MAX_RECEIPT_BYTES) for item in packed)
        try:
            return cls(first, second)
        except ValueError as error:
            raise Reject(f"a proof proves nothing: {error}") from None


def contradict(first: Statement, second: Statement) -> bool:
    """Whether no honest peer signs both."""
    one, other = first.message, second.message
    if type(one) is not type(other) or one == other:
        return False
    same_round = (one.run, one.peer, one.round, one.state) == (other.run, other.peer, other.round, other.state)
    if isinstance(one, Receipt) and isinstance(other, Receipt):
        return same_round and one.group == other.group
    return same_round
