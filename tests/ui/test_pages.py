"""Every page and its JSON twin, over hostile text; downloads; what is not there."""

from __future__ import annotations

import io
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from fastapi.testclient import TestClient
from safetensors.numpy import load as load_safetensors

from unbraid.features.page import Index
from unbraid.manifest.errors import IntegrityError
from unbraid.ui.app import create_app
from unbraid.ui.shelf import Shelf
from unbraid.ui.workbench import Limits, Workbench

from .conftest import LONG, OVERRIDE, RTL, SCRIPT, World


class Tags(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def addresses(world: World) -> list[str]:
    base = world.base
    return [
        "/", base, f"{base}?sort=-density&least=0.001&page=1", f"{base}?token=refund",
        f"{base}?status=proposed", f"{base}?most=0", *(f"{base}/latents/{j}" for j in (0, 3, 5, 6, 7, 8, 95)),
        world.empty,
        f"{world.empty}/latents/1", f"{base}/search", f"{base}/search?q=delayed",
        f"{base}/search?q=density>0,count<5&by=statistics", f"{base}/search?q=the+package&by=activation",
        f"{base}/search?q=parcels&by=meaning", f"{base}/prompt", f"{base}/prompt?text=the+package",
        f"{base}/contrast", f"{base}/contrast?a=the+package&b=red+ball", f"{base}/lists",
        f"{base}/lists/mine%20%2F%20%3Cb%3E", f"{base}/review", f"{base}/review?by=Ann&at=1",
        f"{world.empty}/review",
    ]  # fmt: skip


def test_every_page_has_its_twin_and_no_text_becomes_markup(client: TestClient, world: World) -> None:
    world.source.labels.keep("mine / <b>", 3)
    for address in addresses(world):
        page = client.get(address)
        assert page.status_code == 200, (address, page.text[:300])
        assert page.headers["content-type"].startswith("text/html")
        for tag, attributes in Tags(page.text).found:
            # Nothing inline: the content security policy would not allow it.
            assert "style" not in attributes and not any(name.startswith("on") for name in attributes), tag
            assert tag != "style" and (tag != "script" or (attributes["src"] or "").startswith("/static/"))
            for name in ("src", "href", "action"):
                target = attributes.get(name) or "/"
                assert target.startswith(("/", "?", "#")) and not target.startswith("//"), (tag, target)
        assert "window.pwned=1</script>" not in page.text.replace("&lt;/script&gt;", "")
        assert "49" not in page.text.split("7*7")[0][-3:]
        twin = next(a["href"] for t, a in Tags(page.text).found if t == "a" and ".json" in (a["href"] or ""))
        data = client.get(str(twin))
        assert data.status_code == 200 and data.headers["content-type"] == "application/json"
        assert client.get(address, headers={"accept": "application/json"}).json() == data.json()


def test_a_twin_holds_the_text_as_it_is_and_the_page_holds_it_made_visible(
    client: TestClient, world: World
) -> None:
    data = client.get(f"{world.base}/latents/7.json").json()
    tokens = {token for e in data["groups"][0]["examples"] for token in e["tokens"]}
    assert LONG in tokens
    page = client.get(f"{world.base}/latents/7").text
    assert "x" * 100 not in page and "(10,000 characters)" in page
    data = client.get(f"{world.base}/latents/6.json").json()
    assert OVERRIDE in {t["token"] for t in data["page"]["tokens"]}
    page = client.get(f"{world.base}/latents/6").text
    assert "\u202e" not in page and "\x07" not in page and "\u2407" in page and RTL in page


def test_a_page_says_what_the_index_says(client: TestClient, world: World) -> None:
    expected = world.source.index.latent(3)
    data = client.get(f"{world.base}/latents/3.json").json()
    assert data["page"]["count"] == expected.count and data["page"]["max"] == pytest.approx(expected.max)
    assert data["steer"]["strength"] == pytest.approx(3 * expected.max)
    assert (data["previous"], data["next"]) == (2, 4)
    interval = expected.intervals[-1]
    page = client.get(f"{world.base}/latents/3").text
    assert (
        f"Interval {interval.low:.2f}–{interval.high:.2f} (contains {100 * interval.share:.1f}\u202f%)"
        in page
    )
    assert sum(g["share"] for g in data["groups"] if g["kind"] == "interval") == pytest.approx(1)


def test_examples_that_read_the_same_are_shown_once(client: TestClient, world: World) -> None:
    data = client.get(f"{world.base}/latents/8.json").json()
    for group in data["groups"]:
        around = [tuple(e["tokens"][max(e["centre"] - 5, 0) : e["centre"] + 6]) for e in group["examples"]]
        assert len(set(around)) == len(around)
    assert any(e["same"] for g in data["groups"] for e in g["examples"])


def test_the_finding_stands_on_its_latents_page(client: TestClient, world: World) -> None:
    (finding,) = client.get(f"{world.base}/latents/3.json").json()["findings"]
    kinds = {row["kind"] for row in finding["rows"]}
    assert {"baseline", "latents", "random latents", "random direction"} <= kinds
    assert [point["dose"] for point in finding["curve"]] == [0.0, 1.0, 2.0]
    page = client.get(f"{world.base}/latents/3").text
    assert "random direction" in page and "reported" in page
    assert client.get(f"{world.base}/latents/5.json").json()["findings"] == []


def test_the_map_has_every_latent_that_fires(client: TestClient, world: World) -> None:
    alive = set(np.flatnonzero(world.source.index.densities > 0).tolist())
    structure = client.get(f"{world.base}.json").json()["structure"]
    assert {point["latent"] for point in structure["points"]} == alive
    assert structure["kinds"]["dead"] == 96 - len(alive)
    page = client.get(world.base).text
    assert page.count('class="spot') == len(alive)
    assert client.get(f"{world.base}/latents/0.json").json()["structure"]["kinds"] == ["dead"]
    assert client.get(f"{world.empty}.json").json()["structure"] is None
    assert "unbraid structure --index empty" in client.get(world.empty).text


def test_parts_and_neighbours_in_another_index_are_links_where_it_is_there(
    client: TestClient, world: World
) -> None:
    wider = next(s for s in world.shelf.sources if s.name == "wider")
    data = client.get(f"{world.base}/latents/3.json").json()
    assert [part["child"] for part in data["structure"]["contained"]] == [97, 98]
    assert {97, 98} <= {part["latent"] for part in data["structure"]["children"]}
    page = client.get(f"{world.base}/latents/3").text
    for latent in (97, 98):
        assert f'href="/i/{wider.key}/latents/{latent}"' in page
        assert client.get(f"/i/{wider.key}/latents/{latent}").status_code == 200
    assert page.count(f'<a href="/i/{wider.key}"><bdi>wider</bdi></a>') == 2
    beside = {n["latent"]: n for n in data["page"]["neighbours"] if n["sae"] is not None}
    assert (beside[98]["index"], beside[98]["url"]) == ("wider", f"/i/{wider.key}/latents/98")
    assert (beside[2]["index"], beside[2]["url"]) == (None, None) and "of <bdi>an autoencod</bdi>" in page

    alone = Shelf(world.folder, (world.source,))
    page = (
        TestClient(create_app(alone, world.bench), base_url="http://127.0.0.1")
        .get(f"{world.base}/latents/3")
        .text
    )
    assert wider.key not in page.replace(wider.index.manifest.id[:12], "", 1)
    assert f'{wider.index.manifest.id[:12]} in <bdi class="mono">{world.folder / "wider"}</bdi>' in page
    assert page.count("(not below the folder that is browsed)") == 2


def test_the_table_sorts_and_filters_as_the_index_would(client: TestClient, world: World) -> None:
    densities = world.source.index.densities
    rows = client.get(f"{world.base}.json?sort=-density&least=0.001").json()["table"]["rows"]
    alive = sorted(np.flatnonzero(densities > 0.001), key=lambda j: (-densities[j], j))
    assert [row["latent"] for row in rows] == [int(j) for j in alive]
    assert [r["latent"] for r in client.get(f"{world.base}.json?token=REFUND").json()["table"]["rows"]] == [3]
    dead = client.get(f"{world.base}.json?most=0").json()
    assert dead["table"]["total"] == dead["health"]["dead"] == int((densities == 0).sum())
    second = client.get(f"{world.base}.json?page=2").json()["table"]["rows"]
    assert [row["latent"] for row in second] == list(range(50, 96))


def test_vectors_are_decoder_rows(client: TestClient, world: World) -> None:
    wanted = world.sae.W_dec[3].detach().numpy()
    npy = client.get(f"{world.base}/latents/3/vector.npy")
    assert np.array_equal(np.load(io.BytesIO(npy.content)), wanted)
    assert "attachment" in npy.headers["content-disposition"]
    tensors = load_safetensors(client.get(f"{world.base}/latents/3/vector.safetensors").content)
    assert np.array_equal(tensors["vector"], wanted)
    assert client.get(f"{world.base}/latents/3/vector.pkl").status_code == 400


def test_the_context_is_the_passage_with_what_is_known(client: TestClient, world: World) -> None:
    example = client.get(f"{world.base}/latents/3.json").json()["groups"][0]["examples"][0]
    place = f"passage={example['passage']}&position={example['position']}"
    data = client.get(f"{world.base}/latents/3/context?{place}&reach=200").json()
    assert len(data["tokens"]) == 44 and data["start"] == 0
    assert data["activations"][data["centre"]] == pytest.approx(example["value"])
    # The index keeps three tokens to either side here; further away nobody knows.
    assert data["activations"][-1] is None or data["activations"][-1] >= 0
    assert client.get(f"{world.base}/latents/3/context?passage=99&position=0").status_code == 404


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/nothing", 404),
        ("/i/ffffffffffff", 404),
        ("{base}/latents/96", 404),
        ("{base}/latents/-1", 404),
        ("{base}/latents/99999999999999999999", 404),
        ("{base}/latents/three", 422),
        ("{base}/lists/none", 404),
        ("{base}?sort=evil", 400),
        ("{base}?least=much", 400),
        ("{base}?most=nan", 400),
        ("{base}?least=-1e999", 400),
        ("{base}?status=late", 400),
        ("{base}/review?status=late", 400),
        ("{base}?page=0", 422),
        ("{base}/search?q=x&by=magic", 400),
        ("{base}/search?q=" + "x" * 5000, 422),
        ("/go?index=ffffffffffff", 404),
        ("/static/../app.py", 404),
        ("/static/%2e%2e/app.py", 404),
        ("/docs", 404),
    ],
)
def test_what_is_not_there_is_said_in_a_page_and_in_json(
    client: TestClient, world: World, address: str, status: int
) -> None:
    address = address.format(base=world.base)
    page = client.get(address, headers={"accept": "text/html"})
    assert page.status_code == status, page.text
    if not address.startswith("/static"):
        assert "<h1>" in page.text
    data = client.get(address, headers={"accept": "application/json"})
    assert data.status_code == status and data.json()["error"]


