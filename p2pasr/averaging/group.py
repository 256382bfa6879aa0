"""The members of one group: whose claims were checked, who reduces which parts, and what each weighs."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from p2pasr.averaging import rules, shares
from p2pasr.averaging.codec import Layout
from p2pasr.averaging.matchmaking import MAX_GATHER_BYTES, Group
from p2pasr.errors import Reject, TransportError
from p2pasr.peers import streams
from p2pasr.protocol.admission import newcomers
from p2pasr.protocol.encoding import digest, pack, unpack
from p2pasr.protocol.manifest import RuleSection
from p2pasr.protocol.messages import Claim, Signed, unseal
from p2pasr.protocol.rules import RoundView, check_claim
from p2pasr.protocol.signing import short

MAX_RATE: Final = 1 << 40
"""Bytes per second; nobody sends faster."""

NONCE_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Brought:
    """What a peer brings to a group.

    Attributes:
        claim: its own.
        reduces: whether others can reach it, so that it can reduce.
        rates: bytes per second that it received from others in earlier rounds.
        failed: peers that reduced nothing for it in this round.
        nonce: random bytes, so that no group of this peer has the name of an earlier one: a leader that could make it
            reduce twice under one name would have two receipts of it, which are proof against whoever signs them.
    """

    claim: Signed[Claim]
    reduces: bool
    rates: Mapping[str, int] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(NONCE_BYTES), compare=False)

    def pack(self) -> bytes:
        """The bytes that travel through matchmaking."""
        return pack(
            {
                "claim": self.claim.pack(),
                "reduces": self.reduces,
                "rates": dict(self.rates),
                "failed": self.failed,
                "nonce": self.nonce,
            }
        )


@dataclass(frozen=True, slots=True)
class Members:
    """A group whose claims were checked.

    Attributes:
        group: its identifier, which binds the members and what each brought.
        claims: in the group's order.
        shares: the parts that each member reduces.
        weights: weight of each claim.
        reachable: positions of those that accept connections.
        rule: how their parts become one.
        limits: the most that a value of a delta can be after 1, 2, … segments; None if nothing is known of that.
        newcomers: positions of those that weigh no more than a share together.
    """

    group: bytes
    claims: tuple[Signed[Claim], ...]
    shares: tuple[range, ...]
    weights: tuple[float, ...]
    reachable: frozenset[int]
    rule: RuleSection = field(default_factory=RuleSection)
    limits: Sequence[float] | None = None
    newcomers: frozenset[int] = frozenset()

    def position(self, peer: str) -> int:
        """A member's position.

        Raises:
            Reject: the peer is no member.
        """
        for position, claim in enumerate(self.claims):
            if claim.message.peer == peer:
                return position
        raise Reject(f"{short(peer)} is not in this group")

    def peer(self, position: int) -> str:
        """The ID of the member at a position."""
        return self.claims[position].message.peer

    @property
    def reducers(self) -> tuple[int, ...]:
        """Positions of those that reduce a part."""
        return tuple(position for position, share in enumerate(self.shares) if share)


def check_gathered(peer: str, gathered: bytes, view: RoundView, shunned: Collection[str] = ()) -> Brought:
    """What a peer brought along.

    Args:
        shunned: peers that proved to cheat.

    Raises:
        Ignore, Reject: it may not be averaged with.
    """
    if peer in shunned:
        raise Reject(f"{short(peer)} is proved to cheat")
    content = unpack(gathered, MAX_GATHER_BYTES)
    if not isinstance(content, dict) or content.keys() != {"claim", "reduces", "rates", "failed", "nonce"}:
        raise Reject(f"{short(peer)} brought no claim")
    brought = Brought(
        unseal(streams.field(content, "claim", bytes), Claim),
        streams.field(content, "reduces", bool),
        streams.field(content, "rates", dict),
        streams.field(content, "failed", tuple),
        streams.field(content, "nonce", bytes),
    )
    if len(brought.nonce) != NONCE_BYTES:
        raise Reject(f"{short(peer)} brought a nonce of {len(brought.nonce)} bytes")
    if not all(type(rate) is int and 0 < rate <= MAX_RATE for rate in brought.rates.values()):
        raise Reject(f"{short(peer)} brought impossible rates")
    if not all(isinstance(name, str) for name in brought.failed):
        raise Reject(f"{short(peer)} names something that is no peer")
    if brought.claim.message.peer != peer:
        raise Reject(f"{short(peer)} brought the claim of {short(brought.claim.message.peer)}")
    check_claim(brought.claim.message, view)
    return brought


def check_group(
    group: Group,
    view: RoundView,
    ours: Signed[Claim],
    limits: Sequence[float] | None = None,
    shunned: Collection[str] = (),
) -> Members:
    """Check what the leader sent: every member's claim, and that ours is among them.

    Raises:
        Ignore, Reject: it is no group that we can average with.
        TransportError: nobody in it can reduce.
    """
    if len(group.peers) != len(group.gathered) or len(set(group.peers)) != len(group.peers):
        raise Reject("the leader's group is malformed")
    pairs = zip(group.peers, group.gathered, strict=True)
    brought = [check_gathered(peer, data, view, shunned) for peer, data in pairs]
    claims = tuple(each.claim for each in brought)
    if ours not in claims:
        raise Reject("the leader's group lacks this peer's claim")
    reachable = frozenset(position for position, each in enumerate(brought) if each.reduces or len(brought) == 1)
    if not reachable:
        raise TransportError("all peers of the group are in client mode, and a group needs one that others can reach")
    layout = Layout.of(view.manifest.parameters, view.manifest.averaging)
    rates = shares.agreed_rates([each.rates for each in brought], group.peers)
    messages = [claim.message for claim in claims]
    out = rules.banned(messages, view.manifest, view.credit, view.guests)
    trusted = frozenset(at for at in reachable if group.peers[at] not in out) or reachable
    reducing = trusted - failed_reducers(brought, group.peers) or trusted
    return Members(
        group=group_id(group),
        claims=claims,
        shares=shares.split(layout.parts, [rate if at in reducing else 0.0 for at, rate in enumerate(rates)]),
        weights=rules.weights(messages, view.manifest, view.credit, view.guests),
        reachable=reachable,
        rule=view.manifest.averaging.rule,
        limits=limits,
        newcomers=newcomers(messages, view.manifest, view.credit),
    )


def group_id(group: Group) -> bytes:
    """Names a group together with its members and what they brought: 32 bytes.

    Members to whom a leader told different rosters do not find each other under it.
    """
    return digest("group-members", pack([group.id, group.peers, group.gathered]))


def failed_reducers(brought: Sequence[Brought], peers: Sequence[str]) -> set[int]:
    """Positions of members that should not reduce, for they reduced nothing for some member before.

    One member may name a quarter of the others, so that a liar cannot leave the reduction to its friends.
    """
    most = max(1, (len(peers) - 1) // 4)
    named = {peer for each in brought for peer in each.failed[:most]}
    return {position for position, peer in enumerate(peers) if peer in named}
