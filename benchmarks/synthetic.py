"""Planted features: ours and SAELens's autoencoders on the same samples of SAELens's synthetic benchmark.

    make bench NAME=synthetic JSON=out.json
    python benchmarks/synthetic.py --arch topk --seeds 0 --samples 200000     # a part of it
    python benchmarks/synthetic.py --keep runs.jsonl     # what is there already is not trained again
    python benchmarks/synthetic.py --scaled --arch jumprelu     # SAELens, too, on centred and scaled samples
    python benchmarks/synthetic.py --arch topk --defaults     # ours as `unbraid train` has it by itself
    python benchmarks/synthetic.py --arch topk --set beta2=0.95     # what else ours are to be given

The world is SAELens's own `SyntheticModel`: features in superposition that fire by Zipf's law, correlated, in
a hierarchy. Its samples go to disk as a capture; `unbraid.training` trains on it, and SAELens's `SAETrainer`
is fed the very same batches in the same order. An architecture has one learning rate for both tools, out of
the same few: that with which the first seed's explained variance, the mean of both, is best: what one can go
by who does not know the features. The weights of L1 and L0 terms are searched for at every rate, for each
tool and in every seed's world, until as many latents fire as features do. Ours are trained with what suits
planted features (`SUITED`), SAELens's with its own defaults. Everything is judged by SAELens's own
evaluation, on samples none has seen:

MCC: mean |cosine| of the best one-to-one matching of decoder rows and features. F1: of each latent as a
detector of the feature closest to it. EV: explained variance.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # before SAELens draws its bars

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matching_pursuit_sae import (
    MatchingPursuitTrainingSAE,
    MatchingPursuitTrainingSAEConfig,
)
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAE as TheirSAE
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    eval_sae_on_synthetic_data,
)
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file

from training import machine, versions
from unbraid.activations.filling import COLUMNS
from unbraid.activations.shards import DOCUMENTS, shard_name
from unbraid.activations.store import ActivationStore
from unbraid.activations.stream import batches
from unbraid.manifest.record import write_manifest
from unbraid.sae.base import SAE
from unbraid.sae.scaling import Scaling
from unbraid.stats.bootstrap import mean_of_runs
from unbraid.training.config import TrainConfig
from unbraid.training.trainer import train

SITE = "layers.0.resid_post"
SHARD = 65_536
EVALUATED = 30_000
"""Samples that an autoencoder is judged on."""
PLANTED, SAMPLED, FRESH = 1_000, 2_000, 3_000
"""What is added to a seed for the features, their samples and those for judging. With the training's own seed
torch would draw the planted features again as the first weights: the answer given away."""
FIXED = ("topk", "batchtopk", "matryoshka", "lista", "matching_pursuit")
"""Architectures in which k fixes how many latents fire."""
OURS = ("lista", "matryoshka_jumprelu")
"""Architectures that SAELens has not."""
SUITED: dict[str, dict[str, Any]] = {
    "topk": {
        "free_rows": True, "centre": False, "beta2": 0.999, "max_grad_norm": 1.0, "auxk_alpha": 0.0,
    },
    "jumprelu": {"free_rows": True},
    "matching_pursuit": {"centre": False},
}  # fmt: skip
"""What ours are given here that `unbraid train` does not give by itself: fields of `TrainConfig` and options
of the architecture. On a model's activations most of it costs FVU (`RESULTS.md`)."""
MARGIN = 0.02
"""How far from the true number the mean number of latents that fire may stay, as a share."""


class Scaled(torch.nn.Module):
    """An autoencoder of scaled activations, to be judged on raw ones."""

    def __init__(self, sae: Any, scaling: Scaling) -> None:
        super().__init__()
        self.sae, self.scaling, self.W_dec = sae, scaling, sae.W_dec.detach()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes (n, d_sae)."""
        return self.sae.encode(self.scaling(x))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Reconstructions (n, d_in)."""
        return self.sae.decode(codes) / self.scaling.scale + self.scaling.mean


