"""The guard: a model under a policy; it checks every hash before it starts and proves every edit afterwards.

Load a policy, verify that model, tokenizer, autoencoder and gate are the ones it names, then generate.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast, overload

from unbraid.control.gate import load_gate
from unbraid.control.policy import Mode, Policy
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import MANIFEST, Manifest, check_files
from unbraid.model.apply import applied
from unbraid.model.edits import Edit, EditCount, Gate
from unbraid.model.generate import Reply, generate
from unbraid.model.load import LanguageModel, Message
from unbraid.model.sites import Site
from unbraid.sae.base import SAE

POLICY_FILE = "policy.yaml"
Conversation = Sequence[Message]


@dataclass(frozen=True)
class Fallback:
    """What a guard did instead, when its edit path failed."""

    kind: Literal["closed", "open"]
    """closed: the policy's refusal was sent; open: the reply is the unguarded one."""
    reason: str
    """The failure, in one line."""


@dataclass(frozen=True)
class GuardedReply:
    """A reply with the proof of what the guard did to it."""

    text: str
    """What the user gets."""
    token_ids: tuple[int, ...]
    """The generated tokens; empty for a refusal."""
    prompt_tokens: int
    """Length of the prompt in tokens; 0 for a refusal."""
    edits: tuple[EditCount, ...]
    """For each edit: tokens considered and fired on. In shadow mode: where it would have."""
    gate_open: bool
    """Whether the edits applied to this request; False when the edit path failed."""
    mode: Mode
    """The policy's mode."""
    policy_id: str
    """Hash of the policy's content."""
    policy_name: str
    """The policy's name."""
    fallback: Fallback | None
    """Set when the edit path failed: the text is then no guarded reply."""
    milliseconds: float
    """Wall time of the call that made it; a batch shares one."""
    over_budget: bool
    """Whether that is more than the policy's latency budget."""

    @property
    def fired(self) -> int:
        """How many times any edit fired (or would have, in shadow mode)."""
        return sum(count.fired for count in self.edits)


