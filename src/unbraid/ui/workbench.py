"""The model behind the pages: loaded when first needed, run by one request at a time, within limits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from unbraid.features.search_activation import Reader, Reading
from unbraid.manifest.errors import UserError
from unbraid.model.edits import Edit, EditCount
from unbraid.model.generate import generate
from unbraid.model.load import LanguageModel, Message
from unbraid.sae.base import SAE
from unbraid.ui.shelf import Source

Method = Literal["add", "clamp", "scale", "ablate"]
OpenModel = Callable[[Source], LanguageModel]
OpenSAE = Callable[[Source], SAE]


class BusyError(UserError):
    """Too many requests wait for the model already; the answer is a 503."""


class TooLongError(UserError):
    """A request ran out of its time; what it had so far has been sent."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    characters: int = 20_000
    """Longest text."""
    tokens: int = 1024
    """Longest text, in tokens."""
    new_tokens: int = 256
    """Longest reply, in tokens."""
    waiting: int = 4
    """Requests that may wait for the model at the same time."""
    seconds: float = 120.0
    """How long a request may wait, and as long again generate."""
    body: int = 262_144
    """Bytes of a request."""


@dataclass(frozen=True)
class Steering:
    """One latent's part in an edit."""

    latent: int
    """Which latent."""
    strength: float
    """Added or set, in units of its activation; the factor for scale; unused by ablate."""


@dataclass(frozen=True)
class Continuation:
    """What the model said under one condition."""

    text: str
    """The reply."""
    tokens: int
    """Its length."""
    finished: bool
    """Whether the model ended it."""
    edits: tuple[EditCount, ...]
    """Proof of what each edit did."""


class Workbench:
    """Models and autoencoders for the pages that run them.  One model is held at a time."""

    def __init__(
        self, open_model: OpenModel | None, open_sae: OpenSAE | None, limits: Limits | None = None
    ) -> None:
        self.limits = limits or Limits()
        self._open_model = open_model
        self._open_sae = open_sae
        self._model: tuple[str, LanguageModel] | None = None
        self._saes: dict[str, SAE] = {}
        self._readers: dict[str, Reader] = {}
        self._turn = threading.Lock()
        self._opening = threading.Lock()
        self._places = threading.BoundedSemaphore(self.limits.waiting + 1)

    @contextmanager
    def turn(self) -> Generator[None]:
        """Have the model to oneself; raises BusyError when too many wait, or the wait is too long."""
        if not self._places.acquire(blocking=False):
            raise BusyError("the model is busy with other requests; try again in a moment")
        try:
            if not self._turn.acquire(timeout=self.limits.seconds):
                raise BusyError("the model is still busy with another request; try again in a moment")
            try:
                yield
            finally:
                self._turn.release()
        finally:
            self._places.release()

    def sae(self, source: Source) -> SAE:
        """The index's autoencoder; raises UserError saying what is missing."""
        with self._opening:
            if source.sae_id not in self._saes:
                if self._open_sae is None or source.sae_folder is None:
                    raise UserError(
                        f"the autoencoder of {source.name} is not where it lay when the index was made; put "
                        "its folder below the one that is browsed"
                    )
                self._saes[source.sae_id] = self._open_sae(source).eval()
            return self._saes[source.sae_id]

    def model(self, source: Source) -> LanguageModel:
        """The index's model; the caller has its turn.  Raises UserError saying what is missing."""
        wanted = source.index.manifest.inputs["model"]
        if self._model is None or self._model[0] != wanted:
            if self._open_model is None:
                raise UserError("no model was given; start `unbraid browse` with --model")
            self._model = None  # two large models at once might not fit
            self._model = wanted, self._open_model(source)
        return self._model[1]

    def vector(self, source: Source, latent: int) -> NDArray[np.float32]:
        """The latent's decoder row (d_out,)."""
        return self.sae(source).W_dec[latent].detach().float().cpu().numpy()

    def read(self, source: Source, text: str) -> Reading:
        """The sparse codes of a text; raises UserError where it is empty or too long."""
        self.check_text(text)
        sae = self.sae(source)
        with self.turn():
            lm = self.model(source)
            if source.key not in self._readers:
                self._readers[source.key] = Reader(sae)
            reading = self._readers[source.key].read(lm, text)
        if len(reading.tokens) > self.limits.tokens:
            raise UserError(
                f"the text has {len(reading.tokens):,} tokens; at most {self.limits.tokens:,} are read"
            )
        return reading

    def check_text(self, text: str) -> None:
        """Raise UserError where a text is empty or longer than the limit."""
        if not text.strip():
            raise UserError("the text is empty; write something")
        if len(text) > self.limits.characters:
            raise UserError(
                f"the text has {len(text):,} characters; at most {self.limits.characters:,} are read at once"
            )

    def edit(self, source: Source, steering: Sequence[Steering], method: Method) -> list[Edit]:
        """The Edit that steering means, the same that `validate` measures and a guard deploys.

        add and clamp act at every token, scale and ablate where a latent fires.
        """
        sae = self.sae(source)
        latents = [source.check(s.latent) for s in steering]
        if len(set(latents)) < len(latents):
            raise UserError("a latent is named twice; give each one strength")
        everywhere = [-np.inf] * len(latents) if method in ("add", "clamp") else None
        return [
            sae.latent_edit(
                latents,
                method,
                tuple(s.strength for s in steering),
                site=sae.site if sae.config.site else None,
                positions="all",
                thresholds=everywhere,
            )
        ]

    def reply(
        self,
        source: Source,
        messages: Sequence[Message],
        edits: Sequence[Edit] = (),
        *,
        new_tokens: int,
        temperature: float,
        seed: int,
        on_text: Callable[[str], None] | None = None,
    ) -> Continuation:
        """What the model says, with or without edits; the same seed draws the same noise for both.

        `on_text` is given the reply so far after each token.  Raises TooLongError when the time is over.
        """
        for message in messages:
            self.check_text(message["content"])
        if not 1 <= new_tokens <= self.limits.new_tokens:
            raise UserError(f"{new_tokens} new tokens were asked for; ask for 1 to {self.limits.new_tokens}")
        with self.turn():
            lm = self.model(source)
            ends = time.monotonic() + self.limits.seconds
            said: list[int] = []

            def on_token(_: int, token: int) -> None:
                said.append(token)
                if time.monotonic() > ends:
                    raise TooLongError(f"generating took more than {self.limits.seconds:g} seconds")
                if on_text is not None:
                    on_text(lm.decode(said))

            reply = generate(
                lm,
                [messages],
                max_new_tokens=new_tokens,
                temperature=temperature,
                seeds=[seed],
                edits=edits,
                on_token=on_token,
            )[0]
        return Continuation(reply.text, len(reply.token_ids), reply.finished, reply.edits)

    def missing(self, source: Source) -> str:
        """Why trying text and steering are not offered; empty where they are."""
        if self._open_model is None:
            return "No model was given: start `unbraid browse` with --model to try text and to steer."
        if source.sae_folder is None:
            return "The autoencoder was not found: put its folder below the one that is browsed."
        return ""


def by_latent(reading: Reading) -> dict[int, dict[int, float]]:
    """Each latent's activations on a text, by token: {latent: {token: value}}."""
    found: dict[int, dict[int, float]] = {}
    for latent, token, value in zip(
        reading.latent.tolist(), reading.token.tolist(), reading.value.tolist(), strict=True
    ):
        found.setdefault(latent, {})[token] = value
    return found
