"""Apply Edits inside a running model: in a plain forward pass, and in generation at every decoded token.

Each forward pass starts with a look at what it is (`_Pass`): which tokens are real, whether they are a prompt
being filled in or a reply being decoded. Gates are decided in the prefill. Every edit then changes its own
site, nothing where its gate is closed, and counts what it did in tensors that are read only when somebody
asks.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unbraid.manifest.errors import UserError
from unbraid.model.edits import Edit, EditCount, Gate
from unbraid.model.hooks import Step, install
from unbraid.model.kernel import EditKernel
from unbraid.model.layout import Arguments
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site


@contextmanager
def applied(
    lm: LanguageModel, edits: Sequence[Edit], *, reply_mask: Tensor | None = None
) -> Generator[Applied]:
    """While open, every forward pass of the model runs under the edits; what they did is in `Applied.counts`.

    A forward pass without a cache, or with an empty one, starts a new batch: its real tokens (attention_mask
    1) are the prompt. Passes that continue a cache decode the reply, one token a row. Without a cache
    (teacher forcing) `reply_mask`, 1 at reply tokens and of the shape (B, T) of the pass, says which tokens
    are the reply.

    Edits are applied in order of depth, those at one site in the order given. Editing resid_pre, resid_mid or
    resid_post changes the residual stream from there on; an edit of resid_mid is carried by attn_out, so that
    resid_mid = resid_pre + attn_out holds under it. With no edits, or where nothing fires, values are bitwise
    those of the bare model. Tokens that are fed back after a row's end-of-sequence token are not counted.

    Raises UserError before anything runs when a site does not exist, when d differs, or when a gate would be
    read after the edit that waits for it.
    """
    for edit in edits:
        _check(lm, edit)
    run = Applied(edits, lm.eos_ids)
    hooks: list[Any] = []
    try:
        if edits:
            hooks.append(
                lm.layout.decoder.register_forward_pre_hook(
                    _starter(run, lm.layout.parameters, reply_mask), with_kwargs=True
                )
            )
            # By depth, for an edit of attn_out has to come before one of resid_mid, which the same module
            # carries. Gates come first: at a shared site they see the activation before its edits.
            gates = {id(e.gate): e.gate for e in edits if e.gate is not None}.values()
            steps = [(gate.site, _decider(run, gate)) for gate in gates]
            steps += [(edit.site, _editor(run, index)) for index, edit in enumerate(edits)]
            for site, step in sorted(steps, key=lambda s: s[0].depth):
                hooks.extend(install(lm.layout, site, step))
        yield run
    finally:
        for hook in hooks:
            hook.remove()


class Applied:
    """What edits have done since `applied` was entered."""

    def __init__(self, edits: Sequence[Edit], eos_ids: Sequence[int]) -> None:
        self.edits = tuple(edits)
        self.eos_ids = tuple(eos_ids)
        self.kernels = tuple(EditKernel(edit) for edit in edits)
        self.current: _Pass | None = None
        self._batch: _Batch | None = None
        self._before = np.zeros((len(edits), 4), dtype=np.int64)  # considered, fired, sequences, gated

    @property
    def counts(self) -> list[EditCount]:
        """Totals over all batches so far, one an edit, in the order in which the edits were given."""
        totals = self._before + self._totals()
        return [EditCount(edit.name, *map(int, row)) for edit, row in zip(self.edits, totals, strict=True)]

    @property
    def considered(self) -> NDArray[np.int64]:
        """Tokens at which each edit was in force, for each sequence of the last batch: shape (edits, B)."""
        return self._rows("considered")

    @property
    def fired(self) -> NDArray[np.int64]:
        """Tokens at which each edit fired, for each sequence of the last batch: shape (edits, B)."""
        return self._rows("fired")

    @property
    def open(self) -> NDArray[np.bool_]:
        """Whether each edit's gate was open, for each sequence of the last batch, (edits, B); none: open."""
        batch = self._batch
        if batch is None:
            return np.zeros((len(self.edits), 0), dtype=np.bool_)
        rows: list[NDArray[np.bool_]] = []
        for edit in self.edits:
            decided = None if edit.gate is None else batch.open.get(id(edit.gate))
            rows.append(np.ones(batch.size, np.bool_) if decided is None else decided.cpu().numpy())
        return np.stack(rows) if rows else np.zeros((0, batch.size), dtype=np.bool_)

    def by_sequence(self) -> list[tuple[EditCount, ...]]:
        """The counts of each sequence of the last batch, one an edit."""
        considered, fired, opened = self.considered, self.fired, self.open
        return [
            tuple(
                EditCount(edit.name, int(considered[i, row]), int(fired[i, row]), 1, int(not opened[i, row]))
                for i, edit in enumerate(self.edits)
            )
            for row in range(considered.shape[1])
        ]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (indices into the present ones) from the next pass on, as a cache does.

        Counts stay in the order of the prefill.
        """
        if self._batch is not None:
            self._batch.rows = self._batch.rows[rows.to(self._batch.rows.device)]

    def begin(self, this: _Pass) -> None:
        """Take note of the forward pass that starts. Raises UserError when edits cannot be placed in it."""
        size, length = this.real.shape
        if not this.continues:
            self._before += self._totals()
            self._batch = _Batch(size, len(self.edits), this.real.device)
        else:
            batch = self._batch
            if batch is None or len(batch.rows) != size:
                raise UserError(
                    "edits were entered in the middle of a cached generation; start it inside `applied`"
                )
            if length > 1 and any(e.positions != "all" or e.gate is not None for e in self.edits):
                raise UserError(
                    "a cached pass over several tokens is neither prompt nor reply; prefill in one pass"
                )
            if this.ended is not None:
                batch.ended[batch.rows] |= this.ended
                this.alive = ~batch.ended[batch.rows]
        self.current = this

    def decide(self, gate: Gate, opened: Tensor) -> None:
        """Record a gate's decision for the batch, shape (B,)."""
        assert self._batch is not None
        self._batch.open[id(gate)] = opened
        self._batch.any_open[id(gate)] = bool(opened.any())

    def in_force(self, index: int) -> Tensor | None:
        """Where edit `index` is in force in this pass, (B, T) booleans; None: nowhere."""
        this, batch, edit = self.current, self._batch, self.edits[index]
        assert this is not None and batch is not None, "the decoder's own hook runs first"
        if edit.positions == "all":
            where = this.real
        elif this.reply is not None:
            where = this.real & (this.reply if edit.positions == "reply" else ~this.reply)
        elif (edit.positions == "reply") == this.continues:
            where = this.real
        else:
            return None
        if edit.gate is not None:
            if not batch.any_open[id(edit.gate)]:
                return None
            where = where & batch.open[id(edit.gate)][batch.rows][:, None]
        return where

    def count(self, index: int, where: Tensor, fired: Tensor) -> None:
        """Add one pass's tokens, (B, T) booleans, to edit `index`'s counts."""
        this, batch = self.current, self._batch
        assert this is not None and batch is not None
        if this.alive is not None:
            where = where & this.alive[:, None]
        fired = fired & where
        batch.considered[index].index_add_(0, batch.rows, where.sum(dim=1))
        batch.fired[index].index_add_(0, batch.rows, fired.sum(dim=1))

    def _rows(self, what: str) -> NDArray[np.int64]:
        if self._batch is None:
            return np.zeros((len(self.edits), 0), dtype=np.int64)
        return cast("NDArray[np.int64]", getattr(self._batch, what).cpu().numpy())

    def _totals(self) -> NDArray[np.int64]:
        batch = self._batch
        if batch is None:
            return np.zeros((len(self.edits), 4), dtype=np.int64)
        closed = (~self.open).sum(axis=1)
        sequences = np.full_like(closed, batch.size)
        columns = [self.considered.sum(axis=1), self.fired.sum(axis=1), sequences, closed]
        return np.stack(columns, axis=1).astype(np.int64)


