"""What scripts and the pages' own scripts ask for: JSON in, JSON out; Neuronpedia's shapes under /api."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from unbraid.manifest.errors import UserError
from unbraid.ui import readings, views
from unbraid.ui.shelf import NotFoundError, Shelf, Source
from unbraid.ui.workbench import Continuation, Method, Steering, Workbench, by_latent

Text = Annotated[str, Field(max_length=20_000)]
Name = Annotated[str, Field(max_length=500)]


class TextBody(BaseModel):
    """A text to read."""

    text: Text


class Proposal(BaseModel):
    """A label that a person proposes."""

    text: Annotated[str, Field(max_length=2000)]
    by: Name


class Verdict(BaseModel):
    """A decision on a label."""

    verdict: Name
    by: Name
    why: Annotated[str, Field(max_length=8000)] = ""


class Keeping(BaseModel):
    """A latent to put on a list, or to take from it."""

    latent: int
    keep: bool


Strength = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


class Steered(BaseModel):
    """One latent's part in an edit."""

    latent: int
    strength: Strength = 0.0


class SteerBody(BaseModel):
    """A prompt to continue twice: as the model does, and under an edit of latents."""

    prompt: Text
    features: Annotated[list[Steered], Field(min_length=1, max_length=32)]
    method: Method = "add"
    new_tokens: Annotated[int, Field(ge=1, le=4096)] = 48
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class FeatureName(BaseModel):
    """A feature in Neuronpedia's way; `source` and `layer` are the same."""

    modelId: Name
    source: Name = ""
    layer: Name = ""
    index: int
    strength: Strength = 0.0


class ActivationNew(BaseModel):
    """Neuronpedia's POST /api/activation/new."""

    feature: FeatureName
    customText: Text


class SearchAll(BaseModel):
    """Neuronpedia's POST /api/search-all."""

    modelId: Name
    sourceSet: Name = ""
    selectedLayers: Annotated[list[Name], Field(max_length=64)] = []
    text: Text
    densityThreshold: float = 1.0
    numResults: Annotated[int, Field(ge=1, le=500)] = 50


class TopkByToken(BaseModel):
    """Neuronpedia's POST /api/search-topk-by-token."""

    modelId: Name
    source: Name = ""
    layer: Name = ""
    text: Text
    numResults: Annotated[int, Field(ge=1, le=100)] = 10
    densityThreshold: float = 1.0


class ExplanationSearch(BaseModel):
    """Neuronpedia's POST /api/explanation/search."""

    modelId: Name
    layers: Annotated[list[Name], Field(max_length=64)] = []
    query: Annotated[str, Field(min_length=1, max_length=2000)]
    numResults: Annotated[int, Field(ge=1, le=200)] = 50


class ChatMessage(BaseModel):
    """A turn."""

    role: Literal["system", "user", "assistant"]
    content: Text


class SteerShape(BaseModel):
    """What Neuronpedia's two steering calls share."""

    modelId: Name
    features: Annotated[list[FeatureName], Field(min_length=1, max_length=32)]
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    n_tokens: Annotated[int, Field(ge=1, le=4096)] = 48
    strength_multiplier: Strength = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class SteerText(SteerShape):
    """Neuronpedia's POST /api/steer."""

    prompt: Text


class SteerChat(SteerShape):
    """Neuronpedia's POST /api/steer-chat."""

    defaultChatMessages: Annotated[list[ChatMessage], Field(min_length=1, max_length=64)]
    steeredChatMessages: Annotated[list[ChatMessage], Field(max_length=64)] = []


def add_api(app: FastAPI, shelf: Shelf, bench: Workbench) -> None:
    """Everything that is no page."""
    _add_own(app, shelf, bench)
    _add_neuronpedia(app, shelf, bench)


