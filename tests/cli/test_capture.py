"""`unbraid capture`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unbraid.activations.store import ActivationStore
from unbraid.cli import main


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"the red ball {i} was delayed by the storm" for i in range(20)))
    return path


def arguments(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    words = ["capture", "--model", str(model), "--site", "layers.1.resid_post"]
    return [*words, "--text", str(text), "--out", str(out), *more]


def test_json_says_what_was_made(tiny_gpt2: Path, text: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    more = ["--site", "blocks.0.hook_mlp_out", "--tokens", "100", "--shard-tokens", "64", "--json"]
    assert main(arguments(tiny_gpt2, text, out, *more)) == 0
    said = json.loads(capsys.readouterr().out)
    store = ActivationStore(out, check=True)
    assert said["tokens"] == store.n_tokens == 100 and said["shards"] == len(store.shards) == 2
    assert said["sites"] == ["layers.1.resid_post", "layers.0.mlp_out"] and said["id"] == store.id
    assert store.manifest.made_by.command == (
        f"unbraid capture --model {tiny_gpt2} --site layers.1.resid_post --site blocks.0.hook_mlp_out"
        f" --text {text} --out {out} --tokens 100 --shard-tokens 64"
    )


def test_a_sentence_says_that_the_corpus_was_too_small(
    tiny_gpt2: Path, text: Path, tmp_path: Path, capsys
) -> None:
    assert main(arguments(tiny_gpt2, text, tmp_path / "out", "--tokens", "1000000")) == 0
    assert "1,000,000 were asked for" in capsys.readouterr().out


def test_what_the_model_computes_in_is_recorded(tiny_gpt2: Path, text: Path, tmp_path: Path, capsys) -> None:
    made = {}
    for dtype in ("float32", "bfloat16", "float16"):
        out = tmp_path / dtype
        assert main(arguments(tiny_gpt2, text, out, "--model-dtype", dtype)) == 0
        made[dtype] = store = ActivationStore(out)
        assert store.manifest.facts["computed"] == dtype
        assert ("--model-dtype" in store.manifest.made_by.command) == (dtype != "float32")
    rows = {dtype: store.read("layers.1.resid_post", 0).float() for dtype, store in made.items()}
    # Batches are the same, so rows are: off by bfloat16's 8 bits, float16's 11.
    for dtype, bits in (("bfloat16", 8), ("float16", 11)):
        off = (rows[dtype] - rows["float32"]).norm() / rows["float32"].norm()
        assert 2**-bits / 8 < off < 2**-bits * 4


def test_what_was_chosen_is_said_and_recorded(tiny_gpt2: Path, tmp_path: Path, capsys) -> None:
    text = tmp_path / "corpus.jsonl"
    records = [{"text": f"the red ball {i} was delayed", "stratum": "a" if i % 9 else "b"} for i in range(45)]
    text.write_text("".join(json.dumps(record) + "\n" for record in records))
    more = ["--per-stratum", "5", "--per-document", "3", "--skip-norm-above", "1.1", "--seed", "4"]
    assert main(arguments(tiny_gpt2, text, tmp_path / "out", *more)) == 0
    said = capsys.readouterr().out
    facts = ActivationStore(tmp_path / "out").manifest.facts
    kept, skipped = facts["strata"]["a"]["kept"], facts["skip_norm_above"]["skipped"]
    assert 5 < kept < 40 and skipped > 0
    assert (
        f"{skipped} more were skipped for their norm; documents by stratum: {kept} of 40 a, 5 of 5 b" in said
    )
    made_by = ActivationStore(tmp_path / "out").manifest.made_by
    assert made_by.seed == 4 and made_by.command.endswith(
        "--per-document 3 --per-stratum 5 --skip-norm-above 1.1 --seed 4"
    )
    assert main(arguments(tiny_gpt2, text, tmp_path / "again", *more, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["strata"] == facts["strata"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--site", "layers.9.resid_post"], "layers.9.resid_post"),
        (["--site", "layers.0.resid"], "not known"),
        (["--context", "257"], "context 257"),
        (["--tokens", "0"], "--tokens"),
        (["--text", "missing.txt"], "missing.txt is not a file"),
        (["--model", "./missing"], "--model"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_two(
    tiny_gpt2: Path, text: Path, tmp_path: Path, capsys, more: list[str], says: str
) -> None:
    before = sorted(tmp_path.iterdir())
    assert main(arguments(tiny_gpt2, text, tmp_path / "out", *more)) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and says in printed.err.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_folder_stays_as_it_is(tiny_gpt2: Path, text: Path, tmp_path: Path, capsys) -> None:
    assert main(arguments(tiny_gpt2, text, tmp_path)) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


def test_list_sites_says_what_there_is_and_what_not(tiny_gpt2: Path, capsys) -> None:
    assert main(["capture", "--list-sites", str(tiny_gpt2)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["site", "layers", "width"]
    assert "attn_z               0-1          32 (4 heads of 8)" in lines
    assert "final_norm           after all    32" in lines
    assert "no router: its layers have no mixture of experts" in lines
    assert main(["capture", "--list-sites", str(tiny_gpt2), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {"site": "mlp_in", "layers": [0, 1], "width": 32} in said["sites"]
    assert said["missing"].keys() == {"router", "cross_out"}


def test_what_is_not_given_is_named(capsys) -> None:
    assert main(["capture", "--model", "x", "--site", "layers.0.resid_post"]) == 2
    assert "--text, --out must be given, or --list-sites MODEL alone" in capsys.readouterr().err


def test_append_takes_the_sites_and_says_what_is_new(
    tiny_gpt2: Path, text: Path, tmp_path: Path, capsys
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    assert main(arguments(tiny_gpt2, text, old, "--tokens", "150", "--shard-tokens", "64")) == 0
    printed = capsys.readouterr()
    row = 32 * 2 + 12
    assert f"capture: up to {150 * row / 1000:.1f} kB will be written to {old};" in printed.err
    text.write_text(text.read_text() + "\n\nthe red ball is back")
    words = ["capture", "--model", str(tiny_gpt2), "--text", str(text), "--shard-tokens", "64"]
    words += ["--append", str(old), "--out", str(new)]
    assert main([*words, "--tokens", "100000"]) == 0
    printed = capsys.readouterr()
    store = ActivationStore(new, check=True)
    assert store.n_documents == 21 and [str(site) for site in store.sites] == ["layers.1.resid_post"]
    assert f"at layers.1.resid_post, {store.n_tokens - 150} of them new beside 150 of " in printed.out
    assert "100,000 were asked for" in printed.out
    assert store.manifest.made_by.command.endswith(f"--append {old} --tokens 100000 --shard-tokens 64")
    assert main([*words, "--json", "--out", str(tmp_path / "rest")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tokens"] == store.n_tokens and said["appended"]["tokens"] == 150
    words[words.index("--append") + 1] = str(new)
    assert main([*words, "--out", str(tmp_path / "more")]) == 2
    assert "no token that was not captured before" in capsys.readouterr().err
    assert main([*words[:-2], "--out", str(tmp_path / "more"), "--context", "32"]) == 2
    assert "new was captured with context 256 and not 32" in capsys.readouterr().err


def test_what_the_disk_has_no_room_for_is_refused(
    tiny_gpt2: Path, text: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    assert main(arguments(tiny_gpt2, text, out, "--tokens", "1000", "--disk-budget", "20kB")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{out} needs 76.0 kB for 1,000 rows, more than the --disk-budget of 20.0 kB" in said
    assert main(arguments(tiny_gpt2, text, out, "--disk-budget", "lots")) == 2
    assert "--disk-budget 'lots' is no size" in capsys.readouterr().err
    huge = ["--tokens", str(10**15)]
    assert main(arguments(tiny_gpt2, text, out, *huge)) == 2
    assert "are free there; choose fewer --tokens, fewer --site or another --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]