@dataclass
class _Pass:
    """What one forward pass is."""

    real: Tensor  # (B, T) booleans: tokens that are attended to
    continues: bool  # a cache holds earlier tokens
    reply: Tensor | None  # (B, T) booleans where the caller says what is reply
    ended: Tensor | None  # (B,) booleans: this decoded token ends its sequence
    alive: Tensor | None = None  # (B,) booleans: sequences that have not ended


class _Batch:
    """Counters and decisions of the sequences of one prefill, of which `rows` are still running."""

    def __init__(self, size: int, edits: int, device: torch.device) -> None:
        self.size = size
        self.rows = torch.arange(size, device=device)
        self.ended = torch.zeros(size, dtype=torch.bool, device=device)
        self.considered = torch.zeros(edits, size, dtype=torch.int64, device=device)
        self.fired = torch.zeros(edits, size, dtype=torch.int64, device=device)
        self.open: dict[int, Tensor] = {}
        self.any_open: dict[int, bool] = {}


def _check(lm: LanguageModel, edit: Edit) -> None:
    if lm.tokenizer is None:
        raise UserError(f"edits are for models that read tokens, and {lm.name} reads images")
    lm.layout.require(edit.site, edit=True)
    _check_width(lm, f"edit {edit.name!r}", edit.d_in, edit.site)
    gate = edit.gate
    if gate is None:
        return
    if gate.site.stack == "encoder":
        raise UserError(f"gate {gate.name!r} is read at {gate.site}; gates are for the stack that generates")
    _check_width(lm, f"gate {gate.name!r}", gate.weight.size, gate.site)
    if gate.site.depth > edit.site.depth and edit.positions != "reply":
        raise UserError(
            f"gate {gate.name!r} at {gate.site} is read after {edit.site}; "
            f"let edit {edit.name!r} touch the reply alone, or read the gate earlier"
        )