def test_an_order_that_there_is_not_is_said(client: TestClient, world: World) -> None:
    for asked in ("by=activation&order=size", "by=text&order=size", "by=statistics&order=size"):
        data = client.get(f"{world.base}/search.json?q=count%3E%3D1&{asked}").json()
        assert "order" in data["problem"] or "size" in data["problem"], asked
        assert data["hits"] == []
    weights = [
        client.get(f"{world.base}/search.json?q=the+red+ball&by=activation&order={order}").json()["hits"]
        for order in ("surprise", "activation")
    ]
    assert weights[0] and weights[1] and weights[0] != weights[1]


def test_lists_have_addresses_whatever_their_names(client: TestClient, world: World) -> None:
    for name in ("a?b#c", "100% mine", "one/two"):
        path = f"{world.base}/lists/{quote(name, safe='')}"
        assert client.post(path, json={"latent": 5, "keep": True}).status_code == 200
        (listed,) = [x for x in client.get(f"{world.base}/lists.json").json()["lists"] if x["name"] == name]
        assert client.get(f"{listed['url']}.json").json()["name"] == name
        client.post(path, json={"latent": 5, "keep": False})


def test_an_index_with_a_file_missing_is_named_and_not_served(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.source.index.folder, tmp_path / "whole")
    shutil.copytree(world.source.index.folder, tmp_path / "harmed")
    (tmp_path / "harmed" / "examples.parquet").unlink()
    shelf = Shelf.open(tmp_path)
    assert [source.name for source in shelf.sources] == ["whole"]
    assert "examples.parquet is missing" in shelf.problems[0]
    (tmp_path / "harmed" / "examples.parquet").write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match=r"examples\.parquet has 4 bytes where its manifest lists"):
        Index(tmp_path / "harmed")


