"""Builds that are killed, shared among workers, or grown end with the bytes of one that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import unbraid
from unbraid.activations.documents import Document
from unbraid.features.index import IndexConfig, Share, build_index
from unbraid.features.merging import merge_indexes
from unbraid.features.page import Index
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import check_files
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE

# One window a batch, so that a token's activation does not depend on which others it was read with.
CONFIG = IndexConfig(
    context=24, batch_tokens=1, top=5, quantiles=4, per_group=2, reservoir=20, window=3, same_context=3,
    part=400, save_seconds=0,
)  # fmt: skip
STRATA = ("one", "two", "three")


@pytest.fixture(scope="module")
def corpus(documents: list[Document]) -> list[Document]:
    return [replace(d, stratum=STRATA[n % 3]) for n, d in enumerate(documents)]


@pytest.fixture(scope="module")
def whole(
    sae: SAE, lm: LanguageModel, corpus: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> Index:
    out = tmp_path_factory.mktemp("indexes") / "index"
    return build_index(sae, lm, corpus, CONFIG, out, sae_id="an autoencoder", command="a command")


class Killed(Exception):
    pass


def _stop_after(parts: int, folder: Path, before: list[int] | None = None) -> Progress:
    """A progress that ends the run while the part after so many is read; `before` gets what was done then."""

    def progress(done: int, total: int, note: str = "") -> None:
        if len(list((folder / ".index.partial" / "passages").glob("*.arrow"))) >= parts:
            raise Killed
        if before is not None:
            before.append(done)

    return progress


@pytest.mark.parametrize("parts", [0, 1, 3])
def test_a_build_that_was_stopped_goes_on(
    parts: int, whole: Index, sae: SAE, lm: LanguageModel, corpus: list[Document], tmp_path: Path
) -> None:
    out, before, read = tmp_path / "index", list[int](), list[int]()
    stop = _stop_after(parts, tmp_path, before)
    with pytest.raises(Killed):
        build_index(sae, lm, corpus, CONFIG, out, sae_id="an autoencoder", progress=stop)
    assert not out.exists()
    rebuilt = build_index(
        sae, lm, corpus, CONFIG, out, sae_id="an autoencoder", command="a command",
        progress=lambda done, total, note="": read.append(done) if note == "tokens" else None,
    )  # fmt: skip
    assert rebuilt.manifest.files == whole.manifest.files and rebuilt.manifest.id == whole.manifest.id
    assert check_files(out).id == whole.manifest.id
    assert bool(before) == bool(parts)
    assert read[0] > max(before, default=0)  # what was saved was not read again
    with pytest.raises(UserError, match="exists already"):
        build_index(sae, lm, corpus, CONFIG, out, sae_id="an autoencoder")


def test_other_settings_or_another_text_do_not_go_on(
    sae: SAE, lm: LanguageModel, corpus: list[Document], tmp_path: Path
) -> None:
    out = tmp_path / "index"
    with pytest.raises(Killed):
        build_index(sae, lm, corpus, CONFIG, out, sae_id="one", progress=_stop_after(2, tmp_path))
    with pytest.raises(UserError, match="other settings or inputs"):
        build_index(sae, lm, corpus, CONFIG, out, sae_id="another")
    with pytest.raises(UserError, match="the text has changed"):
        build_index(sae, lm, corpus[1:], CONFIG, out, sae_id="one")


SCRIPT = """
import sys, time
from pathlib import Path
from unbraid.activations.documents import read_documents
from unbraid.features.index import IndexConfig, build_index
from unbraid.model.load import load_model
from unbraid.sae.base import SAE
import json, torch
torch.set_num_threads(1)
model, sae, text, out, config, last = sys.argv[1:]
config = IndexConfig(**json.loads(config))
print("ready", flush=True)
said = 0

def progress(done, total, note=""):
    global said
    print(done, note, flush=True)
    said += 1
    if said == int(last):  # a kill never comes too late, however busy the machine is
        time.sleep(10**6)

build_index(SAE.from_pretrained(sae), load_model(model), read_documents(text), config, Path(out), sae_id="s",
            command="a command", progress=progress)
