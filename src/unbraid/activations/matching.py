"""Which of the files' arrays is which site, which are tokens and mask, and which rows belong together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from unbraid.activations.arrays import Array, Column, Found, find_arrays
from unbraid.activations.rows import Stored
from unbraid.manifest.errors import UserError
from unbraid.manifest.identity import sha256_file
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site

UNKNOWN_TOKEN = -1
"""Stands in a shard's tokens where nobody knows them."""
TOKENS = ("token_ids", "tokens", "input_ids")
MASKS = ("attention_mask", "mask")


@dataclass(frozen=True)
class ImportOptions:
    """What the arrays are, and how to store them; the command line shows these as they are."""

    tokens: str = ""
    """Array of token ids, (n,) or (batch, positions): its name, FILE or FILE#NAME; left out, an array called
    token_ids, tokens or input_ids is taken where there is one."""
    mask: str = ""
    """Array of zeros and ones, likewise: rows under a zero, such as padding, are left out. Otherwise
    attention_mask or mask is taken."""
    drop_tokens: tuple[int, ...] = ()
    """Token ids whose rows are left out, such as that of BOS, whose activations are like no others."""
    model_name: str = ""
    """Name of the model, where its files do not say; --model says more."""
    tool: str = ""
    """The tool that wrote the files, for the record."""
    unchecked: bool = False
    """Believe that the activations are --model's though a forward pass gives others."""
    dtype: Stored = "float16"
    """How activations are stored; int8 has a scale for each row."""
    shard_tokens: int = 32768
    """Rows in a shard; a killed run loses at most twice as many."""

    def __post_init__(self) -> None:
        if self.shard_tokens < 1:
            raise UserError(f"shard_tokens is {self.shard_tokens}; choose a --shard-tokens of at least 1")
        if self.dtype not in (known := get_args(Stored)):
            raise UserError(f"dtype {self.dtype!r} is not known; choose --dtype from {', '.join(known)}")


def site_of(name: str) -> Site | None:
    """The site that an array is named after: ours, a hook of TransformerLens, or a layer's output by its path
    in Hugging Face (`model.layers.3`), also as nnsight writes it (`model.layers[3].output[0]`).

    None for other names. The path of a sublayer is one of these: in some families (Gemma 2, OLMo 2, BLOOM)
    what its module puts out is not what is added to the stream.
    """
    text = re.sub(r"\[(\d+)\]", r".\1", name)
    text = re.sub(r"\.output(\.0)?$", "", text)
    try:
        site = Site.parse(text)
    except UserError:
        return None
    known = text == str(site) or "hook_" in text or re.search(r"\.\d+$", text)
    return site if known else None


