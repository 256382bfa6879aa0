"""Make one adapter of several: by their factors where they grew from one start, by their products where not.

An adapter adds s·BA to a layer. Adapters of one run started from the same A, so that averaging A and B
separately stays close to the average of BA. Of strangers only the sum of the products means
anything: it is cut to the wanted rank by its largest singular values.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from p2pasr.errors import LocalError

Matrix = npt.NDArray[np.float32]

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
NOTES: Final = "p2pasr.json"


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter folder, read.

    Attributes:
        factors: layer → (A, B), float32, shapes (rank, in) and (out, rank).
        scale: what BA is multiplied by.
        config: of peft.
        notes: what p2pasr wrote beside it; empty for an adapter from elsewhere.
    """

    folder: Path
    factors: dict[str, tuple[Matrix, Matrix]]
    scale: float
    config: dict[str, Any]
    notes: dict[str, Any]

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.config["r"])

    @property
    def seconds(self) -> float | None:
        """Seconds of audio that went into it; None where it does not say, or none did."""
        said = self.notes.get("seconds_merged")
        return float(said) if isinstance(said, int | float) and 0 < said < math.inf else None

    @property
    def base(self) -> str:
        """What peft calls the model that it adapts."""
        return str(self.config.get("base_model_name_or_path") or "one without a name")


@dataclass(frozen=True, slots=True)
class Merger:
    """What came of a merge.

    Attributes:
        factors: as of an adapter, with `rank` and `scale`.
        how: "factors" or "products".
        kept: smallest share of a layer's squared values that the rank keeps; 1 for factors.
        warnings: sentences about what does not fit together.
    """

    factors: dict[str, tuple[Matrix, Matrix]]
    rank: int
    scale: float
    how: str
    kept: float
    warnings: tuple[str, ...]


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder that peft wrote.

    Raises:
        LocalError: it is none, or of another kind than LoRA without a bias.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        path = folder / NOTES
        notes = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        scale = float(config["lora_alpha"]) / (int(config["r"]) ** (0.5 if config.get("use_rslora") else 1.0))
    except OSError as error:
        raise LocalError(f"{folder} is no adapter folder ({error.filename} cannot be read)") from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise LocalError(f"{folder} is no adapter folder of LoRA ({error})") from error
    layers = sorted({name.rpartition(".lora_")[0] for name in tensors})
    try:
        pairs = {layer: (tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]) for layer in layers}
    except KeyError as error:
        raise LocalError(f"{folder} holds more than the factors of LoRA (there is no {error})") from error
    factors = {layer: (a.astype(np.float32), b.astype(np.float32)) for layer, (a, b) in pairs.items()}
    return Adapter(folder, factors, scale, config, notes)


