"""Who may ask, for what, and how much."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from unbraid.manifest.errors import UserError
from unbraid.ui.app import create_app
from unbraid.ui.security import HEADERS, Access, is_loopback

from .conftest import World

TOKEN = "correct horse battery"
HERE = "http://127.0.0.1"


@pytest.fixture(scope="module")
def guarded(world: World) -> TestClient:
    access = Access.on("0.0.0.0", TOKEN, ("unbraid.example",), 4096)
    return TestClient(create_app(world.shelf, world.bench, access), base_url=HERE, follow_redirects=False)


def test_only_loopback_goes_without_a_token() -> None:
    assert Access.on("127.0.0.1").token == "" and Access.on("::1").token == ""
    for host in ("0.0.0.0", "192.168.1.4", "::", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(UserError, match="--token"):
            Access.on(host)
    with pytest.raises(UserError, match="12 or more"):
        Access.on("127.0.0.1", "short")


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "", "[::2]"]
)
def test_another_name_for_this_machine_is_refused(client: TestClient, world: World, host: str) -> None:
    answer = client.get(world.base, headers={"host": host})
    assert answer.status_code == 421 and "unbraid" not in answer.text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8400", "127.0.0.1:9", "[::1]:8400", "[::1]"])
def test_our_own_names_are_taken(client: TestClient, world: World, host: str) -> None:
    assert client.get(world.base, headers={"host": host}).status_code == 200


def test_with_a_token_addresses_and_named_hosts_are_taken_and_other_names_are_not(
    guarded: TestClient,
) -> None:
    bearer = {"authorization": f"Bearer {TOKEN}"}
    for host, status in (("10.1.2.3:80", 200), ("unbraid.example", 200), ("evil.example", 421)):
        assert guarded.get("/", headers={"host": host, **bearer}).status_code == status


@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer ", "é"]
)
def test_without_the_token_nothing_is_said(guarded: TestClient, world: World, given: str | None) -> None:
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    for path in (world.base, f"{world.base}/latents/3.json", "/openapi.json", "/api/feature/a/b/1"):
        answer = guarded.get(path, headers=headers)
        assert answer.status_code == 401 and world.source.key not in answer.text
    assert guarded.post("/api/steer", json={}, headers=headers).status_code == 401


def test_a_browser_is_led_to_the_login_and_back(guarded: TestClient, world: World) -> None:
    guarded.cookies.clear()
    answer = guarded.get(world.base, headers={"accept": "text/html"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert guarded.get("/login").status_code == 200
    wrong = guarded.post("/login", data={"token": "wrong"}, headers={"origin": HERE})
    assert wrong.status_code == 401 and "set-cookie" not in wrong.headers
    right = guarded.post("/login", data={"token": TOKEN}, headers={"origin": HERE})
    assert right.status_code == 303
    cookie = right.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
    assert guarded.get(world.base).status_code == 200
    guarded.cookies.clear()
    assert guarded.get(world.base, headers={"cookie": f"unbraid_token={'0' * 64}"}).status_code == 401
    assert guarded.get(world.base, headers={"cookie": "unbraid_token=é".encode("latin-1")}).status_code == 401


def test_another_sites_page_can_neither_change_nor_embed_nor_read(client: TestClient, world: World) -> None:
    path = f"{world.base}/lists/stolen"
    body = {"latent": 3, "keep": True}
    foreign = [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "navigate"},
    ]
    for headers in foreign:
        assert client.post(path, json=body, headers=headers).status_code == 403, headers
    # What a form of another site can send without asking first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = client.post(path, content=b'{"latent": 3, "keep": true}', headers={"content-type": kind})
        assert answer.status_code == 415, kind
    assert "stolen" not in world.source.labels.lists()
    for mode in ("no-cors", "cors"):
        answer = client.get(world.base, headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": mode})
        assert answer.status_code == 403
    followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get(world.base, headers=followed).status_code == 200


def test_our_own_pages_can_change_things(client: TestClient, world: World) -> None:
    same = {"origin": "http://127.0.0.1", "sec-fetch-site": "same-origin"}
    answer = client.post(f"{world.base}/lists/ours", json={"latent": 3, "keep": True}, headers=same)
    assert answer.json() == {"name": "ours", "latents": [3]}
    answer = client.post(f"{world.base}/lists/ours", json={"latent": 3, "keep": False}, headers=same)
    assert answer.json() == {"name": "ours", "latents": []}


def test_large_requests_are_refused_whether_they_say_so_or_not(guarded: TestClient, world: World) -> None:
    headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
    path = f"{world.base}/latents/3/activations"
    assert guarded.post(path, content=b"x" * 5000, headers=headers).status_code == 413
    assert guarded.post(path, content=b"{}", headers=headers | {"content-length": "lots"}).status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(50):
            yield b" " * 100

    assert guarded.post(path, content=pieces(), headers=headers).status_code == 413


def test_every_answer_carries_the_policy(client: TestClient, guarded: TestClient, world: World) -> None:
    answers = [
        client.get(world.base),
        client.get("/nothing"),
        client.get("/static/app.js"),
        client.get(world.base, headers={"host": "evil.example"}),
        guarded.get(world.base),
        client.post("/api/steer", json={}),
    ]
    for answer in answers:
        for name, value in HEADERS.items():
            assert answer.headers[name] == value, (answer.url, name)
        assert "unsafe" not in answer.headers["content-security-policy"]
    assert client.get(world.base).headers["cache-control"] == "no-store"


def test_what_breaks_says_no_more_than_that(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret <b>")

    app = create_app(world.shelf, world.bench)
    client = TestClient(app, base_url=HERE, raise_server_exceptions=False)
    monkeypatch.setattr("unbraid.ui.views.home", broken)
    answer = client.get("/")
    assert answer.status_code == 500 and "secret" not in answer.text and "RuntimeError" in answer.text
    assert answer.headers["content-security-policy"]