def _add_own(app: FastAPI, shelf: Shelf, bench: Workbench) -> None:
    @app.post("/i/{key}/latents/{latent}/activations")
    def activations(key: str, latent: int, body: TextBody) -> dict[str, Any]:  # pyright: ignore
        """The latent's activation at each token of a text."""
        return readings.activations(shelf.source(key), bench, latent, body.text)

    @app.get("/i/{key}/latents/{latent}/context")
    def context(  # pyright: ignore[reportUnusedFunction]
        key: str, latent: int, passage: int, position: int, reach: int = 200
    ) -> dict[str, Any]:
        """The tokens around one of a latent's examples, as far as 1,000 either side."""
        reach = min(max(reach, 0), 1000)
        return views.plain(views.context(shelf.source(key), latent, passage, position, reach))

    @app.post("/i/{key}/latents/{latent}/labels")
    def propose(key: str, latent: int, body: Proposal) -> dict[str, Any]:  # pyright: ignore
        """Propose a label."""
        source = shelf.source(key)
        label = source.labels.propose(source.check(latent), body.text, by=body.by, kind="person")
        return label.as_dict()

    @app.post("/i/{key}/labels/{label}/review")
    def review(key: str, label: str, body: Verdict) -> dict[str, Any]:  # pyright: ignore
        """Accept or reject a label, or send it back."""
        source = shelf.source(key)
        if not source.labels.ask("SELECT 1 FROM labels WHERE id = ?", [label]):
            raise NotFoundError(
                f"there is no label {label[:64]!r} here; the review page lists those that wait"
            )
        return source.labels.review(label, body.verdict, by=body.by, why=body.why).as_dict()

    @app.post("/i/{key}/lists/{name:path}")
    def keep(key: str, name: str, body: Keeping) -> dict[str, Any]:  # pyright: ignore
        """Put a latent on a list, or take it from it."""
        source = shelf.source(key)
        (source.labels.keep if body.keep else source.labels.drop)(name, source.check(body.latent))
        return {"name": name, "latents": source.labels.list(name)}

    @app.post("/i/{key}/steer", response_class=StreamingResponse)
    def steer(key: str, body: SteerBody) -> StreamingResponse:  # pyright: ignore
        """Continue a prompt without and with an edit; a line of JSON for each token of either."""
        source = shelf.source(key)
        bench.check_text(body.prompt)
        steering = [Steering(f.latent, f.strength) for f in body.features]
        edits = bench.edit(source, steering, body.method)

        def run(condition: str, say: Say) -> Continuation:
            return bench.reply(
                source,
                [{"role": "user", "content": body.prompt}],
                edits if condition == "steered" else (),
                new_tokens=body.new_tokens,
                temperature=body.temperature,
                seed=body.seed,
                on_text=lambda text: say({"condition": condition, "text": text}),
            )

        return StreamingResponse(_lines(run), media_type="application/x-ndjson")


Say = Any


def _lines(run: Any) -> Iterator[str]:
    """Lines of JSON from a run of each condition in a thread of its own; leaving early stops it."""
    said: queue.Queue[dict[str, Any] | None] = queue.Queue()
    gone = threading.Event()

    def say(line: dict[str, Any]) -> None:
        if gone.is_set():
            raise UserError("nobody listens any more")
        said.put(line)

    def work() -> None:
        try:
            for condition in ("default", "steered"):
                reply = run(condition, say)
                said.put({"condition": condition, "done": True, **_continuation(reply)})
        except UserError as error:
            said.put({"error": str(error)})
        except Exception as error:  # the stream has begun: it is all that can still be said
            said.put({"error": f"something went wrong ({type(error).__name__})"})
        finally:
            said.put(None)

    threading.Thread(target=work, daemon=True).start()
    try:
        while (line := said.get()) is not None:
            yield json.dumps(line, ensure_ascii=False) + "\n"
    finally:
        gone.set()


def _continuation(reply: Continuation) -> dict[str, Any]:
    return {
        "text": reply.text,
        "tokens": reply.tokens,
        "finished": reply.finished,
        "edits": [asdict(count) for count in reply.edits],
    }


