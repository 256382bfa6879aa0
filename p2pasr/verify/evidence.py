"""Proofs that a peer cheated, each complete in itself: whoever has the manifest can check one alone.

============  ===============================================  ===========================================
kind          what it shows                                    how it is checked
============  ===============================================  ===========================================
conflict      two claims from one state, or two receipts in a  by arithmetic
              group, under one signature
link          a delta that is not the one between the state    by arithmetic
              and the claim's own last checkpoint
reduction     a part whose stated result is not what the rule  by arithmetic
              makes of the parts that it states
claim         a claim of other shards, segments or steps than  by arithmetic
              its author was given
segment       a checkpoint that training does not lead to      by training that segment again
probe         a delta with which the loss on the probe of a    by computing the loss with and without it
              run with private shards is beyond its limit
============  ===============================================  ===========================================

A proof carries the statements that its accused signed and the bytes that these commit to. Nothing
that an accuser says enters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isclose, sqrt
from typing import Any, ClassVar, Final, Protocol

import numpy as np

from p2pasr.averaging import rules
from p2pasr.averaging.codec import Flat, Layout
from p2pasr.averaging.merkle import Tree, part_digests
from p2pasr.errors import LocalError, Reject, RemoteError
from p2pasr.protocol.admission import newcomers
from p2pasr.protocol.cohorts import cohort_of
from p2pasr.protocol.encoding import DIGEST_BYTES, MEBIBYTE, blob_digest, pack, unpack
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import MAX_RECEIPT_BYTES, Claim, Receipt, Signed, unseal
from p2pasr.protocol.rules import check_claim, check_work, view_of
from p2pasr.protocol.signing import short
from p2pasr.protocol.state import State, parse_state
from p2pasr.protocol.tensors import Tensors, forms, unpack_tensors
from p2pasr.verify.compare import Comparison, compare
from p2pasr.verify.conflict import Conflict
from p2pasr.verify.probe import Measured, ProbeLoss, measure

MAX_PROOF_BYTES: Final = 1024 * MEBIBYTE

Rerun = Callable[[Claim, int, State, bytes | None], bytes]
"""Trains one segment of a claim again, from a packed checkpoint or, for the first, from the state of its round;
returns the packed checkpoint at its end. Raises Reject where nothing can be trained from that checkpoint."""


@dataclass(frozen=True, slots=True)
class Judge:
    """What a proof is checked with.

    Attributes:
        like: the run's initial parameters, for names and shapes. Arithmetic holds without them, for a proof's state is
            the one that its accused signed; training does not.
        rerun: None where nothing can be trained again, so that only arithmetic is checked.
        probe_loss: None where no loss can be computed, likewise.
    """

    manifest: RunManifest
    like: Tensors | None = None
    rerun: Rerun | None = None
    probe_loss: ProbeLoss | None = None


class Undecided(Reject):
    """A proof that convinces nobody here, although its author may have been honest."""


class Proof(Protocol):
    """One kind of proof."""

    kind: ClassVar[str]

    @property
    def accused(self) -> str:
        """Who signed what is disproved."""

    @property
    def round(self) -> int:
        """The round that it is about."""

    def body(self) -> dict[str, Any]:
        """Its parts as they are packed."""

    def check(self, judge: Judge) -> str:
        """See that it proves what it says; returns that as one sentence.

        Raises:
            Undecided: training it again decides nothing here.
            RemoteError: it proves nothing, and no honest peer makes such a one.
            LocalError: it cannot be checked here.
        """


@dataclass(frozen=True, slots=True)
class ConflictProof:
    """Two statements that no honest peer signs both."""

    kind: ClassVar[str] = "conflict"
    conflict: Conflict

    @property
    def accused(self) -> str:
        """See :class:`Proof`."""
        return self.conflict.peer

    @property
    def round(self) -> int:
        """See :class:`Proof`."""
        return int(self.conflict.first.message.round)

    def body(self) -> dict[str, Any]:
        """See :class:`Proof`."""
        return {"conflict": self.conflict.pack()}

    def check(self, judge: Judge) -> str:
        """See :class:`Proof`; that the statements contradict each other was checked when they were put together."""
        if self.conflict.first.message.run != judge.manifest.run_id:
            raise Reject("a proof is about another run")
        return str(self.conflict)


@dataclass(frozen=True, slots=True)
class Opening:
    """A checkpoint of a claim's trace, with the way to its root.

    Attributes:
        data: the packed checkpoint.
        proof: siblings from its leaf to the trace's root.
    """

    data: bytes
    proof: tuple[bytes, ...]

    def check(self, claim: Claim, index: int) -> None:
        """Does it lie under the claim's trace?

        Raises:
            Reject: no.
        """
        tree = Tree.of("trace", claim)
        tree.check(claim.trace_root, index, claim.segments, blob_digest(self.data), self.proof)

    def body(self) -> dict[str, Any]:
        """As it is packed."""
        return {"data": self.data, "proof": self.proof}


@dataclass(frozen=True, slots=True)
class ClaimProof:
    """What all proofs have in common that are about one claim."""

    claim: Signed[Claim]

    @property
    def accused(self) -> str:
        """See :class:`Proof`."""
        return self.claim.message.peer

    @property
    def round(self) -> int:
        """See :class:`Proof`."""
        return self.claim.message.round


@dataclass(frozen=True, slots=True)
class WorkProof(ClaimProof):
    """A claim of other work than the state that it names gives its author.

    Attributes:
        before: that state, packed.
    """

    kind: ClassVar[str] = "claim"
    before: bytes

    def body(self) -> dict[str, Any]:
        """See :class:`Proof`."""
        return {"claim": self.claim.pack(), "before": self.before}

    def check(self, judge: Judge) -> str:
        """See :class:`Proof`."""
        claim = self.claim.message
        before = _named_state(self.before, claim, judge)
        if claim.round != before.round:
            raise Reject("a proof holds the state of another round")
        try:
            check_work(claim, view_of(before, judge.manifest, cohort_of(before.run, claim.peer, before.bits)))
        except Reject as error:
            return f"in round {claim.round} {error}"
        raise Reject("the claim names the work that its author was given")


@dataclass(frozen=True, slots=True)
class LinkProof(ClaimProof):
    """A claim whose last checkpoint and delta do not belong together.

    Attributes:
        before: the state that the claim starts from, packed.
        last: its last checkpoint.
    """

    kind: ClassVar[str] = "link"
    before: bytes
    last: Opening

    def body(self) -> dict[str, Any]:
        """See :class:`Proof`."""
        return {"claim": self.claim.pack(), "before": self.before, "last": self.last.body()}

    def check(self, judge: Judge) -> str:
        """See :class:`Proof`."""
        claim = self.claim.message
        before = _state_of_round(self.before, [claim], judge)
        self.last.check(claim, claim.segments - 1)
        if delta_of(claim, before, self.last.data, judge.manifest) == (claim.delta_root, True):
            raise Reject("the claim's delta is the one that its last checkpoint gives")
        return f"{short(claim.peer)} claimed a delta in round {claim.round} that its own last checkpoint does not give"


def delta_of(claim: Claim, before: State, last: bytes, manifest: RunManifest) -> tuple[bytes, bool]:
    """What the delta between a state and a packed checkpoint commits to.

    Returns:
        The root over its parts, empty where the checkpoint is none, and whether its norm is the claimed one.
    """
    try:
        after = checkpoint_params(last)
    except Reject:
        return b"", False
    if forms(before.params) != forms(after):
        return b"", False
    layout = Layout.of(manifest.parameters, manifest.averaging)
    digests: list[bytes] = []
    squares = 0.0
    for vector in layout.differences(before.params, after):
        if not np.isfinite(vector).all():
            return b"", False
        digests.append(blob_digest(layout.codec.encode(vector)))
        squares += rules.norm(vector) ** 2
    root = Tree.of("delta", claim).root(digests)
    return root, isclose(claim.delta_norm, sqrt(squares), rel_tol=1e-6)


@dataclass(frozen=True, slots=True)
class ReductionProof:
    """A receipt that states a wrong result for a part.

    Attributes:
        members: the claims of the group, in its order.
        before: the state that the round started from, packed; weights follow from its ledger.
        index: the part.
        parts: for each sender that the receipt states, its part and the way to its claim's root.
    """

    kind: ClassVar[str] = "reduction"
    receipt: Signed[Receipt]
    members: tuple[Signed[Claim], ...]
    before: bytes
    index: int
    parts: Mapping[int, tuple[bytes, tuple[bytes, ...]]]

    @property
    def accused(self) -> str:
        """See :class:`Proof`."""
        return self.receipt.message.peer

    @property
    def round(self) -> int:
        """See :class:`Proof`."""
        return self.receipt.message.round

    def body(self) -> dict[str, Any]:
        """See :class:`Proof`."""
        return {
            "receipt": self.receipt.pack(),
            "members": [claim.pack() for claim in self.members],
            "before": self.before,
            "index": self.index,
            "parts": [[position, data, list(way)] for position, (data, way) in sorted(self.parts.items())],
        }

    def check(self, judge: Judge) -> str:
        """See :class:`Proof`."""
        receipt, manifest = self.receipt.message, judge.manifest
        claims = [member.message for member in self.members]
        if tuple(member.digest for member in self.members) != receipt.members:
            raise Reject("a receipt is about other claims")
        before = _state_of_round(self.before, claims, judge)
        stated = next((part for part in receipt.parts if part.index == self.index), None)
        if stated is None or set(stated.senders) != self.parts.keys() or receipt.state != before.digest:
            raise Reject("a receipt does not state a part with these senders")
        if max(self.parts) >= len(claims):
            return f"{short(receipt.peer)} states senders in round {receipt.round} that its group does not have"
        layout = Layout.of(manifest.parameters, manifest.averaging)
        for position, (data, way) in self.parts.items():
            claim = claims[position]
            tree = Tree.of("delta", claim)
            tree.check(claim.delta_root, self.index, layout.parts, blob_digest(data), way)
        result = reduce_again(claims, before, manifest, self.index, {at: data for at, (data, _) in self.parts.items()})
        if result is not None and blob_digest(result) == stated.result:
            raise Reject("the part's result is the right one")
        return f"{short(receipt.peer)} states a wrong result for part {self.index} of round {receipt.round}"


def reduce_again(
    claims: list[Claim], before: State, manifest: RunManifest, index: int, parts: Mapping[int, bytes]
) -> bytes | None:
    """The encoded result of one part; None where a sender's bytes cannot be decoded, which no reducer may take.

    Args:
        claims: the group's, in its order.
        parts: position → encoded part, already checked against the claims.
    """
    layout = Layout.of(manifest.parameters, manifest.averaging)
    codec, size = layout.codec, layout.part_size(index)
    try:
        decoded = {position: codec.decode(data, size) for position, data in parts.items()}
    except Reject:
        return None
    reference = None
    if before.reference:
        cut = list(layout.cuts())[index]
        reference = codec.decode(codec.encode(Flat(before.reference)[cut]), size)
    order = rules.drawn_order(before.digest, [claim.peer for claim in claims])
    weights = rules.weights(claims, manifest, before.standing, before.guests)
    center = rules.Center(reference, order, newcomers(claims, manifest, before.standing))
    return codec.encode(rules.aggregate(decoded, weights, manifest.averaging.rule, center))


@dataclass(frozen=True, slots=True)
class SegmentProof(ClaimProof):
    """A segment whose claimed end is not where training leads.

    Attributes:
        segment: which.
        before: the state of the claim's round, packed.
        start: the checkpoint that the segment starts from; None for the first.
        end: the one that the claim says it ends with.
    """

    kind: ClassVar[str] = "segment"
    segment: int
    before: bytes
    start: Opening | None
    end: Opening

    def body(self) -> dict[str, Any]:
        """See :class:`Proof`."""
        return {
            "claim": self.claim.pack(),
            "segment": self.segment,
            "before": self.before,
            "start": None if self.start is None else self.start.body(),
            "end": self.end.body(),
        }

    def check(self, judge: Judge) -> str:
        """See :class:`Proof`."""
        claim = self.claim.message
        if not 0 <= self.segment < claim.segments or (self.start is None) != (self.segment == 0):
            raise Reject("a proof is about a segment that there is not")
        before = _state_of_round(self.before, [claim], judge)
        self.end.check(claim, self.segment)
        if self.start is not None:
            self.start.check(claim, self.segment - 1)
        if judge.rerun is None:
            raise LocalError("this proof is checked by training the segment again; name the shards with --shards")
        start = None if self.start is None else self.start.data
        try:
            rerun = judge.rerun(claim, self.segment, before, start)
        except RemoteError as error:
            raise Undecided(str(error)) from error
        found = compare_ends(before, start, self.end.data, rerun, judge.manifest)
        if found.finding != "different":
            kind = Undecided if found.finding == "unclear" else Reject
            raise kind(f"the segment, trained again, is {found.finding} (relative error {found.error:.2e})")
        return (
            f"segment {self.segment + 1} of {short(claim.peer)} in round {claim.round}, trained again, "
            f"ends elsewhere (relative error {found.error:.2e})"
        )


@dataclass(frozen=True, slots=True)
class ProbeProof(ClaimProof):
    """A claim of private work whose delta raises the loss on the probe beyond what the manifest allows.

    Attributes:
        before: the state that the claim starts from, packed.
        delta: the whole encoded delta.
    """

    kind: ClassVar[str] = "probe"
    before: bytes
    delta: bytes

    def body(self) -> dict[str, Any]:
        """See :class:`Proof`."""
        return {"claim": self.claim.pack(), "before": self.before, "delta": self.delta}

    def measure(self, judge: Judge) -> Measured:
        """What the claim's delta does on the probe.

        Raises:
            RemoteError: it is not the claim's, or the claim is none of a run with private shards.
            LocalError: no loss can be computed here.
        """
        claim, manifest = self.claim.message, judge.manifest
        if manifest.data.policy != "private":
            raise Reject("a proof is about a probe, and the run has none")
        before = _state_of_round(self.before, [claim], judge)
        parts = Layout.of(manifest.parameters, manifest.averaging).cut(self.delta)
        if Tree.of("delta", claim).root(part_digests(parts)) != claim.delta_root:
            raise Reject("a proof holds another delta than was claimed")
        if judge.probe_loss is None:
            raise LocalError("this proof is checked by computing a loss on the probe; name its shards with --shards")
        return measure(before, self.delta, manifest, judge.probe_loss)

    def check(self, judge: Judge) -> str:
        """See :class:`Proof`."""
        measured = self.measure(judge)
        if not measured.is_proof:
            raise Reject(f"the delta {measured}")
        return self.sentence(measured)

    def sentence(self, measured: Measured) -> str:
        """What it proves."""
        return f"the delta of {short(self.accused)} in round {self.claim.message.round} {measured}"


def compare_ends(before: State, start: bytes | None, claimed: bytes, rerun: bytes, manifest: RunManifest) -> Comparison:
    """Compare two packed checkpoints that are said to be the end of one segment.

    Args:
        start: the packed checkpoint that the segment starts from; None for the first, which starts from the state.

    Raises:
        Reject: the start is no checkpoint.
    """
    begin = (
        {f"param/{name}": array for name, array in before.params.items()}
        if start is None
        else checkpoint_groups(start)[0]
    )
    ours, our_description = checkpoint_groups(rerun)
    try:
        theirs, their_description = checkpoint_groups(claimed)
    except Reject:
        return Comparison("different", inf)
    if their_description != our_description:  # the step in it says how the next segment goes on
        return Comparison("different", inf)
    return compare(begin, theirs, ours, manifest.verify)


def checkpoint_params(data: bytes) -> Tensors:
    """The parameters in a packed checkpoint.

    Raises:
        Reject: it is none.
    """
    tensors, _ = unpack_tensors(data)
    return {name.removeprefix("param/"): array for name, array in tensors.items() if name.startswith("param/")}


def checkpoint_groups(data: bytes) -> tuple[Tensors, dict[str, Any]]:
    """A packed checkpoint's arrays by group – parameters, and the moments of each kind – and its description.

    Raises:
        Reject: it is none, or it holds arrays that belong to no group and that a comparison would pass over.
    """
    tensors, description = unpack_tensors(data)
    grouped: Tensors = {}
    for name, array in tensors.items():
        kind, _, rest = name.partition("/")
        owner, _, moment = rest.rpartition("/")
        if kind == "param":
            grouped[name] = array
        elif kind == "moment":
            grouped[f"moment {moment}/{owner}"] = array
        else:
            raise Reject(f"a checkpoint holds {name!r:.60}, which is neither a parameter nor a moment")
    return grouped, description


def pack_proof(proof: Proof) -> bytes:
    """The bytes that convince a stranger."""
    return pack({"kind": proof.kind, "body": proof.body()})


def unpack_proof(data: bytes) -> Proof:
    """Read a proof; signatures are checked, what it proves is not.

    Raises:
        Reject: it is malformed or not in the one form that it is packed in, or a signature does not verify.
    """
    content = unpack(data, MAX_PROOF_BYTES)
    if not isinstance(content, dict) or content.keys() != {"kind", "body"} or not isinstance(content["body"], dict):
        raise Reject("a proof is not {kind, body}")
    read = _READERS.get(content["kind"]) if isinstance(content["kind"], str) else None
    if read is None:
        raise Reject(f"there is no proof of the kind {content['kind']!r:.40}")
    try:
        proof = read(content["body"])
    except (KeyError, TypeError, ValueError) as error:
        raise Reject(f"a proof is malformed ({type(error).__name__}: {error})") from None
    if pack_proof(proof) != data:
        raise Reject("a proof is not in canonical form")
    return proof


def _read_link(body: dict[str, Any]) -> LinkProof:
    return LinkProof(unseal(_bytes(body["claim"]), Claim), _bytes(body["before"]), _opening(body["last"]))


def _read_reduction(body: dict[str, Any]) -> ReductionProof:
    parts = {int(position): (_bytes(data), _way(way)) for position, data, way in body["parts"]}
    if not parts:
        raise Reject("a proof names no parts")
    return ReductionProof(
        unseal(_bytes(body["receipt"]), Receipt, MAX_RECEIPT_BYTES),
        tuple(unseal(_bytes(claim), Claim) for claim in body["members"]),
        _bytes(body["before"]),
        int(body["index"]),
        parts,
    )


def _read_segment(body: dict[str, Any]) -> SegmentProof:
    start = body["start"]
    return SegmentProof(
        unseal(_bytes(body["claim"]), Claim),
        int(body["segment"]),
        _bytes(body["before"]),
        None if start is None else _opening(start),
        _opening(body["end"]),
    )


_READERS: Final[dict[str, Callable[[dict[str, Any]], Proof]]] = {
    "claim": lambda body: WorkProof(unseal(_bytes(body["claim"]), Claim), _bytes(body["before"])),
    "conflict": lambda body: ConflictProof(Conflict.unpack(_bytes(body["conflict"]))),
    "link": _read_link,
    "probe": lambda body: ProbeProof(
        unseal(_bytes(body["claim"]), Claim), _bytes(body["before"]), _bytes(body["delta"])
    ),
    "reduction": _read_reduction,
    "segment": _read_segment,
}


def _state_of_round(blob: bytes, claims: Sequence[Claim], judge: Judge) -> State:
    """The state that claims of one round start from.

    Raises:
        RemoteError: these are not its bytes, or a claim is none that a peer of that round would take.
    """
    state = _named_state(blob, claims[0], judge)
    view = view_of(state, judge.manifest, cohort_of(state.run, claims[0].peer, state.bits))
    for each in claims:
        check_claim(each, view)
    return state


def _named_state(blob: bytes, claim: Claim, judge: Judge) -> State:
    """The state that a claim names.

    Raises:
        RemoteError: these are not its bytes.
    """
    if blob_digest(blob) != claim.state or claim.run != judge.manifest.run_id:
        raise Reject("a proof holds another state than the claim starts from")
    return parse_state(blob, judge.manifest, judge.like)


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("bytes belong here")
    return value


def _way(value: Any) -> tuple[bytes, ...]:
    way = tuple(_bytes(item) for item in value)
    if any(len(item) != DIGEST_BYTES for item in way):
        raise ValueError("a digest has 32 bytes")
    return way


def _opening(value: Any) -> Opening:
    return Opening(_bytes(value["data"]), _way(value["proof"]))
