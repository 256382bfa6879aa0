"""How long a peer waits for others while it checks what they did: in all, and for each of them.

Who gives its bytes slowly costs others no more than that. Whose whole share was not enough cannot be checked, and that
is told; what is not done because others had used up the time says nothing about its author.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Final

from p2pasr.errors import LinkDown, P2pasrError, TransportError
from p2pasr.protocol.manifest import RoundSection
from p2pasr.protocol.signing import short

SHARE_OF_ROUND: Final = 0.5
"""So much of a round's `max_seconds` is spent on waiting in one step at most."""

LEAST_SECONDS: Final = 120.0
"""What a step may take in runs of short rounds: a slow answer is no less honest there."""

SHARE_OF_STEP: Final = 0.5
"""So much of a step's time one peer may use up."""


class NotDone(P2pasrError):
    """Something was not checked for a reason that is not its author's."""


def seconds_of(rounds: RoundSection) -> float:
    """How long one step of a round may wait for others."""
    return max(SHARE_OF_ROUND * rounds.max_seconds, LEAST_SECONDS)


def within(most: float, until: float) -> float:
    """Seconds to wait now: no more than `most`, and not after `until`, as `time.monotonic` counts."""
    return max(0.0, min(most, until - time.monotonic()))


class Waits:
    """What is left of a step's time.

    Args:
        seconds: all of it; nobody is waited for any longer, however many there are.
    """

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self._most = SHARE_OF_STEP * seconds
        self._used: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def turn(self, peer: str, seconds: float) -> Iterator[Turn]:
        """The block in which one peer is waited for.

        Args:
            seconds: what is enough for a slow link; the peer has no more than that, or than its share of the step.

        Raises:
            NotDone: from the block in place of a TransportError if the peer had less than that, or at once if there is
                no time left.
            TransportError: the peer has used up its share before.
        """
        began = time.monotonic()
        if began >= self.deadline:
            raise NotDone("no time is left in this round")
        share = min(seconds, self._most - self._used[peer])
        if share <= 0.0:
            raise TransportError(f"{short(peer)} has used up its share of the time")
        turn = Turn(self, min(began + share, self.deadline))
        is_cut = began + share > self.deadline
        try:
            yield turn
        except LinkDown as error:
            raise NotDone(str(error)) from error
        except TransportError as error:
            if is_cut and time.monotonic() >= turn.until:
                raise NotDone(f"no time is left in this round ({error})") from error
            raise
        finally:
            self._used[peer] += time.monotonic() - began - turn.own


@dataclass
class Turn:
    """The time that one peer has.

    Attributes:
        until: when it ends, as `time.monotonic` counts.
        own: seconds of it that this peer used itself.
    """

    waits: Waits
    until: float
    own: float = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block in which this peer works itself: what that takes counts for nobody.

        Raises:
            NotDone: in place of a TransportError, which others caused.
        """
        began = time.monotonic()
        try:
            yield
        except TransportError as error:
            raise NotDone(str(error)) from error
        finally:
            spent = time.monotonic() - began
            self.own += spent
            self.until += spent
            self.waits.deadline += spent


ENDLESS: Final = Waits(inf)
"""For checks that no round waits for."""
