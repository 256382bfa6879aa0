"""Load pretrained parts by hub id or local folder, and say what to fetch when one is missing."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from p2pasr.errors import LocalError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, WhisperConfig, WhisperFeatureExtractor, WhisperTokenizer

BUNDLED = {"p2pasr/demo-base": Path(__file__).parent.parent / "demo" / "base"}
"""Models that come with this package, by the name that manifests call them."""

GENERATION = "generation_config.json"
"""What a model's folder says about writing, such as Whisper's languages; old ones have none."""

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

NEEDED_FILES = {
    "WhisperConfig": ("config.json",),
    "WhisperFeatureExtractor": ("preprocessor_config.json", "processor_config.json"),
    "WhisperTokenizer": ("tokenizer.json", "vocab.json"),
    "GenerationConfig": (GENERATION,),
    "WhisperForConditionalGeneration": WEIGHT_FILES,
    "ParakeetForCTC": WEIGHT_FILES,
    "Wav2Vec2ForCTC": WEIGHT_FILES,
    "HubertForCTC": WEIGHT_FILES,
    "Wav2Vec2BertForCTC": WEIGHT_FILES,
    "ZipformerForCTC": WEIGHT_FILES,
    "AutoModelForCausalLM": WEIGHT_FILES,
    "AutoTokenizer": ("tokenizer.json", "vocab.json", "tokenizer.model"),
}
"""transformers class → the files of which its folder needs one. Without some it takes defaults and says nothing."""

BITS = "bits"
"""Attribute of a weight without values: in how many bits each of them would be stored. Others are float32."""

EXAMPLE = "openai/whisper-small"
"""The model that advice names where the one that was asked for is no hub id."""

POSITIONS_A_SECOND = 50
"""Positions of Whisper's encoder: one for two frames of 10 ms, so that a window is a multiple of 0.02 s."""

BYTES = 256
"""Tokens that every byte-level vocabulary has at least."""


@dataclass(frozen=True, slots=True)
class Frontend:
    """What stands before and after a Whisper model: features in, text out.

    Attributes:
        window_seconds: the longest clip the model hears at once, a multiple of 0.02 s.
        vocabulary: hex BLAKE3 of the tokenizer's vocabulary.
    """

    config: WhisperConfig
    extractor: WhisperFeatureExtractor
    tokenizer: WhisperTokenizer
    window_seconds: float
    vocabulary: str


def local_folder(model: str) -> Path | None:
    """The folder that a model's name stands for on this machine, or None for a hub id."""
    folder = BUNDLED.get(model, Path(model).expanduser())
    return folder if model and folder.is_dir() else None


def load(loader: Any, model: str, revision: str | None = None, **options: Any) -> Any:
    """`loader.from_pretrained(model)`, with one clear sentence when that cannot work.

    Args:
        loader: a transformers class, one of :data:`NEEDED_FILES`.
        model: a local folder, or a hub id such as ``openai/whisper-small``.
        revision: commit of the hub repository.

    Raises:
        LocalError: the folder lacks files or holds damaged ones, or the name is no folder and the hub's
            model of that id is neither cached nor downloadable.
    """
    folder = local_folder(model)
    if folder is None:
        if not _is_hub_id(model):
            raise _unusable(model, "it is neither a folder on this machine nor a hub id")
        options = {**options, "revision": revision}
    elif not any((folder / name).is_file() for name in _needed(loader)):
        raise _unusable(model, f"its folder has no {' or '.join(_needed(loader))}")
    try:
        read = partial(_shape, loader) if _shapes_only(loader) else loader.from_pretrained
        return read(model if folder is None else str(folder), **options)
    except Exception as error:  # besides their own, the libraries let any error of a damaged file pass
        where = "" if folder else "there is no such folder on this machine; "
        sentence = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
        raise _unusable(model, f"{where}{loader.__name__}: {sentence or type(error).__name__}") from error


def _shapes_only(loader: Any) -> bool:
    """Whether this is a model, and all that is made now has shapes and no values: within `torch.device("meta")`."""
    import torch

    return NEEDED_FILES[loader.__name__] is WEIGHT_FILES and torch.get_default_device().type == "meta"


def _needed(loader: Any) -> tuple[str, ...]:
    return ("config.json",) if _shapes_only(loader) else NEEDED_FILES[loader.__name__]


