"""The guard: it starts only on what it was made for, and says what it did."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import unbraid.control.engine as engine
from unbraid.control.engine import Guard
from unbraid.control.policy import PolicyEdit, PolicyModel
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.model.generate import generate
from unbraid.model.load import load_model

PROMPTS = [
    [{"role": "user", "content": "How much ibuprofen may she take?"}],
    [{"role": "user", "content": "Where is my refund for the order that was delayed?"}],
    [{"role": "user", "content": "Red ball"}],
]
Flip = Callable[[Path, int], None]


def bare(lm: Any, **options: Any) -> list[Any]:
    return generate(lm, PROMPTS, max_new_tokens=12, **options)


def decoded(reply: Any, lm: Any) -> int:
    """Tokens of a reply that were fed back: all but the last where it was cut off at 12."""
    return min(len(reply.token_ids), 11)


def test_gate_open_edits_fire_and_are_counted_at_every_decoded_token(world: Any) -> None:
    guard = Guard.load(world.write(gate=world.gate("open", -1.0)), world.lm)
    plain = bare(world.lm)
    replies = guard.generate(PROMPTS, max_new_tokens=12)
    assert [r.text for r in replies] != [r.text for r in plain]
    for reply in replies:
        (count,) = reply.edits
        assert reply.gate_open and reply.fallback is None and reply.mode == "enforce"
        assert count.considered == count.fired == decoded(reply, world.lm) > 0
        assert reply.fired == count.fired
        assert reply.policy_id == guard.policy.id and reply.policy_name == "test-policy"


def test_what_is_deployed_is_what_was_measured(world: Any) -> None:
    """The guard's replies are those of the bare edit that `SAE.latent_edit` makes."""
    from unbraid.sae.base import SAE

    sae = SAE.from_pretrained(world.root / "sae")
    edit = sae.latent_edit([3, 7], "add", 2.0, thresholds=[-1e9, -1e9])
    measured = bare(world.lm, edits=[edit], seeds=[5, 6, 7])
    guard = Guard.load(world.write(), world.lm)
    assert guard.edits[0].to_json() == edit.to_json()
    replies = guard.generate(PROMPTS, max_new_tokens=12, seeds=[5, 6, 7])
    assert [r.token_ids for r in replies] == [r.token_ids for r in measured]


def test_gate_closed_is_bitwise_the_unguarded_reply(world: Any) -> None:
    guard = Guard.load(world.write(gate=world.gate("closed", 1.0)), world.lm)
    plain = bare(world.lm)
    for reply, expected in zip(guard.generate(PROMPTS, max_new_tokens=12), plain, strict=True):
        assert reply.token_ids == expected.token_ids and reply.text == expected.text
        assert not reply.gate_open and reply.fired == 0 and reply.edits[0].considered == 0
        assert reply.edits[0].gated == 1


def test_shadow_counts_and_leaves_the_text(world: Any) -> None:
    guard = Guard.load(world.write(mode="shadow"), world.lm)
    plain = bare(world.lm)
    for reply, expected in zip(guard.generate(PROMPTS, max_new_tokens=12), plain, strict=True):
        assert reply.token_ids == expected.token_ids and reply.text == expected.text
        assert reply.fired == decoded(reply, world.lm) > 0 and reply.mode == "shadow"


def test_shadow_fires_where_the_real_edit_would(world: Any) -> None:
    """On the first decoded token, before the edit can have changed anything, both count alike."""
    edits = (PolicyEdit(latents=(0, 1, 2), operation="clamp", value=0.5, positions="prompt"),)
    enforce = Guard.load(world.write("enforce", edits=edits), world.lm)
    shadow = Guard.load(world.write("shadow", edits=edits, mode="shadow"), world.lm)
    acted = enforce.generate(PROMPTS, max_new_tokens=1)
    watched = shadow.generate(PROMPTS, max_new_tokens=1)
    assert [r.edits for r in acted] == [r.edits for r in watched]
    assert 0 < sum(r.fired for r in watched) < sum(r.prompt_tokens for r in watched)


def test_one_conversation_gives_one_reply(world: Any) -> None:
    guard = Guard.load(world.write(), world.lm)
    one = guard.generate(PROMPTS[0], max_new_tokens=12)
    assert one.token_ids == guard.generate(PROMPTS, max_new_tokens=12)[0].token_ids
    assert guard.generate([], max_new_tokens=12) == []


