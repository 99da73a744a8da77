"""Backbones with integer weights (torchao), under heads that stay as they are, and how far that moves the scores.

Weights only: int8 with a scale for each output, int4 with one for each group of 32 inputs. Activations keep their
dtype. torchao's packed layouts of int4 need a GPU; the one used here runs everywhere, but stores a weight per byte, as
int8 does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file

from armorm.errors import MissingExtraError
from armorm.files import files_together
from armorm.model.export import make_readable
from armorm.model.modeling import ArmoRMForSequenceClassification

Bits = Literal["int8", "int4"]
_GROUP = 32


def quantization(bits: Bits) -> Any:
    """The `quantization_config` of transformers.

    Raises:
        MissingExtraError: without torchao.
    """
    try:
        import torchao.quantization as ao
    except ImportError:
        raise MissingExtraError("quantized weights need torchao: pip install 'armorm[quantize]'") from None
    import torch
    from transformers import TorchAoConfig

    if bits == "int8":
        return TorchAoConfig(ao.Int8WeightOnlyConfig())
    four: Any = getattr(torch, "int4")  # noqa: B009 (torch's stubs do not have it)
    return TorchAoConfig(ao.IntxWeightOnlyConfig(weight_dtype=four, granularity=ao.PerGroup(_GROUP)))


def quantized_layers(model: ArmoRMForSequenceClassification) -> int:
    """Number of the backbone's linear layers with quantized weights."""
    import torch

    layers = (module for module in model.model.modules() if isinstance(module, torch.nn.Linear))
    return sum(type(layer.weight) is not torch.nn.Parameter for layer in layers)


@dataclass(frozen=True)
class ScoreDrift:
    """How far scores of n rows moved, in standard deviations of the scores before."""

    rows: int
    root_mean_square: float
    largest: float
    pairs: int  # of rows of one prompt, or of any two rows where no prompt has two
    flipped: float  # share of the pairs whose better row is another one

    @classmethod
    def between(cls, before: np.ndarray, after: np.ndarray, prompts: Sequence[str]) -> ScoreDrift:
        """The drift of scores (n,) float; `prompts` (n,) tells the prompts apart. Expects at least two rows."""
        deviation = float(before.std()) or 1.0
        moved = np.abs(after.astype(np.float64) - before) / deviation
        one, other = np.triu_indices(len(before), 1)
        same = np.array(prompts)[one] == np.array(prompts)[other]
        if same.any():
            one, other = one[same], other[same]
        flipped = np.sign(before[one] - before[other]) != np.sign(after[one] - after[other])
        return cls(len(before), float(np.sqrt((moved**2).mean())), float(moved.max()), len(one), float(flipped.mean()))


def save_quantized(model: ArmoRMForSequenceClassification, tokenizer: Any, folder: Path) -> None:
    """Write a model that was loaded with `quantization`; it is read again by any loader, with torchao installed."""
    model.config.backbone_source.pop("referenced", None)
    with files_together(folder) as temporary:
        model.save_pretrained(temporary)
        for path in temporary.glob("*.safetensors"):
            _keep_quantized_names(path)
        tokenizer.save_pretrained(temporary)
        make_readable(temporary)


def _keep_quantized_names(path: Path) -> None:
    """Leave tensors without a module (the transform, ...) out of torchao's list, from which it cannot read them."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if "tensor_names" not in metadata:
        return
    names = [name for name in json.loads(metadata["tensor_names"]) if "." in name]
    kept = {name: metadata[name] for name in names} | {"format": "pt", "tensor_names": json.dumps(names)}
    save_file(tensors, path, metadata=kept)
