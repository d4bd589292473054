"""Streamed sums against the definitions written out over all tokens at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unbraid.evaluation.reconstruction import Reconstruction
from unbraid.sae.base import SAEOutput
from unbraid.sae.codes import SparseCodes

N, D, F = 300, 7, 20


def _data(seed: int = 0, offset: float = 30.0) -> tuple[torch.Tensor, torch.Tensor, SparseCodes]:
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(N, D, generator=generator) + offset
    )  # far from the origin: a variance about zero is far off
    x_hat = x + 0.4 * torch.randn(N, D, generator=generator)
    dense = torch.rand(N, F, generator=generator) * (torch.rand(N, F, generator=generator) < 0.15)
    dense[:, [3, 11]] = 0  # dead
    dense[:, 5] = 0
    dense[7, 5] = 1.0  # fires at 1 of 300 tokens
    return x, x_hat, SparseCodes.from_dense(dense)


def _streamed(x: torch.Tensor, x_hat: torch.Tensor, codes: SparseCodes, sizes: list[int]) -> Reconstruction:
    found, start = Reconstruction(D, F), 0
    blocks = torch.arange(N) // 20
    for size in sizes:
        part = slice(start, start + size)
        output = SAEOutput(x_hat[part], SparseCodes(codes.indices[part], codes.values[part]))
        found.add(x[part], output, blocks[part])
        start += size
    return found


def test_every_metric_is_its_definition() -> None:
    x, x_hat, codes = _data()
    metrics = _streamed(x, x_hat, codes, [100, 150, 50]).metrics(seed=0)
    value = {name: found.value for name, found in metrics.items()}
    X, H, dense = x.double().numpy(), x_hat.double().numpy(), codes.dense(F).numpy()
    error = ((X - H) ** 2).sum(axis=1)
    assert value["mse"] == pytest.approx(error.mean())
    assert value["fvu"] == pytest.approx(error.mean() / ((X - X.mean(axis=0)) ** 2).sum(axis=1).mean())
    assert value["l0"] == pytest.approx((dense > 0).sum(axis=1).mean())
    assert value["l2_ratio"] == pytest.approx((np.linalg.norm(H, axis=1) / np.linalg.norm(X, axis=1)).mean())
    assert value["bias"] == pytest.approx((H**2).sum(axis=1).mean() / (H * X).sum(axis=1).mean())
    legacy = [
        1 - error[a:b] / ((X[a:b] - X[a:b].mean(axis=0)) ** 2).sum(axis=1)
        for a, b in ((0, 100), (100, 250), (250, 300))
    ]
    assert value["ev_legacy"] == pytest.approx(np.concatenate(legacy).mean())
    share = (dense > 0).mean(axis=0)
    assert value["dead"] == pytest.approx(2 / F) == (share == 0).mean()
    assert value["dense_1"] == pytest.approx((share > 0.01).mean())
    assert value["dense_10"] == pytest.approx((share > 0.1).mean()) and 0 < value["dense_10"] < 1
    for found in metrics.values():
        assert found.low <= found.value <= found.high
    assert metrics["fvu"].n == 15 and metrics["dead"].n == F and metrics["fvu"].low < metrics["fvu"].high


def test_batches_do_not_matter() -> None:
    x, x_hat, codes = _data()
    one = _streamed(x, x_hat, codes, [N]).metrics(seed=0)
    many = _streamed(x, x_hat, codes, [1, 2, 3, 94, 200]).metrics(seed=0)
    for name in one.keys() - {"ev_legacy"}:  # which is about the batch's own mean, and so labelled legacy
        assert one[name].as_dict() == pytest.approx(many[name].as_dict()), name


def test_the_interval_of_fvu_draws_whole_documents() -> None:
    x, x_hat, codes = _data()
    found = _streamed(x, x_hat, codes, [N]).metrics(seed=3)["fvu"]
    rng = np.random.default_rng(1)
    X, H = x.double().numpy().reshape(15, 20, D), x_hat.double().numpy().reshape(15, 20, D)
    draws = []
    for _ in range(2000):
        pick = rng.integers(0, 15, 15)
        A, B = X[pick].reshape(-1, D), H[pick].reshape(-1, D)
        draws.append(((A - B) ** 2).sum() / ((A - A.mean(axis=0)) ** 2).sum())
    low, high = np.quantile(draws, [0.025, 0.975])
    width = high - low
    assert abs(found.low - low) < 0.1 * width and abs(found.high - high) < 0.1 * width


def test_worse_reconstructions_score_worse() -> None:
    x, _, codes = _data(offset=2.0)
    good = _streamed(x, x, codes, [N]).metrics(seed=0)
    shrunk = _streamed(x, 0.8 * x, codes, [N]).metrics(seed=0)
    nothing = _streamed(x, torch.zeros_like(x), codes, [N]).metrics(seed=0)
    average = _streamed(x, x.mean(dim=0).expand(x.shape), codes, [N]).metrics(seed=0)
    assert good["fvu"].value == 0 and good["bias"].value == pytest.approx(1)
    assert shrunk["l2_ratio"].value == pytest.approx(0.8) and shrunk["bias"].value == pytest.approx(0.8)
    assert shrunk["fvu"].value > 0 and nothing["fvu"].value > 1
    assert average["fvu"].value == pytest.approx(1)
    assert nothing["bias"].value == 0
