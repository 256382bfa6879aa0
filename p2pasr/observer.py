"""Looking at a run from outside: check again what its peers did, without training in it.

An observer is a peer that says nothing of itself and attests nothing. Openings are open to it when
the round after has ended, and until its peers delete what they committed to.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from p2pasr.agreeing import attestations_around
from p2pasr.auditing import Opened, check_on_probe, check_opened, check_part_of, open_segment, unavailable
from p2pasr.errors import RemoteError, TransportError
from p2pasr.member import Member
from p2pasr.peers.sync import fetch_state
from p2pasr.protocol.agreement import agree
from p2pasr.protocol.audits import Duty
from p2pasr.protocol.cohorts import cohort_of
from p2pasr.protocol.messages import Attestation, Claim, Finding, Signed
from p2pasr.protocol.rules import view_of
from p2pasr.protocol.signing import short
from p2pasr.protocol.state import State, mix_due
from p2pasr.rerunning import fetch
from p2pasr.verify.record import MAX_RECORD_BYTES, RoundRecord, check_record

POLL_SECONDS: Final = 1.0
ASK_SECONDS: Final = 30.0

PATIENCE_SECONDS: Final = 120.0
"""How long nobody may attest anything before the run counts as over."""

CHANCE: Final = random.SystemRandom()
"""What an observer looks at must be known to nobody before."""


@dataclass(frozen=True, slots=True)
class Look:
    """One check that was made.

    Attributes:
        round: of what was checked.
        what: "segment", "part" or "probe".
    """

    round: int
    what: str
    finding: Finding


@dataclass(frozen=True, slots=True)
class Line:
    """What most peers attest: the newest round's number, and the digests of the states before it and those behind it.

    Attributes:
        states: round → digest of the state before it.
        peers: who attests it.
    """

    round: int
    states: dict[int, bytes]
    peers: tuple[str, ...]


def watch(member: Member, first: int, last: int, rate: float) -> Iterator[Look]:
    """Check rounds as they are opened, until the last one is done or there is nothing more to wait for.

    Args:
        first, last: the rounds to look at, both included.
        rate: share of the segments and parts of each round that is done again.

    Raises:
        TransportError: the network is not there.
    """
    done: set[int] = set()
    heard = time.monotonic()
    while time.monotonic() < heard + PATIENCE_SECONDS:
        line = line_of([signed.message for signed in attestations_around(member).values()])
        if line is None:
            member.report.wait("nobody attests a state of this run now")
            time.sleep(POLL_SECONDS)
            continue
        heard = time.monotonic()
        ready = [number for number in open_rounds(member, line) if first <= number <= last and number not in done]
        if ready:
            done.add(ready[0])
            yield from check_round(member, line, ready[0], rate)
            continue  # what else was open may be so no longer
        if line.round > last + 1 or line.round >= member.manifest.rounds.rounds:
            return
        member.report.wait(f"the run is in round {line.round}; waiting for the next one that its peers open")
        time.sleep(POLL_SECONDS)


def line_of(votes: Sequence[Attestation]) -> Line | None:
    """What most of these attestations say; None where they say nothing that holds."""
    agreement = agree(votes)
    if agreement.state is None or agreement.round is None:
        return None
    ours = [vote for vote in votes if vote.peer in agreement.supporters]
    states = {}
    for number in range(agreement.round + 1):
        named = Counter(digest for vote in ours if (digest := vote.at(number)) is not None)
        if named:
            states[number] = named.most_common(1)[0][0]
    return Line(agreement.round, states, tuple(sorted(agreement.supporters)))


def open_rounds(member: Member, line: Line) -> list[int]:
    """The rounds that everybody may look into: over, the next one over too, and still kept."""
    kept = member.manifest.retention.checkpoint_rounds
    return [
        number
        for number in range(max(0, line.round - kept), line.round - 1)
        if number in line.states and number + 1 in line.states
    ]


def check_round(member: Member, line: Line, number: int, rate: float) -> Iterator[Look]:
    """Do a share of one round again: parts bit for bit, segments within bounds.

    Everything is fetched first, for its authors may delete it while a segment is trained.
    """
    try:
        before, record = find_record(member, line, number)
    except TransportError as error:
        member.report.warn(f"round {number} cannot be checked: {error}")
        return
    for receipt in record.receipts:
        for part in receipt.message.parts:
            if CHANCE.random() < rate:
                duty = Duty(receipt.message.peer, receipt.digest, part.index)
                yield Look(number, "part", check_part_of(member, before, record, duty))
    if member.manifest.data.policy == "private":
        for claim in record.members:
            if CHANCE.random() < rate:
                yield Look(number, "probe", check_on_probe(member, claim))
        return
    drawn: list[tuple[Signed[Claim], Duty, Opened]] = []
    for claim in record.members:
        for segment in range(claim.message.segments):
            if CHANCE.random() < rate:
                duty = Duty(claim.message.peer, claim.digest, segment)
                try:
                    drawn.append((claim, duty, open_segment(member, claim, segment)))
                except (TransportError, RemoteError) as error:
                    yield Look(number, "segment", unavailable(member, duty, error))
    for claim, duty, opened in drawn:
        yield Look(number, "segment", check_opened(member, before, claim, duty, opened))


def find_record(member: Member, line: Line, number: int) -> tuple[State, RoundRecord]:
    """The state before a round, and its record from whoever of those who attest its outcome gives one that holds.

    Raises:
        TransportError: nobody gives one, or the round mixed cohorts.
    """
    state = fetch_state(member.link, member.store, member.manifest, member.like, line.states[number], line.peers)
    if mix_due(state, member.manifest):
        raise TransportError("cohorts were mixed in it, and nothing was trained")
    cohort = cohort_of(state.run, line.peers[0], state.bits)
    view = view_of(state, member.manifest, cohort)
    for peer in line.peers:
        try:
            named = member.link.call("record", ASK_SECONDS, peer=peer, round=number)["digest"]
            record = RoundRecord.unpack(fetch(member, "record", named, MAX_RECORD_BYTES, peer))
            check_record(record, view, None)
        except TransportError:
            continue
        except RemoteError as error:
            member.report.warn(f"the record that {short(peer)} gives of round {number} does not hold: {error}")
            continue
        if record.after == line.states[number + 1]:
            return state, record
    raise TransportError(f"none of {len(line.peers)} peers gives the record of round {number}")
