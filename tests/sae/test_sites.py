"""Matryoshka, transcoders, crosscoders and the cross-layer transcoder against their formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from unbraid.manifest.errors import UserError
from unbraid.sae import elementwise
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.clt import CrossLayerTranscoder
from unbraid.sae.objective import StepContext
from unbraid.sae.registry import ARCHITECTURES, build
from unbraid.sae.scaling import Scaling

SEEDS = st.integers(0, 10_000)
ALL = {
    "crosscoder": SAEConfig("crosscoder", 12, 40, blocks=(5, 7)),
    "clt": SAEConfig("clt", 12, 42, d_out=9, blocks=(4, 4, 4)),
    "jumprelu_skip_transcoder": SAEConfig("jumprelu_skip_transcoder", 12, 40, d_out=7),
    "jumprelu_transcoder": SAEConfig("jumprelu_transcoder", 12, 40, d_out=7),
    "topk_skip_transcoder": SAEConfig("topk_skip_transcoder", 12, 40, 4, d_out=7),
    "gated": SAEConfig("gated", 12, 40),
    "jumprelu": SAEConfig("jumprelu", 12, 40),
    "relu without centring": SAEConfig("relu", 12, 40, apply_b_dec_to_input=False),
    "gated without centring": SAEConfig("gated", 12, 40, apply_b_dec_to_input=False),
    "topk": SAEConfig("topk", 12, 40, 4),
    "lista": SAEConfig("lista", 12, 40, 4),
    "matching_pursuit": SAEConfig("matching_pursuit", 12, 40, 4, options={"residual_threshold": 0.8}),
}


def _filled(config: SAEConfig, seed: int = 0) -> SAE:
    sae = build(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) / 2)
        sae.constrain()
    return sae


def _decoder(sae: SAE) -> Tensor:
    """Decoder rows (d_sae, d_out); a cross-layer transcoder's with zeros where it has none."""
    if not isinstance(sae, CrossLayerTranscoder):
        return sae.W_dec
    missing = [(0, 0, 0, sae.config.d_sae - len(part)) for part in sae.decoders()]
    return torch.cat([pad(part, m) for part, m in zip(sae.decoders(), missing, strict=True)], dim=1)


def _x(n: int, d: int, seed: int = 1) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def _same_gradients(sae: SAE, x: Tensor, target: Tensor, loss: Tensor, ramp: float = 1.0) -> None:
    loss.backward()
    expected = {name: p.grad for name, p in sae.named_parameters()}
    for share in (0.0, 2.0):
        sae.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(elementwise, "DENSE_SHARE", share)
            sae.backward(x, target, StepContext(torch.zeros(sae.config.d_sae, dtype=torch.bool), ramp=ramp))
        for name, p in sae.named_parameters():
            wanted, found = expected[name], p.grad
            if wanted is None or found is None:  # sparse products leave out what has no gradient
                assert not any(t is not None and t.any() for t in (wanted, found)), name
            else:
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.lists(st.integers(1, 39), max_size=4, unique=True))
def test_matryoshka_averages_over_its_prefixes(seed: int, widths: list[int]) -> None:
    widths = sorted(widths) or [2, 5, 10, 20]
    sae = _filled(SAEConfig("matryoshka", 6, 40, 3, options={"widths": tuple(widths)}), seed)
    x = _x(11, 6, seed)
    codes = sae.encode_dense(x)
    assert int((codes > 0).sum()) <= 33
    errors = [(x - codes[:, :w] @ sae.W_dec[:w] - sae.b_dec).square().mean() for w in (*widths, 40)]
    _same_gradients(sae, x, x, torch.stack(errors).mean())