def _shape(loader: Any, name: str, **options: Any) -> Any:
    """What `loader.from_pretrained` would load, without its weights; see :data:`BITS`."""
    import torch
    from transformers import AutoConfig, PreTrainedModel

    quantised = options.pop("quantization_config", None)
    informs = options.pop("output_loading_info", False)
    for about_weights in ("dtype", "device_map", "ignore_mismatched_sizes"):
        options.pop(about_weights, None)
    concrete = issubclass(loader, PreTrainedModel)
    config = (loader.config_class if concrete else AutoConfig).from_pretrained(name, **options)
    make = loader._from_config if concrete else loader.from_config
    model = make(config, dtype=torch.float32)
    model.requires_grad_(True)  # as those of `from_pretrained` do, Whisper's sinusoids too
    if quantised is not None:
        kept = model.get_output_embeddings()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not kept:
                setattr(module.weight, BITS, 4 if quantised.load_in_4bit else 8)
    return (model, {"missing_keys": (), "mismatched_keys": ()}) if informs else model


def frontend(model: str, revision: str | None = None, window_seconds: float | None = None) -> Frontend:
    """Load a Whisper model's configuration, feature extractor and tokenizer (no weights).

    Args:
        window_seconds: a window shorter than the model's own, in seconds, rounded up to a multiple of
            0.02 s; its whole if None.

    Raises:
        LocalError: the model is missing or damaged, or the window is longer than the model's own.
    """
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperTokenizer

    config = load(WhisperConfig, model, revision)
    extractor = load(WhisperFeatureExtractor, model, revision)
    tokenizer = load(WhisperTokenizer, model, revision)
    if tokenizer.vocab_size < BYTES:
        raise _unusable(model, "its tokenizer has no vocabulary")
    longest = config.max_source_positions / POSITIONS_A_SECOND
    wanted = longest if window_seconds is None else window_seconds
    if not 0 < wanted <= longest:
        raise LocalError(f"a window of {wanted:g} s does not fit {model!r}, which hears {longest:g} s at once")
    window = math.ceil(round(wanted * POSITIONS_A_SECOND, 6)) / POSITIONS_A_SECOND
    extractor.n_samples = round(window * extractor.sampling_rate)
    extractor.nb_max_frames = extractor.n_samples // extractor.hop_length
    return Frontend(config, extractor, tokenizer, window, vocabulary_digest(tokenizer))


def weights_digest(model: str, revision: str | None = None) -> str:
    """Hex BLAKE3 of a model's weights, by which peers agree that they start from the same base.

    It is that of the weight file or, where an index names several, of the list of theirs.

    Raises:
        LocalError: no weight file is found, or an index names one that is not there.
    """
    for name in WEIGHT_FILES:
        path = weight_file(model, name, revision)
        if path is None:
            continue
        if path.suffix != ".json":
            return file_digest(path)
        parts = [(part, weight_file(model, part, revision)) for part in _named_by(path)]
        if missing := [part for part, found in parts if found is None]:
            raise LocalError(f"the weights of {model!r} lack {', '.join(missing)}, which {name} names; get it again")
        lines = [f"{file_digest(found)}\t{part}\n" for part, found in parts if found]
        return str(blake3("".join(lines).encode()).hexdigest())
    raise LocalError(f"{local_folder(model) or model} holds no weights (one of {', '.join(WEIGHT_FILES)})")


def weight_file(model: str, name: str, revision: str | None) -> Path | None:
    """A file of a model's folder or, downloaded if need be, of its hub repository; None if it has no such file.

    Raises:
        LocalError: the model is neither a folder nor a hub id, or its file can be had neither here nor there.
    """
    folder = local_folder(model)
    if folder is not None:
        return folder / name if (folder / name).is_file() else None
    if not _is_hub_id(model):
        raise LocalError(f"there are no weights by the name {model!r}: it is neither a folder here nor a hub id")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except LocalEntryNotFoundError as error:
        raise LocalError(f"{name} of {model!r} is neither cached here nor downloadable") from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise LocalError(f"{name} of {model!r} cannot be fetched ({error})") from error


def _named_by(index: Path) -> list[str]:
    """The files that an index of weights in several files names, sorted."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LocalError(f"{index} is not an index of weights ({error}); get the model again") from error


def quiet_libraries() -> None:
    """Keep the training libraries' progress bars and notices out of a command's output."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _is_hub_id(model: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in __all__

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def _unusable(model: str, reason: str) -> LocalError:
    repository = EXAMPLE if local_folder(model) or not _is_hub_id(model) else model
    return LocalError(
        f"the model {model!r} cannot be loaded ({reason}). Where there is internet, run "
        f"'hf download {repository} --local-dir DIR', copy DIR to this machine and name that folder as the model"
    )


def file_digest(path: Path) -> str:
    """Hex BLAKE3 of a file."""
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return str(hasher.hexdigest())


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex BLAKE3 of a tokenizer's vocabulary: equal ones give equal ids the same meaning."""
    hasher = blake3()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        hasher.update(f"{index}\t{token}\n".encode())
    return str(hasher.hexdigest())
