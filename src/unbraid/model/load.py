"""Load a Hugging Face transformer with its tokenizer, and say which exact weights they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.model.families import discover
from unbraid.model.fused import fuse
from unbraid.model.layout import Layout

Message = Mapping[str, str]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 1 << 22


@dataclass(eq=False, repr=False)
class LanguageModel:
    """A model in evaluation mode, its tokenizer, and the identity of both."""

    model: Any
    """The Hugging Face PreTrainedModel, its parameters frozen."""
    tokenizer: Any
    """The Hugging Face tokenizer; None for a model that reads images."""
    name: str
    """What people call it: the folder's name or the Hub's."""
    id: str
    """SHA-256 over the weights, see `weights_id`."""
    tokenizer_id: str
    """SHA-256 over the tokenizer, see `tokenizer_id`."""
    layout: Layout
    """Where the layers and the other parts are."""

    def __repr__(self) -> str:
        return f"LanguageModel({self.name}, {self.n_layers} layers of {self.d_in}, id {self.id[:12]})"

    @property
    def config(self) -> Any:
        """The text part of the model's configuration."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def d_in(self) -> int:
        """Size of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layout.layers)

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and so where token ids have to be."""
        weight = getattr(self.model.get_input_embeddings(), "weight", None)
        return cast(torch.device, self.model.device if weight is None else weight.device)

    @property
    def generates(self) -> bool:
        """Whether the model says one token after the other: an encoder does not."""
        return self.layout.encoder is None and bool(self.model.can_generate())

    @property
    def context(self) -> int | None:
        """The longest sequence the model was built for, in tokens; None where no configuration names it."""
        return cast("int | None", getattr(self.config, "max_position_embeddings", None))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply, as the generation settings and the tokenizer name them."""
        settings = getattr(self.model, "generation_config", None)
        named = getattr(settings, "eos_token_id", None)
        ids: set[int] = {named} if isinstance(named, int) else set(cast("list[int]", named or []))
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            ids.add(int(self.tokenizer.eos_token_id))
        return tuple(sorted(ids))

    @property
    def pad_id(self) -> int:
        """The token that fills short rows; never attended to."""
        for token in (self.tokenizer.pad_token_id, *self.eos_ids):
            if token is not None:
                return int(token)
        return 0

    @property
    def unembedding(self) -> Tensor:
        """W_U, shape (d, vocabulary). Raises UserError where the model has none."""
        weight = getattr(self.layout.unembed, "weight", None)
        if not isinstance(weight, Tensor):
            raise UserError(f"model {self.name} has no output embedding, so nothing can be read as tokens")
        return weight.detach().T

    @property
    def final_norm_weight(self) -> Tensor:
        """The scale of the final norm, shape (d,); ones where it has none."""
        weight = getattr(self.layout.final_norm, "weight", None)
        if not isinstance(weight, Tensor):
            return torch.ones(self.d_in, device=self.device)
        # Gemma stores the scale minus one.
        return weight.detach() + 1 if str(self.config.model_type).startswith("gemma") else weight.detach()

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the model's reply begins.

        With a chat template: rendered by it, generation prompt included. Without one: the messages' texts
        joined. Raises UserError when nothing is left to prompt with.
        """
        if getattr(self.tokenizer, "chat_template", None):
            encoded = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, tokenize=True, return_dict=True
            )
            ids = [int(i) for i in encoded["input_ids"]]
        else:
            text = "".join(m["content"] for m in messages)
            ids = [int(i) for i in self.tokenizer(text)["input_ids"]]
            while ids and text and ids[-1] in self.eos_ids and len(ids) > 1:
                ids.pop()  # tokenizers that close every text would end the reply before it starts
        if not ids and self.tokenizer.bos_token_id is not None:
            ids = [int(self.tokenizer.bos_token_id)]
        if not ids:
            raise UserError("a prompt is empty and the tokenizer has no BOS token; give it some text")
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Arguments of a forward pass over (B, T) tokens, with positions that count real tokens only.

        So left and right padding give the same activations, also where positions are learned.
        """
        mask = attention_mask.to(self.device, torch.long)
        arguments = {"input_ids": input_ids.to(self.device), "attention_mask": mask}
        if self.layout.positions:
            arguments["position_ids"] = positions(mask)
        return arguments

    def packed_inputs(self, input_ids: Tensor, documents: Tensor) -> dict[str, Tensor]:
        """Arguments of a forward pass over packed rows: tokens, and each token's document, both (B, T).

        Documents are numbered from 1 in their row, 0 is padding. A token sees its own document alone, and
        positions begin anew with each. Raises UserError when the family does not support it.
        """
        if not self.packs:
            raise UserError(f"{self.name} cannot read packed rows: its family takes no mask of its own")
        numbers = documents.to(self.device, torch.long)
        arguments = self._packed(input_ids.to(self.device), numbers)
        window = getattr(self.config, "sliding_window", None)
        if window and int(arguments["position_ids"].max()) >= window:
            raise UserError(
                f"a packed document is longer than the window of {window} tokens that layers of {self.name} "
                "attend to; read it in a row of its own"
            )
        return arguments

    @cached_property
    def packs(self) -> bool:
        """Whether two documents in one row come out as they do alone; found out by trying."""
        ids = torch.arange(8, device=self.device)[None] % self.config.vocab_size
        numbers = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0]], device=self.device)
        if not self.layout.positions:
            return False
        with torch.no_grad():
            try:
                both = self.layout.decoder(**self._packed(ids, numbers)).last_hidden_state
            except (TypeError, KeyError, IndexError, RuntimeError, ValueError, AttributeError):
                return False
            parts = [ids[:, :3], ids[:, 3:7]]
            alone = [
                self.layout.decoder(**self.inputs(p, torch.ones_like(p))).last_hidden_state for p in parts
            ]
        off = (torch.cat(alone, dim=1) - both[:, :7]).float().norm(dim=-1)
        exact = self.model.dtype in (torch.float32, torch.float64)
        return bool((off <= (1e-3 if exact else 5e-2) * both[:, :7].float().norm(dim=-1)).all())

    def _packed(self, input_ids: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        places = torch.arange(numbers.shape[1], device=numbers.device)
        begins = numbers.diff(dim=1, prepend=numbers[:, :1]) != 0
        allowed = numbers[:, :, None] == numbers[:, None, :]
        if self.generates:  # a token of a causal model sees itself and what came before
            allowed &= places[:, None] >= places
        mask = torch.zeros(allowed.shape, dtype=self.model.dtype, device=numbers.device)
        mask.masked_fill_(~allowed, torch.finfo(self.model.dtype).min)
        starts = torch.where(begins, places, 0).cummax(dim=1).values
        return {"input_ids": input_ids, "attention_mask": mask[:, None], "position_ids": places - starts}


def positions(attention_mask: Tensor) -> Tensor:
    """Position of each token among the real ones of its row, shape (B, T), for a 0/1 mask of that shape."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def load_model(path_or_name: str | Path, *, device: str = "cpu", dtype: str = "float32") -> LanguageModel:
    """Load a model folder, or a model of the Hugging Face Hub by name, ready for reading and editing.

    Decoders (GPT-2, Llama, …) come with their logits; encoders (BERT), encoder-decoders (T5) and vision
    transformers (ViT) can be read. Raises UserError when the folder, the Hub's model or the dtype does not
    exist, or when the model is none of these.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging

    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; choose one of {', '.join(_DTYPES)}")
    folder = _folder(path_or_name)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loader = _loader(AutoConfig.from_pretrained(folder))
        model: Any = loader.from_pretrained(folder, dtype=_DTYPES[dtype])
        images = loader is AutoModel and model.main_input_name == "pixel_values"
        tokenizer: Any = None if images else AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model {path_or_name} cannot be loaded: {reason}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    name = folder.name if Path(path_or_name).exists() else str(path_or_name)
    return wrap_model(model.to(device), tokenizer, name=name, id=weights_id(folder))


def _loader(config: Any) -> Any:
    """The library's loader for what a configuration describes."""
    import transformers as hf
    from transformers.models.auto import modeling_auto as known

    named = (config.architectures or [""])[0]
    masked = config.model_type in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if config.is_encoder_decoder:
        return hf.AutoModelForSeq2SeqLM
    if named.endswith("ForMaskedLM"):
        return hf.AutoModelForMaskedLM
    # Encoders are in the library's list of causal models too: some were made into decoders, which says so.
    causal = config.model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return (
        hf.AutoModelForCausalLM
        if causal and (not masked or getattr(config, "is_decoder", False))
        else hf.AutoModel
    )


