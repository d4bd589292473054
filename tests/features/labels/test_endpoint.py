"""An endpoint that times out, fails, babbles or dies: calls are repeated, counted, and none is paid twice."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unbraid.features.labels.calls import Calls
from unbraid.features.labels.endpoint import Endpoint, EndpointConfig, Request
from unbraid.features.labels.judges import Shown
from unbraid.features.labels.llm import LLM
from unbraid.manifest.errors import IntegrityError, UserError

from .made import evidence, window

pytest.importorskip("openai", reason="the extra label is not installed")

Serving = Callable[..., AbstractContextManager[Any]]
REQUESTS = [Request("Say a number.", f"question {n}") for n in range(12)]


def _echo(body: dict[str, Any]) -> str:
    return "reply to " + str(body["messages"][-1]["content"])


def _endpoint(server: Any, path: Path, pauses: list[float] | None = None, **options: Any) -> Endpoint:
    options = {"timeout": 600.0, "concurrency": 3, **options}
    config = EndpointConfig(base_url=server.url, model_name="small", **options)
    return Endpoint(config, Calls(path / "calls.sqlite"), sleep=(pauses if pauses is not None else []).append)


def test_every_kind_of_trouble_is_waited_out_and_counted(serving: Serving, tmp_path: Path) -> None:
    trouble = ["timeout", "429", "500", "html", "half", "cut", "ok", "429"]
    pauses: list[float] = []
    with serving(_echo, trouble) as server:
        endpoint = _endpoint(server, tmp_path, pauses, timeout=5.0)
        replies = endpoint.ask(REQUESTS)
        assert [reply.text for reply in replies] == [f"reply to {r.user}" for r in REQUESTS]
        assert endpoint.spent.calls == 12 and endpoint.spent.retries == 7
        assert endpoint.spent.tokens_in == 1200 and endpoint.spent.tokens_out == 120
        assert sorted(server.answered)[:12] == sorted(r.user for r in REQUESTS)
        # The server asked for no pause three times, and every other pause is our own.
        assert pauses.count(0.0) == 3 and all(pause <= 60 for pause in pauses)
        # What was answered is not asked again, by nobody.
        again = _endpoint(server, tmp_path)
        assert again.ask(REQUESTS) == replies and again.spent.calls == 0 and again.spent.cached == 12
    assert again.ask(REQUESTS) == replies  # the server is gone


def test_what_was_answered_before_a_failure_is_kept(serving: Serving, tmp_path: Path) -> None:
    with serving(_echo, ["ok"] * 4 + ["500"] * 100) as server:
        endpoint = _endpoint(server, tmp_path, attempts=2, concurrency=1)
        with pytest.raises(
            ConnectionError, match=r"failed 2 times \(status 500\); every reply so far is kept"
        ):
            endpoint.ask(REQUESTS)
        assert len(server.answered) == 4 == len(Calls(tmp_path / "calls.sqlite"))
    with serving(_echo) as server:
        # Another port is another endpoint; the same one is asked for the rest alone.
        calls = Calls(tmp_path / "calls.sqlite")
        config = EndpointConfig(base_url=endpoint.config.base_url, model_name="small")
        moved = Endpoint(config, calls)
        assert sum(calls.get(moved.hash(r)) is None for r in REQUESTS) == 8


@pytest.mark.parametrize("status", ["401", "400"])
def test_a_refusal_stops_at_once_and_says_what_to_check(
    serving: Serving, tmp_path: Path, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with serving(_echo, [status] * 9) as server:
        endpoint = _endpoint(server, tmp_path, key_env="MY_KEY", concurrency=1)
        with pytest.raises(UserError, match=f"status {status}.*the key in MY_KEY") as caught:
            endpoint.ask(REQUESTS)
        assert len(server.asked) == 1 and "sk-secret" not in str(caught.value)
        assert server.headers[0]["authorization"] == "Bearer sk-secret"
    assert b"sk-secret" not in (tmp_path / "calls.sqlite").read_bytes()


def test_an_endpoint_that_knows_no_schemas_is_asked_without(serving: Serving, tmp_path: Path) -> None:
    with serving(_echo, ["400"]) as server:
        endpoint = _endpoint(server, tmp_path, concurrency=1)
        endpoint.ask([Request("s", "u", {"type": "object"}), Request("s", "v", {"type": "object"})])
        assert ["response_format" in body for body in server.asked] == [True, False, False]


def test_the_cost_is_known_before_and_a_budget_holds(serving: Serving, tmp_path: Path) -> None:
    with serving(_echo) as server:
        options = {"price_in": 1.0, "price_out": 2.0, "max_tokens": 50, "concurrency": 1}
        endpoint = _endpoint(server, tmp_path, **options)
        ahead = endpoint.estimate(REQUESTS)
        assert ahead.calls == 12 and ahead.tokens_out == 600 and ahead.money is not None
        endpoint.ask(REQUESTS[:5])
        assert endpoint.spent.money == pytest.approx(5 * (100 * 1.0 + 10 * 2.0) / 1e6)
        assert endpoint.estimate(REQUESTS).cached == 5
        frugal = _endpoint(server, tmp_path, budget=0.0004, **options)
        with pytest.raises(UserError, match=r"the budget of 0\.0004 is reached"):
            frugal.ask(REQUESTS)
        assert frugal.spent.money is not None and 0 < frugal.spent.money <= 0.0004
        assert len(Calls(tmp_path / "calls.sqlite")) == 5 + frugal.spent.calls
    with pytest.raises(UserError, match="a budget needs --price-in and --price-out"):
        EndpointConfig(base_url="x", model_name="y", budget=1.0)
    with pytest.raises(UserError, match="--base-url"):
        Endpoint(EndpointConfig(), Calls(tmp_path / "c.sqlite"))
    with pytest.raises(UserError, match="'localhost:8000/v1', which is no address"):
        Endpoint(EndpointConfig("localhost:8000/v1", "m"), Calls(tmp_path / "c.sqlite"))


def test_as_many_calls_as_were_allowed_wait_side_by_side(serving: Serving, tmp_path: Path) -> None:
    all_there = threading.Barrier(3, timeout=300)  # breaks where one call waits for another to end

    def together(body: dict[str, Any]) -> str:
        all_there.wait()
        return _echo(body)

    with serving(together) as server:
        replies = _endpoint(server, tmp_path, timeout=600.0).ask(REQUESTS)
        assert [reply.text for reply in replies] == [f"reply to {r.user}" for r in REQUESTS]
        assert not all_there.broken and len(server.asked) == 12


def test_what_is_no_label_becomes_none(serving: Serving, tmp_path: Path) -> None:
    """Nor does the token that fires most, without a word."""
    one = evidence([window("we want a refund", {"refund": 1.0})], [window("the storm came", {}, 1)])
    for said in ("unclear", '{"label": ""}', '{"label": null}', '{"label": "%s"}' % ("x" * 201)):
        with serving(lambda _, said=said: said) as server:
            llm = LLM(_endpoint(server, tmp_path))
            (found,) = llm.explain([one], [["refund"]])
            assert found.text == "" and "no label that could be read, twice" in found.why_not
            assert (llm.unread.once, llm.unread.twice) == (1, 1)


def test_what_all_questions_share_comes_first(serving: Serving, tmp_path: Path) -> None:
    texts = [Shown((f"text {n}",)) for n in range(12)]
    with serving(lambda _: '{"answers": [1, 1, 1, 1, 1]}') as server:
        LLM(_endpoint(server, tmp_path)).holds([("a label", texts[:5]), ("another", texts[5:10])])
        first, second = ([m["content"] for m in body["messages"]] for body in server.asked)
        assert first[0] == second[0] and first[1] != second[1]


def test_the_last_short_batch_is_answered(serving: Serving, tmp_path: Path) -> None:
    def judge(body: dict[str, Any]) -> str:
        texts = json.loads(body["messages"][-1]["content"])["texts"]
        return json.dumps({"answers": [int("refund" in text) for text in texts]})

    texts = [Shown(("a refund" if n % 2 else "nothing",)) for n in range(12)]
    with serving(judge) as server:
        (answers,) = LLM(_endpoint(server, tmp_path)).holds([("refunds", texts)])
        assert answers == [bool(n % 2) for n in range(12)] and len(server.asked) == 3


@pytest.mark.parametrize(
    "babble",
    [
        "",
        "I think so.",
        '{"answers": [1, 0',
        '{"answers": [1, 0]}',
        '{"answers": [1, 0, 1, 1, 0, 1]}',
        '{"answers": ["yes", "no", "no", "no", "no"]}',
        '{"answers": [2, 0, 0, 0, 0]}',
        '{"answers": null}',
        "答えは [1, 0, 1, 0, 1] です",
        "[1, 0, 1, 0, 1]",
        "{" * 100_000,
        '{"answers": [1e999, 0, 0, 0, 0]}',
    ],
)
def test_a_reply_that_says_nothing_readable_is_asked_again_and_then_counted(
    serving: Serving, tmp_path: Path, babble: str
) -> None:
    texts = [Shown((f"text {n}",)) for n in range(5)]
    with serving(lambda _: babble) as server:
        llm = LLM(_endpoint(server, tmp_path))
        assert llm.holds([("a label", texts)]) == [[None] * 5]
        assert len(server.asked) == 2 and (llm.unread.once, llm.unread.twice) == (1, 1)
        assert len(Calls(tmp_path / "calls.sqlite")) == 2  # paid for, so kept


@pytest.mark.parametrize(
    "wrapped",
    [
        'Sure!\n```json\n{"answers": [1, 0, 1, 0, 0]}\n```',
        '<think>{"maybe": 1}</think> {"answers": [true, false, true, false, false]}',
        'First {"answers": [0, 0, 0, 0, 0]}, no: {"answers": [1, 0, 1, 0, 0], "why": "…"} 結果',
    ],
)
def test_wrapping_is_tolerated(serving: Serving, tmp_path: Path, wrapped: str) -> None:
    with serving(lambda _: wrapped) as server:
        llm = LLM(_endpoint(server, tmp_path))
        texts = [Shown((f"text {n}",)) for n in range(5)]
        assert llm.holds([("a label", texts)]) == [[True, False, True, False, False]]
        assert llm.unread.once == 0


def test_numbers_at_tokens_and_intruders_are_read_strictly(serving: Serving, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> str:
        given = json.loads(body["messages"][-1]["content"].split("\nYour last")[0])
        if "tokens" in given:
            return '{"activations": [0, 3.5, 10]}'
        return '{"odd": 7}' if len(given["texts"]) == 2 else '{"odd": 2}'

    with serving(reply) as server:
        llm = LLM(_endpoint(server, tmp_path))
        three, four = Shown(("a", "b", "c")), Shown(("a", "b", "c", "d"))
        ((good, bad),) = llm.simulate([("x", [three, four])])
        assert good is not None and np.array_equal(good, np.array([0, 3.5, 10], np.float32)) and bad is None
        assert llm.odd([[three] * 3, [three, four]]) == [2, None]


def test_a_file_that_holds_no_replies_is_named(tmp_path: Path) -> None:
    (tmp_path / "calls.sqlite").write_text("no database " * 100)
    with pytest.raises(IntegrityError, match=r"calls\.sqlite is no file of replies"):
        Calls(tmp_path / "calls.sqlite")


_ASKING = """
import sys
from pathlib import Path
from unbraid.features.labels.calls import Calls
from unbraid.features.labels.endpoint import Endpoint, EndpointConfig, Request
config = EndpointConfig(base_url=sys.argv[1], model_name="small", concurrency=1)
endpoint = Endpoint(config, Calls(Path(sys.argv[2])))
endpoint.ask([Request("Say a number.", f"question {n}") for n in range(40)])
print(endpoint.spent.calls, endpoint.spent.cached)
"""


def test_a_killed_run_loses_no_reply_that_it_used(serving: Serving, tmp_path: Path) -> None:
    answers, reached, killed = itertools.count(1), threading.Event(), threading.Event()

    def stopping(body: dict[str, Any]) -> str:
        if next(answers) == 13:  # the process waits for this one when it is killed
            reached.set()
            killed.wait()
        return _echo(body)

    with serving(stopping) as server:
        words = [sys.executable, "-c", _ASKING, server.url, str(tmp_path / "calls.sqlite")]
        process = subprocess.Popen(words, env=dict(os.environ), stdout=subprocess.PIPE)
        try:
            assert reached.wait(300)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        finally:
            killed.set()
        # One call at a time: only the one that was on its way when the process died is missing.
        kept = len(Calls(tmp_path / "calls.sqlite"))
        assert kept == 12
        done = subprocess.run(words, env=dict(os.environ), capture_output=True, text=True, check=True)
        calls, cached = map(int, done.stdout.split())
        assert (calls, cached) == (40 - kept, kept)
        assert len(server.answered) <= 41 and set(server.answered) == {f"question {n}" for n in range(40)}
