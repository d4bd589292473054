"""The requests of scripts: readings, labels, lists, steering, Neuronpedia's shapes, and what they refuse."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from unbraid.activations.documents import Document
from unbraid.features.rows import read_rows
from unbraid.model.generate import generate
from unbraid.ui.app import create_app
from unbraid.ui.workbench import BusyError, Limits, Steering, TooLongError, Workbench

from .conftest import SCRIPT, SITE, World

TEXT = "the delayed package was a red ball"


@pytest.fixture(scope="module")
def codes(world: World) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Tokens of TEXT and its dense codes, by the plain way."""
    rows = next(
        read_rows(
            world.lm, [Document.of_text(TEXT)], world.sae.site, positions="all", context=256, batch_tokens=256
        )
    )
    with torch.no_grad():
        dense = world.sae.encode_dense(rows.x).numpy() * rows.counted[:, None]
    return [world.lm.tokenizer.decode([i]) for i in rows.windows[0].input_ids], dense


def test_activations_are_those_of_the_autoencoder(
    client: TestClient, world: World, codes: tuple[list[str], np.ndarray[Any, Any]]
) -> None:
    tokens, dense = codes
    latent = int(dense.max(axis=0).argmax())
    data = client.post(f"{world.base}/latents/{latent}/activations", json={"text": TEXT}).json()
    assert data["tokens"] == tokens
    np.testing.assert_allclose(data["activations"], dense[:, latent], rtol=1e-5, atol=1e-6)
    new = client.post(
        "/api/activation/new",
        json={
            "feature": {"modelId": "made", "source": world.source.key, "index": str(latent)},
            "customText": TEXT,
        },
    ).json()
    assert new["tokens"] == tokens and new["index"] == str(latent)
    assert new["maxValueTokenIndex"] == int(dense[:, latent].argmax())
    np.testing.assert_allclose(new["values"], dense[:, latent], rtol=1e-5, atol=1e-6)


def test_a_prompts_page_names_what_fires_at_each_token(
    client: TestClient, world: World, codes: tuple[list[str], np.ndarray[Any, Any]]
) -> None:
    _, dense = codes
    data = client.get(f"{world.base}/prompt.json", params={"text": TEXT}).json()
    top = client.post(
        "/api/search-topk-by-token", json={"modelId": "made", "source": world.source.key, "text": TEXT}
    ).json()
    for row, token, found in zip(dense, data["tokens"], top["results"], strict=True):
        strongest = int(row.argmax())
        if row[strongest] > 0:
            assert token["latents"][0]["latent"] == strongest == found["topFeatures"][0]["featureIndex"]
        assert len(token["latents"]) == min((row > 0).sum(), 8)
    every = client.post(
        "/api/search-all",
        json={"modelId": "made", "sourceSet": "", "text": TEXT, "selectedLayers": [world.source.key]},
    ).json()["result"]
    assert int(every[0]["index"]) == int(dense.max(axis=0).argmax())
    assert every[0]["maxValue"] == pytest.approx(dense.max(), rel=1e-5)


def test_the_contrast_is_the_difference_of_largest_activations(
    client: TestClient, world: World, codes: tuple[list[str], np.ndarray[Any, Any]]
) -> None:
    _, dense = codes
    data = client.get(f"{world.base}/contrast.json", params={"a": TEXT, "b": "wait"}).json()
    first = data["more_in_a"][0]
    assert first["max_a"] == pytest.approx(dense.max(axis=0)[first["latent"]], rel=1e-5)
    assert first["difference"] == pytest.approx(first["max_a"] - first["max_b"])
    swapped = client.get(f"{world.base}/contrast.json", params={"a": "wait", "b": TEXT}).json()
    assert [r["latent"] for r in swapped["more_in_b"]] == [r["latent"] for r in data["more_in_a"]]


def steered(client: TestClient, world: World, **changes: Any) -> list[dict[str, Any]]:
    body: dict[str, Any] = {
        "prompt": TEXT, "features": [{"latent": 3, "strength": 30.0}], "new_tokens": 6, "temperature": 0.0
    }  # fmt: skip
    answer = client.post(f"{world.base}/steer", json=body | changes)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize("method", ["add", "clamp", "scale", "ablate"])
