"""The compiled step against the same step written out in PyTorch."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.kernels.cpu import Precision
from unbraid.sae.objective import StepContext
from unbraid.sae.registry import build
from unbraid.training.adam import Adam
from unbraid.training.compiled import CompiledStep, TopKStep
from unbraid.training.compiled_threshold import BatchTopKStep, OwnThresholdStep
from unbraid.training.step import PlainStep
from unbraid.training.steppers import compiled, stepper


def _sae(
    d: int, F: int, k: int, seed: int = 0, centred: bool = True, kind: str = "topk", **options: Any
) -> SAE:
    k = k if kind in ("topk", "batchtopk", "matryoshka") else 0
    sae = build(SAEConfig(kind, d, F, k, apply_b_dec_to_input=centred, options=options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 2)
        if kind in ("relu", "jumprelu", "matryoshka_jumprelu"):
            sae.b_enc -= 6  # few entries are above the edge, as in the later part of a run
        sae.constrain()
    return sae


def _compiled(sae: SAE, optimizer: Adam, precision: Precision = "float32") -> CompiledStep:
    step = compiled(sae, optimizer, precision=precision)
    assert step is not None
    return step


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk", {}),
    "batchtopk": ("batchtopk", {}),
    "matryoshka": ("matryoshka", {"widths": (10, 40)}),
    "relu": ("relu", {}),
    "jumprelu": ("jumprelu", {"bandwidth": 1.0}),
    "jumprelu, free rows": ("jumprelu", {"bandwidth": 1.0, "free_rows": True, "pre_act": 0.2}),
    "matryoshka_jumprelu": ("matryoshka_jumprelu", {"bandwidth": 1.0, "widths": (10, 40), "pre_act": 0.2}),
    "jumprelu tanh": ("jumprelu", {"bandwidth": 1.0, "penalty": "tanh", "pre_act": 0.2}),
}


@pytest.mark.parametrize("precision", ["int8", "float32"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_steps_is_the_plain_one(kind: str, precision: Precision, centred: bool) -> None:
    d, F, k, n = 16, 96, 5, 600  # more than one chunk of rows
    name, options = KINDS[kind]
    plain = _sae(d, F, k, centred=centred, kind=name, **options)
    fast = deepcopy(plain)
    adam, other = Adam(plain), Adam(fast)
    step = _compiled(fast, other, precision)
    generator = torch.Generator().manual_seed(1)
    for number in range(1, 7):
        x = torch.randn(n, d, generator=generator) * torch.linspace(0.2, 2, d) + 0.3
        target = x if number % 2 else x.roll(1, dims=1).contiguous()
        dead = torch.arange(F) < (0 if number < 3 else 4 if number < 5 else 40)
        context = StepContext(dead, ramp=0.7, auxk_alpha=0.1)
        wanted = PlainStep(plain, adam).step(x, target, context, number, 1e-2)
        found = step.step(x, target, context, number, 1e-2)
        assert float(found.squared_error) == pytest.approx(float(wanted.squared_error), rel=1e-4)
        assert int(found.active) == int(wanted.active) > n / 10 and torch.equal(found.fired, wanted.fired)
        for part, weight in plain.named_parameters():
            # A gradient that is 0 but for rounding moves a weight all the same: Adam divides it by its size.
            real = (adam.square[part] == 0) | (adam.square[part].sqrt() > 1e-8)
            assert real.float().mean() > 0.8
            torch.testing.assert_close(
                fast.get_parameter(part)[real], weight[real], rtol=1e-3, atol=1e-4, msg=part
            )
    assert not isinstance(step, TopKStep) or step.recall == 1
    assert not isinstance(step, OwnThresholdStep) or not step.stale  # it was the compiled way that ran
    for part, moment in adam.tensors().items():
        torch.testing.assert_close(other.tensors()[part], moment, rtol=1e-2, atol=1e-4, msg=part)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "matryoshka_jumprelu"])
def test_while_many_latents_fire_the_plain_step_runs_and_is_left_again(kind: str) -> None:
    plain = _sae(12, 60, 0, kind=kind)
    with torch.no_grad():
        plain.b_enc.add_(6)
    fast = deepcopy(plain)
    adam, other = Adam(plain), Adam(fast)
    step = _compiled(fast, other, "int8")
    assert isinstance(step, OwnThresholdStep)
    for number in range(1, 5):
        if number == 3:
            for sae in (plain, fast):
                with torch.no_grad():
                    sae.b_enc.sub_(6)
        x = torch.randn(300, 12, generator=torch.Generator().manual_seed(number))
        context = StepContext(torch.zeros(60, dtype=torch.bool))
        PlainStep(plain, adam).step(x, x, context, number, 1e-2)
        step.step(x, x, context, number, 1e-2)
        assert step.stale == (number < 3)
    for part, weight in plain.named_parameters():
        torch.testing.assert_close(fast.get_parameter(part), weight, rtol=1e-3, atol=1e-4, msg=part)


@given(
    st.sampled_from(["topk", "batchtopk", "matryoshka"]),
    st.integers(1, 40), st.integers(1, 12), st.integers(1, 80), st.integers(1, 12), st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_one_step_of_any_size(kind: str, n: int, d: int, F: int, k: int, seed: int) -> None:
    plain = _sae(d, F, min(k, F), seed, kind=kind)
    fast = deepcopy(plain)
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed + 1))
    context = StepContext(torch.zeros(F, dtype=torch.bool))
    adam = Adam(plain)
    wanted = PlainStep(plain, adam).step(x, x, context, 1, 1e-2)
    step = _compiled(fast, Adam(fast))
    found = step.step(x, x, context, 1, 1e-2)
    assert float(found.squared_error) == pytest.approx(float(wanted.squared_error), rel=1e-3, abs=1e-4)
    assert torch.equal(found.fired, wanted.fired)
    for name, square in adam.square.items():  # the first step moves by lr whatever the gradient's size
        torch.testing.assert_close(step.optimizer.square[name], square, rtol=1e-2, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "kind", ["topk", "batchtopk", "matryoshka", "relu", "jumprelu", "matryoshka_jumprelu"]
)
def test_threads_do_not_change_a_bit(kind: str) -> None:
    results: list[dict[str, torch.Tensor]] = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            sae = _sae(24, 300, 6, kind=kind)
            step = _compiled(sae, Adam(sae), "int8")
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
    step = _compiled(sae, Adam(sae), "int8")
    assert isinstance(step, TopKStep)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=torch.Generator().manual_seed(9)))
    step.refresh()
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(3))
    wanted = deepcopy(sae).encode(x).dense(64) > 0
    found = step.step(x, x, StepContext(torch.zeros(64, dtype=torch.bool)), 1, 0.0)
    assert torch.equal(found.fired, wanted.any(dim=0)) and step.recall == 1


def test_what_has_no_compiled_step_is_left_to_pytorch() -> None:
    def way(sae: SAE) -> type[Any]:
        return type(stepper(sae, Adam(sae)))

    assert way(_sae(4, 8, 2)) is TopKStep and way(_sae(4, 8, 2, kind="matryoshka")) is BatchTopKStep
    for other in (
        _sae(4, 8, 2).double(),
        _sae(4, 8, 2, kind="gated"),
        _sae(4, 8, 2, kind="jumprelu", through_encoder=True),
        build(SAEConfig("transcoder", 4, 8, 2, d_out=4)),
    ):
        assert way(other) is PlainStep
    sae = _sae(4, 8, 2)
    assert type(stepper(sae, Adam(sae), "plain")) is PlainStep
