"""Small models around a recogniser: one encoder of log-mels with one or more heads that each decide something."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from p2pasr.errors import LocalError
from p2pasr.protocol.encoding import digest
from p2pasr.protocol.tensors import Tensors
from p2pasr.speech.phonemes import LONGEST_WORD, readings
from p2pasr.speech.pretrained import Frontend, file_digest, frontend, weight_file
from p2pasr.speech.shards import Clip, Features, Shard, read_shard, silence
from p2pasr.speech.text import normalise
from p2pasr.tasks.base import OnProgress
from p2pasr.tasks.conv_transformer import EncoderConfig, SpeechEncoder, States
from p2pasr.tasks.corruption import continuing_ids
from p2pasr.tasks.determinism import reproducible, usable_device
from p2pasr.tasks.heads import (
    NOBODY,
    UNKNOWN,
    AccentHead,
    ConfidenceHead,
    Example,
    Head,
    MaskedHead,
    Sound,
    SpeakerHead,
    VadHead,
    View,
    framed,
    mel_of,
    text_tokens,
)
from p2pasr.tasks.text_heads import CorrectionHead, Guess, PhonemeHead
from p2pasr.tasks.training import GradientTask, TrainingConfig, fresh_params, trainable
from p2pasr.tasks.whisper import matching_shard, write_notes

HeadName = Literal["accent", "speaker", "vad", "confidence", "masked", "correction", "phoneme"]

Word = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_WORD)]
"""An entry of a lexicon, or a phoneme's name."""

Dialect = Annotated[str, StringConstraints(min_length=1, max_length=64)]

WEIGHTS, SETTINGS, PROGRAM = "model.safetensors", "config.json", "model.pt2"

ENCODER = "encoder."
"""What the names of the encoder's parameters begin with."""

SCORING_BATCH = 16


