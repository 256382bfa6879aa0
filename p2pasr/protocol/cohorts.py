"""Cohorts: into how many a swarm that is too large for one group splits, who belongs where, and when they mix.

A cohort goes through its rounds like a swarm of its own. Its name is the first bits of a hash, so a
peer can compute for every number of bits where it belongs, a split halves each cohort and joins
nobody, and nobody needs a list of all peers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from p2pasr.protocol.encoding import digest

MAX_BITS: Final = 10
"""A swarm splits into 2¹⁰ cohorts at most: with groups of 64, about 32,000 peers."""


@dataclass(frozen=True, slots=True, order=True)
class Cohort:
    """One of the 2^bits parts of a swarm.

    Attributes:
        bits: how often the swarm was halved.
        index: which part, from 0 to 2^bits − 1.
    """

    bits: int
    index: int

    @property
    def name(self) -> str:
        """What its records are found under in the directory."""
        return f"{self.bits}-{self.index}" if self.bits else "all"

    def has(self, run: bytes, peer: str) -> bool:
        """Whether a peer belongs to it."""
        return cohort_of(run, peer, self.bits) == self

    def prefers(self, shard: bytes) -> bool:
        """Whether a shard is one that this cohort trains on before others, so that cohorts do different work."""
        return _first_bits("shard-cohort", shard, self.bits) == self.index


EVERYBODY: Final = Cohort(0, 0)
"""The only cohort of a swarm that fits into one group."""


def cohort_of(run: bytes, peer: str, bits: int) -> Cohort:
    """The cohort of a peer, out of 2^bits; for one bit fewer it is the half of the swarm that holds this cohort."""
    return Cohort(bits, _first_bits("cohort", run + peer.encode(), bits))


def bits_for(peers: int, most: int, least: int, bits: int) -> int:
    """Into how many cohorts, as bits, a swarm splits.

    One group while `peers` are fewer than `most`. From then on the mean cohort is at most half a group
    and at least a quarter of one, so that hardly any overflows although names are drawn. A swarm that
    shrinks stays as it is until it would fit twice into half as many cohorts: it does not flap.

    Args:
        peers: how many were seen at work.
        most: the largest group.
        least: the smallest; a mean cohort is never smaller than twice this.
        bits: now.
    """
    while bits < MAX_BITS and peers > _room(bits, most) and peers >= 2 * least << (bits + 1):
        bits += 1
    while bits > 0 and (2 * peers <= _room(bits - 1, most) or peers < least << bits):
        bits -= 1
    return bits


def is_boundary(number: int, rounds: int, mix_rounds: int) -> bool:
    """Whether cohorts are mixed, or a swarm may split, in round `number`.

    Counted from the end, so that the last of a run's `rounds` is one and all peers end in one state.
    """
    return (rounds - number) % mix_rounds == 1


def _room(bits: int, most: int) -> int:
    """The most peers that so many cohorts are meant for."""
    return (most << bits) // 2 if bits else most - 1


def _first_bits(kind: str, name: bytes, bits: int) -> int:
    return int.from_bytes(digest(kind, name)[:2], "big") >> (16 - bits)
