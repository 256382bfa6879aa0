"""The outer optimizer: torch's trajectory, without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    moved, moments = outer.step(params, {}, delta, OuterSection(kind="fedavg", learning_rate=rate), 0)
    assert moments == {}
    for name, value in params.items():
        np.testing.assert_array_equal(moved[name], value + np.float32(rate) * delta[name])
        assert moved[name].dtype == np.float32


def follow(section: OuterSection, make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> Tensors:
    """Take twelve steps beside torch's optimizer; returns the last moments."""
    params = initial_params()
    theirs = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in params.items()}
    optimizer = make(list(theirs.values()))
    moments: Tensors = {}
    for number, delta in enumerate(deltas(12)):
        params, moments = outer.step(params, moments, delta, section, number)
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(-delta[name])
        optimizer.step()
        for name, parameter in theirs.items():
            np.testing.assert_allclose(params[name], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
    return moments


@pytest.mark.parametrize("kind", ["nesterov", "fedavgm"])
@pytest.mark.parametrize(("rate", "momentum"), [(0.7, 0.9), (1.0, 0.5), (0.1, 0.0)])
def test_momentum_follows_torch(kind: Literal["nesterov", "fedavgm"], rate: float, momentum: float) -> None:
    section = OuterSection(kind=kind, learning_rate=rate, momentum=momentum)
    nesterov = kind == "nesterov" and momentum > 0
    moments = follow(section, lambda p: torch.optim.SGD(p, lr=rate, momentum=momentum, nesterov=nesterov))
    assert moments.keys() == initial_params().keys()


@pytest.mark.parametrize(("rate", "betas", "epsilon"), [(0.1, (0.9, 0.99), 1e-3), (0.01, (0.0, 0.999), 1e-8)])
def test_fedadam_follows_torch(rate: float, betas: tuple[float, float], epsilon: float) -> None:
    section = OuterSection(kind="fedadam", learning_rate=rate, momentum=betas[0], beta2=betas[1], epsilon=epsilon)
    moments = follow(section, lambda p: torch.optim.Adam(p, lr=rate, betas=betas, eps=epsilon))
    assert moments.keys() == {f"{moment}/{name}" for moment in ("first", "second") for name in initial_params()}


def test_the_first_step_of_nesterov_moves_by_the_rate_times_one_plus_the_momentum() -> None:
    params, (delta,) = initial_params(), deltas(1)
    section = OuterSection(kind="nesterov", learning_rate=0.5, momentum=0.9)
    moved, moments = outer.step(params, {}, delta, section, 0)
    for name, value in params.items():
        np.testing.assert_allclose(moved[name] - value, 0.5 * 1.9 * delta[name], rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(moments[name], -delta[name])


def test_nesterov_without_momentum_is_fedavg() -> None:
    params, (delta,) = initial_params(), deltas(1)
    plain, _ = outer.step(params, {}, delta, OuterSection(kind="fedavg", learning_rate=0.7), 0)
    without, _ = outer.step(params, {}, delta, OuterSection(kind="nesterov", learning_rate=0.7, momentum=0.0), 0)
    for name in params:
        np.testing.assert_array_equal(plain[name], without[name])


@pytest.mark.parametrize("kind", ["fedavg", "fedavgm", "nesterov", "fedadam"])
def test_a_step_touches_none_of_its_inputs_and_repeats_bit_for_bit(kind: str) -> None:
    section = OuterSection(kind=kind)
    params, (first, second) = initial_params(), deltas(2)
    _, moments = outer.step(params, {}, first, section, 0)
    frozen = [{name: value.copy() for name, value in tensors.items()} for tensors in (params, moments, second)]
    one, other = (outer.step(params, moments, second, section, 1) for _ in range(2))
    for left, right in zip(one, other, strict=True):
        assert all(left[name].tobytes() == right[name].tobytes() for name in left)
    for tensors, copy in zip((params, moments, second), frozen, strict=True):
        assert all(tensors[name].tobytes() == copy[name].tobytes() for name in tensors)


def test_each_operation_rounds_once() -> None:
    section = OuterSection(kind="nesterov", learning_rate=0.7, momentum=0.9)
    params, (first, second) = initial_params(), deltas(2)
    before, moments = outer.step(params, {}, first, section, 0)
    after, _ = outer.step(before, moments, second, section, 1)
    rate, momentum = np.float32(0.7), np.float32(0.9)
    for name, theta in before.items():
        buffer = (momentum * moments[name]).astype(np.float32) + -second[name]
        ahead = -second[name] + (momentum * buffer).astype(np.float32)
        assert after[name].tobytes() == (theta - (rate * ahead).astype(np.float32)).tobytes()


@given(st.integers(2, 5), st.integers(1, 4), st.sampled_from(["fedavgm", "nesterov", "fedadam"]))
def test_a_restart_is_a_first_step_from_where_the_parameters_are(every: int, turns: int, kind: str) -> None:
    section = OuterSection.model_validate({"kind": kind, "restart_rounds": every})
    params, moments = initial_params(), {}
    steps = deltas(every * turns + 2)
    for number, delta in enumerate(steps[: every * turns]):
        params, moments = outer.step(params, moments, delta, section, number)
    anew, nothing = params, {}
    for number, delta in enumerate(steps[every * turns :]):
        params, moments = outer.step(params, moments, delta, section, every * turns + number)
        anew, nothing = outer.step(anew, nothing, delta, OuterSection.model_validate({"kind": kind}), number)
    assert all(value.tobytes() == anew[name].tobytes() for name, value in params.items())
    assert all(value.tobytes() == nothing[name].tobytes() for name, value in moments.items())


@given(st.integers(2, 9), st.integers(0, 40), st.integers(0, 40))
def test_restarts_are_the_multiples_of_their_interval(every: int, first: int, length: int) -> None:
    section = OuterSection(restart_rounds=every)
    within = any(number and number % every == 0 for number in range(first, first + length + 1))
    assert section.restarts(first, first + length) == within
    assert not OuterSection().restarts(first, first + length)