class FeaturesTaskConfig(TrainingConfig):
    """The `task.config` section of a manifest whose task is `features`."""

    model: str
    """Hub id or local folder of the Whisper model that the shards were prepared for; its weights are not needed."""
    revision: str | None = None
    """Commit of the hub repository."""
    window_seconds: Annotated[float, Field(gt=0, le=30)] | None = None
    """As the shards were prepared, if shorter than the model's own."""

    heads: Annotated[tuple[HeadName, ...], Field(min_length=1, strict=False)]
    """What is learned, all on one encoder."""
    head_weights: dict[HeadName, Annotated[float, Field(gt=0, le=1000)]] = Field(default_factory=dict)
    """What a head's loss counts; 1 for those that are not named."""
    encoder: EncoderConfig = EncoderConfig()
    """Sizes of the encoder, whose blocks read text too where a head does."""
    pretrained: str | None = None
    """Hub id or local folder of an export of this kind of task whose encoder training starts from, such as one that
    learned `masked`; drawn from the run's seed if null."""
    pretrained_revision: str | None = None
    """Commit of that hub repository."""
    pretrained_weights: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    """BLAKE3 of that export's weights, filled in by `p2pasr run new`."""

    dialects: Annotated[tuple[Dialect, ...], Field(strict=False)] = ()
    """Classes of `accent`, and what `phoneme` knows; filled in from the run's shards by `p2pasr run new`."""
    speakers: Annotated[
        tuple[Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")], ...],
        Field(max_length=100_000, strict=False),
    ] = ()
    """Classes that `speaker` learns from, as hashes; filled in likewise."""
    embedding: Annotated[int, Field(ge=2, le=1024)] = 128
    """Size of a speaker's embedding."""
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the frames that `masked` hides."""
    mask_span: Annotated[int, Field(ge=1, le=3000)] = 20
    """Frames of 10 ms that are hidden together."""
    mask_loss: Literal["l1", "l2"] = "l1"
    """How far from the hidden frames a guess lies."""
    text_layers: Annotated[int, Field(ge=1, le=24)] = 2
    """Blocks of `confidence` and of `correction` that read a transcript."""
    lexicon: Annotated[tuple[Word, ...], Field(max_length=100_000, strict=False)] = ()
    """Words that `correction` would rather see in a transcript."""
    lexicon_bonus: Annotated[float, Field(ge=0, le=100)] = 0.5
    """What each of them counts, in nats a token."""
    pronunciations: dict[
        Dialect, dict[Word, Annotated[tuple[Word, ...], Field(min_length=1, max_length=LONGEST_WORD, strict=False)]]
    ] = Field(default_factory=dict)
    """For `phoneme`, dialect → character or word → phonemes; filled in for Mandarin and Cantonese, without the tones
    that a character has in certain words."""

    @field_validator("heads")
    @classmethod
    def _once(cls, heads: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(heads)) < len(heads):
            raise ValueError(f"a head is named twice in {', '.join(heads)}")
        return heads

    @model_validator(mode="after")
    def _pretrained_is_named(self) -> FeaturesTaskConfig:
        if self.pretrained is None and self.pretrained_weights is not None:
            raise ValueError("pretrained_weights is the digest of pretrained, which is not given")
        return self


class FeaturesModel(nn.Module):
    """An encoder, if a head needs it, and the heads.

    Args:
        config: pinned.
        front: what the shards were prepared with.

    Attributes:
        features: what clips must have been prepared for.
    """

    def __init__(self, config: FeaturesTaskConfig, front: Frontend) -> None:
        super().__init__()
        sizes, n_mels = config.encoder, int(front.extractor.feature_size)
        self.features = Features(n_mels, front.window_seconds, front.vocabulary)
        vocabulary = int(front.config.vocab_size)
        make: dict[str, Callable[[], Head]] = {
            "accent": lambda: AccentHead(sizes, config.dialects),
            "speaker": lambda: SpeakerHead(sizes, len(config.speakers), config.embedding),
            "vad": lambda: VadHead(sizes),
            "confidence": lambda: ConfidenceHead(
                sizes, vocabulary, config.text_layers, continuing_ids(front.tokenizer)
            ),
            "masked": lambda: MaskedHead(sizes, n_mels, config.mask_share, config.mask_span, config.mask_loss),
            "correction": lambda: CorrectionHead(
                sizes, vocabulary, config.text_layers, front.tokenizer, config.lexicon, config.lexicon_bonus
            ),
            "phoneme": lambda: PhonemeHead(sizes, config.pronunciations, config.dialects, front.tokenizer),
        }
        heads: dict[str, Head] = {name: make[name]() for name in config.heads}
        self.heads = nn.ModuleDict(heads)
        if any(head.hears for head in heads.values()):
            self.encoder = SpeechEncoder(n_mels, sizes)

    def hear(self, sound: Sound) -> States:
        """The encoder's states of some clips."""
        there = sound.to(next(self.parameters()).device)
        states: States = self.encoder(there.mels, there.frames)
        return states

    def views(self, examples: Sequence[Example]) -> Iterator[tuple[str, Any, States | None, View]]:
        """Each head with what is heard of its view of a batch, and that view; unchanged clips are heard once."""
        unchanged: States | None = None
        heads: Mapping[str, Any] = dict(self.heads.items())
        for name, head in heads.items():
            view = head.view(examples)
            if not head.hears:
                yield name, head, None, view
            elif view.sound is not None:
                yield name, head, self.hear(view.sound), view
            else:
                unchanged = unchanged or self.hear(sound_of([example.clip for example in examples]))
                yield name, head, unchanged, view

    @torch.inference_mode()
    def dialect_probabilities(self, clips: Sequence[Clip]) -> list[dict[str, float]]:
        """For each clip, dialect → how likely it is spoken.

        Raises:
            LocalError: the model has no head `accent`.
        """
        head = self._head("accent")
        shares = head.decide(self.hear(sound_of(clips))).softmax(1).tolist()
        return [dict(zip(head.dialects, row, strict=True)) for row in shares]

    @torch.inference_mode()
    def speaker_embeddings(self, clips: Sequence[Clip]) -> Tensor:
        """Unit vectors, float32, (clips, size).

        Raises:
            LocalError: the model has no head `speaker`.
        """
        embeddings: Tensor = self._head("speaker").decide(self.hear(sound_of(clips)))
        return embeddings

    @torch.inference_mode()
    def confidences(self, clips: Sequence[Clip], texts: Sequence[Sequence[int]]) -> list[float]:
        """How likely each transcript is right.

        Args:
            texts: token ids of what a recogniser wrote for each clip, without special tokens.

        Raises:
            LocalError: the model has no head `confidence`.
        """
        head = self._head("confidence")
        tokens = [framed(clip, text) for clip, text in zip(clips, texts, strict=True)]
        return torch.sigmoid(head.sureness(self.hear(sound_of(clips)), tokens)).tolist()

    def rescore(self, clip: Clip, guesses: Sequence[Guess]) -> list[float]:
        """How good each of a recogniser's guesses is; see :meth:`p2pasr.tasks.text_heads.CorrectionHead.rescore`.

        Raises:
            LocalError: the model has no head `correction`.
        """
        scores: list[float] = self._head("correction").rescore(clip, guesses)
        return scores

    @torch.inference_mode()
    def phonemes(self, clips: Sequence[Clip]) -> list[list[str]]:
        """What is pronounced in each clip.

        Raises:
            LocalError: the model has no head `phoneme`.
        """
        found: list[list[str]] = self._head("phoneme").recognise(self.hear(sound_of(clips)))
        return found

    @torch.inference_mode()
    def activity(self, clips: Sequence[Clip]) -> list[Tensor]:
        """How likely there is speech, and noise, in each step of 40 ms: for each clip float32, (positions, 2).

        Raises:
            LocalError: the model has no head `vad`.
        """
        heard = self.hear(sound_of(clips))
        shares = torch.sigmoid(self._head("vad").decide(heard))
        return [row[real] for row, real in zip(shares, heard.real, strict=True)]

    def _head(self, name: str) -> Any:
        if name not in self.heads:
            raise LocalError(f"the model has no head {name!r}, only {', '.join(self.heads)}")
        return self.heads[name]


class Listener(nn.Module):
    """The heads of a model that read nothing, as one function of sounds."""

    def __init__(self, model: FeaturesModel) -> None:
        super().__init__()
        heads: Mapping[str, Any] = dict(model.heads.items())
        self.encoder = model.encoder
        self.heads = nn.ModuleDict({name: head for name, head in heads.items() if not head.reads})

    def forward(self, mels: Tensor, frames: Tensor) -> dict[str, Tensor]:
        """Head → what it decides."""
        heard = self.encoder(mels, frames)
        heads: Mapping[str, Any] = dict(self.heads.items())
        return {name: head.decide(heard) for name, head in heads.items()}


class FeaturesTask(GradientTask[Example]):
    """Heads on one encoder; implements :class:`p2pasr.tasks.base.Task` and :class:`p2pasr.tasks.base.Bounded`.

    Args:
        config: the task's section of the manifest.
        seed: the run's seed.
        device: where to train, such as "cpu" or "cuda".
        model: a folder to load the recogniser's tokenizer and extractor from instead of `config.model`.

    Raises:
        LocalError: the device or the model's files are missing, a head has no classes, or the pretrained encoder is
            missing, another one or of other sizes.
    """

    config: FeaturesTaskConfig
    draws = True

    def __init__(self, config: FeaturesTaskConfig, seed: int, device: str = "cpu", model: str | None = None) -> None:
        _check_classes(config)
        self.config = config
        self.seed = seed
        self.device = usable_device(device)
        front = frontend(model or config.model, config.revision, config.window_seconds)
        self.model = FeaturesModel(config, front).to(self.device)
        self.features = self.model.features
        self.trained = trainable(self.model)
        self._heard = {} if config.pretrained is None else _read_encoder(config, self.trained)
        self._dialects = {dialect: index for index, dialect in enumerate(config.dialects)}
        self._speakers = {bytes.fromhex(speaker): index for index, speaker in enumerate(config.speakers)}

    @staticmethod
    def pin(config: FeaturesTaskConfig, model: str | None, shards: Sequence[Path]) -> FeaturesTaskConfig:
        """Fill in what the manifest must fix: the classes of heads, as the run's shards have them, and digests."""
        found: dict[str, Any] = {}
        if config.pretrained is not None:
            _check_form(config)
            found["pretrained_weights"] = file_digest(_exported(config, WEIGHTS))
        opened = [read_shard(path) for path in shards]
        if {"accent", "phoneme"} & set(config.heads) and not config.dialects:
            found["dialects"] = tuple(sorted({shard.dialect for shard in opened}))
        if "speaker" in config.heads and not config.speakers:
            speakers = {clip.speaker for shard in opened for clip in shard.clips} - {NOBODY}
            found["speakers"] = tuple(speaker.hex() for speaker in sorted(speakers))
        if "phoneme" in config.heads:
            tokenizer = frontend(model or config.model, config.revision).tokenizer
            found["pronunciations"] = {**_pronunciations(opened, tokenizer, config.pronunciations)}
        pinned = config.model_copy(update=found)
        _check_classes(pinned)
        return pinned

    def check(self, shards: Sequence[Path]) -> None:
        """Were these shards made for the model's features, and is their dialect a class?

        Raises:
            LocalError: one was not, or is no shard.
        """
        for example in self.examples(shards):
            if "accent" in self.config.heads and example.dialect == UNKNOWN:
                known = ", ".join(self.config.dialects)
                raise LocalError(f"a shard holds a dialect that task.config.dialects does not name; it names {known}")

    def initial_params(self) -> Tensors:
        """Drawn from the run's seed, the encoder's from the pretrained one if there is one."""
        drawn = fresh_params(self.trained, digest("features", self.seed.to_bytes(8, "big")))
        return {**drawn, **{name: value.copy() for name, value in self._heard.items()}}

    def examples(self, shards: Sequence[Path]) -> list[Example]:
        """See :meth:`p2pasr.tasks.training.GradientTask.examples`."""
        opened = [matching_shard(path, self.features, self.config.model, self.config.window_seconds) for path in shards]
        return [
            Example(clip, self._dialects.get(shard.dialect, UNKNOWN), self._speakers.get(clip.speaker, UNKNOWN))
            for shard in opened
            for clip in shard.clips
        ]

    def example_of(self, seconds: float) -> Example:
        """See :meth:`p2pasr.tasks.training.GradientTask.example_of`."""
        return Example(silence(seconds, self.features.n_mels))

    def weight(self, example: Example) -> float:  # noqa: ARG002 (all count alike)
        """One."""
        return 1.0

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """Weighted sum of the heads' losses."""
        weights = self.config.head_weights
        return torch.stack(
            [
                weights.get(name, 1.0) * head.losses(heard, view.target).sum()
                for name, head, heard, view in self.model.views(examples)
            ]
        ).sum()

    def evaluate(
        self, params: Tensors | None, shards: Sequence[Path], on_progress: OnProgress | None = None
    ) -> Mapping[str, Any]:
        """Scores of each head, of the trained model or, with params None, of the untrained.

        Raises:
            LocalError: the shards are others than the model takes.
        """
        examples = self.examples(shards)
        self.set_params(self.initial_params() if params is None else params)
        self.model.eval()
        outcomes: dict[str, list[Any]] = {name: [] for name in self.config.heads}
        with reproducible(digest("features-scores", self.seed.to_bytes(8, "big")), self.device), torch.inference_mode():
            for start in range(0, len(examples), SCORING_BATCH):
                for name, head, heard, view in self.model.views(examples[start : start + SCORING_BATCH]):
                    outcomes[name] += head.outcomes(heard, view.target)
                if on_progress is not None:
                    on_progress(min(start + SCORING_BATCH, len(examples)), len(examples))
            return {name: self.model.heads[name].scores(outcomes[name]) for name in self.config.heads}

    def export(self, params: Tensors, out: Path, about: Mapping[str, Any]) -> None:
        """Write a folder for :func:`load_features`: weights by their names in the module, and its configuration.

        Heads that read no text are in `model.pt2` besides, which torch.export.load opens without this package: a
        function of log-mels, float32, (batch, n_mels, frames), padded with zeros, and of the clips' true lengths,
        int64, (batch,), to head → what its `decide` returns.
        """
        self.set_params(params)
        save_file({name: p.detach().cpu().contiguous() for name, p in self.trained.items()}, out / WEIGHTS)
        (out / SETTINGS).write_text(self.config.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if program := _listening_program(self.model):
            torch.export.save(program, out / PROGRAM)
        notes = {"base_model": self.config.model, "task": "features", "heads": list(self.config.heads)}
        write_notes(out, {**about, **notes, "window_seconds": self.features.window_seconds})


def load_features(folder: Path, device: str = "cpu", model: str | None = None) -> FeaturesModel:
    """Open a model that `p2pasr export` wrote, ready to decide.

    Args:
        model: a folder to load the recogniser's tokenizer and extractor from instead of the one that is named.

    Raises:
        LocalError: the folder holds none, or the recogniser is missing.
    """
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        config = FeaturesTaskConfig.model_validate(settings)
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, ValidationError) as error:
        raise LocalError(f"{folder} holds no model of the task features; write one with p2pasr export") from error
    loaded = FeaturesModel(config, frontend(model or config.model, config.revision, config.window_seconds))
    try:
        loaded.load_state_dict(weights)
    except RuntimeError as error:
        raise LocalError(f"the weights in {folder} do not fit its {SETTINGS}; export the model again") from error
    return loaded.to(usable_device(device)).eval()


def _exported(config: FeaturesTaskConfig, name: str) -> Path:
    """A file of the export that training starts from."""
    path = weight_file(str(config.pretrained), name, config.pretrained_revision)
    if path is None:
        raise LocalError(f"task.config.pretrained: {config.pretrained!r} has no {name}; name an export of such a task")
    return path


def _check_form(config: FeaturesTaskConfig) -> None:
    """Compare what no shape tells, such as the number of attention heads."""
    try:
        settings = json.loads(_exported(config, SETTINGS).read_text(encoding="utf-8"))
        form = FeaturesTaskConfig.model_validate(settings).encoder
    except (OSError, ValueError) as error:
        raise LocalError(
            f"task.config.pretrained: {config.pretrained!r} is an export of no task of kind features"
        ) from error
    if form.model_copy(update={"dropout": config.encoder.dropout}) != config.encoder:
        sizes = ", ".join(f"{name}: {size}" for name, size in form.model_dump(exclude={"dropout"}).items())
        raise LocalError(
            f"the encoder in {config.pretrained!r} has another form than task.config.encoder; give that {sizes}"
        )


def _read_encoder(config: FeaturesTaskConfig, trained: Mapping[str, nn.Parameter]) -> Tensors:
    """The exported encoder's parameters, if their names, shapes and dtypes are those of the run's."""
    named = {name: p for name, p in trained.items() if name.startswith(ENCODER)}
    if not named:
        raise LocalError(f"task.config.pretrained names an encoder, and none of {', '.join(config.heads)} hears")
    if next(iter(named.values())).is_meta:
        return {}
    path = _exported(config, WEIGHTS)
    if config.pretrained_weights is not None and file_digest(path) != config.pretrained_weights:
        raise LocalError(f"the encoder in {config.pretrained!r} is not what this run was made with; get that version")
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys() if name.startswith(ENCODER)}  # noqa: SIM118
            forms = {name: (tuple(found.get_shape()), found.get_dtype()) for name, found in slices.items()}
            if forms != {name: (tuple(p.shape), "F32") for name, p in named.items()}:
                raise LocalError(
                    f"the encoder in {config.pretrained!r} has other sizes than the run's; they come from "
                    "task.config.encoder and the mel bands of task.config.model"
                )
            return {name: file.get_tensor(name) for name in named}
    except (SafetensorError, TypeError) as error:
        raise LocalError(f"{path} is damaged ({error}); get it again") from error


