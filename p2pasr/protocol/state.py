"""The state that all peers agree on, and how a round moves it. Pure: equal rounds give equal bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from p2pasr.errors import Reject
from p2pasr.protocol.admission import welcome
from p2pasr.protocol.cohorts import MAX_BITS, bits_for, is_boundary
from p2pasr.protocol.encoding import DIGEST_BYTES, blob_digest
from p2pasr.protocol.manifest import RuleSection, RunManifest
from p2pasr.protocol.messages import NO_UNDO, Claim
from p2pasr.protocol.strikes import Strike, is_strike, strike
from p2pasr.protocol.tensors import Tensors, forms, tensor_pieces, unpack_tensors

FORMAT: Final = "p2pasr-state/1"
NO_PARENT: Final = bytes(DIGEST_BYTES)

_PARAM, _MOMENT = "param/", "moment/"
_REFERENCE = "reference/"
_FIELDS: Final = frozenset(
    ("format", "run", "round", "parent", "epoch", "covered", "credit", "bans", "strikes", "guests", "bits", "common")
)


@dataclass(frozen=True)
class State:
    """What is agreed on before a round.

    Attributes:
        run: the run's id, 32 bytes.
        round: the round that will be trained from this state.
        parent: digest of the state one round earlier; zeros before round 0.
        params: name → float32, the trained parameters.
        moments: name → float32, what the outer optimizer and the averaging rule remember; may be empty.
        epoch: how often all shards have been covered.
        covered: hex digest of a shard → merged claims that named it in this epoch.
        credit: peer → seconds of audio of its merged claims.
        bans: peer → the round in which it was banned.
        strikes: peer → how many of its strikes count, and the round of the last.
        guests: guest of whom a claim was merged → who invited it.
        bits: those who hold it are split into 2^bits cohorts.
        common: digest of the state that all cohorts grew from; zeros if that is this one, and before a split.
    """

    run: bytes
    round: int
    parent: bytes
    params: Tensors
    moments: Tensors
    epoch: int
    covered: dict[str, int]
    credit: dict[str, float]
    bans: dict[str, int]
    bits: int = 0
    common: bytes = NO_PARENT
    strikes: dict[str, Strike] = field(default_factory=dict)
    guests: dict[str, str] = field(default_factory=dict)

    @property
    def pieces(self) -> tuple[bytes | memoryview, ...]:
        """The state's canonical bytes in pieces, without a copy of its arrays."""
        tensors = {_PARAM + name: value for name, value in self.params.items()}
        tensors |= {_MOMENT + name: value for name, value in self.moments.items()}
        meta = {
            "format": FORMAT,
            "run": self.run.hex(),
            "round": self.round,
            "parent": self.parent.hex(),
            "epoch": self.epoch,
            "covered": self.covered,
            "credit": self.credit,
            "bans": self.bans,
            "strikes": self.strikes,
            "guests": self.guests,
            "bits": self.bits,
            "common": self.common.hex(),
        }
        return tensor_pieces(tensors, meta)

    @property
    def blob(self) -> bytes:
        """The state's canonical bytes."""
        return b"".join(self.pieces)

    @cached_property
    def digest(self) -> bytes:
        """H_r: names the state, and its blob."""
        return blob_digest(*self.pieces)

    @property
    def reference(self) -> Tensors:
        """The last round's aggregate, like `params`; empty if the averaging rule starts from none, and in round 0."""
        names = {name: _REFERENCE + name for name in self.params}
        return {name: self.moments[moment] for name, moment in names.items() if moment in self.moments}

    @property
    def is_common(self) -> bool:
        """Whether all cohorts hold this very state."""
        return self.common == NO_PARENT

    @property
    def work(self) -> float:
        """Seconds of audio merged since the start of the run."""
        return sum(self.credit[peer] for peer in sorted(self.credit))

    @property
    def standing(self) -> dict[str, float]:
        """Peer → the credit by which it is trusted: all of it, and none while a strike counts."""
        return standing(self.credit, self.strikes)


def standing(credit: Mapping[str, float], strikes: Mapping[str, Strike]) -> dict[str, float]:
    """Peer → the credit by which it is trusted, see :attr:`State.standing`."""
    return {peer: seconds for peer, seconds in credit.items() if peer not in strikes}


def genesis(manifest: RunManifest, params: Tensors) -> State:
    """The state before round 0, which every peer computes for itself from the manifest."""
    return State(manifest.run_id, 0, NO_PARENT, params, {}, 0, {}, {}, {}, manifest.averaging.first_bits)


def params_digest(params: Tensors) -> bytes:
    """Names a set of parameters: 32 bytes. The manifest holds that of the initial ones."""
    return blob_digest(*tensor_pieces(params, {}))


def max_state_bytes(manifest: RunManifest) -> int:
    """The longest blob that can be a state of this run, decided before one is fetched.

    Parameters, at most two moments and the rule's reference, if it needs one, of four bytes each; four
    megabytes for headers and the credit of tens of thousands of peers, and a generous 128 bytes a shard.
    """
    copies = 4 if manifest.averaging.rule.needs_reference else 3
    return copies * 4 * manifest.parameters + (4 << 20) + 128 * len(manifest.shards)


