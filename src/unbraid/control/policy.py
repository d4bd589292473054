"""Policies: the readable YAML file that says which edits guard a model, and when.

A policy names everything it relies on by content: the model's weights, its tokenizer, the sparse
autoencoder, the intent gate and the findings that justify it. It holds no tensors; `Policy.edits` turns it
into the very same `Edit` objects that the experiments measured.

The dataclasses below are the file's schema, key for key. pydantic validates them at the edge only.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building, write_text
from unbraid.manifest.identity import canonical_json, sha256_bytes
from unbraid.manifest.record import Manifest, write_manifest
from unbraid.model.edits import Edit, Gate
from unbraid.model.sites import Site
from unbraid.sae.base import SAE

LatentOperation = Literal["clamp", "scale", "add", "ablate"]
EditPositions = Literal["reply", "prompt", "all"]
Mode = Literal["enforce", "shadow"]
OnFailure = Literal["closed", "open"]

Name = Annotated[str, Field(min_length=1)]
Latent = Annotated[int, Field(ge=0)]

REFUSAL = "I can't answer this right now. Please ask a qualified person, or try again later."
"""What a reader sees when the guard fails closed and the policy says nothing else."""

_EDGE = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

_COMMENTS: Mapping[str, str] = {
    "policy": "What this policy is called, and which revision it is.",
    "model": "The model that it may guard: other weights or another tokenizer are refused.",
    "sae": "The sparse autoencoder that defines the latents; path is relative to this file.",
    "edits": "What is done, and to which latents: clamp (set to value), scale (times value), add, ablate.\n"
    "scale removes c times a latent's own contribution when value is 1 - c.",
    "gate": "Which requests the edits apply to (null: all of them); path is relative to this file.",
    "mode": "enforce: the edits act. shadow: they are only counted, the text stays as it was.",
    "on_failure": "If the edit code fails: closed answers with the refusal, open without the guard.",
    "refusal": "The text that is sent when failing closed.",
    "findings": "Ids of the findings that justify this policy.",
    "latency_budget_ms": "Replies that take longer are flagged (null: no budget).",
}


@dataclass(frozen=True)
class Title:
    """What a policy is called."""

    __pydantic_config__ = _EDGE

    name: Name
    """Short name, shown beside every reply."""
    version: int = 1
    """Revision, counted up by the author."""


@dataclass(frozen=True)
class PolicyModel:
    """The one model that a policy may guard."""

    __pydantic_config__ = _EDGE

    name: Name
    """Name for the reader; never compared."""
    id: Name
    """Hash of the weights (`LanguageModel.id`)."""
    tokenizer_id: Name
    """Hash of the tokenizer with its chat template (`LanguageModel.tokenizer_id`)."""


@dataclass(frozen=True)
class PolicySAE:
    """The sparse autoencoder whose latents are edited."""

    __pydantic_config__ = _EDGE

    path: Name
    """Its folder, relative to the policy file."""
    id: Name
    """Its manifest id."""
    site: Name
    """Where it reads and where the edits write, such as `layers.2.resid_post`."""


@dataclass(frozen=True)
class PolicyEdit:
    """One operation on one latent, or on a few together."""

    __pydantic_config__ = _EDGE

    latents: tuple[Latent, ...]
    """Indices of the latents; they act together, all deltas computed from the same activation."""
    operation: LatentOperation
    """clamp to a value, scale by a factor, add a multiple of the decoder row, or ablate."""
    value: float | tuple[float, ...] | None = None
    """Number for the operation, or one per latent; none for ablate."""
    thresholds: tuple[float, ...] | None = None
    """Pre-activation above which each latent counts as firing; without it the SAE's own."""
    positions: EditPositions = "reply"
    """reply: generated tokens as they are fed back; prompt: the prefill; all: both."""


@dataclass(frozen=True)
class PolicyGate:
    """The intent gate that decides once per request."""

    __pydantic_config__ = _EDGE

    path: Name
    """Its folder, relative to the policy file."""
    id: Name
    """Its manifest id."""


