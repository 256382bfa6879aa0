"""What a ban takes out of the parameters again: a tiny classifier in one process, with and without excision."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from p2pasr import round as story
from p2pasr.averaging.codec import Flat
from p2pasr.averaging.rules import norm
from p2pasr.protocol.messages import NO_UNDO
from p2pasr.protocol.tensors import Tensors
from tests.attacks.adversary import scaled
from tests.attacks.arena import Arena
from tests.attacks.tiny import held_out_loss as loss

ROUNDS: Final = 5
"""How many are played from the first in which the cheat is merged on; it is banned in the second."""


@dataclass(frozen=True, slots=True)
class Row:
    """What a ban takes out of a tiny classifier, one of whose members flips its signs and claims ten times as much.

    Attributes:
        rounds_before: that all were honest in.
        clip_norm: of the rule; none for no limit.
        honest: held-out loss where nobody cheats, after the round of the ban.
        cheated: the same after the round in which the cheat was merged, where it cheats.
        banned: after the round that bans it, where nothing is taken out.
        excised: the same where it is.
        next_excised: one round later.
        next_late: the same where it is taken out only then.
        later_banned, later_excised: both three rounds after the ban, as percent above the loss where nobody cheats.
        distance_banned, distance_excised: from the parameters where nobody cheats, relative to their length, after the
            round of the ban; runs of honest peers that differ in nothing but their keys are as far apart.
    """

    peers: int
    rounds_before: int
    clip_norm: str
    honest: float
    cheated: float
    banned: float
    excised: float
    next_excised: float
    next_late: float
    later_banned: float
    later_excised: float
    distance_banned: float
    distance_excised: float


def measure(groups: Sequence[int]) -> list[Row]:
    """Runs with and without a cheat, and with and without excision, of so many peers each."""
    return [_excised(peers, before, clip_norm) for peers in groups for before in (0, 6) for clip_norm in (2.0, None)]


def _excised(peers: int, before: int, clip_norm: float | None) -> Row:
    honest = _line(peers, before, clip_norm, cheats=False, excises=True)
    banned = _line(peers, before, clip_norm, cheats=True, excises=False)
    excised = _line(peers, before, clip_norm, cheats=True, excises=True)
    return Row(
        peers=peers,
        rounds_before=before,
        clip_norm="none" if clip_norm is None else str(clip_norm),
        honest=loss(honest[1]),
        cheated=loss(excised[0]),
        banned=loss(banned[1]),
        excised=loss(excised[1]),
        next_excised=loss(excised[2]),
        next_late=loss({name: banned[2][name] - (banned[1][name] - excised[1][name]) for name in banned[2]}),
        later_banned=100 * (loss(banned[-1]) / loss(honest[-1]) - 1),
        later_excised=100 * (loss(excised[-1]) / loss(honest[-1]) - 1),
        distance_banned=_distance(banned[1], honest[1]),
        distance_excised=_distance(excised[1], honest[1]),
    )


def _line(peers: int, before: int, clip_norm: float | None, *, cheats: bool, excises: bool) -> list[Tensors]:
    """The parameters after each round, from the first in which the cheat is merged on."""

    def no_undo(_member: Any, against: Sequence[str]) -> tuple[bytes, ...]:
        return (NO_UNDO,) * len(against)

    with tempfile.TemporaryDirectory(prefix="p2pasr-bench-") as name, pytest.MonkeyPatch.context() as patch:
        if not excises:
            patch.setattr(story, "undos_of", no_undo)
        with Arena(Path(name), peers, averaging={"rule": {"clip_norm": clip_norm}}) as arena:
            arena.play(before)
            if cheats:
                arena.players[0].attack = scaled(-10)
            line = []
            for _ in range(ROUNDS):
                arena.play(1)
                line.append(dict(arena.state.params))
            return line


def _distance(params: Tensors, other: Tensors) -> float:
    """Between two sets of parameters, relative to the length of the second."""
    return norm(Flat(params)[:] - Flat(other)[:]) / norm(Flat(other)[:])