@dataclass(frozen=True)
class World:
    """A planted world and its samples on disk."""

    model: SyntheticModel
    store: ActivationStore
    l0: float
    """Mean number of features that fire."""


def world(given: argparse.Namespace, seed: int, folder: Path) -> World:
    """SAELens's world of that seed, scaled to `--features` (its own benchmark has 16,384)."""
    scale = given.features / 16_384
    model = SyntheticModel(
        SyntheticModelConfig(
            num_features=given.features,
            hidden_dim=given.d,
            firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
            hierarchy=HierarchyConfig(
                total_root_nodes=max(1, round(128 * scale)), branching_factor=4, max_depth=3,
                mutually_exclusive_portion=1.0, compensate_probabilities=True, scale_children_by_parent=True,
            ),
            orthogonalization=OrthogonalizationConfig(),
            correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
            std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
            mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
            seed=PLANTED + seed,
        )
    )  # fmt: skip
    torch.manual_seed(SAMPLED + seed)
    folder.mkdir()
    fired = 0
    for index, start in enumerate(range(0, given.samples, SHARD)):
        n = min(SHARD, given.samples - start)
        parts = []
        for rows in torch.arange(n).split(4096):
            x, features = model.sample_with_features(len(rows))
            parts.append(x.half())
            fired += int((features > 0).sum())
        columns = {name: torch.zeros(n, dtype=torch.int32) for name in COLUMNS}
        save_file({SITE: torch.cat(parts), **columns}, folder / shard_name(index))
    (folder / DOCUMENTS).write_text('{"id": "a", "tokens": 1, "captured": 1}\n')
    write_manifest(
        folder, kind="activations", command="", seed=seed, inputs={"model": "m", "tokenizer": "t"},
        facts={
            "model": "synthetic", "sites": [SITE], "d_in": given.d, "tokens": given.samples, "documents": 1,
            "context": 1, "positions": "all", "dtype": "float16", "shard_tokens": SHARD,
        },
    )  # fmt: skip
    return World(model, ActivationStore(folder), fired / given.samples)


