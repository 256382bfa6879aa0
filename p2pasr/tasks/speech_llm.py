"""A language model that hears: a frozen Whisper encoder, a projector to the width of its embeddings, adapters in it.

After SLAM-ASR (Ma et al. 2024): what the encoder makes of a clip stands in front of a prompt, like further tokens, and
the language model writes the transcript behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, StringConstraints, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, pad
from torch.nn.utils.rnn import pad_sequence

from p2pasr.errors import LocalError
from p2pasr.protocol.encoding import digest
from p2pasr.protocol.tensors import Tensors
from p2pasr.speech.pretrained import file_digest, load, vocabulary_digest, weight_file, weights_digest
from p2pasr.speech.shards import Clip
from p2pasr.tasks.base import OnProgress
from p2pasr.tasks.lora import AdapterSettings, AdapterTask, adapters_of, initial_adapters, storage, with_adapters
from p2pasr.tasks.training import fresh_params
from p2pasr.tasks.whisper import IGNORED, WhisperTask, load_whisper, padded, shorten, write_notes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROJECTOR, ADAPTER = "projector.safetensors", "adapter"
"""A file and a folder of an export."""

DECODED_AT_ONCE = 16

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class SpeechLlmConfig(AdapterSettings):
    """The `task.config` section of a manifest whose task is `llm`; `model` is the Whisper whose encoder hears.

    `rank`, `alpha`, `dropout` and `targets` are of the adapters; `quantise` and `gradient_checkpointing` are of the
    language model.
    """

    language_model: str
    """Hub id or local folder of a causal language model, such as `Qwen/Qwen2.5-0.5B-Instruct`."""
    language_model_revision: str | None = None
    """Commit of the hub repository."""
    language_model_weights: Digest | None = None
    """BLAKE3 of its weights, filled in by `p2pasr run new`."""
    language_model_vocabulary: Digest | None = None
    """BLAKE3 of its tokenizer's vocabulary, filled in likewise."""
    stage: Literal["projector", "adapters"] = "projector"
    """`projector` trains the projector alone, `adapters` trains it and adapters in the language model."""
    projector: str | None = None
    """Hub id or local folder of an export whose projector training starts from; drawn from the run's seed if null."""
    projector_weights: Digest | None = None
    """BLAKE3 of that projector's file, filled in by `p2pasr run new`."""
    stack: Annotated[int, Field(ge=1, le=64)] = 8
    """States of the encoder, 20 ms each, that become one position of the language model."""
    projector_width: Annotated[int, Field(ge=8, le=16_384)] = 2048
    """Width of the projector's hidden layer."""
    prompt: Annotated[str, StringConstraints(max_length=1000)] = "\nTranscript: "
    """What stands between the sound and the transcript."""
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 256
    """The language model's tokens that a transcript has at most: longer ones are refused, and decoding ends there."""

    @model_validator(mode="after")
    def _projector_is_named(self) -> SpeechLlmConfig:
        if self.projector is None and self.projector_weights is not None:
            raise ValueError("projector_weights is the digest of projector, which is not given")
        return self


class Projector(nn.Module):
    """Two linear layers from stacked states of an encoder to embeddings of a language model.

    Args:
        heard, width, out: values of a state, of the hidden layer, of an embedding.
        stack: states that make one embedding.
    """

    def __init__(self, heard: int, width: int, out: int, stack: int) -> None:
        super().__init__()
        self.stack = stack
        self.first = nn.Linear(stack * heard, width)
        self.second = nn.Linear(width, out)

    def forward(self, states: Tensor) -> Tensor:
        """(batch, positions, heard) → (batch, ⌈positions / stack⌉, out); zeros fill the last stack."""
        batch, positions, heard = states.shape
        full = pad(states, (0, 0, 0, -positions % self.stack))
        embeddings: Tensor = self.second(gelu(self.first(full.reshape(batch, -1, self.stack * heard))))
        return embeddings


