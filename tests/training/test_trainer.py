"""Training finds planted structure, folds its scaling away, and refuses what cannot work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from unbraid.activations.store import ActivationStore
from unbraid.activations.stream import batches
from unbraid.manifest.errors import UserError
from unbraid.manifest.record import check_files
from unbraid.sae.base import SAE
from unbraid.sae.objective import StepContext
from unbraid.training import run as training_run
from unbraid.training.checkpoint import Checkpoint
from unbraid.training.config import TrainConfig
from unbraid.training.run import Run
from unbraid.training.sources import Source, Sources
from unbraid.training.trainer import Job, advance, train, train_together

SMALL = TrainConfig(
    d_sae=96,
    k=4,
    lr=1e-2,
    steps=150,
    batch_size=256,
    checkpoint_every=40,
    log_every=25,
    calibration_tokens=4096,
)


def _sources(store: ActivationStore) -> Sources:
    one = (Source(store, store.sites[0]),)
    return Sources(one, one)


def _fvu(sae: SAE, x: torch.Tensor) -> float:
    error = (x - sae(x).x_hat).square().sum()
    return float(error / (x - x.mean(dim=0)).square().sum())


def test_the_artifact_is_complete_and_good(store: ActivationStore, tmp_path: Path) -> None:
    reports: list[tuple[int, int, str]] = []

    def report(done: int, total: int, note: str = "") -> None:
        reports.append((done, total, note))

    sae = train(store, None, SMALL, tmp_path / "sae", command="unbraid train", progress=report)
    manifest = check_files(tmp_path / "sae")
    assert sorted(manifest.files) == [
        "cfg.json",
        "log.jsonl",
        "sae_weights.safetensors",
        "sparsity.safetensors",
        "thresholds.safetensors",
    ]
    assert manifest.kind == "sae" and manifest.inputs == {"activations": store.id}
    assert manifest.facts["model_id"] == store.model_id and manifest.facts["train"]["k"] == 4
    assert manifest.made_by.command == "unbraid train" and manifest.made_by.seed == 0

    (x,) = batches(store, store.sites[0], 4000, seed=5, steps=1)
    assert _fvu(sae, x) < 0.15
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(96))
    again = SAE.from_pretrained(tmp_path / "sae")
    assert torch.equal(again(x).x_hat, sae(x).x_hat)
    assert (again.config.model_id, str(again.site)) == (store.model_id, "layers.1.resid_post")

    log = [json.loads(line) for line in (tmp_path / "sae" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [25, 50, 75, 100, 125, 150]
    assert log[-1]["fvu"] < log[0]["fvu"] and log[-1]["l0"] <= 4
    sparsity = load_file(tmp_path / "sae" / "sparsity.safetensors")["sparsity"]
    assert float((10**sparsity).sum()) == pytest.approx(manifest.facts["l0"], rel=1e-4)
    assert reports[-1][:2] == (150, 150) and "tokens/s" in reports[-1][2] and "fvu" in reports[-1][2]


@pytest.mark.parametrize("centre", [True, False])
def test_the_saved_autoencoder_does_on_raw_activations_what_training_did(
    store: ActivationStore, tmp_path: Path, centre: bool
) -> None:
    run = Run(_sources(store), replace(SMALL, steps=20, centre=centre), tmp_path)
    advance([run], None)
    (x,) = batches(store, store.sites[0], 500, seed=5, steps=1)
    with torch.no_grad():
        trained = run.sae(run.scaling(x))
        dense = trained.codes.dense(96)
        run.finish("")
        saved = SAE.from_pretrained(tmp_path)
        output = saved(x)
    scale = run.scaling.unit
    torch.testing.assert_close(output.codes.dense(96), dense / scale, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(output.x_hat, trained.x_hat / scale + run.scaling.mean, rtol=1e-4, atol=1e-3)
    scaled = run.scaling(x)
    assert float(scaled.var(dim=0).mean()) == pytest.approx(1, rel=0.05)
    assert (float(scaled.mean(dim=0).norm()) < 1) == centre


@pytest.mark.parametrize("centre", [True, False])
def test_the_logged_fvu_is_a_share_of_the_variance_wherever_the_mean_is(
    store: ActivationStore, tmp_path: Path, centre: bool
) -> None:
    run = Run(_sources(store), replace(SMALL, steps=10, lr=1e-9, centre=centre), tmp_path)
    advance([run], None)
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    run.finish("")
    (x,) = batches(store, store.sites[0], 2000, seed=5, steps=1)
    with torch.no_grad():
        error = SAE.from_pretrained(tmp_path)(x).x_hat - x
    wanted = float(error.square().sum() / (x - x.mean(dim=0)).square().sum())
    assert json.loads(line)["fvu"] == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("short", [True, False])
def test_rows_of_matching_pursuit_may_become_short_and_never_long(
    store: ActivationStore, tmp_path: Path, short: bool
) -> None:
    config = replace(SMALL, architecture="matching_pursuit", steps=40, options={"short_rows": short})
    train(store, None, config, tmp_path / "sae")
    lengths = SAE.from_pretrained(tmp_path / "sae").W_dec.norm(dim=1)
    assert float(lengths.max()) < 1.0001 and (float(lengths.min()) < 0.99) == short


@pytest.mark.parametrize("longest", [0.001, 1e9])
def test_gradients_are_clipped_all_together(store: ActivationStore, tmp_path: Path, longest: float) -> None:
    plain, clipped = (
        Run(
            _sources(store),
            replace(SMALL, kernels="plain", steps=1, max_grad_norm=norm),
            tmp_path / f"{norm}",
        )
        for norm in (0.0, longest)
    )
    (x,) = batches(store, store.sites[0], 256, seed=5, steps=1)
    for run in (plain, clipped):
        context = StepContext(torch.zeros(SMALL.d_sae, dtype=torch.bool))
        run.stepper.step(run.scaling(x), run.scaling(x), context, 1, 1e-3)
    whole = torch.cat([mean.flatten() for mean in plain.optimizer.mean.values()])
    found = torch.cat([mean.flatten() for mean in clipped.optimizer.mean.values()])
    # Adam's first mean is a tenth of the gradient. The loss is a mean over dimensions, the bound for a sum.
    bound = 0.1 * longest / x.shape[1]
    torch.testing.assert_close(found, whole * min(1.0, bound / float(whole.norm())), rtol=1e-3, atol=1e-9)
    assert "clipped" in clipped.stepper.name and "clipped" not in plain.stepper.name


def test_a_given_beta2_is_what_adam_takes_its_steps_with(store: ActivationStore, tmp_path: Path) -> None:
    assert SAE.beta2 == 0.99
    weights = []
    for name, beta2 in (("own", None), ("same", 0.99), ("other", 0.999)):
        train(store, None, replace(SMALL, steps=20, beta2=beta2), tmp_path / name)
        weights.append(SAE.from_pretrained(tmp_path / name).W_dec)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "matryoshka_jumprelu"])
def test_free_rows_come_to_unit_length_in_the_saved_autoencoder(
    store: ActivationStore, tmp_path: Path, architecture: str
) -> None:
    options = {"free_rows": True} | ({} if architecture == "topk" else {"l0": 0.3})
    run = Run(_sources(store), replace(SMALL, architecture=architecture, options=options, steps=60), tmp_path)
    advance([run], None)
    (x,) = batches(store, store.sites[0], 500, seed=5, steps=1)
    with torch.no_grad():
        lengths, trained = run.sae.W_dec.norm(dim=1), run.sae(run.scaling(x))
        run.finish("")
        saved = SAE.from_pretrained(tmp_path)
        output = saved(x)
    assert not saved.options.free_rows  # as it is read by whatever reads its kind
    assert float(lengths.median()) > 0.1 and float(lengths.std()) > 0.01
    torch.testing.assert_close(saved.W_dec.norm(dim=1), torch.ones(96))
    scale = run.scaling.unit
    dense = trained.codes.dense(96) * lengths / scale
    assert float((dense > 0).float().mean()) > 0.001
    torch.testing.assert_close(output.codes.dense(96), dense, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(output.x_hat, trained.x_hat / scale + run.scaling.mean, rtol=1e-4, atol=1e-3)


def test_the_first_weights_are_not_what_a_world_of_the_same_seed_is_made_of(
    store: ActivationStore, tmp_path: Path
) -> None:
    for seed in (0, 1, 7):
        run = Run(_sources(store), replace(SMALL, seed=seed), tmp_path / str(seed))
        drawn = torch.randn(run.sae.W_dec.shape, generator=torch.Generator().manual_seed(seed))
        aligned = torch.cosine_similarity(drawn, run.sae.W_dec.detach().cpu(), dim=1)
        assert float(aligned.abs().mean()) < 0.5  # chance in few dimensions; 1 with that generator


@pytest.mark.parametrize("architecture", ["batchtopk", "relu"])
def test_the_other_architectures_learn_too(store: ActivationStore, tmp_path: Path, architecture: str) -> None:
    config = replace(SMALL, architecture=architecture, options={"l1": 0.3} if architecture == "relu" else {})
    sae = train(store, "layers.1.resid_post", config, tmp_path / "sae")
    (x,) = batches(store, store.sites[0], 4000, seed=5, steps=1)
    l0 = float(SAE.from_pretrained(tmp_path / "sae").encode(x).l0().double().mean())
    assert _fvu(sae, x) < 0.2
    if architecture == "batchtopk":
        assert sae.config.architecture == "jumprelu" and abs(l0 - 4) < 0.3
    else:
        assert l0 < 40


def test_dead_latents_are_revived(store: ActivationStore, tmp_path: Path) -> None:
    shares: dict[float, float] = {}
    for alpha in (0.0, 1 / 8):
        run = Run(_sources(store), replace(SMALL, auxk_alpha=alpha, dead_after=300), tmp_path)
        with torch.no_grad():
            run.sae.W_enc[:, ::2] *= 0.05  # half of the latents start too weak to be among the first k
        advance([run], None)
        (x,) = batches(store, store.sites[0], 4000, seed=5, steps=1)
        fired = (run.sae.encode_dense(run.scaling(x)) > 0).any(dim=0)[::2]
        shares[alpha] = 1 - float(fired.double().mean())
    assert shares[0.0] > 0.5 and shares[1 / 8] < 0.7 * shares[0.0]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"k": 97}, "k is 97"),
        ({"k": 0}, "k is 0"),
        ({"d_sae": 0}, "width is 0"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"architecture": "gate"}, "'gate'"),
        ({"options": {"l1": 1.0}}, "no option 'l1'"),
        ({"architecture": "relu", "options": {"l1": -1.0}}, "option l1"),
        ({"resample_every": -1}, "resample_every is -1"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
        ({"steps": 0}, "steps is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"threads": 0}, "threads is 0"),
        ({"decay_share": 2.0}, "decay_share"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_refused(
    store: ActivationStore, tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    with pytest.raises(UserError, match=word):
        train(store, None, replace(SMALL, **change), tmp_path / "sae")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_another_site_and_constant_activations_are_refused(
    store: ActivationStore, make_store: Callable[..., ActivationStore], tmp_path: Path
) -> None:
    (tmp_path / "sae").mkdir()
    with pytest.raises(UserError, match="exists already"):
        train(store, None, SMALL, tmp_path / "sae")
    with pytest.raises(UserError, match=r"layers\.0\.resid_post"):
        train(store, "layers.0.resid_post", SMALL, tmp_path / "other")
    flat = make_store(tmp_path / "flat", np.full((500, 8), 3.0, dtype=np.float32))
    with pytest.raises(UserError, match="the same"):
        train(flat, None, SMALL, tmp_path / "other")


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_what_is_no_number_stops_the_run_and_reaches_no_checkpoint(
    make_store: Callable[..., ActivationStore],
    planted: Callable[..., NDArray[np.float32]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernels: Literal["auto", "plain"],
    architecture: str,
) -> None:
    x = planted(4000)
    x[1234, 5] = np.nan
    spoiled = make_store(tmp_path / "spoiled", x)
    config = replace(SMALL, kernels=kernels, architecture=architecture, checkpoint_every=1)
    with pytest.raises(UserError, match="hold NaN or infinity"):
        train(spoiled, None, config, tmp_path / "sae")
    monkeypatch.setattr(training_run, "STATISTICS_TOKENS", 64)  # of a larger store not all is looked at first
    with pytest.raises(UserError, match="no number any more"):
        train(spoiled, None, config, tmp_path / "sae")
    (partial,) = tmp_path.glob("*sae*")
    checkpoint = Checkpoint.read(partial)
    assert checkpoint is not None and checkpoint.facts["step"] > 0
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors.values())


def test_a_partial_run_with_other_settings_is_refused(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, note: str = "") -> None:
        if done == 45:
            raise Stop

    with pytest.raises(Stop):
        train(store, None, SMALL, tmp_path / "sae", progress=stop)
    with pytest.raises(UserError, match="other settings"):
        train(store, None, replace(SMALL, lr=1e-3), tmp_path / "sae")
    with monkeypatch.context() as another, pytest.raises(UserError, match="other settings"):
        another.setattr(SAE, "beta2", 0.9)  # as another version may have it
        train(store, None, SMALL, tmp_path / "sae")
    train(store, None, SMALL, tmp_path / "sae")
    assert check_files(tmp_path / "sae").facts["tokens"] == 150 * 256


JOBS = (
    replace(SMALL, steps=60, checkpoint_every=20),
    replace(SMALL, steps=60, checkpoint_every=25, d_sae=48, k=6, lr=3e-3, architecture="batchtopk"),
    replace(SMALL, steps=60, checkpoint_every=20, architecture="gated"),
)


def _jobs(store: ActivationStore, folder: Path) -> list[Job]:
    return [Job(_sources(store), config, folder / f"{i}") for i, config in enumerate(JOBS)]


def _same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert {n: (one / n).read_bytes() for n in names} == {n: (other / n).read_bytes() for n in names}


def test_trained_together_each_is_what_it_is_alone(store: ActivationStore, tmp_path: Path) -> None:
    told: dict[str, list[Any]] = {}
    train_together(
        _jobs(store, tmp_path / "together"), on_log=lambda name, row: told.setdefault(name, []).append(row)
    )
    for i, config in enumerate(JOBS):
        log = (tmp_path / "together" / f"{i}" / "log.jsonl").read_text().splitlines()
        assert told[f"{i}"] == [json.loads(line) for line in log]
        train(store, None, config, tmp_path / "alone" / f"{i}")
        _same_files(tmp_path / "together" / f"{i}", tmp_path / "alone" / f"{i}")


def test_stopped_together_each_goes_on_from_its_own_checkpoint(
    store: ActivationStore, tmp_path: Path
) -> None:
    def stop(done: int, total: int, note: str = "") -> None:
        if done == 45:  # the checkpoints are those of steps 40, 25 and 40
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_together(_jobs(store, tmp_path / "stopped"), progress=stop)
    train_together(_jobs(store, tmp_path / "stopped"))
    train_together(_jobs(store, tmp_path / "whole"))
    for i in range(len(JOBS)):
        _same_files(tmp_path / "stopped" / f"{i}", tmp_path / "whole" / f"{i}")


def test_jobs_of_different_streams_are_refused(store: ActivationStore, tmp_path: Path) -> None:
    one, two = _jobs(store, tmp_path)[:2]
    with pytest.raises(ValueError, match="same seed"):
        train_together([one, replace(two, config=replace(two.config, seed=1))])
    assert not list(tmp_path.iterdir())


def test_killed_while_it_finishes_it_goes_on_from_its_checkpoint(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training_run, "write_manifest", stop)
        train(store, None, SMALL, tmp_path / "sae")
    steps: list[int] = []
    train(store, None, SMALL, tmp_path / "sae", progress=lambda done, total, note="": steps.append(done))
    assert steps[0] == 120 and "checkpoint.safetensors" not in check_files(tmp_path / "sae").files