def wrap_model(model: nn.Module, tokenizer: Any, *, name: str, id: str | None = None) -> LanguageModel:
    """Make a LanguageModel of a model in memory; freezes it and sets evaluation mode.

    Without `id` the weights in memory are hashed, tied ones once, as `save_pretrained` would store them. A
    model that reads images has no tokenizer (None).
    """
    model.eval().requires_grad_(False)
    fuse(model)
    if tokenizer is not None:
        tokenizer.padding_side = "left"
    if id is None:
        tied = cast("Mapping[str, str]", getattr(model, "all_tied_weights_keys", None) or {})
        id = weights_id({k: v for k, v in model.state_dict().items() if k not in tied})
    words = "" if tokenizer is None else tokenizer_id(tokenizer)
    return LanguageModel(model, tokenizer, name, id, words, discover(model))


def weights_id(source: str | Path | Mapping[str, Tensor]) -> str:
    """SHA-256 over (name, dtype, shape, bytes) of every tensor, sorted by name.

    source: a folder of safetensors files, which is read in pieces, or tensors in memory. Independent of how
    the tensors are spread over files and ordered in them. A quantised weight in memory is hashed as the
    tensors that it is made of, with what it says of them. Raises UserError when the folder has no safetensors
    files and IntegrityError when one is cut off.
    """
    digest = hashlib.sha256()
    if isinstance(source, Mapping):
        tensors = {part: plain for name in source for part, plain in _plain(name, source[name])}
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            kind = _SAFETENSORS_NAMES.get(tensor.dtype, str(tensor.dtype))
            digest.update(_tensor_header(name, kind, list(tensor.shape)))
            digest.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
        return digest.hexdigest()
    located: dict[str, tuple[Path, dict[str, Any], int]] = {}
    for file in _weight_files(Path(source)):
        header, start = _read_header(file)
        for name, entry in header.items():
            if name != "__metadata__":
                located[name] = (file, entry, start)
    for name in sorted(located):
        file, entry, start = located[name]
        digest.update(_tensor_header(name, entry["dtype"], entry["shape"]))
        begin, end = entry["data_offsets"]
        for piece in _pieces(file, start + begin, end - begin):
            digest.update(piece)
    return digest.hexdigest()


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor, or those that a quantised one is made of: how it is to be read is part of their names."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    parts, how = flatten()
    for part in parts:
        yield from _plain(f"{name}.{part} {how}", getattr(tensor, part))


