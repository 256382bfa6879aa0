"""The outer optimizer: torch's trajectory, without torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from p2pasr.averaging import outer
from p2pasr.protocol.manifest import OuterSection
from p2pasr.protocol.tensors import Tensors

from .builders import initial_params


def deltas(rounds: int) -> list[Tensors]:
    random = np.random.default_rng(3)
    return [
        {
            name: random.normal(scale=0.1, size=value.shape).astype(np.float32)
            for name, value in initial_params().items()
        }
        for _ in range(rounds)
    ]


@pytest.mark.parametrize("rate", [1.0, 0.7])
def test_fedavg_adds_the_average_scaled_by_the_rate(rate: float) -> None:
    params, (delta,) = initial_params(), deltas(1)
    moved, moments = outer.step(params, {}, delta, OuterSection(kind="fedavg", learning_rate=rate))
    assert moments == {}
    for name, value in params.items():
        np.testing.assert_array_equal(moved[name], value + np.float32(rate) * delta[name])
        assert moved[name].dtype == np.float32


@pytest.mark.parametrize(("rate", "momentum"), [(0.7, 0.9), (1.0, 0.5), (0.1, 0.0)])
def test_nesterov_follows_torch(rate: float, momentum: float) -> None:
    section = OuterSection(kind="nesterov", learning_rate=rate, momentum=momentum)
    params = initial_params()
    theirs = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in params.items()}
    optimizer = torch.optim.SGD(theirs.values(), lr=rate, momentum=momentum, nesterov=momentum > 0)
    moments: Tensors = {}
    for delta in deltas(12):
        params, moments = outer.step(params, moments, delta, section)
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(-delta[name])
        optimizer.step()
        for name, parameter in theirs.items():
            np.testing.assert_allclose(params[name], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert moments.keys() == params.keys()


def test_the_first_step_of_nesterov_moves_by_the_rate_times_one_plus_the_momentum() -> None:
    params, (delta,) = initial_params(), deltas(1)
    section = OuterSection(kind="nesterov", learning_rate=0.5, momentum=0.9)
    moved, moments = outer.step(params, {}, delta, section)
    for name, value in params.items():
        np.testing.assert_allclose(moved[name] - value, 0.5 * 1.9 * delta[name], rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(moments[name], -delta[name])


def test_nesterov_without_momentum_is_fedavg() -> None:
    params, (delta,) = initial_params(), deltas(1)
    plain, _ = outer.step(params, {}, delta, OuterSection(kind="fedavg", learning_rate=0.7))
    without, _ = outer.step(params, {}, delta, OuterSection(kind="nesterov", learning_rate=0.7, momentum=0.0))
    for name in params:
        np.testing.assert_array_equal(plain[name], without[name])


@pytest.mark.parametrize("kind", ["fedavg", "nesterov"])
def test_a_step_touches_none_of_its_inputs_and_repeats_bit_for_bit(kind: str) -> None:
    section = OuterSection(kind=kind)
    params, (first, second) = initial_params(), deltas(2)
    _, moments = outer.step(params, {}, first, section)
    frozen = [{name: value.copy() for name, value in tensors.items()} for tensors in (params, moments, second)]
    one, other = (outer.step(params, moments, second, section) for _ in range(2))
    for left, right in zip(one, other, strict=True):
        assert all(left[name].tobytes() == right[name].tobytes() for name in left)
    for tensors, copy in zip((params, moments, second), frozen, strict=True):
        assert all(tensors[name].tobytes() == copy[name].tobytes() for name in tensors)


def test_each_operation_rounds_once() -> None:
    section = OuterSection(kind="nesterov", learning_rate=0.7, momentum=0.9)
    params, (first, second) = initial_params(), deltas(2)
    before, moments = outer.step(params, {}, first, section)
    after, _ = outer.step(before, moments, second, section)
    rate, momentum = np.float32(0.7), np.float32(0.9)
    for name, theta in before.items():
        buffer = (momentum * moments[name]).astype(np.float32) + -second[name]
        ahead = -second[name] + (momentum * buffer).astype(np.float32)
        assert after[name].tobytes() == (theta - (rate * ahead).astype(np.float32)).tobytes()
