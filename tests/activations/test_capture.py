"""Captured activations are the model's own, to the token, and nothing is overwritten or passed over."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from unbraid.activations import reading as room
from unbraid.activations.capture import capture
from unbraid.activations.plan import Piece, Plan, batched
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.store import ActivationStore
from unbraid.activations.text import Document, TokenisedDocument, tokenise, windows
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.model.load import LanguageModel, load_model, wrap_model
from unbraid.model.read import read_sites
from unbraid.model.sites import Site

Make = Callable[..., Iterator[Document]]
SITE = Site(1, "resid_post")
SMALL = CaptureConfig(sites=(SITE,), context=64, batch_tokens=256, dtype="float32", shard_tokens=300)


def everything(store: ActivationStore, site: Site = SITE) -> tuple[torch.Tensor, torch.Tensor]:
    """All values (n, d) and the columns (n, 3): document, position, token."""
    columns = [store.columns(i) for i in range(len(store.shards))]
    table = [torch.stack([c.documents, c.positions, c.tokens], dim=1) for c in columns]
    return torch.cat([store.read(site, i) for i in range(len(store.shards))]), torch.cat(table)


@pytest.mark.parametrize("positions", ["all", "reply", "focus", "mask", "last"])
def test_every_wanted_token_is_stored_once_with_the_models_value(
    lm: LanguageModel, chats: Make, tmp_path: Path, positions: Any
) -> None:
    sites = (SITE, Site(2, "attn_out"))
    config = dataclasses.replace(SMALL, sites=sites, positions=positions)
    documents = list(chats(30))
    store = capture(lm, documents, config, tmp_path / "out")
    values, table = everything(store)
    second, _ = everything(store, sites[1])
    assert store.n_tokens == len(values) == len(table) and store.n_documents == 30
    row = {tuple(place): i for i, place in enumerate(table.tolist())}
    assert len(row) == len(table)
    wanted = 0
    for index, document in enumerate(documents):
        for window in windows(lm, document, config.context):
            ids = torch.tensor([window.input_ids])
            alone = read_sites(lm, ids, torch.ones_like(ids), list(sites))
            for place in window.captured(positions).nonzero()[0].tolist():
                i = row[(index, window.positions[place], window.input_ids[place])]
                # Equal to a run by itself up to the rounding of a batched matrix product.
                torch.testing.assert_close(values[i], alone[SITE][0, place], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(second[i], alone[sites[1]][0, place], rtol=1e-4, atol=1e-4)
                wanted += 1
    assert wanted == len(table)


def test_special_tokens_are_not_stored(lm: LanguageModel, chats: Make, tmp_path: Path) -> None:
    _, table = everything(capture(lm, chats(10), SMALL, tmp_path / "out"))
    tokenizer = lm.tokenizer
    forbidden = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert not forbidden & set(table[:, 2].tolist())


@pytest.mark.parametrize("tokens", [1, 299, 300, 301, 777])
def test_the_budget_is_exact_and_taken_in_the_corpus_order(
    lm: LanguageModel, texts: Make, tmp_path: Path, tokens: int
) -> None:
    store = capture(lm, texts(100), dataclasses.replace(SMALL, tokens=tokens), tmp_path / "out")
    _, table = everything(store)
    assert store.n_tokens == len(table) == tokens
    assert [store.rows(i) for i in range(len(store.shards))] == [
        min(300, tokens - start) for start in range(0, tokens, 300)
    ]
    first: list[tuple[int, int]] = []
    for index, document in enumerate(texts(100)):
        for window in windows(lm, document, SMALL.context):
            kept = zip(window.positions, window.captured("all"), strict=True)
            first += [(index, position) for position, keep in kept if keep]
    assert sorted(map(tuple, table[:, :2].tolist())) == first[:tokens]
    assert sum(record["captured"] for record in store.documents()) == tokens


def test_a_budget_beyond_the_corpus_takes_the_whole_corpus(
    lm: LanguageModel, texts: Make, tmp_path: Path
) -> None:
    whole = capture(lm, texts(5), SMALL, tmp_path / "whole")
    more = capture(lm, texts(5), dataclasses.replace(SMALL, tokens=10**6), tmp_path / "more")
    assert more.n_tokens == whole.n_tokens


def test_long_documents_become_windows_of_one_document(lm: LanguageModel, tmp_path: Path) -> None:
    document = Document.of_text("wait " * 300)
    store = capture(lm, [document], dataclasses.replace(SMALL, context=16), tmp_path / "out")
    _, table = everything(store)
    length = len(tokenise(lm, document, 10_000).input_ids)
    assert store.n_documents == 1 and sorted(table[:, 1].tolist()) == list(range(length))


def test_the_manifest_says_what_was_captured(lm: LanguageModel, texts: Make, tmp_path: Path) -> None:
    documents = list(texts(12))
    store = capture(lm, documents, SMALL, tmp_path / "out", seed=3, command="unbraid capture …")
    ids = "".join(f'"{document.id}"\n' for document in documents)
    assert store.manifest.inputs == {
        "model": lm.id,
        "tokenizer": lm.tokenizer_id,
        "corpus": hashlib.sha256(ids.encode()).hexdigest(),
    }
    facts = store.manifest.facts
    assert facts["model"] == lm.name and facts["sites"] == ["layers.1.resid_post"]
    assert (facts["d_in"], facts["context"], facts["positions"]) == (48, 64, "all")
    assert (facts["dtype"], facts["documents"], facts["tokens"]) == ("float32", 12, store.n_tokens)
    assert (store.manifest.made_by.seed, store.manifest.made_by.command) == (3, "unbraid capture …")
    assert [record["id"] for record in store.documents()] == [document.id for document in documents]
    assert (store.model_id, store.tokenizer_id, store.d_in(SITE)) == (lm.id, lm.tokenizer_id, 48)


def test_float16_is_float32_rounded(lm: LanguageModel, texts: Make, tmp_path: Path) -> None:
    full, _ = everything(capture(lm, texts(9), SMALL, tmp_path / "full"))
    half = capture(lm, texts(9), dataclasses.replace(SMALL, dtype="float16"), tmp_path / "half")
    assert torch.equal(everything(half)[0], full.half())


def test_progress_reports_tokens(lm: LanguageModel, texts: Make, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = dataclasses.replace(SMALL, tokens=500)
    capture(
        lm,
        texts(50),
        config,
        tmp_path / "out",
        progress=lambda done, total, note="": seen.append((done, total)),
    )
    assert seen == sorted(seen) and seen[-1] == (500, 500) and len(seen) > 1


# --- batching ---


def test_batches_are_full_of_like_lengths_and_depend_on_the_data_alone(
    lm: LanguageModel, texts: Make
) -> None:
    def plan() -> list[list[list[tuple[int, int]]]]:
        groups = Plan(lm, texts(200), 64, 256, "all", None)
        return [[[(p.document, len(p.window.input_ids)) for p in b] for b in g.batches] for g in groups]

    groups = plan()
    assert groups == plan() and len(groups) > 1
    for group in groups:
        lengths = [length for batch in group for _, length in batch]
        assert lengths == sorted(lengths)
        for batch in group:
            assert len(batch) * batch[-1][1] <= 256
    padded = sum(len(b) * b[-1][1] for g in groups for b in g)
    assert padded < 1.15 * sum(length for g in groups for b in g for _, length in b)


@given(lengths=st.lists(st.integers(1, 64), max_size=120))
def test_no_window_is_lost_and_only_small_batches_are_padded_much(lengths: list[int]) -> None:
    pieces = [
        Piece(
            TokenisedDocument("a", (0,) * n, *((False,) * n,) * 5, (0,) * n), number, np.ones(n, dtype=bool)
        )
        for number, n in enumerate(lengths)
    ]
    batches = batched(pieces, 256)
    assert sorted(p.document for batch in batches for p in batch) == list(range(len(lengths)))
    for batch in batches:
        sizes = [len(p.window.input_ids) for p in batch]
        # Up to its last window a batch was either not an eighth full or padded by a sixteenth at most.
        assert sum(sizes[:-1]) < 256 / 8 or sum(sizes) >= 15 / 16 * len(sizes) * max(sizes)


def test_a_window_beyond_the_batch_size_stands_alone(lm: LanguageModel) -> None:
    groups = list(Plan(lm, [Document.of_text("wait " * 50)] * 3, 100, 8, "all", None))
    batches = [[len(p.window.input_ids) for p in batch] for group in groups for batch in group.batches]
    assert [batch for batch in batches if max(batch) > 8] == [[100], [100], [100]]
    assert batched([], 8) == []


def test_the_corpus_is_read_only_as_far_as_needed(lm: LanguageModel, texts: Make, tmp_path: Path) -> None:
    read = 0

    def endless() -> Iterator[Document]:
        nonlocal read
        while True:
            yield from texts(10, seed=read)
            read += 10

    capture(lm, endless(), dataclasses.replace(SMALL, tokens=500), tmp_path / "out")
    assert read < 100


# --- refusals ---


def refused(says: str, out: Path, *args: Any, **changes: Any) -> None:
    config = dataclasses.replace(SMALL, **changes)
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError, match=says) as caught:
        capture(args[0], args[1], config, out)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before  # nothing made, nothing lost


def test_impossible_captures_are_refused_and_leave_no_trace(
    lm: LanguageModel, texts: Make, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused("no documents", out, lm, [])
    refused("no token", out, lm, [Document.of_text("")])
    refused("no token of an assistant's reply", out, lm, texts(3), positions="reply")
    refused("no token in a mask", out, lm, texts(3), positions="mask")
    refused("no field stratum", out, lm, texts(3), per_stratum=2)
    refused("layers.7.resid_post does not exist", out, lm, texts(3), sites=(Site(7, "resid_post"),))
    refused("context 513 is longer than the 512", out, lm, texts(3), context=513)
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    refused("exists already", out, lm, texts(3))
    assert (out / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("sites", (), "--site"),
        ("sites", ("layers.1.resid_post", "blocks.1.hook_resid_post"), "given twice"),
        ("sites", ("layers.1.resid",), "not known"),
        ("tokens", 0, "--tokens"),
        ("context", 0, "--context"),
        ("batch_tokens", -1, "--batch-tokens"),
        ("shard_tokens", 0, "--shard-tokens"),
        ("positions", "some", "--positions"),
        ("per_document", 0, "--per-document"),
        ("per_stratum", 0, "--per-stratum"),
        ("skip_norm_above", 1.0, "--skip-norm-above"),
        ("skip_norm_above", float("nan"), "--skip-norm-above"),
        ("dtype", "int4", "--dtype"),
    ],
)
def test_impossible_settings_are_refused(field: str, value: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        dataclasses.replace(SMALL, **{field: value})


@pytest.fixture()
def loud(tiny_llama: Path) -> LanguageModel:
    """A model whose residual stream is far beyond float16."""
    lm = load_model(tiny_llama)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.mul_(1e6)
    return lm


def test_values_beyond_float16_are_refused_by_name(loud: LanguageModel, texts: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(
        r"layers.1.resid_post in document \w{16} is beyond float16's 65504; capture with --dtype float32",
        out,
        loud,
        texts(3),
        dtype="float16",
    )
    values, _ = everything(capture(loud, texts(3), SMALL, out))
    assert float(values.abs().max()) > 65504


def test_values_that_are_not_finite_are_refused(loud: LanguageModel, texts: Make, tmp_path: Path) -> None:
    with torch.no_grad():
        loud.model.get_input_embeddings().weight.fill_(float("nan"))
    refused("not finite at layers.1.resid_post in document", tmp_path / "out", loud, texts(3))


# --- stopped and continued ---


class Stop(Exception):
    pass


def stop_after(rows: int) -> Callable[..., None]:
    def progress(done: int, total: int, note: str = "") -> None:
        if done >= rows:
            raise Stop

    return progress


def stopped(lm: LanguageModel, documents: Iterator[Document], out: Path, rows: int = 1000) -> Path:
    with pytest.raises(Stop):
        capture(lm, documents, SMALL, out, progress=stop_after(rows))
    partial = out.parent / f".{out.name}.partial"
    assert len(list(partial.glob("shard-*"))) == rows // 300
    return partial


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def strata(documents: Iterator[Document]) -> Iterator[Document]:
    """The documents in two strata, every eighth in the rare one."""
    for n, document in enumerate(documents):
        yield dataclasses.replace(document, stratum="often" if n % 8 else "rare")


CHOSEN: list[dict[str, Any]] = [
    {"per_document": 7},
    {"per_stratum": 6},
    {"skip_norm_above": 1.2},
    {"skip_norm_above": 1.05, "per_document": 20, "per_stratum": 10, "tokens": 700, "context": 32},
]


@pytest.mark.parametrize("rows", [1, 301])
@pytest.mark.parametrize("chosen", CHOSEN, ids=str)
def test_a_stopped_capture_of_chosen_tokens_continues_to_the_same_bytes(
    lm: LanguageModel, texts: Make, tmp_path: Path, rows: int, chosen: dict[str, Any]
) -> None:
    config = dataclasses.replace(SMALL, shard_tokens=100, **chosen)
    whole = capture(lm, strata(texts(80)), config, tmp_path / "whole", seed=5)
    assert whole.n_tokens > 400  # or else nothing would be stopped
    with pytest.raises(Stop):
        capture(lm, strata(texts(80)), config, tmp_path / "out", seed=5, progress=stop_after(rows))
    if rows > 100 and {"per_document", "per_stratum"} & chosen.keys():
        with pytest.raises(UserError, match=r"other settings \(seed\)"):
            capture(lm, strata(texts(80)), config, tmp_path / "out", seed=6)
    capture(lm, strata(texts(80)), config, tmp_path / "out", seed=5)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_what_finished_shards_hold_is_not_read_again_where_norms_are_limited(
    lm: LanguageModel, texts: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(SMALL, skip_norm_above=1.2)
    with pytest.raises(Stop):
        capture(lm, texts(60), config, tmp_path / "out", progress=stop_after(1500))
    with (tmp_path / ".out.partial" / "skipped.jsonl").open("a") as file:
        file.write('{"rows": 1')  # as a kill leaves it
    read: list[int] = []

    def counting(model: Any, ids: torch.Tensor, *rest: Any) -> Any:
        read.append(len(ids))
        return read_sites(model, ids, *rest)

    monkeypatch.setattr(room, "read_sites", counting)
    capture(lm, texts(60), config, tmp_path / "out")
    resumed, read[:] = len(read), []
    capture(lm, texts(60), config, tmp_path / "whole")
    assert 0 < resumed < len(read) / 2
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_leftovers_of_another_run_without_a_shard_do_not_matter(
    lm: LanguageModel, texts: Make, tmp_path: Path
) -> None:
    limited = dataclasses.replace(SMALL, skip_norm_above=1.2)
    with pytest.raises(Stop):
        capture(lm, texts(60, seed=1), limited, tmp_path / "out", progress=stop_after(1))
    capture(lm, texts(60), limited, tmp_path / "out")
    capture(lm, texts(60), limited, tmp_path / "whole")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    with pytest.raises(Stop):
        capture(lm, texts(60), limited, tmp_path / "plain", progress=stop_after(1))
    capture(lm, texts(60), SMALL, tmp_path / "plain")
    assert not (tmp_path / "plain" / "skipped.jsonl").exists()


# --- which tokens ---


def test_the_last_token_is_the_documents_and_not_its_windows(lm: LanguageModel, tmp_path: Path) -> None:
    documents = [Document.of_text("wait " * n) for n in (3, 100, 7)]
    _, table = everything(
        capture(lm, documents, dataclasses.replace(SMALL, context=16, positions="last"), tmp_path / "out")
    )
    ends = [len(tokenise(lm, document, 10_000).input_ids) - 1 for document in documents]
    assert sorted(map(tuple, table[:, :2].tolist())) == list(enumerate(ends))


def test_a_documents_share_is_a_uniform_sample_of_all_its_windows(lm: LanguageModel, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, context=16, per_document=5)
    documents = [Document.of_text("wait " * 80, id=str(n)) for n in range(200)] + [Document.of_text("wait")]

    def table(out: str, seed: int) -> list[tuple[int, ...]]:
        store = capture(lm, documents, config, tmp_path / out, seed=seed)
        assert store.manifest.facts["per_document"] == 5
        return sorted(map(tuple, everything(store)[1][:, :2].tolist()))

    drawn = table("a", 1)
    counts = torch.bincount(torch.tensor(drawn)[:, 0])
    assert counts[:-1].unique().tolist() == [5] and counts[-1] < 5
    assert drawn == table("b", 1) and drawn != table("c", 2)
    length = len(tokenise(lm, documents[0], 10_000).input_ids)
    places = torch.tensor([position for n, position in drawn if n < 200]).double()
    # 1,000 draws of a uniform place: the mean is within 4 standard errors of the middle.
    assert abs(places.mean() - (length - 1) / 2) < 4 * length / 12**0.5 / 1000**0.5
    # What one document gives does not depend on the others.
    alone = capture(lm, documents[3:4], config, tmp_path / "d", seed=1)
    assert sorted(everything(alone)[1][:, 1].tolist()) == [p for n, p in drawn if n == 3]


def test_tokens_of_extreme_norm_are_skipped_and_counted(
    tiny_llama: Path, texts: Make, tmp_path: Path
) -> None:
    lm = load_model(tiny_llama)
    loud = tokenise(lm, Document.of_text("doctor"), 10).input_ids[1]
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[loud] *= 100
    sites = (Site(0, "resid_post"), Site(2, "mlp_out"))
    config = dataclasses.replace(SMALL, sites=sites, skip_norm_above=3.0)
    documents = list(texts(30))
    full = capture(lm, documents, dataclasses.replace(config, skip_norm_above=None), tmp_path / "full")
    store = capture(lm, documents, config, tmp_path / "some")
    values, table = zip(*(everything(full, site) for site in sites), strict=True)
    norms = [x.norm(dim=1) for x in values]
    small = torch.stack([n <= 3 * float(n.quantile(0.5)) for n in norms]).all(dim=0)
    kept, places = everything(store, sites[0])
    assert 0 < int((~small).sum()) < len(small) / 2
    assert torch.equal(places, table[0][small]) and torch.equal(kept, values[0][small])
    assert torch.equal(everything(store, sites[1])[0], values[1][small])
    facts = store.manifest.facts["skip_norm_above"]
    assert (facts["times"], facts["skipped"]) == (3.0, int((~small).sum()))
    assert facts["measured_on_tokens"] == full.n_tokens
    for site, n in zip(sites, norms, strict=True):
        assert facts["medians"][str(site)] == pytest.approx(float(n.quantile(0.5)), rel=1e-5)
    captured = torch.bincount(places[:, 0], minlength=30).tolist()
    assert [record["captured"] for record in store.documents()] == captured
    assert full.n_tokens == store.n_tokens + facts["skipped"]


def test_values_that_are_not_finite_are_refused_and_not_skipped(
    loud: LanguageModel, texts: Make, tmp_path: Path
) -> None:
    token = tokenise(loud, Document.of_text("doctor"), 10).input_ids[1]
    with torch.no_grad():
        loud.model.get_input_embeddings().weight[token] = float("nan")
    refused("not finite", tmp_path / "out", loud, texts(9), skip_norm_above=2.0)


@pytest.mark.parametrize("rows", [1, 601, 2400])
def test_a_stopped_capture_continues_to_the_same_bytes(
    lm: LanguageModel, texts: Make, tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(lm, texts(60), SMALL, tmp_path / "whole")
    with pytest.raises(Stop):
        capture(lm, texts(60), SMALL, tmp_path / "out", progress=stop_after(rows))
    read: list[int] = []

    def counting(model: Any, ids: torch.Tensor, *rest: Any) -> Any:
        read.append(len(ids))
        return read_sites(model, ids, *rest)

    monkeypatch.setattr(room, "read_sites", counting)
    store = capture(lm, texts(60), SMALL, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    batches = sum(len(group.batches) for group in Plan(lm, texts(60), 64, 256, "all", None))
    assert len(read) < batches or rows < 300  # what is on disk is not computed again
    assert ActivationStore(tmp_path / "out", check=True).n_tokens == store.n_tokens


def test_a_continued_capture_with_other_settings_or_documents_is_refused(
    lm: LanguageModel, texts: Make, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    partial = stopped(lm, texts(60), out)
    before = {name: data for name, data in bytes_of(partial).items() if name.startswith("sh")}
    for changes, named in (
        ({"dtype": "float16"}, "dtype"),
        ({"context": 32, "tokens": 900}, "context, tokens"),
        ({"sites": (Site(0, "resid_post"),)}, "sites"),
    ):
        with pytest.raises(UserError, match=rf"begun with other settings \({named}\)"):
            capture(lm, texts(60), dataclasses.replace(SMALL, **changes), out)
    for other in (texts(60, seed=1), texts(10)):
        with pytest.raises(UserError, match=r"begun with other settings \(corpus\)"):
            capture(lm, other, SMALL, out)
    assert before.items() <= bytes_of(partial).items()
    capture(lm, texts(60), SMALL, out)
    capture(lm, texts(60), SMALL, tmp_path / "whole")
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("truncated", [False, True])
def test_a_damaged_shard_of_a_stopped_capture_is_named(
    lm: LanguageModel, texts: Make, tmp_path: Path, truncated: bool
) -> None:
    partial = stopped(lm, texts(60), tmp_path / "out")
    shard = partial / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(shard.read_bytes()[:-1] if truncated else data)
    says = f"{shard} is missing or not what was written there; delete {partial} and capture again"
    with pytest.raises(IntegrityError, match=re.escape(says)):
        capture(lm, texts(60), SMALL, tmp_path / "out")


def test_leftovers_of_a_kill_between_two_writes_are_no_obstacle(
    lm: LanguageModel, texts: Make, tmp_path: Path
) -> None:
    partial = stopped(lm, texts(60), tmp_path / "out")
    (partial / "shard-00003.safetensors").write_bytes(b"finished but not recorded")
    (partial / ".shard-00004.safetensors.1.writing").write_bytes(b"half")
    with (partial / "shards.jsonl").open("a") as file:
        file.write('{"file": "shard-000')
    (partial / "manifest.json").write_text("{}")
    capture(lm, texts(60), SMALL, tmp_path / "out")
    capture(lm, texts(60), SMALL, tmp_path / "whole")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_sites_that_are_wider_than_the_stream_keep_their_width(
    lm: LanguageModel, texts: Make, tmp_path: Path
) -> None:
    config = Qwen3Config(
        vocab_size=len(lm.tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=20,
    )
    wide = wrap_model(Qwen3ForCausalLM(config), lm.tokenizer, name="wide")
    z, after = Site(0, "attn_z"), Site(None, "final_norm")
    sites = (z, Site(0, "mlp_in"), after)
    documents = list(texts(8))
    store = capture(wide, documents, dataclasses.replace(SMALL, sites=sites), tmp_path / "out")
    assert [store.d_in(site) for site in sites] == [80, 48, 48]
    assert store.manifest.facts["d_in"] == 48 and store.manifest.facts["widths"] == {"layers.0.attn_z": 80}
    window = next(iter(windows(wide, documents[0], 64)))
    ids = torch.tensor([window.input_ids])
    alone = read_sites(wide, ids, torch.ones_like(ids), list(sites))
    first = int(window.captured("all").nonzero()[0][0])
    for site in sites:
        assert ActivationStore(tmp_path / "out").site(str(site)) == site
        values, table = everything(store, site)
        row = int(((table[:, 0] == 0) & (table[:, 1] == window.positions[first])).nonzero()[0])
        torch.testing.assert_close(values[row], alone[site][0, first], rtol=1e-4, atol=1e-4)
    ordinary = capture(wide, documents, SMALL, tmp_path / "ordinary")
    assert "widths" not in ordinary.manifest.facts
