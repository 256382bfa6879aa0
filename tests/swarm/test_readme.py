"""What the README tells a person to type."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from p2pasr.protocol.manifest import RunConfig
from p2pasr.tasks.lora import LoraTaskConfig

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```\n", README, re.DOTALL)


def test_the_library_example_runs_and_is_short(tmp_path: Path) -> None:
    (example,) = [text for language, text in BLOCKS if language == "python"]
    assert len([line for line in example.splitlines() if line.strip()]) <= 30
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^round (\d): CER [\d.]+%$", done.stdout, re.MULTILINE) == ["0", "1", "2"]
    assert (tmp_path / "example" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_run_configuration_is_valid() -> None:
    (text,) = [text for language, text in BLOCKS if language == "yaml"]
    config = RunConfig.model_validate(yaml.safe_load(text.replace("1e-3", "0.001")))
    LoraTaskConfig.model_validate(config.task.config)


def test_every_option_that_the_commands_are_shown_with_exists() -> None:
    helped = {
        "python -m p2pasr.peer": _help("p2pasr.peer"),
        "p2pasr data prepare": _help("p2pasr", "data", "prepare"),
        "p2pasr run new": _help("p2pasr", "run", "new"),
        "p2pasr eval": _help("p2pasr", "eval"),
        "p2pasr export": _help("p2pasr", "export"),
    }
    shown = [line for language, text in BLOCKS if not language for line in text.splitlines()]
    checked = 0
    for line in shown:
        for command, text in helped.items():
            if line.startswith(command):
                for option in re.findall(r"--[a-z-]+", line.split("#")[0]):
                    assert option in text, line
                    checked += 1
    assert checked >= 10


def _help(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, *arguments, "--help"]
    if module == "p2pasr":
        command = [sys.executable, "-c", "from p2pasr.cli import main; main()", *arguments, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
