"""Every page and its JSON twin, over hostile text."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from safetensors.numpy import load as load_safetensors

from unbraid.ui.app import create_app

from .conftest import LONG, SCRIPT, World


@pytest.fixture(scope="module")
def client(world: World) -> TestClient:
    return TestClient(create_app(world.library, world.bench), base_url="http://127.0.0.1")


def paths(world: World) -> list[str]:
    base = f"/i/{world.source.key}"
    world.source.labels.keep("mine / <b>", 3)
    return [
        "/", base, f"{base}?sort=-density&least=0.001&page=1", f"{base}?token=refund", f"{base}?status=proposed",
        *(f"{base}/latents/{j}" for j in (0, 3, 5, 6, 7, 8, 95)),
        f"{base}/search", f"{base}/search?q=delayed", f"{base}/search?q=density>0,count<5&by=statistics",
        f"{base}/search?q=the+package&by=activation", f"{base}/prompt", f"{base}/prompt?text=the+package",
        f"{base}/contrast", f"{base}/contrast?a=the+package&b=red+ball", f"{base}/lists",
        f"{base}/lists/mine%20%2F%20%3Cb%3E", f"{base}/review", f"{base}/review?by=Ann&at=1",
    ]  # fmt: skip


def test_every_page_is_html_with_a_json_twin(client: TestClient, world: World) -> None:
    for path in paths(world):
        page = client.get(path)
        assert page.status_code == 200, (path, page.text[:500])
