"""Fine-tune a Whisper model through low-rank adapters (Hu et al. 2021): the base stays, adapters travel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from p2pasr.errors import LocalError
from p2pasr.protocol.encoding import digest
from p2pasr.protocol.tensors import Tensors
from p2pasr.speech.pretrained import load
from p2pasr.tasks.determinism import hardware_class, uniform
from p2pasr.tasks.whisper import WhisperTask, WhisperTaskConfig, shorten, write_notes

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration


class AdapterSettings(WhisperTaskConfig):
    """What the `task.config` sections of tasks with adapters share."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Of an adapter's two factors."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """An adapter counts alpha / rank times."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Of what an adapter hears, while training."""
    targets: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = ("q_proj", "v_proj")
    """Names of the linear layers that get an adapter."""
    quantise: Literal["none", "8bit", "4bit"] = "none"
    """Store the frozen base in 8 bits (LLM.int8) or 4 (NF4) through bitsandbytes."""
    gradient_checkpointing: bool = False
    """Compute states again on the way back instead of keeping them: less memory, about a third more time."""


class LoraTaskConfig(AdapterSettings):
    """The `task.config` section of a manifest whose task is `lora`."""

    average: Literal["factors", "frozen-a"] = "factors"
    """`factors` trains and averages A and B, which is close to but not the average of BA. `frozen-a`
    shares one A drawn from the run's seed and trains B: an exact average and half the bytes."""


class AdapterTask(WhisperTask):
    """A task whose adapters stand in a base that may be stored in fewer bits."""

    config: AdapterSettings

    @property
    def hardware_class(self) -> str:
        """See :attr:`p2pasr.tasks.base.Task.hardware_class`."""
        precision = self.config.precision if self.config.quantise == "none" else self.config.quantise
        return hardware_class(self.device, precision)


class LoraTask(AdapterTask):
    """A Whisper model with adapters; implements :class:`p2pasr.tasks.base.Task` and :class:`p2pasr.tasks.base.Bounded`.

    Raises:
        LocalError: as :class:`p2pasr.tasks.whisper.WhisperTask`, or a target matches no layer.
    """

    config: LoraTaskConfig

    def __init__(self, config: LoraTaskConfig, seed: int, device: str = "cpu", model: str | None = None) -> None:
        super().__init__(config, seed, device, model)
        self.model = self._build()
        self._adapters = adapters_of(self.model)
        frozen = self._initial("lora_A") if config.average == "frozen-a" else {}
        self.trained = self._adapters
        self.set_params(frozen)
        for name, parameter in self._adapters.items():
            parameter.requires_grad_(name not in frozen)
        self.trained = {name: p for name, p in self._adapters.items() if name not in frozen}

    @property
    def whisper(self) -> WhisperForConditionalGeneration:
        """See :attr:`p2pasr.tasks.whisper.WhisperTask.whisper`."""
        return self.model.base_model.model

    def untrained(self) -> AbstractContextManager[Any]:
        """See :meth:`p2pasr.tasks.whisper.WhisperTask.untrained`."""
        off: AbstractContextManager[Any] = self.model.disable_adapter()
        return off

    def initial_params(self) -> Tensors:
        """A as peft draws it (uniform within 1/√fan-in, from the run's seed), B zero."""
        return {name: value for name, value in self._initial("lora_").items() if name in self.trained}

    def export(self, params: Tensors, out: Path, about: Mapping[str, Any]) -> None:
        """Write a PEFT adapter folder, and `p2pasr.json` with what an adapter folder cannot say.

        `PeftModel.from_pretrained(base, out)` loads it; language, task, window and the base's
        revision are in `p2pasr.json`.
        """
        self.set_params(params)
        self.model.save_pretrained(out, save_embedding_layers=False)  # "auto" would ask the hub for the base
        config = self.config
        lora = {"rank": config.rank, "alpha": config.alpha, "average": config.average}
        write_notes(out, {**self.notes(about), "lora": lora})

    def _build(self) -> Any:
        from peft import prepare_model_for_kbit_training
        from transformers import WhisperForConditionalGeneration

        config = self.config
        options = storage(config.quantise, self.device)
        model = load(WhisperForConditionalGeneration, self.source, config.revision, **options)
        model.name_or_path = model.config.name_or_path = config.model  # what exports name, not where it lies here
        shorten(model, self.frames)
        if config.quantise == "none":
            model = model.to(self.device)
        else:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # no task type: SEQ_2_SEQ_LM and FEATURE_EXTRACTION break Whisper's forward
        return with_adapters(model, config, config.model)

    def _initial(self, marker: str) -> Tensors:
        return initial_adapters({name: p for name, p in self._adapters.items() if marker in name}, self.seed)


def storage(quantise: str, device: torch.device) -> dict[str, Any]:
    """Options by which `from_pretrained` keeps a frozen base in float32, or in 8 or 4 bits on the device."""
    if quantise == "none":
        return {"dtype": torch.float32}
    return {"quantization_config": _quantisation(quantise), "device_map": {"": device}}


def with_adapters(model: torch.nn.Module, config: AdapterSettings, name: str, task_type: str | None = None) -> Any:
    """A frozen model with adapters in some of its linear layers.

    Args:
        name: what people call the model.
        task_type: peft's, for its exports.

    Raises:
        LocalError: a target matches no layer.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(model, config.targets, name)
    return get_peft_model(
        model,
        LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.targets),
            bias="none",
            task_type=task_type,
        ),
    )


def initial_adapters(adapters: Mapping[str, torch.nn.Parameter], seed: int) -> Tensors:
    """A as peft draws it (uniform within 1/√fan-in, from the run's seed), B zero.

    Args:
        adapters: as :func:`adapters_of` gives them.
    """
    out: Tensors = {}
    for name, parameter in adapters.items():
        shape = tuple(parameter.shape)
        if "lora_A" in name:
            key = digest("lora-a", seed.to_bytes(8, "big") + name.encode())
            out[name] = uniform(shape, 1 / math.sqrt(shape[1]), key)
        else:
            out[name] = np.zeros(shape, dtype=np.float32)
    return out


def adapters_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapters' parameters by short name, in ascending order."""
    found = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    return dict(sorted(found.items()))


def _check_targets(model: torch.nn.Module, targets: Sequence[str], name: str) -> None:
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    known = sorted({name.rpartition(".")[2] for name in names})
    for target in targets:
        if target not in known:
            raise LocalError(
                f"task.config.targets: {target!r} is no linear layer of {name!r}; it has {', '.join(known)}"
            )


def _quantisation(bits: str) -> Any:
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


CONFIG = LoraTaskConfig
TASK = LoraTask
