"""The pages and their addresses: each is one view, shown as HTML, or as it is at its address with .json."""

from __future__ import annotations

import inspect
import io
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from unbraid.manifest.errors import UserError
from unbraid.ui import figures, readings, views
from unbraid.ui.charts import percent
from unbraid.ui.shelf import Shelf
from unbraid.ui.text import clipped, marked_tokens, number, share, token_name
from unbraid.ui.workbench import Workbench

Text = Annotated[str, Query(max_length=4000)]
TITLES = {
    400: "That cannot be done",
    404: "There is no such page",
    503: "Busy",
    422: "That was not understood",
}


class Pages:
    """How views become pages."""

    def __init__(self, shelf: Shelf, bench: Workbench) -> None:
        self.shelf = shelf
        self.bench = bench
        self.environment = _environment()

    def html(
        self, request: Request, template: str, data: Mapping[str, Any], *, status: int = 200, twin: str = ""
    ) -> HTMLResponse:
        """A page of a template; `data` is `d` in it."""
        text = self.environment.get_template(template).render(
            d=data, sources=self.shelf.sources, twin=twin, here=None, **self._about_model(data)
        )
        return HTMLResponse(text, status)

    def _about_model(self, data: Mapping[str, Any]) -> dict[str, str | bool]:
        """Why text cannot be tried, and whether the autoencoder is there, for pages of an index."""
        if "index" not in data:
            return {}
        source = self.shelf.source(data["index"]["key"])
        return {"missing": self.bench.missing(source), "sae_missing": source.sae_folder is None}

    def error(self, request: Request, status: int, message: str) -> Response:
        """An error as a page, or as JSON for whoever asks for that."""
        headers = {"retry-after": "5"} if status == 503 else None
        if _wants_json(request) or request.method != "GET" or request.url.path.startswith("/api/"):
            return JSONResponse({"error": message}, status, headers)
        data = {"status": status, "title": TITLES.get(status, "That did not work"), "error": message}
        return self.html(request, "error.html.j2", data, status=status)


def add_pages(app: FastAPI, pages: Pages) -> None:
    """All pages with their twins, and what they link to."""
    shelf, bench = pages.shelf, pages.bench

    def page(path: str, template: str) -> Callable[[Callable[..., dict[str, Any]]], None]:
        def register(view: Callable[..., dict[str, Any]]) -> None:
            _register(app, pages, path, template, view)

        return register

    @page("/", "home.html.j2")
    def home() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """The indexes in the folder."""
        return views.home(shelf)

    @page("/i/{key}", "overview.html.j2")
    def overview(  # pyright: ignore[reportUnusedFunction]
        key: str,
        sort: Annotated[str, Query(max_length=40)] = "latent",
        least: Annotated[str, Query(max_length=40)] = "",
        most: Annotated[str, Query(max_length=40)] = "",
        token: Annotated[str, Query(max_length=100)] = "",
        status: Annotated[str, Query(max_length=20)] = "",
        page: Annotated[int, Query(ge=1, le=10**7)] = 1,
    ) -> dict[str, Any]:
        """An index at a glance, and a table of its latents."""
        where = {"least": _share(least), "most": _share(most), "token": token, "status": status}
        return views.overview(shelf.source(key), sort=sort, where=where, page=page)

    @page("/i/{key}/latents/{latent}", "feature.html.j2")
    def feature(key: str, latent: int) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """Everything that is known about one latent."""
        return views.feature(shelf, shelf.source(key), latent)

    @page("/i/{key}/search", "search.html.j2")
    def search(  # pyright: ignore[reportUnusedFunction]
        key: str, q: Text = "", by: str = "text", order: Annotated[str, Query(max_length=40)] = ""
    ) -> dict[str, Any]:
        """Latents by words, meaning, a pasted text or numbers."""
        return readings.search(shelf.source(key), bench, query=q, by=by, order=order)

    @page("/i/{key}/prompt", "prompt.html.j2")
    def prompt(key: str, text: Text = "") -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """Which latents fire where in a text."""
        return readings.prompt(shelf.source(key), bench, text)

    @page("/i/{key}/contrast", "contrast.html.j2")
    def contrast(key: str, a: Text = "", b: Text = "") -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """Latents that fire more in one of two texts."""
        return readings.contrast(shelf.source(key), bench, a, b)

    @page("/i/{key}/lists", "lists.html.j2")
    def lists(key: str) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """All lists of latents."""
        return readings.lists(shelf.source(key))

    @page("/i/{key}/lists/{name:path}", "list.html.j2")
    def one_list(key: str, name: str) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """The latents of one list."""
        return readings.one_list(shelf.source(key), name)

    @page("/i/{key}/review", "review.html.j2")
    def review(  # pyright: ignore[reportUnusedFunction]
        key: str,
        by: Annotated[str, Query(max_length=120)] = "",
        status: Annotated[str, Query(max_length=20)] = "proposed",
        at: Annotated[int, Query(ge=-1, le=10**6)] = 0,
    ) -> dict[str, Any]:
        """One label that waits for a decision, and where the others are."""
        return readings.review(shelf, shelf.source(key), by=by, status=status, at=at)

    @app.get("/go", include_in_schema=False)
    def go(index: str, latent: str = "") -> Response:  # pyright: ignore[reportUnusedFunction]
        source = shelf.source(index)
        place = f"/latents/{source.check(_whole(latent))}" if latent.strip() else ""
        return RedirectResponse(f"/i/{source.key}{place}", status_code=303)

    @app.get("/i/{key}/latents/{latent}/vector.{kind}", response_class=Response)
    def vector(key: str, latent: int, kind: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        """The latent's decoder row as .npy or .safetensors."""
        source = shelf.source(key)
        values = bench.vector(source, source.check(latent))
        if kind == "npy":
            buffer = io.BytesIO()
            np.save(buffer, values, allow_pickle=False)
            data = buffer.getvalue()
        elif kind == "safetensors":
            from safetensors.numpy import save

            data = save(
                {"vector": values}, {"latent": str(latent), "sae": source.sae_id, "site": source.site}
            )
        else:
            raise UserError(f"a vector comes as npy or safetensors, not as {kind[:20]!r}")
        name = f"{source.key}-latent-{latent}.{kind}"
        return Response(
            data,
            media_type="application/octet-stream",
            headers={"content-disposition": f'attachment; filename="{name}"'},
        )

    @app.get("/i/{key}/labels.jsonl", response_class=Response)
    def labels(key: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        """All labels, scores, reviews and lists, one a line, sorted."""
        source = shelf.source(key)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "labels.jsonl"
            source.labels.export(path)
            data = path.read_bytes()
        return Response(data, media_type="application/x-ndjson")


def _register(
    app: FastAPI, pages: Pages, path: str, template: str, view: Callable[..., dict[str, Any]]
) -> None:
    """A view under its address as a page, and under the same with .json (the first page: /index.json)."""
    twin_path = "/index.json" if path == "/" else f"{path}.json"

    @wraps(view)
    def as_json(**given: Any) -> Response:
        return JSONResponse(views.plain(view(**given)))

    @wraps(view)
    def as_page(request: Request, **given: Any) -> Response:
        data = view(**given)
        if _wants_json(request):
            return JSONResponse(views.plain(data))
        address = "/index.json" if path == "/" else f"{request.url.path}.json"
        query = f"?{request.url.query}" if request.url.query else ""
        return pages.html(request, template, data, twin=address + query)

    own = inspect.signature(view, eval_str=True)
    request = inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY, annotation=Request)
    each = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.parameters.values()]
    as_json.__signature__ = own.replace(parameters=each, return_annotation=Response)  # pyright: ignore
    as_page.__signature__ = own.replace(parameters=[request, *each], return_annotation=Response)  # pyright: ignore
    app.get(twin_path, name=f"{view.__name__}_json", response_class=JSONResponse)(as_json)
    app.get(path, include_in_schema=False, response_class=HTMLResponse)(as_page)


