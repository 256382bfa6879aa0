"""What hostile members do to a model under each rule: many small trainings, some members of which lie.

Twenty members train a softmax classifier together, each on data of its own, with the functions that
real reducers call. A share of them sends something else than what it trained. The attacks know what
the honest members send, which is more than a real attacker would know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from p2pasr.averaging import rules
from p2pasr.averaging.codec import Vector
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.manifest import RuleSection

MEMBERS = 20
PEERS = [f"member {number}" for number in range(MEMBERS)]
CLASSES, FEATURES = 10, 32
SAMPLES = 200
"""Of each member; a tenth of all classes make up most of them, so that honest deltas differ."""

LOCAL_STEPS = 5
RATE = np.float32(0.5)

RULES = {
    "mean_unclipped": RuleSection(clip_norm=None),
    "mean": RuleSection(),
    "trimmed_mean": RuleSection(kind="trimmed-mean", trim=0.4),
    "median": RuleSection(kind="median"),
    "krum": RuleSection(kind="krum", hostile=0.4),
    "centered_clip": RuleSection(kind="centered-clip"),
    "centered_clip_unbucketed": RuleSection(kind="centered-clip", bucket=1),
}

Matrix = npt.NDArray[np.float32]
Data = tuple[Matrix, npt.NDArray[np.int64]]
Attack = Callable[[list[Vector], int, np.random.Generator], Vector]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table, as `--json` prints it: accuracy in percent under each rule."""

    attack: str
    hostile_percent: int
    mean_unclipped: float
    mean: float
    trimmed_mean: float
    median: float
    krum: float
    centered_clip: float
    centered_clip_unbucketed: float


def sign_flip(honest: list[Vector], _hostile: int, _draw: np.random.Generator) -> Vector:
    """The opposite of what the others learned, ten times as long."""
    return np.float32(-10) * np.mean(honest, axis=0)


def scaling(honest: list[Vector], _hostile: int, _draw: np.random.Generator) -> Vector:
    """An honest delta a hundred times as long."""
    return np.float32(100) * honest[0]


def noise(honest: list[Vector], _hostile: int, draw: np.random.Generator) -> Vector:
    """Noise ten times as wide as the deltas are."""
    return draw.normal(scale=10 * np.std(honest), size=len(honest[0])).astype(np.float32)


def little_is_enough(honest: list[Vector], hostile: int, _draw: np.random.Generator) -> Vector:
    """As far from the mean as can hide in the spread of the honest (Baruch et al. 2019)."""
    supporters = MEMBERS // 2 + 1 - hostile
    z = NormalDist().inv_cdf((len(honest) - supporters) / len(honest))
    return np.asarray(np.mean(honest, axis=0) - np.float32(z) * np.std(honest, axis=0), dtype=np.float32)


def inner_product(honest: list[Vector], _hostile: int, _draw: np.random.Generator) -> Vector:
    """The mean turned round, no longer than an honest delta may be (Xie et al. 2019)."""
    return np.float32(-1.5) * np.mean(honest, axis=0)


ATTACKS: dict[str, Attack] = {
    "sign flip x10": sign_flip,
    "scaling x100": scaling,
    "noise x10": noise,
    "a little is enough": little_is_enough,
    "inner product": inner_product,
}


def measure(rounds: int, percents: list[int]) -> list[Row]:
    """Train once for every attack, share and rule."""
    rows = [_row("none", 0, sign_flip, rounds)]
    return rows + [_row(name, percent, attack, rounds) for name, attack in ATTACKS.items() for percent in percents]


def _row(name: str, percent: int, attack: Attack, rounds: int) -> Row:
    hostile = MEMBERS * percent // 100
    return Row(name, percent, **{label: _train(rule, attack, hostile, rounds) for label, rule in RULES.items()})


def _train(rule: RuleSection, attack: Attack, hostile: int, rounds: int) -> float:
    draw = np.random.default_rng(0)
    centers = draw.normal(scale=0.5, size=(CLASSES, FEATURES)).astype(np.float32)
    homes = [_data(draw, centers, member % CLASSES) for member in range(MEMBERS)]
    tests = [_data(draw, centers, label) for label in range(CLASSES)]
    theta, reference = np.zeros((FEATURES, CLASSES), np.float32), None
    for _ in range(rounds):
        honest = [_delta(theta, home) for home in homes[hostile:]]
        lies = [attack(honest, hostile, draw) for _ in range(hostile)]
        parts = dict(enumerate([*lies, *honest]))
        center = rules.Center(reference, rules.drawn_order(blob_digest(theta.tobytes()), PEERS))
        reference = rules.aggregate(parts, (1.0,) * MEMBERS, rule, center)
        theta = theta + reference.reshape(theta.shape)
    return 100 * float(np.mean([np.mean((x @ theta).argmax(axis=1) == y) for x, y in tests]))


def _data(draw: np.random.Generator, centers: Matrix, favourite: int) -> Data:
    labels = np.where(draw.random(SAMPLES) < 0.3, favourite, draw.integers(0, CLASSES, SAMPLES))
    return (centers[labels] + draw.normal(size=(SAMPLES, FEATURES))).astype(np.float32), labels


def _delta(theta: Matrix, data: Data) -> Vector:
    """What a few steps of gradient descent make of the shared weights, less those."""
    x, labels = data
    now = theta
    for _ in range(LOCAL_STEPS):
        logits = x @ now
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        odds /= odds.sum(axis=1, keepdims=True)
        odds[np.arange(len(labels)), labels] -= 1
        now = now - RATE * (x.T @ odds) / np.float32(len(labels))
    return np.asarray(now - theta, dtype=np.float32).reshape(-1)
