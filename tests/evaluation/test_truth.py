"""Measures against the truth: by hand, beside SAELens's, and moving the right way on worse autoencoders."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from unbraid.evaluation.synthetic import BLOCK, Planted, PlantedConfig
from unbraid.evaluation.truth import DEFINITIONS, difference_of_means, judge, measure, probe
from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build

SAMPLES = 3000


@pytest.fixture(scope="module")
def world() -> Planted:
    return Planted.draw(PlantedConfig(features=60, d_in=32, seed=1))


def dictionary(world: Planted, noise: float = 0.0, width: int = 40, k: int = 3) -> SAE:
    """TopK with tied true directions, the most frequent first, and noise of that length on them."""
    sae = build(SAEConfig("topk", world.config.d_in, width, k))
    rng = np.random.default_rng(0)
    rows = world.directions[:width] + noise * rng.standard_normal((width, world.config.d_in)) / np.sqrt(32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with torch.no_grad():
        sae.W_dec.copy_(torch.from_numpy(rows))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.fill_(0.05)
    return sae.requires_grad_(False)


def samples(world: Planted) -> tuple[np.ndarray, np.ndarray]:
    parts = list(world.batches("report", SAMPLES))
    return np.concatenate([x for x, _ in parts]), np.concatenate([a.toarray() for _, a in parts])


def test_every_metric_by_brute_force(world: Planted) -> None:
    sae = dictionary(world, noise=2.0)
    x, truth = samples(world)
    codes = sae.encode_dense(torch.from_numpy(x)).double().numpy()
    x_hat = sae(torch.from_numpy(x)).x_hat.double().numpy()
    rows = sae.W_dec.double().numpy()
    cosines = np.abs(rows @ world.directions.T) / np.linalg.norm(rows, axis=1)[:, None]
    match = [int(np.argmax(row)) for row in cosines]
    f1, precision, recall = [], [], []
    for latent, feature in enumerate(match):
        fires, there = codes[:, latent] != 0, truth[:, feature] > 0
        f1.append(f1_score(there, fires, zero_division=0))
        precision.append((fires & there).sum() / max(fires.sum(), 1))
        recall.append((fires & there).sum() / max(there.sum(), 1))
    lengths = np.linalg.norm(x, axis=1)
    wanted = {
        "f1": np.mean(f1),
        "precision": np.mean(precision),
        "recall": np.mean(recall),
        "mcc": cosines[linear_sum_assignment(-cosines)].mean(),
        "uniqueness": len(set(match)) / len(match),
        "ev": 1 - np.square(x - x_hat).sum() / np.square(x.astype(float) - x.mean(axis=0, dtype=float)).sum(),
        "l0": (codes != 0).sum() / SAMPLES,
        "dead": (codes == 0).all(axis=0).mean(),
        "l2_ratio": (np.linalg.norm(x_hat, axis=1)[lengths > 0] / lengths[lengths > 0]).mean(),
    }
    found = measure(sae, world, SAMPLES)
    assert found.keys() == wanted.keys() == DEFINITIONS.keys()
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    assert 0.3 < found["uniqueness"] < 1 and 0 < found["f1"] < 0.9  # a case that is neither easy nor void


def test_saelens_says_the_same_of_the_same_samples(world: Planted) -> None:
    """But for one thing: its shrinkage skips samples shorter than 1e-6, ours those of length 0, which here is
    the same, and accuracy, which a rare feature makes good whatever a latent does, we leave out."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    synthetic = pytest.importorskip("sae_lens.synthetic")
    dictionary_of_theirs = synthetic.FeatureDictionary(60, 32, bias=False, initializer=None)
    dictionary_of_theirs.feature_vectors.data = torch.from_numpy(world.directions)
    sae = dictionary(world, noise=1.0)

    class Ours:
        """Our autoencoder and our samples behind their interfaces."""

        W_dec = sae.W_dec
        stream = iter(world.batches("report", SAMPLES))

        def eval(self) -> None: ...

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return sae.encode_dense(x)

        def decode(self, codes: torch.Tensor) -> torch.Tensor:
            return codes @ sae.W_dec + sae.b_dec

        def sample(self, n: int) -> torch.Tensor:
            return torch.from_numpy(next(self.stream)[1].toarray())

    both = Ours()
    theirs = synthetic.eval_sae_on_synthetic_data(
        both, dictionary_of_theirs, both, num_samples=SAMPLES, batch_size=BLOCK
    )
    ours = measure(sae, world, SAMPLES)
    classified = theirs.classification
    assert ours == pytest.approx(
        {
            "f1": classified.f1_score,
            "precision": classified.precision,
            "recall": classified.recall,
            "mcc": theirs.mcc,
            "uniqueness": theirs.uniqueness,
            "ev": theirs.explained_variance,
            "l0": theirs.sae_l0,
            "dead": theirs.dead_latents / 40,
            "l2_ratio": theirs.shrinkage,
        },
        rel=2e-5,
        abs=1e-7,
    )


