"""Any OpenAI-compatible endpoint: many calls side by side, each answered once and for all.

A reply is kept by the hash of its request before anybody sees it, so a killed run goes on where it was and no
call is paid twice.  Time-outs, 429 and 5xx are tried again after a pause, the one that the server asks for if
it does.  What a run costs is estimated before and counted while it goes.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from unbraid.features.labels.calls import Calls, Reply, hash_of
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress

LONGEST_PAUSE = 60.0
"""Seconds that a server may make us wait."""
CHARACTERS_A_TOKEN = 3.5
"""For estimates before a model's own count is known."""


@dataclass(frozen=True)
class EndpointConfig:
    """Which model answers, and how it is asked."""

    base_url: str = ""
    """Address of the endpoint, such as http://localhost:8000/v1."""
    model_name: str = ""
    """The language model's name there."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; a local server may need none."""
    concurrency: int = 8
    """Calls at the same time."""
    timeout: float = 60.0
    """Seconds to wait for one reply."""
    attempts: int = 6
    """How often a call is tried before the run stops."""
    max_tokens: int = 400
    """Longest reply, in tokens."""
    price_in: float | None = None
    """Price of a million tokens read, for the cost that is shown."""
    price_out: float | None = None
    """Price of a million tokens written."""
    budget: float | None = None
    """Stop before more than this would be spent; needs both prices."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempts", "max_tokens", "timeout"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be more than 0")
        for name in ("price_in", "price_out", "budget"):
            if (value := getattr(self, name)) is not None and not 0 <= value < float("inf"):
                raise UserError(f"{name} is {value}; it must be 0 or more")
        if self.budget is not None and (self.price_in is None or self.price_out is None):
            raise UserError("a budget needs --price-in and --price-out, per million tokens")


@dataclass(frozen=True)
class Request:
    """One question; what all questions of a kind share comes first, so that a provider can reuse it."""

    system: str
    """Instructions, the same for all questions of a kind."""
    user: str
    """What is asked."""
    schema: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """JSON schema of the reply, sent where the endpoint knows what to do with it."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a chat."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]

    @property
    def tokens(self) -> int:
        """About how many tokens it has."""
        return int((len(self.system) + len(self.user)) / CHARACTERS_A_TOKEN) + 8


@dataclass
class Spent:
    """What was asked so far."""

    calls: int = 0
    """Calls that were answered."""
    cached: int = 0
    """Questions that had been answered before."""
    retries: int = 0
    """Attempts that failed and were repeated."""
    tokens_in: int = 0
    """Tokens read in answered calls."""
    tokens_out: int = 0
    """Tokens written."""
    money: float | None = None
    """What that cost; none without prices."""

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Estimate:
    """What a run will take, at most, before it starts."""

    calls: int
    """Calls that have no reply yet."""
    cached: int
    """Questions that have one."""
    tokens_in: int
    """Tokens to be read, by their length in characters."""
    tokens_out: int
    """Tokens to be written, if every reply were as long as it may be."""
    money: float | None
    """What that costs; none without prices."""


