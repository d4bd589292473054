"""Files in SAELens's format, against SAELens itself where it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build

RandomSAE = Callable[..., SAE]
D_IN, D_SAE, K = 12, 64, 4


def _x(n: int = 200) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu"])
def test_what_is_saved_is_loaded(random_sae: RandomSAE, architecture: str, tmp_path: Path) -> None:
    sae = random_sae(architecture)
    if architecture == "topk":
        sae.register_buffer("threshold", torch.arange(float(D_SAE)))
    sae.save_pretrained(tmp_path / "sae")
    again = SAE.from_pretrained(tmp_path / "sae")
    assert again.config == sae.config
    for name, tensor in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu"])
def test_saelens_reads_ours(random_sae: RandomSAE, architecture: str, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    sae = random_sae(architecture)
    if architecture != "jumprelu":
        sae.register_buffer("threshold", torch.ones(D_SAE))
    sae.save_pretrained(tmp_path / "sae")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    x = _x()
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), sae.encode_dense(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs(x), sae(x).x_hat, rtol=1e-5, atol=1e-5)
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"


KINDS = {
    "gated": SAEConfig("gated", D_IN, D_SAE, site="layers.1.resid_post"),
    "matching_pursuit": SAEConfig("matching_pursuit", D_IN, D_SAE, 6, site="layers.1.resid_post"),
    "jumprelu_transcoder": SAEConfig(
        "jumprelu_transcoder", D_IN, D_SAE, d_out=7, site="layers.1.resid_mid", target_site="layers.1.mlp_out"
    ),
    "jumprelu_skip_transcoder": SAEConfig("jumprelu_skip_transcoder", D_IN, D_SAE, d_out=7),
}


@pytest.mark.parametrize("name", KINDS)
def test_saelens_and_we_read_the_same_of_the_rarer_kinds(name: str, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    sae = build(KINDS[name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) / 2)
        sae.constrain()
    sae.save_pretrained(tmp_path / "ours")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    theirs.save_model(tmp_path / "theirs")
    x = _x()
    for ours in (SAE.from_pretrained(tmp_path / "ours"), SAE.from_pretrained(tmp_path / "theirs")):
        with torch.no_grad():
            torch.testing.assert_close(theirs.encode(x), ours.encode_dense(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(theirs(x), ours(x).x_hat, rtol=1e-4, atol=1e-4)
        assert ours.config.architecture == name and ours.config.k == sae.config.k
    assert 0 < float((theirs.encode(x) > 0).double().mean()) < 1


def test_their_matching_pursuit_keeps_its_short_rows_when_it_is_trained_on(tmp_path: Path) -> None:
    pursuit = pytest.importorskip("sae_lens.saes.matching_pursuit_sae")
    config = pursuit.MatchingPursuitSAEConfig(d_in=D_IN, d_sae=D_SAE, max_iterations=4)
    theirs = pursuit.MatchingPursuitSAE(config)
    theirs.W_dec.data *= torch.linspace(0.5, 1, D_SAE)[:, None] / theirs.W_dec.norm(dim=1, keepdim=True)
    theirs.save_model(tmp_path / "theirs")
    ours = SAE.from_pretrained(tmp_path / "theirs")
    ours.constrain()
    torch.testing.assert_close(ours.W_dec, theirs.W_dec)
    ours.save_pretrained(tmp_path / "ours")
    again = SAE.from_pretrained(tmp_path / "ours")
    again.constrain()
    torch.testing.assert_close(again.W_dec, theirs.W_dec)


@pytest.mark.parametrize("name", ["transcoder", "skip_transcoder"])
def test_a_transcoder_without_thresholds_is_read(name: str, tmp_path: Path) -> None:
    """Theirs fires above 0."""
    transcoder = pytest.importorskip("sae_lens.saes.transcoder")
    kinds = {
        "transcoder": (transcoder.Transcoder, transcoder.TranscoderConfig),
        "skip_transcoder": (transcoder.SkipTranscoder, transcoder.SkipTranscoderConfig),
    }
    kind, config = kinds[name]
    theirs = kind(config(d_in=D_IN, d_sae=D_SAE, d_out=7, apply_b_dec_to_input=False))
    torch.manual_seed(0)
    for value in theirs.parameters():
        value.data = torch.randn(value.shape) / 2
    theirs.save_model(tmp_path)
    ours, x = SAE.from_pretrained(tmp_path), _x()
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), ours.encode_dense(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs(x), ours(x).x_hat, rtol=1e-5, atol=1e-5)


def _theirs(architecture: str, **options: Any) -> Any:
    """A SAELens training SAE with random weights, whose decoder rows do not have unit length."""
    saes = pytest.importorskip("sae_lens.saes")
    sizes = {"d_in": D_IN, "d_sae": D_SAE, **options}
    torch.manual_seed(0)
    if architecture == "topk":
        sae = saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(**sizes, k=K))
    elif architecture == "batchtopk":
        sae = saes.BatchTopKTrainingSAE(saes.BatchTopKTrainingSAEConfig(**sizes, k=K))
        sae.topk_threshold = torch.tensor(0.7, dtype=torch.double)
    elif architecture == "jumprelu":
        sae = saes.JumpReLUTrainingSAE(saes.JumpReLUTrainingSAEConfig(**sizes))
    else:
        sae = saes.StandardTrainingSAE(saes.StandardTrainingSAEConfig(**sizes))
    for value in sae.parameters():
        value.data += 0.3 * torch.randn(value.shape)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    sae.cfg.metadata.model_name = "tiny"
    return sae


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "standard"])
def test_ours_reads_what_saelens_trained(architecture: str, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    _theirs(architecture).save_inference_model(str(tmp_path / "sae"))
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    ours = SAE.from_pretrained(tmp_path / "sae")
    x = _x()
    with torch.no_grad():
        expected = theirs.encode(x)
        torch.testing.assert_close(ours.encode_dense(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(x).x_hat, theirs(x), rtol=1e-5, atol=1e-5)
    assert str(ours.site) == "layers.1.resid_pre" and ours.config.model_name == "tiny"
    assert 0 < float((expected > 0).double().mean()) < 1


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *[(a, {"apply_b_dec_to_input": False}) for a in ("topk", "batchtopk", "jumprelu", "standard")],
        *[(a, {"rescale_acts_by_decoder_norm": r}) for a in ("topk", "batchtopk") for r in (True, False)],
    ],
)
def test_options_that_change_the_codes_are_honoured(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="the oracle of SAELens's format")
    _theirs(architecture, **options).save_inference_model(str(tmp_path / "sae"))
    _same_as(sae_lens.SAE.load_from_disk(tmp_path / "sae"), SAE.from_pretrained(tmp_path / "sae"))


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "standard"])
@pytest.mark.parametrize("centred", [True, False])
def test_a_stored_scale_is_folded_as_saelens_does(architecture: str, centred: bool, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="the oracle of SAELens's format")
    scaler = pytest.importorskip("sae_lens.training.activation_scaler")
    options = {"normalize_activations": "expected_average_only_in", "apply_b_dec_to_input": centred}
    _theirs(architecture, **options).save_inference_model(str(tmp_path))
    scaler.ActivationScaler(scaling_factor=0.37).save(str(tmp_path / "activation_scaler.json"))
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.normalize_activations == "expected_average_only_in"
    theirs.fold_activation_norm_scaling_factor(0.37)
    _same_as(theirs, SAE.from_pretrained(tmp_path))


def _same_as(theirs: Any, ours: SAE) -> None:
    x = _x()
    with torch.no_grad():
        expected = theirs.encode(x)
        torch.testing.assert_close(ours.encode_dense(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(x).x_hat, theirs(x), rtol=1e-5, atol=1e-5)
    assert 0 < float((expected > 0).double().mean()) < 1


def test_the_older_format_is_read(random_sae: RandomSAE, tmp_path: Path) -> None:
    sae = random_sae("topk")
    sae.save_pretrained(tmp_path)
    old = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "hook_point": "blocks.1.hook_resid_post",
        "model_name": "tiny",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
    }
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    again = SAE.from_pretrained(tmp_path)
    x = _x()
    torch.testing.assert_close(again.encode_dense(x), sae.encode_dense(x).detach())
    assert str(again.site) == "layers.1.resid_post"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"architecture": "temporal"}, "'temporal'"),
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"normalize_activations": "constant_norm_rescale"}, "constant_norm_rescale"),
        ({"normalize_activations": "expected_average_only_in"}, "activation_scaler"),
        ({"d_in": None}, "d_in|int"),
    ],
)
def test_a_configuration_we_cannot_honour_is_refused(
    random_sae: RandomSAE, tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    random_sae("relu").save_pretrained(tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=word):
        SAE.from_pretrained(tmp_path)


def test_missing_and_damaged_files_are_named(random_sae: RandomSAE, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cfg\.json"):
        SAE.from_pretrained(tmp_path)
    random_sae("relu").save_pretrained(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file({name: t for name, t in tensors.items() if name != "b_dec"}, weights)
    with pytest.raises(IntegrityError, match="b_dec"):
        SAE.from_pretrained(tmp_path)
    save_file(tensors | {"b_dec": torch.zeros(3)}, weights)
    with pytest.raises(IntegrityError, match="b_dec"):
        SAE.from_pretrained(tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(IntegrityError, match="cut off"):
        SAE.from_pretrained(tmp_path)


def test_batchtopk_is_not_saved_without_its_threshold(random_sae: RandomSAE, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batchtopk"):
        random_sae("batchtopk").save_pretrained(tmp_path)