def _add_neuronpedia(app: FastAPI, shelf: Shelf, bench: Workbench) -> None:
    @app.get("/api/feature/{model_id:path}/{layer}/{index}")
    def feature(model_id: str, layer: str, index: int) -> dict[str, Any]:  # pyright: ignore
        """A latent; `layer` is the index's site, key or folder."""
        source = shelf.named(model_id, layer)
        source.check(index)
        try:
            vector = [float(v) for v in bench.vector(source, index)]
        except UserError:  # everything else about it is known without the autoencoder
            vector = None
        return views.plain(readings.neuronpedia(shelf, source, index, vector))

    @app.post("/api/explanation/search")
    def explanation_search(body: ExplanationSearch) -> dict[str, Any]:  # pyright: ignore
        """Labels by the words in them."""
        found: list[dict[str, Any]] = []
        for source in _sources(shelf, body.modelId, body.layers):
            hits = source.search.text(body.query, body.numResults)
            labels = source.labels.current([hit.latent for hit in hits])
            found += [
                readings.explanation(source, labels[hit.latent].as_dict()) | {"score": hit.score}
                for hit in hits
                if hit.latent in labels
            ]
        return {"request": body.model_dump(), "results": views.plain(found[: body.numResults])}

    @app.post("/api/search-all")
    def search_all(body: SearchAll) -> dict[str, Any]:  # pyright: ignore
        """Latents that fire on a text, the strongest first, with their values at each token."""
        result: list[dict[str, Any]] = []
        tokens: list[str] = []
        for source in _sources(shelf, body.modelId, body.selectedLayers):
            reading = bench.read(source, body.text)
            tokens = list(reading.tokens)
            for latent, values in by_latent(reading).items():
                if source.index.densities[latent] <= body.densityThreshold:
                    each = [values.get(i, 0.0) for i in range(len(tokens))]
                    result.append(
                        {
                            "modelId": source.model_name,
                            "layer": source.site,
                            "index": str(latent),
                            "values": each,
                            "maxValue": max(each),
                            "maxValueIndex": each.index(max(each)),
                            "density": float(source.index.densities[latent]),
                        }
                    )
        result.sort(key=lambda r: -r["maxValue"])
        return {"tokens": tokens, "result": result[: body.numResults]}

    @app.post("/api/search-topk-by-token")
    def topk_by_token(body: TopkByToken) -> dict[str, Any]:  # pyright: ignore
        """For each token of a text the latents that fire most on it."""
        source = shelf.named(body.modelId, body.source or body.layer)
        reading = bench.read(source, body.text)
        each: list[list[dict[str, Any]]] = [[] for _ in reading.tokens]
        for latent, values in by_latent(reading).items():
            if source.index.densities[latent] <= body.densityThreshold:
                for token, value in values.items():
                    each[token].append({"activationValue": value, "featureIndex": latent})
        return {
            "results": [
                {
                    "position": i,
                    "token": token,
                    "topFeatures": sorted(found, key=lambda f: -f["activationValue"])[: body.numResults],
                }
                for i, (token, found) in enumerate(zip(reading.tokens, each, strict=True))
            ]
        }

    @app.post("/api/activation/new")
    def activation_new(body: ActivationNew) -> dict[str, Any]:  # pyright: ignore
        """One latent's activations on a text."""
        name = body.feature
        source = shelf.named(name.modelId, name.source or name.layer)
        found = readings.activations(source, bench, name.index, body.customText)
        same = {"modelId": source.model_name, "layer": source.site, "index": str(name.index)}
        return same | readings.activation(found["tokens"], found["activations"])

    @app.post("/api/steer")
    def steer(body: SteerText) -> dict[str, Any]:  # pyright: ignore
        """A continuation without and with the features added at every token."""
        turn = [{"role": "user", "content": body.prompt}]
        default, steered = _both(shelf, bench, body, turn, turn)
        return {"DEFAULT": default.text, "STEERED": steered.text, "edits": _continuation(steered)["edits"]}

    @app.post("/api/steer-chat")
    def steer_chat(body: SteerChat) -> dict[str, Any]:  # pyright: ignore
        """The next turn of a conversation without and with the features added at every token."""
        turns = [m.model_dump() for m in body.defaultChatMessages]
        steered_turns = [m.model_dump() for m in body.steeredChatMessages] or turns
        default, steered = _both(shelf, bench, body, turns, steered_turns)
        return {
            "DEFAULT": _chat(turns, default),
            "STEERED": _chat(steered_turns, steered),
            "edits": _continuation(steered)["edits"],
        }


def _sources(shelf: Shelf, model: str, layers: list[str]) -> list[Source]:
    if layers:
        return [shelf.named(model, layer) for layer in layers]
    found = [source for source in shelf.sources if model in (source.model_name, source.key)]
    return found or [shelf.named(model, "")]


def _both(
    shelf: Shelf,
    bench: Workbench,
    body: SteerShape,
    default: list[dict[str, str]],
    steered: list[dict[str, str]],
) -> tuple[Continuation, Continuation]:
    first = body.features[0]
    source = shelf.named(first.modelId, first.source or first.layer)
    for other in body.features[1:]:
        if shelf.named(other.modelId, other.source or other.layer) is not source:
            raise UserError("all features of one request must be of one index")
    steering = [Steering(f.index, f.strength * body.strength_multiplier) for f in body.features]
    edits = bench.edit(source, steering, "add")
    options: dict[str, Any] = {
        "new_tokens": body.n_tokens, "temperature": body.temperature, "seed": body.seed
    }  # fmt: skip
    return bench.reply(source, default, **options), bench.reply(source, steered, edits, **options)


def _chat(turns: list[dict[str, str]], reply: Continuation) -> dict[str, Any]:
    return {"raw": reply.text, "chatTemplate": [*turns, {"role": "assistant", "content": reply.text}]}