def test_noise_on_the_dictionary_costs_every_measure_of_truth(world: Planted) -> None:
    found = [measure(dictionary(world, noise), world, SAMPLES) for noise in (0.0, 1.0, 2.0, 4.0)]
    for name in ("mcc", "f1", "ev"):
        values = [one[name] for one in found]
        assert values == sorted(values, reverse=True) and values[0] > values[-1] + 0.1, name
    assert found[0]["mcc"] == pytest.approx(1, abs=1e-6)
    assert found[0]["uniqueness"] == 1 > found[-1]["uniqueness"]


def test_a_permuted_decoder_keeps_its_directions_and_loses_its_meaning(world: Planted) -> None:
    right, wrong = dictionary(world), dictionary(world)
    wrong.W_dec.copy_(right.W_dec.roll(7, dims=0))
    a, b = (measure(sae, world, SAMPLES) for sae in (right, wrong))
    assert b["mcc"] == pytest.approx(a["mcc"]) and b["uniqueness"] == a["uniqueness"] and b["l0"] == a["l0"]
    assert b["f1"] < a["f1"] / 2 and b["ev"] < a["ev"]


def test_shrinking_shows_in_length_and_variance_alone(world: Planted) -> None:
    right, shrunk = dictionary(world), dictionary(world)
    shrunk.W_dec.mul_(0.5), right.b_dec.zero_(), shrunk.b_dec.zero_()
    a, b = (measure(sae, world, SAMPLES) for sae in (right, shrunk))
    assert b["l2_ratio"] == pytest.approx(a["l2_ratio"] / 2) and b["ev"] < a["ev"]
    for name in ("mcc", "f1", "l0", "uniqueness", "dead"):
        assert b[name] == pytest.approx(a[name])


def test_latents_that_never_fire_count_in_every_mean(world: Planted) -> None:
    sae = dictionary(world)
    sae.b_enc[:10] = -1e6
    found = measure(sae, world, SAMPLES)
    assert found["dead"] >= 10 / 40
    assert found["f1"] < measure(dictionary(world), world, SAMPLES)["f1"]


def test_probes_reach_what_a_converged_logistic_regression_does(world: Planted) -> None:
    fit = list(world.batches("fit", 16 * BLOCK))
    x = np.concatenate([one for one, _ in fit])
    truth = np.concatenate([a.toarray() for _, a in fit]) > 0
    held, there = samples(world)
    f1 = []
    for feature in range(4):
        model = LogisticRegression(C=100.0, max_iter=300).fit(x, truth[:, feature])
        f1.append(f1_score(there[:, feature] > 0, model.predict(held)))
    assert probe(world, 4, SAMPLES, 64 * BLOCK)["f1"] == pytest.approx(np.mean(f1), abs=0.03)


