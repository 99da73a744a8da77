"""Analytic cost of a run: FLOPs, bytes, hours and money from counts.

Forward FLOPs of a decoder, per layer and token: 2 for each weight of a matrix product, and for causal attention 2 * h
* hd * t for a token of a conversation of t tokens, averaged over its positions (half of the square). The language-
model head is never computed and the embedding is a look-up, so neither counts; nor do attention and feed-forward of the
last layer for tokens that are not read. Stage 1 is one Gram matrix per group
of rows with the same rated objectives, of which half is computed, in float32 (n * d^2 / 2 at the rate of float64),
and a Cholesky factor for each fold and penalty (d^3 / 3), or, with many penalties, an eigendecomposition for each
fold. Both are also bound by memory bandwidth, which for d below a thousand takes as long as the products; this is
counted as operations per number read. Stage 2 is an MLP. A fine-tuning step of a layer costs some forward passes of it
(`TRAINING_PASSES`); frozen layers below cost one, once if their states are cached. What a fraction of peak hides
(kernel launches, padding, the tokenizer) is measured by benchmarks/cost_model.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from armorm.backbone.readout import Pooling, Readout, resolve_layer
from armorm.errors import BackboneError
from armorm.heads.regression import CHOLESKY_ALPHAS
from armorm.training.schema import FinetuneSection, GatingSection

# Stage 1 in float64 operations at the rate of matrix products. The next three are fitted to one shared core (d from 256
# to 1536, 2,000 to 48,000 rows) and rough: they predicted 0.67 to 0.91 of the processor time of other fits.
ROW_PASS = 500  # per number of a row: it is copied by pattern and fold, and centred
FACTOR_PASS = 550  # per number of a Gram matrix and factor: copies, the solution, the error
EIGEN_FLOPS = 16  # times d^3; half are matrix-vector products, bound by memory bandwidth
STAGE_1_RATE = 2e11  # float64 FLOP/s of a server's processors, a low estimate: eight cores of 25 GFLOP/s
PUBLISHED_GATE = GatingSection()
# Cost of a training step of a layer in forward passes, as measured by benchmarks/fine_tuning.py on one CPU core: the
# forward pass, the gradients of states, and with `full` those of weights.
TRAINING_PASSES = {"lora": 2.6, "full": 3.5}


@dataclass(frozen=True)
class Shape:
    """Dimensions of a decoder.

    `inner` is the width of the gated feed-forward network, `feature` that of a response feature, 0 for `hidden`;
    `last_token` says that of a response only the last token is read; `all_layers` counts those that are computed and
    those above, 0 for `layers`.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int
    feature: int = 0
    last_token: bool = True
    all_layers: int = 0

    @classmethod
    def of_config(cls, config: Any) -> Shape:
        """The shape of a transformers config."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        return cls(
            text.hidden_size,
            text.num_hidden_layers,
            heads,
            getattr(text, "num_key_value_heads", None) or heads,
            getattr(text, "head_dim", None) or text.hidden_size // heads,
            text.intermediate_size,
            text.vocab_size,
        )

    def read(self, layer: int | float | None, pooling: Pooling) -> Shape:
        """The shape of what is computed if features are read from a layer."""
        layers = resolve_layer(layer, self.layers)
        return replace(
            self,
            layers=self.layers if layers is None else layers,
            feature=self.hidden * Readout(pooling).parts,
            last_token=pooling == "last",
            all_layers=self.layers,
        )

    @property
    def layer_weights(self) -> int:
        """Weights of a layer's matrix products."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.inner

    @property
    def parameters(self) -> int:
        """All weights, without a language-model head."""
        return self.layers * self.layer_weights + self.vocabulary * self.hidden

    def forward_flops(self, tokens: float, squares: float) -> float:
        """FLOPs of a forward pass.

        Args:
            tokens: sum of the conversations' lengths.
            squares: sum of their squares.
        """
        return 2.0 * self.layers * (self.layer_weights * tokens + self.heads * self.head_size * squares)

    def extraction_flops(self, tokens: float, squares: float, read: float) -> float:
        """FLOPs of `forward_flops` without attention and feed-forward of the last layer for tokens that are not read.

        Shared prefixes are computed in this way if the layers are plain (Llama, Mistral, Qwen); other models cost up to
        a layer more.

        Args:
            read: number of tokens whose states are features.
        """
        last = 2.0 * (3 * self.hidden * self.inner * tokens + self.heads * self.head_size * squares)
        return self.forward_flops(tokens, squares) - (
            last * max(0.0, 1 - read / tokens) if self.layers and tokens else 0
        )


