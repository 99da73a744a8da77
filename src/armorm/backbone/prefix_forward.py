"""Forward passes over prefix trees instead of padded batches, for models that give the same features with them.

How a model uses positions, masks and states is its own business, so each model is tested before a large piece of
work: features of a small sample of that work from one tree are compared with those of each conversation alone. Models
with another kind of state (Mamba), position biases in attention (ALiBi) or inputs beyond the given ones fail and run
on plain batches.

Layers can be compiled for one stream length: norms, rotations and activations then cost one pass over memory instead
of many, a third of the time of a small model, for half a minute of compilation.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone, is_out_of_memory
from armorm.backbone.prefix_tree import PrefixTree, build_tree, shared_with_previous
from armorm.backbone.readout import decoder_layers
from armorm.backbone.tree_attention import only_tokens, tree_attention
from armorm.backbone.tree_blocks import STREAM_MULTIPLE
from armorm.errors import BackboneError

# Largest distance from the features of the conversation alone, relative to their norm. Rounding gives 1e-6 in float32
# and 2e-2 in bfloat16; a wrong mask or position 1e-1 and more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
# Errors of models that do not accept positions, masks or states from the caller.
_UNSUPPORTED = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)
SAMPLE_TOKENS = 1536
# Layers of just attention and an MLP, each after its norm and added to the residual stream: after the attention of the
# last one, only the tokens whose states are needed are computed.
_PLAIN_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}


@dataclass
class SharedForward:
    """Forward passes of one backbone over trees; if layers are compiled, every stream is padded to `length` tokens."""

    backbone: Backbone
    compiled: bool = False
    length: int = 0
    _layers: list[nn.Module] = field(init=False)
    _calls: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.length = -(-self.length // STREAM_MULTIPLE) * STREAM_MULTIPLE
        self._layers = list(_layers(self.backbone.model)) if self.compiled else []
        self._calls = [_compiled_call(layer) for layer in self._layers]

    @torch.inference_mode()
    def features(self, tree: PrefixTree) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response features (m, d) float32 of a tree's conversations."""
        # (On a GPU attention is compiled for one length in any case.)
        fixed = self.compiled or self.backbone.device.type == "cuda"
        multiple = max(self.length, STREAM_MULTIPLE) if fixed else STREAM_MULTIPLE
        stream = tree.padded(-(-len(tree) // multiple) * multiple)
        model, device = self.backbone.model, self.backbone.device
        readout = self.backbone.readout
        spans = [tree.responses] * (readout.pooling != "last") + [tree.prompts] * (readout.prompt == "mean")
        asked = np.unique(np.concatenate([tree.gates, tree.lasts, *(places for places, _ in spans)]))
        with ExitStack() as stack:
            stack.enter_context(tree_attention(model, stream))
            compiled = self.compiled and len(stream) == self.length
            for layer, call in zip(self._layers, self._calls, strict=True) if compiled else ():
                layer._compiled_call_impl = call
                stack.callback(setattr, layer, "_compiled_call_impl", None)
            attend = _compiled_attend() if compiled else _attend
            only = stack.enter_context(_only(model, asked, attend))
            ids, positions = (torch.from_numpy(part)[None].to(device) for part in (stream.ids, stream.positions))
            states = model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
        if not only:
            states = states[torch.from_numpy(asked).to(states.device)]
        states = states.float()

        def at(places: np.ndarray) -> torch.Tensor:
            return states[torch.from_numpy(np.searchsorted(asked, places)).to(states.device)]

        def mean(span: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
            counts = torch.from_numpy(span[1]).to(states.device)
            owner = torch.repeat_interleave(torch.arange(len(counts), device=states.device), counts)
            sums = states.new_zeros(len(counts), states.shape[1]).index_add_(0, owner, at(span[0]))
            return sums / counts[:, None]

        prompt = mean(tree.prompts) if readout.prompt == "mean" else at(tree.gates)
        response = readout.response(at(tree.lasts), None if readout.pooling == "last" else mean(tree.responses))
        return prompt.cpu().numpy(), response.cpu().numpy()


def _compiled_call(layer: nn.Module) -> Any:
    layer.compile(dynamic=False)
    call, layer._compiled_call_impl = layer._compiled_call_impl, None
    return call


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    holder, name = decoder_layers(model, model.config.get_text_config().num_hidden_layers)
    found: nn.ModuleList = getattr(holder, name)
    return found


def _attend(layer: Any, states: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    return layer.self_attn(hidden_states=layer.input_layernorm(states), **options)[0]


@cache
def _compiled_attend() -> Callable[..., torch.Tensor]:
    """Made when first used: `torch.compile` itself imports the compiler, a second of every start."""
    return torch.compile(_attend, dynamic=False)


class _LastLayer(nn.Module):
    """The last layer of a plain decoder, computed for some of the tokens."""

    def __init__(self, layer: Any, rows: np.ndarray, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.rows, self.attend = layer, rows, attend

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        layer = self.layer
        with only_tokens(self.rows):
            attended = self.attend(layer, hidden_states, options)
        rows = torch.from_numpy(self.rows).to(hidden_states.device)
        states = hidden_states[:, rows] + attended[:, rows]
        return states + layer.mlp(layer.post_attention_layernorm(states))


@contextmanager
def _only(model: PreTrainedModel, rows: np.ndarray, attend: Callable[..., torch.Tensor] = _attend) -> Iterator[bool]:
    """Within the block a plain decoder returns the states of these rows only; yields whether the model is one."""
    layers: Any = []
    with suppress(BackboneError):
        layers = _layers(model)
    last = layers[-1] if len(layers) else None
    if type(last).__name__ not in _PLAIN_LAYERS or hasattr(last, "_hf_hook"):
        yield False
        return
    layers[-1] = _LastLayer(last, rows, attend)
    try:
        yield True
    finally:
        layers[-1] = last


def why_not_shared(backbone: Backbone, conversations: Sequence[EncodedConversation]) -> str:
    """Compare features from one tree with those of each conversation alone.

    Args:
        conversations: at least two, in lexicographic order.

    Returns:
        why the model must not share prefixes; empty if it may.
    """
    sequences = [conversation.ids for conversation in conversations]
    gates = [conversation.gate_position for conversation in conversations]
    tree = build_tree(sequences, gates, shared_with_previous(sequences).tolist(), backbone.header)
    alone = [backbone.features([conversation]) for conversation in conversations]
    return sharing_fault(
        lambda: SharedForward(backbone).features(tree),
        [np.concatenate(parts) for parts in zip(*alone, strict=True)],
        backbone.model.dtype,
    )


def sharing_fault(shared: Callable[[], Sequence[np.ndarray]], alone: Sequence[np.ndarray], dtype: torch.dtype) -> str:
    """Why features computed with a shared prefix must not be used; empty if they equal those computed without.

    Args:
        shared: computes arrays of features (n, d) with shared prefixes.
        alone: the same arrays, each conversation computed alone.
        dtype: of the model.

    Raises:
        RuntimeError: if memory runs out, which says nothing about the model.
    """
    try:
        found = shared()
    except _UNSUPPORTED as error:
        if is_out_of_memory(error):
            raise
        return next(iter(str(error).splitlines()), type(error).__name__)
    if not all(np.isfinite(array).all() for array in found):
        return "features computed with a shared prefix are not finite"
    far = max(
        float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max())
        for a, b in zip(found, alone, strict=True)
    )
    limit = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    return "" if far <= limit else f"features computed with a shared prefix differ by {far:.1%} of their norm"


def sample(conversations: Sequence[EncodedConversation], shared: np.ndarray, window: int | None) -> list[int]:
    """Rows to test a model on: those that share most and some spread over the work, up to `SAMPLE_TOKENS`.

    Args:
        conversations: all of the work, in lexicographic order.
        shared: (n,) tokens each has in common with the previous one.
        window: the model's sliding window; the sample includes a conversation longer than it, if any.
    """
    lengths = np.array([len(conversation) for conversation in conversations])
    chosen: set[int] = set()
    total = 0
    if window is not None and lengths.max(initial=0) > window:
        longest = np.where(lengths > window, lengths, lengths.max() + 1).argmin()
        chosen.add(int(longest))
    for row in np.argsort(-shared, kind="stable").tolist():
        pair = {row - 1, row} - chosen if row else set()
        more = int(sum(lengths[i] for i in pair))
        if pair and (total + more <= SAMPLE_TOKENS or len(chosen) < 2):
            chosen |= pair
            total += more
        if total > SAMPLE_TOKENS // 2:
            break
    for row in np.linspace(0, len(lengths) - 1, 8).astype(int).tolist():
        if total + lengths[row] <= SAMPLE_TOKENS:
            chosen.add(row)
            total += int(lengths[row])
    return sorted(chosen)


def can_compile(device: torch.device) -> bool:
    """Whether layers can be compiled; on a CPU this needs a C++ compiler."""
    return device.type == "cuda" or any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def flops_per_token(model: nn.Module) -> int:
    """FLOPs of a forward pass per token: two per weight of a matrix multiplication.

    Excludes attention scores and embeddings, which are looked up.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return 2 * sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings)