@dataclass(frozen=True)
class Policy:
    """A guard in words: which edits, on which model, for which requests, and what if something fails."""

    __pydantic_config__ = _EDGE

    policy: Title
    """Name and version."""
    model: PolicyModel
    """The model that it may guard."""
    sae: PolicySAE
    """The sparse autoencoder that its latents belong to."""
    edits: tuple[PolicyEdit, ...]
    """What is done to which latents."""
    gate: PolicyGate | None = None
    """The intent gate; without one the edits apply to every request."""
    mode: Mode = "enforce"
    """enforce acts; shadow only counts."""
    on_failure: OnFailure = "closed"
    """Whether a failing edit path ends in the refusal (closed) or in the unguarded reply (open)."""
    refusal: Name = REFUSAL
    """The text that is sent when failing closed."""
    findings: tuple[str, ...] = ()
    """Ids of the findings that justify it."""
    latency_budget_ms: Annotated[float, Field(gt=0)] | None = None
    """Wall time of a reply, in milliseconds, above which it is flagged."""

    @property
    def name(self) -> str:
        """The policy's name."""
        return self.policy.name

    @property
    def id(self) -> str:
        """SHA-256 of the policy's content; comments and layout of the file do not count."""
        return sha256_bytes(canonical_json(self.as_dict()))

    def as_dict(self) -> dict[str, Any]:
        """The file's content as plain dicts, lists, strings and numbers."""
        return cast("dict[str, Any]", _plain(self))

    @classmethod
    def from_dict(cls, data: object, *, source: str = "policy") -> Policy:
        """Validate plain data; `source` names the file in messages.

        Raises UserError with one sentence that names the first field that is wrong.
        """
        if not isinstance(data, Mapping):
            raise UserError(f"{source}: a policy is a mapping with keys such as policy, model and edits.")
        try:
            # Through JSON, because strict mode takes lists for tuples only from there.
            policy = _ADAPTER.validate_json(json.dumps(_plain(cast("object", data)), default=str))
        except ValidationError as error:
            raise UserError(f"{source}: {_sentence(error)}") from None
        policy.check(source=source)
        return policy

    @classmethod
    def load(cls, path: Path | str) -> Policy:
        """Read a policy file; UserError if it is missing, is not YAML or breaks the schema."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such policy file; check --policy.") from None
        except IsADirectoryError:
            raise UserError(f"{path} is a folder; name the policy file inside it.") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: a policy must be UTF-8 text.") from None
        try:
            data: object = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
        return cls.from_dict(data, source=str(path))

    def save(self, path: Path | str) -> None:
        """Write the policy with comments for its readers, atomically."""
        self.check()
        write_text(Path(path), self.to_yaml())

    def to_yaml(self) -> str:
        """The policy as YAML text: a title, then each key under one line that explains it."""
        parts = [
            f"# Policy {json.dumps(self.name, ensure_ascii=True)}, version {self.policy.version}.\n"
            "# A guard refuses to start when anything named here differs from what it finds.\n"
        ]
        for key, value in self.as_dict().items():
            comment = "".join(f"# {line}\n" for line in _COMMENTS[key].split("\n"))
            body = yaml.dump({key: value}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
            parts.append(comment + body)
        return "\n".join(parts)

    def check(self, *, source: str = "policy") -> None:
        """Refuse what the types alone cannot: UserError naming the field."""
        if not self.edits:
            raise UserError(f"{source}: edits is empty; name at least one edit.")
        _ = parse_site(self.sae.site, source=source)
        for i, edit in enumerate(self.edits):
            _check_edit(edit, where=f"{source}: edits[{i}]")

    def edits_for(self, sae: SAE, gate: Gate | None = None) -> list[Edit]:
        """The edits as the model room applies them, made by `SAE.latent_edit`.

        `gate` must be given exactly when the policy names one. Raises UserError when `sae` lacks a latent.
        """
        if (gate is None) != (self.gate is None):
            raise ValueError("give a gate exactly when the policy names one")
        d_sae = sae.config.d_sae
        site = Site.parse(self.sae.site)
        edits: list[Edit] = []
        for i, edit in enumerate(self.edits):
            if max(edit.latents) >= d_sae:
                raise UserError(
                    f"{self.name}: edits[{i}].latents names latent {max(edit.latents)}, "
                    f"but the SAE has only {d_sae} (0 to {d_sae - 1})."
                )
            edits.append(
                sae.latent_edit(
                    edit.latents,
                    edit.operation,
                    0.0 if edit.value is None else edit.value,
                    site=site,
                    positions=edit.positions,
                    gate=gate,
                    thresholds=edit.thresholds,
                )
            )
        return edits


_ADAPTER: TypeAdapter[Policy] = TypeAdapter(Policy)


def parse_site(name: str, *, source: str = "policy") -> Site:
    """The site that the policy's `sae.site` names; UserError in the policy's own words otherwise."""
    try:
        return Site.parse(name)
    except UserError as error:
        raise UserError(f"{source}: sae.site: {error}") from None


def write_policy(policy: Policy, folder: Path, *, command: str = "", seed: int = 0) -> Manifest:
    """Write `policy` as an artifact: `policy.yaml` and a manifest beside it, which a guard then verifies.

    Paths in the policy are relative to `folder/policy.yaml`. Raises UserError when `folder` exists.
    """
    inputs = {
        "model": policy.model.id,
        "tokenizer": policy.model.tokenizer_id,
        "sae": policy.sae.id,
        **({"gate": policy.gate.id} if policy.gate else {}),
        **{f"finding_{i}": finding for i, finding in enumerate(policy.findings)},
    }
    facts = {"policy_id": policy.id, "name": policy.name, "version": policy.policy.version}
    paths = {"sae": folder / policy.sae.path, **({"gate": folder / policy.gate.path} if policy.gate else {})}
    with building(folder) as partial:
        policy.save(partial / "policy.yaml")
        return write_manifest(
            partial, kind="policy", command=command, seed=seed, inputs=inputs, facts=facts, paths=paths
        )


def _check_edit(edit: PolicyEdit, *, where: str) -> None:
    n = len(edit.latents)
    if n == 0:
        raise UserError(f"{where}.latents is empty; name at least one latent.")
    if len(set(edit.latents)) != n:
        raise UserError(f"{where}.latents names a latent twice; name each one once.")
    if edit.operation == "ablate" and edit.value is not None:
        raise UserError(f"{where}.value has no meaning for ablate; leave it out.")
    if edit.operation != "ablate" and edit.value is None:
        raise UserError(f"{where}.value is missing; {edit.operation} needs a number.")
    if isinstance(edit.value, tuple) and len(edit.value) != n:
        raise UserError(f"{where}.value has {len(edit.value)} numbers for {n} latents; give one or {n}.")
    if edit.thresholds is not None and len(edit.thresholds) != n:
        raise UserError(f"{where}.thresholds has {len(edit.thresholds)} numbers for {n} latents; give {n}.")


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(item) for key, item in asdict(value).items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in cast("Sequence[object]", value)]
    return value


def _sentence(error: ValidationError) -> str:
    """The first validation error as one sentence; branches of a union share a field, so one is enough."""
    errors = error.errors(include_url=False)
    # An unknown key is often a misspelt one, and then the reason why another is missing.
    first = next((e for e in errors if e["type"] == "unexpected_keyword_argument"), errors[0])
    unknown = first["type"] == "unexpected_keyword_argument"
    place = list(first["loc"])
    if not unknown:  # for a number or a list, pydantic adds the branch's name: float, or tuple[float, ...]
        place = [p for p in place if p != "float" and not str(p).startswith("tuple[")]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if unknown:
        allowed = _keys_at([part for part in place[:-1] if isinstance(part, str)])
        near = difflib.get_close_matches(str(place[-1]), allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(allowed)}."
        return f"{field} is not a known key; {hint}"
    if first["type"] == "missing":
        return f"{field} is missing."
    return f"{field}: {first['msg'][:1].lower()}{first['msg'][1:]}."


def _keys_at(place: Sequence[str]) -> list[str]:
    kinds: Mapping[str, type[Any]] = {
        "policy": Title, "model": PolicyModel, "sae": PolicySAE, "edits": PolicyEdit, "gate": PolicyGate,
    }  # fmt: skip
    kind = kinds.get(place[0], Policy) if place else Policy
    return [field.name for field in fields(kind)]


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys (the last would win in silence) and aliases (they can explode)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # pyright: ignore[reportUnknownMemberType]
            event = self.peek_event()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            raise ComposerError(
                None, None, "aliases (*name) are not used in policies", cast("Any", event).start_mark
            )
        return cast("Any", super().compose_node(parent, index))

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = getattr(key_node, "value", None)
            if isinstance(key, str) and key in seen:
                raise ConstructorError(None, None, f"the key {key!r} appears twice", key_node.start_mark)
            seen.add(str(key))
        return cast("dict[Any, Any]", super().construct_mapping(node, deep))


class _Dumper(yaml.SafeDumper):
    """Block style for mappings, one line for lists of plain values."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        plain = all(not isinstance(item, dict | list) for item in sequence)
        return cast("Any", super().represent_sequence(tag, sequence, flow_style=plain))

    def represent_scalar(self, tag: str, value: Any, style: str | None = None) -> Any:
        # In single quotes PyYAML writes the line end U+0085 as it is and reads it back as a space.
        style = '"' if isinstance(value, str) and "\x85" in value else style
        return cast("Any", super().represent_scalar(tag, value, style=style))