def _listening_program(model: FeaturesModel) -> torch.export.ExportedProgram | None:
    """:class:`Listener` for any number of clips of any length, or None if all heads read."""
    heads: Mapping[str, Any] = dict(model.heads.items())
    if all(head.reads for head in heads.values()):
        return None
    listener = Listener(model).eval()
    device = next(model.parameters()).device
    example = torch.zeros(2, model.features.n_mels, 100, device=device), torch.tensor([100, 50], device=device)
    free = torch.export.Dim.AUTO
    with torch.no_grad():
        return torch.export.export(listener, example, dynamic_shapes=({0: free, 2: free}, {0: free}))


def sound_of(clips: Sequence[Clip]) -> Sound:
    """Clips as they are, padded to one batch."""
    return Sound.of([mel_of(clip) for clip in clips])


def _pronunciations(
    shards: Sequence[Shard], tokenizer: Any, known: Mapping[str, Mapping[str, tuple[str, ...]]]
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Those that are known, and readings of all characters of other dialects' transcripts."""
    characters: dict[str, set[str]] = {}
    for shard in shards:
        texts = (tokenizer.decode(text_tokens(clip)) for clip in shard.clips)
        characters.setdefault(shard.dialect, set()).update(*map(normalise, texts))
    read = {dialect: readings(dialect, found) for dialect, found in sorted(characters.items()) if dialect not in known}
    return {dialect: dict(words) for dialect, words in known.items()} | read


def _check_classes(config: FeaturesTaskConfig) -> None:
    for head, key, least in (("accent", "dialects", 2), ("speaker", "speakers", 2), ("phoneme", "pronunciations", 1)):
        if head in config.heads and len(getattr(config, key)) < least:
            raise LocalError(f"the head {head} needs at least {least} {key}; the run's shards do not hold that many")


CONFIG = FeaturesTaskConfig
TASK = FeaturesTask
