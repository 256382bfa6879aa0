"""Mixing cohorts into one state again: what each contributes, which of them are mixed, and what comes of it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from statistics import median
from typing import Any, Final

import numpy.typing as npt

from p2pasr.errors import Reject
from p2pasr.protocol.cohorts import Cohort, bits_for
from p2pasr.protocol.encoding import MEBIBYTE, digest, pack, unpack
from p2pasr.protocol.manifest import AveragingSection, RunManifest
from p2pasr.protocol.messages import Attestation, Mix
from p2pasr.protocol.state import NO_PARENT, State, remember
from p2pasr.protocol.strikes import Strike, is_strike, remember_strikes
from p2pasr.protocol.tensors import Tensors

MAX_LEDGER_BYTES: Final = MEBIBYTE
"""Longest packed ledger of a cohort."""

NO_CHOICE: Final = NO_PARENT
"""What a peer has chosen that has not voted yet."""


# --- ledgers --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ledger:
    """What one cohort merged since the common state.

    Attributes:
        epoch: its epoch.
        covered: hex digest of a shard → merged claims that named it in that epoch, since the common state.
        credit: peer → seconds of audio of its claims that were merged since then.
        bans: peer → the round, since then, in which it was banned.
        strikes: peer → its strikes and the round of the last, of those that have had one since then.
        guests: guest of whom the first claim was merged since then → who invited it.
    """

    epoch: int
    covered: Mapping[str, int]
    credit: Mapping[str, float]
    bans: Mapping[str, int] = field(default_factory=dict)
    strikes: Mapping[str, Strike] = field(default_factory=dict)
    guests: Mapping[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds of audio in it."""
        return sum(self.credit[peer] for peer in sorted(self.credit))

    def pack(self, manifest: RunManifest) -> bytes:
        """Its bytes; shards are named by their place in the manifest."""
        counts = [(place, self.covered.get(shard.digest, 0)) for place, shard in enumerate(manifest.shards)]
        covered = [pair for pair in counts if pair[1]]
        people = {"bans": dict(self.bans), "credit": dict(self.credit), "guests": dict(self.guests)}
        return pack({**people, "strikes": dict(self.strikes), "covered": covered, "epoch": self.epoch})

    @classmethod
    def unpack(cls, data: bytes, manifest: RunManifest, cohort: Cohort, rounds: int) -> Ledger:
        """Read what a cohort says that it merged.

        Args:
            rounds: how many rounds it can have merged since the common state.

        Raises:
            Reject: malformed, of peers of another cohort, or more than a cohort can merge.
        """
        content = unpack(data, MAX_LEDGER_BYTES)
        who = f"the ledger of cohort {cohort.name}"
        if not isinstance(content, dict) or content.keys() != {field.name for field in fields(cls)}:
            raise Reject(f"{who} is not {{bans, covered, credit, epoch, guests, strikes}}")
        covered, credit, epoch, bans = content["covered"], content["credit"], content["epoch"], content["bans"]
        strikes, guests = content["strikes"], content["guests"]
        if type(epoch) is not int or not 0 <= epoch <= 1 << 31 or not isinstance(covered, tuple):
            raise Reject(f"{who} is malformed")
        if not all(_is_count(pair, len(manifest.shards)) for pair in covered):
            raise Reject(f"{who} counts something that is no shard")
        if [place for place, _ in covered] != sorted({place for place, _ in covered}):
            raise Reject(f"{who} counts a shard twice, or out of order")
        if not isinstance(credit, dict) or not all(map(_is_credit, credit.values())):
            raise Reject(f"{who} credits something that is no time")
        if not isinstance(bans, dict) or not all(type(number) is int and number >= 0 for number in bans.values()):
            raise Reject(f"{who} bans peers in something that is no round")
        if not isinstance(strikes, dict) or not all(map(is_strike, strikes.values())):
            raise Reject(f"{who} counts something that is no strike")
        if not isinstance(guests, dict) or not all(isinstance(inviter, str) for inviter in guests.values()):
            raise Reject(f"{who} names inviters that are no peers")
        if not guests.keys() <= credit.keys() or (guests and manifest.admission.kind != "invite"):
            raise Reject(f"{who} names guests of which nothing was merged, or in a run without invites")
        run = manifest.run_id
        if not all(cohort.has(run, peer) for peer in (*credit, *bans, *strikes)):
            raise Reject(f"{who} is about peers of another cohort")
        counted = {manifest.shards[place].digest: count for place, count in covered}
        ledger = cls(epoch, counted, credit, bans, strikes, guests)
        if ledger.seconds > 1.001 * rounds * manifest.most_seconds_per_group:
            raise Reject(f"{who} has {ledger.seconds:.0f} s of audio, which {rounds} rounds of a group cannot hold")
        return ledger


