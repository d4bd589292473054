"""The compiled step against the same step written out in PyTorch."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.kernels.cpu import Precision
from unbraid.sae.objective import StepContext
from unbraid.sae.registry import build
from unbraid.training.adam import Adam
from unbraid.training.compiled import CompiledStep
from unbraid.training.step import PlainStep, stepper


def _sae(d: int, F: int, k: int, seed: int = 0, centred: bool = True) -> SAE:
    sae = build(SAEConfig("topk", d, F, k, apply_b_dec_to_input=centred))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 2)
        sae.constrain()
    return sae


@pytest.mark.parametrize("precision", ["int8", "float32"])
@pytest.mark.parametrize("centred", [True, False])
def test_a_run_of_steps_is_the_plain_one(precision: Precision, centred: bool) -> None:
    d, F, k, n = 16, 96, 5, 600  # more than one chunk of rows
    plain = _sae(d, F, k, centred=centred)
    fast = deepcopy(plain)
    adam, other = Adam(plain), Adam(fast)
    step = CompiledStep(fast, other, precision=precision)
    generator = torch.Generator().manual_seed(1)
    for number in range(1, 7):
        x = torch.randn(n, d, generator=generator) * torch.linspace(0.2, 2, d) + 0.3
        target = x if number % 2 else x.roll(1, dims=1).contiguous()
        dead = torch.arange(F) < (0 if number < 3 else 4 if number < 5 else 40)
        context = StepContext(dead, auxk_alpha=0.1)
        wanted = PlainStep(plain, adam).step(x, target, context, number, 1e-2)
        found = step.step(x, target, context, number, 1e-2)
        assert float(found.squared_error) == pytest.approx(float(wanted.squared_error), rel=1e-4)
        assert int(found.active) == int(wanted.active) and torch.equal(found.fired, wanted.fired)
        for name, weight in plain.named_parameters():
            torch.testing.assert_close(fast.get_parameter(name), weight, rtol=1e-3, atol=1e-4, msg=name)
    assert step.recall == 1
    for name, moment in adam.tensors().items():
        torch.testing.assert_close(other.tensors()[name], moment, rtol=1e-2, atol=1e-4, msg=name)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 80), st.integers(1, 12), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_one_step_of_any_size(n: int, d: int, F: int, k: int, seed: int) -> None:
    plain = _sae(d, F, min(k, F), seed)
    fast = deepcopy(plain)
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed + 1))
    context = StepContext(torch.zeros(F, dtype=torch.bool))
    adam = Adam(plain)
    wanted = PlainStep(plain, adam).step(x, x, context, 1, 1e-2)
    step = CompiledStep(fast, Adam(fast), precision="float32")
    found = step.step(x, x, context, 1, 1e-2)
    assert float(found.squared_error) == pytest.approx(float(wanted.squared_error), rel=1e-3, abs=1e-4)
    assert torch.equal(found.fired, wanted.fired)
    for name, square in adam.square.items():  # the first step moves by lr whatever the gradient's size
        torch.testing.assert_close(step.optimizer.square[name], square, rtol=1e-2, atol=1e-6, msg=name)


def test_threads_do_not_change_a_bit() -> None:
    results: list[dict[str, torch.Tensor]] = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            sae = _sae(24, 300, 6)
            step = CompiledStep(sae, Adam(sae))
            generator = torch.Generator().manual_seed(2)
            for number in range(1, 4):
                x = torch.randn(1500, 24, generator=generator)
                step.step(x, x, StepContext(torch.zeros(300, dtype=torch.bool)), number, 1e-3)
        finally:
            torch.set_num_threads(before)
        results.append({name: value.clone() for name, value in sae.state_dict().items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_weights_changed_from_outside_are_noticed() -> None:
    sae = _sae(8, 64, 4)
    step = CompiledStep(sae, Adam(sae), precision="int8")
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=torch.Generator().manual_seed(9)))
    step.refresh()
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(3))
    wanted = deepcopy(sae).encode(x).dense(64) > 0
    found = step.step(x, x, StepContext(torch.zeros(64, dtype=torch.bool)), 1, 0.0)
    assert torch.equal(found.fired, wanted.any(dim=0)) and step.recall == 1


def test_other_architectures_are_left_to_pytorch() -> None:
    assert CompiledStep.serves(_sae(4, 8, 2))
    assert not CompiledStep.serves(build(SAEConfig("relu", 4, 8)))
    assert not CompiledStep.serves(build(SAEConfig("batchtopk", 4, 8, 2)))
    assert not CompiledStep.serves(_sae(4, 8, 2).double())
    sae = _sae(4, 8, 2)
    assert isinstance(stepper(sae, Adam(sae)), CompiledStep)
    assert isinstance(stepper(sae, Adam(sae), "plain"), PlainStep)