def test_the_table_has_floor_and_ceiling_around_what_is_judged(world: Planted) -> None:
    saes = {"a": dictionary(world, 1.0), "b": dictionary(world, 1.1)}
    verdict = judge(saes, world, samples=SAMPLES, fitted_on=32 * BLOCK)
    fixed = ["predict none", "neurons", "PCA", "DiffMean"]
    names = [
        *fixed,
        "untrained",
        "random directions",
        "a",
        "b",
        "mean of 2",
        "true dictionary",
        "logistic probes",
    ]
    assert [row.name for row in verdict.rows] == names
    rows = {row.name: row.metrics for row in verdict.rows}
    judged = rows["mean of 2"]
    for floor in ("untrained", "random directions"):
        assert rows[floor]["f1"].high < judged["f1"].value and rows[floor]["mcc"].high < judged["mcc"].value
        assert rows[floor]["l0"].value == pytest.approx(judged["l0"].value, rel=0.1)
        assert rows[floor]["f1"].n == 3 and rows[floor]["f1"].low < rows[floor]["f1"].high
    for metric in ("f1", "mcc", "ev"):
        assert rows["true dictionary"][metric].value > judged[metric].value
    assert rows["true dictionary"]["l0"].value <= judged["l0"].value + 0.5
    assert rows["logistic probes"]["f1"].value > rows["true dictionary"]["f1"].value
    assert set(rows["logistic probes"]) == {"f1", "precision", "recall"}
    assert judged["f1"].n == 2 and rows["a"]["f1"].n == 1
    for floor in ("neurons", "PCA"):  # signed coordinates, as many as latents fire, find no feature
        assert rows[floor]["f1"].value < judged["f1"].value and rows[floor]["mcc"].value < judged["mcc"].value
        assert rows[floor]["l0"].value == pytest.approx(judged["l0"].value, abs=0.5)
    again = judge({"a": saes["a"]}, world, samples=SAMPLES, fitted_on=32 * BLOCK)
    assert again.rows[6].metrics == rows["a"]


def test_predicting_nothing_explains_and_detects_nothing(world: Planted) -> None:
    rows = {row.name: row.metrics for row in judge({"a": dictionary(world)}, world, samples=SAMPLES,
                                                   fitted_on=8 * BLOCK).rows}  # fmt: skip
    nothing = rows["predict none"]
    assert set(nothing) == set(DEFINITIONS) - {"mcc", "uniqueness"}
    assert nothing["f1"].value == nothing["recall"].value == nothing["l0"].value == 0
    assert nothing["dead"].value == 1
    assert nothing["ev"].value == pytest.approx(0, abs=0.01)  # the mean is that of other samples


def test_the_difference_of_means_by_brute_force(world: Planted) -> None:
    found = difference_of_means(world, 12, SAMPLES, 8 * BLOCK)
    counts = {"fit": 8 * BLOCK, "threshold": SAMPLES, "report": SAMPLES}
    parts = {stream: list(world.batches(stream, n)) for stream, n in counts.items()}  # type: ignore[arg-type]
    x, there = (
        {stream: np.concatenate([part[i] if i == 0 else part[i].toarray()[:, :12] > 0 for part in some])
         for stream, some in parts.items()}
        for i in (0, 1)
    )  # fmt: skip
    f1, rows = [], []
    for feature in range(12):
        yes = there["fit"][:, feature]
        with_, without = (x["fit"][side].mean(axis=0, dtype=float) for side in (yes, ~yes))
        rows.append((with_ - without) / np.linalg.norm(with_ - without))
        score = {s: (x[s] - without) @ (with_ - without) / np.square(with_ - without).sum() for s in x}
        bars = np.linspace(0, 2, 33)
        tried = [f1_score(there["threshold"][:, feature], score["threshold"] > bar) for bar in bars]
        best = bars[int(np.argmax(tried))]
        f1.append(f1_score(there["report"][:, feature], score["report"] > best))
    cosines = np.abs(np.stack(rows) @ world.directions.T)
    assert found["f1"] == pytest.approx(np.mean(f1), abs=1e-3)
    assert found["mcc"] == pytest.approx(cosines[linear_sum_assignment(-cosines)].mean(), abs=1e-6)
    assert found["uniqueness"] == len(set(cosines.argmax(axis=1))) / 12
    assert 0.3 < found["f1"] < 1


def test_other_settings_and_sizes_are_refused(world: Planted) -> None:
    a, b = dictionary(world), dictionary(world, width=30)
    with pytest.raises(UserError, match="differ in d_sae, 40 and 30"):
        judge({"a": a, "b": b}, world)
    other = Planted(replace(world.config, d_in=16), *(None,) * 7)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="reads 32 dimensions but this world has 16"):
        judge({"a": a}, other)


def test_definitions_are_told_apart_by_their_hash() -> None:
    assert len({definition.id for definition in DEFINITIONS.values()}) == len(DEFINITIONS)
