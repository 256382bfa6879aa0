"""Every record that peers exchange: frozen dataclasses, strictly typed, canonically encoded, signed.

A record travels as `Signed`: canonical msgpack of {body, kind, signature}. Reading one checks, in
this order: its size, its canonical form, its kind, the types and bounds of its fields, and the
signature against the peer that its own body names. What a record *means* is checked in `rules`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, ClassVar, Final, Generic, Literal, TypeVar

from annotated_types import Ge, Le, Len, Lt, MaxLen
from pydantic import ConfigDict, StringConstraints, TypeAdapter, ValidationError

from p2pasr.errors import Reject
from p2pasr.protocol.cohorts import MAX_BITS
from p2pasr.protocol.encoding import DIGEST_BYTES, digest, pack, unpack
from p2pasr.protocol.signing import SIGNATURE_BYTES, Signer, sign, verify

MAX_RECORD_BYTES: Final = 8 * 1024
"""Longest record in the DHT; everything bigger is a blob that a record names."""

MAX_RECEIPT_BYTES: Final = 1 << 20
"""Longest receipt: it names every part of one reducer, and travels on a stream, not in the DHT."""

MAX_AGAINST: Final = 16
"""How many peers one claim can speak against, and how many it can name for a strike."""

MAX_FINDINGS: Final = 32
"""How many checks of one round a peer reports."""

MAX_ANCESTORS: Final = 16
"""How many rounds back an attestation speaks."""

MAX_INVITE_BYTES: Final = 512
"""Longest signed invite; peers without merged work carry theirs in every record."""

NO_UNDO: Final = bytes(DIGEST_BYTES)
"""Stands in a claim where its author has nothing that would take a peer's work out again."""

