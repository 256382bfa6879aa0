"""What the shared encoder must obey whatever its parameters are."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from p2pasr.speech.pretrained import Frontend
from p2pasr.tasks.conv_transformer import SUBSAMPLING, EncoderConfig, SpeechEncoder, States, TextModel
from p2pasr.tasks.features import FeaturesModel, FeaturesTaskConfig
from p2pasr.tasks.heads import Sound

from .conftest import MODEL

SMALL = EncoderConfig(width=16, layers=2, attention_heads=2, feedforward=32, kernel=5)


@pytest.fixture(scope="module")
def encoder() -> SpeechEncoder:
    """One with torch's own random parameters."""
    torch.manual_seed(0)
    return SpeechEncoder(8, SMALL).eval()


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 37, 40])
@torch.no_grad()
def test_a_clip_is_heard_alike_alone_and_beside_longer_ones(encoder: SpeechEncoder, frames: int) -> None:
    torch.manual_seed(frames)
    short, long = torch.randn(8, frames), torch.randn(8, 41)
    alone, together = (Sound.of(mels) for mels in ([short], [long, short]))
    one, two = encoder(alone.mels, alone.frames), encoder(together.mels, together.frames)

    positions = -(-frames // SUBSAMPLING)
    assert one.real.sum() == two.real[1].sum() == positions
    torch.testing.assert_close(two.values[1, :positions], one.values[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(two.statistics()[1], one.statistics()[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_causal_reader_knows_nothing_of_later_tokens_and_the_other_does() -> None:
    torch.manual_seed(1)
    ids, changed = torch.tensor([[3, 4, 5, 6, 7, 8]]), torch.tensor([[3, 4, 5, 9, 1, 2]])
    for causal in (True, False):
        reader = TextModel(10, SMALL, 2, causal=causal).eval()
        one, two = (reader(row, torch.tensor([6])).values[0, :3] for row in (ids, changed))
        assert torch.allclose(one, two, atol=1e-6) is causal


@torch.no_grad()
def test_the_order_of_tokens_matters() -> None:
    torch.manual_seed(2)
    reader = TextModel(10, SMALL, 1).eval()
    one = reader(torch.tensor([[3, 4, 5]]), torch.tensor([3])).mean()
    two = reader(torch.tensor([[5, 4, 3]]), torch.tensor([3])).mean()
    assert not torch.allclose(one, two, atol=1e-4)


def test_statistics_are_those_of_the_real_positions() -> None:
    values = torch.tensor([[[1.0], [3.0], [99.0]]])
    states = States(values, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(states.statistics(), torch.tensor([[2.0, 1.0]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [({"width": 30, "attention_heads": 4}, "cannot be shared"), ({"kernel": 4}, "make it odd")],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        EncoderConfig(**sizes)


@pytest.mark.parametrize(
    ("heads", "millions"),
    [
        (("accent", "speaker", "vad", "masked"), 8.3),
        (("accent", "confidence"), 24.0),
        (("correction",), 28.6),
    ],
)
def test_the_default_sizes_are_those_in_the_documentation(
    base: Frontend, monkeypatch: pytest.MonkeyPatch, heads: tuple[str, ...], millions: float
) -> None:
    monkeypatch.setattr(base.config, "vocab_size", 51_865)
    classes = {"dialects": ("cmn", "yue"), "speakers": ("00" * 8, "11" * 8)}
    config = FeaturesTaskConfig.model_validate({"model": MODEL, "heads": heads, **classes})
    with torch.device("meta"):
        model = FeaturesModel(config, base)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
