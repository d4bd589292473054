"""Cross-entropy and KL divergence of the next token, of many replacements side by side.

Logits exist for a chunk of tokens at a time, and each row of them is passed over as seldom as can be. Where a
replacement leaves the same state at many tokens, its logits are computed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unbraid.evaluation import loops
from unbraid.model.tail import Tail
from unbraid.sae.kernels import cpu

LOGITS = 16 << 20
"""Bytes of one state's logits that exist at the same time in a thread: enough rows to multiply well."""


@dataclass(frozen=True, eq=False)
class States:
    """What logits are computed from, at n scored tokens."""

    states: Tensor
    """Distinct states, (m, ·), as `Tail.states` gives them."""
    which: Tensor
    """Which of them each token has, (n,) int64."""

    @classmethod
    def each(cls, states: Tensor) -> States:
        """A state of its own for every token, (n, ·)."""
        return cls(states, torch.arange(len(states)))


def score(tail: Tail, clean: Tensor, targets: Tensor, others: Mapping[str, States]) -> dict[str, Tensor]:
    """CE of every token's target, and KL(clean ‖ replaced), each (n,) float64 in nats.

    clean: states (n, ·); targets: (n,) token ids; `others` maps the replacements' names to their states. The
    result has `ce_clean`, and `ce_<name>`, `kl_<name>` of each replacement.
    """

    size = min(max(LOGITS // (4 * int(tail.lm.config.vocab_size)), 16), 512)

    def chunk(start: int) -> dict[str, Tensor]:
        part = slice(start, start + size)
        now = tail.logits(clean[part])
        found = {}
        news = []
        for other in others.values():
            rows, which = other.which[part].unique(return_inverse=True)
            news.append((tail.logits(other.states[rows.to(other.states.device)]), which))
        compute = compiled if cpu.fits(now, *(new for new, _ in news)) else plain
        ce, pairs = compute(now, targets[part], news)
        found["ce_clean"] = ce
        for name, (its_ce, its_kl) in zip(others, pairs, strict=True):
            found[f"ce_{name}"], found[f"kl_{name}"] = its_ce, its_kl
        return found

    parts = cpu.side_by_side(torch.no_grad()(chunk), range(0, len(targets), size))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


Pairs = list[tuple[Tensor, Tensor]]


def plain(now: Tensor, targets: Tensor, news: Pairs) -> tuple[Tensor, Pairs]:
    """CE (n,) of logits now (n, V); for each of `news`, logits (m, V) and the row of each token (n,), its CE
    and KL (n,). All float64 on the processor."""
    clean, p = now.log_softmax(dim=1), now.softmax(dim=1)

    def ce(log_probabilities: Tensor) -> Tensor:
        return -log_probabilities.gather(1, targets.to(now.device)[:, None]).squeeze(1).double().cpu()

    found: Pairs = []
    for logits, which in news:
        new = logits.log_softmax(dim=1)[which.to(now.device)]
        # A token that is impossible in both contributes 0, not ∞ − ∞.
        kl = torch.where(p > 0, p * (clean - new), 0.0).sum(dim=1).clamp(min=0)
        found.append((ce(new), kl.double().cpu()))
    return ce(clean), found


def compiled(now: Tensor, targets: Tensor, news: Pairs) -> tuple[Tensor, Pairs]:
    """`plain` in compiled loops."""
    a, at, n = cpu.array(now), targets.numpy(), len(now)
    p, mass, lse = np.empty_like(a), np.empty(n), np.empty(n)
    loops.normalise(a, p, mass, lse)
    rows = np.arange(n)
    found: Pairs = []
    for logits, which in news:
        b, w = cpu.array(logits), which.numpy()
        own, kl = np.empty(len(b)), np.empty(n)
        loops.normalisers(b, own)
        loops.compare(a, p, mass, lse, b, own, w, kl)
        found.append((torch.from_numpy(own[w] - b[w, at]), torch.from_numpy(kl)))
    return torch.from_numpy(lse - a[rows, at]), found
