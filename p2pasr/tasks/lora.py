"""Fine-tune a Whisper model through low-rank adapters (Hu et al. 2021): the base stays, adapters travel."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from p2pasr.errors import LocalError, NonFiniteStep
from p2pasr.protocol.encoding import digest
from p2pasr.protocol.tensors import Tensors
from p2pasr.speech.metrics import error_rates
from p2pasr.speech.pretrained import Frontend, frontend, load, weights_digest
from p2pasr.speech.shards import Clip, Features, Shard, read_shard
from p2pasr.speech.text import normalise
from p2pasr.tasks.base import Checkpoint, OnProgress, OnStep, SegmentPlan, SegmentReport
from p2pasr.tasks.determinism import hardware_class, reproducible, uniform, usable_device
from p2pasr.tasks.envelope import adamw_reach
from p2pasr.tasks.whisper import collate, sample_batches, token_losses, transcribe

FRAMES_A_SECOND = 100


class LoraTaskConfig(BaseModel):
    """The `task.config` section of a manifest whose task is `lora`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: str
    """Hub id or local folder of a Whisper model; `p2pasr/demo-base` is the one in this package."""
    revision: str | None = None
    """Commit of the hub repository."""
    weights: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """BLAKE3 of the base's weights, filled in by `p2pasr run new`, so that all start from the same."""
    window_seconds: Annotated[float, Field(gt=0, le=30)] | None = None
    """A window shorter than the model's own. An adapter is only good at the window it was trained at."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    targets: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = ("q_proj", "v_proj")
    """Names of the linear layers that get an adapter."""
    average: Literal["factors", "frozen-a"] = "factors"
    """`factors` trains and averages A and B, which is close to but not the average of BA. `frozen-a`
    shares one A drawn from the run's seed and trains B: an exact average and half the bytes."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"

    precision: Literal["fp32", "bf16"] = "fp32"
    quantise: Literal["none", "8bit", "4bit"] = "none"
    """Store the frozen base in 8 bits (LLM.int8) or 4 (NF4) through bitsandbytes."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Examples that go through the model at once; gradients of a step are summed over them."""
    gradient_checkpointing: bool = False