def tokenizer_id(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's canonical JSON and chat template, padding and truncation left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        core = json.loads(backend.to_str())
        core.pop("padding", None)
        core.pop("truncation", None)
    else:
        core = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.special_tokens_map}
    record = {"tokenizer": core, "chat_template": getattr(tokenizer, "chat_template", None)}
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _folder(path_or_name: str | Path) -> Path:
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model folder {folder} has no config.json; give a Hugging Face model folder")
        return folder
    name = str(path_or_name)
    if isinstance(path_or_name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model folder {path_or_name} does not exist; check --model")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
        )
    except Exception as error:  # the client raises many kinds: offline, no such name, no access
        raise UserError(
            f"model {name!r} is neither a folder nor to be had from the Hub; check --model"
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} does not exist; convert the model's weights to safetensors")
    return files


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header and where its data starts: 8 bytes of length, little-endian, then JSON."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise IntegrityError(f"{file} is cut off or not a safetensors file; fetch it again")
        try:
            return json.loads(stream.read(length)), 8 + length
        except ValueError as error:
            raise IntegrityError(f"{file} has a damaged safetensors header; fetch it again") from error


def _pieces(file: Path, start: int, length: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(start)
        while length:
            piece = stream.read(min(_CHUNK, length))
            if not piece:
                raise IntegrityError(f"{file} is cut off; fetch it again")
            length -= len(piece)
            yield piece


def _tensor_header(name: str, dtype: str, shape: list[int]) -> bytes:
    return json.dumps([name, dtype, shape], ensure_ascii=False).encode() + b"\n"
