"""Who may ask, for what, and how much: what stands between the pages and whoever reaches the port.

A page in another tab can send requests to a server on this machine. So the Host header must be one of ours
(or a name that somebody else points here would pass for us), what another site embeds or fetches is refused,
and what changes something has to be JSON from our own pages: a form of another site cannot send that.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from unbraid.manifest.errors import UserError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "unbraid_token"
LOGIN = "/login"
SHORTEST_TOKEN = 12
"""Characters of a token: fewer could be guessed."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    # Not "no-referrer": forms of our own would then come without their origin.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


@dataclass(frozen=True)
class Access:
    """Who may use the browser."""

    hosts: tuple[str, ...] = LOOPBACK
    """Names in the Host header that are ours, without ports."""
    token: str = ""
    """What everybody has to know; empty on a loopback address, where only this machine's users come."""
    any_address: bool = False
    """Whether a bare IP address in the Host header is ours too: no name can be turned against us then."""
    body: int = 262_144
    """Most bytes of a request."""

    @classmethod
    def on(cls, host: str, token: str = "", names: tuple[str, ...] = (), body: int = 262_144) -> Access:
        """For a server that listens on `host`; raises UserError where that needs a token."""
        if token and len(token) < SHORTEST_TOKEN:
            raise UserError(f"the token has {len(token)} characters; choose one of {SHORTEST_TOKEN} or more")
        if not is_loopback(host) and not token:
            raise UserError(
                f"others can reach {host}; give --token (or set UNBRAID_TOKEN), which all have to know"
            )
        return cls((*LOOPBACK, host.lower(), *(n.lower() for n in names)), token, not is_loopback(host), body)

    @property
    def cookie(self) -> str:
        """What the cookie holds: not the token itself."""
        return hashlib.sha256(b"unbraid browse\0" + self.token.encode()).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    if host.lower() in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guarded:
    """An ASGI application behind all checks; it adds the headers of every answer."""

    def __init__(self, app: App, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or hand it on with its body bounded."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                if body.too_large:  # whoever read it only knows that it could not
                    message["status"] = 413
                there = {key.lower() for key, _ in message["headers"]}
                more = HEADERS | ({} if b"cache-control" in there else {"cache-control": "no-store"})
                message["headers"] = [
                    *message["headers"],
                    *((key.encode(), value.encode()) for key, value in more.items()),
                ]
            await send(message)

        body = _Body(receive, self.access.body)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(
                with_headers, *refusal, login=refusal[0] == 401 and "text/html" in headers.get("accept", "")
            )
            return
        await self.app(scope, body, with_headers)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host = _name(headers.get("host", ""))
        if host not in self.access.hosts and not (self.access.any_address and _is_address(host)):
            return 421, "this server does not go by that name; use its address, or start it with --allow-host"
        changes = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        origin = headers.get("origin")
        if origin is not None and (changes or origin != "null"):
            parts = urlsplit(origin)
            if parts.netloc.lower() != headers.get("host", "").lower():
                return 403, "requests from pages of another site are refused"
        site = headers.get("sec-fetch-site", "none")
        followed = headers.get("sec-fetch-mode") == "navigate" and not changes
        if site not in ("same-origin", "none") and not followed:
            return 403, "requests from pages of another site are refused"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.access.body:
            return 413, f"a request may have {self.access.body:,} bytes"
        path = scope["path"]
        if (
            changes
            and path != LOGIN
            and headers.get("content-type", "").split(";")[0].strip() != "application/json"
        ):
            return 415, "send JSON, with the header Content-Type: application/json"
        if (
            self.access.token
            and path != LOGIN
            and not path.startswith("/static/")
            and not self._knows(headers)
        ):
            return (
                401,
                "this server asks for its token: as Authorization: Bearer TOKEN, or on the page /login",
            )
        return None

    def _knows(self, headers: dict[str, str]) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and same(given.strip(), self.access.token):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except Exception:  # a cookie that cannot be read is none
            return False
        return cookie is not None and same(cookie.value, self.access.cookie)


def same(given: str, wanted: str) -> bool:
    """Whether two secrets are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode(), wanted.encode())


def _name(host: str) -> str:
    """The Host header's name without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class TooLargeError(UserError):
    """A body went on beyond the limit; the answer is a 413."""


class _Body:
    """A request's body, which ends in an error when it goes on beyond the limit."""

    def __init__(self, receive: Receive, most: int) -> None:
        self.receive = receive
        self.left = most
        self.too_large = False

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self.receive()
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            self.too_large = True
            raise TooLargeError("the request is larger than this server takes")
        return message


async def _refuse(send: Send, status: int, reason: str, *, login: bool) -> None:
    headers = [(b"content-type", b"application/json")]
    if login:
        status, headers = 303, [*headers, (b"location", LOGIN.encode())]
    body = json.dumps({"error": reason}).encode()
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