def _check_width(lm: LanguageModel, what: str, given: int, site: Site) -> None:
    if given != (width := lm.layout.width(site)):
        raise UserError(f"{what} is for {given} dimensions, model {lm.name} has {width} at {site}")


def _starter(run: Applied, parameters: tuple[str, ...], reply_mask: Tensor | None) -> Any:
    """The decoder's pre-hook: finds out what this forward pass is."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        ids: Tensor | None = given.get("input_ids")
        tokens = cast(Tensor, given["inputs_embeds"])[..., 0] if ids is None else ids
        length = tokens.shape[1]
        cache = given.get("past_key_values")
        continues = cache is not None and int(cache.get_seq_length()) > 0
        mask = given.get("attention_mask")
        if mask is None:
            real = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
        elif isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -length:].to(tokens.device, torch.bool)
        else:
            raise UserError("edits need a 2-D attention mask; generate with the default (dynamic) cache")
        reply = None
        if reply_mask is not None:
            if reply_mask.shape != tokens.shape or continues:
                raise UserError("reply_mask is for one forward pass without a cache and has its shape (B, T)")
            for edit in run.edits:
                if edit.gate is not None and edit.gate.site.depth > edit.site.depth:
                    raise UserError(
                        f"gate {edit.gate.name!r} is read after its edit; this needs a cached generation"
                    )
            reply = reply_mask.to(tokens.device, torch.bool)
        ended = None
        if continues and length == 1 and ids is not None and run.eos_ids:
            ended = torch.isin(ids[:, 0], torch.tensor(run.eos_ids, device=ids.device))
        run.begin(_Pass(real, continues, reply, ended))

    return hook


def _decider(run: Applied, gate: Gate) -> Step:
    """Reads a gate on the last prompt token of each sequence, once, in the prefill."""
    weight = torch.tensor(gate.weight)

    def step(x: Tensor, _: Tensor) -> None:
        this = run.current
        assert this is not None
        if this.continues:
            return
        prompt = this.real if this.reply is None else this.real & ~this.reply
        places = torch.arange(prompt.shape[1], device=prompt.device)
        last = torch.where(prompt, places, -1).amax(dim=1).clamp(min=0).to(x.device)
        token = x[torch.arange(len(x), device=x.device), last].float()  # (B, d)
        score = token @ weight.to(x.device) + gate.bias
        run.decide(gate, (score > gate.threshold).to(prompt.device))

    return step


def _editor(run: Applied, index: int) -> Step:
    """Applies edit `index` where it is in force, and counts."""
    kernel = run.kernels[index]

    def step(x: Tensor, carrier: Tensor) -> Tensor | None:
        where = run.in_force(index)
        if where is None:
            return None
        delta, fired = kernel.change(x)
        run.count(index, where, fired.to(where.device))
        # where() rather than adding zeros keeps untouched tokens bitwise, −0.0 included.
        return torch.where((where.to(x.device) & fired)[..., None], carrier + delta, carrier)

    return step