def test_a_policy_folder_may_be_named(world: Any) -> None:
    path = world.write()
    assert Guard.load(path.parent, world.lm).policy == Guard.load(path, world.lm).policy
    assert set(Guard.load(path, world.lm).manifests) == {"policy", "sae"}


# -- what must not start


@pytest.mark.parametrize("place", [0, 700, -1])
@pytest.mark.parametrize("name", ["sae_weights.safetensors", "cfg.json"])
def test_one_flipped_byte_of_the_sae(world: Any, flip: Flip, name: str, place: int) -> None:
    path = world.write()
    size = (world.root / "sae" / name).stat().st_size
    flip(world.root / "sae" / name, place % size)
    with pytest.raises(IntegrityError, match=name):
        Guard.load(path, world.lm)


@pytest.mark.parametrize("place", [0, 60, -2])
def test_one_flipped_byte_of_a_manifest(world: Any, flip: Flip, place: int) -> None:
    path = world.write()
    flip(world.root / "sae" / "manifest.json", place)
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        Guard.load(path, world.lm)


@pytest.mark.parametrize("place", [0, 9, 100, -1])
def test_one_flipped_byte_of_the_gate(world: Any, flip: Flip, place: int) -> None:
    path = world.write(gate=world.gate("gate", 0.0))
    flip(world.root / "gate" / "gate.safetensors", place)
    with pytest.raises(IntegrityError, match=r"gate\.safetensors"):
        Guard.load(path, world.lm)


@pytest.mark.parametrize("place", [0, 3, 200, -1])
def test_one_flipped_byte_of_the_policy(world: Any, flip: Flip, place: int) -> None:
    path = world.write()
    flip(path, place)
    with pytest.raises(IntegrityError, match=r"policy\.yaml"):
        Guard.load(path, world.lm)


def test_tampered_latents(world: Any) -> None:
    path = world.write()
    text = path.read_text(encoding="utf-8")
    assert "latents: [3, 7]" in text
    path.write_text(text.replace("latents: [3, 7]", "latents: [3, 8]"), encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"policy\.yaml"):
        Guard.load(path, world.lm)


def test_one_flipped_byte_of_the_weights(world: Any, tiny_llama: Path, flip: Flip) -> None:
    path = world.write()
    shutil.copytree(tiny_llama, world.root / "model")
    flip(world.root / "model" / "model.safetensors", -3)
    with pytest.raises(IntegrityError, match=r"model\.id is .* but the weights of model has"):
        Guard.load(path, load_model(world.root / "model"))


def test_another_chat_template(world: Any, tiny_llama: Path) -> None:
    path = world.write()
    shutil.copytree(tiny_llama, world.root / "model")
    other = load_model(world.root / "model")
    other.tokenizer.chat_template += " "
    other.tokenizer.save_pretrained(world.root / "model")
    with pytest.raises(IntegrityError, match=r"model\.tokenizer_id"):
        Guard.load(path, load_model(world.root / "model"))


def test_another_sae_that_is_whole_in_itself(world: Any) -> None:
    from unbraid.manifest.record import write_manifest

    path = world.write()
    write_manifest(world.root / "sae", kind="sae", command="", seed=4, inputs={}, facts={})
    with pytest.raises(IntegrityError, match=r"sae\.id is .* but the artifact in"):
        Guard.load(path, world.lm)


def test_an_extra_file_in_the_sae(world: Any) -> None:
    path = world.write()
    (world.root / "sae" / "extra").write_text("x", encoding="utf-8")
    with pytest.raises(IntegrityError, match="extra"):
        Guard.load(path, world.lm)


def test_a_policy_for_another_site(world: Any) -> None:
    path = world.write(sae=replace(world.policy.sae, site="layers.0.resid_post"))
    with pytest.raises(IntegrityError, match=r"sae\.site is layers\.0\.resid_post"):
        Guard.load(path, world.lm)


def test_a_policy_for_another_model(world: Any) -> None:
    path = world.write(model=PolicyModel("other", "0" * 64, world.lm.tokenizer_id))
    with pytest.raises(IntegrityError, match=r"model\.id is 000000000000"):
        Guard.load(path, world.lm)


