"""The backbone: a decoder LLM that turns token ids into features.

In:  encoded conversations.
Out: for each, the response feature (final hidden state, after the final norm, at the last token) and
     the prompt feature (the same at the gate position), float32, of hidden size d.

Any decoder-only Hugging Face model serves; its language-model head is never loaded. Batches are padded
on the right and run without a mask over the padding: attention is causal, so what stands right of a
token cannot change it, and the fast causal kernels apply. That the model is causal is checked once at
loading. Features depend on the batch only by rounding: 1e-5 of their norm in float32. Weights are
safetensors only; what is missing or misshapen in them is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from armorm.backbone.chat_template import ChatTemplate, EncodedConversation
from armorm.embedded import embedded_path
from armorm.errors import BackboneError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# How far, relative to the largest value, earlier states may move when later tokens change: rounding only.
_CAUSAL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}

_FLOAT32_PARAMETERS = 1_000_000_000
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass
class Backbone:
    """A decoder with its tokenizer.

    Attributes:
        name: what it was loaded from.
        model: the transformers model without a head.
        tokenizer: its tokenizer.
        template: the tokenizer's chat template.
        sharing_fault: why conversations of this model cannot share their beginnings; empty where they can, None
            before it was tried (features/engine.py).
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any
    template: ChatTemplate = field(init=False)
    sharing_fault: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.template = ChatTemplate(self.tokenizer)
        self.model.eval()

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Backbone:
        """Load a backbone from a hub id, a folder, or the name of an embedded one.

        Args:
            dtype: `auto` (bfloat16 where the hardware is fast at it, else float32), `weights` (as they are stored),
                `float32`, `bfloat16`, `float16`.
            device: `auto` (the first accelerator, else the processor), or a torch device.
            kwargs: passed on to `AutoModel.from_pretrained` (`attn_implementation`, `device_map`, ...).

        Raises:
            BackboneError: for a model that is not a decoder, or whose weights are damaged or incomplete.
        """
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoTokenizer

        path = str(embedded_path(str(name)) or name)
        placement = Placement.choose(dtype, device)
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            model, report = AutoModel.from_pretrained(
                path,
                dtype=placement.load_dtype,
                output_loading_info=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
                **kwargs,
            )
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
        except (OSError, ValueError, SafetensorError) as error:
            raise BackboneError(f"backbone {name}: {error}") from error
        settle_attention(model)
        require_complete(report, str(name))
        placement.apply(model, move="device_map" not in kwargs)
        require_decoder(model, str(name))
        return cls(str(name), model, tokenizer)

    @property
    def hidden_size(self) -> int:
        """d, the width of a feature."""
        return hidden_size(self.model.config)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return self.model.device

    @property
    def max_length(self) -> int | None:
        """Most tokens the model has positions for, or None where it states none."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def fingerprint_parts(self) -> dict[str, str]:
        """What decides a feature beside the token ids, each as 32 hex digits (the dtype as a word): `weights`, `dtype`,
        `tokenizer`, `template`. Features of backbones that differ in any of them must not mix."""
        weights = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            weights.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
        # (Padding and truncation are what the last call asked for; they change no encoding here.)
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
        texts = {"tokenizer": json.dumps(backend), "template": str(self.tokenizer.chat_template)}
        digests = {name: hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for name, text in texts.items()}
        return {"weights": weights.hexdigest(), "dtype": str(self.model.dtype).removeprefix("torch."), **digests}

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of all of `fingerprint_parts`."""
        return hashlib.blake2b(json.dumps(self.fingerprint_parts).encode(), digest_size=16).hexdigest()

    @torch.inference_mode()
    def features(self, batch: Sequence[EncodedConversation]) -> tuple[np.ndarray, np.ndarray]:
        """Features of one batch.

        Returns:
            prompt features (n, d) and response features (n, d), float32.
        """
        ids, lengths = padded_ids(batch)
        hidden = self.model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        rows = torch.arange(len(batch), device=hidden.device)
        gates = torch.tensor([encoded.gate_position for encoded in batch], device=hidden.device)
        prompt = hidden[rows, gates].float().cpu().numpy()
        response = hidden[rows, lengths.to(hidden.device) - 1].float().cpu().numpy()
        return prompt, response


