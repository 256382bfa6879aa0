"""Who may take part, and whose claims count: functions of the agreed state and of what a peer shows of itself.

A run is open, or for listed peers, or for founders and those whom members invite. Whoever reads a record of a guest
checks its invite against the state that he holds. Once a claim of the guest is merged, the state's ledger names it with
its inviter, and no invite is needed any more. Whatever its kind, a run can ask every key for a proof of work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol, TypeVar

from p2pasr.errors import Ignore, Reject, RemoteError
from p2pasr.protocol.encoding import digest
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import MAX_INVITE_BYTES, Claim, Invite, Ticket, unseal
from p2pasr.protocol.signing import short

S = TypeVar("S", bound="Shown")

TRIES_AT_ONCE: Final = 1 << 14
"""Hashes between two words of progress: a few hundredths of a second."""


class Agreed(Protocol):
    """What is agreed on about peers: a state, or a view of the round that starts from one."""

    @property
    def run(self) -> bytes:
        """The run's id."""

    @property
    def round(self) -> int:
        """The round that starts from the state."""

    @property
    def credit(self) -> Mapping[str, float]:
        """Peer → seconds of audio of its merged claims."""

    @property
    def bans(self) -> Mapping[str, int]:
        """Peer → the round in which it was banned."""

    @property
    def guests(self) -> Mapping[str, str]:
        """Guest of whom a claim was merged → who invited it."""


class Shown(Protocol):
    """A record that shows a ticket."""

    @property
    def run(self) -> bytes:
        """The run's id."""

    @property
    def peer(self) -> str:
        """Its author."""

    @property
    def ticket(self) -> Ticket:
        """What the author shows."""


class TooEarly(Ignore):
    """An invite by somebody who may not invite yet; it counts as soon as he may."""


def check_admitted(peer: str, ticket: Ticket, manifest: RunManifest, held: Agreed) -> None:
    """May this peer take part, but for a ban?

    Args:
        ticket: what it shows.

    Raises:
        Ignore: no, or not yet.
        Reject: it shows something forged.
    """
    section = manifest.admission
    if not has_worked(held.run, peer, ticket.nonce, section.work_bits):
        raise Ignore(f"{short(peer)} shows no proof of work of {section.work_bits} bits")
    if section.kind == "open" or peer in section.peers or peer in held.guests:
        return
    if section.kind == "allowlist":
        raise Ignore(f"{short(peer)} is not among the peers that this run admits")
    if not ticket.invite:
        raise Ignore(f"{short(peer)} has no invite to this run")
    check_invite(read_invite(ticket.invite, held.run, peer), manifest, held)


def admitted(records: Mapping[str, S], manifest: RunManifest, held: Agreed) -> dict[str, S]:
    """Those of some records whose authors take part and were not banned.

    Args:
        records: of one kind, by their authors.
    """
    found = {peer: record for peer, record in records.items() if peer not in held.bans}
    found = {peer: record for peer, record in found.items() if _is_admitted(record, manifest, held)}
    left_out = surplus(found.values(), manifest, held.guests)
    return {peer: record for peer, record in found.items() if peer not in left_out}


def _is_admitted(record: Shown, manifest: RunManifest, held: Agreed) -> bool:
    try:
        check_admitted(record.peer, record.ticket, manifest, held)
    except RemoteError:
        return False
    return True


# --- invites ----------------------------------------------------------------------------------------


def read_invite(packed: bytes, run: bytes, guest: str) -> Invite:
    """Read an invite of this guest to this run.

    Raises:
        Reject: it is none, or for somebody else, or for another run.
    """
    invite = unseal(packed, Invite, MAX_INVITE_BYTES).message
    if invite.run != run:
        raise Reject(f"the invite by {short(invite.peer)} is for another run ({invite.run.hex()[:16]})")
    if invite.guest != guest:
        raise Reject(f"the invite by {short(invite.peer)} is for {short(invite.guest)}, not for {short(guest)}")
    return invite


def check_invite(invite: Invite, manifest: RunManifest, held: Agreed) -> None:
    """Does this invite admit its guest in the round that starts from this state?

    Raises:
        TooEarly: not before its author has merged more work.
        Ignore: no.
    """
    who = f"the invite of {short(invite.guest)} by {short(invite.peer)}"
    if invite.expires < held.round:
        raise Ignore(f"{who} expired after round {invite.expires}, this is round {held.round}")
    if invites_left(invite.peer, manifest, held) == 0:
        raise Ignore(f"{who} is void: {short(invite.peer)} has brought {manifest.admission.invites_per_peer} guests")


def invites_left(peer: str, manifest: RunManifest, held: Agreed) -> int:
    """How many guests a member can still bring.

    Raises:
        TooEarly: none before more of its work is merged.
        Ignore: none any more, for it was banned.
    """
    section = manifest.admission
    if peer in held.bans:
        raise Ignore(f"{short(peer)} was banned in round {held.bans[peer]}, and its unused invites are void")
    if peer not in section.peers:
        earned, needed = held.credit.get(peer, 0.0), section.invite_credit_rounds * manifest.seconds_per_assignment
        if peer not in held.guests or earned < needed:
            raise TooEarly(
                f"{short(peer)} has {earned:.0f} s of merged audio before round {held.round}, and who is no founder "
                f"may invite others from {needed:.0f} s on"
            )
    return max(0, section.invites_per_peer - sum(inviter == peer for inviter in held.guests.values()))


