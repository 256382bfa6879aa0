"""Which limits a run gets by the precision that its task computes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr import runs
from p2pasr.errors import LocalError
from p2pasr.protocol.manifest import VerifySection, read_config
from p2pasr.tolerances import COARSE_CLOSE, COARSE_FAR, coarse_settings, tolerant

from .conftest import LORA, run_config

EXAMPLES = Path(__file__).parents[2] / "examples"
COARSE = [{"precision": "bf16"}, {"quantise": "4bit"}, {"quantise": "8bit"}, {"optimizer": "adamw8bit"}]


@st.composite
def sections(draw: st.DrawFn) -> VerifySection:
    far = draw(st.floats(1e-6, 0.99))
    return VerifySection(rate=draw(st.sampled_from([0.0, 0.25])), close=far * draw(st.floats(0.01, 0.33)), far=far)


@given(sections(), st.sampled_from(COARSE))
def test_limits_that_honest_hardware_keeps_stay_and_others_are_refused_where_segments_are_re_run(
    section: VerifySection, config: dict[str, Any]
) -> None:
    if section.rate == 0 or (section.close >= COARSE_CLOSE and section.far >= COARSE_FAR):
        assert tolerant(section, config) == section
    else:
        with pytest.raises(LocalError, match="blames honest hardware in a task with"):
            tolerant(section, config)


@given(sections())
def test_a_task_in_float32_keeps_whatever_its_author_wrote(section: VerifySection) -> None:
    for config in ({}, {"precision": "fp32", "quantise": "none", "optimizer": "adamw"}):
        assert tolerant(section, config) == section
        assert tolerant(VerifySection(), config) == VerifySection()


@pytest.mark.parametrize("config", COARSE)
@given(rate=st.floats(0, 1))
def test_without_limits_of_its_authors_a_coarse_task_gets_the_measured_ones(
    config: dict[str, str], rate: float
) -> None:
    chosen = tolerant(VerifySection(rate=rate), config)
    assert (chosen.close, chosen.far, chosen.rate) == (COARSE_CLOSE, COARSE_FAR, rate)
    assert VerifySection.model_validate(chosen.model_dump()) == chosen


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_gets_limits_that_its_precision_keeps(example: Path) -> None:
    config = read_config(example)
    chosen = tolerant(config.verify, config.task.config)
    assert bool(coarse_settings(config.task.config)) == (chosen.far == COARSE_FAR)


def test_a_run_in_bf16_is_made_with_the_limits_of_bf16(shards: Path) -> None:
    coarse = {"task": {"kind": "lora", "config": {**LORA, "precision": "bf16"}}}
    made = runs.new_run(run_config(**coarse), shards)
    assert (made.verify.close, made.verify.far) == (COARSE_CLOSE, COARSE_FAR)
    with pytest.raises(LocalError, match=r"verify\.close \(0\.001\) blames honest hardware .* precision: bf16"):
        runs.new_run(run_config(**coarse, verify={"close": 1e-3, "far": 5e-3}), shards)
