"""Models by name or folder, and one sentence when one is missing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from blake3 import blake3
from transformers import WhisperForConditionalGeneration

from p2pasr.errors import LocalError
from p2pasr.speech.pretrained import BUNDLED, Frontend, frontend, load, local_folder, weights_digest

from .conftest import MODEL


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with the demo's model that a test may damage."""
    return Path(shutil.copytree(BUNDLED[MODEL], tmp_path / "model"))


def test_the_bundled_model_is_in_the_package(base: Frontend) -> None:
    folder = local_folder(MODEL)

    assert folder == BUNDLED[MODEL]
    assert (base.window_seconds, base.extractor.n_samples, base.extractor.nb_max_frames) == (3.0, 48_000, 300)
    assert base.extractor.feature_size == base.config.num_mel_bins == 80
    assert len(base.tokenizer) == base.config.vocab_size


def test_the_bundled_weights_fit_their_configuration(base: Frontend) -> None:
    model = load(WhisperForConditionalGeneration, MODEL)

    assert model.config.max_source_positions == 150
    assert model.get_input_embeddings().weight.shape == (base.config.vocab_size, base.config.d_model)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_293_056


def test_a_folder_is_the_same_as_the_name_it_was_copied_from(base: Frontend, copied: Path) -> None:
    there = frontend(str(copied))

    assert there.vocabulary == base.vocabulary
    assert there.config.to_dict() == base.config.to_dict()
    assert weights_digest(str(copied)) == weights_digest(MODEL)


def test_a_name_that_is_no_folder_is_a_hub_id(tmp_path: Path) -> None:
    assert local_folder("openai/whisper-small") is None
    assert local_folder(str(tmp_path)) == tmp_path


def test_another_vocabulary_has_another_digest(base: Frontend, copied: Path) -> None:
    tokenizer = frontend(str(copied)).tokenizer
    tokenizer.add_tokens(["<|yue|>"])
    tokenizer.save_pretrained(copied)

    assert frontend(str(copied)).vocabulary != base.vocabulary


# --- windows ------------------------------------------------------------------------------------


def test_a_shorter_window_shortens_what_the_extractor_pads_to() -> None:
    short = frontend(MODEL, window_seconds=1.5)

    assert (short.window_seconds, short.extractor.n_samples, short.extractor.nb_max_frames) == (1.5, 24_000, 150)


@pytest.mark.parametrize(
    ("asked", "window"), [(1.0, 1.0), (1.01, 1.02), (2.007, 2.02), (1.37, 1.38), (2.3, 2.3), (0.001, 0.02), (2.99, 3.0)]
)
def test_a_window_is_rounded_up_to_whole_positions_of_the_encoder(asked: float, window: float) -> None:
    made = frontend(MODEL, window_seconds=asked)

    assert (made.window_seconds, made.extractor.n_samples) == (window, round(window * 16_000))
    assert made.extractor.nb_max_frames == round(window * 50) * 2


def test_a_window_of_one_call_does_not_reach_the_next() -> None:
    frontend(MODEL, window_seconds=1.5)

    assert frontend(MODEL).extractor.n_samples == 48_000


@pytest.mark.parametrize("window", [3.01, 30.0, 0.0, -1.0, math.nan, math.inf])
def test_a_window_that_the_model_does_not_have_is_refused(window: float) -> None:
    with pytest.raises(LocalError, match=r"a window of .* s does not fit 'p2pasr/demo-base', which hears 3 s at once"):
        frontend(MODEL, window_seconds=window)


# --- what is missing ----------------------------------------------------------------------------