def _wants_json(request: Request) -> bool:
    accept = request.headers.get("accept", "")
    if request.url.path.endswith((".json", "/context")):
        return True
    return "application/json" in accept and "text/html" not in accept


def _share(text: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{text!r} is no number; write a density such as 0.01")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{text[:40]!r} is no number of a latent") from error


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("unbraid.ui"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = environment.filters  # pyright: ignore[reportAssignmentType]
    filters.update(
        num=number,
        pct=lambda value, digits=1: "–" if value is None else percent(value, digits),
        span=lambda i: f"{100 * i.low:.1f} – {100 * i.high:.1f}".replace("-", "−"),
        token=token_name,
        clip=clipped,
        marked=marked_tokens,
        share=share,
        tint=lambda value: max(round(60 * value), 4),
        score=_score,
        history=lambda line: clipped(json.dumps(line, ensure_ascii=False, sort_keys=True), 600),
        agreement=lambda a: (
            f"{len(a['raters'])} reviewers judged {a['units']} labels twice or more and agreed in "
            f"{percent(a['percent'].value)} of the pairs"
        ),
    )
    names: dict[str, Any] = environment.globals
    names.update(
        densities=figures.densities,
        histogram=figures.histogram,
        dose_response=figures.dose_response,
        scatter_map=figures.scatter_map,
        octaves=figures.octaves,
        page_link=_page_link,
        review_link=_review_link,
    )
    return environment


def _score(score: Any) -> str:
    """A label's score with its interval and base rate, where it has them."""
    if isinstance(score, bool) or score is None:
        return str(score)
    if isinstance(score, int | float):
        return number(float(score))
    if isinstance(score, Mapping):
        value = score.get("value", score.get("score"))
        text = number(float(value)) if isinstance(value, int | float) else ""
        if isinstance(score.get("low"), int | float) and isinstance(score.get("high"), int | float):
            text += f" ({number(float(score['low']))} – {number(float(score['high']))})"
        if isinstance(score.get("base_rate"), int | float):
            text += f", base rate {number(float(score['base_rate']))}"
        return text or clipped(json.dumps(score, ensure_ascii=False), 200)
    return clipped(str(score), 200)


def _page_link(data: Mapping[str, Any], page: int) -> str:
    table = data["table"]
    return (
        f"{data['index']['url']}?{urlencode({**table['where'], 'sort': table['sort'], 'page': page})}#latents"
    )


def _review_link(data: Mapping[str, Any], at: int) -> str:
    at = min(max(at, 0), max(data["waiting"] - 1, 0))
    asked = {"by": data["by"]} if data["by"] else {"status": data["status"]}
    return f"{data['index']['url']}/review?{urlencode({**asked, 'at': at})}"