def ledger_since(state: State, common: State) -> Ledger:
    """What was merged between two states of one line."""
    before = common.covered if common.epoch == state.epoch else {}
    covered = {shard: count - before.get(shard, 0) for shard, count in state.covered.items()}
    credit = {peer: seconds - common.credit.get(peer, 0.0) for peer, seconds in state.credit.items()}
    return Ledger(
        state.epoch,
        {shard: count for shard, count in covered.items() if count > 0},
        {peer: seconds for peer, seconds in credit.items() if seconds > 0},
        {peer: number for peer, number in state.bans.items() if peer not in common.bans},
        {peer: each for peer, each in state.strikes.items() if common.strikes.get(peer) != each},
        {guest: inviter for guest, inviter in state.guests.items() if guest not in common.guests},
    )


def weights(ledgers: Sequence[Ledger], manifest: RunManifest) -> tuple[float, ...]:
    """The weight of each cohort: the seconds of audio in its ledger, at most `weight_cap` times the median."""
    raw = [ledger.seconds for ledger in ledgers]
    cap = manifest.averaging.weight_cap * median(raw)
    return tuple(min(weight, cap) for weight in raw) if cap > 0 else tuple(raw)


def fold(common: State, ledgers: Iterable[Ledger], manifest: RunManifest) -> tuple[int, dict[str, int]]:
    """Epoch and coverage after cohorts worked apart.

    The latest epoch that one of them is in counts; what others covered in an earlier one is behind it.
    A shard that several covered is counted for each: between mixes they do not know of each other.
    """
    ledgers = list(ledgers)
    epoch = max([common.epoch, *(ledger.epoch for ledger in ledgers)])
    covered = Counter(common.covered) if epoch == common.epoch else Counter()
    for ledger in ledgers:
        if ledger.epoch == epoch:
            covered.update(ledger.covered)
    if all(covered[shard.digest] >= manifest.data.redundancy for shard in manifest.shards):
        return epoch + 1, {}
    return epoch, dict(sorted(covered.items()))


# --- states ---------------------------------------------------------------------------------------


def mixed(
    common: State,
    manifest: RunManifest,
    number: int,
    states: Iterable[bytes],
    ledgers: Sequence[Ledger],
    delta: Mapping[str, npt.NDArray[Any]],
) -> State:
    """The state that cohorts have in common after a mix.

    The outer optimizer's moments are those of the state before: averaging them too would double what
    is sent, or triple it. Where it restarted since, there are none.

    Args:
        common: the state that they grew from.
        number: the boundary round.
        states: digests of the cohorts' states, in any order.
        ledgers: what each merged, in the order of the cohorts.
        delta: the decoded mean of their deltas; each array is asked for once.
    """
    epoch, covered = fold(common, ledgers, manifest)
    section = manifest.averaging
    peers = len({peer for ledger in ledgers for peer in ledger.credit})
    return State(
        run=common.run,
        round=number + 1,
        parent=digest("mix", common.digest + b"".join(sorted(states))),
        params={name: value + delta[name] for name, value in common.params.items()},
        moments=_kept(common, number, section),
        epoch=epoch,
        covered=covered,
        credit=_credited(common.credit, ledgers),
        bans=_banned(common.bans, ledgers),
        strikes=_struck(common.strikes, ledgers, number + 1, manifest),
        guests=_brought(common.guests, ledgers),
        bits=bits_for(peers, section.max_group, manifest.rounds.min_peers, common.bits),
    )


