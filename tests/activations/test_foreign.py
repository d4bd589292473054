"""Activations that TransformerLens, SAELens and NumPy wrote are the same numbers in our store."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from unbraid.activations import foreign
from unbraid.activations.arrays import Column
from unbraid.activations.foreign import import_activations
from unbraid.activations.matching import ImportOptions
from unbraid.activations.store import ActivationStore
from unbraid.activations.stream import check_aligned
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.identity import sha256_file
from unbraid.model.load import LanguageModel, load_model
from unbraid.model.read import read_sites
from unbraid.model.sites import Site
from unbraid.sae.base import SAE
from unbraid.training.config import TrainConfig
from unbraid.training.trainer import train

POST = "blocks.1.hook_resid_post"
EXACT = ImportOptions(dtype="float32")


def stored(store: ActivationStore, site: str) -> Tensor:
    return torch.cat([store.read(site, shard) for shard in range(len(store.shards))])


def column(store: ActivationStore, name: str) -> list[int]:
    return [n for i in range(len(store.shards)) for n in getattr(store.columns(i), name).tolist()]


# --- what the tools write ---


@pytest.mark.parametrize("form", ["safetensors", "npy"])
def test_a_cache_of_transformer_lens(tmp_path: Path, form: str) -> None:
    tl = pytest.importorskip("transformer_lens", reason="TransformerLens writes the cache")
    config = tl.HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=32, d_head=4, n_heads=4, d_vocab=50, act_fn="gelu", device="cpu", seed=0
    )
    tokens = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    _, cache = tl.HookedTransformer(config).run_with_cache(tokens)
    if form == "npy":
        np.save(tmp_path / "tokens.npy", tokens.numpy())
        for name in (POST, "blocks.0.attn.hook_z"):
            np.save(tmp_path / f"{name}.npy", cache[name].numpy())
        sources = sorted(tmp_path.glob("*.npy"))
    else:
        sources = [tmp_path / "cache.safetensors"]
        # They are views of one another in memory.
        arrays = {name: x.clone(memory_format=torch.contiguous_format) for name, x in cache.items()}
        save_file({"tokens": tokens, **arrays}, sources[0])
    store = import_activations(sources, tmp_path / "out", EXACT)
    assert torch.equal(stored(store, POST), cache[POST].reshape(21, 16))
    assert torch.equal(stored(store, "layers.0.attn_z"), cache["blocks.0.attn.hook_z"].reshape(21, 16))
    assert column(store, "tokens") == tokens.flatten().tolist()
    assert column(store, "documents") == [d for d in range(3) for _ in range(7)]
    assert column(store, "positions") == list(range(7)) * 3
    assert list(store.documents()) == [{"id": str(d), "tokens": 7, "captured": 7} for d in range(3)]
    origin = store.manifest.facts["origin"]
    assert origin["arrays"]["layers.1.resid_post"] == POST and origin["format"] == [form]
    assert store.manifest.inputs == {path.name: sha256_file(path) for path in sources}
    assert (store.model_id, store.tokenizer_id, store.model_name, store.context) == ("", "", "", 7)
    if form == "safetensors":  # of a whole cache, what is named after sites
        assert len(store.sites) == 2 * 6 and "blocks.0.attn.hook_pattern" in origin["left_out"]


@pytest.fixture(scope="module")
def saelens_cache(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What SAELens's own runner writes for the tiny model: 64 contexts of 16 tokens in two Arrow files."""
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens writes the cache")
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("saelens") / "cache"
    config = sae_lens.CacheActivationsRunnerConfig(
        dataset_path="none",
        model_name=str(tiny_llama),
        model_class_name="AutoModelForCausalLM",
        model_batch_size=4,
        hook_name="model.layers.1",
        d_in=48,
        training_tokens=64 * 16,
        context_size=16,
        new_cached_activations_path=str(folder),
        shuffle=False,
        device="cpu",
        buffer_size_gb=1e-4,
        streaming=False,
    )
    texts = Dataset.from_dict(
        {"text": [f"the red ball {i} was delayed by the storm " * 9 for i in range(99)]}
    )
    sae_lens.CacheActivationsRunner(config, override_dataset=texts).run()
    return folder