class SpeechLlm(nn.Module):
    """The parts of a language model that hears; the encoder never drops out, for it is not trained."""

    def __init__(self, encoder: nn.Module, projector: Projector, language_model: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.language_model = language_model

    def train(self, mode: bool = True) -> SpeechLlm:
        """See :meth:`torch.nn.Module.train`."""
        super().train(mode)
        self.encoder.eval()
        return self

    def hear(self, features: Tensor, frames: Sequence[int]) -> list[Tensor]:
        """Embeddings of each clip at its true length.

        Args:
            features: float32, (batch, n_mels, window).
            frames: the true length of each, at least 1.

        Returns:
            (⌈frames / (2 · stack)⌉, width) each.
        """
        with torch.no_grad():
            states = self.encoder(features).last_hidden_state
        embeddings = self.projector(states)
        return [row[: -(-length // (2 * self.projector.stack))] for row, length in zip(embeddings, frames, strict=True)]

    def read(self, ids: Sequence[int]) -> Tensor:
        """Embeddings of tokens, (tokens, width)."""
        table = self.language_model.get_input_embeddings()
        embeddings: Tensor = table(torch.tensor(list(ids), dtype=torch.int64, device=table.weight.device))
        return embeddings


class SpeechLlmTask(AdapterTask):
    """A language model that learns to hear; implements :class:`p2pasr.tasks.base.Task` and its `Bounded`.

    Raises:
        LocalError: as :class:`p2pasr.tasks.whisper.WhisperTask`; or the language model or the projector is missing or
            another one, they do not fit each other, or a target matches no layer.
    """

    config: SpeechLlmConfig
    model: SpeechLlm

    def __init__(self, config: SpeechLlmConfig, seed: int, device: str = "cpu", model: str | None = None) -> None:
        super().__init__(config, seed, device, model)
        self.tokenizer = _tokenizer(config)
        self.prompt = self._ids(config.prompt)
        self.model = self._build()
        self._check_fits()
        projector = {f"projector.{name}": p for name, p in self.model.projector.named_parameters()}
        adapters = adapters_of(self.model.language_model) if config.stage == "adapters" else {}
        adapters = {f"language_model.{name}": p for name, p in adapters.items()}
        self.trained = dict(sorted({**projector, **adapters}.items()))
        fresh = fresh_params(projector, digest("speech-llm", seed.to_bytes(8, "big")))
        if config.projector is not None:
            fresh = _read_projector(config.projector, config.projector_weights, fresh)
        self._base = dict(sorted({**fresh, **initial_adapters(adapters, seed)}.items()))

    @staticmethod
    def pin(config: Any, model: str | None, shards: Sequence[Path]) -> Any:
        """Fill in what the manifest must fix: the digests of all weights, and of the language model's vocabulary."""
        changes = {
            "language_model_weights": weights_digest(config.language_model, config.language_model_revision),
            "language_model_vocabulary": vocabulary_digest(_load_tokenizer(config)),
        }
        if config.projector is not None:
            changes["projector_weights"] = file_digest(_projector_file(config.projector))
        return WhisperTask.pin(config, model, shards).model_copy(update=changes)

    def check(self, shards: Sequence[Path]) -> None:
        """Were these shards made for this encoder, and are their transcripts short enough?

        Raises:
            LocalError: one was not, or holds a transcript of more than `max_tokens` tokens.
        """
        for path in shards:
            longest = max(len(self._target(clip)) - 1 for clip in self._shard(path).clips)
            if longest > self.config.max_tokens:
                raise LocalError(
                    f"shard {path} holds a transcript of {longest} tokens of {self.config.language_model!r}, more than "
                    f"task.config.max_tokens ({self.config.max_tokens}); start the run with a larger one"
                )

    def initial_params(self) -> Tensors:
        """The projector, drawn from the run's seed or of another run; adapters as `lora` draws them."""
        return dict(self._base)

    def untrained(self) -> AbstractContextManager[Any]:
        """See :meth:`p2pasr.tasks.whisper.WhisperTask.untrained`."""
        self.set_params(self._base)
        return nullcontext()

    def weight(self, example: Clip) -> float:
        """Tokens that are learned: the transcript's and the one that ends it."""
        return len(self._target(example))

    def loss(self, examples: Sequence[Clip]) -> Tensor:
        """Summed cross entropy of the transcripts and their ends; of sound and prompt nothing is learned."""
        model, targets = self.model, [self._target(clip) for clip in examples]
        heard = self._hear(examples)
        rows = [
            torch.cat([sound, model.read(self.prompt + target)]) for sound, target in zip(heard, targets, strict=True)
        ]
        firsts = [len(sound) + len(self.prompt) for sound in heard]
        longest = max(map(len, rows))
        labels = torch.full((len(rows), longest), IGNORED, dtype=torch.int64)
        for row, (first, target) in enumerate(zip(firsts, targets, strict=True)):
            labels[row, first : first + len(target)] = torch.tensor(target)
        learned = longest - min(firsts)
        # padding lies behind everything that is learned, where a causal model does not look: it needs no mask
        out = model.language_model(
            inputs_embeds=pad_sequence(rows, batch_first=True), use_cache=False, logits_to_keep=learned + 1
        )
        return cross_entropy(
            out.logits[:, :-1].float().flatten(0, 1),
            labels[:, -learned:].flatten().to(self.device),
            ignore_index=IGNORED,
            reduction="sum",
        )

    def drops_out(self) -> bool:
        """See :meth:`p2pasr.tasks.training.GradientTask.drops_out`."""
        return super().drops_out() or float(getattr(self.model.language_model.config, "attention_dropout", 0.0)) > 0

    def transcripts(self, clips: Sequence[Clip], on_progress: OnProgress | None = None) -> list[str]:
        """Greedy transcripts of clips, in their order, of at most `max_tokens` tokens."""
        self.model.eval()
        results: list[str] = []
        for start in range(0, len(clips), DECODED_AT_ONCE):
            for ids in self._greedy(clips[start : start + DECODED_AT_ONCE]):
                results.append(self.tokenizer.decode(ids, skip_special_tokens=True).strip())
            if on_progress is not None:
                on_progress(len(results), len(clips))
        return results

    def export(self, params: Tensors, out: Path, about: Mapping[str, Any]) -> None:
        """Write the projector (`first` and `second`, their `weight` and `bias`), and a PEFT adapter folder if trained.

        `PeftModel.from_pretrained(language_model, out / "adapter")` loads the latter.
        """
        self.set_params(params)
        out.mkdir(parents=True, exist_ok=True)
        weights = {name: value for name, value in self.get_params().items() if name.startswith("projector.")}
        save_file({name.removeprefix("projector."): value for name, value in weights.items()}, out / PROJECTOR)
        if self.config.stage == "adapters":
            self.model.language_model.save_pretrained(out / ADAPTER, save_embedding_layers=False)
        write_notes(out, self.notes(about))

    def notes(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`p2pasr.tasks.whisper.WhisperTask.notes`."""
        config = self.config
        return {
            **super().notes(about),
            "language_model": config.language_model,
            "language_model_revision": config.language_model_revision,
            "language_model_weights": config.language_model_weights,
            "stage": config.stage,
            "stack": config.stack,
            "prompt": config.prompt,
        }

    def _build(self) -> SpeechLlm:
        config = self.config
        whisper = load_whisper(self.source, config.revision)
        shorten(whisper, self.frames)
        encoder = whisper.model.encoder.requires_grad_(False)
        language_model = _language_model(config, self.device)
        out = language_model.get_input_embeddings().weight.shape[1]
        projector = Projector(whisper.config.d_model, config.projector_width, out, config.stack)
        return SpeechLlm(encoder.to(self.device), projector.to(self.device), language_model)

    def _check_fits(self) -> None:
        config, model = self.config, self.model.language_model
        tokens = model.get_input_embeddings().weight.shape[0]
        if max(self.tokenizer.get_vocab().values()) >= tokens:
            raise LocalError(f"the tokenizer of {config.language_model!r} has more tokens than its {tokens} embeddings")
        most = getattr(model.config, "max_position_embeddings", None)
        needed = -(-self.frames // (2 * config.stack)) + len(self.prompt) + config.max_tokens + 1
        if most is not None and needed > most:
            raise LocalError(
                f"sound, prompt and transcript may take {needed} positions, but {config.language_model!r} has {most}; "
                f"lower task.config.max_tokens or window_seconds, or raise stack"
            )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _target(self, clip: Clip) -> list[int]:
        """The language model's tokens of a transcript, and the one that ends it."""
        text = self.frontend.tokenizer.decode(clip.tokens, skip_special_tokens=True).strip()
        return [*self._ids(text), int(self.tokenizer.eos_token_id)]

    def _hear(self, clips: Sequence[Clip]) -> list[Tensor]:
        features = self.partly_hidden(padded(clips, self.frames), clips)
        return self.model.hear(features.to(self.device), [clip.mel.shape[1] for clip in clips])

    @torch.inference_mode()
    def _greedy(self, clips: Sequence[Clip]) -> list[list[int]]:
        """Most likely next token, one at a time, without the one that ends a transcript.

        Clips are padded in front, so that the newest token is the last of every row.
        """
        model, end = self.model, int(self.tokenizer.eos_token_id)
        prompt = model.read(self.prompt)
        rows = [torch.cat([sound, prompt]) for sound in self._hear(clips)]
        step = pad_sequence(rows, batch_first=True, padding_side="left")
        real = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], True, 0, "left").to(self.device)
        places = (real.cumsum(1) - 1).clamp(min=0)
        done = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        ids: list[Tensor] = []
        past = None
        while len(ids) < self.config.max_tokens and not done.all():
            out = model.language_model(
                inputs_embeds=step, attention_mask=real, position_ids=places, past_key_values=past, use_cache=True
            )
            past = out.past_key_values
            ids.append(out.logits[:, -1].argmax(-1).masked_fill(done, end))
            done |= ids[-1] == end
            step = model.language_model.get_input_embeddings()(ids[-1])[:, None]
            real = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)
            places = places[:, -1:] + 1
        table = torch.stack(ids, dim=1).tolist()
        return [row[: row.index(end)] if end in row else row for row in table]


def _language_model(config: SpeechLlmConfig, device: torch.device) -> Any:
    """The language model, frozen, with adapters if they are trained."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    name, revision = config.language_model, config.language_model_revision
    if config.language_model_weights is not None and weights_digest(name, revision) != config.language_model_weights:
        raise _another(f"the weights of {name!r}")
    options = {**storage(config.quantise, device), "trust_remote_code": False}
    model = load(AutoModelForCausalLM, name, revision, **options)
    if config.quantise == "none":
        model = model.to(device)
    else:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.requires_grad_(False)
    model.name_or_path = model.config.name_or_path = name  # what exports name, not where it lies here
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return with_adapters(model, config, name, "CAUSAL_LM") if config.stage == "adapters" else model


def _load_tokenizer(config: SpeechLlmConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = load(
        AutoTokenizer, config.language_model, config.language_model_revision, trust_remote_code=False
    )
    return tokenizer


def _tokenizer(config: SpeechLlmConfig) -> PreTrainedTokenizerBase:
    tokenizer = _load_tokenizer(config)
    if config.language_model_vocabulary not in (None, vocabulary_digest(tokenizer)):
        raise _another(f"the vocabulary of {config.language_model!r}")
    if tokenizer.eos_token_id is None:
        raise LocalError(
            f"the tokenizer of {config.language_model!r} has no token that ends a text (eos_token); "
            f"choose a language model that has one"
        )
    return tokenizer


def _projector_file(name: str) -> Path:
    path = weight_file(name, PROJECTOR, None)
    if path is None:
        raise LocalError(f"task.config.projector: {name!r} has no {PROJECTOR}; name an export of a task of kind llm")
    return path


def _read_projector(name: str, pinned: str | None, like: Tensors) -> Tensors:
    """The exported projector, if its shapes are those of `like`."""
    path = _projector_file(name)
    if pinned is not None and file_digest(path) != pinned:
        raise _another(f"the projector in {name!r}")
    try:
        with safe_open(path, "np") as file:
            shapes = {f"projector.{key}": file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            if shapes != {key: list(value.shape) for key, value in like.items()}:
                raise LocalError(f"the projector in {name!r} has other sizes than the run's; they come from its models")
            return {key: file.get_tensor(key.removeprefix("projector.")).astype("float32") for key in like}
    except (SafetensorError, TypeError) as error:
        raise LocalError(f"{path} is damaged ({error}); get it again") from error


def _another(what: str) -> LocalError:
    return LocalError(f"{what} is not what this run was made with; get that version")


CONFIG = SpeechLlmConfig
TASK = SpeechLlmTask
