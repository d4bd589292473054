"""Streamed sums against the definitions written out over all tokens at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unbraid.evaluation.definitions import Undefined
from unbraid.evaluation.reconstruction import DEFINITIONS, Reconstruction
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
    found, start = Reconstruction(D), 0
    blocks = torch.arange(N) // 20
    runs = x.double().split(60)
    spread = torch.cat([(run - run.mean(dim=0)).square().sum(dim=1) for run in runs])
    for size in sizes:
        part = slice(start, start + size)
        output = SAEOutput(x_hat[part], SparseCodes(codes.indices[part], codes.values[part]))
        found.add(x[part], output, blocks[part], spread[part])
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
    lengths, out = np.linalg.norm(X, axis=1), np.linalg.norm(H, axis=1)
    assert value["cosine"] == pytest.approx(((X * H).sum(axis=1) / (lengths * out)).mean())
    assert value["norm_in"] == pytest.approx(lengths.mean())
    assert value["norm_out"] == pytest.approx(out.mean())
    assert value["l1"] == pytest.approx(dense.sum(axis=1).mean())
    legacy = [
        1 - error[a : a + 60] / ((X[a : a + 60] - X[a : a + 60].mean(axis=0)) ** 2).sum(axis=1)
        for a in range(0, N, 60)
    ]
    assert value["ev_legacy"] == pytest.approx(np.concatenate(legacy).mean())
    for found in metrics.values():
        assert found.low <= found.value <= found.high
    assert metrics.keys() == DEFINITIONS.keys()
    assert metrics["fvu"].n == 15 and metrics["fvu"].low < metrics["fvu"].high


def test_golden_values_that_were_worked_out_on_paper() -> None:
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [4.0, 2.0]])
    x_hat = torch.tensor([[3.0, 3.0], [1.0, 1.0], [0.0, 1.0], [3.0, 2.0]])
    codes = SparseCodes(torch.tensor([[0, 1]] * 4), torch.tensor([[3.0, 3], [1, 1], [0, 1], [3, 2]]))
    found = Reconstruction(2)
    # About the mean, (2, 2), the squared distances are 5, 5, 4 and 4; every error is 1.
    found.add(x, SAEOutput(x_hat, codes), torch.tensor([0, 0, 1, 1]), torch.tensor([5.0, 5.0, 4.0, 4.0]))
    value = {name: metric.value for name, metric in found.metrics(seed=0).items()}
    assert value == pytest.approx({
        "l0": 7 / 4, "l1": 14 / 4, "mse": 1, "fvu": 4 / 18, "ev_legacy": 1 - (2 / 5 + 2 / 4) / 4,
        "cosine": (21 / (5 * 18**0.5) + 1 / 2**0.5 + 1 + 16 / (20 * 13) ** 0.5) / 4,
        "norm_in": (5 + 1 + 2 + 20**0.5) / 4, "norm_out": (18**0.5 + 2**0.5 + 1 + 13**0.5) / 4,
        "l2_ratio": (18**0.5 / 5 + 2**0.5 + 1 / 2 + (13 / 20) ** 0.5) / 4, "bias": 34 / 40,
    })  # fmt: skip


def test_batches_do_not_matter() -> None:
    x, x_hat, codes = _data()
    one = _streamed(x, x_hat, codes, [N]).metrics(seed=0)
    many = _streamed(x, x_hat, codes, [1, 2, 3, 94, 200]).metrics(seed=0)
    for name in one:
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
    assert good["cosine"].value == pytest.approx(1) and nothing["cosine"].value == 0
    assert isinstance(nothing["bias"], Undefined)


def test_what_has_no_value_is_named_and_is_no_number() -> None:
    codes = SparseCodes(torch.zeros(N, 1, dtype=torch.int64), torch.zeros(N, 1))
    same = _streamed(torch.ones(N, D), torch.ones(N, D), codes, [N]).metrics(seed=0)
    assert {name for name, found in same.items() if isinstance(found, Undefined)} == {"fvu", "ev_legacy"}
    zeros = _streamed(torch.zeros(N, D), torch.zeros(N, D), codes, [N]).metrics(seed=0)
    named = {name: found.why for name, found in zeros.items() if isinstance(found, Undefined)}
    assert named.keys() == {"fvu", "ev_legacy", "l2_ratio", "bias"}
    assert named["l2_ratio"] == "all activations are 0"
    assert zeros["cosine"].value == 1 and zeros["l0"].value == 0  # type: ignore[union-attr]