def caught_up(state: State, common: State, after: State, manifest: RunManifest) -> State:
    """What a cohort makes of a mix that others made without waiting for it.

    Its work since the common state is put on top of the mixed state, as if it had been a round of its own
    from there: the state of one round later, which is mixed next time. Where the
    cohorts are other ones from now on, that would count the work of a cohort twice or hand it to peers
    that had no part in it, so that the mixed state is taken as it is. So is one that the cohort's work
    is in already, and the last of a run.

    Args:
        state: the cohort's, before the boundary round.
        after: the mixed state.
    """
    ledger = ledger_since(state, common)
    included = any(after.credit.get(peer, 0.0) > common.credit.get(peer, 0.0) for peer in ledger.credit)
    if included or not ledger.credit or after.bits != state.bits or after.round == manifest.rounds.rounds:
        return after
    epoch, covered = fold(after, [ledger], manifest)
    params = {name: value + (state.params[name] - common.params[name]) for name, value in after.params.items()}
    return replace(
        after,
        round=after.round + 1,
        parent=after.digest,
        params=params,
        epoch=epoch,
        covered=covered,
        credit=_credited(after.credit, [ledger]),
        bans=_banned(after.bans, [ledger]),
        strikes=_struck(after.strikes, [ledger], after.round + 1, manifest),
        guests=_brought(after.guests, [ledger]),
        common=after.digest,
    )


def _kept(common: State, number: int, section: AveragingSection) -> Tensors:
    """The moments of the state before, without the outer optimizer's if it restarted by round `number`."""
    if not section.outer.restarts(common.round, number):
        return common.moments
    return remember({}, common.reference, section.rule)


def _credited(credit: Mapping[str, float], ledgers: Iterable[Ledger]) -> dict[str, float]:
    earned = dict(credit)
    for ledger in ledgers:
        for peer in sorted(ledger.credit):
            earned[peer] = earned.get(peer, 0.0) + ledger.credit[peer]
    return earned


def _banned(bans: Mapping[str, int], ledgers: Iterable[Ledger]) -> dict[str, int]:
    """A peer that its own cohort has banned is banned everywhere."""
    fresh = {peer: number for ledger in ledgers for peer, number in ledger.bans.items()}
    return dict(sorted({**fresh, **bans}.items()))


def _struck(
    strikes: Mapping[str, Strike], ledgers: Iterable[Ledger], number: int, manifest: RunManifest
) -> dict[str, Strike]:
    """Strikes that count in round `number`; what a peer's own cohort says of it is the latest."""
    fresh = {peer: each for ledger in ledgers for peer, each in ledger.strikes.items()}
    return remember_strikes({**strikes, **fresh}, number, manifest.verify)


def _brought(guests: Mapping[str, str], ledgers: Iterable[Ledger]) -> dict[str, str]:
    """Cohorts that work apart may each admit as many guests of one inviter as it can bring; all of them stay."""
    fresh = {guest: inviter for ledger in ledgers for guest, inviter in ledger.guests.items()}
    return dict(sorted({**fresh, **guests}.items()))


