"""Run the browser's server until somebody stops it."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from unbraid.manifest.errors import UserError
from unbraid.ui.app import create_app
from unbraid.ui.security import Access
from unbraid.ui.shelf import Shelf
from unbraid.ui.workbench import Workbench


def serve(
    shelf: Shelf,
    bench: Workbench,
    access: Access,
    *,
    host: str = "127.0.0.1",
    port: int = 8400,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve a shelf; `ready` is told the address once connections are taken.

    Raises UserError when the port is taken or the address is not this machine's.
    """
    bound = _bound(host, port)
    address, taken = bound.getsockname()[:2]
    shown = f"[{address}]" if ":" in str(address) else address
    config = uvicorn.Config(
        create_app(shelf, bench, access),
        log_level="warning",
        access_log=False,  # addresses hold what was searched for
        server_header=False,
        timeout_keep_alive=15,
        limit_concurrency=64,
        h11_max_incomplete_event_size=65_536,
        lifespan="off",
        ws="none",
    )
    with bound:
        if ready is not None:
            ready(f"http://{shown}:{taken}/")
        uvicorn.Server(config).run(sockets=[bound])


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{host} port {port} cannot be listened on ({reason}); choose another --port"
        ) from error
    return bound