class Endpoint:
    """Asks an endpoint.  Raises UserError where the extra `label`, the address or the model is missing."""

    def __init__(
        self, config: EndpointConfig, calls: Calls, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        if not config.base_url or not config.model_name:
            raise UserError("an LLM needs --base-url and --model-name; or use --explainer lexical")
        if not re.match(r"https?://[^/\s]", config.base_url):
            raise UserError(
                f"--base-url is {config.base_url!r}, which is no address such as http://127.0.0.1:8000/v1"
            )
        try:
            import openai
        except ImportError as error:
            raise UserError(
                "an LLM is asked with the package openai; pip install 'unbraid[label]'"
            ) from error
        self._openai: Any = openai
        self._client: Any = openai.OpenAI(
            base_url=config.base_url,
            api_key=os.environ.get(config.key_env) or "none",
            timeout=config.timeout,
            max_retries=0,  # ours are counted
        )
        self.config, self.spent = config, Spent()
        self._calls, self._sleep = calls, sleep
        self._lock = threading.Lock()
        self._reserved = 0.0
        self._structured = True
        if config.price_in is not None and config.price_out is not None:
            self.spent.money = 0.0

    def hash(self, request: Request) -> str:
        """Under which name the reply is kept."""
        shaped = {"temperature": 0, "max_tokens": self.config.max_tokens, "messages": request.messages}
        return hash_of({"base_url": self.config.base_url, "model": self.config.model_name, **shaped})

    def estimate(self, requests: Sequence[Request], times: float = 1.0) -> Estimate:
        """What asking all of these would take, `times` as much again for those that cannot be known yet."""
        new = [r for r in requests if self._calls.get(self.hash(r)) is None]
        tokens_in, tokens_out = sum(r.tokens for r in new), self.config.max_tokens * len(new)
        read, written = int(tokens_in * times), int(tokens_out * times)
        cached = int((len(requests) - len(new)) * times)
        return Estimate(int(len(new) * times), cached, read, written, self.price(read, written))

    def price(self, tokens_in: int, tokens_out: int) -> float | None:
        """What so many tokens cost; none without prices."""
        if self.config.price_in is None or self.config.price_out is None:
            return None
        return (tokens_in * self.config.price_in + tokens_out * self.config.price_out) / 1e6

    def ask(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Reply]:
        """The reply to each request.

        Raises UserError where the endpoint refuses (a wrong key, model or address) or the budget is reached,
        and ConnectionError where it still fails after all attempts; every reply until then is kept.
        """
        found: dict[str, Reply] = {}
        waiting: dict[str, Request] = {}
        for request in requests:
            name = self.hash(request)
            if name in found or name in waiting:
                continue
            if (known := self._calls.get(name)) is not None:
                found[name] = known
                self.spent.cached += 1
            else:
                waiting[name] = request
        stop = threading.Event()

        def answer(name: str) -> None:
            if stop.is_set():
                return
            try:
                found[name] = self._answered(name, waiting[name], stop)
            except BaseException:
                stop.set()  # the others finish what they have asked, and ask no more
                raise
            if progress is not None:
                progress(len(found), len(found) + len(waiting), self.note())

        with ThreadPoolExecutor(self.config.concurrency) as pool:
            for future in [pool.submit(answer, name) for name in waiting]:
                future.result()
        return [found[self.hash(request)] for request in requests]

    def note(self) -> str:
        """What was spent so far, in a few words."""
        spent = self.spent
        money = "" if spent.money is None else f", cost {spent.money:.4f}"
        tokens = spent.tokens_in + spent.tokens_out
        return f"{spent.calls} calls, {spent.cached} cached, {tokens:,} tokens{money}"

    def _answered(self, name: str, request: Request, stop: threading.Event) -> Reply:
        reserved = self._reserve(request)
        try:
            for attempt in range(self.config.attempts):
                try:
                    reply = self._call(request)
                    break
                except _Again as again:
                    if attempt + 1 == self.config.attempts or stop.is_set():
                        raise ConnectionError(
                            f"the endpoint at {self.config.base_url} failed {attempt + 1} times"
                            f" ({again}); every"
                            " reply so far is kept, run the same command again"
                        ) from again
                    with self._lock:
                        self.spent.retries += 1
                    self._sleep(again.pause(attempt))
            else:
                raise AssertionError("attempts is more than 0")
            self._calls.keep(name, self.config.model_name, reply)
        finally:
            with self._lock:
                self._reserved -= reserved
        with self._lock:
            self.spent.calls += 1
            self.spent.tokens_in += reply.tokens_in
            self.spent.tokens_out += reply.tokens_out
            if self.spent.money is not None:
                self.spent.money += self.price(reply.tokens_in, reply.tokens_out) or 0.0
        return reply

    def _reserve(self, request: Request) -> float:
        """Set aside what a call may cost; raises UserError where that would go over the budget."""
        if self.config.budget is None:
            return 0.0
        cost = self.price(request.tokens, self.config.max_tokens) or 0.0
        with self._lock:
            if (self.spent.money or 0.0) + self._reserved + cost > self.config.budget:
                raise UserError(
                    f"the budget of {self.config.budget:g} is reached; every reply so far is kept,"
                    " raise --budget"
                    " and run the same command again"
                )
            self._reserved += cost
        return cost

    def _call(self, request: Request) -> Reply:
        """One attempt.  Raises _Again where another one may help, and UserError where none will."""
        openai = self._openai
        extra: dict[str, Any] = {}
        if self._structured and request.schema:
            schema = {"name": "reply", "strict": True, "schema": dict(request.schema)}
            extra["response_format"] = {"type": "json_schema", "json_schema": schema}
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self.config.model_name,
                messages=request.messages,
                temperature=0,
                max_tokens=self.config.max_tokens,
                **extra,
            )
        except (openai.APITimeoutError, openai.APIConnectionError) as error:
            raise _Again(type(error).__name__) from error
        except openai.APIStatusError as error:
            if error.status_code in (408, 409, 425, 429) or error.status_code >= 500:
                raise _Again(
                    f"status {error.status_code}", error.response.headers.get("retry-after")
                ) from error
            if error.status_code in (400, 422) and extra:
                self._structured = False  # this endpoint knows no schemas; the prompt asks for JSON as well
                return self._call(request)
            raise UserError(
                f"the endpoint at {self.config.base_url} refuses (status {error.status_code}); check"
                " --model-name,"
                f" --base-url and the key in {self.config.key_env}"
            ) from error
        return _reply(str(raw.text if isinstance(raw.text, str) else raw.text()), request)


class _Again(Exception):
    """Another attempt may help."""

    def __init__(self, what: str, after: str | None = None) -> None:
        super().__init__(what)
        self._after = after

    def pause(self, attempt: int) -> float:
        """Seconds to wait: what the server says, or twice as long each time, spread a little."""
        try:
            asked = float(self._after or "")
        except ValueError:
            asked = -1.0
        if 0 <= asked <= LONGEST_PAUSE:
            return asked
        return min(0.5 * 2**attempt, LONGEST_PAUSE) * (0.5 + random.random() / 2)


def _reply(body: str, request: Request) -> Reply:
    """The reply in a response's body; raises _Again where the body is no chat completion."""
    try:
        record = json.loads(body)
        text = record["choices"][0]["message"]["content"]
        usage = record.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise _Again("a response that is no chat completion") from error
    text = text if isinstance(text, str) else ""
    read, written = (n if isinstance(n, int) and n >= 0 else None for n in cast("list[object]", counts))
    # An endpoint that does not count is counted by length, so that a budget still means something.
    return Reply(
        text,
        request.tokens if read is None else read,
        int(len(text) / CHARACTERS_A_TOKEN) + 1 if written is None else written,
    )
