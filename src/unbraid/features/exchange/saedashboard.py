"""SAEDashboard's batches, batch-N.json, which its own Neuronpedia export and other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unbraid.features.exchange import records
from unbraid.features.exchange.neuronpedia import Names
from unbraid.features.page import Index, LatentPage
from unbraid.manifest.files import building, write_json
from unbraid.manifest.progress import Progress
from unbraid.sae.base import SAE

BATCH = 128
"""Features in a file."""
FEATURES = ("correlated_features_indices", "correlated_features_pearson", "correlated_features_l1")


def export(
    index: Index, out: Path, names: Names, *, sae: SAE | None = None, progress: Progress | None = None
) -> Path:
    """Write `out`/batch-0.json and so on.  Raises UserError when the folder exists."""
    with building(Path(out)) as place:
        for number, first in enumerate(range(0, index.d_sae, BATCH)):
            last = min(first + BATCH, index.d_sae)
            record = {
                "model_id": names.model,
                "layer": names.layer,
                "sae_set": names.source_set,
                "sae_id_suffix": None,
                "features": [feature(index.latent(j), index, sae) for j in range(first, last)],
            }
            write_json(place / f"batch-{number}.json", record)
            if progress is not None:
                progress(last, index.d_sae, "latents")
    return Path(out)


def feature(page: LatentPage, index: Index, sae: SAE | None) -> dict[str, Any]:
    """One feature of a batch; an index knows no Pearson correlation of features, so none stand."""
    facts = index.manifest.facts
    return {
        "feature_index": page.latent,
        **records.feature(page),
        **{name: [] for name in FEATURES},
        "n_prompts_total": facts.get("documents", 0),
        "n_tokens_in_prompt": facts["config"].get("context", 0),
        "dataset": "",
        "activations": [
            {
                "bin_min": shown.low,
                "bin_max": shown.high,
                "bin_contains": shown.contains,
                "tokens": list(shown.example.tokens),
                "values": list(shown.example.activations),
                "qualifying_token_index": shown.at,
            }
            for shown in records.shown(page)
        ],
        "vector": [] if sae is None else records.vector(sae, page.latent),
    }
