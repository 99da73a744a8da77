"""The backbone: a decoder LLM that turns token ids into features.

The response feature is the final hidden state (after the final norm) at the last token, the prompt feature the same at
the gate position, both float32 of hidden size d, unless a `Readout` names another layer or means over tokens. Any
decoder-only Hugging Face model works; its language-model head is not loaded. Batches are right-padded and run without a
padding mask: attention is causal (checked once at loading), so padding cannot change the tokens before it, and the fast
causal kernels apply. Features depend on the batch only by rounding: 1e-5 of their norm in float32. Weights are
safetensors only; missing or misshapen tensors are an error.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from armorm.backbone.adapters import Adapters
from armorm.backbone.chat_template import ChatTemplate, EncodedConversation
from armorm.backbone.devices import replica, resolve_device, resolve_devices
from armorm.backbone.locate import CONFIG_ERRORS, backbone_path, backbone_source
from armorm.backbone.model_files import CONFIG, require_sound_folder
from armorm.backbone.readout import (
    LAST_TOKEN,
    Pooling,
    PromptPooling,
    Readout,
    cut_layers,
    mean_states,
    resolve_layer,
)
from armorm.backbone.sharing_verdict import SharingVerdict
from armorm.backbone.weight_bytes import weight_bytes
from armorm.errors import BackboneError, nearest
from armorm.hub_access import hub_if_it_answers, not_loaded, require_folder
from armorm.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CPU_BATCH_TOKENS = 1024
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Functions that are called with the states (t, d) of the response's tokens of some rows of a batch, by index.
StateReaders = Mapping[int, Callable[[torch.Tensor], None]]

# How far, relative to the largest value, earlier states may move when later tokens change: rounding only.
_CAUSAL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}

_FLOAT32_PARAMETERS = 1_000_000_000
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass
class Backbone:
    """A decoder with its tokenizer."""

    name: str  # what it was loaded from
    model: PreTrainedModel  # the transformers model without a head, and without layers above the one that is read
    tokenizer: Any
    readout: Readout = LAST_TOKEN
    template: ChatTemplate = field(init=False)
    sharing_verdict: SharingVerdict | None = field(default=None, init=False)  # None until tested (`features/engine.py`)
    replicas: list[Backbone] = field(default_factory=list, init=False)  # on further devices; they share the work
    workers: Any = field(default=None, init=False)  # `RayWorkers` that compute instead of this process

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
        layer: int | float | None = None,
        pooling: Pooling = "last",
        prompt_pooling: PromptPooling = "gate",
        adapters: str | Path | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Backbone:
        """Load a backbone: a hub id, a folder, a GGUF file, `armorm-tiny` or `armorm-small` (`backbone_path`).

        Args:
            dtype: `auto` (bfloat16 if the hardware is fast at it, else float32), `weights` (as stored), `float32`,
                `bfloat16`, `float16`.
            device: `auto` (the first CUDA device, else the CPU), `all`, or others of `backbone/devices.py`; on further
                devices than the first are `replicas`.
            layer: whose output is read: an index as in `hidden_states`, or a fraction of the layers; by default the
                last, with the final norm.
            pooling, prompt_pooling: as in `Readout`.
            adapters: folder with `adapters.safetensors`, which are merged into the weights.
            kwargs: passed on to `AutoModel.from_pretrained` (`attn_implementation`, `device_map`, ...).

        Raises:
            BackboneError: for a model that is not a decoder, or whose weights are damaged or incomplete.
        """
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        tokenizer = load_tokenizer(str(name), **options)
        model, total = load_layers(
            str(name), dtype=dtype, device=device, layer=layer, adapters=adapters, **options, **kwargs
        )
        cut = None if total is None else model.config.get_text_config().num_hidden_layers
        backbone = cls(str(name), model, tokenizer, Readout(pooling, prompt_pooling, cut, total))
        if "device_map" not in kwargs:
            backbone.replicate(resolve_devices(device)[1:])
        return backbone

    def replicate(self, devices: Sequence[torch.device]) -> None:
        """Add a copy on each of these devices; extraction and serving divide the work among all."""
        for device in devices:
            other = copy.copy(self)
            other.model, other.replicas = replica(self.model, device), []
            self.replicas.append(other)

    @property
    def sharing_fault(self) -> str | None:
        """Why conversations cannot share prefixes; empty if they can, None before the model was tested."""
        return None if self.sharing_verdict is None else self.sharing_verdict.fault

    @property
    def hidden_size(self) -> int:
        """d, the size of a feature."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def response_size(self) -> int:
        """Size of a response feature: d, or 2 d for two poolings."""
        return self.hidden_size * self.readout.parts

    @cached_property
    def source(self) -> dict[str, str]:
        """Where the weights come from: `name`, and `sha256` of local files or `commit` of a hub model."""
        return backbone_source(self.name, commit=getattr(self.model.config, "_commit_hash", None))

    @cached_property
    def header_tokens(self) -> int:
        """Tokens from the gate to the reply, the gate included; 1 if ordinary text closes the prompt."""
        return max(len(self.template.gate_pattern()), 1)

    @property
    def header(self) -> int | None:
        """`header_tokens` if features are means, for `build_tree`."""
        return self.header_tokens if self.readout.is_mean else None

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs."""
        return self.model.device

    @property
    def max_length(self) -> int | None:
        """Most tokens the model has positions for, None if its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def fingerprint_parts(self) -> dict[str, str]:
        """Hashes (32 hex digits) of all that determines a feature besides the token ids: `weights`, `tokenizer`,
        `template`, the name of the `dtype`, and the `readout` if it is another than the default. Features of backbones
        that differ in any of them must not be mixed."""
        weights = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            for part in weight_bytes(tensor):
                weights.update(part)
        # (Padding and truncation are those of the last call and do not affect encoding here.)
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
        texts = {"tokenizer": json.dumps(backend), "template": str(self.tokenizer.chat_template)}
        digests = {name: hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for name, text in texts.items()}
        readout = {"readout": json.dumps(settings)} if (settings := self.readout.settings()) else {}
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"weights": weights.hexdigest(), "dtype": dtype, **digests, **readout}

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of all of `fingerprint_parts`."""
        return hashlib.blake2b(json.dumps(self.fingerprint_parts).encode(), digest_size=16).hexdigest()

    @torch.inference_mode()
    def features(
        self, batch: Sequence[EncodedConversation], readers: StateReaders | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Prompt features (n, d) and response features (n, `response_size`), float32, of one batch.

        Args:
            readers: called with the `response_states` of some rows, by index in the batch.
        """
        hidden = self._states(batch)
        for row, read in (readers or {}).items():
            read(hidden[row, self.response_start(batch[row]) : len(batch[row])].float())
        places = torch.tensor([(row.gate_position, len(row) - 1) for row in batch], device=hidden.device)
        gates, lasts = places.T
        rows, readout = torch.arange(len(batch), device=hidden.device), self.readout
        mean = None
        if readout.pooling != "last":
            mean = mean_states(hidden, torch.minimum(gates + self.header_tokens, lasts), lasts)
        response = readout.response(hidden[rows, lasts].float(), mean)
        prompt = hidden[rows, gates]
        if readout.prompt == "mean":
            prompt = mean_states(hidden, torch.minimum(torch.ones_like(gates), gates), gates)
        return prompt.float().cpu().numpy(), response.cpu().numpy()

    def response_start(self, row: EncodedConversation) -> int:
        """Index of the first token that a mean over the response includes."""
        return min(row.gate_position + self.header_tokens, len(row) - 1)

    @torch.inference_mode()
    def response_states(self, batch: Sequence[EncodedConversation]) -> list[torch.Tensor]:
        """States (t, d) float32 of the response's tokens of each conversation, from `response_start` to the end."""
        return [
            states[self.response_start(row) : len(row)].float()
            for states, row in zip(self._states(batch), batch, strict=True)
        ]

    def _states(self, batch: Sequence[EncodedConversation]) -> torch.Tensor:
        # (Padded with 0, an id that every model has and no token attends to.)
        ids = pad_sequence([torch.from_numpy(row.ids.astype(np.int64)) for row in batch], batch_first=True)
        return self.model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state