@pytest.mark.parametrize(("name", "k"), [("matryoshka", 3), ("matryoshka_jumprelu", 0)])
def test_matryoshka_is_used_as_jumprelu_and_refuses_widths_that_do_not_nest(name: str, k: int) -> None:
    sae = _filled(SAEConfig(name, 6, 40, k))
    ready = sae.calibrated([_x(50, 6)])
    assert ready.config.architecture == "jumprelu" and not ready.config.options
    assert ready.config.metadata["matryoshka_widths"] == [2, 5, 10, 20, 40]
    if not k:  # its thresholds are its own
        assert torch.equal(ready.encode_dense(_x(9, 6)), sae.encode_dense(_x(9, 6)))
    for widths in ([5, 5], [9, 3], [3, 40]):
        with pytest.raises(UserError, match="must rise"):
            build(SAEConfig(name, 6, 40, k, options={"widths": tuple(widths)}))


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from(["skip_transcoder", "topk_skip_transcoder"]))
def test_a_skip_transcoder_predicts_another_site(seed: int, architecture: str) -> None:
    sae = _filled(SAEConfig(architecture, 6, 40, 3, d_out=5), seed)
    x, y = _x(11, 6, seed), _x(11, 5, seed + 1)
    pre = x @ sae.W_enc + sae.b_enc
    if architecture == "topk_skip_transcoder":
        cut = pre.topk(4, dim=1).values[:, 3:]
    else:
        cut = pre.flatten().sort(descending=True).values[33]
    codes = pre.relu() * (pre > cut)
    torch.testing.assert_close(sae.encode_dense(x), codes)
    y_hat = codes @ sae.W_dec + sae.b_dec + x @ sae.get_parameter("W_skip").T
    torch.testing.assert_close(sae(x).x_hat, y_hat)
    _same_gradients(sae, x, y, (y - y_hat).square().mean())


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_a_crosscoder_pays_for_each_site(seed: int) -> None:
    sae = _filled(SAEConfig("crosscoder", 12, 40, blocks=(5, 7), options={"l1": 0.3}), seed)
    x = _x(11, 12, seed)
    codes = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    norms = sae.W_dec[:, :5].norm(dim=1) + sae.W_dec[:, 5:].norm(dim=1)
    error = (x - codes @ sae.W_dec - sae.b_dec).square().sum()
    _same_gradients(sae, x, x, (error + 0.5 * 0.3 * (codes * norms).sum()) / x.numel(), ramp=0.5)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_a_cross_layer_transcoder_writes_forward_alone(seed: int) -> None:
    layers, d, each, d_out = 3, 4, 14, 2
    sae = _filled(SAEConfig("clt", 12, 42, d_out=6, blocks=(4, 4, 4), options={"l0": 0.2}), seed)
    x, y = _x(11, 12, seed), _x(11, 6, seed + 1)
    theta, codes, y_hat = sae.threshold, [], sae.b_dec.repeat(11, 1)
    assert theta is not None
    for layer in range(layers):
        own = slice(layer * each, (layer + 1) * each)
        p = x[:, layer * d : (layer + 1) * d] @ sae.W_enc[:, own] + sae.b_enc[own]
        window = ((p - theta[own]).abs() < 0.15).float().detach() * (p > 0) / 0.3
        above = p - theta[own]
        f = p * ((p > theta[own]) & (p > 0)) + theta[own].detach() * window * (above - above.detach())
        codes.append(f)
        y_hat = y_hat + f @ _decoder(sae)[own]
    f = torch.cat(codes, dim=1)
    torch.testing.assert_close(sae.encode_dense(x), f)
    torch.testing.assert_close(sae(x).x_hat, y_hat)
    cost = (4 * f * _decoder(sae).norm(dim=1)).tanh().sum()
    _same_gradients(sae, x, y, ((y - y_hat).square().sum() + 0.2 * cost) / y.numel())
    for layer in range(layers):
        own = _decoder(sae)[layer * each : (layer + 1) * each] != 0
        assert own.all(dim=0).tolist() == [False] * (layer * d_out) + [True] * ((layers - layer) * d_out)
    assert len(sae.W_dec) == 42 * 4 / 2  # of 42 · 3 rows


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_a_latent_of_a_cross_layer_transcoder_is_all_its_rows(seed: int) -> None:
    sae = _filled(ALL["clt"], seed)
    torch.testing.assert_close(_decoder(sae).norm(dim=1), torch.ones(42))
    generator = torch.Generator().manual_seed(seed)
    sae.W_dec.grad = torch.randn(sae.W_dec.shape, generator=generator)
    sae.constrain_gradient()
    left = build(sae.config)
    left.W_dec.data = sae.W_dec.grad
    assert (_decoder(left) * _decoder(sae)).sum(dim=1).abs().max() < 1e-5 and left.W_dec.any()
    latents = torch.tensor([1, 20])
    rows = sae.places("W_dec", latents)
    assert len(rows) == 3 + 2 and torch.equal(sae.places("b_enc", latents), latents)
    with torch.no_grad():
        sae.W_dec[rows] = 0
    assert (_decoder(sae).norm(dim=1) < 0.5).nonzero().squeeze(1).tolist() == [1, 20]


