"""Files of a model, checked before anything is built from them: config.json, tokenizer.json, headers of weights.

A broken or hostile folder is rejected within moments by one line that names file and field. The limits are far above
any known model; within them, sizes must agree with the shapes in the headers of the weights.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

from pydantic import BaseModel, Field, ValidationError

from armorm.errors import ArmormError, shown

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS = "model*.safetensors"  # of a folder; other files of tensors there hold no weights
_MOST_HEADER = 100_000_000  # bytes, the limit of safetensors
_LAYER = re.compile(r"\.(\d+)\.")
_EMBEDDING = re.compile(r"(embed_tokens|embed_in|embeddings?|wte)\.weight$")

Size = Annotated[int, Field(strict=True, gt=0, le=1_000_000)]
Layers = Annotated[int, Field(strict=True, gt=0, le=1_000)]
Vocabulary = Annotated[int, Field(strict=True, gt=0, le=10_000_000)]


class _Decoder(BaseModel):
    """Fields of a decoder's config that decide how much is built; families have other names for some."""

    hidden_size: Optional[Size] = None
    n_embd: Optional[Size] = None
    num_hidden_layers: Optional[Annotated[int, Field(strict=True, ge=0, le=1_000)]] = None
    n_layer: Optional[Layers] = None
    num_attention_heads: Optional[Annotated[int, Field(strict=True, ge=0, le=10_000)]] = None
    n_head: Optional[Size] = None
    num_key_value_heads: Optional[Size] = None
    head_dim: Optional[Size] = None
    vocab_size: Optional[Vocabulary] = None
    max_position_embeddings: Optional[Annotated[int, Field(strict=True, gt=0)]] = None
    model_type: Optional[Annotated[str, Field(strict=True)]] = None
    architectures: Optional[list[str]] = None


def first_fault(model: type[BaseModel], values: Mapping[str, Any], place: str = "") -> str:
    """The first field that a schema rejects: `field X: found Y, expected ...`; empty if there is none."""
    try:
        model.model_validate(dict(values))
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join([*([place] if place else []), *map(str, fault["loc"])])
        if fault["type"] == "value_error":
            return f"field {field}: {fault['ctx']['error']}"
        if fault["type"] == "missing":
            return f"field {field}: missing"
        return f"field {field}: found {shown(fault['input'])}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
    return ""


def read_object(path: Path, error: type[ArmormError]) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Raises:
        error: for a file that cannot be read, is cut off, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as fault:
        raise error(f"{path}: cannot be read as JSON, the file may be cut off: {fault}") from None
    if not isinstance(found, dict):
        raise error(f"{path}: found {shown(found)}, expected a JSON object")
    return found


def decoder_fault(settings: Mapping[str, Any], place: str = "") -> str:
    """The first field of a decoder's config that no model can have; empty if there is none.

    Args:
        place: field of the file in which the config is, if it is not the file itself.
    """
    fault = first_fault(_Decoder, settings, place)
    if fault:
        return fault
    prefix = f"{place}." if place else ""
    heads, groups = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    if heads and groups and heads % groups:
        return (
            f"field {prefix}num_attention_heads: found {heads}, expected a multiple of num_key_value_heads ({groups})"
        )
    size = settings.get("hidden_size")
    if size and heads and not settings.get("head_dim") and settings.get("model_type") in _DIVIDED and size % heads:
        return f"field {prefix}num_attention_heads: found {heads}, expected a divisor of hidden_size ({size})"
    inner = settings.get("text_config")
    if inner is None:
        return ""
    if not isinstance(inner, dict):
        return f"field {prefix}text_config: found {shown(inner)}, expected an object"
    return decoder_fault(inner, f"{prefix}text_config")


# Families whose heads divide the hidden size unless head_dim is given.
_DIVIDED = {"llama", "mistral", "qwen2", "phi3", "gpt_neox", "olmo", "olmo2", "smollm3", "stablelm"}


def weight_shapes(folder: Path, pattern: str = "*.safetensors") -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype (`F32`, `BF16`, ...) and shape of every tensor in the weights of a folder, from the files' headers."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in sorted(folder.glob(pattern)):
        for name, entry in (_header(path) or ({}, 0))[0].items():
            if name != "__metadata__" and isinstance(entry, dict) and isinstance(entry.get("shape"), list):
                found[name] = (str(entry.get("dtype")), tuple(entry["shape"]))
    return found


