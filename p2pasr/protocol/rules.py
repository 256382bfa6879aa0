"""What a record must satisfy before it is used. Each rule raises Ignore or Reject with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from p2pasr.errors import Ignore, Reject
from p2pasr.protocol.admission import check_admitted
from p2pasr.protocol.assignment import assign
from p2pasr.protocol.cohorts import EVERYBODY, Cohort
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import NO_UNDO, Attestation, Claim, Mix, Receipt, Roster, Signed
from p2pasr.protocol.private import check_private
from p2pasr.protocol.signing import short
from p2pasr.protocol.state import State
from p2pasr.protocol.strikes import suspended
from p2pasr.protocol.tiers import EVERY, check_tier

RESULT_ROOM: Final = 1.01
"""A result's values may be so many times beyond the limit of its parts, for the rounding of sums and codec."""


@dataclass(frozen=True)
class RoundView:
    """What this peer knows of a round; the rules are judged against it.

    Attributes:
        round, state: the round, and the digest of the state it starts from.
        covered: hex digest of a shard → merged claims that named it in this epoch.
        credit: peer → the credit by which it is trusted, see :attr:`p2pasr.protocol.state.State.standing`.
        bans: peer → the round in which it was banned.
        cohort: the one whose round it is.
        suspended: peer → the last round in which it takes no part, of those that take none in this one.
        guests: guest of whom a claim was merged → who invited it.
    """

    manifest: RunManifest
    run: bytes
    round: int
    state: bytes
    covered: Mapping[str, int]
    credit: Mapping[str, float]
    bans: Mapping[str, int]
    cohort: Cohort = EVERYBODY
    suspended: Mapping[str, int] = field(default_factory=dict)
    guests: Mapping[str, str] = field(default_factory=dict)
    _assigned: dict[tuple[str, int], tuple[bytes, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def assigned(self, peer: str, tier: int = EVERY) -> tuple[bytes, ...]:
        """Digests of a peer's shards for the round, computed once, for claims are read again and again."""
        if (peer, tier) not in self._assigned:
            self._assigned[peer, tier] = assign(self.manifest, self.state, self.covered, peer, self.cohort, tier)
        return self._assigned[peer, tier]


def view_of(state: State, manifest: RunManifest, cohort: Cohort = EVERYBODY) -> RoundView:
    """The round that starts from a state, as a cohort sees it."""
    return RoundView(
        manifest=manifest,
        run=state.run,
        round=state.round,
        state=state.digest,
        covered=state.covered,
        credit=state.standing,
        bans=state.bans,
        cohort=cohort,
        suspended=suspended(state.strikes, state.round, manifest.verify),
        guests=state.guests,
    )


def check_claim(claim: Claim, view: RoundView) -> None:
    """May this claim's delta be averaged in this round?

    Raises:
        Ignore: it belongs to another round or another state; its author may just be behind.
        Reject: it breaks a rule that its author could check.
    """
    who = f"the claim of {short(claim.peer)}"
    # C1 A claim is for one run.
    if claim.run != view.run:
        raise Reject(f"{who} is for another run")
    # C2 It is for the round under way: not one that is over, not one that cannot have begun.
    if claim.round != view.round:
        raise Ignore(f"{who} is for round {claim.round}, this is round {view.round}")
    # C3 It was trained from the agreed state. A delta from another state moves in a direction that was never measured.
    if claim.state != view.state:
        raise Ignore(f"{who} starts from another state ({claim.state.hex()[:8]}, not {view.state.hex()[:8]})")
    check_work(claim, view)
    # C6 Who was banned takes no part any more, and who is suspended none for a while.
    if claim.peer in view.bans:
        raise Ignore(f"{short(claim.peer)} was banned in round {view.bans[claim.peer]}")
    if claim.peer in view.suspended:
        raise Ignore(f"{short(claim.peer)} is suspended until round {view.suspended[claim.peer]}")
    # C7 It speaks against others of its cohort, each once, in order, and not against those who are out already.
    if list(claim.against) != sorted(set(claim.against) - {claim.peer} - view.bans.keys()):
        raise Reject(f"{who} speaks against peers out of order, twice, or in vain")
    if not all(view.cohort.has(view.run, peer) for peer in claim.against):
        raise Reject(f"{who} speaks against peers of another cohort")
    # C7a It has one undo, or none, for each of them; a run whose rule or outer optimizer is not linear has no undo.
    if len(claim.undo) != len(claim.against):
        raise Reject(f"{who} names {len(claim.undo)} undos for {len(claim.against)} peers that it speaks against")
    if not view.manifest.averaging.excises and any(undo != NO_UNDO for undo in claim.undo):
        raise Reject(f"{who} names an undo, and in this run nothing that was merged is taken out again")
    # C8 Its author may take part: the run is open to it, and it has done the work that the run asks of a key.
    check_admitted(claim.peer, claim.ticket, view.manifest, view)
    # C9 Its author belongs to the cohort. Right after a mix all cohorts start from one state.
    if not view.cohort.has(view.run, claim.peer):
        raise Reject(f"{who} is by a peer of another cohort")
    # C10 It names others of its cohort for a strike, each once, in order, and nobody who is out already.
    out = view.bans.keys() | view.suspended.keys() | {claim.peer}
    if list(claim.strikes) != sorted(set(claim.strikes) - out):
        raise Reject(f"{who} names peers for a strike out of order, twice, or in vain")
    if not all(view.cohort.has(view.run, peer) for peer in claim.strikes):
        raise Reject(f"{who} names peers of another cohort for a strike")


def check_work(claim: Claim, view: RoundView) -> None:
    """Is what a claim says that it trained what its author had to train?

    It follows from the manifest and the state that the claim names, so that a claim which breaks this is proof.

    Args:
        view: of the round and the state that the claim is for.

    Raises:
        Reject: no.
    """
    who = f"the claim of {short(claim.peer)}"
    # C4 It names the shards assigned to it in the tier that it states, all of them, in order, or as few and as little
    # audio as private ones may count.
    check_tier(claim)
    if view.manifest.data.policy == "private":
        check_private(claim, view.manifest)
    elif claim.shards != view.assigned(claim.peer, claim.tier):
        raise Reject(f"{who} names other shards than it was assigned")
    elif claim.seconds != 0:
        raise Reject(f"{who} states {claim.seconds:g} s of audio, which follow from its shards")
    # C5 Its numbers follow from the manifest and the number of segments.
    rounds = view.manifest.rounds
    if claim.segments > rounds.segments:
        raise Reject(f"{who} states {claim.segments} segments, a round has {rounds.segments}")
    if claim.steps != claim.segments * rounds.steps_per_segment:
        raise Reject(f"{who} states {claim.steps} steps in {claim.segments} segments")
    if claim.samples != claim.steps * rounds.samples_per_step:
        raise Reject(f"{who} states {claim.samples} samples in {claim.steps} steps")


def check_part(index: int, largest: float, claim: Claim, limits: Sequence[float] | None) -> None:
    """May this part of a claim's delta be averaged?

    Args:
        index: which part.
        largest: the largest magnitude among its values.
        limits: the most that a value can be after 1, 2, … segments of the round; None if nothing is known of that.

    Raises:
        Reject: no training can have made it.
    """
    # D1 No value moved further than the optimizer can move one in as many segments, whatever it was trained on.
    if limits is not None and largest > limits[claim.segments - 1]:
        raise Reject(
            f"part {index} of {short(claim.peer)} moves a value by {largest:.4g}, which {claim.segments} segments "
            f"cannot move by more than {limits[claim.segments - 1]:.4g}"
        )


def check_result(index: int, largest: float, claims: Sequence[Claim], limits: Sequence[float] | None) -> None:
    """May this part have come of reducing those of these claims, by a rule that starts from nothing but them?

    Args:
        index: which part.
        largest: the largest magnitude among its values.
        limits: as for :func:`check_part`.

    Raises:
        Reject: a value lies further out than any of theirs can.
    """
    # D2 No value of a result is beyond the limit of every part in it, but for rounding.
    most = None if limits is None else max(limits[claim.segments - 1] for claim in claims)
    if most is not None and largest > RESULT_ROOM * most:
        raise Reject(f"part {index} of the result moves a value by {largest:.4g}, and no claim by more than {most:.4g}")


def check_roster(roster: Roster, run: bytes) -> None:
    """Is this a member of our run?

    Raises:
        Reject: no.
    """
    # R1 A roster record is for one run.
    if roster.run != run:
        raise Reject(f"the roster record of {short(roster.peer)} is for another run")


def check_attestation(attestation: Attestation, view: RoundView) -> None:
    """May this attestation be counted?

    Args:
        view: the round that its reader is in, whichever the attestation is for.

    Raises:
        Ignore: its author takes no part in this run.
        Reject: it breaks a rule that its author could check.
    """
    who, manifest = f"the attestation of {short(attestation.peer)}", view.manifest
    # A1 An attestation is for one run.
    if attestation.run != view.run:
        raise Reject(f"{who} is for another run")
    # A2 A run has so many rounds; a state after the last is nobody's.
    if attestation.round > manifest.rounds.rounds:
        raise Reject(f"{who} is for round {attestation.round}, the run has {manifest.rounds.rounds}")
    # A3 Every state but the first grew from another, one a round.
    line = (attestation.state, *attestation.ancestors)
    if (attestation.round > 0 and len(line) == 1) or len(line) > attestation.round + 1 or len(set(line)) < len(line):
        raise Reject(f"{who} names impossible ancestors")
    # A4 No state holds more work than its rounds can have merged; the sum is made in another order, hence the margin.
    if attestation.work > 1.001 * attestation.round * manifest.most_seconds_per_round:
        raise Reject(f"{who} states {attestation.work:.0f} s of audio, which {attestation.round} rounds cannot hold")
    # A5 Only those who may take part have a say.
    check_admitted(attestation.peer, attestation.ticket, manifest, view)


def check_mix(mix: Mix, cohort: Cohort, run: bytes) -> None:
    """May this statement about a cohort's part in a mix be counted?

    Raises:
        Reject: no.
    """
    who = f"the mix of {short(mix.peer)}"
    # X1 A mix is for one run.
    if mix.run != run:
        raise Reject(f"{who} is for another run")
    # X2 A vote is for cohorts that there are, each once, in order; it is named, and nothing else is.
    if list(mix.cohorts) != sorted(set(mix.cohorts)) or any(index >> cohort.bits for index in mix.cohorts):
        raise Reject(f"{who} names impossible cohorts")
    if bool(mix.cohorts) != any(mix.chosen):
        raise Reject(f"{who} votes for nothing that has a name")


def check_receipts(
    receipts: Iterable[Signed[Receipt]], group: bytes, members: tuple[Signed[Claim], ...], parts: int
) -> None:
    """Do these receipts account for every part of an average exactly once?

    Args:
        group: the group's identifier.
        members: the claims of the group, in its order.
        parts: parts of the delta.

    Raises:
        Reject: a receipt is of another group or by a stranger, or parts are missing or doubled.
    """
    digests = tuple(member.digest for member in members)
    peers = {member.message.peer for member in members}
    rounds = {(member.message.run, member.message.round, member.message.state) for member in members}
    seen: dict[int, str] = {}
    for receipt in (signed.message for signed in receipts):
        who = f"the receipt of {short(receipt.peer)}"
        # P1 A receipt is about this group and its members, by one of them.
        if receipt.group != group or receipt.members != digests or receipt.peer not in peers:
            raise Reject(f"{who} is about another group")
        if (receipt.run, receipt.round, receipt.state) not in rounds:
            raise Reject(f"{who} is about another round than its members' claims")
        for part in receipt.parts:
            # P2 Each part of the delta is reduced by one peer, once.
            if part.index >= parts:
                raise Reject(f"{who} names part {part.index}, a delta has {parts}")
            if part.index in seen:
                raise Reject(
                    f"part {part.index} is in the receipts of {short(seen[part.index])} and {short(receipt.peer)}"
                )
            seen[part.index] = receipt.peer
            # P3 Senders are members, each once, in order.
            if list(part.senders) != sorted(set(part.senders)) or part.senders[-1] >= len(members):
                raise Reject(f"{who} names impossible senders for part {part.index}")
    # P4 Nothing is missing.
    if missing := set(range(parts)) - seen.keys():
        raise Reject(f"no receipt covers part {min(missing)}")
