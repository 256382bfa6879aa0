"""A run's lineage: its round records as a chain, each starting from the state in which the one before ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from p2pasr.errors import RemoteError
from p2pasr.protocol.admission import counting, welcome
from p2pasr.protocol.cohorts import EVERYBODY, cohort_of
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.rules import RoundView
from p2pasr.protocol.state import State, bits_after, condemn, cover, earn, standing
from p2pasr.protocol.strikes import strike, suspended
from p2pasr.verify.record import MixRecord, RoundRecord, check_mix_record, check_record


@dataclass(frozen=True, slots=True)
class Checked:
    """A record and what is wrong with it.

    Attributes:
        problem: one sentence; None for a record that holds.
    """

    record: RoundRecord | MixRecord
    problem: str | None


def follow(
    manifest: RunManifest,
    start: State,
    records: Iterable[RoundRecord | MixRecord],
    average: Callable[[bytes], bytes | None],
) -> Iterator[Checked]:
    """Check consecutive records from a state on; ends with the first that does not hold.

    Args:
        start: the state before the first record's round.
        average: an encoded average by its digest, None where it is not kept.
    """
    number, state, covered, credit = start.round, start.digest, start.covered, start.credit
    bans, strikes, bits, guests = start.bans, start.strikes, start.bits, start.guests
    for record in records:
        claims = () if isinstance(record, MixRecord) else tuple(member.message for member in record.members)
        cohort = cohort_of(manifest.run_id, claims[0].peer, bits) if claims else EVERYBODY
        trusted, out = standing(credit, strikes), suspended(strikes, number, manifest.verify)
        view = RoundView(manifest, manifest.run_id, number, state, covered, trusted, bans, cohort, out, guests)
        try:
            if isinstance(record, MixRecord):
                check_mix_record(record, view, bits)
            else:
                check_record(record, view, average(record.average))
        except RemoteError as error:
            yield Checked(record, str(error))
            return
        yield Checked(record, None)
        if isinstance(record, MixRecord):
            covered, credit, bans, bits = record.covered, record.credit, record.bans, record.bits
            strikes, guests = record.strikes, record.guests
        else:
            counted = counting(claims, manifest, trusted, guests)
            voters = [claim for claim in claims if claim.peer in counted]
            merged = [claim for claim in record.merged() if claim.peer in counted]
            guests = welcome(guests, merged, manifest)
            covered, _ = cover(covered, merged, manifest)
            credit = earn(credit, merged, voters, manifest)
            bans = condemn(bans, voters, number)
            strikes = strike(strikes, voters, number, manifest.verify)
            bits = bits_after(number, bits, len(merged), manifest)
        number, state = record.next_round, record.after