# Shapes of public models, so that a dry run needs no download.
KNOWN_SHAPES = {
    "sfairXC/FsfairX-LLaMA3-RM-v0.1": Shape(4096, 32, 32, 8, 128, 14336, 128257),
    "RLHFlow/ArmoRM-Llama3-8B-v0.1": Shape(4096, 32, 32, 8, 128, 14336, 128257),
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": Shape(4096, 32, 32, 8, 128, 14336, 128256),
    "Skywork/Skywork-Reward-V2-Qwen3-8B": Shape(4096, 36, 32, 8, 128, 12288, 151936),
    "Qwen/Qwen3-8B": Shape(4096, 36, 32, 8, 128, 12288, 151936),
    "Qwen/Qwen3-4B": Shape(2560, 36, 32, 8, 128, 9728, 151936),
    "Qwen/Qwen3-0.6B": Shape(1024, 28, 16, 8, 128, 3072, 151936),
    "google/gemma-2-9b-it": Shape(3584, 42, 16, 8, 256, 14336, 256000),
    "mistralai/Mistral-7B-Instruct-v0.3": Shape(4096, 32, 32, 8, 128, 14336, 32768),
}


@dataclass(frozen=True)
class Hardware:
    """Devices of one kind."""

    name: str
    peak: float  # dense FLOP/s of one device in the dtype that is used, by its data sheet
    memory: float  # bytes of one device
    devices: int = 1
    price: float | None = None  # per device-hour, or None


# Dense bfloat16 with float32 accumulation, by the makers' data sheets.
DEVICES = {
    "h100": Hardware("NVIDIA H100 SXM", 989e12, 80e9),
    "h200": Hardware("NVIDIA H200 SXM", 989e12, 141e9),
    "a100": Hardware("NVIDIA A100", 312e12, 80e9),
    "l4": Hardware("NVIDIA L4", 121e12, 24e9),
    "rtx4090": Hardware("NVIDIA RTX 4090", 165e12, 24e9),
}


@dataclass(frozen=True)
class Workload:
    """Size of a run."""

    conversations: float  # number of distinct ones
    prompts: float
    tokens: float  # tokens to compute, after prompt sharing
    squares: float  # sum of the squared conversation lengths
    rated: float  # training rows of stage 1
    groups: int  # groups of rows with the same rated objectives; each has a Gram matrix
    objectives: int
    pairs: float  # training pairs of stage 2


@dataclass(frozen=True)
class Stage:
    """Cost of one stage."""

    name: str
    flops: float
    hours: float  # wall-clock time on the hardware
    memory: float  # bytes of memory on one machine (host) or device, by `where`
    where: str
    disk: float = 0.0  # bytes written
    money: float | None = None  # None without a price
    fits: bool = True  # whether the memory suffices


def stages(
    shape: Shape,
    work: Workload,
    hardware: Hardware,
    *,
    share: float = 0.4,
    gate: GatingSection = PUBLISHED_GATE,
    folds: int = 5,
    alphas: int = 9,
    batch_tokens: int = 8192,
    weight_bytes: int = 2,
    host_memory: float = 256e9,
    host_rate: float = STAGE_1_RATE,
) -> list[Stage]:
    """Cost of features, stage 1 and stage 2 on some hardware.

    Args:
        share: fraction of peak FLOP/s that the forward pass reaches, 0 to 1.
        alphas: number of ridge penalties to choose from.
        weight_bytes: bytes per weight of the backbone.
        host_rate: float64 FLOP/s of the processors of stages 1 and 2.
    """
    d, hidden = shape.feature or shape.hidden, shape.hidden
    read = work.conversations + work.prompts if shape.last_token else work.tokens
    flops = shape.extraction_flops(work.tokens, work.squares, read)
    hours = flops / (hardware.peak * share * hardware.devices) / 3600
    # Activations of a layer alive at once: input, norm, q and attention output, two inner ones of the feed-forward.
    states = batch_tokens * (4 * d + 2 * shape.heads * shape.head_size + 2 * shape.inner) * weight_bytes
    device_memory = shape.parameters * weight_bytes + states
    stored = (work.conversations * d + work.prompts * hidden) * 4
    price = hardware.price
    features = Stage(
        "features", flops, hours, device_memory, "device", stored,
        None if price is None else hours * hardware.devices * price, device_memory <= hardware.memory,
    )  # fmt: skip
    gram = work.rated * d * (d / 2 + ROW_PASS)
    solving = float(work.groups) * (
        (folds * alphas + 1) * (d**3 / 3 + FACTOR_PASS * d * d)
        if alphas <= CHOLESKY_ALPHAS
        else (folds + 1) * EIGEN_FLOPS * d**3
    )
    held = stage_1_memory(shape, work, folds)
    regression = Stage(
        "stage 1", gram + solving, (gram + solving) / host_rate / 3600, held, "host", fits=held <= host_memory
    )
    weights = (
        hidden * gate.hidden_size + (gate.hidden_layers - 1) * gate.hidden_size**2 + gate.hidden_size * work.objectives
    )
    gate_flops = 6.0 * weights * gate.steps * gate.batch_size
    gate_held = work.prompts * hidden * 4 + work.pairs * 2 * work.objectives * 8
    gating = Stage(
        "stage 2", gate_flops, gate_flops / host_rate / 3600, gate_held, "host", fits=gate_held <= host_memory
    )
    return [features, regression, gating]