def padded_ids(batch: Sequence[EncodedConversation]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (n, t) filled up on the right with 0 (nothing looks there, and every model has that id), and lengths (n,)."""
    lengths = torch.tensor([len(encoded) for encoded in batch])
    ids = torch.zeros((len(batch), int(lengths.max())), dtype=torch.long)
    for row, encoded in enumerate(batch):
        ids[row, : len(encoded)] = torch.from_numpy(encoded.ids.astype(np.int64))
    return ids, lengths


def hidden_size(config: Any) -> int:
    """d of a model config, that of the text part where there are several."""
    return int(config.get_text_config().hidden_size)


def resolve_device(device: str) -> torch.device:
    """`auto` is the first CUDA device, else the processor."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware (AMX, or AVX-512 with BF16)."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """What to load weights in. `auto` is bfloat16 where the hardware multiplies it fast (GPUs, processors with
    BF16 instructions), else the dtype of the weights, which `Placement.apply` may widen; `weights` is that of the file.

    Raises:
        BackboneError: for an unknown name.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type != "cpu" or fast_bfloat16() else "auto"
    if dtype == "weights":
        return "auto"  # as transformers calls it
    if dtype not in DTYPES:
        raise BackboneError(f"dtype {dtype!r}, expected auto, weights, {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    return DTYPES[dtype]


@dataclass(frozen=True)
class Placement:
    """Device and dtype of a model: decided here, before and after its weights are loaded.

    Attributes:
        device: where the model runs.
        load_dtype: `dtype` for `from_pretrained`.
        widen: small models are turned into float32 after loading.
    """

    device: torch.device
    load_dtype: torch.dtype | str
    widen: bool

    @classmethod
    def choose(cls, dtype: str = "auto", device: str = "auto") -> Placement:
        """The placement that settings mean (`resolve_dtype`, `resolve_device`)."""
        place = resolve_device(device)
        load_dtype = resolve_dtype(dtype, place)
        return cls(place, load_dtype, widen=dtype == "auto" and load_dtype == "auto")

    def apply(self, model: PreTrainedModel, *, backbone: PreTrainedModel | None = None, move: bool = True) -> None:
        """Give a loaded model its dtype and move it to the device.

        On a CPU without fast bfloat16, `auto` means float32 for models up to a billion parameters, several times
        faster there; larger ones keep the dtype of their weights to save memory.

        Args:
            backbone: the part of the model whose dtype is set; by default all of it.
            move: False for models that transformers places on its own (`device_map`).
        """
        narrow = model if backbone is None else backbone
        if self.widen and narrow.num_parameters() <= _FLOAT32_PARAMETERS:
            narrow.float()
        if move:
            model.to(self.device)


def settle_attention(model: PreTrainedModel) -> None:
    """Let a model with a cap on its attention logits compute attention itself: transformers 4 gives such a model sdpa
    by default, which leaves the cap out."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def require_complete(report: dict[str, Any], name: str) -> None:
    """Refuse weights from which a tensor of the model is absent, or in which one has another shape.

    Raises:
        BackboneError: naming the first of them.
    """
    for fault, keys in (("lack", report["missing_keys"]), ("have in another shape", report["mismatched_keys"])):
        tensors = sorted(key if isinstance(key, str) else key[0] for key in keys)
        if tensors:
            named = ", ".join(tensors[:5])
            raise BackboneError(f"backbone {name}: the weights {fault} {len(tensors)} tensors: {named}")


@torch.inference_mode()
def require_decoder(model: PreTrainedModel, name: str) -> None:
    """Refuse a model in which a later token changes an earlier hidden state, or that hands out none, or no numbers.

    Raises:
        BackboneError: naming the model's type.
    """
    kind = model.config.model_type
    if getattr(model.config, "is_encoder_decoder", False):
        raise BackboneError(f"backbone {name}: {kind} is an encoder-decoder; expected a decoder-only model")
    ids = torch.tensor([[5, 6, 7] + [8] * 13, [5, 6, 7] + [9] * 13], device=model.device)
    hidden = getattr(model(input_ids=ids), "last_hidden_state", None)
    if hidden is None:
        raise BackboneError(
            f"backbone {name}: {kind} gives no final hidden state; expected a decoder-only language model"
        )
    if not bool(hidden.isfinite().all()):
        raise BackboneError(
            f"backbone {name}: {kind} gives hidden states that are not finite in {str(model.dtype)[6:]}; "
            "expected sound weights, and a dtype that holds their range"
        )
    first, second = hidden[:, :3].float()
    if float((first - second).abs().max()) > _CAUSAL_TOLERANCE.get(model.dtype, 3e-2) * float(first.abs().max()):
        raise BackboneError(
            f"backbone {name}: {kind} looks ahead (a later token changes earlier states); expected a causal decoder"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _OUT_OF_MEMORY)


def length_sorted_batches(lengths: Sequence[int] | np.ndarray, budget: int) -> list[np.ndarray]:
    """Cut conversations into batches of similar length.

    Args:
        lengths: (n,) tokens of each conversation.
        budget: most tokens of a batch, rows times its longest length; a longer conversation stands alone.

    Returns:
        Index arrays that together hold each of 0..n-1 once, longest first.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        rows = max(1, budget // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def padding_share(lengths: Sequence[int] | np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """Share of computed tokens that are padding, 0 to 1."""
    lengths = np.asarray(lengths, np.int64)
    computed = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    return 1.0 - float(lengths.sum()) / computed if computed else 0.0
