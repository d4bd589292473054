"""The suites by name, and one call that runs those that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from unbraid.activations.documents import Document
from unbraid.activations.text import Positions
from unbraid.evaluation import concepts, first_letter, probing, removal, scr, stability, tpp
from unbraid.evaluation.baselines import random_directions, untrained, without_training
from unbraid.evaluation.definitions import Definition
from unbraid.evaluation.evaluate import check_fit
from unbraid.evaluation.labelled import Pooled, Reading, SuiteResult, in_fixed_order, pool, sample
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.sae.base import SAE

Suite = Literal["probing", "tpp", "scr", "removal", "absorption", "concepts", "stability"]
DEFINITIONS: Mapping[str, Mapping[str, Definition]] = {
    "probing": probing.DEFINITIONS,
    "tpp": tpp.DEFINITIONS,
    "scr": scr.DEFINITIONS,
    "removal": removal.DEFINITIONS,
    "absorption": first_letter.DEFINITIONS,
    "concepts": concepts.DEFINITIONS,
    "stability": stability.DEFINITIONS,
}
"""What each suite measures; its names are the suites'."""
ON_MEANS = ("probing", "tpp", "scr", "removal")
"""Suites that read each document's mean codes, made in one pass for all of them."""


def run_suites(
    names: Sequence[str],
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    documents: Sequence[Document],
    *,
    site: Site | str | None = None,
    positions: Positions = "all",
    context: int = 256,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[SuiteResult]:
    """Run the named suites on autoencoders by name: one result for each suite and site, in the names' order.

    `documents` carry labels (probing, tpp, scr, removal) or concepts (concepts); the other suites need none.
    Each table has an untrained autoencoder for every shape among `saes`; what is read of the model is read
    once for the suites that can share it. Neither the documents' order nor the batches matter. Raises
    UserError for a suite or a name that does not exist, and for whatever a suite lacks.
    """
    check_suites(names, len(saes))
    if positions not in get_args(Positions):
        raise UserError(
            f"there are no positions {positions!r}; choose among {', '.join(get_args(Positions))}"
        )
    documents = in_fixed_order(documents)
    by_site: dict[Site, dict[str, SAE]] = {}
    for name, sae in saes.items():
        chosen = Site.parse(site) if isinstance(site, str) else site or sae.site
        check_fit(sae, lm, chosen)
        by_site.setdefault(chosen, {})[name] = sae
    found: list[SuiteResult] = []
    for chosen, here in by_site.items():
        reading = Reading(chosen, positions, context, batch_tokens)
        found += [
            replace(r, site=str(chosen))
            for r in _at_site(names, here, lm, documents, reading, seed, progress)
        ]
    order = {name: place for place, name in enumerate(names)}
    return sorted(found, key=lambda result: order[result.suite])


def check_suites(names: Sequence[str], autoencoders: int) -> None:
    """Raise UserError for a suite that does not exist, and for too few autoencoders."""
    if unknown := [name for name in names if name not in DEFINITIONS]:
        raise UserError(f"there is no suite {unknown[0]!r}; choose among {', '.join(DEFINITIONS)}")
    if not autoencoders:
        raise UserError("no autoencoder is given; name one or more")
    if "stability" in names and autoencoders < 2:
        raise UserError("the suite stability compares autoencoders; name two or more of different seeds")


def as_record(result: SuiteResult) -> dict[str, Any]:
    """A result as JSON values, with the ids of its metrics' definitions."""
    known = DEFINITIONS[result.suite]
    return result.as_dict() | {"definitions": {name: known[name].id for name in result.metrics}}


def _at_site(
    names: Sequence[str],
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    documents: Sequence[Document],
    reading: Reading,
    seed: int,
    progress: Progress | None,
) -> list[SuiteResult]:
    everything, floors = dict(saes), dict[str, SAE]()
    if set(names) - {"stability"}:
        floors = untrained_rows(saes, lm, documents, reading, seed)
        everything |= floors
    pooled: Pooled | None = None
    if set(names) & set(ON_MEANS):
        pooled = pool(lm, documents, everything, reading, progress)

    def means() -> Pooled:
        assert pooled is not None
        return pooled

    def on_tokens() -> tuple[dict[str, SAE], list[str]]:
        """With what fires token by token as autoencoders do, and took no training."""
        x = sample(lm, documents, reading)
        rows: dict[str, SAE] = {}
        for name, sae in saes.items():
            rows[f"random directions like {name}"] = random_directions(sae, x, seed)
            rows |= {f"{kind} like {name}": its for kind, its in without_training(sae, x).items()}
        return everything | rows, [*floors, *rows]

    def planted() -> SuiteResult:
        rows, low = on_tokens()
        return concepts.concepts(rows, low, lm, documents, reading, seed, progress=progress)[0]

    def absorption() -> SuiteResult:
        rows, low = on_tokens()
        return first_letter.absorption_first_letter(rows, low, lm, reading, seed, progress=progress)

    run: dict[str, Callable[[], SuiteResult]] = {
        "probing": lambda: probing.probing(means(), list(floors), documents, seed),
        "tpp": lambda: tpp.tpp(means(), everything, list(floors), documents, seed),
        "scr": lambda: scr.scr(means(), everything, list(floors), documents, seed),
        "removal": lambda: removal.removal(
            means(), everything, list(floors), lm, documents, reading, seed, progress=progress
        ),
        "absorption": absorption,
        "concepts": planted,
        "stability": lambda: stability.stability(saes, seed),
    }
    return [run[name]() for name in dict.fromkeys(names)]


def untrained_rows(
    saes: Mapping[str, SAE], lm: LanguageModel, documents: Sequence[Document], reading: Reading, seed: int
) -> dict[str, SAE]:
    """An untrained autoencoder for each architecture, width and k among `saes`, by a name that says so."""
    x = sample(lm, documents, reading)
    found: dict[str, SAE] = {}
    for sae in saes.values():
        c = sae.config
        name = f"untrained {c.architecture} {c.d_sae}" + (f" k={c.k}" if c.k else "")
        if name not in found:
            found[name] = untrained(sae, x, seed)
    return found
