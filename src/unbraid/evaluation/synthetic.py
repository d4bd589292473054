"""A planted world: activations whose features are known, so that autoencoders can be held against the truth.

    x = Σ_i a_i · w_i          x: (d_in,),  a: (F,) sparse and not negative,  w: (F, d_in) unit directions

* *Directions* are Gaussian, made as orthogonal to each other as F vectors in d_in dimensions can be.
* *Firing* follows Zipf's law. A Gaussian copula of low rank correlates it: feature i fires where
  u·C_i + √(1 − ‖C_i‖²)·v_i exceeds the quantile that belongs to its probability.
* *Magnitude* is ReLU(μ_i + σ_i ε), μ falling from 5 to 4 with the rank, σ folded normal.
* *Hierarchy*: the first features are a forest, level by level. A child needs its parent, of several siblings
  that want to fire one is drawn, and a child's magnitude is multiplied by its parent's over the parent's μ.
  Children are drawn more often by what parents and siblings will take from them, to first order.

The process is that of SAELens's synthetic benchmark, and the tests compare the two; only the random numbers
are our own. Samples come in blocks of `BLOCK`, each drawn from a seed of its own, so sample i of a stream
depends on the world and on i alone, and memory is bounded by a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_array
from scipy.special import ndtri

from unbraid.activations.filling import COLUMNS
from unbraid.activations.rows import misfit
from unbraid.activations.shards import ShardWriter, row_bytes
from unbraid.activations.space import Space
from unbraid.activations.store import KIND, ActivationStore
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.files import building, writing
from unbraid.manifest.identity import sha256_file
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import read_manifest, write_manifest

Array = NDArray[np.float32]
Stream = Literal["train", "fit", "threshold", "report"]
"""train is what a capture holds; the others are for judging: fit probes, set their thresholds, report."""

TRUTH = "truth.safetensors"
SITE = "layers.0.resid_post"
BLOCK = 1024
"""Samples drawn together. Another number makes other samples."""
SHARD = 65_536
DOMAIN = int.from_bytes(b"planted", "big")
"""Sets these generators apart from everybody else's: a seed that also draws an autoencoder's first weights
must not draw the planted directions there again."""
ROUNDS = 50
"""Of making directions orthogonal; after 20 nothing changes any more that float32 could show."""
STREAMS: tuple[Stream, ...] = ("train", "fit", "threshold", "report")


@dataclass(frozen=True)
class PlantedConfig:
    """A planted world. What is fixed about the process are the published benchmark's numbers."""

    features: int = 1024
    """Features F that are planted."""
    d_in: int = 128
    """Dimensions of an activation."""
    seed: int = 0
    """Seed of the world and of its samples."""
    exponent: float = 0.5
    """Of Zipf's law."""
    most: float = 0.4
    """Firing probability of the most frequent feature."""
    least: float = 5e-4
    """Firing probability of the rarest one."""
    rank: int = 25
    """Rank of the copula's correlation."""
    correlation: float = 0.1
    """Standard deviation of the entries of its factor."""
    roots: int | None = None
    """Trees of the forest; None keeps the benchmark's share, 128 for 16,384 features."""
    branching: int = 4
    """Children of a parent."""
    depth: int = 3
    """Levels below the roots."""

    def __post_init__(self) -> None:
        for name in ("features", "d_in", "rank", "branching"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("seed", "depth", "correlation", "roots"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; give 0 or more")
        if not 0 < self.least <= self.most < 1:
            raise UserError(
                f"firing probabilities from {self.least} to {self.most} are none; choose 0 < least ≤ most < 1"
            )

    @property
    def trees(self) -> int:
        """Roots of the forest."""
        return max(1, round(128 * self.features / 16_384)) if self.roots is None else self.roots


@dataclass(frozen=True, eq=False)
class Planted:
    """The truth about a world, and where its samples come from."""

    config: PlantedConfig
    """What it was drawn from."""
    directions: Array
    """w: (F, d_in), of unit length."""
    probabilities: Array
    """Zipf's firing probabilities p: (F,), the most frequent first; the hierarchy keeps them roughly."""
    drawn: Array
    """Probabilities with which firing is drawn, before the hierarchy takes its share: (F,)."""
    mean: Array
    """μ: (F,)."""
    deviation: Array
    """σ: (F,)."""
    factor: Array
    """C of the copula: (F, rank)."""
    parent: NDArray[np.int32]
    """Each feature's parent, −1 for roots and features outside of the forest: (F,)."""

    @classmethod
    def draw(cls, config: PlantedConfig) -> Planted:
        """The world of a configuration."""
        F = config.features
        rng = _generator(config.seed, 0)
        ranks = np.arange(1, F + 1) ** -config.exponent
        spread = (ranks - ranks[-1]) / (ranks[0] - ranks[-1]) if F > 1 else np.ones(1)
        p = config.least + (config.most - config.least) * spread
        factor = config.correlation * rng.standard_normal((F, config.rank))
        # A row longer than 1 would leave no room for noise of the feature's own.
        lengths = np.linalg.norm(factor, axis=1, keepdims=True)
        factor *= np.minimum(1.0, np.sqrt(0.99) / np.maximum(lengths, 1e-12))
        parent = _forest(config)
        return cls(
            config=config,
            directions=_directions(rng.standard_normal((F, config.d_in))),
            probabilities=p.astype(np.float32),
            drawn=np.minimum(p * _compensation(p, parent), 1.0).astype(np.float32),
            mean=np.linspace(5.0, 4.0, F, dtype=np.float32),
            deviation=np.abs(0.5 + 0.5 * rng.standard_normal(F)).astype(np.float32),
            factor=factor.astype(np.float32),
            parent=parent,
        )

    @cached_property
    def _levels(self) -> NDArray[np.int32]:
        """How many ancestors each feature has: (F,)."""
        level = np.zeros(len(self.parent), dtype=np.int32)
        for i in np.flatnonzero(self.parent >= 0):  # parents come before their children
            level[i] = level[self.parent[i]] + 1
        return level

    def block(self, stream: Stream, number: int) -> tuple[Array, csr_array]:
        """Activations (BLOCK, d_in) and how strongly each feature fires, (BLOCK, F), of a stream's block."""
        rng = _generator(self.config.seed, 1 + STREAMS.index(stream), number)
        F = len(self.mean)
        z = rng.standard_normal((BLOCK, self.factor.shape[1]), dtype=np.float32) @ self.factor.T
        own = np.sqrt(1 - np.square(self.factor).sum(axis=1))
        z += own * rng.standard_normal((BLOCK, F), dtype=np.float32)
        rows, features = np.nonzero(z > ndtri(1 - self.drawn.astype(np.float64)).astype(np.float32))
        noise = rng.standard_normal(len(rows), dtype=np.float32)
        value = np.maximum(self.mean[features] + self.deviation[features] * noise, 0)
        codes = self._pruned(rows, features, value, rng.random(len(rows)))
        return np.asarray(codes @ self.directions, dtype=np.float32), codes

    def _pruned(
        self,
        rows: NDArray[np.intp],
        features: NDArray[np.intp],
        value: Array,
        priority: NDArray[np.float64],
    ) -> csr_array:
        """What the hierarchy leaves of drawn entries (nnz,): (BLOCK, F)."""
        F = len(self.mean)
        codes = np.zeros((BLOCK, F), dtype=np.float32)
        level, parent = self._levels[features], self.parent[features]
        free = parent < 0
        codes[rows[free], features[free]] = value[free]
        for depth in range(1, int(self._levels.max()) + 1):
            here = np.flatnonzero((level == depth) & (value > 0))
            above = codes[rows[here], parent[here]]
            here, above = here[above > 0], above[above > 0]
            # Of each family, told by row and parent, the entry that drew the lowest number stays.
            family = rows[here].astype(np.int64) * F + parent[here]
            order = np.lexsort((priority[here], family))
            _, first = np.unique(family[order], return_index=True)
            stays, above = here[order[first]], above[order[first]]
            codes[rows[stays], features[stays]] = value[stays] * above / self.mean[parent[stays]]
        return csr_array(codes)

    def batches(self, stream: Stream, samples: int, *, start: int = 0) -> Iterator[tuple[Array, csr_array]]:
        """Samples `start` to `samples` of a stream in pieces of up to BLOCK rows: x (n, d_in), a (n, F)."""
        for number in range(start // BLOCK, -(-samples // BLOCK)):
            x, codes = self.block(stream, number)
            rows = slice(max(0, start - number * BLOCK), min(BLOCK, samples - number * BLOCK))
            yield x[rows], csr_array(codes[rows])

    def l0(self, samples: int = 8 * BLOCK) -> float:
        """How many features fire on average, measured on samples that are not in the training stream."""
        return sum(codes.nnz for _, codes in self.batches("fit", samples)) / samples

    def save(self, path: Path) -> None:
        """Write the truth as safetensors: directions, probabilities and all that samples are drawn from."""
        names = [field.name for field in fields(self) if field.name != "config"]
        with writing(path) as temporary:
            save_file({name: np.ascontiguousarray(getattr(self, name)) for name in names}, temporary)


def write_world(
    config: PlantedConfig,
    out: Path | str,
    samples: int,
    *,
    dtype: Literal["float16", "float32"] = "float16",
    command: str = "",
    progress: Progress | None = None,
) -> ActivationStore:
    """Write a world's truth and its first `samples` as a capture that `unbraid train` reads.

    Its model id is the hash of the truth, so an autoencoder that learned from it can be told from others.
    Killed and called again, it goes on after the last finished shard and gives the same bytes. Raises
    UserError when `out` exists or there is no room.
    """
    out = Path(out)
    if samples < 1:
        raise UserError(f"--samples is {samples}; give 1 or more")
    widths = {SITE: config.d_in}
    Space(out, row_bytes(widths, dtype), SHARD, samples).check()
    facts = {"planted": asdict(config), "dtype": dtype, "shard_tokens": SHARD}
    with building(out) as folder:
        world = Planted.draw(config)
        world.save(folder / TRUTH)
        writer = ShardWriter(folder, facts | {"samples": samples}, widths=widths)
        try:
            _fill(writer, world, samples, dtype, progress)
        except BaseException as error:
            writer.abandon(clear=isinstance(error, UserError))
            raise
        write_manifest(
            folder,
            kind=KIND,
            command=command,
            seed=config.seed,
            inputs={"model": sha256_file(folder / TRUTH)},
            facts={
                "model": "planted",
                "sites": [SITE],
                "d_in": config.d_in,
                "tokens": samples,
                "documents": -(-samples // BLOCK),
                "context": 0,
                "positions": "all",
                **facts,
                "active": world.l0(),
                "origin": {"unknown": ["tokenizer", "tokens"]},
            },
            known=writer.files(),
        )
    return ActivationStore(out)


def _fill(writer: ShardWriter, world: Planted, samples: int, dtype: str, progress: Progress | None) -> None:
    """Write the samples that finished shards do not hold yet."""
    writer.skip(writer.finished, "")
    sizes = [min(BLOCK, samples - start) for start in range(0, samples, BLOCK)]
    writer.add_documents({"id": str(i), "tokens": n, "captured": n} for i, n in enumerate(sizes))
    for x, _ in world.batches("train", samples, start=writer.rows):
        rows = torch.from_numpy(x)
        if misfit(rows, dtype):
            raise UserError(f"this world has values beyond {dtype}; write it with dtype float32")
        places = torch.arange(writer.rows, writer.rows + len(x))
        where = {"documents": places // BLOCK, "positions": places % BLOCK, "tokens": -torch.ones(len(x))}
        writer.add({SITE: rows}, {name: where[name].int() for name in COLUMNS}, "")
        if progress is not None:
            progress(writer.rows, samples)
    writer.close()


def read_world(folder: Path | str) -> tuple[Planted, str]:
    """The truth that `write_world` left in a folder, and its id.

    Raises UserError when there is none, IntegrityError when it is damaged.
    """
    path = Path(folder) / TRUTH
    manifest = read_manifest(Path(folder), kind=KIND)
    if "planted" not in manifest.facts or not path.is_file():
        raise UserError(f"{folder} holds no planted world; make one with unbraid practice planted")
    identity = sha256_file(path)
    if identity != manifest.inputs["model"]:
        raise IntegrityError(f"{path} is not what its manifest lists; restore it or plant the world again")
    return Planted(PlantedConfig(**manifest.facts["planted"]), **load_file(path)), identity


def _generator(seed: int, *place: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(DOMAIN, *place)))


def _directions(start: NDArray[np.float64]) -> Array:
    """Unit rows of `start` (F, d) pulled apart until Σ (w_i·w_j)² over pairs is as small as it can be.

    That is where WᵀW = F/d · I (Benedetto and Fickus, 2003), or WWᵀ = I when F < d. Going there and back to
    unit length by turns costs F·d² a round, where the pairs themselves would cost F²·d.
    """
    rows = start / np.linalg.norm(start, axis=1, keepdims=True)
    for _ in range(ROUNDS):
        tall = rows.shape[0] >= rows.shape[1]
        values, vectors = np.linalg.eigh(rows.T @ rows if tall else rows @ rows.T)
        whitening = (vectors / np.sqrt(np.maximum(values, 1e-12))) @ vectors.T
        rows = rows @ whitening if tall else whitening @ rows
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def _forest(config: PlantedConfig) -> NDArray[np.int32]:
    """Parents (F,): features are dealt out level by level, as long as there are any."""
    parent = np.full(config.features, -1, dtype=np.int32)
    level, used = range(min(config.trees, config.features)), min(config.trees, config.features)
    for _ in range(config.depth):
        end = min(used + len(level) * config.branching, config.features)
        parent[used:end] = np.repeat(np.array(level, dtype=np.int32), config.branching)[: end - used]
        level, used = range(used, end), end
    return parent


def _compensation(p: NDArray[np.float64], parent: NDArray[np.int32]) -> NDArray[np.float64]:
    """By what a feature's probability is multiplied, (F,): for its parent 1/p_parent, for its siblings 1 +
    the number of them that are expected to want to fire beside it."""
    child = parent >= 0
    families = np.bincount(parent[child], weights=p[child], minlength=len(p))
    above = np.where(child, p[parent], 1.0)
    others = np.where(child, families[parent] - p, 0.0)
    return (1 + others / above) / above