class LoraTask:
    """A Whisper model with adapters; implements :class:`p2pasr.tasks.base.Task` and :class:`p2pasr.tasks.base.Bounded`.

    Args:
        config: the task's section of the manifest.
        seed: the run's seed.
        device: where to train, such as "cpu" or "cuda".
        model: a folder to load the base from instead of `config.model`; its weights must be the same.

    Raises:
        LocalError: the device or the model is missing, the model is another one, or a target matches no layer.
    """

    def __init__(self, config: LoraTaskConfig, seed: int, device: str = "cpu", model: str | None = None) -> None:
        self.config = config
        self.seed = seed
        self.device = usable_device(device)
        source = model or config.model
        self.frontend: Frontend = frontend(source, config.revision, config.window_seconds)
        if config.weights is not None and weights_digest(source, config.revision) != config.weights:
            raise LocalError(
                f"the weights of {source!r} are not those this run was made with ({config.weights[:12]}…); "
                f"get that version and name its folder with --model"
            )
        self.frames = round(self.frontend.window_seconds * FRAMES_A_SECOND)
        self.features = Features(
            int(self.frontend.extractor.feature_size), self.frontend.window_seconds, self.frontend.vocabulary
        )
        self.model = self._build(source)
        self._adapters = _adapters(self.model)
        self._frozen = self._initial("lora_A") if config.average == "frozen-a" else {}
        self._set(self._frozen)
        for name, parameter in self._adapters.items():
            parameter.requires_grad_(name not in self._frozen)
        self._trained = {name: p for name, p in self._adapters.items() if name not in self._frozen}

    @property
    def hardware_class(self) -> str:
        """See :attr:`p2pasr.tasks.base.Task.hardware_class`."""
        precision = self.config.precision if self.config.quantise == "none" else self.config.quantise
        return hardware_class(self.device, precision)

    def initial_params(self) -> Tensors:
        """A as peft draws it (uniform within 1/√fan-in, from the run's seed), B zero."""
        return {name: value for name, value in self._initial("lora_").items() if name in self._trained}

    def check(self, shards: Sequence[Path]) -> None:
        """Were these shards made for this model and window?

        Raises:
            LocalError: one was not, or is no shard.
        """
        for path in shards:
            self._shard(path)

    def segment(
        self, start: Checkpoint, shards: Sequence[Path], plan: SegmentPlan, on_step: OnStep | None = None
    ) -> tuple[Checkpoint, SegmentReport]:
        """See :meth:`p2pasr.tasks.base.Task.segment`."""
        clips = self._clips(shards)
        batches = sample_batches(len(clips), plan.samples_per_step, plan.seed)
        losses: list[float] = []
        with reproducible(plan.seed, self.device):
            self._set(start.params)
            optimizer = self._optimizer(start)
            self.model.train()
            for index in range(plan.steps):
                rate = learning_rate(self.config, plan.first_step + index, plan.total_steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                losses.append(self._step(optimizer, [clips[i] for i in next(batches)]))
                if on_step is not None:
                    on_step(index + 1, losses[-1])
        end = Checkpoint(self._get(), _moments(optimizer, self._trained), start.step + plan.steps)
        if not all(np.isfinite(value).all() for value in end.params.values()):
            raise NonFiniteStep(f"parameters became NaN or infinite by step {end.step} of the round")
        return end, SegmentReport(float(np.mean(losses)), plan.steps * plan.samples_per_step)

    def largest_move(self, params: Tensors, first_step: int, steps: int, total_steps: int) -> float:
        """See :meth:`p2pasr.tasks.base.Bounded.largest_move`.

        `adamw8bit` has no bound: a second moment that it rounds to zero leaves only ε below the first.
        """
        config = self.config
        if config.optimizer == "adamw8bit":
            return math.inf
        rates = (learning_rate(config, first_step + index, total_steps) for index in range(steps))
        largest = max(float(np.abs(value).max()) for value in params.values())
        return adamw_reach(rates, config.beta1, config.beta2, config.weight_decay, largest)

    def evaluate(
        self, params: Tensors | None, shards: Sequence[Path], on_progress: OnProgress | None = None
    ) -> Mapping[str, Any]:
        """Error rates of the base (params None) or the adapted model on held-out shards.

        Raises:
            LocalError: the shards are others than the model takes, or hold no text.
        """
        clips = self._clips(shards)
        tokenizer = self.frontend.tokenizer
        wanted = [tokenizer.decode(clip.tokens, skip_special_tokens=True) for clip in clips]
        if not any(map(normalise, wanted)):
            raise LocalError("the shards cannot be scored: no reference holds any text")
        if params is not None:
            self._set(params)
        with self.model.disable_adapter() if params is None else nullcontext():
            heard = transcribe(self.model.base_model.model, tokenizer, clips, self.frames, on_progress=on_progress)
        return error_rates(wanted, heard).as_dict()

    def export(self, params: Tensors, out: Path, about: Mapping[str, Any]) -> None:
        """Write a PEFT adapter folder, and `p2pasr.json` with what an adapter folder cannot say.

        `PeftModel.from_pretrained(base, out)` loads it; language, task, window and the base's
        revision are in `p2pasr.json`.
        """
        self._set(params)
        self.model.save_pretrained(out, save_embedding_layers=False)  # "auto" would ask the hub for the base
        notes = {
            **about,
            "base_model": self.config.model,
            "base_revision": self.config.revision,
            "base_weights": self.config.weights,
            "task": "transcribe",
            "window_seconds": self.frontend.window_seconds,
            "scored_after": "p2pasr.speech.text.normalise",
            "lora": {"rank": self.config.rank, "alpha": self.config.alpha, "average": self.config.average},
        }
        (out / "p2pasr.json").write_text(json.dumps(notes, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def _build(self, source: str) -> Any:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import WhisperForConditionalGeneration

        config = self.config
        options: dict[str, Any] = {"dtype": torch.float32}
        if config.quantise != "none":
            options = {"quantization_config": _quantisation(config.quantise), "device_map": {"": self.device}}
        model = load(WhisperForConditionalGeneration, source, config.revision, **options)
        model.name_or_path = model.config.name_or_path = config.model  # what exports name, not where it lies here
        _shorten(model, self.frames)
        if config.quantise == "none":
            model = model.to(self.device)
        else:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        _check_targets(model, config)
        return get_peft_model(
            model,
            LoraConfig(  # task_type stays unset: SEQ_2_SEQ_LM and FEATURE_EXTRACTION break Whisper's forward
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=list(config.targets),
                bias="none",
            ),
        )

    def _initial(self, marker: str) -> Tensors:
        out: Tensors = {}
        for name, parameter in self._adapters.items():
            if marker not in name:
                continue
            shape = tuple(parameter.shape)
            if "lora_A" in name:
                key = digest("lora-a", self.seed.to_bytes(8, "big") + name.encode())
                out[name] = uniform(shape, 1 / math.sqrt(shape[1]), key)
            else:
                out[name] = np.zeros(shape, dtype=np.float32)
        return out

    def _clips(self, shards: Sequence[Path]) -> list[Clip]:
        return [clip for path in shards for clip in self._shard(path).clips]

    def _shard(self, path: Path) -> Shard:
        shard = read_shard(path)
        if shard.features != self.features:
            window = self.config.window_seconds
            option = "" if window is None else f" --window-seconds {window:g}"
            raise LocalError(
                f"shard {path} was prepared for other features than {self.config.model!r} takes; "
                f"prepare it with --model {self.config.model}{option}"
            )
        return shard

    def _step(self, optimizer: torch.optim.Optimizer, clips: list[Clip]) -> float:
        size = self.config.micro_batch or len(clips)
        pieces = [clips[start : start + size] for start in range(0, len(clips), size)]
        tokens = sum(len(clip.tokens) - 1 for clip in clips)
        total = 0.0
        optimizer.zero_grad(set_to_none=True)  # first, for a step that failed may have left some
        for piece in pieces:
            batch = collate(piece, self.frames, self.frontend.config.pad_token_id).to(self.device)
            with self._autocast():
                summed, _ = token_losses(self.model, batch)
            torch.autograd.backward(summed / tokens)
            total += float(summed.detach())
        norm = torch.nn.utils.clip_grad_norm_(self._trained.values(), self.config.max_grad_norm)
        loss = total / tokens
        if not (math.isfinite(loss) and bool(torch.isfinite(norm))):
            raise NonFiniteStep(f"the loss is {loss} and the gradient's norm {float(norm)}: nothing of it is published")
        optimizer.step()
        return loss

    def _autocast(self) -> Any:
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _optimizer(self, start: Checkpoint) -> torch.optim.Optimizer:
        config = self.config
        betas = (config.beta1, config.beta2)
        options: dict[str, Any] = {"lr": config.learning_rate, "betas": betas, "weight_decay": config.weight_decay}
        optimizer: torch.optim.Optimizer
        if config.optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            optimizer = AdamW8bit(list(self._trained.values()), **options)
        else:
            optimizer = torch.optim.AdamW(list(self._trained.values()), fused=True, **options)
        _restore_moments(optimizer, self._trained, start)
        return optimizer

    def _set(self, params: Tensors) -> None:
        with torch.no_grad():
            for name, value in params.items():
                self._adapters[name].copy_(torch.from_numpy(np.array(value)))

    def _get(self) -> Tensors:
        return {name: p.detach().to("cpu", torch.float32).numpy().copy() for name, p in self._trained.items()}


def pin(config: LoraTaskConfig, model: str | None = None) -> LoraTaskConfig:
    """Fill in what the manifest must fix: the digest of the base's weights."""
    return config.model_copy(update={"weights": weights_digest(model or config.model, config.revision)})


def learning_rate(config: LoraTaskConfig, step: int, total: int) -> float:
    """Linear warm-up to the peak, then half a cosine down to zero at the run's last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(total - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _adapters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapters' parameters by short name, in ascending order."""
    found = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    return dict(sorted(found.items()))


def _check_targets(model: torch.nn.Module, config: LoraTaskConfig) -> None:
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    known = sorted({name.rpartition(".")[2] for name in names})
    for target in config.targets:
        if target not in known:
            raise LocalError(
                f"task.config.targets: {target!r} is no linear layer of {config.model!r}; it has {', '.join(known)}"
            )


def _shorten(model: Any, frames: int) -> None:
    """Cut the encoder's positions to a shorter window (two frames a position)."""
    positions = frames // 2
    encoder = model.model.encoder
    if positions < model.config.max_source_positions:
        kept = encoder.embed_positions.weight[:positions].detach().clone()
        embedding = torch.nn.Embedding(kept.shape[0], kept.shape[1], _weight=kept, _freeze=True)
        encoder.embed_positions = embedding
        model.config.max_source_positions = encoder.max_source_positions = positions


def _quantisation(bits: str) -> Any:
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def _moments(optimizer: torch.optim.Optimizer, trained: Mapping[str, torch.nn.Parameter]) -> Tensors:
    """The optimizer's state as named arrays; the step count is in the checkpoint already."""
    out: Tensors = {}
    for name, parameter in trained.items():
        for key, value in optimizer.state[parameter].items():
            if key != "step":
                out[f"{name}/{key}"] = value.detach().cpu().numpy().copy()
    return out


def _restore_moments(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, torch.nn.Parameter], start: Checkpoint
) -> None:
    eight_bit = not isinstance(optimizer, torch.optim.AdamW)
    by_parameter: dict[str, dict[str, Any]] = {}
    for full, value in start.moments.items():
        name, key = full.rsplit("/", 1)
        tensor = torch.from_numpy(np.array(value)).to(trained[name].device)
        by_parameter.setdefault(name, {})[key] = tensor
    for name, state in by_parameter.items():
        step = start.step if eight_bit else torch.tensor(float(start.step))
        optimizer.state[trained[name]] = {"step": step, **state}
