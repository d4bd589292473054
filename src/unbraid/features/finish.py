"""From what a pass found to the tables of an index, and from the tables back to what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unbraid.features import hashes, lists
from unbraid.features.around import around
from unbraid.features.coactive import TokenSample
from unbraid.features.groups import INTERVALS
from unbraid.features.hashes import F32, I32, I64, U64
from unbraid.features.loops import Slots
from unbraid.features.memory import give_back
from unbraid.features.pairs import BLOCK
from unbraid.features.state import SLOTS, State, row_keys
from unbraid.features.stretches import Classes
from unbraid.features.tables import LATENTS, PLACES, SCHEMAS, VOCABULARY, Passages, Table, TableWriter

SAMPLED = "sampled.parquet"
SAMPLE_BLOCK = 1 << 14
"""Sampled tokens written at a time."""
"""The sample of tokens that co-activation is counted on, for indexes that grow or are merged."""
ALIKE = 0.8
"""Two examples are alike when this share of the tokens around them agrees, place by place."""
KINDS = ("top", "sample", "interval")


class Places:
    """What stands around places in the corpus; a part's passages at a time."""

    def __init__(self, passages: Passages, classes: Classes, width: int) -> None:
        self.passages, self.classes, self.width = passages, classes, width

    def _by_part(self, passage: I64) -> Iterator[tuple[NDArray[np.bool_], Any, I64]]:
        """Which of them are in a part, its table, and their rows in it."""
        for number in np.unique(passage >> PLACES).tolist():
            inside = passage >> PLACES == number
            yield inside, self.passages.part(number), passage[inside] & ((1 << PLACES) - 1)

    def around(self, passage: I64, position: I32) -> U64:
        """Classes of the tokens around each place (n, 2 · width + 1), 1 beyond its window."""
        out = np.ones((len(passage), 2 * self.width + 1), np.uint64)
        for inside, part, row in self._by_part(passage):
            tokens = part["tokens"].chunk(0)
            flat, offsets = tokens.values.to_numpy(), tokens.offsets.to_numpy()
            at = position[inside, None].astype(np.int64) + np.arange(-self.width, self.width + 1)
            known = (at >= 0) & (at < (offsets[row + 1] - offsets[row])[:, None])
            block = np.ones(at.shape, np.uint64)
            block[known] = self.classes(flat[(offsets[row][:, None] + at)[known]])
            out[inside] = block
        return out

    def keys(self, seed: int, passage: I64, position: I32) -> U64:
        """The random number of each place, as `stretches` draws it."""
        out = np.empty(len(passage), np.uint64)
        for inside, part, row in self._by_part(passage):
            document, first = (part[name].to_numpy()[row] for name in ("document", "first"))
            out[inside] = row_keys(seed, document, first + position[inside])
        return out


def write_tables(
    folder: Path, state: State, words: Callable[[int], str], places: Places, coactive: int
) -> None:
    """All tables that depend on the corpus, but the passages; the state's examples are used up."""
    give_back()
    _write_latents(folder, state)
    give_back()
    _write_examples(folder, state, places)
    state.drop_examples()  # before co-activation asks for memory of its own
    give_back()
    _write_coactive(folder, state, coactive)
    _write_sampled(folder, state.together)
    known = sorted(_tokens_of(places.passages))
    occurrences = np.zeros(max(known, default=-1) + 1, np.int64)
    occurrences[: len(state.occurrences)] = state.occurrences[: len(occurrences)]
    vocabulary = {"token": known, "text": [words(t) for t in known], "occurrences": occurrences[known]}
    pq.write_table(pa.table(vocabulary, schema=VOCABULARY), folder / "vocabulary.parquet", compression="zstd")


def _write_sampled(folder: Path, together: TokenSample) -> None:
    """The sample of tokens, by key, each with its latents in order, some tokens at a time."""
    schema = pa.schema({"key": pa.uint64(), "latents": pa.list_(pa.int32())})
    order, starts = np.argsort(together.keys, kind="stable"), together.starts
    with pq.ParquetWriter(folder / SAMPLED, schema, compression="zstd") as writer:
        for begin in range(0, max(len(order), 1), SAMPLE_BLOCK):
            some = order[begin : begin + SAMPLE_BLOCK]
            sizes = together.sizes[some]
            offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
            row = np.repeat(np.arange(len(some)), sizes)
            latents = together.latents[starts[some][row] + np.arange(len(row)) - offsets[row]]
            latents = latents[np.lexsort((latents, row))]
            lists_of = pa.ListArray.from_arrays(pa.array(offsets), pa.array(latents))
            writer.write_table(pa.table([together.keys[some], lists_of], schema=schema))


def _tokens_of(passages: Passages) -> set[int]:
    found: set[int] = set()
    for number in passages.numbers:
        found |= set(np.unique(passages.part(number)["tokens"].chunk(0).values.to_numpy()).tolist())
    return found


def _lists(rows: NDArray[Any], type: Any) -> Any:
    """Rows of one length as an Arrow column."""
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.ravel(), type))