class Judged:
    """Our autoencoder in the form that SAELens's evaluation asks for."""

    def __init__(self, sae: SAE) -> None:
        self.sae, self.W_dec = sae, sae.W_dec.detach()

    def eval(self) -> None:
        """Nothing to switch."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes (n, d_sae)."""
        return self.sae.encode_dense(x)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Reconstructions (n, d_in)."""
        return codes @ self.W_dec + self.sae.b_dec


def ours(w: World, arch: str, lr: float, weight: float, seed: int, given: argparse.Namespace) -> Any:
    """Train with `unbraid.training`, as `unbraid train` does."""
    widths = nested(given.width)
    options: dict[str, Any] = {
        "matryoshka": {"widths": widths},
        "lista": {"widths": widths},
        "relu": {"l1": weight},
        "gated": {"l1": weight},
        "jumprelu": {"l0": weight},
        "matryoshka_jumprelu": {"l0": weight, "widths": widths},
    }.get(arch, {})
    fields = dict[str, Any]()
    for name, value in settings(arch, given).items():
        (fields if name in TrainConfig.__dataclass_fields__ else options)[name] = value
    config = TrainConfig(
        architecture=arch, d_sae=given.width, k=round(w.l0), lr=lr, steps=given.steps,
        batch_size=given.batch, seed=seed, options=options, checkpoint_every=10**9, **fields,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        return Judged(train(w.store, SITE, config, Path(place) / "sae"))


def settings(arch: str, given: argparse.Namespace) -> dict[str, Any]:
    """What ours of that architecture are given."""
    return ({} if given.defaults else SUITED.get(arch, {})) | dict(given.set)


def setting(text: str) -> tuple[str, Any]:
    """The name and the value, as JSON has it, of NAME=VALUE."""
    name, _, value = text.partition("=")
    return name, json.loads(value)


def theirs(w: World, arch: str, lr: float, weight: float, seed: int, given: argparse.Namespace) -> Any:
    """Train with SAELens's own trainer on our stream's batches."""
    torch.manual_seed(seed)
    size: dict[str, Any] = {"d_in": given.d, "d_sae": given.width}
    k, warm = round(w.l0), given.steps // 20
    make: Any = {
        "topk": lambda: TopKTrainingSAE(TopKTrainingSAEConfig(**size, k=k)),
        "batchtopk": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**size, k=float(k))),
        "matryoshka": lambda: MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(
                **size, k=float(k), matryoshka_widths=list(nested(given.width))
            )
        ),
        "relu": lambda: StandardTrainingSAE(
            StandardTrainingSAEConfig(**size, l1_coefficient=weight, l1_warm_up_steps=warm)
        ),
        "gated": lambda: GatedTrainingSAE(
            GatedTrainingSAEConfig(**size, l1_coefficient=weight, l1_warm_up_steps=warm)
        ),
        "matching_pursuit": lambda: MatchingPursuitTrainingSAE(
            MatchingPursuitTrainingSAEConfig(**size, max_iterations=k)
        ),
        "jumprelu": lambda: JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(**size, l0_coefficient=weight, l0_warm_up_steps=warm)
        ),
    }[arch]
    stream: Iterator[torch.Tensor] = batches(w.store, SITE, given.batch, seed=seed, steps=given.steps)
    scaling = None
    if given.scaled:
        scaling = Scaling.of(next(batches(w.store, SITE, SHARD, seed=seed, steps=1)), [given.d])
        assert scaling is not None
        stream = map(scaling, stream)
    config = SAETrainerConfig(
        total_training_samples=given.steps * given.batch, train_batch_size_samples=given.batch,
        lr=lr, lr_end=lr, lr_warm_up_steps=warm, lr_decay_steps=given.steps // 5,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer: Any = SAETrainer(config, make(), stream)
    sae: Any = trainer.fit()
    with tempfile.TemporaryDirectory() as place:
        sae.save_inference_model(place)  # BatchTopK becomes JumpReLU, as its users have it
        found = TheirSAE.load_from_disk(place)
    return found if scaling is None else Scaled(found, scaling)


def nested(width: int) -> tuple[int, ...]:
    """Matryoshka's widths."""
    return tuple(width // part for part in (16, 8, 4, 2))


TOOLS = {"unbraid": ours, "saelens": theirs}


def judge(sae: Any, w: World, seed: int) -> dict[str, float]:
    """SAELens's evaluation on fresh samples."""
    torch.manual_seed(FRESH + seed)
    found = eval_sae_on_synthetic_data(
        sae, w.model.feature_dict, w.model.activation_generator, num_samples=EVALUATED, batch_size=2048
    )
    return {
        "f1": found.classification.f1_score, "mcc": found.mcc, "ev": found.explained_variance,
        "l0": found.sae_l0, "dead": found.dead_latents / len(sae.W_dec), "uniqueness": found.uniqueness,
    }  # fmt: skip


class Bench:
    """Trains and judges, each thing once; what `--keep` names holds everything that was finished."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder, self.made = given, folder, dict[int, World]()
        self.rows: dict[str, dict[str, float]] = {}
        if given.keep and given.keep.exists():
            lines = given.keep.read_text(encoding="utf-8").splitlines()
            self.rows = {line["what"]: line["found"] for line in map(json.loads, lines)}

    def once(self, what: str, work: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What `work` finds, or found in an earlier run of the same size."""
        sizes = ("features", "d", "width", "samples", "steps", "batch")
        key = " ".join([*(f"{name}={getattr(self.given, name)}" for name in sizes), what])
        if key not in self.rows:
            self.rows[key] = work()
            if self.given.keep:
                with self.given.keep.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"what": key, "found": self.rows[key]}) + "\n")
        return self.rows[key]

    def world(self, seed: int) -> World:
        """The world of that seed; only the last one is kept."""
        if seed not in self.made:
            for old in self.made:
                shutil.rmtree(self.folder / f"{old}")
            self.made = {seed: world(self.given, seed, self.folder / f"{seed}")}
        return self.made[seed]

    def l0(self, seed: int) -> float:
        """How many features fire."""
        return self.once(f"world seed={seed}", lambda: {"l0": self.world(seed).l0})["l0"]

    def run(self, tool: str, arch: str, lr: float, weight: float, seed: int) -> dict[str, float]:
        """One autoencoder, trained and judged."""

        def work() -> dict[str, float]:
            w, started = self.world(seed), time.monotonic()
            row = judge(TOOLS[tool](w, arch, lr, weight, seed, self.given), w, seed)
            return row | {"seconds": time.monotonic() - started}

        how = " scaled" * self.given.scaled
        if tool == "unbraid":
            its = sorted(settings(arch, self.given).items())
            how = "".join(f" {name}={json.dumps(value)}" for name, value in its)
        row = self.once(f"tool={tool}{how} arch={arch} lr={lr:g} weight={weight:.6g} seed={seed}", work)
        say(
            f"  seed {seed} {tool:8} {arch:11} lr {lr:g} weight {weight:.3g} "
            + " ".join(f"{name} {value:.3f}" for name, value in row.items())
        )
        return row

    def untrained(self, tool: str, seed: int) -> dict[str, float]:
        """A TopK autoencoder after one tiny step: how near the first weights are to the features."""
        given = argparse.Namespace(**vars(self.given) | {"steps": 1})

        def work() -> dict[str, float]:
            w = self.world(seed)
            return judge(TOOLS[tool](w, "topk", 1e-9, 1.0, seed, given), w, seed)

        return self.once(f"tool={tool} untrained seed={seed}", work)

    def chosen(self, arch: str, rates: list[float]) -> dict[str, tuple[float, float]]:
        """For each tool the rate, the same one, and the weight with which the first seed's EV, the mean over
        tools, is best at the wanted L0."""
        first = self.given.seeds[0]
        best, found = -math.inf, dict[str, tuple[float, float]]()
        tools = [tool for tool in TOOLS if tool == "unbraid" or arch not in OURS]
        weights = dict.fromkeys(tools, 1.0)
        for lr in rates:
            rows = dict[str, dict[str, float]]()
            for tool in tools:
                weights[tool], rows[tool] = self.tuned(tool, arch, lr, weights[tool], first)
                if arch not in FIXED and abs(self.off(rows[tool], first)) > math.log1p(MARGIN):
                    weights[tool] = 1.0  # no weight does it at this rate
                    break
            else:
                ev = sum(row["ev"] for row in rows.values()) / len(rows)
                if ev > best:
                    best, found = ev, {tool: (lr, weights[tool]) for tool in tools}
        if not found:
            raise SystemExit(f"{arch}: at no rate do as many latents of both tools fire as features do")
        return found

    def off(self, row: dict[str, float], seed: int) -> float:
        """Log of how many times as many latents fire as features do."""
        return math.log(row["l0"] / self.l0(seed))

    def tuned(
        self, tool: str, arch: str, lr: float, weight: float, seed: int
    ) -> tuple[float, dict[str, float]]:
        """The weight of a sparsity term, from `weight` on, with which about as many latents fire as features
        do in that seed's world; and what came out with it.

        Searched as if log L0 were a straight line in log weight: through the nearest point and, where there
        is one, the nearest on the other side, whose distance counts half as much each time that a try stays
        on the first side (Illinois's false position).
        """
        tried = list[tuple[float, float, dict[str, float]]]()
        stayed = 0
        for _ in range(1 if arch in FIXED else self.given.search):
            row = self.run(tool, arch, lr, weight, seed)
            now = self.off(row, seed)
            stayed = stayed + 1 if tried and now * tried[0][0] > 0 else 0
            tried.append((now, math.log(weight), row))
            tried.sort(key=lambda one: abs(one[0]))
            (off, at, row), *rest = tried
            if abs(off) <= math.log1p(MARGIN):
                break
            across = [one for one in rest if one[0] * off < 0]
            there, other, _ = (across or rest or [(off - 1.0, at + 1.0, row)])[0]
            there *= 0.5**stayed if across else 1.0
            slope = (other - at) / (there - off)
            weight = math.exp(at - max(-1.1, min(1.1, off * (slope if slope < 0 else -1.0))))
        return math.exp(tried[0][1]), tried[0][2]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (
        ("features", 2048), ("d", 192), ("width", 512), ("samples", 1_000_000), ("steps", 1500),
        ("batch", 1024), ("search", 8), ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    everything = ("topk", "batchtopk", "matryoshka", "jumprelu", "relu", "gated", "matching_pursuit", *OURS)
    parser.add_argument("--arch", nargs="+", choices=everything, default=everything)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3, 3e-3, 6e-3, 1e-2, 2e-2])
    parser.add_argument(
        "--scaled", action="store_true", help="give SAELens what our trainer makes of the samples"
    )
    parser.add_argument("--defaults", action="store_true", help="leave out what suits planted features")
    parser.add_argument(
        "--set", nargs="+", type=setting, default=[], metavar="NAME=VALUE",
        help="fields of TrainConfig and options of the architecture for ours, as JSON: beta2=0.999",
    )  # fmt: skip
    parser.add_argument("--keep", type=Path, help="JSON Lines of what was finished, read and added to")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    chosen: dict[tuple[str, str], tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given, Path(folder))
        rates = sorted(given.lr)
        for arch in given.arch:
            for tool, its in bench.chosen(arch, rates).items():
                chosen[tool, arch] = its
        for seed in given.seeds:
            for tool in TOOLS:
                found.setdefault((tool, "untrained"), []).append(bench.untrained(tool, seed))
            for (tool, arch), (lr, weight) in chosen.items():
                found.setdefault((tool, arch), []).append(bench.tuned(tool, arch, lr, weight, seed)[1])
    report(found, chosen, given)