def seconds_of(adapters: Sequence[Adapter]) -> list[float] | None:
    """The seconds of audio that went into each adapter; None unless all say theirs."""
    seconds = [adapter.seconds for adapter in adapters if adapter.seconds is not None]
    return seconds if len(seconds) == len(adapters) else None


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    by_layer: Mapping[str, Sequence[float]] | None = None,
    rank: int | None = None,
) -> Merger:
    """One adapter of several.

    Args:
        weights: one an adapter; they are divided by their sum.
        by_layer: pattern such as `*encoder*` → weights for layers of that name; the first that fits counts.
        rank: of the result, where products are merged; the largest of the adapters' if None.

    Raises:
        LocalError: the adapters' layers do not fit each other, or weights are no weights.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if {k: (a.shape[1], b.shape[0]) for k, (a, b) in other.factors.items()} != {
            k: (a.shape[1], b.shape[0]) for k, (a, b) in first.factors.items()
        }:
            raise LocalError(f"{other.folder} adapts other layers than {first.folder}; both must be of one base model")
    shares = {layer: _shares(layer, weights, by_layer or {}, len(adapters)) for layer in first.factors}
    related = _grew_together(adapters) and rank in (None, first.rank)
    out: dict[str, tuple[Matrix, Matrix]] = {}
    kept = 1.0
    wanted = first.rank if related else (rank or max(adapter.rank for adapter in adapters))
    for layer, share in shares.items():
        pairs = [adapter.factors[layer] for adapter in adapters]
        if related:
            out[layer] = (_mean([a for a, _ in pairs], share), _mean([b for _, b in pairs], share))
        else:
            scaled = [part * adapter.scale for part, adapter in zip(share, adapters, strict=True)]
            a, b, energy = cut(pairs, scaled, wanted)
            out[layer] = (a, b)
            kept = min(kept, energy)
    return Merger(
        out, wanted, first.scale if related else 1.0, "factors" if related else "products", kept, _doubts(adapters)
    )


def cut(pairs: Sequence[tuple[Matrix, Matrix]], weights: Sequence[float], rank: int) -> tuple[Matrix, Matrix, float]:
    """The matrices A and B of a rank whose product is closest to Σ weight·BA.

    Args:
        pairs: (A, B) of each, as in an adapter.

    Returns:
        A, B and the share of the sum's squared values that the product keeps.
    """
    wide = np.concatenate([a.astype(np.float64) for a, _ in pairs])
    tall = np.concatenate([weight * b.astype(np.float64) for (_, b), weight in zip(pairs, weights, strict=True)], 1)
    left, upper = np.linalg.qr(tall)
    right, lower = np.linalg.qr(wide.T)
    u, values, v = np.linalg.svd(upper @ lower.T, full_matrices=False)
    root = np.sqrt(values[:rank])
    a, b = root[:, None] * (v[:rank] @ right.T), (left @ u[:, :rank]) * root
    missing = rank - len(root)
    if missing > 0:
        a, b = np.pad(a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing)))
    total = float(np.sum(values**2))
    kept = float(np.sum(values[:rank] ** 2)) / total if total else 1.0
    return a.astype(np.float32), b.astype(np.float32), kept


def write_adapter(out: Path, adapters: Sequence[Adapter], merger: Merger, weights: Sequence[float]) -> None:
    """Write what came of a merge as an adapter folder that peft loads."""
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Matrix] = {}
    for layer, (a, b) in merger.factors.items():
        tensors |= {
            f"{layer}.lora_A.weight": np.ascontiguousarray(a),
            f"{layer}.lora_B.weight": np.ascontiguousarray(b),
        }
    save_file(tensors, out / WEIGHTS)
    alpha = merger.scale * merger.rank
    config = {**adapters[0].config, "r": merger.rank, "lora_alpha": alpha, "use_rslora": False}
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    kept: dict[str, Any] = {name: adapters[0].notes[name] for name in SHARED_NOTES if name in adapters[0].notes}
    sources = [
        {"folder": adapter.folder.name, "weight": float(weight), **_origin(adapter)}
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    dialects = sorted({dialect for adapter in adapters for dialect in adapter.notes.get("dialects", [])})
    lora = {"rank": merger.rank, "alpha": alpha, "average": merger.how}
    notes = {**kept, "dialects": dialects, "lora": lora, "merged_from": sources}
    if (seconds := seconds_of(adapters)) is not None:
        notes["seconds_merged"] = round(sum(seconds), 1)
    (out / NOTES).write_text(json.dumps(notes, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


SHARED_NOTES: Final = ("base_model", "base_revision", "base_weights", "task", "window_seconds", "scored_after")
"""What adapters that fit together say alike."""


def _origin(adapter: Adapter) -> dict[str, Any]:
    return {name: adapter.notes.get(name) for name in ("run", "round", "state", "seconds_merged")}


def _shares(
    layer: str, weights: Sequence[float], by_layer: Mapping[str, Sequence[float]], count: int
) -> npt.NDArray[np.float64]:
    chosen = next((given for pattern, given in by_layer.items() if fnmatch.fnmatch(layer, pattern)), weights)
    found = np.asarray(chosen, dtype=np.float64)
    if found.shape != (count,) or not np.isfinite(found).all() or (found < 0).any() or found.sum() <= 0:
        raise LocalError(f"the weights {list(chosen)} are not {count} numbers of at least zero that are not all zero")
    shares: npt.NDArray[np.float64] = found / found.sum()
    return shares


def _mean(values: Sequence[Matrix], shares: Sequence[float] | npt.NDArray[np.float64]) -> Matrix:
    total = sum(share * value.astype(np.float64) for share, value in zip(shares, values, strict=True))
    return np.asarray(total, dtype=np.float32)


def _grew_together(adapters: Sequence[Adapter]) -> bool:
    """Whether all are of one run, or have the same A in every layer."""
    first = adapters[0]
    if any((adapter.rank, adapter.scale) != (first.rank, first.scale) for adapter in adapters):
        return False
    runs = {adapter.notes.get("run") for adapter in adapters}
    if len(runs) == 1 and None not in runs:
        return True
    return all(
        np.array_equal(adapter.factors[layer][0], a) for adapter in adapters for layer, (a, _) in first.factors.items()
    )


def _doubts(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """What a person should know before they trust the result."""
    found = []
    digests = {adapter.notes.get("base_weights") for adapter in adapters}
    names = sorted({adapter.base for adapter in adapters})
    if len(digests - {None}) > 1:
        found.append(
            "the adapters were trained on different base weights; what one learned may mean nothing to the other"
        )
    elif None in digests and len(names) > 1:
        found.append(
            f"the adapters name different base models ({', '.join(names)}); what one learned may mean nothing to the "
            f"other"
        )
    windows = sorted({float(a.notes["window_seconds"]) for a in adapters if "window_seconds" in a.notes})
    if len(windows) > 1:
        heard = ", ".join(f"{window:g} s" for window in windows)
        found.append(f"the adapters were trained at windows of {heard}; each is only good at its own")
    rounds = {(adapter.notes.get("run"), adapter.notes.get("round")) for adapter in adapters}
    runs = {run for run, _ in rounds}
    if len(runs) == 1 and None not in runs and len(rounds) > 1:
        found.append(
            "the adapters are of different rounds of one run; the later ones hold what the earlier ones learned"
        )
    return tuple(found)
