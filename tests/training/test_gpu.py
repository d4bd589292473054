"""The GPU's training step, its kernels run by Triton's interpreter, against the plain one."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.objective import StepContext
from unbraid.sae.registry import build
from unbraid.training.adam import Adam
from unbraid.training.gpu import GPUTopKStep, fits
from unbraid.training.step import PlainStep
from unbraid.training.steppers import stepper

pytest.importorskip("triton", reason="Triton is not installed")


def _sae(d: int, F: int, k: int, centred: bool = True) -> SAE:
    sae = build(SAEConfig("topk", d, F, k, apply_b_dec_to_input=centred))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 2)
        sae.constrain()
    return sae


# Triton's interpreter multiplies the bits of bfloat16 as if they were whole numbers.
@pytest.mark.parametrize("low", [torch.float16, torch.float32])
@pytest.mark.parametrize("centred", [True, False])
def test_a_run_of_steps_is_the_plain_one(low: torch.dtype, centred: bool) -> None:
    d, F, k, n = 20, 150, 5, 20
    plain = _sae(d, F, k, centred)
    fast = deepcopy(plain)
    adam, other = Adam(plain), Adam(fast)
    step = GPUTopKStep(fast, other, low=low)
    generator = torch.Generator().manual_seed(1)
    for number in range(1, 4):
        x = torch.randn(n, d, generator=generator) * torch.linspace(0.2, 2, d) + 0.3
        target = x if number % 2 else x.roll(1, dims=1).contiguous()
        dead = torch.arange(F) < (0 if number < 2 else 4 if number < 3 else 40)
        context = StepContext(dead, auxk_alpha=0.1)
        wanted = PlainStep(plain, adam).step(x, target, context, number, 1e-2)
        found = step.step(x, target, context, number, 1e-2)
        assert float(found.squared_error) == pytest.approx(float(wanted.squared_error), rel=1e-4)
        assert int(found.active) == int(wanted.active) and torch.equal(found.fired, wanted.fired)
        for part, weight in plain.named_parameters():
            real = (adam.square[part] == 0) | (adam.square[part].sqrt() > 1e-8)
            assert real.float().mean() > 0.8
            torch.testing.assert_close(
                fast.get_parameter(part)[real], weight[real], rtol=1e-3, atol=1e-4, msg=part
            )
    for part, moment in adam.tensors().items():
        torch.testing.assert_close(other.tensors()[part], moment, rtol=1e-2, atol=1e-4, msg=part)
    assert torch.equal(step.shadow, fast.W_enc.detach().T.to(low))


def test_without_a_gpu_it_is_not_chosen() -> None:
    sae = _sae(8, 32, 2)
    assert not fits(sae) and not isinstance(stepper(sae, Adam(sae)), GPUTopKStep)
    assert "Triton" in GPUTopKStep(sae, Adam(sae)).name