def test_going_to_a_latent(client: TestClient, world: World) -> None:
    key = world.source.key
    answer = client.get(f"/go?index={key}&latent=5", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, f"{world.base}/latents/5")
    assert client.get(f"/go?index={key}&latent=", follow_redirects=False).headers["location"] == world.base


def test_without_a_model_pages_say_how_to_have_one(world: World) -> None:
    client = TestClient(create_app(world.shelf, Workbench(None, None, Limits())), base_url="http://localhost")
    assert "--model" in client.get(f"{world.base}/latents/3").text
    assert "--model" in client.get(f"{world.base}/prompt.json?text=hello").json()["problem"]
    assert client.get(f"{world.base}/latents/3/vector.npy").status_code == 400


def test_the_openapi_names_every_twin(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/index.json", "/i/{key}.json", "/i/{key}/latents/{latent}.json", "/api/steer"} <= set(paths)


def test_scripts_and_styles_are_there(client: TestClient) -> None:
    for name, kind in (("app.css", "text/css"), ("shades.css", "text/css"), ("app.js", "text/javascript")):
        answer = client.get(f"/static/{name}")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
    assert ".a100{--a:1}" in client.get("/static/shades.css").text


def test_script_in_a_label_is_text(client: TestClient, world: World) -> None:
    page = client.get(f"{world.base}/latents/5").text
    assert SCRIPT not in page and "&lt;script&gt;window.pwned=1" in page
