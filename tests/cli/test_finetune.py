"""What `unbraid finetune` says when it is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from unbraid.cli import main

from .conftest import index_words


@pytest.mark.parametrize("steps", [1, 2])
def test_one_line_of_its_log_is_no_change(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    words = index_words(tmp_path, tiny_llama, ["once upon a time"] * 40, d_sae=16, k=2)[1:]
    words += [
        "--steps",
        str(steps),
        "--log-every",
        "1",
        "--batch-tokens",
        "8",
        "--out",
        str(tmp_path / "new"),
    ]
    assert main(["finetune", *words]) == 0
    said = capsys.readouterr().out
    assert ("KL went from" in said) == (steps == 2) and "KL" in said
