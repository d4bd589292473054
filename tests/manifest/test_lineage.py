"""Walking from an artifact to everything it was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from unbraid.manifest.errors import UserError
from unbraid.manifest.lineage import verify
from unbraid.manifest.record import Manifest, write_manifest


def _make(
    folder: Path, kind: str, text: str, *parents: tuple[str, Path, Manifest], **facts: object
) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").write_text(text)
    inputs = {name: manifest.id for name, _, manifest in parents} or {"model": "cd" * 32}
    paths = {name: path for name, path, _ in parents}
    return write_manifest(folder, kind=kind, command="", seed=0, inputs=inputs, facts=facts, paths=paths)


def _chain(root: Path) -> tuple[Path, Path]:
    acts, sae = root / "acts", root / "sae"
    made = _make(acts, "activations", "a")
    _make(sae, "sae", "s", ("activations", acts, made))
    return acts, sae


def test_a_whole_chain_fits(tmp_path: Path) -> None:
    _chain(tmp_path)
    (tmp_path / ".x.partial").mkdir()
    (tmp_path / ".x.partial" / "manifest.json").write_text("half")
    seen: list[str] = []
    report = verify(tmp_path, progress=lambda done, total, note="": seen.append(f"{done}/{total} {note}"))
    assert [(a.path, a.kind, a.problem) for a in report.artifacts] == [
        ("acts", "activations", None),
        ("sae", "sae", None),
    ]
    assert report.problems == ()
    assert report.external == {"model": "cd" * 32}
    assert seen == ["1/2 acts", "2/2 sae"]
    json.dumps(report.as_dict(), allow_nan=False)


def test_a_single_artifact_leads_to_its_inputs_elsewhere(tmp_path: Path) -> None:
    acts, sae = _chain(tmp_path)
    assert [a.path for a in verify(sae).artifacts] == [".", "../acts"]
    (acts / "data").write_text("b")
    assert any(
        str(Path("acts") / "data") in problem and "changed" in problem for problem in verify(sae).problems
    )


def test_an_input_that_was_made_anew_is_named(tmp_path: Path) -> None:
    acts, _ = _chain(tmp_path)
    _make(acts, "activations", "other")
    (problem,) = verify(tmp_path).problems
    assert "sae was made from activations" in problem and str(acts) in problem


def test_an_input_that_is_gone_is_external(tmp_path: Path) -> None:
    acts, _ = _chain(tmp_path)
    shutil.rmtree(acts)
    report = verify(tmp_path)
    assert report.problems == () and set(report.external) == {"activations"}


def test_a_moved_folder_is_still_linked(tmp_path: Path) -> None:
    acts, sae = _chain(tmp_path)
    acts.rename(tmp_path / "renamed")
    assert set(verify(tmp_path).external) == {"model"}
    assert set(verify(sae).external) == {"activations"}


def test_two_models_are_both_listed(tmp_path: Path) -> None:
    for name, model in (("a", "1" * 64), ("b", "2" * 64)):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, kind="k", command="", seed=0, inputs={"model": model}, facts={})
    assert sorted(verify(tmp_path).external.values()) == ["1" * 64, "2" * 64]


def test_an_unreadable_manifest_does_not_hide_the_rest(tmp_path: Path) -> None:
    acts, _ = _chain(tmp_path)
    (acts / "manifest.json").write_text("{")
    report = verify(tmp_path)
    assert {a.kind for a in report.artifacts} == {"unreadable", "sae"}
    assert len(report.problems) == 1 and "acts" in report.problems[0]


def _split(folder: Path, split: str, documents: list[str]) -> None:
    folder.mkdir()
    (folder / "documents.txt").write_text("\n".join(documents) + "\n")
    write_manifest(folder, kind="documents", command="", seed=0, inputs={}, facts={"split": split})


def test_splits_must_not_share_documents(tmp_path: Path) -> None:
    _split(tmp_path / "a", "select", ["d1", "d2"])
    _split(tmp_path / "b", "report", ["d3"])
    _split(tmp_path / "b2", "report", ["d3", "d4"])
    assert verify(tmp_path).problems == ()
    _split(tmp_path / "c", "threshold", ["d2", "d9"])
    (problem,) = verify(tmp_path).problems
    assert "shares 1 document(s)" in problem and "first d2" in problem


def test_nothing_to_verify_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json"):
        verify(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        verify(tmp_path / "missing")