def inviter_of(record: Shown, manifest: RunManifest, guests: Mapping[str, str]) -> str | None:
    """Whose invite the author of a record needs; None if it needs none, as a founder or as a guest in the ledger.

    Raises:
        Reject: its invite is no invite.
    """
    section = manifest.admission
    if section.kind != "invite" or record.peer in section.peers or record.peer in guests:
        return None
    return read_invite(record.ticket.invite, record.run, record.peer).peer


def surplus(records: Iterable[Shown], manifest: RunManifest, guests: Mapping[str, str]) -> frozenset[str]:
    """The authors of records that are too many: guests of one inviter that are more than it can bring, come together.

    Those that are not come first in the order of BLAKE3(run ‖ peer).

    Args:
        records: of one kind, each by somebody who is admitted by itself.
        guests: of the agreed state.
    """
    if manifest.admission.kind != "invite":
        return frozenset()
    brought, left_out = Counter(guests.values()), set()
    for record in sorted(records, key=lambda record: digest("guest", record.run + record.peer.encode())):
        inviter = inviter_of(record, manifest, guests)
        if inviter is not None:
            brought[inviter] += 1
            if brought[inviter] > manifest.admission.invites_per_peer:
                left_out.add(record.peer)
    return frozenset(left_out)


def welcome(guests: Mapping[str, str], merged: Iterable[Claim], manifest: RunManifest) -> dict[str, str]:
    """Guest → who invited it, after a round with these merged claims."""
    brought = {claim.peer: inviter_of(claim, manifest, guests) for claim in merged}
    fresh = {guest: inviter for guest, inviter in brought.items() if inviter is not None}
    return dict(sorted({**fresh, **guests}.items()))


# --- proof of work ----------------------------------------------------------------------------------


def has_worked(run: bytes, peer: str, nonce: int, bits: int) -> bool:
    """Whether BLAKE3(run ‖ peer ‖ nonce) begins with so many zero bits."""
    drawn = digest("work", run + peer.encode() + nonce.to_bytes(8, "big"))
    return int.from_bytes(drawn[:4], "big") >> (32 - bits) == 0


def work(run: bytes, peer: str, bits: int, start: int, on_tries: Callable[[int], None]) -> int:
    """Find a nonce with which :func:`has_worked`, in 2^bits hashes on average.

    Whoever stops and starts elsewhere loses nothing: every nonce is as likely as any other.

    Args:
        start: the first to try, from 0 to 2^62.
        on_tries: told now and then how many were tried; what it raises ends the search.
    """
    nonce = start
    while not has_worked(run, peer, nonce, bits):
        nonce += 1
        if (nonce - start) % TRIES_AT_ONCE == 0:
            on_tries(nonce - start)
    return nonce


# --- whose claims count -----------------------------------------------------------------------------


def counting(
    claims: Sequence[Claim], manifest: RunManifest, credit: Mapping[str, float], guests: Mapping[str, str]
) -> frozenset[str]:
    """The members of a group whose claims count; those of the others weigh nothing and earn nothing.

    Left out are the :func:`surplus` of guests and, by lot, peers without credit beyond the number that `newcomers`
    allows.

    Args:
        claims: the group's, each of which is admitted by itself.
        credit, guests: of the state that they start from.
    """
    most = manifest.admission.newcomers
    peers = {claim.peer for claim in claims} - surplus(claims, manifest, guests)
    fresh = [peer for peer in peers if credit.get(peer, 0.0) <= 0]
    if most is None or len(fresh) == len(peers):
        return frozenset(peers)
    drawn = sorted(fresh, key=lambda peer: digest("newcomer", claims[0].state + peer.encode()))
    return frozenset(peers) - frozenset(drawn[most:])


def newcomers(claims: Sequence[Claim], manifest: RunManifest, credit: Mapping[str, float]) -> frozenset[int]:
    """Positions of those in a group that together weigh no more than `newcomer_share` of it.

    They are on probation and have less than half of the credit of the member with the most: where all came at the same
    time, as at a run's start, nobody is a newcomer.

    Args:
        credit: peer → seconds of audio of its merged claims, from the state that the claims start from.
    """
    if manifest.admission.newcomer_share is None:
        return frozenset()
    earned = [credit.get(claim.peer, 0.0) for claim in claims]
    probation = max(1, manifest.averaging.probation_rounds) * manifest.seconds_per_assignment
    limit = min(probation, max(earned) / 2)
    return frozenset(position for position, seconds in enumerate(earned) if seconds < limit)


def limited(weights: Sequence[float], new: frozenset[int], share: float | None) -> tuple[float, ...]:
    """Weights of which those of newcomers were scaled down until they are at most a share of the whole.

    Args:
        new: positions of the newcomers; where all others weigh nothing, no limit applies.
        share: from 0 to 1; None for no limit.
    """
    others = sum(weight for position, weight in enumerate(weights) if position not in new)
    theirs = sum(weights[position] for position in sorted(new))
    if share is None or others <= 0 or theirs * (1 - share) <= others * share:
        return tuple(weights)
    scale = others * share / ((1 - share) * theirs)
    return tuple(weight * scale if position in new else weight for position, weight in enumerate(weights))
