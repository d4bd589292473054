"""The application: pages and API over a shelf of artifacts, behind the checks of `security`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

import unbraid
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.ui.api import add_api
from unbraid.ui.pages import Pages, add_pages
from unbraid.ui.security import COOKIE, LOGIN, Access, Guarded, TooLargeError, same
from unbraid.ui.shelf import NotFoundError, Shelf
from unbraid.ui.text import shades
from unbraid.ui.workbench import BusyError, TooLongError, Workbench

STATUS: tuple[tuple[type[Exception], int], ...] = (
    (NotFoundError, 404),
    (BusyError, 503),
    (TooLargeError, 413),
    (TooLongError, 504),
    (UserError, 400),
    (IntegrityError, 500),
)


def create_app(shelf: Shelf, bench: Workbench, access: Access | None = None) -> Guarded:
    """The browser of a shelf, as an ASGI application."""
    access = access or Access()
    app = FastAPI(
        title="unbraid browse",
        version=unbraid.__version__,
        description="Features of indexes: every page under its address with .json, and Neuronpedia's shapes.",
        docs_url=None,  # they load their scripts from elsewhere
        redoc_url=None,
    )
    pages = Pages(shelf, bench)
    add_pages(app, pages)
    add_api(app, shelf, bench)
    _add_static(app)
    _add_login(app, pages, access)
    _add_errors(app, pages)
    return Guarded(app, access)


def _add_static(app: FastAPI) -> None:
    @app.get("/static/shades.css", include_in_schema=False)
    def shades_css() -> Response:  # pyright: ignore[reportUnusedFunction]
        return Response(shades(), media_type="text/css", headers={"cache-control": "max-age=3600"})

    app.mount("/static", StaticFiles(directory=Path(str(files("unbraid.ui") / "static"))), name="static")


def _add_login(app: FastAPI, pages: Pages, access: Access) -> None:
    @app.get(LOGIN, include_in_schema=False)
    def login_page(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return pages.html(request, "login.html.j2", {"problem": None})

    @app.post(LOGIN, include_in_schema=False)
    async def login(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        # A form with one field: not worth a parser for all kinds of forms.
        fields = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=5)
        if not same(fields.get("token", [""])[0], access.token):
            return pages.html(request, "login.html.j2", {"problem": "That is not the token."}, status=401)
        answer = RedirectResponse("/", status_code=303)
        answer.set_cookie(COOKIE, access.cookie, httponly=True, samesite="strict", max_age=30 * 86400)
        return answer


def _add_errors(app: FastAPI, pages: Pages) -> None:
    def failed(request: Request, error: Exception) -> Response:
        status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
        return pages.error(request, status, str(error))

    for kind, _ in STATUS:
        app.add_exception_handler(kind, failed)

    def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return pages.error(request, 422, "the request's body is no JSON")
        place = ".".join(str(part) for part in first["loc"][1:])
        return pages.error(request, 422, f"{place or 'the request'}: {first['msg']}")

    def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = "there is no such page here" if error.status_code == 404 else str(error.detail)
        return pages.error(request, error.status_code, said)

    def broken(request: Request, error: Exception) -> Response:
        # The traceback goes to the log; what it says may quote anything.
        return PlainTextResponse(f"something went wrong ({type(error).__name__}); the log says more", 500)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Exception, broken)