@pytest.mark.parametrize("name", ALL)
def test_folding_changes_units_and_nothing_else(name: str) -> None:
    config = ALL[name]
    sae, across = _filled(config), bool(config.d_out)
    raw = 3.0 * _x(60, config.d_in) + 5.0
    raw_y = 9.0 * _x(60, config.d_out, 2) - 4.0 if across else raw
    source = Scaling.of(raw, config.blocks or (config.d_in,))
    target = Scaling.of(raw_y, (3, 3, 3) if name == "clt" else (config.d_out,)) if across else source
    assert source is not None and target is not None
    with torch.no_grad():
        before = sae(source(raw))
        codes = before.codes.dense(config.d_sae)
        sae.fold(source, target)
        after = sae(raw)
    assert 0 < float((codes > 0).double().mean()) < 1
    torch.testing.assert_close(
        after.codes.dense(config.d_sae) * target.unit, codes, rtol=1e-3, atol=1e-3 * float(codes.max())
    )
    torch.testing.assert_close(target(after.x_hat), before.x_hat, rtol=1e-3, atol=1e-3)


def test_a_new_latent_points_at_its_activation() -> None:
    for name, config in ALL.items():
        sae = _filled(config)
        x, y = _x(3, config.d_in), _x(3, config.d_out or config.d_in, 2)
        latents = torch.tensor([1, 20, 39])
        untouched = _decoder(sae)[2].clone()
        sae.revive(latents, x, y if config.d_out else x)
        torch.testing.assert_close(_decoder(sae)[latents].norm(dim=1), torch.ones(3), msg=name)
        assert torch.equal(_decoder(sae)[2], untouched), name
        towards = (_decoder(sae)[latents] * ((y if config.d_out else x) - sae.b_dec)).sum(dim=1)
        assert (towards > 0).all(), name


@pytest.mark.parametrize("name", ["crosscoder", "clt", "jumprelu_transcoder", "topk_skip_transcoder"])
def test_latents_of_several_sites_cannot_be_edited(name: str) -> None:
    with pytest.raises(UserError, match=r"cannot be edited|an edit acts at one site"):
        _filled(ALL[name]).latent_edit([1], "ablate", site=None)


@pytest.mark.parametrize(
    "config",
    [
        SAEConfig("crosscoder", 12, 40),
        SAEConfig("crosscoder", 12, 40, blocks=(5, 5)),
        SAEConfig("clt", 12, 42, d_out=9, blocks=(5, 7)),
        SAEConfig("clt", 12, 42, d_out=9, blocks=(4, 4, 4), options={"free_rows": True}),
        SAEConfig("clt", 12, 40, d_out=9, blocks=(4, 4, 4)),
    ],
)
def test_blocks_that_do_not_fit_are_refused(config: SAEConfig) -> None:
    with pytest.raises(UserError):
        build(config)


def test_every_architecture_says_how_it_is_trained() -> None:
    """A line in the registry is all there is besides the architecture's file."""
    for name, kind in ARCHITECTURES.items():
        assert kind.Options(), name
        assert kind.__doc__ and kind.against_death, name