def _write_latents(folder: Path, state: State) -> None:
    counts, d_sae = state.counts, state.d_sae
    strata = [state.seen.strata[name][0] for name in state.strata()]
    per = LATENTS["tokens"]
    assert BLOCK % per == 0 and per == LATENTS["latents"]
    with TableWriter(folder, "tokens") as tokens, TableWriter(folder, "latents") as latents:
        for base, pairs in zip(range(0, d_sae, BLOCK), state.tokens.blocks(), strict=True):
            for begin in range(base, min(base + BLOCK, d_sae), per):
                end = min(begin + per, d_sae)
                some = slice(begin, end)
                mine = pairs.block(begin - base, end - base)
                different = np.diff(mine.first)
                tokens.write(
                    {
                        "latent": np.repeat(np.arange(begin, end, dtype=np.int32), different),
                        "token": mine.token,
                        "firings": mine.times.astype(np.int64),
                    }
                )
                count, total = counts.firings[some], counts.total[some]
                top = np.where(count > 0, np.exp2(counts.exponent[some].astype(float)), 0.0)
                latents.write(
                    {
                        "latent": np.arange(begin, end, dtype=np.int32),
                        "count": count,
                        "documents": counts.documents[some],
                        "density": count / state.seen.tokens,
                        "max": counts.highest[some],
                        "mean": (total.sum(axis=1) / np.maximum(count, 1)).astype(np.float32),
                        "total": total[:, 0],
                        "total_rest": total[:, 1],
                        "histogram": _lists(counts.histogram[some], pa.int64()),
                        "histogram_top": top,
                        "levels": _lists(counts.levels[some], pa.int64()),
                        "position_total": counts.positions[some, 0],
                        "position_squares": counts.positions[some, 1],
                        "position_first": counts.positions[some, 2],
                        "position_octaves": _lists(counts.octaves[some], pa.int64()),
                        "strata": _lists(counts.strata[some][:, strata], pa.int64()),
                        "distinct_tokens": different,
                    }
                )


def _write_examples(folder: Path, state: State, places: Places) -> None:
    per = LATENTS["examples"]
    with TableWriter(folder, "examples") as writer:
        for begin in range(0, state.d_sae, per):
            end = min(begin + per, state.d_sae)
            parts: list[dict[str, NDArray[Any]]] = []
            for kind, slots in enumerate((state.best, state.sample, state.spread)):
                latent, slot = np.nonzero(slots.passage[begin:end] >= 0)
                group = np.full(len(slot), -1)
                if kind == 2:
                    group = slot // state.sizes.per_interval
                names = ("key", "value", "passage", "position")
                found = {name: getattr(slots, name)[begin + latent, slot] for name in names}
                found["around"] = around(slots, begin, end, state.sizes.reach)[latent, slot]
                # The strongest first, or those that were drawn first; of equal ones the earlier.
                by = -found["value"] if kind == 0 else ~found["key"]
                order = np.lexsort((found["position"], found["passage"], by, group, latent))
                latent, group = latent[order], group[order]
                found = {name: column[order] for name, column in found.items()}
                if kind == 0:
                    rank = np.empty(len(latent), np.int32)
                    near = places.around(found["passage"], found["position"])
                    held = np.bincount(latent, minlength=end - begin)
                    lists.shown(near, held, int(np.ceil(ALIKE * near.shape[1])), rank)
                else:
                    rank = _rank_in_run(latent * INTERVALS + group)
                parts.append(
                    {
                        "latent": latent + begin,
                        "kind": np.full(len(latent), kind),
                        "group": group,
                        "rank": rank,
                    }
                    | {name: found[name] for name in ("passage", "position", "value", "around")}
                )
            rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            order = np.lexsort((rows["kind"], rows["latent"]))  # stable
            rows = {name: column[order] for name, column in rows.items()}
            activations = _lists(rows.pop("around"), pa.float32())
            kinds = np.array(KINDS)[rows.pop("kind")]
            table = pa.table({**rows, "kind": kinds, "activations": activations})
            writer.write(table.select(SCHEMAS["examples"].names).cast(SCHEMAS["examples"]))


def _rank_in_run(run: NDArray[np.int64]) -> I32:
    """Rank 0, 1, 2 … of each row within its run of equal values."""
    begins = np.flatnonzero(np.concatenate([[True], run[1:] != run[:-1]]))[: len(run)]
    lengths = np.diff(np.concatenate([begins, [len(run)]]))
    return (np.arange(len(run)) - np.repeat(begins, lengths)).astype(np.int32)


def _write_coactive(folder: Path, state: State, k: int) -> None:
    n, per = len(state.together), LATENTS["coactive"]
    blocks = state.together.neighbours(k)
    with TableWriter(folder, "coactive") as writer:
        for begin, found in zip(range(0, state.d_sae, per), blocks, strict=True):
            assert not len(found.latent) or begin <= found.latent[0] < begin + per
            both, own, other = (c.astype(float) for c in (found.together, found.own, found.other))
            columns = {name: getattr(found, name) for name in ("latent", "rank", "neighbour", "together")}
            columns |= {"own": found.own, "other": found.other, "jaccard": both / (own + other - both)}
            columns["pmi"] = np.log(both * n / (own * other))
            writer.write(pa.table(columns).select(SCHEMAS["coactive"].names).cast(SCHEMAS["coactive"]))


