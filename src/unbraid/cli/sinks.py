"""Where training may log besides its own log.jsonl: trackio, wandb or tensorboard, each only if installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal

from unbraid.manifest.errors import UserError
from unbraid.training.trainer import OnLog

Tool = Literal["trackio", "wandb", "tensorboard"]
PROJECT = "unbraid"
RUNS = Path("runs")
"""Where tensorboard looks for logs by itself."""
MODULES: dict[Tool, str] = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}
Log = Callable[[Mapping[str, Any]], None]


@contextmanager
def logging_to(tools: Sequence[Tool]) -> Generator[OnLog | None]:
    """Yield what hands every log line to each of the tools, a run of theirs for each autoencoder; None
    without tools. Raises UserError for one that is not installed, before anything is trained.
    """
    modules: dict[Tool, Any] = {tool: _module(tool) for tool in tools}
    if not modules:
        yield None
        return
    # What they say about themselves must not mix with our results.
    with redirect_stdout(sys.stderr), ExitStack() as closing:
        runs: dict[str, list[Log]] = {}

        def on_log(name: str, row: Mapping[str, Any]) -> None:
            if name not in runs:
                runs[name] = [_open(tool, module, name, closing) for tool, module in modules.items()]
            for log in runs[name]:
                log(row)

        yield on_log


def _module(tool: Tool) -> Any:
    try:
        return importlib.import_module(MODULES[tool])
    except ImportError as error:
        raise UserError(
            f"--log-to {tool} needs a package that is not installed ({error}); pip install {tool}"
        ) from error


def _open(tool: Tool, module: Any, name: str, closing: ExitStack) -> Log:
    if tool == "tensorboard":
        writer = module.SummaryWriter(log_dir=str(RUNS / name))
        closing.callback(writer.close)

        def write(row: Mapping[str, Any]) -> None:
            for key, value in _numbers(row).items():
                writer.add_scalar(key, value, row["step"])

        return write
    # Autoencoders that train together are runs side by side, which wandb makes only when asked to.
    options = {"reinit": "create_new"} if tool == "wandb" else {}
    run = module.init(project=PROJECT, name=name, **options)
    closing.callback(run.finish)
    return lambda row: run.log(_numbers(row), step=row["step"])


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}