def test_a_missing_hub_model_says_what_to_download() -> None:
    with pytest.raises(LocalError) as error:
        frontend("openai/whisper-nowhere")
    assert str(error.value).startswith("the model 'openai/whisper-nowhere' cannot be loaded (")
    assert "run 'hf download openai/whisper-nowhere --local-dir DIR'" in str(error.value)
    assert str(error.value).endswith("name that folder as the model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "missing"),
    [
        ("config.json", "config.json"),
        ("preprocessor_config.json", "preprocessor_config.json or processor_config.json"),
        ("tokenizer.json", "tokenizer.json or vocab.json"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused(copied: Path, file: str, missing: str) -> None:
    (copied / file).unlink()

    # transformers itself takes a window of 30 s without config.json and an empty vocabulary without a tokenizer.
    with pytest.raises(LocalError) as error:
        frontend(str(copied))
    assert str(error.value).startswith(f"the model {str(copied)!r} cannot be loaded (its folder has no {missing}). ")


def test_a_tokenizer_without_a_vocabulary_is_refused(copied: Path) -> None:
    tokenizer = json.loads((copied / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"].update(vocab={}, merges=[])
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")

    with pytest.raises(LocalError, match=r"cannot be loaded \(its tokenizer has no vocabulary\)"):
        frontend(str(copied))


def test_a_folder_without_weights_is_refused(copied: Path) -> None:
    (copied / "model.safetensors").unlink()

    with pytest.raises(LocalError, match=r"cannot be loaded"):
        load(WhisperForConditionalGeneration, str(copied))
    with pytest.raises(LocalError, match=r"holds no weights \(one of model\.safetensors, "):
        weights_digest(str(copied))


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["", "{", "[]"], ids=["empty", "cut", "a list"])
def test_a_folder_with_a_damaged_file_is_refused(copied: Path, file: str, content: str) -> None:
    (copied / file).write_text(content, encoding="utf-8")

    with pytest.raises(LocalError, match=r"^the model .* cannot be loaded \(Whisper\w+: .+\)\. Where there is"):
        frontend(str(copied))


@pytest.mark.parametrize("keep", [0, 4, 1000, 100_000])
def test_weights_cut_short_are_refused(copied: Path, keep: int) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])

    with pytest.raises(LocalError, match=r"the model .* cannot be loaded \("):
        load(WhisperForConditionalGeneration, str(copied))


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(LocalError) as error:
        frontend(str(tmp_path / "nowhere"))
    assert "it is neither a folder on this machine nor a hub id" in str(error.value)
    assert "run 'hf download openai/whisper-small --local-dir DIR'" in str(error.value)


# --- weights ------------------------------------------------------------------------------------


def test_weights_are_named_by_the_digest_of_their_file() -> None:
    data = (BUNDLED[MODEL] / "model.safetensors").read_bytes()

    assert weights_digest(MODEL) == blake3(data).hexdigest()


def test_other_weights_have_another_digest(copied: Path) -> None:
    weights = copied / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    assert weights_digest(str(copied)) != weights_digest(MODEL)


@pytest.fixture
def split(copied: Path) -> Path:
    """The demo's model with its weights in several files."""
    load(WhisperForConditionalGeneration, str(copied)).save_pretrained(copied, max_shard_size="1MB")
    (copied / "model.safetensors").unlink(missing_ok=True)
    assert len(list(copied.glob("model-*.safetensors"))) > 1
    return copied


def test_weights_in_several_files_are_named_by_all_of_them(split: Path) -> None:
    digest = weights_digest(str(split))
    last = max(split.glob("model-*.safetensors"))
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)

    assert weights_digest(str(split)) != digest


def test_weights_in_several_files_of_which_one_is_missing_are_refused(split: Path) -> None:
    last = max(split.glob("model-*.safetensors"))
    last.unlink()

    with pytest.raises(LocalError, match=rf"lack {last.name}, which model\.safetensors\.index\.json names"):
        weights_digest(str(split))


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1, "b": "c"}}'])
def test_a_damaged_index_of_weights_is_refused(split: Path, index: str) -> None:
    (split / "model.safetensors.index.json").write_text(index, encoding="utf-8")

    with pytest.raises(LocalError, match="is not an index of weights"):
        weights_digest(str(split))


def test_the_digest_of_a_missing_models_weights_is_an_error() -> None:
    with pytest.raises(LocalError, match=r"safetensors of 'openai/whisper-nowhere' is neither cached .* downloadable"):
        weights_digest("openai/whisper-nowhere")


@pytest.mark.parametrize("model", ["/nowhere/whisper", "./whisper", "a/b/c", "", "whisper small"])
def test_the_digest_of_weights_by_a_name_that_cannot_be_one_is_an_error(model: str) -> None:
    with pytest.raises(
        LocalError, match=r"there are no weights by the name .*: it is neither a folder here nor a hub id"
    ):
        weights_digest(model)


def test_the_models_card_states_its_size_and_that_its_speech_is_synthetic() -> None:
    card = (BUNDLED[MODEL] / "README.md").read_text(encoding="utf-8")

    assert "1,293,056 parameters" in card
    assert "**synthetic** Mandarin" in card
    assert json.loads((BUNDLED[MODEL] / "config.json").read_text(encoding="utf-8"))["dtype"] == "float16"