def test_missing_things_are_the_users_mistake(world: Any) -> None:
    with pytest.raises(UserError, match="no such policy file"):
        Guard.load(world.root / "nowhere.yaml", world.lm)
    path = world.write(gate=world.gate("gate", 0.0))
    with pytest.raises(UserError, match="no such policy file"):
        Guard.load(path.parent / "other.yaml", world.lm)
    shutil.rmtree(world.root / "gate")
    with pytest.raises(UserError, match=r"gate\.path names .* does not exist"):
        Guard.load(path, world.lm)
    shutil.rmtree(world.root / "sae")
    with pytest.raises(UserError, match=r"sae\.path names .* does not exist"):
        Guard.load(path, world.lm)


def test_a_latent_out_of_range(world: Any) -> None:
    path = world.write(edits=(PolicyEdit(latents=(999,), operation="ablate"),))
    with pytest.raises(UserError, match=r"edits\[0\]\.latents names latent 999"):
        Guard.load(path, world.lm)


# -- when the edit path fails


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation under edits raises; without edits it works."""

    def fails(lm: Any, prompts: Any, *, edits: Any = (), **options: Any) -> Any:
        if edits:
            raise RuntimeError("the edit's kernel\nbroke")
        return generate(lm, prompts, edits=edits, **options)

    monkeypatch.setattr(engine, "generate", fails)


@pytest.mark.usefixtures("broken")
def test_failing_closed_sends_the_refusal(world: Any) -> None:
    guard = Guard.load(world.write(refusal="Ask a pharmacist."), world.lm)
    for reply in guard.generate(PROMPTS, max_new_tokens=12):
        assert reply.text == "Ask a pharmacist." and reply.token_ids == ()
        assert reply.fallback is not None and reply.fallback.kind == "closed"
        assert reply.fallback.reason == "RuntimeError: the edit's kernel broke"
        assert not reply.gate_open and reply.edits == ()


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(("mode", "on_failure"), [("enforce", "open"), ("shadow", "closed")])
def test_failing_open_sends_the_unguarded_reply(world: Any, mode: str, on_failure: str) -> None:
    guard = Guard.load(world.write(mode=mode, on_failure=on_failure), world.lm)
    plain = bare(world.lm)
    for reply, expected in zip(guard.generate(PROMPTS, max_new_tokens=12), plain, strict=True):
        assert reply.text == expected.text and reply.token_ids == expected.token_ids
        assert reply.fallback is not None and reply.fallback.kind == "open"


def test_an_edit_that_never_reached_the_reply_is_a_failure(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent non-application: the edit path works but reports fewer tokens than were decoded."""

    def forgets(*args: Any, **options: Any) -> Any:
        replies = generate(*args, **options)
        lost = [tuple(replace(c, considered=c.considered - 1) for c in r.edits) for r in replies]
        return [replace(r, edits=c) for r, c in zip(replies, lost, strict=True)]

    monkeypatch.setattr(engine, "generate", forgets)
    reply = Guard.load(world.write(), world.lm).generate(PROMPTS[0], max_new_tokens=12)
    assert reply.fallback is not None and "in force at" in reply.fallback.reason
    assert reply.text == world.policy.refusal


def test_a_users_mistake_is_no_failure(world: Any) -> None:
    guard = Guard.load(world.write(), world.lm)
    with pytest.raises(UserError, match="context"):
        guard.generate(PROMPTS[0], max_new_tokens=100_000)
    with pytest.raises(UserError, match="seeds"):
        guard.generate(PROMPTS, max_new_tokens=2, seeds=[1])


def test_latency_budget(world: Any) -> None:
    slow = Guard.load(world.write("slow", latency_budget_ms=1e-6), world.lm)
    fast = Guard.load(world.write("fast", latency_budget_ms=1e9), world.lm)
    assert slow.generate(PROMPTS[0], max_new_tokens=2).over_budget
    reply = fast.generate(PROMPTS[0], max_new_tokens=2)
    assert not reply.over_budget and reply.milliseconds > 0


def test_the_model_is_left_as_it_was(world: Any) -> None:
    plain = bare(world.lm)
    guard = Guard.load(world.write(), world.lm)
    guard.generate(PROMPTS, max_new_tokens=3)
    assert [r.token_ids for r in bare(world.lm)] == [r.token_ids for r in plain]
