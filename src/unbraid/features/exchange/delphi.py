"""delphi's cache of latents: {hookpoint}/{first}_{last}.safetensors with tokens, locations and activations.

tokens: (n, ctx_len); locations: (m, 3), the row of tokens, the position and the latent less the file's first;
activations: (m,).  Firings are computed anew from the index's own passages, since an index keeps none but
examples.  delphi cuts rows into examples of equal length (32), takes those without a firing for negatives,
and divides by all tokens there are: so rows are full, with one passage after the other and nothing between.
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
from unbraid.manifest.files import building, require_new, write_json, writing
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.model.read import read_sites
from unbraid.model.sites import Site
from unbraid.sae.base import SAE

BATCH = 16
"""Passages that go through the model at once."""
CONTEXT = 256
"""Tokens of a row, which delphi wants to be a multiple of those of an example; its own caches have 256."""


def export(
    index: Index,
    out: Path,
    sae: SAE,
    lm: LanguageModel,
    *,
    tokens: int = 1_000_000,
    context: int = CONTEXT,
    files: int = 5,
    progress: Progress | None = None,
) -> Path:
    """Write `out`/{site} from the first passages, about `tokens` tokens; memory grows with their firings.

    Tokens at the end that fill no row of `context` are left out.  Special tokens do not fire, as in the
    index; all others may, also where the index counts replies alone.  Raises UserError when the folder
    exists, when there is not one row of tokens, or nothing fires.
    """
    if files < 1 or tokens < 1 or context < 1:
        raise UserError("files, tokens and context must be at least 1")
    require_new(Path(out))
    site = site_of(sae, lm, Site.parse(str(index.manifest.facts["site"])))
    passages = _first_passages(index, tokens)
    starts = np.cumsum([0, *map(len, passages)])  # of each passage in the stream, and its end
    rows = int(starts[-1]) // context
    if not rows:
        raise UserError(
            f"the first passages of {index.folder} have {starts[-1]} tokens and a row {context}; give more"
        )
    stream = np.array([token for passage in passages for token in passage], dtype=np.int64)
    ids = stream[: rows * context].reshape(rows, context)
    found = [
        _fired(passages[first : first + BATCH], sae, lm, site, starts[first:])
        for first in _counted(range(0, len(passages), BATCH), progress)
    ]
    places = np.concatenate([place for place, _, _ in found])
    kept = places < rows * context
    latents = np.concatenate([latent for _, latent, _ in found])[kept]
    locations = np.stack([places[kept] // context, places[kept] % context, latents], axis=1)
    values = np.concatenate([value for _, _, value in found])[kept]
    if not len(values):
        raise UserError(f"no latent of {index.folder} fires on its first {tokens} tokens; give more")
    edges = np.linspace(0, sae.config.d_sae, files + 1).astype(np.int64)
    with building(Path(out)) as folder:
        place = folder / str(site)
        for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            # Also where nothing fires: delphi takes one file's end for the next one's beginning.
            mine = (locations[:, 2] >= first) & (locations[:, 2] < end)
            inside = locations[mine] - [0, 0, first]
            small = inside.max(initial=0) < 2**16
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
        "cache_ctx_len": ids.shape[1],
        "n_tokens": int(ids.size),
        "n_splits": files,
        "batch_size": BATCH,
        "dataset_repo": None,
        "dataset_split": None,
        "dataset_name": None,
        "dataset_column": None,
    }


def _first_passages(index: Index, tokens: int) -> list[list[int]]:
    """The first passages that have so many tokens together, or all."""
    passages: list[list[int]] = []
    count = 0
    for part in index.passages.numbers:
        for row in index.passages.part(part)["tokens"]:
            if count >= tokens:
                return passages
            passages.append(row.as_py())
            count += len(passages[-1])
    return passages


def _fired(
    passages: list[list[int]], sae: SAE, lm: LanguageModel, site: Site, starts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Places in the stream, latents and activations, (m,) each, of a batch of passages that begin there."""
    lengths = np.array([len(passage) for passage in passages])
    inside = np.arange(lengths.max())[None, :] < lengths[:, None]
    ids = np.full(inside.shape, lm.pad_id, dtype=np.int64)
    ids[inside] = np.concatenate(passages)
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
    return starts[row[token]] + position[token], latent, values[token, slot]


def _counted(starts: range, progress: Progress | None) -> Any:
    for first in starts:
        yield first
        if progress is not None:
            progress(min(first + starts.step, starts.stop), starts.stop, "passages")
