"""What the NumPy autoencoders recover of planted features, and how a network comes to superpose them.

For each number of features that fire at once, every method of `practice.numpy_sae` is trained on the same
directions, as many seeds as asked, and its decoder rows are paired with the true directions. The toy models
of `practice.superposition` show where such directions come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import unbraid
from unbraid.manifest.progress import Progress
from unbraid.practice import numpy_sae as sae
from unbraid.practice.superposition import train_best
from unbraid.ui.charts import Point, Series, arrows, line_chart, matrix, percent

FEATURES, D_IN, WIDTH = 32, 8, 64
"""Two latents for each feature: with one each, a latent that settles between two features leaves one lost."""
ACTIVE = (1, 2, 3, 4, 6)
"""Mean numbers of features that fire at once."""
L1 = 0.7
"""Price of ReLU-L1, set once by hand so that about as many latents fire as features do."""
FOUND = 0.9
"""A feature counts as found when the cosine with its own decoder row is above this."""
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
"""How often a feature of the toy models is present."""
IMPORTANCE = 0.9
"""Each feature of the toy models matters this much as much as the one before it."""


@dataclass(frozen=True)
class Recovery:
    """What one trained autoencoder recovered."""

    method: str
    """ReLU-L1, TopK or Matryoshka; "random rows" for a decoder that saw no data."""
    active: int
    """Mean number of features that fire at once in the data."""
    seed: int
    """Seed of the directions, the samples and the start."""
    cosines: tuple[float, ...]
    """Of every true direction with its own decoder row, FEATURES of them."""
    overlaps: tuple[tuple[float, ...], ...]
    """Cosine of every true direction (row) with the decoder row of every one (column)."""
    l0: float
    """Mean number of latents that fire on held-out samples."""
    true_l0: float
    """Mean number of features that fire on them."""
    fvu: float
    """Fraction of variance unexplained on them."""

    @property
    def found(self) -> float:
        """Share of the features that were found."""
        return float(np.mean(np.array(self.cosines) > FOUND))


@dataclass(frozen=True)
class Toy:
    """One toy model of superposition in two dimensions."""

    density: float
    """How often a feature is present."""
    columns: tuple[tuple[float, float], ...]
    """Column of W of every feature, the most important first."""
    loss: float
    """Weighted squared error on fresh samples."""


def variants(active: int) -> dict[str, dict[str, Any]]:
    """The methods by name, with their settings; those that take k are told the true mean."""
    return {
        "ReLU-L1": {"l1": L1},
        "TopK": {"k": active},
        "Matryoshka": {"k": active, "prefixes": (WIDTH // 4, WIDTH // 2, WIDTH)},
    }


def recover(method: str, active: int, seed: int, *, steps: int = 1000, batch: int = 256) -> Recovery:
    """Train one autoencoder from random rows and pair what it learned with the truth."""
    rng = np.random.default_rng([seed, active])
    D = sae.directions(rng, FEATURES, D_IN)
    p = sae.initial(rng, D_IN, WIDTH)
    settings = variants(active).get(method)
    if settings is not None:
        sae.train(p, lambda: sae.sample(rng, D, batch, active)[0], steps, **settings)
    rows, cosines = sae.match(D, p["W_dec"])
    x, c = sae.sample(rng, D, 20_000, active)
    f = sae.encode(p, x, (settings or {}).get("k"))
    errors = np.square(x - sae.decode(p, f)).sum()
    return Recovery(
        method=method,
        active=active,
        seed=seed,
        cosines=tuple(cosines.tolist()),
        overlaps=tuple(tuple(row) for row in (D @ p["W_dec"][rows].T).tolist()),
        l0=float((f > 0).sum(1).mean()),
        true_l0=float((c > 0).sum(1).mean()),
        fvu=float(errors / np.square(x - x.mean(0)).sum()),
    )


def recover_all(seeds: Sequence[int], *, steps: int = 1000, progress: Progress) -> list[Recovery]:
    """Every method at every number of active features with every seed, and random rows beside them."""
    todo = [(m, a, s) for a in ACTIVE for m in (*variants(a), "random rows") for s in seeds]
    done: list[Recovery] = []
    for method, active, seed in todo:
        done.append(recover(method, active, seed, steps=steps))
        progress(len(done), len(todo))
    return done


def toy_models(seed: int) -> list[Toy]:
    """Five features in two dimensions at every density, the best of a few trainings each."""
    importance = np.array([IMPORTANCE**i for i in range(5)])
    toys: list[Toy] = []
    for density in DENSITIES:
        p, loss = train_best(np.random.default_rng(seed), 5, 2, density, importance)
        toys.append(Toy(density, tuple((float(a), float(b)) for a, b in p["W"].T), loss))
    return toys


def spread(recoveries: Sequence[Recovery]) -> list[dict[str, Any]]:
    """One line a method and number of active features: mean, lowest and highest over the seeds."""
    groups: dict[tuple[int, str], list[Recovery]] = {}
    for r in recoveries:
        groups.setdefault((r.active, r.method), []).append(r)
    return [
        {
            "active": active,
            "method": method,
            "cosine": _range([float(np.mean(r.cosines)) for r in group]),
            "found": _range([r.found for r in group]),
            # Random rows code nothing: their L0 and FVU would say something about the start alone.
            "l0": _range([r.l0 for r in group]) if method in variants(active) else None,
            "true_l0": _range([r.true_l0 for r in group]),
            "fvu": _range([r.fvu for r in group]) if method in variants(active) else None,
        }
        for (active, method), group in groups.items()
    ]


def summary(recoveries: Sequence[Recovery], toys: Sequence[Toy]) -> dict[str, Any]:
    """Every number behind the page, ready for JSON."""
    return {"recovered": spread(recoveries), "toys": [asdict(t) for t in toys]}


def render(recoveries: Sequence[Recovery], toys: Sequence[Toy], command: str) -> str:
    """The page as one HTML string that loads nothing and runs no script."""
    environment = Environment(
        loader=PackageLoader("unbraid.recipes"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    filters: dict[str, Any] = environment.filters  # pyright: ignore[reportAssignmentType]
    filters.update(percent=percent)
    rows = spread(recoveries)
    shown = (ACTIVE[0], ACTIVE[2], ACTIVE[-1])
    first = recoveries[0].seed
    return environment.get_template("superposition.html.j2").render(
        rows=rows,
        features=FEATURES,
        d_in=D_IN,
        width=WIDTH,
        l1=L1,
        found=FOUND,
        seeds=len({r.seed for r in recoveries}),
        methods=[*variants(1), "random rows"],
        shares=_shares(rows),
        matrices=[
            (active, [(r.method, r.found, _overlaps(r)) for r in recoveries if _pictured(r, active, first)])
            for active in shown
        ],
        toys=[(t, _toy(t)) for t in toys],
        command=command,
        version=unbraid.__version__,
    )


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "low": min(values), "high": max(values)}


def _shares(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Share of features found over the number that fire at once, a line a method."""
    series = [
        Series(
            method,
            tuple(
                Point(r["active"], r["found"]["mean"], r["found"]["low"], r["found"]["high"])
                for r in rows
                if r["method"] == method
            ),
            style,
        )
        for method, style in zip((*variants(1), "random rows"), (0, 2, 3, 5), strict=True)
    ]
    return line_chart(
        series,
        x_label="features that fire at once, on average",
        y_label="features found",
        width=620,
        height=340,
    )


def _pictured(r: Recovery, active: int, seed: int) -> bool:
    return r.active == active and r.seed == seed and r.method in variants(active)


def _overlaps(r: Recovery) -> Markup:
    label = f"{r.method}, {r.active} active: {percent(r.found)} of the diagonal above {FOUND}"
    # Cubed: any two directions in few dimensions overlap somewhat, and what counts is who is close to 1.
    return matrix([[max(v, 0.0) ** 3 for v in row] for row in r.overlaps], label)


def _toy(t: Toy) -> Markup:
    lengths = ", ".join(f"{np.hypot(a, b):.2f}" for a, b in t.columns)
    return arrows(t.columns, f"present {percent(t.density)}; lengths {lengths}", reach=1.3)