class Matching:
    """Which columns are read; everything that can be wrong with their shapes is found here."""

    def __init__(self, sources: list[Path], sites: Sequence[str], options: ImportOptions) -> None:
        self.options = options
        self.found: list[Found] = []
        self._labels: dict[Path, str] = {}
        self.arrays: dict[str, tuple[Array, ...]] = {}
        for source in sources:
            for name, arrays in self._find(source).arrays.items():
                if name in self.arrays:
                    raise UserError(
                        f"{arrays[0].path} and {self.arrays[name][0].path} both hold {name}; give their "
                        "folder, whose files are parts of one capture, or choose with --site SITE=FILE"
                    )
                self.arrays[name] = arrays
        self.tokens = self._numbers(options.tokens, TOKENS, "tokens")
        self.mask = self._numbers(options.mask, MASKS, "mask")
        if options.drop_tokens and self.tokens is None:
            raise UserError("--drop-tokens needs the tokens of the rows; give --tokens")
        self.sites = self._choose(sites)
        columns = {str(site): column for site, column in self.sites.items()}
        columns |= {n: c for n, c in (("tokens", self.tokens), ("mask", self.mask)) if c is not None}
        used = {array.path for column in columns.values() for array in column.arrays}
        self.found = [found for found in self.found if used & set(found.files)]
        self._fit(columns)

    # --- what the files hold ---

    def _find(self, source: Path) -> Found:
        found = find_arrays(source)
        self.found.append(found)
        for path in found.files:
            name = path.name if path == source else f"{source.resolve().name}/{path.name}"
            self._labels.setdefault(path, path.as_posix() if name in self._labels.values() else name)
        return found

    def hashes(self, progress: Progress | None) -> dict[str, str]:
        """SHA-256 of every file that was used, by its name."""
        made: dict[str, str] = {}
        for path in dict.fromkeys(path for found in self.found for path in found.files):
            if progress is not None:
                progress(0, self.rows, f"hashing {self._labels[path]}")
            made[self._labels[path]] = sha256_file(path)
        return made

    @property
    def metadata(self) -> dict[str, str]:
        """What the files' headers say besides, shortened: it is text from elsewhere."""
        return {k: v[:500] for found in self.found for k, v in list(found.metadata.items())[:50]}

    @property
    def model_name(self) -> str:
        """The model's name as far as it was said; empty when it was not."""
        said = self.metadata.get("model_name") or self.metadata.get("model") or ""
        return self.options.model_name or (said if said.isprintable() else "")

    @property
    def places(self) -> dict[str, str]:
        """What the arrays of tokens and mask are called."""
        named = (("tokens", self.tokens), ("mask", self.mask))
        return {what: column.name for what, column in named if column is not None}

    @property
    def left_out(self) -> list[str]:
        """Arrays that were not taken."""
        taken = (*self.sites.values(), self.tokens, self.mask)
        return sorted(self.arrays.keys() - {column.name for column in taken if column is not None})

    def unknown(self, lm: LanguageModel | None) -> list[str]:
        """What nobody said."""
        known = {
            "model": lm is not None,
            "tokenizer": lm is not None and lm.tokenizer is not None,
            "tokens": self.tokens is not None,
            "documents": self._batched is not None,
        }
        return [what for what, said in known.items() if not said]

    # --- choosing ---

    def _named(self, what: str, option: str) -> tuple[str, tuple[Array, ...]]:
        """The array that an option names: one of those that were found, or one in a file of its own."""
        if what in self.arrays:
            return what, self.arrays[what]
        file, _, name = what.rpartition("#") if "#" in what else (what, "", "")
        if not Path(file).exists():
            raise UserError(f"{option} {what} is neither an array nor a file; {self._known()}")
        arrays = self._find(Path(file)).arrays
        if name and name in arrays:
            return name, arrays[name]
        if name or len(arrays) != 1:
            raise UserError(
                f"{option} {what} does not name one array; write {file}#NAME with one of {_listed(arrays)}"
            )
        return next(iter(arrays.items()))

    def _known(self) -> str:
        return f"the arrays are {_listed(self.arrays)}" if self.arrays else "no array was given"

    def _numbers(self, what: str, usual: tuple[str, ...], option: str) -> Column | None:
        """The tokens or the mask, as an option names it or as it is usually called."""
        found = [name for name in usual if name in self.arrays]
        if not what and not found:
            return None
        name, arrays = self._named(what, f"--{option}") if what else (found[0], self.arrays[found[0]])
        column = _column(name, arrays, 0)
        if column.dtype.is_floating_point:
            raise UserError(
                f"{column.arrays[0].path}: {name} holds {name_of(column.dtype)}, not whole numbers"
            )
        return column

    def _choose(self, sites: Sequence[str]) -> dict[Site, Column]:
        chosen: dict[Site, tuple[str, tuple[Array, ...]]] = {}
        taken = {column.name for column in (self.tokens, self.mask) if column is not None}
        free = {name: arrays for name, arrays in self.arrays.items() if name not in taken}
        named = {name: site for name in free if (site := site_of(name))}
        for entry in sites or sorted(named, key=lambda name: named[name].depth):
            said, equals, what = entry.partition("=")
            site = (None if equals else site_of(entry)) or Site.parse(said)
            if site in chosen:
                raise UserError(f"{site} is given twice ({chosen[site][0]}, {what or entry}); choose one")
            if equals:
                chosen[site] = self._named(what, f"--site {said}=")
                continue
            names = [name for name in free if named.get(name) == site]
            if not names and len(free) == len(sites) == 1:
                names = list(free)
            if len(names) != 1:
                raise UserError(
                    f"{'several arrays are' if names else 'no array is'} named after {site}; write "
                    f"--site {site}=NAME, {self._known()}"
                )
            chosen[site] = (names[0], free[names[0]])
        if not chosen:
            raise UserError(
                "no array is named after a site; say which is which with --site "
                f"layers.<number>.<kind>=NAME, {self._known()}"
            )
        return {site: self._activations(site, *found) for site, found in chosen.items()}

    def _activations(self, site: Site, name: str, arrays: tuple[Array, ...]) -> Column:
        rank = len(arrays[0].shape) if arrays else 0
        if site.kind == "attn_z" and rank == 3:
            raise UserError(
                f"{arrays[0].path}: {name} of shape {arrays[0].shape} may be (n, heads, d_head) or (batch, "
                "positions, d); save it as (batch, positions, heads, d_head) or (n, d)"
            )
        column = _column(name, arrays, 2 if site.kind == "attn_z" and rank == 4 else 1)
        if not column.dtype.is_floating_point:
            raise UserError(
                f"{column.arrays[0].path}: {name} holds {name_of(column.dtype)}, which activations are not"
            )
        return column

    # --- rows ---

    def _fit(self, columns: dict[str, Column]) -> None:
        """Make sure that rows of the same number belong together in all columns."""
        (first, column), *others = columns.items()
        for name, other in others:
            if other.rows != column.rows:
                raise UserError(
                    f"{name} ({other.name}) has {other.rows:,} rows but {first} ({column.name}) has "
                    f"{column.rows:,}; give arrays of the same tokens"
                )
        batched = [(name, c) for name, c in columns.items() if c.batched]
        for name, other in batched[1:]:
            if _merged(other.blocks) != _merged(batched[0][1].blocks):
                raise UserError(
                    f"{name} ({other.name}) is {_shapes(other)} but {batched[0][0]} is "
                    f"{_shapes(batched[0][1])}, batch by positions; give arrays of the same tokens"
                )
        self._batched = batched[0][1] if batched else None
        self.rows = column.rows
        self.blocks = (self._batched or column).blocks
        self.context = max(positions for _, positions in self.blocks) if self._batched else 0
        self.documents = sum(documents for documents, _ in self.blocks)

    @cached_property
    def _starts(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Each block's first row, first document and positions."""
        blocks = np.array(self.blocks, dtype=np.int64)
        rows, documents = blocks.prod(axis=1), blocks[:, 0]
        return np.cumsum(rows) - rows, np.cumsum(documents) - documents, blocks[:, 1]

    def where(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Document and position of rows [start, stop), each (n,)."""
        first_row, first_document, positions = self._starts
        rows = np.arange(start, stop)
        block = np.searchsorted(first_row, rows, side="right") - 1
        document, position = np.divmod(rows - first_row[block], positions[block])
        return first_document[block] + document, position

    def lengths(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of each of these documents."""
        _, first_document, positions = self._starts
        return positions[np.searchsorted(first_document, documents, side="right") - 1]

    def kept(self, start: int, stop: int, vocabulary: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which of the rows [start, stop) are kept, and their tokens, each (n,)."""
        keep = np.ones(stop - start, dtype=np.bool_)
        if self.mask is not None:
            mask = self.mask.read(start, stop).numpy()
            if not np.isin(mask, (0, 1)).all():
                raise UserError(f"the mask {self.mask.name} holds other numbers than 0 and 1; give 0 and 1")
            keep &= mask.astype(np.bool_)
        if self.tokens is None:
            return keep, np.full(stop - start, UNKNOWN_TOKEN, dtype=np.int64)
        tokens = self.tokens.read(start, stop).numpy().astype(np.int64)
        if self.options.drop_tokens:
            keep &= ~np.isin(tokens, self.options.drop_tokens)
        wrong = keep & ((tokens < 0) | (tokens >= vocabulary))
        if wrong.any():
            row = int(wrong.argmax())
            raise UserError(
                f"{self.tokens.name} holds {tokens[row]} in row {start + row}, which is no token of the "
                f"{vocabulary:,} that there can be; give the right tokens, or a mask that leaves it out"
            )
        return keep, tokens


def _column(name: str, arrays: tuple[Array, ...], trailing: int) -> Column:
    return Column(name, tuple(array for array in arrays if 0 not in array.shape), trailing)


def _merged(blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same documents however they are spread over files."""
    merged: list[tuple[int, int]] = []
    for documents, positions in blocks:
        if merged and merged[-1][1] == positions:
            documents += merged.pop()[0]
        merged.append((documents, positions))
    return merged


def _shapes(column: Column) -> str:
    return json.dumps(_merged(column.blocks)[:3])[1:-1]


def _listed(names: Iterable[str]) -> str:
    known = sorted(names)
    return ", ".join(known[:20]) + (" …" if len(known) > 20 else "")


def name_of(dtype: torch.dtype) -> str:
    """float16 for torch.float16."""
    return str(dtype).removeprefix("torch.")