def test_steering_is_the_edit_that_is_measured_and_deployed(
    client: TestClient, world: World, method: Any
) -> None:
    lines = steered(client, world, method=method)
    last = {line["condition"]: line for line in lines if line.get("done")}
    everywhere = [-np.inf] if method in ("add", "clamp") else None
    edit = world.sae.latent_edit([3], method, 30.0, positions="all", thresholds=everywhere)
    messages = [{"role": "user", "content": TEXT}]
    for condition, edits in (("default", []), ("steered", [edit])):
        wanted = generate(world.lm, [messages], max_new_tokens=6, temperature=0.0, seeds=[0], edits=edits)[0]
        assert last[condition]["text"] == wanted.text
        assert [e["fired"] for e in last[condition]["edits"]] == [e.fired for e in wanted.edits]
    if method == "add":
        assert last["steered"]["edits"][0]["fired"] == last["steered"]["edits"][0]["considered"] > 0
        assert last["steered"]["text"] != last["default"]["text"]


def test_a_stream_tells_each_token(client: TestClient, world: World) -> None:
    lines = steered(client, world)
    for condition in ("default", "steered"):
        mine = [line for line in lines if line["condition"] == condition]
        assert len(mine) == mine[-1]["tokens"] + 1 + mine[-1]["finished"] and mine[-1]["done"]


def test_neuronpedias_steering(client: TestClient, world: World) -> None:
    same = {
        "modelId": "made",
        "features": [{"modelId": "made", "layer": world.source.key, "index": 3, "strength": 15}],
        "strength_multiplier": 2, "n_tokens": 6, "temperature": 0, "seed": 0, "freq_penalty": 0,
    }  # fmt: skip
    last = {line["condition"]: line["text"] for line in steered(client, world) if line.get("done")}
    answer = client.post("/api/steer", json={"prompt": TEXT, **same}).json()
    assert (answer["DEFAULT"], answer["STEERED"]) == (last["default"], last["steered"])
    turns = [{"role": "user", "content": TEXT}]
    chat = client.post("/api/steer-chat", json={"defaultChatMessages": turns, **same}).json()
    assert chat["STEERED"]["chatTemplate"] == [*turns, {"role": "assistant", "content": last["steered"]}]


def test_neuronpedias_feature(client: TestClient, world: World) -> None:
    page = world.source.index.latent(3)
    data = client.get(f"/api/feature/made/{world.source.key}/3").json()
    assert data["maxActApprox"] == pytest.approx(page.max) and data["frac_nonzero"] == pytest.approx(
        page.density
    )
    assert data["pos_str"] == [t.token for t in page.promoted] and data["index"] == "3"
    assert sum(data["freq_hist_data_bar_heights"]) == page.count
    assert data["vector"] == pytest.approx(world.sae.W_dec[3].tolist())
    assert data["explanations"][0]["description"] == "parcels that are late"
    for activation in data["activations"]:
        assert activation["values"][activation["maxValueTokenIndex"]] == activation["maxValue"]
    assert client.get("/api/feature/made/index/3").json() == data
    several = client.get(f"/api/feature/made/{SITE}/3")
    assert several.status_code == 400 and world.source.key in several.json()["error"]
    other = client.get(f"/api/feature/other/{SITE}/3")
    assert other.status_code == 404 and f"'made' at '{SITE}'" in other.json()["error"]
    assert client.get(f"/api/feature/made/{world.source.key}/500").status_code == 404


def test_labels_are_found_in_neuronpedias_shape(client: TestClient) -> None:
    data = client.post("/api/explanation/search", json={"modelId": "made", "query": "parcels"}).json()
    assert data["results"][0]["index"] == "3" and data["results"][0]["typeName"] == "lexical"