def report(
    found: dict[tuple[str, str], list[dict[str, float]]],
    chosen: dict[tuple[str, str], tuple[float, float]],
    given: argparse.Namespace,
) -> None:
    """Print the table, with ours less theirs seed by seed, and write the JSON."""
    for arch in (arch for arch in given.arch if ("saelens", arch) in found):
        pairs = zip(found["unbraid", arch], found["saelens", arch], strict=True)
        found["difference", arch] = [{name: a[name] - b[name] for name in b} for a, b in pairs]
    rows: list[dict[str, Any]] = []
    print(f"{'':22}" + "".join(f"{n:>22}" for n in ("F1", "MCC", "EV")) + f"{'L0':>8}{'dead':>8}")
    for (tool, arch), runs in sorted(found.items(), key=lambda item: item[0][::-1]):
        line = f"{arch + ' ' + tool:22}"
        for name in ("f1", "mcc", "ev", "l0", "dead", "uniqueness"):
            m = mean_of_runs([run[name] for run in runs])
            rows.append({"name": f"synthetic_{arch}_{tool}_{name}", "unit": "", **m.as_dict()})
            if name in ("f1", "mcc", "ev"):
                line += f"{m.value:8.3f} ({m.low:.3f}–{m.high:.3f})"
            elif name != "uniqueness":
                line += f"{m.value:8.1f}" if name == "l0" else f"{m.value:8.1%}"
        print(line)
    if given.out:
        work = {k: v for k, v in vars(given).items() if k not in ("out", "keep")}
        work |= {"settings": {arch: settings(arch, given) for arch in given.arch}}
        work |= {"chosen": {" ".join(of): {"lr": lr, "weight": w} for of, (lr, w) in chosen.items()}}
        ratios = {
            f"synthetic_{arch}_{n}_vs_saelens": sum(r[n] for r in found["unbraid", arch])
            / sum(r[n] for r in found["saelens", arch])
            for arch in given.arch if ("saelens", arch) in found for n in ("f1", "mcc", "ev")
        }  # fmt: skip
        result = {
            "work": work, "machine": machine(), "versions": versions(sys.executable), "rows": rows,
            "ratios": ratios,
        }  # fmt: skip
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
