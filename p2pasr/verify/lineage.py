"""A run's lineage: its round records as a chain, each starting from the state in which the one before ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from p2pasr.errors import RemoteError
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.rules import RoundView
from p2pasr.protocol.state import State, condemn, cover, earn
from p2pasr.verify.record import RoundRecord, check_record


@dataclass(frozen=True, slots=True)
class Checked:
    """A record and what is wrong with it.

    Attributes:
        problem: one sentence; None for a record that holds.
    """

    record: RoundRecord
    problem: str | None


def follow(
    manifest: RunManifest, start: State, records: Iterable[RoundRecord], average: Callable[[bytes], bytes | None]
) -> Iterator[Checked]:
    """Check consecutive records from a state on; ends with the first that does not hold.

    Args:
        start: the state before the first record's round.
        average: an encoded average by its digest, None where it is not kept.
    """
    number, state, covered, credit, bans = start.round, start.digest, start.covered, start.credit, start.bans
    for record in records:
        view = RoundView(manifest, manifest.run_id, number, state, covered, credit, bans)
        try:
            check_record(record, view, average(record.average))
        except RemoteError as error:
            yield Checked(record, str(error))
            return
        yield Checked(record, None)
        merged = record.merged()
        covered, _ = cover(covered, merged, manifest)
        credit = earn(credit, merged, manifest)
        bans = condemn(bans, merged, number)
        number, state = number + 1, record.after
