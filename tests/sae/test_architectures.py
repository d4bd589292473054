"""Each architecture against its formula, written out densely; edits against encoding and decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from unbraid.manifest.errors import UserError
from unbraid.model.edits import apply_reference
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.batchtopk import BatchTopKSAE
from unbraid.sae.registry import build

RandomSAE = Callable[..., SAE]


def _x(n: int, d_in: int = 12, seed: int = 3) -> torch.Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def _dense_pre(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    return (x - sae.b_dec) @ sae.W_enc + sae.b_enc


def test_topk_keeps_the_k_largest(random_sae: RandomSAE) -> None:
    sae, x = random_sae("topk"), _x(700)
    pre = _dense_pre(sae, x)
    kept = pre >= pre.topk(4, dim=1).values[:, -1:]
    torch.testing.assert_close(sae.encode_dense(x), pre.relu() * kept)
    torch.testing.assert_close(sae(x).x_hat, (pre.relu() * kept) @ sae.W_dec + sae.b_dec)


def test_relu_and_jumprelu_keep_what_exceeds_their_thresholds(random_sae: RandomSAE) -> None:
    x = _x(700)
    relu, jump = random_sae("relu"), random_sae("jumprelu")
    torch.testing.assert_close(relu.encode_dense(x), _dense_pre(relu, x).relu())
    pre = _dense_pre(jump, x)
    torch.testing.assert_close(jump.encode_dense(x), pre * (pre > jump.threshold))


@pytest.mark.parametrize("heavy", [1.0, 40.0])
def test_batchtopk_keeps_the_largest_of_the_batch(random_sae: RandomSAE, heavy: float) -> None:
    sae, x = random_sae("batchtopk"), _x(50)
    x[:2] *= heavy  # with 40, two rows want far more than their first candidates
    pre = _dense_pre(sae, x)
    cut = pre.flatten().sort(descending=True).values[50 * 4]
    codes = sae.encode(x)
    torch.testing.assert_close(codes.dense(64), pre.relu() * (pre > cut))
    assert int(codes.l0().sum()) == 50 * 4
    if heavy > 1:
        assert int(codes.l0().max()) > 4 * 4
    gradient = torch.autograd.grad(sae(x).x_hat.square().sum(), sae.W_enc)[0]
    dense = ((_dense_pre(sae, x).relu() * (pre > cut)) @ sae.W_dec + sae.b_dec).square().sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(dense, sae.W_enc)[0], rtol=1e-3, atol=1e-2)


def test_batchtopk_with_its_threshold_is_a_jumprelu(random_sae: RandomSAE) -> None:
    sae, x = random_sae("batchtopk"), _x(50)
    assert isinstance(sae, BatchTopKSAE)
    threshold = sae.batch_threshold(x)
    jump = sae.with_threshold(threshold)
    # The largest value that does not fire is the threshold, and may be above it in another order of summing.
    clear = (sae.pre_activations(x) - threshold).abs() > 1e-4
    assert int((~clear).sum()) <= 2
    torch.testing.assert_close(jump.encode_dense(x) * clear, sae.encode_dense(x) * clear)
    assert jump.config.architecture == "jumprelu"


def test_input_is_not_centred_where_the_configuration_says_so(random_sae: RandomSAE) -> None:
    sae = random_sae("relu")
    plain = build(replace(sae.config, apply_b_dec_to_input=False))
    plain.load_state_dict(sae.state_dict())
    x = _x(5)
    torch.testing.assert_close(plain.encode_dense(x), (x @ sae.W_enc + sae.b_enc).relu())


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated"])
@pytest.mark.parametrize(("operation", "value"), [("clamp", 3.0), ("scale", 0.25), ("ablate", 0.0)])
def test_an_edit_does_what_encode_set_decode_does(
    random_sae: RandomSAE, architecture: str, operation: str, value: float
) -> None:
    sae, x, latents = random_sae(architecture), _x(300), [5, 9]
    edit = sae.latent_edit(latents, operation, value)  # pyright: ignore[reportArgumentType]
    assert (str(edit.site), edit.positions) == ("layers.1.resid_post", "reply")
    with torch.no_grad():
        codes = sae.encode_dense(x).double()
        changed = codes.clone()
        for j in latents:
            on = codes[:, j] > 0
            new = torch.full_like(codes[:, j], value) if operation == "clamp" else codes[:, j] * value
            changed[:, j] = torch.where(on, new, codes[:, j])
        expected = x.double() + (changed - codes) @ sae.W_dec.double()
    result, fired = apply_reference(x.numpy(), edit)
    np.testing.assert_allclose(result, expected.numpy(), atol=1e-4)
    assert (fired == (codes[:, latents] > 0).any(dim=1).numpy()).all() and fired.any() and not fired.all()


def test_an_edit_of_topk_uses_the_measured_threshold_or_the_given_one(random_sae: RandomSAE) -> None:
    sae = random_sae("topk")
    assert sae.latent_edit([1, 2], "ablate").threshold.tolist() == [0, 0]
    sae.register_buffer("threshold", torch.arange(64.0))
    assert sae.latent_edit([1, 2], "ablate").threshold.tolist() == [1, 2]
    always = sae.latent_edit([1, 2], "add", 2.0, thresholds=[float("-inf")] * 2)
    assert apply_reference(_x(20).numpy(), always)[1].all()


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (SAEConfig("topk", 4, 8, 9), "k is 9"),
        (SAEConfig("topk", 4, 8, 0), "k of 1"),
        (SAEConfig("batchtopk", 4, 8, 0), "k of 1"),
        (SAEConfig("topk", 4, 0, 1), "width 0"),
        (SAEConfig("topkk", 4, 8, 1), "'topkk'"),
    ],
)
def test_impossible_configurations_are_the_users_mistake(config: SAEConfig, word: str) -> None:
    with pytest.raises(UserError, match=word):
        build(config)


def test_an_edit_needs_a_latent_that_exists(random_sae: RandomSAE) -> None:
    with pytest.raises(UserError, match="latent 64"):
        random_sae("relu").latent_edit([64], "ablate")
