"""Round records: what happened in a round, in a form that anyone can check again from the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, ValidationError

from p2pasr.averaging.codec import Layout
from p2pasr.averaging.merkle import part_digests
from p2pasr.errors import Reject
from p2pasr.protocol.cohorts import MAX_BITS, is_boundary
from p2pasr.protocol.encoding import MEBIBYTE, blob_digest, pack, unpack
from p2pasr.protocol.messages import (
    MAX_RECEIPT_BYTES,
    Attestation,
    Claim,
    Digest,
    GroupId,
    Receipt,
    Round,
    Signed,
    unseal,
)
from p2pasr.protocol.rules import RoundView, check_attestation, check_claim, check_receipts
from p2pasr.protocol.signing import short
from p2pasr.protocol.strikes import Strike

P = TypeVar("P", bound=BaseModel)

MAX_RECORD_BYTES: Final = 64 * MEBIBYTE


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One link of a run's lineage.

    Attributes:
        before, after: digests of the states before and after the round.
        group: the group's identifier.
        members: the group's claims, in its order.
        receipts: what each reducer states.
        average: digest of the encoded average.
        attestations: those for `after` that were seen when the round was committed.
    """

    run: bytes
    round: int
    before: bytes
    after: bytes
    group: bytes
    members: tuple[Signed[Claim], ...]
    receipts: tuple[Signed[Receipt], ...]
    average: bytes
    attestations: tuple[Signed[Attestation], ...]

    def pack(self) -> bytes:
        """The record's bytes."""
        return pack(
            {
                "run": self.run,
                "round": self.round,
                "before": self.before,
                "after": self.after,
                "group": self.group,
                "members": [member.pack() for member in self.members],
                "receipts": [receipt.pack() for receipt in self.receipts],
                "average": self.average,
                "attestations": [attestation.pack() for attestation in self.attestations],
            }
        )

    @classmethod
    def unpack(cls, data: bytes) -> RoundRecord:
        """Read a record; every signature in it is checked.

        Raises:
            Reject: malformed, or a signature does not verify.
        """
        packed = _validated(_Packed, unpack(data, MAX_RECORD_BYTES))
        return cls(
            run=packed.run,
            round=packed.round,
            before=packed.before,
            after=packed.after,
            group=packed.group,
            members=tuple(unseal(member, Claim) for member in packed.members),
            receipts=tuple(unseal(receipt, Receipt, MAX_RECEIPT_BYTES) for receipt in packed.receipts),
            average=packed.average,
            attestations=tuple(unseal(item, Attestation) for item in packed.attestations),
        )

    @property
    def next_round(self) -> int:
        """The round that begins with the state after this one."""
        return self.round + 1

    def merged(self) -> tuple[Claim, ...]:
        """The claims that are in every part: those that earn credit and cover shards."""
        return tuple(self.members[position].message for position in in_every_part(self.receipts))


@dataclass(frozen=True, slots=True)
class MixRecord:
    """The link of a run's lineage in a round that mixed cohorts.

    What other cohorts merged is not in it: the ledger after the mix is what those who attest the state vouch for, and
    the assignments of the rounds that follow are checked against it.

    Attributes:
        before, after: digests of the cohort's states before and after the mix.
        next_round: the round that begins with the state after it.
        covered, credit, bans, strikes, bits, guests: as in that state.
        receipts: what mates stated of the shares that they reduced for this peer.
        attestations: those for `after` that were seen when the mix was committed.
    """

    run: bytes
    round: int
    before: bytes
    after: bytes
    next_round: int
    covered: dict[str, int]
    credit: dict[str, float]
    bans: dict[str, int]
    strikes: dict[str, Strike]
    bits: int
    guests: dict[str, str]
    receipts: tuple[Signed[Receipt], ...]
    attestations: tuple[Signed[Attestation], ...]

    def pack(self) -> bytes:
        """The record's bytes."""
        fields = {field: getattr(self, field) for field in _PackedMix.model_fields}
        fields["receipts"] = [receipt.pack() for receipt in self.receipts]
        fields["attestations"] = [attestation.pack() for attestation in self.attestations]
        return pack(fields)

    def merged(self) -> tuple[Claim, ...]:
        """The claims that a mix merges: none."""
        return ()


def read_record(data: bytes) -> RoundRecord | MixRecord:
    """Read a link of a lineage, of either kind; every signature in it is checked.

    Raises:
        Reject: malformed, or a signature does not verify.
    """
    content = unpack(data, MAX_RECORD_BYTES)
    if not isinstance(content, dict) or "next_round" not in content:
        return RoundRecord.unpack(data)
    packed = _validated(_PackedMix, content)
    fields = {field: getattr(packed, field) for field in _PackedMix.model_fields}
    fields["receipts"] = tuple(unseal(item, Receipt, MAX_RECEIPT_BYTES) for item in packed.receipts)
    fields["attestations"] = tuple(unseal(item, Attestation) for item in packed.attestations)
    return MixRecord(**fields)


