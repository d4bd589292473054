"""delphi's cache of latents: {hookpoint}/{first}_{last}.safetensors with tokens, locations and activations.

tokens: (n, ctx_len); locations: (m, 3), the row of tokens, the position and the latent less the file's first;
activations: (m,).  Firings are computed anew from the index's own passages, since an index keeps none but
examples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from unbraid.features.page import Index
from unbraid.features.rows import site_of
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building, write_json, writing
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.model.read import read_sites
from unbraid.model.sites import Site
from unbraid.sae.base import SAE

BATCH = 16
"""Passages that go through the model at once."""


def export(
    index: Index,
    out: Path,
    sae: SAE,
    lm: LanguageModel,
    *,
    tokens: int = 1_000_000,
    files: int = 5,
    progress: Progress | None = None,
) -> Path:
    """Write `out`/{site} from the first passages, about `tokens` tokens; memory grows with their firings.

    A passage shorter than the longest is filled up at the end, where nothing fires.  Special tokens do not
    fire either, as in the index; all others may, also where the index counts replies alone.  Raises UserError
    when the folder exists or nothing fires.
    """
    if files < 1 or tokens < 1:
        raise UserError("files and tokens must be at least 1")
    site = site_of(sae, lm, Site.parse(str(index.manifest.facts["site"])))
    passages: list[list[int]] = []
    for part in index.passages.numbers:
        for row in index.passages.part(part)["tokens"]:
            if sum(map(len, passages)) < tokens:
                passages.append(row.as_py())
    length = max(map(len, passages), default=0)
    ids = np.full((len(passages), length), _filler(lm), dtype=np.int64)
    for row, passage in enumerate(passages):
        ids[row, : len(passage)] = passage
    found = [
        _fired(
            ids[first : first + BATCH],
            [len(p) for p in passages[first : first + BATCH]],
            first,
            sae,
            lm,
            site,
        )
        for first in _counted(range(0, len(passages), BATCH), progress)
    ]
    locations = np.concatenate([where for where, _ in found])
    values = np.concatenate([value for _, value in found])
    if not len(values):
        raise UserError(f"no latent of {index.folder} fires on its first {tokens} tokens; give more")
    edges = np.linspace(0, sae.config.d_sae, files + 1).astype(np.int64)
    with building(Path(out)) as folder:
        place = folder / str(site)
        for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            mine = (locations[:, 2] >= first) & (locations[:, 2] < end)
            if mine.any():
                inside = locations[mine] - [0, 0, first]
                small = inside.max() < 2**16
                tensors = {
                    "locations": np.ascontiguousarray(inside.astype(np.uint16 if small else np.uint32)),
                    "activations": values[mine],
                    "tokens": ids,
                }
                with writing(place / f"{first}_{end - 1}.safetensors") as temporary:
                    save_file(tensors, temporary)
        write_json(place / "config.json", _config(index, ids, files))
    return Path(out)


def _config(index: Index, ids: NDArray[np.int64], files: int) -> dict[str, Any]:
    """What delphi asks for; the corpus is not known by a name, and its tokens stand in the files."""
    return {
        "model_name": str(index.manifest.facts["model_name"]),
        "ctx_len": ids.shape[1],
        "n_tokens": int(ids.size),
        "n_splits": files,
        "batch_size": BATCH,
        "dataset_repo": None,
        "dataset_split": None,
        "dataset_name": None,
        "dataset_column": None,
    }


def _fired(
    ids: NDArray[np.int64], lengths: list[int], first: int, sae: SAE, lm: LanguageModel, site: Site
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Locations (m, 3) and activations (m,) of a batch of passages, of which the first has this number."""
    inside = np.arange(ids.shape[1])[None, :] < np.array(lengths)[:, None]
    tokens = torch.from_numpy(ids).to(lm.device)
    x = read_sites(lm, tokens, torch.from_numpy(inside).long().to(lm.device), [site])[site]
    tokenizer = lm.tokenizer  # these three are what a capture and an index pass over
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    row, position = np.nonzero(inside & ~np.isin(ids, [i for i in special if i is not None]))
    with torch.no_grad():
        codes = sae.encode(x[torch.from_numpy(row), torch.from_numpy(position)].float())
    values = codes.values.float().cpu().numpy()
    token, slot = np.nonzero(values)
    latent = codes.indices.cpu().numpy()[token, slot]
    return np.stack([row[token] + first, position[token], latent], axis=1), values[token, slot]


def _counted(starts: range, progress: Progress | None) -> Any:
    for first in starts:
        yield first
        if progress is not None:
            progress(min(first + starts.step, starts.stop), starts.stop, "passages")


def _filler(lm: LanguageModel) -> int:
    for token in (lm.tokenizer.pad_token_id, lm.tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
