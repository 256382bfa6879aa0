"""The right adapter for a clip: an accent model listens first, and one of several adapters transcribes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from p2pasr.errors import LocalError
from p2pasr.speech.audio import SAMPLE_RATE, ClipLimits, RefusedClip, read_clip
from p2pasr.speech.mel import log_mel
from p2pasr.speech.metrics import error_rates
from p2pasr.speech.pretrained import Frontend, frontend, load, weights_digest
from p2pasr.speech.shards import Clip, Features
from p2pasr.speech.text import label_ids, language_token
from p2pasr.tasks.base import OnProgress
from p2pasr.tasks.features import SCORING_BATCH, FeaturesModel, load_features
from p2pasr.tasks.whisper import FRAMES_A_SECOND, NOTES, matching_shard, shorten, transcribe

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT folder that `p2pasr export` wrote.

    Attributes:
        dialects: those of the run that it was trained in.
        base: what every adapter of a folder must share: model, revision, digest of its weights, window in seconds.
    """

    folder: Path
    dialects: tuple[str, ...]
    base: tuple[str, str | None, str | None, float]


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided about a clip: the dialect, how likely it is, and the adapter for it."""

    dialect: str
    probability: float
    adapter: Adapter


def read_adapters(folder: Path) -> tuple[Adapter, ...]:
    """The adapters in the folders of a folder, by name, ascending.

    Raises:
        LocalError: there are none, one is damaged, two are for the same dialect, or they are not of one base.
    """
    adapters = tuple(
        _read_adapter(inner)
        for inner in sorted(folder.iterdir() if folder.is_dir() else ())
        if (inner / "adapter_config.json").is_file()
    )
    if not adapters:
        raise LocalError(f"{folder} holds no folders with adapters; write some into it with p2pasr export")
    owner: dict[str, Adapter] = {}
    for adapter in adapters:
        if adapter.base != adapters[0].base:
            raise LocalError(
                f"{adapter.folder} and {adapters[0].folder} are not adapters of one base and window; keep them apart"
            )
        for dialect in adapter.dialects:
            other = owner.setdefault(dialect, adapter)
            if other is not adapter:
                raise LocalError(f"{adapter.folder} and {other.folder} are both for {dialect}; remove one")
    return adapters


def choose(probabilities: Mapping[str, float], adapters: Sequence[Adapter]) -> Choice:
    """The likeliest dialect that there is an adapter for, and that adapter.

    Args:
        probabilities: dialect → how likely it is spoken; of equally likely ones the first is taken.

    Raises:
        LocalError: there is no adapter for any of the dialects.
    """
    for dialect, probability in sorted(probabilities.items(), key=lambda item: (-item[1], item[0])):
        for adapter in adapters:
            if dialect in adapter.dialects:
                return Choice(dialect, probability, adapter)
    raise LocalError(f"none of the adapters is for a dialect that the accent model knows ({', '.join(probabilities)})")


class Router:
    """An accent model before adapters on one base.

    Args:
        accent: a folder that `p2pasr export` wrote of a `features` run with the head `accent`.
        adapters: a folder of folders that it wrote of `lora` runs.
        device: where to compute.
        model: a folder to load the base from instead of the one that the adapters name.

    Raises:
        LocalError: a folder does not hold that, they are for different features, or the base is another one.
    """

    def __init__(self, accent: Path, adapters: Path, device: str = "cpu", model: str | None = None) -> None:
        self.adapters = read_adapters(adapters)
        base, revision, digest, window = self.adapters[0].base
        self._base, self._revision, self._window = model or base, revision, window
        self._frames = round(window * FRAMES_A_SECOND)
        self.frontend: Frontend = frontend(self._base, revision, window)
        self.accent: FeaturesModel = load_features(accent, device, model)
        self.device = device
        mels = int(self.frontend.extractor.feature_size)
        self.features = Features(mels, self.frontend.window_seconds, self.frontend.vocabulary)
        if self.accent.features != self.features:
            raise LocalError(f"{accent} and the adapters in {adapters} were made for different features")
        if digest is not None and weights_digest(self._base, revision) != digest:
            raise LocalError(
                f"the weights of {self._base!r} are not those that the adapters in {adapters} were made for"
            )
        self._speaking: PeftModel | None = None

    def clip(self, recording: Path) -> Clip:
        """A recording as what the models hear; its tokens hold no text.

        Raises:
            LocalError: it cannot be read or heard, or is longer than the window.
        """
        try:
            audio = read_clip(recording, ClipLimits(self.features.window_seconds))
        except RefusedClip as error:
            raise LocalError(f"{recording} cannot be transcribed: {error}") from error
        tokens = label_ids(self.frontend.tokenizer, "", self.adapters[0].dialects[0])
        return Clip(log_mel(audio, self.frontend.extractor), tuple(tokens), len(audio) / SAMPLE_RATE)

    def route(self, clips: Sequence[Clip]) -> list[Choice]:
        """Choose an adapter for each clip."""
        batches = (clips[start : start + SCORING_BATCH] for start in range(0, len(clips), SCORING_BATCH))
        heard = [shares for batch in batches for shares in self.accent.dialect_probabilities(batch)]
        return [choose(shares, self.adapters) for shares in heard]

    def transcribe(self, clips: Sequence[Clip], choices: Sequence[Choice | None]) -> list[str]:
        """Greedy transcripts, each by the adapter chosen for it; by the base and in the clip's own language if None."""
        model, texts = self._model(), [""] * len(clips)
        members: dict[int | None, list[int]] = {}
        for index, choice in enumerate(choices):
            members.setdefault(None if choice is None else self.adapters.index(choice.adapter), []).append(index)
        for place, indices in members.items():
            asked = [self._in_language(clips[index], choices[index]) for index in indices]
            if place is not None:
                model.set_adapter(str(place))
            with model.disable_adapter() if place is None else nullcontext():
                heard = transcribe(model.base_model.model, self.frontend.tokenizer, asked, self._frames)
            for index, text in zip(indices, heard, strict=True):
                texts[index] = text
        return texts

    def evaluate(self, shards: Sequence[Path], on_progress: OnProgress | None = None) -> dict[str, dict[str, Any]]:
        """Error rates with no adapter, with the adapters that are chosen, and with those of the true dialects.

        Raises:
            LocalError: a shard's dialect has no adapter, or it was prepared for other features.
        """
        opened = [matching_shard(path, self.features, self._base, self._window) for path in shards]
        spoken = [shard.dialect for shard in opened for _ in shard.clips]
        clips = [clip for shard in opened for clip in shard.clips]
        oracle = [choose({dialect: 1.0}, self.adapters) for dialect in spoken]
        routed = self.route(clips)
        right = sum(one.adapter == two.adapter for one, two in zip(routed, oracle, strict=True)) / len(clips)
        ways: dict[str, tuple[Sequence[Choice | None], float | None]] = {
            "no adapter": ([None] * len(clips), None),
            "routed": (routed, right),
            "oracle": (oracle, 1.0),
        }
        decode = self.frontend.tokenizer.decode
        wanted = [decode(clip.tokens, skip_special_tokens=True) for clip in clips]
        out = {}
        for done, (way, (choices, share)) in enumerate(ways.items(), start=1):
            out[way] = {"accuracy": share, **error_rates(wanted, self.transcribe(clips, choices)).as_dict()}
            if on_progress is not None:
                on_progress(done, len(ways))
        return out

    def _in_language(self, clip: Clip, choice: Choice | None) -> Clip:
        """A clip that will be transcribed in the language of the dialect that was chosen."""
        if choice is None:
            return clip
        tokenizer = self.frontend.tokenizer
        language = int(tokenizer.convert_tokens_to_ids(language_token(tokenizer, choice.dialect)))
        return Clip(clip.mel, (clip.tokens[0], language, *clip.tokens[2:]), clip.seconds, clip.speaker)

    def _model(self) -> Any:
        """The base with all adapters, loaded when it is first needed; each is named by its place, for peft.

        A folder's name may hold what a module's may not, such as a dot.
        """
        if self._speaking is None:
            from peft import PeftModel
            from transformers import WhisperForConditionalGeneration

            base = load(WhisperForConditionalGeneration, self._base, self._revision, dtype=torch.float32)
            shorten(base, self._frames)
            first, *others = (str(adapter.folder) for adapter in self.adapters)
            self._speaking = PeftModel.from_pretrained(base.to(self.device), first, adapter_name="0")
            for place, folder in enumerate(others, start=1):
                self._speaking.load_adapter(folder, adapter_name=str(place))
        return self._speaking


def _read_adapter(folder: Path) -> Adapter:
    try:
        notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
        base = str(notes["base_model"]), notes["base_revision"], notes["base_weights"], float(notes["window_seconds"])
        dialects = tuple(map(str, notes["dialects"]))
        if not dialects:
            raise ValueError("it names no dialect")
        return Adapter(folder, dialects, base)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LocalError(f"{folder / NOTES} does not say what the adapter is for; export it again") from error