# --- agreement ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """A cohort's part in a mix, as more than half of it state it.

    Attributes:
        index: which of the cohorts.
        state: digest of its state.
        root: what it commits to.
    """

    index: int
    state: bytes
    root: bytes


@dataclass
class Tally:
    """What is known of a mix: who is on the line that began with the common state, and what they state.

    Votes are final, as attestations are: who sees more than half of all peers vote for the same set of
    cohorts may count on it. Only where no set can win any more do all change to the one that has the
    most votes.

    Attributes:
        number: the boundary round.
        common, since: digest of the common state, and its round.
        attesters: cohort → the peers in it that attest the line. Those that came later than it began do not know
            where they stood then, and count too.
        stated: cohort → peer → what it states.
        results: peer → what it attests to have come of the mix.
    """

    number: int
    common: bytes
    since: int
    attesters: dict[int, set[str]] = field(default_factory=dict)
    stated: dict[int, dict[str, Mix]] = field(default_factory=dict)
    results: dict[str, bytes] = field(default_factory=dict)

    def see_attestations(self, index: int, votes: Iterable[Attestation]) -> None:
        """Take note of what a cohort attests."""
        here = [vote for vote in votes if vote.round >= self.since and vote.at(self.since) in (None, self.common)]
        self.attesters[index] = {vote.peer for vote in here}
        for vote in here:
            if (result := vote.at(self.number + 1)) is not None:
                self.results[vote.peer] = result

    def see_mixes(self, index: int, mixes: Iterable[Mix]) -> None:
        """Take note of what a cohort states about this mix."""
        here = {mix.peer: mix for mix in mixes if (mix.round, mix.common) == (self.number, self.common)}
        self.stated[index] = here

    def part(self, index: int) -> Part | None:
        """What more than half of a cohort state, if they do."""
        mixes = self.stated.get(index, {})
        if not mixes:
            return None
        (state, root), count = Counter((mix.state, mix.root) for mix in mixes.values()).most_common(1)[0]
        enough = 2 * count > len(self.attesters.get(index, set()) | mixes.keys())
        return Part(index, state, root) if enough else None

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is known of all cohorts, in their order."""
        known = (self.part(index) for index in sorted(self.stated))
        return tuple(part for part in known if part is not None)

    @property
    def missing(self) -> tuple[int, ...]:
        """Cohorts that have members and no agreed part yet."""
        peopled = {index for index, peers in self.attesters.items() if peers} | {i for i, m in self.stated.items() if m}
        return tuple(sorted(peopled - {part.index for part in self.parts}))

    @property
    def votes(self) -> dict[str, bytes]:
        """Peer → the set of cohorts that it votes for, by its digest; NO_CHOICE for one that has not voted."""
        everybody = {peer: NO_CHOICE for peers in self.attesters.values() for peer in peers}
        return everybody | {peer: mix.chosen for mixes in self.stated.values() for peer, mix in mixes.items()}

    def named(self, chosen: bytes) -> tuple[Part, ...] | None:
        """The parts of a set that somebody votes for, if those that are known here are the same."""
        sets = {m.cohorts for mixes in self.stated.values() for m in mixes.values() if m.chosen == chosen}
        known = {part.index: part for part in self.parts}
        for indices in sorted(sets):
            parts = tuple(known[index] for index in indices if index in known)
            if len(parts) == len(indices) and choice(self.common, parts) == chosen:
                return parts
        return None

    def result(self) -> bytes | None:
        """What more than half of all peers attest to have come of the mix, if they do."""
        if not self.results:
            return None
        state, count = max(Counter(self.results.values()).items(), key=lambda item: (item[1], item[0]))
        return state if 2 * count > len(self.votes) else None


def choice(common: bytes, parts: Iterable[Part]) -> bytes:
    """Names a set of cohorts with what each contributes: 32 bytes."""
    listed = [[part.index, part.state, part.root] for part in sorted(parts)]
    return digest("mix-set", common + pack(listed))


def decide(votes: Mapping[str, bytes]) -> tuple[bytes | None, bytes | None]:
    """Count votes for sets of cohorts.

    Args:
        votes: every peer's, NO_CHOICE for those that have not voted.

    Returns:
        The set that more than half vote for, None where there is none yet; and the set that all should
        change to because none can win any more, None while one can.
    """
    counts = Counter(chosen for chosen in votes.values() if chosen != NO_CHOICE)
    if not counts:
        return None, None
    best = min(counts, key=lambda chosen: (-counts[chosen], chosen))
    if 2 * counts[best] > len(votes):
        return best, None
    open_votes = len(votes) - counts.total()
    return None, best if 2 * (counts[best] + open_votes) <= len(votes) else None


def _is_count(pair: Any, shards: int) -> bool:
    return (
        isinstance(pair, tuple)
        and len(pair) == 2
        and all(type(number) is int for number in pair)
        and 0 <= pair[0] < shards
        and 0 < pair[1] <= 1 << 20
    )


def _is_credit(seconds: Any) -> bool:
    return isinstance(seconds, float) and isfinite(seconds) and seconds > 0