Digest = Annotated[bytes, Len(DIGEST_BYTES, DIGEST_BYTES)]
PeerId = Annotated[str, StringConstraints(pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}$")]
GroupId = Annotated[bytes, Len(8, 64)]
Count = Annotated[int, Ge(0), Le(1 << 48)]
Round = Annotated[int, Ge(0), Le(1 << 31)]
Amount = Annotated[float, Ge(0.0), Le(1e15)]
Loss = Annotated[float, Ge(-1e9), Le(1e9)]
Word = Annotated[str, MaxLen(128)]
Stage = Literal["waiting", "training", "claimed", "mixing", "leaving"]

_CLOSED: Final = ConfigDict(extra="forbid")
"""No unknown fields. Types need no strict mode: :func:`unseal` refuses whatever was coerced."""


@dataclass(frozen=True, slots=True)
class Invite:
    """A member lets somebody take part.

    Attributes:
        peer: who invites.
        guest: who is invited.
        expires: the last round in which the guest's first claim may count.
    """

    kind: ClassVar[str] = "invite"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    run: Digest
    peer: PeerId
    guest: PeerId
    expires: Round


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a peer shows to be admitted; see :mod:`p2pasr.protocol.admission`.

    Attributes:
        invite: a packed signed :class:`Invite`; empty where it has none or needs none.
        nonce: its proof of work; 0 where the run asks for none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    invite: Annotated[bytes, MaxLen(MAX_INVITE_BYTES)]
    nonce: Annotated[int, Ge(0), Lt(1 << 63)]


NO_TICKET: Final = Ticket(b"", 0)


@dataclass(frozen=True, slots=True)
class Roster:
    """I am here: what a peer is doing now. Renewed every few seconds, expires soon after.

    Attributes:
        round, state: the round it works on and the digest of the state it starts from.
        stage: waiting (holds the state, will train the next round), training, claimed (done
            training, its claim is published), mixing (the round mixes cohorts), leaving.
        segments: segments finished in this round.
        closes_at: when it stops training this round, seconds since 1970.
        hardware: its hardware class, self-declared.
        addresses: multiaddrs under which it can be reached, for peers whose entry points are gone.
    """

    kind: ClassVar[str] = "roster"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    run: Digest
    peer: PeerId
    ticket: Ticket
    round: Round
    state: Digest
    stage: Stage
    segments: Count
    closes_at: Amount
    client_mode: bool
    hardware: Word
    version: Word
    addresses: Annotated[tuple[Annotated[str, MaxLen(256)], ...], MaxLen(8)]


@dataclass(frozen=True, slots=True)
class Claim:
    """The commitment to a delta and how it was made, published before anyone sees the delta.

    Attributes:
        round, state: trained in this round, from the state with this digest.
        shards: digests of the shards trained on, as assigned; names that hide them where they are private.
        tier: which shards its author trains, see :mod:`p2pasr.protocol.tiers`; 0 where they are private.
        seconds: of audio in them where they are private, as its author says; 0 otherwise.
        segments, steps, samples: how much was trained.
        trace_root: Merkle root over the segment-end checkpoints; zeros where shards are private.
        delta_root: Merkle root over the parts of the encoded delta.
        delta_norm: L2 norm of the delta before encoding.
        loss_before, loss_after: mean loss of the first and of the last segment; 0 where shards are private.
        hardware: self-declared hardware class of the training.
        against: peers that this one has seen proved to cheat, ascending; see :func:`p2pasr.protocol.state.condemn`.
        undo: for each of them the digest of what takes its last work out of the state again, a blob; zeros where its
            author has none. See :func:`p2pasr.protocol.state.undone`.
        strikes: peers that kept from it what they committed to, or accused others falsely, ascending; see
            :func:`p2pasr.protocol.strikes.strike`.
    """

    kind: ClassVar[str] = "claim"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    run: Digest
    peer: PeerId
    ticket: Ticket
    round: Round
    state: Digest
    shards: Annotated[tuple[Digest, ...], Len(1, 128)]
    tier: Annotated[int, Ge(0), Le(255)]
    seconds: Amount
    segments: Annotated[int, Ge(1), Le(1 << 16)]
    steps: Annotated[int, Ge(1), Le(1 << 24)]
    samples: Annotated[int, Ge(1), Le(1 << 40)]
    trace_root: Digest
    delta_root: Digest
    delta_norm: Amount
    loss_before: Loss
    loss_after: Loss
    hardware: Word
    against: Annotated[tuple[PeerId, ...], MaxLen(MAX_AGAINST)]
    undo: Annotated[tuple[Digest, ...], MaxLen(MAX_AGAINST)]
    strikes: Annotated[tuple[PeerId, ...], MaxLen(MAX_AGAINST)]


@dataclass(frozen=True, slots=True)
class Attestation:
    """I hold this state: a peer's signature under the state before round `round`.

    Attributes:
        state: its digest; the state blob has the same digest.
        ancestors: digests of the states that it grew from, the one of the round before first, as far
            back as the peer knows them.
        work: seconds of audio merged into the state since the start of the run.
    """

    kind: ClassVar[str] = "attestation"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    run: Digest
    peer: PeerId
    ticket: Ticket
    round: Round
    state: Digest
    ancestors: Annotated[tuple[Digest, ...], MaxLen(MAX_ANCESTORS)]
    work: Amount

    def at(self, number: int) -> bytes | None:
        """Digest of the state before round `number` on the line that this peer attests, where it says so."""
        back = self.round - number
        if back == 0:
            return self.state
        return self.ancestors[back - 1] if 0 < back <= len(self.ancestors) else None


@dataclass(frozen=True, slots=True)
class PartReceipt:
    """What one part of the average was made of.

    Attributes:
        index: which part of the delta.
        senders: positions, in the group's order, of the peers whose parts are in it; ascending.
        result: digest of the encoded result.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    index: Count
    senders: Annotated[tuple[Annotated[int, Ge(0), Le(1023)], ...], Len(1, 1024)]
    result: Digest


@dataclass(frozen=True, slots=True)
class Receipt:
    """A reducer's statement of what it reduced in one group.

    Attributes:
        group: the group's identifier, made by its leader.
        members: digests of the members' claims, in the group's order.
    """

    kind: ClassVar[str] = "receipt"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    run: Digest
    peer: PeerId
    round: Round
    state: Digest
    group: GroupId
    members: Annotated[tuple[Digest, ...], Len(1, 1024)]
    parts: Annotated[tuple[PartReceipt, ...], MaxLen(1 << 16)]


@dataclass(frozen=True, slots=True)
class Commitment:
    """An auditor's word for what its re-run came to, given before it sees what was claimed.

    Attributes:
        claim: digest of the claim that it audits.
        segment: which segment.
        result: digest of the re-run's packed checkpoint behind 32 random bytes, see :func:`commit_to`.
    """

    kind: ClassVar[str] = "commitment"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    run: Digest
    peer: PeerId
    claim: Digest
    segment: Count
    result: Digest


def commit_to(result: bytes, salt: bytes) -> bytes:
    """What a commitment holds: nobody can tell the result from it, and its author cannot change it any more.

    Args:
        result: digest of a packed checkpoint.
        salt: 32 random bytes, told later.
    """
    return digest("committed-result", result + salt)


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check came to.

    Attributes:
        peer: whose work was checked.
        statement: digest of its claim or receipt.
        item: the segment, of a last checkpoint the last one, or the part.
        finding: `same` bits, `close` enough for other hardware, `unclear`, `different` (a proof exists), or
            `unavailable`: what it committed to was not to be had.
        error: relative error of a re-run.
        result, salt: what was committed to before the claimed result was seen; zeros where nothing was trained.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    peer: PeerId
    statement: Digest
    item: Count
    finding: Literal["same", "close", "unclear", "different", "unavailable"]
    error: Amount
    result: Digest
    salt: Digest


@dataclass(frozen=True, slots=True)
class Audit:
    """What a peer found when it checked a round.

    Attributes:
        round: the round that was checked.
        state: digest of the state that came of it, from which the checks were drawn.
    """

    kind: ClassVar[str] = "audit"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    run: Digest
    peer: PeerId
    round: Round
    state: Digest
    findings: Annotated[tuple[Finding, ...], MaxLen(MAX_FINDINGS)]


@dataclass(frozen=True, slots=True)
class Charge:
    """Where a proof against a peer can be had.

    Attributes:
        accused: the peer.
        proof: digest of the packed proof, a blob.
        size: its bytes.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    accused: PeerId
    proof: Digest
    size: Count


@dataclass(frozen=True, slots=True)
class Accusation:
    """The proofs that a peer holds; whoever reads this checks them for itself."""

    kind: ClassVar[str] = "accusation"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    run: Digest
    peer: PeerId
    charges: Annotated[tuple[Charge, ...], MaxLen(MAX_AGAINST)]


@dataclass(frozen=True, slots=True)
class Mix:
    """What a peer states of its cohort's part in a mix, and which cohorts it would mix.

    Attributes:
        round, state: the boundary round, and the digest of the cohort's state before it.
        common: digest of the state that the cohorts grew from.
        root: Merkle root over the parts of the cohort's encoded delta and its ledger.
        serves: whether others can reach its author, and so get these from it.
        cohorts: those that its author votes to mix, ascending; none before it votes.
        chosen: digest of these cohorts with their states and roots; zeros before it votes.
    """

    kind: ClassVar[str] = "mix"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    run: Digest
    peer: PeerId
    ticket: Ticket
    round: Round
    state: Digest
    common: Digest
    root: Digest
    serves: bool
    cohorts: Annotated[tuple[Annotated[int, Ge(0), Lt(1 << MAX_BITS)], ...], MaxLen(1 << MAX_BITS)]
    chosen: Digest


Message = Roster | Claim | Attestation | Receipt | Commitment | Audit | Accusation | Mix | Invite
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Signed(Generic[M]):
    """A record with its author's signature; to hold one is to know that it was checked."""

    message: M
    signature: bytes

    def pack(self) -> bytes:
        """The bytes that travel."""
        return pack({"body": _as_map(self.message), "kind": self.message.kind, "signature": self.signature})

    @property
    def digest(self) -> bytes:
        """Names the message, whatever the signature: 32 bytes."""
        return message_digest(self.message)


def message_digest(message: Message) -> bytes:
    """Names a message: the digest of its canonical body in the domain of its kind."""
    return digest(message.kind, pack(_as_map(message)))


def seal(signer: Signer, message: M) -> Signed[M]:
    """Sign a message in one's own name.

    Raises:
        ValueError: the message names another peer.
    """
    if message.peer != signer.peer:
        raise ValueError(f"{signer.peer} cannot sign for {message.peer}")
    return Signed(message, sign(signer, message.kind, pack(_as_map(message))))


def unseal(data: bytes, expected: type[M], max_bytes: int = MAX_RECORD_BYTES) -> Signed[M]:
    """Read a signed record and check its size, form, kind, fields and signature, in that order.

    Raises:
        Reject: any of these does not hold.
    """
    outer = unpack(data, max_bytes)
    if not isinstance(outer, dict) or outer.keys() != {"body", "kind", "signature"}:
        raise Reject("a record is not {body, kind, signature}")
    if outer["kind"] != expected.kind:
        raise Reject(f"a record is a {outer['kind']!r} where a {expected.kind!r} belongs")
    signature = outer["signature"]
    if not isinstance(signature, bytes) or len(signature) != SIGNATURE_BYTES:
        raise Reject(f"a signature has {SIGNATURE_BYTES} bytes")
    message = read_fields(outer["body"], expected)
    body = pack(outer["body"])
    if pack(_as_map(message)) != body:  # a coerced value, such as 1 or "1" where 1.0 belongs
        raise Reject(f"a {expected.kind} is not in canonical form")
    verify(message.peer, expected.kind, body, signature)
    return Signed(message, signature)


def read_fields(body: Any, expected: type[M]) -> M:
    """Build a message from a map, checking every field's type and bounds.

    Raises:
        Reject: a field is missing, unknown, of another type or out of bounds.
    """
    try:
        message: M = _ADAPTERS[expected].validate_python(body)
        return message
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise Reject(f"a {expected.kind}'s {where} is malformed ({first['msg']})") from None


def _as_map(value: Any) -> Any:
    """A message as plain maps and tuples; `dataclasses.asdict` would copy every leaf."""
    if is_dataclass(value):
        return {field.name: _as_map(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return tuple(map(_as_map, value))
    return value


_ADAPTERS: Final[dict[type, TypeAdapter[Any]]] = {
    kind: TypeAdapter(kind)
    for kind in (Roster, Claim, Attestation, Receipt, Commitment, Audit, Accusation, Mix, Invite)
}