def fine_tuning(
    shape: Shape,
    work: Workload,
    hardware: Hardware,
    section: FinetuneSection,
    *,
    share: float = 0.4,
    weight_bytes: int = 2,
) -> Stage:
    """Cost of fine-tuning, which runs on one device; arguments as for `stages`. Without shared prompts, and without
    an early stop.

    Raises:
        BackboneError: if no layer would be trained.
    """
    frozen = resolve_frozen(section.frozen_layers, shape.layers, shape.all_layers or shape.layers)
    lower, upper = replace(shape, layers=frozen), replace(shape, layers=shape.layers - frozen)
    tokens, squares = work.tokens * section.share, work.squares * section.share
    of_pairs = min(1.0, 2 * work.pairs / max(work.conversations, 1))
    epochs = section.epochs * (1 - section.validation_share) + section.preference_epochs * of_pairs
    once = bool(frozen) and section.cache_states
    flops = lower.forward_flops(tokens, squares) * (1 if once else epochs)
    flops += upper.forward_flops(tokens, squares) * epochs * TRAINING_PASSES[section.method]
    hours = flops / (hardware.peak * share) / 3600
    # Full training holds float32 weights, gradients and two moments; both keep the inputs of every product.
    kept = section.batch_tokens * (6 * shape.hidden + 2 * shape.heads * shape.head_size + 3 * shape.inner)
    memory = shape.parameters * weight_bytes + kept * upper.layers * weight_bytes
    memory += upper.layers * upper.layer_weights * (16 if section.method == "full" else weight_bytes)
    return Stage(
        "fine-tuning", flops, hours, memory, "device", tokens * shape.hidden * 2 if once else 0.0,
        None if hardware.price is None else hours * hardware.price, memory <= hardware.memory,
    )  # fmt: skip


def resolve_frozen(frozen: int | float, layers: int, all_layers: int) -> int:
    """Number of frozen layers.

    Args:
        frozen: a number, or a fraction of all layers of the backbone.
        layers: that are computed.
        all_layers: and those above the one that is read.

    Raises:
        BackboneError: if no layer would be trained.
    """
    count = round(frozen * all_layers) if isinstance(frozen, float) else frozen
    if count >= layers:
        below = "" if layers == all_layers else f" below the one that is read ({all_layers} in all)"
        raise BackboneError(f"finetune.frozen_layers: found {count}, the backbone has {layers} layers{below}")
    return count


def stage_1_memory(shape: Shape, work: Workload, folds: int = 5, block_rows: int = 8192) -> float:
    """Bytes of stage 1: a float64 Gram matrix per group and fold, and a block of rows; features stay on disk."""
    d = shape.feature or shape.hidden
    return work.groups * (folds + 1) * d * d * 8 + block_rows * d * 4


def readable_bytes(count: float) -> str:
    """A size with three significant digits and its unit."""
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def readable_hours(hours: float) -> str:
    """A time with two or three significant digits and its unit."""
    if hours >= 48:
        return f"{hours / 24:.3g} days"
    if hours >= 1:
        return f"{hours:.3g} h"
    return f"{hours * 60:.3g} min" if hours >= 1 / 60 else f"{hours * 3600:.2g} s"


def fleets(device: Hardware, nodes: int = 4) -> Sequence[tuple[str, Hardware]]:
    """Named fleets: one device, a machine of eight, and a Ray cluster of such machines."""
    return [
        (f"1 x {device.name}", device),
        (f"8 x {device.name}", replace(device, devices=8)),
        (f"Ray, {nodes} machines of 8", replace(device, devices=8 * nodes)),
    ]