"""


def test_sigkill_at_any_moment_leaves_what_goes_on_to_the_same_bytes(
    sae: SAE, tiny_llama: Path, corpus: list[Document], tmp_path: Path
) -> None:
    sae.save_pretrained(tmp_path / "sae")
    text = tmp_path / "text.jsonl"
    records = [
        {"id": d.id, "stratum": d.stratum, **({"text": d.text} if d.text else {"messages": d.messages})}
        for d in corpus
    ]
    text.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = str(Path(unbraid.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}

    config = replace(CONFIG, part=150)

    def start(out: Path, last: int = 0) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", SCRIPT, str(tiny_llama), str(tmp_path / "sae"), str(text), str(out)]
        words += [json.dumps({**config.recorded(), "save_seconds": 0}), str(last)]
        stdout = subprocess.PIPE if out.name == "index" else subprocess.DEVNULL
        return subprocess.Popen(words, stdout=stdout, text=True, env=environment)

    # By a process of the same kind: what a product's last bits are may depend on what ran before it.
    assert start(tmp_path / "alone").wait() == 0
    undisturbed = Index(tmp_path / "alone")
    out, begun = tmp_path / "index", list[int]()
    for after in (9, 5):  # lines of progress; the second run goes on from the first
        run = start(out, after + 3)
        assert run.stdout is not None
        lines = [run.stdout.readline() for _ in range(1 + after)]
        run.send_signal(signal.SIGKILL)  # anywhere in what follows: writing a part, a state
        assert run.wait() == -signal.SIGKILL and not out.exists()
        run.stdout.close()
        begun.append(int(lines[1].split()[0]))
    run = start(out)
    lines = run.communicate()[0].splitlines()
    begun.append(int(lines[1].split()[0]))
    # What was saved is not read again; what was under way when the kill came may be.
    assert run.returncode == 0 and begun[0] < begun[1] <= begun[2]
    assert Index(out).manifest.files == undisturbed.manifest.files
    assert check_files(out).id == undisturbed.manifest.id


@pytest.mark.parametrize("of", [2, 3])
def test_shares_merge_to_the_bytes_of_one_worker(
    of: int, whole: Index, sae: SAE, lm: LanguageModel, corpus: list[Document], tmp_path: Path
) -> None:
    shares = [
        build_index(sae, lm, corpus, CONFIG, tmp_path / str(n), sae_id="an autoencoder", share=Share(n, of))
        for n in range(of, 0, -1)
    ]
    assert sum(share.n_tokens for share in shares) == whole.n_tokens
    merged = merge_indexes(shares, tmp_path / "merged")
    assert merged.manifest.files == whole.manifest.files
    assert {**merged.manifest.facts} == {**whole.manifest.facts}
    assert merged.manifest.inputs["share 1"] == shares[-1].manifest.id
    assert merged.manifest.inputs["documents"] == whole.manifest.inputs["documents"]
    assert merged.latent(5) == whole.latent(5)
    with pytest.raises(UserError, match=f"each of 1/{of} … {of}/{of} once"):
        merge_indexes(shares[1:], tmp_path / "half")
    with pytest.raises(UserError, match="one worker's share"):
        build_index(sae, lm, corpus, CONFIG, tmp_path / "no", sae_id="an autoencoder", append=shares[0])


def test_shares_of_a_budget_stop_where_one_worker_does(
    sae: SAE, lm: LanguageModel, corpus: list[Document], tmp_path: Path
) -> None:
    config = replace(CONFIG, tokens=300)
    alone = build_index(sae, lm, corpus, config, tmp_path / "alone", sae_id="x")
    shares = [
        build_index(sae, lm, corpus, config, tmp_path / str(n), sae_id="x", share=Share(n, 2)) for n in (1, 2)
    ]
    assert merge_indexes(shares, tmp_path / "merged").manifest.files == alone.manifest.files


@pytest.mark.parametrize("grown", [True, False])
def test_an_index_grows_with_its_corpus(
    grown: bool, whole: Index, sae: SAE, lm: LanguageModel, corpus: list[Document], tmp_path: Path
) -> None:
    """The new index knows all that one of the whole corpus does, and the old one stays as it is."""
    old = build_index(sae, lm, corpus[:11], CONFIG, tmp_path / "old", sae_id="an autoencoder")
    text = corpus if grown else corpus[11:]
    new = build_index(sae, lm, text, CONFIG, tmp_path / "new", sae_id="an autoencoder", append=old)
    assert check_files(old.folder).id == old.manifest.id == new.manifest.inputs["index"]
    assert new.n_tokens == whole.n_tokens
    for table in ("latents", "tokens", "coactive", "weights", "neighbours", "vocabulary"):
        name = f"{table}.parquet"
        assert new.manifest.files[name] == whole.manifest.files[name], table
    for latent in range(0, whole.d_sae, 5):
        assert _without_passages(new, latent) == _without_passages(whole, latent)
    part = "passages/000000.arrow"
    assert os.path.samefile(old.folder / part, new.folder / part)  # stored once on the disk, too
    with pytest.raises(UserError, match="does not go on from"):
        build_index(
            sae, lm, [corpus[0], *corpus[5:]], CONFIG, tmp_path / "x", sae_id="an autoencoder", append=old
        )
    with pytest.raises(UserError, match="made with top 5 and not 6"):
        other = replace(CONFIG, top=6)
        build_index(sae, lm, corpus, other, tmp_path / "y", sae_id="an autoencoder", append=old)


def _without_passages(index: Index, latent: int) -> str:
    """A page without the numbers of passages, which say in which part of the corpus a text came."""
    record = index.latent(latent).as_dict()
    for group in (record["top"], *(g["examples"] for g in (*record["quantiles"], *record["intervals"]))):
        for example in group:
            del example["passage"]
    return json.dumps(record)


def test_a_share_is_a_fraction() -> None:
    assert Share.parse("2/3") == Share(2, 3)
    for wrong in ("0/2", "3/2", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(UserError, match="share"):
            Share.parse(wrong)
