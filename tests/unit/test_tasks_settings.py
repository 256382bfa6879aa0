"""What `p2pasr task settings` prints is what a manifest's task section takes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from p2pasr.cli import app
from p2pasr.tasks import KINDS
from p2pasr.tasks.settings import REQUIRED, settings


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_has_a_meaning_values_and_a_default(kind: str) -> None:
    for shape, rows in settings(kind).items():
        assert rows, shape
        for row in rows:
            assert row.meaning.endswith("."), f"{shape}: {row.name} says nothing about itself"
            assert row.values
            assert row.default == REQUIRED or json.loads(row.default) is not ...


def test_settings_that_lie_in_a_section_of_their_own_are_listed_with_its_name() -> None:
    rows = {row.name: row for row in settings("lora")["lora"]}
    assert rows["spec_augment.time_masks"].default == "2"
    assert rows["learning_rate"].values == "number 0 < … ≤ 1"
    assert rows["model"].default == REQUIRED
    assert rows["quantise"].values == "none, 8bit, 4bit"


def test_the_command_lists_one_architecture_where_it_is_asked_for_one() -> None:
    wide = {"COLUMNS": "200"}
    everything = CliRunner().invoke(app, ["task", "settings", "student"], env=wide)
    one = CliRunner().invoke(app, ["task", "settings", "student", "zipformer-ctc"], env=wide)
    assert everything.exit_code == one.exit_code == 0
    assert "sizes.kernels" in one.stdout
    assert "decoder_layers" not in one.stdout
    assert len(one.stdout) < len(everything.stdout) / 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "there is no task 'nothing'; there are lora, full"),
        (["student", "tall"], "task 'student' has no architecture 'tall'; it has whisper, distil-whisper"),
        (["lora", "whisper"], "task 'lora' has no architecture 'whisper'"),
    ],
)
def test_what_there_is_not_is_said_in_a_sentence(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["task", "settings", *arguments])
    assert result.exit_code != 0
    assert sentence in str(result.exception)


def test_an_editor_gets_a_schema() -> None:
    result = CliRunner().invoke(app, ["task", "settings", "distill", "--json"])
    assert json.loads(result.stdout)["properties"]["alpha"]["default"] == 0.7
