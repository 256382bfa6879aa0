"""A run's lineage: its round records as a chain, each starting from the state in which the one before ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from p2pasr.errors import RemoteError
from p2pasr.protocol.cohorts import EVERYBODY, cohort_of
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.rules import RoundView
from p2pasr.protocol.state import State, bits_after, condemn, cover, earn
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
    bans, strikes, bits = start.bans, start.strikes, start.bits
    for record in records:
        try:
            if isinstance(record, MixRecord):
                check_mix_record(record, manifest, number, state, bits)
            else:
                peers = [member.message.peer for member in record.members]
                cohort = cohort_of(manifest.run_id, peers[0], bits) if peers else EVERYBODY
                out = suspended(strikes, number, manifest.verify)
                view = RoundView(manifest, manifest.run_id, number, state, covered, credit, bans, cohort, out)
                check_record(record, view, average(record.average))
        except RemoteError as error:
            yield Checked(record, str(error))
            return
        yield Checked(record, None)
        if isinstance(record, MixRecord):
            covered, credit, bans, bits = record.covered, record.credit, record.bans, record.bits
            strikes = record.strikes
        else:
            merged = record.merged()
            covered, _ = cover(covered, merged, manifest)
            credit = earn(credit, merged, manifest)
            bans = condemn(bans, merged, number)
            strikes = strike(strikes, merged, number, manifest.verify)
            bits = bits_after(number, bits, len(merged), manifest)
        number, state = record.next_round, record.after