def test_a_label_is_proposed_and_reviewed(client: TestClient, world: World) -> None:
    made = client.post(f"{world.base}/latents/95/labels", json={"text": SCRIPT, "by": "Ann"}).json()
    assert (made["text"], made["kind"], made["status"]) == (SCRIPT, "person", "proposed")
    path = f"{world.base}/labels/{made['id']}/review"
    refused = client.post(path, json={"verdict": "rejected", "by": "Ben"})
    assert refused.status_code == 400 and "why" in refused.json()["error"]
    done = client.post(path, json={"verdict": "rejected", "by": "Ben", "why": "not text"}).json()
    assert done["status"] == "rejected" and done["reviews"][0]["why"] == "not text"
    assert client.post(path, json={"verdict": "maybe", "by": "Ben"}).status_code == 400
    missing = client.post(f"{world.base}/labels/none/review", json={"verdict": "accepted", "by": "Ben"})
    assert missing.status_code == 404
    lines = client.get(f"{world.base}/labels.jsonl").text.splitlines()
    assert any(json.loads(line).get("why") == "not text" for line in lines)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("{base}/latents/3/activations", {"text": ""}, 400),
        ("{base}/latents/3/activations", {"text": "x" * 6000}, 400),
        ("{base}/latents/3/activations", {"text": "x " * 2000}, 400),
        ("{base}/latents/3/activations", {"text": "x" * 30_000}, 422),
        ("{base}/latents/96/activations", {"text": "x"}, 404),
        ("{base}/latents/3/activations", {}, 422),
        ("{base}/latents/3/activations", [1], 422),
        ("{base}/steer", {"prompt": "x", "features": []}, 422),
        ("{base}/steer", {"prompt": "x", "features": [{"latent": 99, "strength": 1}]}, 404),
        ("{base}/steer", {"prompt": "", "features": [{"latent": 3, "strength": 1}]}, 400),
        ("{base}/steer", {"prompt": "x", "features": [{"latent": 3, "strength": 1}] * 2}, 400),
        ("{base}/steer", {"prompt": "x", "features": [{"latent": 3, "strength": 1}], "method": "rm"}, 422),
        ("{base}/steer", {"prompt": "x", "features": [{"latent": 3}], "new_tokens": 9999}, 422),
        ("{base}/steer", {"prompt": "x", "features": [{"latent": 3, "strength": 1e400}]}, 422),
        ("{base}/lists/a", {"latent": 999, "keep": True}, 404),
        ("{base}/lists/a.json", {"latent": 3, "keep": True}, 400),
        ("{base}/lists/%2E%2E", {"latent": 3, "keep": True}, 400),
        ("{base}/latents/3/labels", {"text": " ", "by": "Ann"}, 400),
        ("{base}/latents/3/labels", {"text": "a\u202eb", "by": "Ann"}, 400),
        ("/api/steer", {"prompt": "x", "modelId": "no", "features": [
            {"modelId": "no", "layer": "x", "index": 1}]}, 404),
        ("/api/activation/new", {"feature": {"modelId": "made", "source": "index", "index": 5}}, 422),
        ("/api/search-all", {"modelId": "no", "text": "x"}, 404),
    ],
)  # fmt: skip
def test_bad_requests_get_one_sentence(
    client: TestClient, world: World, path: str, body: Any, status: int
) -> None:
    content = json.dumps(body).replace("Infinity", "1e400")
    answer = client.post(
        path.format(base=world.base), content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status, answer.text
    assert isinstance(answer.json()["error"], str) and "\n" not in answer.json()["error"]


def test_bad_json_is_said(client: TestClient, world: World) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post(f"{world.base}/steer", content=b'{"prompt": "x', headers=headers)
    assert answer.status_code == 422 and answer.json()["error"] == "the request's body is no JSON"
    assert client.delete(world.base, headers=headers).status_code == 405


def test_too_many_new_tokens_end_the_stream_with_a_reason(client: TestClient, world: World) -> None:
    (line,) = steered(client, world, new_tokens=4000)
    assert "1 to 32" in line["error"]


def test_one_request_has_the_model_and_few_wait(world: World) -> None:
    bench = Workbench(lambda _: world.lm, lambda _: world.sae, Limits(waiting=0, seconds=5))
    client = TestClient(create_app(world.shelf, bench), base_url="http://127.0.0.1")
    with bench.turn():
        answer = client.post(f"{world.base}/latents/3/activations", json={"text": TEXT})
        assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
    assert client.post(f"{world.base}/latents/3/activations", json={"text": TEXT}).status_code == 200


def test_a_wait_for_the_model_ends(world: World) -> None:
    bench = Workbench(lambda _: world.lm, lambda _: world.sae, Limits(waiting=1, seconds=0.01))
    with bench.turn(), pytest.raises(BusyError), bench.turn():
        pass
    with bench.turn():  # nobody holds it any more
        pass


def test_generating_stops_when_its_time_is_over(world: World) -> None:
    bench = Workbench(lambda _: world.lm, lambda _: world.sae, Limits(seconds=-1.0, new_tokens=32))
    edits = bench.edit(world.source, [Steering(3, 1.0)], "add")
    bench._turn = threading.Lock()  # a lock cannot be asked to wait for less than nothing
    with pytest.raises((TooLongError, ValueError)):
        bench.reply(
            world.source, [{"role": "user", "content": "x"}], edits, new_tokens=9, temperature=0, seed=0
        )
