"""The state of an unfinished run in one file, written atomically; small enough to write often."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.files import write_bytes

FILE = "checkpoint.safetensors"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything a run needs to go on as if it had never stopped."""

    tensors: Mapping[str, Tensor]
    """Weights, optimiser moments and counters by name."""
    facts: Mapping[str, Any]
    """Step, length of the log and the settings of the run, as JSON values."""

    def write(self, folder: Path) -> None:
        """Write it into `folder` in place of the one before."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        write_bytes(folder / FILE, save(tensors, {"facts": json.dumps(self.facts)}))

    def require(self, settings: Mapping[str, Any], folder: Path) -> None:
        """Raise UserError when the run in `folder` was begun with other settings."""
        if self.facts["settings"] != json.loads(json.dumps(settings)):
            raise UserError(
                f"{folder} holds an unfinished run with other settings; run it again with those, choose "
                "another --out or delete it"
            )

    @classmethod
    def read(cls, folder: Path) -> Checkpoint | None:
        """The checkpoint in `folder`, or None; raises IntegrityError when it is damaged."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{path} is damaged; delete {folder} and train again") from error
        return cls(tensors, facts)
