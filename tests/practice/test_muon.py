from __future__ import annotations

import torch

from unbraid.practice.muon import Muon, orthogonalise


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 16, 48), (3, 48, 16), (1, 32, 32)):
        s = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        # The iteration lifts all but the smallest singular values of a Gaussian matrix.
        assert (s > 0.6).float().mean() > 0.9 and s.max() < 1.3


def test_orthogonalise_keeps_the_singular_vectors() -> None:
    torch.manual_seed(1)
    g = torch.randn(1, 24, 64)
    u, _, vh = torch.linalg.svd(g[0], full_matrices=False)
    aligned = (u.T @ orthogonalise(g)[0] @ vh.T).diagonal()
    assert aligned.min() > 0.3 and aligned.max() < 1.3


def test_muon_solves_a_least_squares_problem() -> None:
    torch.manual_seed(2)
    target = torch.randn(12, 20)
    weight = torch.nn.Parameter(torch.zeros(12, 20))
    optimizer = Muon([weight], lr=0.3, weight_decay=0.0)
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 120)
        optimizer.zero_grad()
        ((weight - target) ** 2).sum().backward()
        optimizer.step()
    assert ((weight - target) ** 2).mean() < 0.02 * (target**2).mean()
