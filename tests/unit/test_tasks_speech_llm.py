"""A language model that learns to hear: what it loses, what it writes, what is trained of it and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from p2pasr.errors import LocalError
from p2pasr.protocol.tensors import Tensors
from p2pasr.speech.pretrained import file_digest, weights_digest
from p2pasr.speech.shards import Clip
from p2pasr.tasks import Checkpoint, build, pin
from p2pasr.tasks.speech_llm import Projector, SpeechLlmConfig, SpeechLlmTask
from p2pasr.tasks.training import GradientTask

from .conftest import MODEL, plan, start_of

Shards = Sequence[Path]
Make = Callable[..., SpeechLlmTask]

SMALL: dict[str, Any] = {"model": MODEL, "projector_width": 64, "max_tokens": 48, "warmup_steps": 0}


@pytest.fixture(scope="session")
def make_llm(language_model: Path) -> Make:
    """Build a task; keyword arguments change its configuration."""

    def make(*, seed: int = 1, **config: Any) -> SpeechLlmTask:
        whole = {**SMALL, "language_model": str(language_model), "rank": 4, "dropout": 0.0, **config}
        task = build("llm", whole, seed=seed)
        assert isinstance(task, SpeechLlmTask)
        return task

    return make


@pytest.fixture(scope="session")
def hearing(make_llm: Make) -> SpeechLlmTask:
    """A task whose projector is trained."""
    return make_llm()


def trained(task: SpeechLlmTask, shards: Shards, segments: int = 6) -> tuple[Checkpoint, list[float]]:
    """The end of a short training, and the mean loss of each of its segments."""
    at, losses = start_of(task), []
    for index in range(segments):
        at, report = task.segment(at, shards, plan(steps=5, samples=8, seed=index, first=5 * index, total=60))
        losses.append(report.loss)
    return at, losses


def frozen(task: SpeechLlmTask) -> Tensors:
    """A copy of all that is not trained."""
    kept = {id(parameter) for parameter in task.trained.values()}
    return {name: p.detach().numpy().copy() for name, p in task.model.named_parameters() if id(p) not in kept}


def varied(task: SpeechLlmTask, size: float = 0.02) -> Tensors:
    """The initial parameters moved a little, so that no adapter is zero."""
    rng = np.random.default_rng(0)
    return {
        name: value + rng.normal(0, size, value.shape).astype(np.float32)
        for name, value in task.initial_params().items()
    }


def said(task: SpeechLlmTask, clip: Clip) -> str:
    """The transcript of a clip."""
    return str(task.frontend.tokenizer.decode(clip.tokens, skip_special_tokens=True)).strip()


# --- learning -----------------------------------------------------------------------------------


def test_both_stages_learn_one_after_the_other_and_leave_the_rest_as_it_was(
    make_llm: Make, shard_files: Shards, tmp_path: Path
) -> None:
    first = make_llm(learning_rate=1e-2)
    before = frozen(first)
    end, losses = trained(first, shard_files)
    first.export(end.params, tmp_path, {})
    second = make_llm(learning_rate=1e-2, stage="adapters", projector=str(tmp_path))
    beside = frozen(second)
    last, further = trained(second, shard_files)

    assert losses[-1] < 0.8 * losses[0]
    assert further[0] < losses[0]
    assert further[-1] < 0.8 * losses[-1]
    assert all(np.array_equal(value, before[name]) for name, value in frozen(first).items())
    assert all(np.array_equal(value, beside[name]) for name, value in frozen(second).items())
    assert all((value != second.initial_params()[name]).any() for name, value in last.params.items())


def test_the_second_stage_learns_to_hear(make_llm: Make, shard_files: Shards) -> None:
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    task = make_llm(stage="adapters", learning_rate=5e-3, rank=16, targets=layers)
    end, _ = trained(task, shard_files, segments=12)
    task.set_params(end.params)
    task.model.eval()
    clips = task.examples(shard_files)
    others = [
        Clip(other.mel, clip.tokens, clip.seconds) for clip, other in zip(clips, [*clips[1:], clips[0]], strict=True)
    ]
    with torch.no_grad():
        own, swapped = float(task.loss(clips)), float(task.loss(others))

    assert swapped > 5 * own  # who guessed from the texts alone would lose the same


def test_the_first_stage_trains_the_projector_and_the_second_adapters_besides(make_llm: Make) -> None:
    projector = {f"projector.{layer}.{part}" for layer in ("first", "second") for part in ("weight", "bias")}
    one, two = make_llm().initial_params(), make_llm(stage="adapters").initial_params()
    adapters = two.keys() - projector

    assert one.keys() == projector < two.keys()
    assert len(adapters) == 2 * 2 * 2  # A and B of two targets in two layers
    assert all(re.fullmatch(r"language_model\..*(q|v)_proj\.lora_[AB]\.weight", name) for name in adapters)
    assert all(not two[name].any() for name in adapters if "lora_B" in name)
    assert all(two[name].any() for name in adapters if "lora_A" in name)


@pytest.mark.parametrize("stage", ["projector", "adapters"])
def test_only_what_is_trained_takes_gradients(make_llm: Make, stage: str) -> None:
    task = make_llm(stage=stage)

    assert {id(p) for p in task.model.parameters() if p.requires_grad} == {id(p) for p in task.trained.values()}


def test_another_seed_draws_another_start(make_llm: Make) -> None:
    one, other = make_llm(stage="adapters").initial_params(), make_llm(stage="adapters", seed=2).initial_params()

    assert all((one[name] != other[name]).any() for name in one if "lora_A" in name or name.endswith("t.weight"))


def test_the_encoder_never_drops_out(hearing: SpeechLlmTask) -> None:
    hearing.model.train()

    assert hearing.model.language_model.training
    assert not any(module.training for module in hearing.model.encoder.modules())


# --- what is lost -------------------------------------------------------------------------------


def test_only_the_transcript_and_its_end_are_learned(hearing: SpeechLlmTask, shard_files: Shards) -> None:
    clip = hearing.examples(shard_files)[0]
    hearing.model.eval()
    target = [*hearing.tokenizer(said(hearing, clip))["input_ids"], hearing.tokenizer.eos_token_id]
    with torch.no_grad():
        (sound,) = hearing._hear([clip])
        row = torch.cat([sound, hearing.model.read([*hearing.prompt, *target])])[None]
        logs = hearing.model.language_model(inputs_embeds=row).logits[0].log_softmax(-1)
        by_hand = -sum(float(logs[len(row[0]) - len(target) - 1 + place, id_]) for place, id_ in enumerate(target))

        assert float(hearing.loss([clip])) == pytest.approx(by_hand, rel=1e-5)
    assert hearing.weight(clip) == len(target)


def test_a_clip_is_heard_at_its_true_length(hearing: SpeechLlmTask, shard_files: Shards) -> None:
    clips = hearing.examples(shard_files)
    lengths = [len(sound) for sound in hearing._hear(clips)]

    assert lengths == [-(-clip.mel.shape[1] // 16) for clip in clips]
    assert len(set(lengths)) > 1


def test_clips_lose_together_what_they_lose_alone(hearing: SpeechLlmTask, shard_files: Shards) -> None:
    clips = hearing.examples(shard_files)[:5]
    hearing.model.eval()
    with torch.no_grad():
        alone = [float(hearing.loss([clip])) for clip in clips]

        assert len({clip.mel.shape[1] for clip in clips}) > 1
        assert float(hearing.loss(clips)) == pytest.approx(sum(alone), rel=1e-5)


def test_what_is_lost_depends_on_what_is_heard_and_on_the_prompt(make_llm: Make, shard_files: Shards) -> None:
    task, asked = make_llm(), make_llm(prompt="Write: ")
    one, other = task.examples(shard_files)[:2]
    with torch.no_grad():
        own, swapped, prompted = (
            float(t.loss([Clip(mel, one.tokens, 1.0)]))
            for t, mel in ((task, one.mel), (task, other.mel), (asked, one.mel))
        )

    assert len({own, swapped, prompted}) == 3


def test_spec_augment_hides_part_of_what_is_heard(make_llm: Make, shard_files: Shards) -> None:
    task = make_llm(spec_augment={})
    clips = task.examples(shard_files)[:1]
    with torch.no_grad():
        assert len({float(task.loss(clips)) for _ in range(4)}) > 1


@given(positions=st.integers(1, 40), stack=st.integers(1, 9))
def test_the_projector_gives_one_embedding_for_each_stack_begun(positions: int, stack: int) -> None:
    states = torch.randn(2, positions, 4)
    projector = Projector(4, 8, 6, stack)
    whole = projector(states)
    full = positions // stack

    assert whole.shape == (2, -(-positions // stack), 6)
    if full:
        assert torch.allclose(projector(states[:, : full * stack]), whole[:, :full], atol=1e-6)


# --- what is written ----------------------------------------------------------------------------


def test_a_transcript_does_not_depend_on_its_neighbours(make_llm: Make, shard_files: Shards) -> None:
    task = make_llm(stage="adapters", learning_rate=1e-2)
    end, _ = trained(task, shard_files, segments=2)
    task.set_params(end.params)
    clips = task.examples(shard_files)[:6]
    together = task.transcripts(clips)

    assert together == [task.transcripts([clip])[0] for clip in clips]
    assert len(set(together)) > 1


def test_a_transcript_ends_at_the_bound_or_at_its_end(make_llm: Make, shard_files: Shards) -> None:
    task = make_llm(max_tokens=3)
    clips = task.examples(shard_files)[:4]
    rows = task._greedy(clips)

    assert all(len(row) <= 3 and task.tokenizer.eos_token_id not in row for row in rows)
    assert any(rows)


def test_greedy_is_what_transformers_generates(make_llm: Make, shard_files: Shards) -> None:
    task = make_llm()
    task.set_params(varied(task))
    clip = task.examples(shard_files)[0]
    (ours,) = task._greedy([clip])
    with torch.no_grad():
        row = torch.cat([task._hear([clip])[0], task.model.read(task.prompt)])[None]
        model = task.model.language_model
        options = {"attention_mask": torch.ones(row.shape[:2]), "max_new_tokens": 48, "do_sample": False}
        theirs = model.generate(inputs_embeds=row, eos_token_id=256, pad_token_id=256, **options)[0].tolist()

    assert ours == (theirs[: theirs.index(256)] if 256 in theirs else theirs)


def test_a_gpt_can_learn_to_hear_too(make_llm: Make, language_model: Path, shard_files: Shards, tmp_path: Path) -> None:
    shutil.copytree(language_model, tmp_path, dirs_exist_ok=True)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=256, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    task = make_llm(language_model=str(tmp_path))
    end, _ = trained(task, shard_files, segments=1)
    clips = task.examples(shard_files)

    assert task.drops_out()  # as GPT-2 does
    assert task.evaluate(end.params, shard_files[:1])["clips"] == 8
    assert task.transcripts(clips) == [task.transcripts([clip])[0] for clip in clips]  # its positions are absolute


# --- what is exported ---------------------------------------------------------------------------


def test_plain_libraries_load_an_export(
    make_llm: Make, language_model: Path, shard_files: Shards, tmp_path: Path
) -> None:
    task = make_llm(stage="adapters")
    task.export(varied(task), tmp_path, {"round": 3})
    notes = json.loads((tmp_path / "p2pasr.json").read_text(encoding="utf-8"))
    projector = Projector(128, 64, 128, notes["stack"])
    projector.load_state_dict(load_file(tmp_path / "projector.safetensors"))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(language_model), tmp_path / "adapter").eval()
    clip = task.examples(shard_files)[0]
    task.model.eval()
    with torch.no_grad():
        (sound,) = task._hear([clip])
        ids = torch.tensor([[*task.prompt, *task._target(clip)]])
        rows = torch.cat([sound[None], plain.get_input_embeddings()(ids)], dim=1)
        theirs = plain(inputs_embeds=rows).logits
        assert torch.equal(theirs, task.model.language_model(inputs_embeds=rows).logits)
        states = torch.randn(1, 20, 128)
        assert torch.equal(projector(states), task.model.projector(states))
    assert (notes["round"], notes["language_model"], notes["prompt"]) == (3, str(language_model), "\nTranscript: ")


def test_a_projectors_export_holds_no_adapter(hearing: SpeechLlmTask, tmp_path: Path) -> None:
    hearing.export(hearing.initial_params(), tmp_path, {})

    assert {path.name for path in tmp_path.iterdir()} == {"projector.safetensors", "p2pasr.json"}


# --- configuration ------------------------------------------------------------------------------


def test_pinning_fixes_all_that_peers_must_agree_on(
    hearing: SpeechLlmTask, language_model: Path, tmp_path: Path
) -> None:
    hearing.export(hearing.initial_params(), tmp_path, {})
    config = {**SMALL, "language_model": str(language_model), "projector": str(tmp_path)}
    pinned = pin("llm", config)

    assert pinned.keys() == SpeechLlmConfig.model_fields.keys()
    assert pinned["weights"] == weights_digest(MODEL)
    assert pinned["language_model_weights"] == weights_digest(str(language_model))
    assert pinned["projector_weights"] == file_digest(tmp_path / "projector.safetensors")
    assert pin("llm", pinned) == pinned == json.loads(json.dumps(pinned))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"stage": "encoder"}, "task.config: stage: input should be 'projector' or 'adapters' (found 'encoder')"),
        ({"stack": 0}, "task.config: stack: input should be greater than or equal to 1"),
        ({"rank": "4"}, "task.config: rank: input should be a valid integer (found '4')"),
        ({"ranks": 4}, "task.config: ranks is not a known key"),
        ({"alpha": float("inf")}, "task.config: alpha: "),
        ({"projector_weights": "0" * 64}, "task.config: projector_weights is the digest of projector, which is not"),
        ({"language_model": "nobody/nothing"}, "the model 'nobody/nothing' cannot be loaded ("),
        ({"language_model_weights": "0" * 64}, "the weights of "),
        ({"language_model_vocabulary": "0" * 64}, "the vocabulary of "),
        ({"stage": "adapters", "targets": ["query"]}, "task.config.targets: 'query' is no linear layer of "),
        ({"max_tokens": 300}, "sound, prompt and transcript may take 333 positions, but "),
        (
            {"projector": MODEL},
            "task.config.projector: 'p2pasr/demo-base' has no projector.safetensors; name",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(make_llm: Make, config: Any, sentence: str) -> None:
    with pytest.raises(LocalError) as error:
        make_llm(**config)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


def test_a_projector_of_other_sizes_or_other_bytes_is_refused(
    make_llm: Make, hearing: SpeechLlmTask, tmp_path: Path
) -> None:
    hearing.export(hearing.initial_params(), tmp_path, {})
    named = str(tmp_path)

    with pytest.raises(LocalError, match=r"^the projector in .* has other sizes than the run's"):
        make_llm(projector=named, projector_width=32)
    with pytest.raises(LocalError, match=r"^the projector in .* is not what this run was made with; get that version$"):
        make_llm(projector=named, projector_weights="0" * 64)
    (tmp_path / "projector.safetensors").write_bytes(b"nothing")
    with pytest.raises(LocalError, match=r"projector\.safetensors is damaged \(.*\); get it again$"):
        make_llm(projector=named)


def test_a_tokenizer_that_ends_no_text_or_has_too_many_tokens_is_refused(
    make_llm: Make, language_model: Path, tmp_path: Path
) -> None:
    for name, change in (("endless", {"eos_token": None}), ("large", {"extra_special_tokens": ["<more>"]})):
        folder = shutil.copytree(language_model, tmp_path / name)
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **change}), encoding="utf-8")

    with pytest.raises(LocalError, match=r"has no token that ends a text \(eos_token\); choose"):
        make_llm(language_model=str(tmp_path / "endless"))
    with pytest.raises(LocalError, match=r"^the tokenizer of .* has more tokens than its 257 embeddings$"):
        make_llm(language_model=str(tmp_path / "large"))


def test_shards_with_longer_transcripts_than_the_run_takes_are_refused(make_llm: Make, shard_files: Shards) -> None:
    make_llm().check(shard_files)
    with pytest.raises(LocalError, match=r"holds a transcript of \d+ tokens of .*, more than task\.config\.max_tokens"):
        make_llm(max_tokens=5).check(shard_files)


@pytest.mark.parametrize("precision", [{"precision": "bf16"}, {"quantise": "4bit"}, {"gradient_checkpointing": True}])
def test_a_task_that_saves_memory_learns_nearly_the_same(
    make_llm: Make, shard_files: Shards, precision: dict[str, Any]
) -> None:
    plain, small = make_llm(stage="adapters"), make_llm(stage="adapters", **precision)
    assert isinstance(small, GradientTask)
    (_, exact), (_, near) = (trained(task, shard_files, segments=1) for task in (plain, small))

    assert near == pytest.approx(exact, rel=0.05)
    if "gradient_checkpointing" not in precision:
        assert small.hardware_class.rpartition("/")[2] in precision.values()
