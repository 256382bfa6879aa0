"""Load pretrained parts by hub id or local folder, and say what to fetch when one is missing."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from p2pasr.errors import LocalError

if TYPE_CHECKING:
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperTokenizer

BUNDLED = {"p2pasr/demo-base": Path(__file__).parent.parent / "demo" / "base"}
"""Models that come with this package, by the name that manifests call them."""

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class Frontend:
    """What stands before and after a Whisper model: features in, text out.

    Attributes:
        window_seconds: the longest clip the model hears at once.
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
    return folder if folder.is_dir() else None


def load(loader: Any, model: str, revision: str | None = None, **options: Any) -> Any:
    """`loader.from_pretrained(model)`, with one clear sentence when that cannot work.

    Args:
        loader: a transformers class with `from_pretrained`.
        model: a local folder, or a hub id such as ``openai/whisper-small``.
        revision: commit of the hub repository.

    Raises:
        LocalError: the folder lacks files, or the id is neither cached nor downloadable.
    """
    folder = local_folder(model)
    if folder is None:
        options = {**options, "revision": revision}
    try:
        return loader.from_pretrained(model if folder is None else str(folder), **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise LocalError(
            f"the model {model!r} cannot be loaded ({reason}). Where there is internet, run "
            f"'hf download {model if '/' in model else 'openai/whisper-small'} --local-dir DIR', "
            f"copy DIR to this machine and name that folder as the model"
        ) from error


def frontend(model: str, revision: str | None = None, window_seconds: float | None = None) -> Frontend:
    """Load a Whisper model's configuration, feature extractor and tokenizer (no weights).

    Args:
        window_seconds: a window shorter than the model's own, in seconds; its whole if None.

    Raises:
        LocalError: the model is missing, or the window is longer than the model's own.
    """
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperTokenizer

    config = load(WhisperConfig, model, revision)
    extractor = load(WhisperFeatureExtractor, model, revision)
    tokenizer = load(WhisperTokenizer, model, revision)
    longest = config.max_source_positions * 2 * extractor.hop_length / extractor.sampling_rate
    window = longest if window_seconds is None else window_seconds
    if not 0 < window <= longest:
        raise LocalError(f"a window of {window:g} s does not fit {model!r}, which hears {longest:g} s at once")
    extractor.n_samples = round(window * extractor.sampling_rate)
    extractor.nb_max_frames = extractor.n_samples // extractor.hop_length
    return Frontend(config, extractor, tokenizer, window, _vocabulary_digest(tokenizer))


def weights_digest(model: str, revision: str | None = None) -> str:
    """Hex BLAKE3 of a model's weight file, by which peers agree that they start from the same base.

    Raises:
        LocalError: no weight file is found.
    """
    folder = local_folder(model)
    if folder is not None:
        for name in WEIGHT_FILES:
            if (folder / name).is_file():
                return _file_digest(folder / name)
        raise LocalError(f"{folder} holds no weights (one of {', '.join(WEIGHT_FILES)})")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    for name in WEIGHT_FILES:
        try:
            return _file_digest(Path(hf_hub_download(model, name, revision=revision)))
        except LocalEntryNotFoundError as error:
            raise LocalError(f"the weights of {model!r} are neither cached here nor downloadable") from error
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            raise LocalError(f"the weights of {model!r} cannot be fetched ({error})") from error
    raise LocalError(f"the hub repository {model!r} holds no weights")


def quiet_libraries() -> None:
    """Keep the training libraries' progress bars and notices out of a command's output."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _file_digest(path: Path) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return str(hasher.hexdigest())


def _vocabulary_digest(tokenizer: WhisperTokenizer) -> str:
    hasher = blake3()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        hasher.update(f"{index}\t{token}\n".encode())
    return str(hasher.hexdigest())