def test_a_cache_of_saelens_is_what_the_model_gives(
    saelens_cache: Path, lm: LanguageModel, tmp_path: Path
) -> None:
    store = import_activations([saelens_cache], tmp_path / "out", EXACT, lm=lm)
    assert (store.n_tokens, store.n_documents, store.context) == (64 * 16, 64, 16)
    ids = torch.tensor(column(store, "tokens")).reshape(64, 16)
    x = read_sites(lm, ids, torch.ones_like(ids), [Site(1, "resid_post")])[Site(1, "resid_post")]
    torch.testing.assert_close(stored(store, "model.layers.1"), x.reshape(-1, 48), atol=1e-5, rtol=1e-4)
    facts = store.manifest.facts
    assert facts["origin"]["differs"]["layers.1.resid_post"] < 1e-5 and facts["origin"]["unknown"] == []
    assert (store.model_id, store.tokenizer_id, store.model_name) == (lm.id, lm.tokenizer_id, lm.name)
    assert len([name for name in store.manifest.inputs if name.endswith(".arrow")]) == 2


def test_a_stated_model_is_checked(
    saelens_cache: Path, lm: LanguageModel, tiny_gpt2: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"at layers\.0\.resid_post the model .* \d+% off those in the files"):
        import_activations([saelens_cache], out, sites=["layers.0.resid_post=model.layers.1"], lm=lm)
    with pytest.raises(UserError, match=r"has 48 numbers a row but model .* has 32 at layers\.1"):
        import_activations([saelens_cache], out, lm=load_model(tiny_gpt2))
    with pytest.raises(UserError, match=r"layers\.9"):
        import_activations([saelens_cache], out, sites=["layers.9.resid_post=model.layers.1"], lm=lm)
    assert not list(tmp_path.iterdir())
    believed = import_activations(
        [saelens_cache],
        out,
        ImportOptions(unchecked=True),
        sites=["layers.0.resid_post=model.layers.1"],
        lm=lm,
    )
    assert believed.manifest.facts["origin"]["differs"]["layers.0.resid_post"] > 0.05


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_as_a_difference(lm: LanguageModel, tmp_path: Path, side: str) -> None:
    ids, mask = torch.randint(9, 300, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    padded = slice(0, 4) if side == "left" else slice(8, 12)
    mask[1, padded] = 0
    x = read_sites(lm, ids, mask, [Site(1, "resid_post")])[Site(1, "resid_post")]
    x[mask == 0] = torch.nan
    arrays = {POST: x, "input_ids": ids, "attention_mask": mask}
    save_file(arrays, tmp_path / "a.safetensors")
    store = import_activations([tmp_path / "a.safetensors"], tmp_path / "out", EXACT, lm=lm)
    assert store.manifest.facts["origin"]["differs"]["layers.1.resid_post"] < 1e-4
    assert store.n_tokens == 32 and store.positions == "mask"
    assert [record["captured"] for record in store.documents()] == [12, 8, 12]
    assert torch.equal(stored(store, POST), x[mask == 1])


# --- rows ---


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_stored_is_what_the_files_hold(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path = tmp_path_factory.mktemp("rows")
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=3))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = [torch.randn(*shape, 3, generator=g) for shape in shapes]
    tokens = [torch.randint(0, 5, shape, generator=g) for shape in shapes]
    mask = [torch.rand(shape, generator=g) < 0.7 for shape in shapes]
    mask[0][0, 0], tokens[0][0, 0] = True, 4
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, parts in enumerate(zip(x, tokens, mask, strict=True)):
        save_file(dict(zip((POST, "tokens", "mask"), parts, strict=True)), folder / f"{number}.safetensors")
    drop = (0,) if data.draw(st.booleans()) else ()
    options = ImportOptions(drop_tokens=drop, dtype="float32", shard_tokens=data.draw(st.integers(1, 9)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreign, "CHUNK_BYTES", data.draw(st.integers(1, 200)))
        store = import_activations([folder], tmp_path / "out", options)
    keep = torch.cat([(m & (t > 0 if drop else m)).flatten() for m, t in zip(mask, tokens, strict=True)])
    assert torch.equal(stored(store, POST), torch.cat([part.reshape(-1, 3) for part in x])[keep])
    assert column(store, "tokens") == torch.cat([t.flatten() for t in tokens])[keep].tolist()
    lengths = [positions for documents, positions in shapes for _ in range(documents)]
    where = [(d, p) for d, length in enumerate(lengths) for p in range(length)]
    kept = [place for place, k in zip(where, keep.tolist(), strict=True) if k]
    assert list(zip(column(store, "documents"), column(store, "positions"), strict=True)) == kept
    captured = [sum(d == number for d, _ in kept) for number in range(len(lengths))]
    assert list(store.documents()) == [
        {"id": str(number), "tokens": length, "captured": n}
        for number, (length, n) in enumerate(zip(lengths, captured, strict=True))
    ]


def test_rows_without_tokens_say_so_and_are_not_paired_with_others(tmp_path: Path) -> None:
    np.save(tmp_path / "acts.npy", np.random.default_rng(0).normal(size=(50, 4)))  # float64
    stores = [
        import_activations([tmp_path / "acts.npy"], tmp_path / name, sites=["layers.3.resid_post"])
        for name in ("a", "b")
    ]
    assert stores[0].unknown == {"model", "tokenizer", "tokens", "documents"} and stores[0].context == 0
    assert set(column(stores[0], "tokens")) == {-1} and stores[0].dtype == "float16"
    with pytest.raises(UserError, match="does not say which tokens its rows are of"):
        check_aligned(*stores)


def test_bfloat16_becomes_what_is_asked_for(tmp_path: Path) -> None:
    x = torch.tensor([[1.0, 70000.0], [2.0, 3.0]]).bfloat16()
    save_file({POST: x}, tmp_path / "a.safetensors")
    store = import_activations([tmp_path / "a.safetensors"], tmp_path / "out", EXACT)
    assert torch.equal(stored(store, POST), x.float())
    with pytest.raises(UserError, match=rf"70144 of {POST} in row 0 is beyond float16's 65504; import with"):
        import_activations([tmp_path / "a.safetensors"], tmp_path / "half")


def test_float8_is_widened(tmp_path: Path) -> None:
    x = torch.tensor([[1.0, -448.0], [0.5, 3.0]]).to(torch.float8_e4m3fn)
    save_file({POST: x}, tmp_path / "a.safetensors")
    store = import_activations([tmp_path / "a.safetensors"], tmp_path / "out")
    assert torch.equal(stored(store, POST).float(), x.float())


def test_no_more_is_read_at_a_time_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    read = Column.read

    def watched(self: Column, start: int, stop: int) -> Tensor:
        found = read(self, start, stop)
        sizes.append(4 * found.numel())
        return found

    monkeypatch.setattr(Column, "read", watched)
    monkeypatch.setattr(foreign, "CHUNK_BYTES", 1000)
    np.save(tmp_path / f"{POST}.npy", np.ones((2, 500, 7), dtype=np.float16))
    assert import_activations([tmp_path / f"{POST}.npy"], tmp_path / "out").n_tokens == 1000
    assert sum(sizes) == 1000 * 7 * 4 and max(sizes) <= 1000


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    np.save(tmp_path / "a" / "x.npy", np.ones((6, 2)))
    np.save(tmp_path / "b" / "x.npy", np.arange(6))
    options = ImportOptions(tokens=str(tmp_path / "b" / "x.npy"))
    store = import_activations(
        [], tmp_path / "out", options, sites=[f"layers.0.mlp_out={tmp_path / 'a' / 'x.npy'}"]
    )
    assert sorted(store.manifest.inputs.values()) == sorted(
        sha256_file(tmp_path / folder / "x.npy") for folder in "ab"
    )
    assert column(store, "tokens") == list(range(6))


def test_values_and_tokens_that_are_none_are_named_and_leave_no_trace(tmp_path: Path) -> None:
    x, out = torch.zeros(9, 2), tmp_path / "out"
    x[7, 1] = torch.nan
    path, tokens = tmp_path / "a.safetensors", torch.arange(9)
    tokens[3] = -100

    def message(**arrays: Tensor) -> str:
        save_file({POST: x, **arrays}, path)
        with pytest.raises(UserError) as error:
            import_activations([path], out)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        return str(error.value)

    assert f"{POST} in row 7 holds a value that is not finite" in message()
    assert "tokens holds -100 in row 3, which is no token" in message(tokens=tokens)
    assert "holds other numbers than 0 and 1" in message(mask=tokens)
    assert "the mask leaves no row" in message(mask=torch.zeros(9, dtype=torch.bool))
    save_file({POST: x, "tokens": tokens, "mask": x[:, 1].isfinite() & (tokens >= 0)}, path)
    assert import_activations([path], out).n_tokens == 7
    with pytest.raises(UserError, match="exists already"):
        import_activations([path], out)


# --- training ---


def test_an_autoencoder_learns_from_an_import_whose_model_nobody_knows(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.rand(4000, 12, generator=g) * (torch.rand(4000, 12, generator=g) < 0.15)
    x = codes @ torch.randn(12, 8, generator=g) + 3
    np.save(tmp_path / "acts.npy", x.numpy())
    store = import_activations([tmp_path / "acts.npy"], tmp_path / "acts", sites=["layers.2.mlp_out"])
    config = TrainConfig(
        architecture="topk",
        d_sae=32,
        k=3,
        steps=400,
        batch_size=256,
        kernels="plain",
        calibration_tokens=1024,
    )
    train([store], None, config, tmp_path / "sae")
    sae = SAE.from_pretrained(tmp_path / "sae")
    assert str(sae.site) == "layers.2.mlp_out" and sae.config.model_id == "" == sae.config.model_name
    assert float((sae(x).x_hat - x).square().sum() / (x - x.mean(0)).square().sum()) < 0.2


# --- killed ---

SERVER = """
import os, sys, time
from pathlib import Path
from unbraid.activations import foreign
from unbraid.activations.matching import ImportOptions

foreign.CHUNK_BYTES = 6000

def stop_before(shard):
    # Stays for ever where this shard is opened: a kill never comes too late, however busy the machine is.
    def wait(event, arguments):
        if event == "open" and f"shard-{shard:05d}" in str(arguments[0]):
            time.sleep(10**6)
    sys.addaudithook(wait)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            out, last = line.split()
            stop_before(int(last))
            foreign.import_activations(
                [sys.argv[1]], out, ImportOptions(shard_tokens=200, drop_tokens=(0,))
            )
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
SHARDS = 31


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_ten_kills_change_no_byte_and_a_changed_file_is_noticed(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 20, (90, 70), generator=g)
    x = torch.randn(90, 70, 6, generator=g)
    path, out, partial = tmp_path / "a.safetensors", tmp_path / "out", tmp_path / ".out.partial"
    save_file({POST: x, "tokens": tokens}, path)
    assert -(-int((tokens > 0).sum()) // 200) == SHARDS
    chance, pipe = random.Random(0), subprocess.PIPE
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SERVER, str(path)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) as server:
        assert server.stdin and server.stdout

        def start(place: Path, last: int = -1) -> int:
            assert server.stdin and server.stdout
            server.stdin.write(f"{place} {last}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        start(tmp_path / "whole")
        begun = time.monotonic()
        assert int(server.stdout.readline()) == 0
        per_shard = (time.monotonic() - begun) / SHARDS
        codes: list[int] = []
        for kill in range(10):
            wanted = (kill + 1) * SHARDS // 12
            child = start(out, wanted + 3)
            while len(list(partial.glob("shard-*"))) < wanted:
                os.kill(child, 0)  # of one that failed nothing more comes
                time.sleep(0.001)
            time.sleep(chance.uniform(0, per_shard))
            os.kill(child, signal.SIGKILL)
            codes.append(int(server.stdout.readline()))
        server.stdin.close()
        server.wait()
    assert codes == [-signal.SIGKILL] * 10 and not out.exists()
    assert 0 < len(list(partial.glob("shard-*"))) < SHARDS
    options = ImportOptions(shard_tokens=200, drop_tokens=(0,))
    save_file({POST: x + 1, "tokens": tokens}, path)
    with pytest.raises(UserError, match=r"begun with other settings \(sources\)"):
        import_activations([path], out, options)
    save_file({POST: x, "tokens": tokens}, path)
    first = partial / "shard-00000.safetensors"
    data = first.read_bytes()
    first.write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match=r"shard-00000\.safetensors is missing or not what was written"):
        import_activations([path], out, options)
    first.write_bytes(data)
    import_activations([path], out, options)
    files = {p.name: p.read_bytes() for p in out.iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    assert len([name for name in files if name.startswith("shard-")]) == SHARDS
