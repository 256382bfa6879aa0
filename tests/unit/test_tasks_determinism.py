"""The same inputs give the same bits: in this process, in another one, and in years to come."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.protocol.encoding import blob_digest
from p2pasr.tasks.determinism import hardware_class, reproducible, shuffled, uniform

from .conftest import MODEL

CPU = torch.device("cpu")

SEGMENT = f"""
import sys
from pathlib import Path
import torch
from p2pasr.protocol.encoding import blob_digest
from p2pasr.tasks import Checkpoint, SegmentPlan, build

torch.set_num_threads(1)
task = build("lora", {{"model": "{MODEL}", "rank": 4, "warmup_steps": 0}}, seed=1)
checkpoint = Checkpoint(task.initial_params())
for number in range(2):
    plan = SegmentPlan(bytes([number]) * 32, 3, 4, 3 * number, 100)
    checkpoint, _ = task.segment(checkpoint, [Path(path) for path in sys.argv[1:]], plan)
print(blob_digest(checkpoint.pack()).hex())
"""


def test_a_segment_in_two_processes_gives_the_same_bits(shard_files: Sequence[Path]) -> None:
    command = [sys.executable, "-c", SEGMENT, *map(str, shard_files)]
    quiet, busy = (
        {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
        {
            **os.environ,
            "PYTHONHASHSEED": "2",
            "OMP_NUM_THREADS": "2",
            "OMP_SCHEDULE": "dynamic",
            "MKL_NUM_THREADS": "2",
        },
    )
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) for environ in (quiet, busy)]
    one, other = (process.communicate()[0] for process in processes)

    assert [process.returncode for process in processes] == [0, 0]
    assert len(bytes.fromhex(one.decode())) == 32
    assert one == other


# --- dice ---------------------------------------------------------------------------------------


@given(count=st.integers(0, 300), key=st.binary(min_size=1, max_size=64))
def test_shuffling_gives_every_number_once(count: int, key: bytes) -> None:
    assert sorted(shuffled(count, key)) == list(range(count))


def test_shuffling_gives_every_order_about_as_often() -> None:
    orders = [tuple(shuffled(3, bytes([high, low]))) for high in range(6) for low in range(200)]

    counts = [orders.count(order) for order in {*orders}]
    assert len(counts) == 6
    assert min(counts) > 150


def test_the_order_of_a_key_will_never_change() -> None:
    assert shuffled(10, b"p2pasr") == [2, 6, 5, 9, 3, 4, 8, 7, 0, 1]


def test_the_values_of_a_key_will_never_change() -> None:
    values = uniform((3, 50), 0.125, b"p2pasr")

    assert blob_digest(values.tobytes()).hex() == "3a8a763d08b99b71e8eb473e917dacb647f8d31b7b32a13a716a5681040d7977"


@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    bound=st.floats(1e-6, 100),
    key=st.binary(min_size=1, max_size=32),
)
def test_uniform_values_lie_within_their_bound(shape: list[int], bound: float, key: bytes) -> None:
    values = uniform(tuple(shape), bound, key)

    assert values.shape == tuple(shape)
    assert values.dtype == np.float32
    assert (-np.float32(bound) <= values).all()
    assert (values < np.float32(bound)).all()


def test_uniform_values_are_spread_evenly() -> None:
    values = uniform((100, 100), 1.0, b"even")

    shares, _ = np.histogram(values, bins=10, range=(-1, 1))
    assert (np.abs(shares - 1000) < 150).all()


# --- torch --------------------------------------------------------------------------------------


def test_a_reproducible_block_draws_the_same_numbers() -> None:
    draws = []
    for _ in range(2):
        torch.rand(3)
        with reproducible(b"seed", CPU):
            draws.append(torch.rand(5))
    with reproducible(b"other", CPU):
        draws.append(torch.rand(5))

    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def break_down_inside() -> None:
    with reproducible(b"seed", CPU):
        assert torch.are_deterministic_algorithms_enabled()
        torch.rand(3)
        raise KeyError


@pytest.mark.parametrize("before", [False, True])
def test_a_reproducible_block_leaves_everything_as_it_was(before: bool) -> None:
    torch.use_deterministic_algorithms(before)
    try:
        torch.manual_seed(5)
        wanted = torch.rand(3)
        torch.manual_seed(5)
        with pytest.raises(KeyError):
            break_down_inside()

        assert torch.equal(torch.rand(3), wanted)
        assert torch.are_deterministic_algorithms_enabled() is before
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_hardware_class_names_what_changes_bits() -> None:
    one = hardware_class(CPU, "fp32")
    torch.set_num_threads(2)
    try:
        two = hardware_class(CPU, "fp32")
    finally:
        torch.set_num_threads(1)

    assert "/1t/" in one
    assert "/2t/" in two
    assert f"torch{torch.__version__}" in one
    assert hardware_class(CPU, "bf16") != one
    assert " " not in one