def parse_state(blob: bytes, manifest: RunManifest, like: Tensors | None) -> State:
    """Read a state that came from a peer.

    Args:
        like: the initial parameters, whose names, shapes and dtypes the state's must match; None where the digest is
            trusted for these, so that only the number and the type of its values are compared with the manifest.

    Raises:
        Reject: it is no state of this run.
    """
    tensors, meta = unpack_tensors(blob)
    params = {name.removeprefix(_PARAM): value for name, value in tensors.items() if name.startswith(_PARAM)}
    moments = {name.removeprefix(_MOMENT): value for name, value in tensors.items() if name.startswith(_MOMENT)}
    if like is None:
        fits = all(array.dtype == np.float32 for array in params.values())
        fits = fits and sum(array.size for array in params.values()) == manifest.parameters
    else:
        fits = forms(params) == forms(like)
    if not fits:
        raise Reject("a state holds other parameters than this run trains")
    if not all(np.isfinite(value).all() for value in tensors.values()):
        raise Reject("a state holds values that are not finite")
    reference = {_REFERENCE + name: name for name in params} if manifest.averaging.rule.needs_reference else {}
    if 0 < len(reference.keys() & moments.keys()) < len(reference):
        raise Reject("a state holds its reference in part")
    for name, moment in moments.items():
        moved = params.get(reference.get(name, name.removeprefix("first/").removeprefix("second/")))
        if moved is None or (moment.shape, moment.dtype) != (moved.shape, moved.dtype):
            raise Reject("a state's moments do not fit its parameters")
    _check_ledger(meta, manifest)
    try:
        state = State(
            run=bytes.fromhex(meta["run"]),
            round=meta["round"],
            parent=bytes.fromhex(meta["parent"]),
            params=params,
            moments=moments,
            epoch=meta["epoch"],
            covered=meta["covered"],
            credit=meta["credit"],
            bans=meta["bans"],
            bits=meta["bits"],
            common=bytes.fromhex(meta["common"]),
            strikes={peer: (count, last) for peer, (count, last) in meta["strikes"].items()},
            guests=meta["guests"],
        )
        sound = meta["format"] == FORMAT and state.digest == blob_digest(blob)
    except ValueError as error:
        raise Reject(f"a state's description is malformed ({error})") from None
    if not sound or state.run != manifest.run_id:
        raise Reject("a state is not a canonical state of this run")
    return state


def _check_ledger(meta: Mapping[str, Any], manifest: RunManifest) -> None:
    """Are these the fields of a state, of their types and within bounds?

    Raises:
        Reject: no.
    """
    shards = {shard.digest for shard in manifest.shards}
    covered, credit, bans, guests = (meta.get(name) for name in ("covered", "credit", "bans", "guests"))
    numbers = (meta.get("round"), meta.get("epoch"), meta.get("bits"))
    digests = (meta.get("run"), meta.get("parent"), meta.get("common"))
    sound = (
        meta.keys() == _FIELDS
        and all(type(number) is int and 0 <= number <= 1 << 31 for number in numbers)
        and all(isinstance(name, str) and len(name) == 2 * DIGEST_BYTES for name in digests)
        and meta["bits"] <= MAX_BITS
        and (meta["bits"] > 0 or meta["common"] == NO_PARENT.hex())
        and isinstance(covered, dict)
        and all(shard in shards and type(n) is int and n > 0 for shard, n in covered.items())
        and isinstance(credit, dict)
        and all(
            isinstance(peer, str) and isinstance(seconds, float) and isfinite(seconds) and seconds >= 0
            for peer, seconds in credit.items()
        )
        and isinstance(bans, dict)
        and all(isinstance(peer, str) and type(number) is int and number >= 0 for peer, number in bans.items())
        and isinstance(meta["strikes"], dict)
        and all(isinstance(peer, str) and is_strike(each) for peer, each in meta["strikes"].items())
        and isinstance(guests, dict)
        and all(isinstance(name, str) for pair in guests.items() for name in pair)
    )
    if not sound:
        raise Reject("a state's description is malformed")


def advance(
    state: State,
    manifest: RunManifest,
    merged: Iterable[Claim],
    params: Tensors,
    moments: Tensors,
    voters: Iterable[Claim] | None = None,
) -> State:
    """S_{r+1}: the ledger folded over the round's claims, with the outer optimizer's new parameters.

    Args:
        merged: those that count and are in every part of the average: these earn. The order of claims does not matter.
        params, moments: what the outer optimizer made of the average, see :func:`remember` for more moments.
        voters: all that count, for each of them votes: who reduces a part decides who is in it, and must not decide who
            has a say. Those that are merged if None.
    """
    merged = sorted(merged, key=lambda claim: claim.peer)
    voters = merged if voters is None else sorted(voters, key=lambda claim: claim.peer)
    covered, ended = cover(state.covered, merged, manifest)
    return State(
        run=state.run,
        round=state.round + 1,
        parent=state.digest,
        params=params,
        moments=moments,
        epoch=state.epoch + ended,
        covered=covered,
        credit=earn(state.credit, merged, voters, manifest),
        bans=condemn(state.bans, voters, state.round),
        strikes=strike(state.strikes, voters, state.round, manifest.verify),
        bits=bits_after(state.round, state.bits, len(merged), manifest),
        common=(state.digest if state.is_common else state.common) if state.bits else NO_PARENT,
        guests=welcome(state.guests, merged, manifest),
    )


