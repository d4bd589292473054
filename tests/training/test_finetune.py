"""Fine-tuning end to end: less divergence on other text, the model untouched, resumable to the bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unbraid.activations.documents import Document
from unbraid.evaluation.evaluate import evaluate
from unbraid.manifest.errors import UserError
from unbraid.manifest.lineage import verify
from unbraid.model.load import LanguageModel, load_model
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build
from unbraid.training.finetune import FinetuneOptions, finetune

TEXT = "the delayed package was a red ball that wanted two tablets with water and a pan"
OPTIONS = FinetuneOptions(steps=60, batch_tokens=60, lr=3e-3, checkpoint_every=20, log_every=5)


def _documents(first: int) -> list[Document]:
    words = TEXT.split()
    return [
        Document.of_text(" ".join(words[(i * j + first) % len(words)] for i in range(12)))
        for j in range(1, 17)
    ]


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load_model(tiny_llama)


def _sae(lm: LanguageModel, architecture: str = "topk") -> SAE:
    """An untrained autoencoder with weights that mean something: tied random directions."""
    k = 6 if architecture == "topk" else 0
    config = SAEConfig(
        architecture, lm.d_in, 4 * lm.d_in, k, site="layers.1.resid_post", model_name=lm.name, model_id=lm.id
    )
    sae = build(config)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(0)))
        sae.constrain()
        sae.W_enc.copy_(sae.W_dec.T * 0.4)
        if sae.threshold is not None:
            sae.threshold.fill_(0.05)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_the_divergence_on_other_text_falls(lm: LanguageModel, tmp_path: Path, architecture: str) -> None:
    weights = {name: p.clone() for name, p in lm.model.state_dict().items()}
    before = evaluate(_sae(lm, architecture), lm, _documents(5))
    made = finetune(
        _sae(lm, architecture), lm, _documents(0), OPTIONS, tmp_path / "sae", parent="p" * 64, command="c"
    )
    after = evaluate(made, lm, _documents(5))
    assert after.metrics["kl_sae"].high < before.metrics["kl_sae"].low
    assert after.metrics["fvu"].value < before.metrics["fvu"].value
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in lm.model.state_dict().items())
    again = SAE.from_pretrained(tmp_path / "sae")
    x = torch.randn(5, lm.d_in)
    assert torch.equal(again(x).x_hat, made(x).x_hat) and not verify(tmp_path).problems
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(4 * lm.d_in))
    log = [json.loads(line) for line in (tmp_path / "sae" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(5, 61, 5)) and log[-1]["kl"] < log[0]["kl"]


def test_stopped_it_goes_on_from_its_checkpoint(lm: LanguageModel, tmp_path: Path) -> None:
    def stop(done: int, total: int, note: str = "") -> None:
        if done == 47:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(_sae(lm), lm, _documents(0), OPTIONS, tmp_path / "one", parent="p" * 64, progress=stop)
    with pytest.raises(UserError, match="unfinished run with other settings"):
        finetune(_sae(lm), lm, _documents(0), replace(OPTIONS, lr=1.0), tmp_path / "one", parent="p" * 64)
    steps: list[int] = []
    finetune(
        _sae(lm), lm, _documents(0), OPTIONS, tmp_path / "one", parent="p" * 64,
        progress=lambda done, total, note="": steps.append(done),
    )  # fmt: skip
    finetune(_sae(lm), lm, _documents(0), OPTIONS, tmp_path / "two", parent="p" * 64)
    assert steps[0] == 41
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0.0}, "lr is 0"),
        ({"warmup_share": 2.0}, "warmup_share"),
    ],
)
def test_mistakes_are_named(lm: LanguageModel, tmp_path: Path, change: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        finetune(_sae(lm), lm, _documents(0), replace(OPTIONS, **change), tmp_path / "sae", parent="")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_what_predicts_another_site_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    config = SAEConfig("transcoder", lm.d_in, 8, 2, site="layers.1.resid_mid", d_out=lm.d_in)
    with pytest.raises(UserError, match="reconstructs what it reads"):
        finetune(build(config), lm, _documents(0), OPTIONS, tmp_path / "sae", parent="")