def load_layers(
    name: str,
    *,
    dtype: str,
    device: str,
    layer: int | float | None,
    adapters: str | Path | None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, int | None]:
    """The network of a backbone without the layers above the one that is read, checked to be a causal decoder.

    Args:
        name, dtype, device, layer, adapters, kwargs: as in `Backbone.load`.

    Returns:
        The network, and the number of layers that it had; None if it has all of them still.

    Raises:
        BackboneError: as `Backbone.load`.
    """
    from transformers import AutoModel

    placement = Placement.choose(dtype, device)
    model = load_network(AutoModel, name, dtype=placement.load_dtype, **kwargs)
    if adapters is not None:
        Adapters.read(adapters).merge(model.state_dict())
    placement.apply(model, move="device_map" not in kwargs)
    require_decoder(model, name)
    total = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    cut = resolve_layer(layer, total, name)
    if cut is None:
        return model, None
    cut_layers(model, cut)
    return model, total


def load_network(
    auto_class: Any, name: str, *, revision: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """The network of a backbone, with every tensor that the class needs.

    Args:
        auto_class: `AutoModel`, or `AutoModelForCausalLM` for the language-model head too.
        name: as in `backbone_path`.
        kwargs: of `from_pretrained` of the class.

    Raises:
        BackboneError: for files that are missing, damaged or incomplete.
    """
    with _sound_path(name, revision) as path:
        model, report = auto_class.from_pretrained(
            path,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are rejected below, by name
            revision=revision,
            trust_remote_code=trust_remote_code,
            **kwargs,
        )
    settle_attention(model)
    require_complete(report, name)
    return model


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a backbone.

    Raises:
        BackboneError: for files that are missing or damaged.
    """
    from transformers import AutoTokenizer

    with _sound_path(name, revision) as path:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)


@contextmanager
def _sound_path(name: str, revision: str | None) -> Iterator[str]:
    """Path or hub id of a backbone, whose files were checked; faults in loading from it become a `BackboneError`."""
    from safetensors import SafetensorError

    path = backbone_path(name, revision)
    require_folder(path, BackboneError)
    if (Path(path) / CONFIG).is_file():
        require_sound_folder(Path(path), BackboneError)
    try:
        with hub_if_it_answers(path):
            yield path
    except (OSError, ValueError, *CONFIG_ERRORS, SafetensorError) as error:
        raise BackboneError(f"backbone {name}: {not_loaded(path, error)}") from error


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX, or AVX-512 with BF16)."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)


_say_once = cache(say)  # one model may be loaded several times


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """The dtype to load weights in. `auto` is bfloat16 if the hardware multiplies it fast (GPUs, CPUs with BF16
    instructions), else that of the file, which `Placement.apply` may widen; `weights` is that of the file.

    Raises:
        BackboneError: for an unknown name.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type != "cpu" or fast_bfloat16() else "auto"
    if dtype == "weights":
        return "auto"  # transformers' name for it
    if dtype not in DTYPES:
        raise BackboneError(f"dtype {dtype!r}, expected auto, weights, {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    return DTYPES[dtype]


@dataclass(frozen=True)
class Placement:
    """Device and dtype of a model: decided here, before and after its weights are loaded."""

    device: torch.device  # where the model runs
    load_dtype: torch.dtype | str  # `dtype` for `from_pretrained`
    widen: bool  # small models are converted to float32 after loading

    @classmethod
    def choose(cls, dtype: str = "auto", device: str = "auto") -> Placement:
        """The placement for settings as in `Backbone.load`."""
        place = resolve_device(device)
        load_dtype = resolve_dtype(dtype, place)
        if dtype == "bfloat16" and place.type == "cpu" and not fast_bfloat16():
            _say_once("bfloat16 is slow on this processor, which has no instructions for it; float32 is faster")
        return cls(place, load_dtype, widen=dtype == "auto" and load_dtype == "auto")

    @classmethod
    def for_scores(cls, dtype: str = "auto", device: str = "auto") -> Placement:
        """The placement of a model whose scores people read: as `choose`, but on a CPU `auto` is not bfloat16.

        Scores in bfloat16 depend on the batch in the third digit, so that two commands would print two numbers.
        """
        chosen = cls.choose(dtype, device)
        if dtype == "auto" and chosen.device.type == "cpu":
            return cls(chosen.device, "auto", widen=True)
        return chosen

    def apply(self, model: PreTrainedModel, *, backbone: PreTrainedModel | None = None, move: bool = True) -> None:
        """Set the dtype of a loaded model and move it to the device.

        On a CPU, `auto` without bfloat16 is float32 for models up to a billion parameters; larger ones keep the dtype
        of their weights to save memory.

        Args:
            backbone: the part of the model whose dtype is set; by default all of it.
            move: False for models that transformers has placed (`device_map`).
        """
        narrow = model if backbone is None else backbone
        if self.widen and narrow.num_parameters() <= _FLOAT32_PARAMETERS:
            narrow.float()
        if move:
            model.to(self.device)


def settle_attention(model: PreTrainedModel) -> None:
    """Use eager attention for models with capped attention logits: the default of transformers 4, sdpa, ignores the
    cap."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def require_complete(report: dict[str, Any], name: str) -> None:
    """Raise a `BackboneError` if the weights lack a tensor of the model, or have one in another shape."""
    for fault, keys in (("lack", report["missing_keys"]), ("have in another shape", report["mismatched_keys"])):
        tensors = sorted(key if isinstance(key, str) else key[0] for key in keys)
        if tensors:
            named = ", ".join(tensors[:5])
            raise BackboneError(f"backbone {name}: the weights {fault} {len(tensors)} tensors: {named}")


@torch.inference_mode()
def require_decoder(model: PreTrainedModel, name: str) -> None:
    """Raise a `BackboneError` unless the model gives finite hidden states that do not depend on later tokens."""
    kind = model.config.model_type
    if getattr(model.config, "is_encoder_decoder", False):
        raise BackboneError(f"backbone {name}: {kind} is an encoder-decoder; expected a decoder-only model")
    ids = torch.tensor([[5, 6, 7] + [8] * 13, [5, 6, 7] + [9] * 13], device=model.device)
    hidden = getattr(model(input_ids=ids), "last_hidden_state", None)
    if hidden is None:
        raise BackboneError(
            f"backbone {name}: {kind} returns no final hidden state; expected a decoder-only language model"
        )
    if not bool(hidden.isfinite().all()):
        raise BackboneError(
            f"backbone {name}: {kind} returns hidden states that are not finite in {str(model.dtype)[6:]}; "
            "expected valid weights, and a dtype with their range"
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


def pass_tokens(budget: int, device: torch.device) -> int:
    """Most tokens of a padded batch within a budget: on a CPU few, so that a layer's activations stay in its cache."""
    return min(budget, _CPU_BATCH_TOKENS) if device.type == "cpu" else budget


def length_sorted_batches(lengths: Sequence[int] | np.ndarray, budget: int) -> list[np.ndarray]:
    """Group conversations into batches of similar length.

    Args:
        lengths: (n,) tokens of each conversation.
        budget: most tokens of a batch, rows times its longest length; a longer conversation is a batch of its own.

    Returns:
        Index arrays that together contain each of 0..n-1 once, longest first.
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