@dataclass(frozen=True, eq=False)
class Guard:
    """A model under a policy whose every artifact was verified. Made by `Guard.load`."""

    lm: LanguageModel
    """The model; while a guard generates, nothing else may run it."""
    policy: Policy
    """What is done, and when."""
    gate: Gate | None
    """The verified intent gate."""
    edits: tuple[Edit, ...]
    """The verified edits, as the model room applies them."""
    manifests: Mapping[str, Manifest]
    """The verified manifests by name: sae, gate and policy where there are such."""
    # Edits hang on the model itself, so two requests at once would run under each other's.
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def load(cls, policy_path: Path | str, lm: LanguageModel) -> Guard:
        """Read a policy file (or the folder of a policy artifact) and verify everything that it names.

        Raises IntegrityError, naming what differs, when the model's weights, the tokenizer, the folder of the
        autoencoder or of the gate, or the policy's own folder are not what they should be, to the byte;
        UserError when a file is missing or the policy does not fit the model.
        """
        path = Path(policy_path)
        if path.is_dir():
            path = path / POLICY_FILE
        manifests: dict[str, Manifest] = {}
        if (path.parent / MANIFEST).exists():
            manifests["policy"] = _verified(path.parent)
            if path.name not in manifests["policy"].files:
                raise UserError(f"{path}: there is no such policy file; check --policy.")
        policy = Policy.load(path)
        _same(f"{path}: model.id", policy.model.id, lm.id, f"the weights of {lm.name}")
        _same(
            f"{path}: model.tokenizer_id",
            policy.model.tokenizer_id,
            lm.tokenizer_id,
            f"the tokenizer of {lm.name}",
        )
        sae_folder = path.parent / policy.sae.path
        manifests["sae"] = _artifact(path, "sae", sae_folder, policy.sae.id)
        gate = None
        if policy.gate is not None:
            gate_folder = path.parent / policy.gate.path
            manifests["gate"] = _artifact(path, "gate", gate_folder, policy.gate.id)
            gate, _ = load_gate(gate_folder)
        sae = SAE.from_pretrained(sae_folder)
        if sae.config.site and sae.site != Site.parse(policy.sae.site):
            raise IntegrityError(
                f"{path}: sae.site is {policy.sae.site}, but {sae_folder} is for {sae.config.site}."
            )
        edits = policy.edits_for(sae, gate)
        with applied(lm, edits):  # raises UserError for a site or a size that this model does not have
            pass
        return cls(lm=lm, policy=policy, gate=gate, edits=tuple(edits), manifests=manifests)

    @overload
    def generate(
        self,
        messages: Conversation,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> GuardedReply: ...

    @overload
    def generate(
        self,
        messages: Sequence[Conversation],
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> list[GuardedReply]: ...

    def generate(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> GuardedReply | list[GuardedReply]:
        """Answer one conversation, or each of a batch, under the policy.

        If the edit path fails, the whole call falls back as the policy's `on_failure` says, and every reply
        of it carries a `fallback`. In shadow mode the text is always the unguarded one. UserError (an empty
        prompt, say) is raised, never turned into a fallback.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        prompts = [cast("Conversation", messages)] if single else cast("Sequence[Conversation]", messages)

        def run(edits: Sequence[Edit]) -> list[Reply]:
            return generate(
                self.lm,
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seeds=seeds,
                edits=edits,
                batch_size=batch_size,
                progress=progress,
            )

        begin = time.perf_counter()
        fallback: Fallback | None = None
        replies: list[Reply] | None = None
        with self._turn:
            try:
                replies = run(self._acting())
                for reply in replies:
                    self._prove(reply)
            except UserError:
                raise
            except Exception as error:
                kind = "open" if self.policy.mode == "shadow" else self.policy.on_failure
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                fallback = Fallback(kind, reason)
                replies = run(()) if kind == "open" else None
        milliseconds = 1000 * (time.perf_counter() - begin)
        if replies is None:
            replies = [Reply(self.policy.refusal, (), 0, ()) for _ in prompts]
        guarded = [self._report(reply, fallback, milliseconds) for reply in replies]
        return guarded[0] if single else guarded

    def _acting(self) -> tuple[Edit, ...]:
        if self.policy.mode == "enforce":
            return self.edits
        # Scaling by one leaves every activation where it is, while gate, positions and thresholds are those
        # of the real edit: what is counted is what would have fired on the unguarded text.
        return tuple(replace(edit, operation="scale", value=1.0) for edit in self.edits)

    def _prove(self, reply: Reply) -> None:
        """Refuse a reply that an edit did not act on as it should have: silence is the worst failure."""
        if len(reply.edits) != len(self.edits):
            raise RuntimeError(f"{len(reply.edits)} of {len(self.edits)} edits report what they did")
        # The last token of a reply that was cut off is drawn but never fed back.
        decoded = len(reply.token_ids) - (0 if reply.finished else 1)
        for edit, count in zip(self.edits, reply.edits, strict=True):
            due = {"prompt": reply.prompt_tokens, "reply": decoded, "all": reply.prompt_tokens + decoded}
            if not count.gated and count.considered != due[edit.positions]:
                raise RuntimeError(
                    f"edit {edit.name!r} was in force at {count.considered} of {due[edit.positions]} tokens"
                )

    def _report(self, reply: Reply, fallback: Fallback | None, milliseconds: float) -> GuardedReply:
        budget = self.policy.latency_budget_ms
        return GuardedReply(
            text=reply.text,
            token_ids=reply.token_ids,
            prompt_tokens=reply.prompt_tokens,
            edits=reply.edits,
            gate_open=fallback is None and not any(count.gated for count in reply.edits),
            mode=self.policy.mode,
            policy_id=self.policy.id,
            policy_name=self.policy.name,
            fallback=fallback,
            milliseconds=milliseconds,
            over_budget=budget is not None and milliseconds > budget,
        )


def _artifact(policy: Path, name: str, folder: Path, expected: str) -> Manifest:
    """Verify the folder that `<name>.path` names against `<name>.id`."""
    if not folder.is_dir():
        raise UserError(f"{policy}: {name}.path names {folder}, which does not exist; check the path.")
    manifest = _verified(folder)
    _same(f"{policy}: {name}.id", expected, manifest.id, f"the artifact in {folder}")
    return manifest


def _verified(folder: Path) -> Manifest:
    try:
        return check_files(folder)
    except UserError as error:
        # A manifest that is there and cannot be read was damaged: that is no slip of the user's.
        if (folder / MANIFEST).exists():
            raise IntegrityError(str(error)) from error
        raise


def _same(field_name: str, expected: str, found: str, what: str) -> None:
    if expected != found:
        raise IntegrityError(
            f"{field_name} is {expected[:12]}…, but {what} has {found[:12]}…; the guard won't start."
        )
