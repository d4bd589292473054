"""Sentences as unit vectors, by a sentence-embedding model on this machine; nothing is downloaded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from numpy.typing import NDArray

from unbraid.manifest.errors import UserError
from unbraid.manifest.identity import sha256_file

FOLDER = "UNBRAID_EMBEDDER"
"""Environment variable that names the folder of an embedding model."""
USUAL = "sentence-transformers/all-MiniLM-L6-v2"
"""Model on the Hub that is used where it was downloaded before and none is named."""
MOST_TOKENS = 256
"""Tokens of a sentence that are read, where a model can read as many."""


class Embedder(Protocol):
    """Whatever turns sentences into vectors."""

    @property
    def id(self) -> str:
        """Names the model: vectors of different ids are not compared."""
        ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors (n, d) of n texts."""
        ...


def open_embedder(folder: Path | None = None) -> SentenceModel:
    """The model in `folder`, else in the folder that UNBRAID_EMBEDDER names, else the usual one, where it
    was downloaded.

    Raises UserError, saying how to get it, where there is none.
    """
    if folder is None and (named := os.environ.get(FOLDER)):
        folder = Path(named)
    if folder is not None:
        return SentenceModel(folder)
    if isinstance(cached := try_to_load_from_cache(USUAL, "config.json"), str):
        return SentenceModel(Path(cached).parent)
    raise UserError(
        f"searching by meaning needs a sentence-embedding model on this machine: hf download {USUAL}, or name"
        f" the folder of one in {FOLDER}"
    )


class SentenceModel:
    """A folder with a Hugging Face encoder: the mean over a text's tokens of what its last layer says.

    Reimers and Gurevych 2019, "Sentence-BERT", arXiv 1908.10084.  Models that say in 1_Pooling/config.json
    that they use the first token are read so.  Raises UserError for a folder without such a model.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        weights = folder / "model.safetensors"
        if not weights.is_file() or not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} holds no embedding model: it needs config.json and model.safetensors; name another"
            )
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model: Any = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
            ).eval()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"the embedding model in {folder} cannot be loaded ({error}); name another"
            ) from error
        if self._tokenizer.pad_token is None:
            raise UserError(f"the model in {folder} has no token to pad with, so it is no embedding model")
        # Positions that it never learned would be read past the end of its table.
        self._longest = min(MOST_TOKENS, self._tokenizer.model_max_length)
        self._first = _pooling(folder).get("pooling_mode_cls_token", False)
        self.id = sha256_file(weights)
        """SHA-256 of its weights."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors (n, d); a text without a token has the vector of an empty one."""
        found: list[NDArray[np.float32]] = []
        # Texts of like length together, so that little is spent on padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), 64):
            some = [texts[i] for i in order[start : start + 64]]
            inputs = self._tokenizer(
                some, padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
            )
            with torch.no_grad():
                states = self._model(**inputs).last_hidden_state  # (n, T, d)
            mask = inputs["attention_mask"][:, :, None].to(states.dtype)
            vectors = states[:, 0] if self._first else (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            found.append(torch.nn.functional.normalize(vectors.float(), dim=1).numpy())
        vectors = (
            np.concatenate(found) if found else np.empty((0, self._model.config.hidden_size), np.float32)
        )
        back = np.empty_like(vectors)
        back[order] = vectors
        return back


def _pooling(folder: Path) -> dict[str, Any]:
    path = folder / "1_Pooling" / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