def cut_weights(folder: Path, pattern: str = "*.safetensors") -> str:
    """The first file of weights in a folder that does not have the size that its header says; empty if all have."""
    for path in sorted(folder.glob(pattern)):
        size, read = path.stat().st_size, _header(path)
        if read is None:
            return f"{path}: found no header of safetensors in {size:,} bytes, the file may be cut off"
        header, start = read
        ends = [entry["data_offsets"][-1] for name, entry in header.items() if name != "__metadata__"]
        if start + max(ends, default=0) != size:
            return f"{path}: found {size:,} bytes, expected {start + max(ends, default=0):,}, the file may be cut off"
    return ""


def integer_weights(folder: Path, pattern: str, settings: Mapping[str, Any], prefix: str = "") -> str:
    """The first tensor that should hold floating-point numbers and does not; empty if there is none.

    Args:
        settings: config of the decoder; if it is quantized, its weights may be integers.
        prefix: of the names of the decoder's tensors.
    """
    quantized = bool(settings.get("quantization_config"))
    for path in sorted(folder.glob(pattern)):
        for name, (dtype, _) in weight_shapes(folder, path.name).items():
            # (Some decoders store masks, which are no weights.)
            apart = name.startswith(prefix) and (quantized or not name.endswith(".weight"))
            if not apart and not dtype.startswith(("F", "BF")):
                return f"{path}: tensor {name} holds {dtype}, expected floating-point numbers"
    return ""


def _header(path: Path) -> tuple[dict[str, Any], int] | None:
    """The header of a safetensors file, and where the tensors start; None for a file that has none."""
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= min(_MOST_HEADER, path.stat().st_size - 8):
            return None
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return None
    return (header, 8 + length) if isinstance(header, dict) and _has_offsets(header) else None


def _has_offsets(header: dict[str, Any]) -> bool:
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    places = [entry.get("data_offsets") if isinstance(entry, dict) else None for entry in tensors]
    return all(isinstance(place, list) and place and all(type(end) is int for end in place) for place in places)


def size_fault(settings: Mapping[str, Any], shapes: Mapping[str, tuple[str, tuple[int, ...]]], place: str = "") -> str:
    """The first size in a decoder's config that the weights do not have; empty if there is none, or no weights."""
    inner = settings.get("text_config")
    settings, prefix = (inner, f"{place}.text_config.".lstrip(".")) if isinstance(inner, dict) else (settings, place)
    prefix = f"{place}." if place and prefix == place else prefix
    sizes = {size for name, (_, shape) in shapes.items() if _EMBEDDING.search(name) for size in shape}
    for field in ("hidden_size", "vocab_size") if sizes else ():
        if settings.get(field) and settings[field] not in sizes:
            return f"field {prefix}{field}: found {settings[field]}, but the embeddings have sizes {sorted(sizes)}"
    stored = max((int(number) for name in shapes for number in _LAYER.findall(name)), default=-1) + 1
    layers = settings.get("num_hidden_layers")
    if stored and layers and layers > stored:
        return f"field {prefix}num_hidden_layers: found {layers}, but the weights have {stored} layers"
    return ""


def require_sound_folder(folder: Path, error: type[ArmormError]) -> None:
    """Check config, tokenizer and the headers of the weights of a decoder in a local folder.

    Raises:
        error: in one line that names file and field.
    """
    settings = read_object(folder / CONFIG, error)
    unsound = cut_weights(folder, WEIGHTS) or integer_weights(folder, WEIGHTS, settings)
    if unsound:
        raise error(unsound)
    fault = decoder_fault(settings) or size_fault(settings, weight_shapes(folder, WEIGHTS))
    if fault:
        raise error(f"{folder / CONFIG}, {fault}")
    require_tokenizer(folder, error)


def require_tokenizer(folder: Path, error: type[ArmormError]) -> None:
    """Check that a folder has a tokenizer whose file is whole.

    Raises:
        error: naming the file that is missing or broken, and the field.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        if not any((folder / name).is_file() for name in _OTHER_TOKENIZERS):
            raise error(f"{path}: no such file, expected the tokenizer of the model")
        return
    fault = first_fault(_Tokenizer, read_object(path, error))
    if fault:
        raise error(f"{path}: {fault}")


_OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


class _Token(BaseModel):
    id: Annotated[int, Field(strict=True, ge=0)]
    content: str


class _TokenizerModel(BaseModel):
    vocab: dict[str, Any] | list[Any]


class _Tokenizer(BaseModel):
    model: _TokenizerModel
    added_tokens: Optional[list[_Token]] = None