def read_state(folder: Path, state: State, places: Places, seed: int, level: int) -> None:
    """Fill an empty state with what the tables of an index say; what was seen is in its facts."""
    d_sae = state.d_sae
    facts = pq.read_table(folder / "latents.parquet")

    def column(name: str) -> NDArray[Any]:
        return facts[name].to_numpy()

    def rows_of(name: str) -> I64:
        return facts[name].combine_chunks().flatten().to_numpy().reshape(d_sae, -1).copy()

    c = state.counts
    c.firings[:], c.documents[:], c.highest[:] = column("count"), column("documents"), column("max")
    c.total[:] = np.stack([column("total"), column("total_rest")], axis=1)
    fired = c.firings > 0
    c.exponent[fired] = np.log2(column("histogram_top")[fired]).astype(np.int64)
    c.histogram[:], c.levels[:], c.octaves[:] = (
        rows_of("histogram"),
        rows_of("levels"),
        rows_of("position_octaves"),
    )
    names = ("position_total", "position_squares", "position_first")
    c.positions[:] = np.stack([column(name) for name in names], axis=1)
    strata = rows_of("strata")  # none where no document has one
    state.counts = c._replace(strata=strata if strata.size else c.firings[:, None].copy())

    examples, tokens = Table(folder, "examples"), Table(folder, "tokens")
    activations: dict[str, list[tuple[NDArray[np.int16], F32]]] = {kind: [] for kind in KINDS}
    for number in range(examples.groups):
        _read_examples(examples.group(number), state, places, seed, activations)
    for name, kind in zip(SLOTS, KINDS, strict=True):
        away, active = (np.concatenate(parts) for parts in zip(*activations[kind], strict=True))
        slots: Slots = getattr(state, name)
        slots.first[1:] = np.cumsum(slots.size.sum(axis=1, dtype=np.int64))
        setattr(state, name, slots._replace(away=away, active=active))
    for number in range(tokens.groups):
        rows = tokens.group(number)
        first = np.searchsorted(rows["latent"].to_numpy(), np.arange(d_sae + 1)).astype(np.int64)
        state.tokens.add(first, rows["token"].to_numpy(), rows["firings"].to_numpy().astype(np.int32))
    sampled = pq.read_table(folder / SAMPLED)
    of = sampled["latents"].combine_chunks()
    sizes = np.concatenate([[0], np.cumsum(of.value_lengths().to_numpy(), dtype=np.int64)])
    state.together.add(sampled["key"].to_numpy(), sizes, of.flatten().to_numpy().astype(np.int32), level)
    words = pq.read_table(folder / "vocabulary.parquet")
    state.occurrences = np.zeros(int(words["token"].to_numpy().max(initial=-1)) + 1, np.int64)
    state.occurrences[words["token"].to_numpy()] = words["occurrences"].to_numpy()


def _read_examples(
    rows: Any,
    state: State,
    places: Places,
    seed: int,
    activations: dict[str, list[tuple[NDArray[np.int16], F32]]],
) -> None:
    """Fill the slots of some latents, but for their activations, which are added to those of their kind."""
    kind, group = rows["kind"].to_numpy(zero_copy_only=False), rows["group"].to_numpy().astype(np.int64)
    columns = [rows[name].to_numpy() for name in ("latent", "passage", "position", "value")]
    there: F32 = rows["activations"].combine_chunks().flatten().to_numpy().reshape(len(kind), -1)
    for name, slots, per in _slots(state):
        chosen = kind == name
        latent, passage, position, value = (c[chosen] for c in columns)
        within = _rank_in_run(latent.astype(np.int64) * (INTERVALS + 1) + group[chosen])
        slot = within + np.maximum(group[chosen], 0) * per
        if name == "top":
            # A hash of classes, and so of the same numbers that were hashed when they were read.
            width, near = places.width, places.around(passage, position)
            begins = np.arange(len(near), dtype=np.int64) * near.shape[1]
            found = np.empty(near.size, np.uint64)
            hashes.contexts_of(near.ravel(), begins, begins + near.shape[1], width, found)
            key = found[begins + width]
        else:
            key = hashes.mixed(places.keys(seed, passage, position), latent.astype(np.uint64))
        where = (latent, slot)
        slots.key[where], slots.value[where], slots.passage[where] = key, value, passage
        slots.position[where] = position
        order = np.lexsort((slot, latent))
        example, place = np.nonzero(there[chosen][order])
        slots.size[latent[order], slot[order]] = np.bincount(example, minlength=len(order))
        away = (place - state.sizes.reach).astype(np.int16)
        activations[name].append((away, there[chosen][order][example, place]))


def _slots(state: State) -> Sequence[tuple[str, Slots, int]]:
    return tuple(
        zip(KINDS, (state.best, state.sample, state.spread), (0, 0, state.sizes.per_interval), strict=True)
    )