def bits_after(number: int, bits: int, merged: int, manifest: RunManifest) -> int:
    """The bits of the state after round `number`, in which so many claims were merged: one group may split."""
    section, rounds = manifest.averaging, manifest.rounds
    if bits or not is_boundary(number, rounds.rounds, section.mix_rounds):
        return bits
    return bits_for(merged, section.max_group, rounds.min_peers, 0)


def mix_due(state: State, manifest: RunManifest) -> bool:
    """Whether the round that starts from this state mixes the cohorts instead of training."""
    boundary = is_boundary(state.round, manifest.rounds.rounds, manifest.averaging.mix_rounds)
    return boundary and state.bits > 0 and not state.is_common


def remember(moments: Tensors, average: Mapping[str, npt.NDArray[Any]], rule: RuleSection) -> Tensors:
    """The moments of the next state: the outer optimizer's, and the average itself if the rule starts from it."""
    if not rule.needs_reference:
        return moments
    return moments | {_REFERENCE + name: value for name, value in average.items()}


def shard_seconds(manifest: RunManifest) -> dict[str, float]:
    """Hex digest of each shard → seconds of audio in it."""
    return {shard.digest: shard.seconds for shard in manifest.shards}


def trained_seconds(claim: Claim, manifest: RunManifest, seconds: Mapping[str, float]) -> float:
    """Seconds of audio that a claim stands for, computed from what the manifest and assignment say.

    The audio in its shards, scaled by the share of the round's segments that it trained: nothing a
    peer states about its own effort enters beyond the number of segments, which audits re-run. Of
    private shards nobody else knows the audio: there it is what the claim says, which the rules bound.
    """
    private = manifest.data.policy == "private"
    audio = claim.seconds if private else sum(seconds[shard.hex()] for shard in sorted(claim.shards))
    return audio * claim.segments / manifest.rounds.segments


def condemn(bans: Mapping[str, int], voters: Iterable[Claim], round_number: int) -> dict[str, int]:
    """Who is banned after a round: those that more than half of its claims speak against, and those before.

    A peer speaks against another only when it has checked the proof itself, so that the majority which decides what
    the state is decides this too, and nobody is banned on one peer's word where there are others.

    Args:
        voters: all claims of the round's group that count, merged or not.
    """
    claims = list(voters)
    votes = Counter(peer for claim in claims for peer in claim.against)
    fresh = {peer: round_number for peer, count in votes.items() if 2 * count > len(claims)}
    return dict(sorted({**fresh, **bans}.items()))


def undone(voters: Iterable[Claim]) -> dict[str, bytes]:
    """Whose work is taken out of the state with a round, peer → digest of its undo.

    More than half of the claims name the same undo of the peer, so that the round bans it too.

    Args:
        voters: as for :func:`condemn`.
    """
    claims = list(voters)
    votes = Counter(pair for claim in claims for pair in zip(claim.against, claim.undo, strict=True))
    return {peer: undo for (peer, undo), count in sorted(votes.items()) if undo != NO_UNDO and 2 * count > len(claims)}


def cover(covered: Mapping[str, int], merged: Iterable[Claim], manifest: RunManifest) -> tuple[dict[str, int], bool]:
    """Count merged claims for their shards.

    Returns:
        Hex digest of a shard → claims that named it in this epoch, and whether the epoch ended with them. Private
        shards are not counted, so that there is one epoch only.
    """
    if manifest.data.policy == "private":
        return {}, False
    counted = dict(covered)
    for claim in merged:
        for shard in claim.shards:
            counted[shard.hex()] = counted.get(shard.hex(), 0) + 1
    if all(counted.get(shard.digest, 0) >= manifest.data.redundancy for shard in manifest.shards):
        return {}, True
    return dict(sorted(counted.items())), False


def earn(
    credit: Mapping[str, float], merged: Iterable[Claim], voters: Iterable[Claim], manifest: RunManifest
) -> dict[str, float]:
    """Credit merged claims to their peers, and take all from those whose work is undone: peer → seconds of audio.

    Args:
        voters: as for :func:`condemn`.
    """
    earned = dict(credit)
    seconds = shard_seconds(manifest)
    for claim in merged:
        earned[claim.peer] = earned.get(claim.peer, 0.0) + trained_seconds(claim, manifest, seconds)
    return earned | dict.fromkeys(undone(voters), 0.0)


def describe(state: State) -> dict[str, Any]:
    """A state's ledger as plain values, for logs and pages."""
    return {
        "round": state.round,
        "state": state.digest.hex(),
        "epoch": state.epoch,
        "shards_covered": len(state.covered),
        "seconds_merged": round(state.work, 1),
        "peers_credited": len(state.credit),
        "peers_banned": len(state.bans),
        "peers_struck": len(state.strikes),
        "cohorts": 1 << state.bits,
    }