class _PackedMix(BaseModel):
    """A mix's record as its bytes hold it, before any signature is checked."""

    model_config = ConfigDict(extra="forbid", strict=True)

    run: Digest
    round: Round
    before: Digest
    after: Digest
    next_round: Round
    covered: dict[str, int]
    credit: dict[str, float]
    bans: dict[str, int]
    strikes: dict[str, Strike]
    bits: Annotated[int, Ge(0), Le(MAX_BITS)]
    guests: dict[str, str]
    receipts: tuple[bytes, ...]
    attestations: tuple[bytes, ...]


class _Packed(BaseModel):
    """A record as its bytes hold it, before any signature is checked."""

    model_config = ConfigDict(extra="forbid", strict=True)

    run: Digest
    round: Round
    before: Digest
    after: Digest
    group: GroupId
    members: tuple[bytes, ...]
    receipts: tuple[bytes, ...]
    average: Digest
    attestations: tuple[bytes, ...]


def _validated(model: type[P], content: Any) -> P:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise Reject(f"a round record is malformed ({'.'.join(map(str, first['loc']))}: {first['msg']})") from None


def _check_average(record: RoundRecord, average: bytes, layout: Layout) -> None:
    stated = {part.index: part.result for receipt in record.receipts for part in receipt.message.parts}
    for index, actual in enumerate(part_digests(layout.cut(average))):
        if stated[index] != actual:
            raise Reject(f"part {index} of the average is not the one that its receipt states")
    if blob_digest(average) != record.average:
        raise Reject("the record names another average")


def in_every_part(receipts: tuple[Signed[Receipt], ...]) -> tuple[int, ...]:
    """Positions of the group's members that every part's receipt includes."""
    sets = [set(part.senders) for receipt in receipts for part in receipt.message.parts]
    return tuple(sorted(set.intersection(*sets))) if sets else ()


def check_record(record: RoundRecord, view: RoundView, average: bytes | None) -> None:
    """Do a round's claims, receipts, average and attestations belong together, and to this round?

    Args:
        view: the round, as this peer saw it before averaging.
        average: the encoded average; None where it is kept no longer and cannot be compared.

    Raises:
        RemoteError: a claim does not stand, parts are unaccounted for, or the average or the states are others.
    """
    if (record.run, record.round, record.before) != (view.run, view.round, view.state):
        raise Reject(f"the record is of round {record.round} from state {record.before.hex()[:8]}, not of this one")
    layout = Layout.of(view.manifest.parameters, view.manifest.averaging)
    for member in record.members:
        check_claim(member.message, view)
    check_receipts(record.receipts, record.group, record.members, layout.parts)
    if average is not None:
        _check_average(record, average, layout)
    _check_attestations(record, view)


def check_mix_record(record: MixRecord, view: RoundView, bits: int) -> None:
    """Is this the record of a mix in this round, from the state of one of 2^bits cohorts?

    Raises:
        RemoteError: no, or nobody vouches for what came of it.
    """
    manifest, number = view.manifest, view.round
    if (record.run, record.round, record.before) != (view.run, number, view.state):
        raise Reject(f"the record is of round {record.round} from state {record.before.hex()[:8]}, not of this one")
    section, rounds = manifest.averaging, manifest.rounds
    if bits == 0 or not is_boundary(number, rounds.rounds, section.mix_rounds):
        raise Reject(f"no cohorts are mixed in round {number}")
    if record.next_round not in (number + 1, number + 2):
        raise Reject(f"a mix in round {number} does not lead to round {record.next_round}")
    for receipt in (signed.message for signed in record.receipts):
        if (receipt.run, receipt.round, receipt.state) != (record.run, record.round, record.before):
            raise Reject(f"the receipt of {short(receipt.peer)} is about another mix")
    _check_attestations(record, view)


def _check_attestations(record: RoundRecord | MixRecord, view: RoundView) -> None:
    if not record.attestations:
        raise Reject(f"nobody attests state {record.after.hex()[:8]}, which the record says came of the round")
    for attestation in (signed.message for signed in record.attestations):
        check_attestation(attestation, view)
        if attestation.at(record.next_round) != record.after or attestation.at(record.round) != record.before:
            raise Reject(f"{short(attestation.peer)} attests another state than the record says came of the round")
