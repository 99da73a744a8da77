"""LoRA adapters: low-rank changes of a decoder's matrices, trained on frozen weights and merged when it is loaded.

    W = W0 + (alpha / rank) B A        A (rank, in), B (out, rank) float32; the sum in float32, W in the dtype of W0

Training multiplies by W, not by W0, A and B one after another: the weights in training are then exactly those that are
served, rounding included, and a step needs two products per matrix (forward, and the gradient of the input) where full
training needs three. A and B get their gradients from products with `rank` columns.

`adapters.safetensors` holds `NAME.lora_A.weight` and `NAME.lora_B.weight` for each adapted matrix `NAME.weight`. A
model's folder that has no backbone of its own has this file beside the heads, and `adapters` in its config: rank,
alpha, and the hash of the weights that the adapters were trained on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from armorm.errors import BackboneError, CheckpointError, nearest
from armorm.files import read_arrays, write_arrays

FILE = "adapters.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Adapters:
    """Trained adapters of one decoder.

    Attributes:
        tensors: A and B of each adapted matrix by their names in the file, float32.
        alpha: scale; B A is multiplied by alpha / rank.
        backbone: hash of the decoder's weights, `Backbone.fingerprint_parts["weights"]` in the dtype of the file.
    """

    tensors: Mapping[str, Tensor]
    alpha: float
    backbone: str = ""

    @property
    def rank(self) -> int:
        """Columns of each B."""
        return next((tensor.shape[0] for name, tensor in self.tensors.items() if name.endswith(_A)), 0)

    def settings(self) -> dict[str, Any]:
        """As a model's config holds them, in the field `adapters`."""
        return {"rank": self.rank, "alpha": self.alpha, "backbone": self.backbone}

    @torch.no_grad()
    def merge(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        """Add the adapters to a decoder's weights, in place.

        Args:
            state: tensors by name: of a file, or `model.state_dict()`, whose tensors are those of the model.
            prefix: of the decoder's names in `state`, such as "model." in a reward model.

        Raises:
            BackboneError: for a matrix that the decoder does not have, or has in another shape; nothing is then merged.
        """
        parts = []
        for name in (key.removesuffix(_A) for key in self.tensors if key.endswith(_A)):
            weight = state.get(f"{prefix}{name}.weight")
            a, b = self.tensors[name + _A], self.tensors.get(name + _B)
            if weight is None:
                known = [key.removesuffix(".weight").removeprefix(prefix) for key in state]
                raise BackboneError(f"adapters: the backbone has no matrix {name!r}{nearest(name, known)}")
            if b is None or b.shape[1] != a.shape[0] or (b.shape[0], a.shape[1]) != tuple(weight.shape):
                found = [list(part.shape) for part in (b, a) if part is not None]
                raise BackboneError(f"adapters: {name} has shapes {found}, expected factors of {list(weight.shape)}")
            parts.append((weight, a, b))
        for weight, a, b in parts:
            a, b = a.to(weight.device), b.to(weight.device)
            weight.copy_(merged_weight(weight, a, b, self.alpha / self.rank))

    def write(self, folder: Path) -> None:
        """Write `adapters.safetensors`."""
        arrays = {name: tensor.float().cpu().numpy() for name, tensor in self.tensors.items()}
        write_arrays(folder / FILE, arrays, {"alpha": repr(self.alpha), "backbone": self.backbone})

    @classmethod
    def read(cls, folder: str | Path) -> Adapters:
        """The adapters in a folder.

        Raises:
            CheckpointError: for a missing or damaged file.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / FILE
        if not path.is_file():
            raise CheckpointError(f"{folder}: no {FILE}, expected the adapters of a fine-tuned backbone")
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
            tensors = {name: torch.from_numpy(array) for name, array in read_arrays(path).items()}
            return cls(tensors, float(metadata["alpha"]), metadata["backbone"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged adapters ({error})") from None


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W0 + scale * B A in the dtype of W0 (out, in), for A (rank, in) and B (out, rank) float32."""
    return torch.addmm(weight.float(), b, a, alpha=scale).to(weight.dtype)


class LoraLinear(nn.Module):
    """A frozen linear layer with an adapter; B starts at zero.

    Args:
        dropout: share of the adapter's ranks that are left out, drawn anew in each forward pass of training.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.scale, self.dropout = alpha / rank, dropout
        with torch.device(linear.weight.device):
            self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
            self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, states: Tensor) -> Tensor:
        a: Tensor = self.lora_A
        if self.training and self.dropout:
            a = a * functional.dropout(a.new_ones(len(a), 1), self.dropout)
        product: Tensor = _AdaptedProduct.apply(
            states, self.linear.weight, self.linear.bias, a, self.lora_B, self.scale
        )
        return product


class _AdaptedProduct(torch.autograd.Function):
    """x W^T + bias, with gradients of x, A and B; none of W0 and the bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        merged = merged_weight(weight, a, b, scale)
        ctx.save_for_backward(x, merged, a, b)
        ctx.scale = scale
        return functional.linear(x, merged, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, a, b = ctx.saved_tensors
        rows, gradients = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        of_x = gradient @ merged if ctx.needs_input_grad[0] else None
        of_a = (gradients @ b.to(x.dtype)).T @ rows
        of_b = ((rows @ a.to(x.dtype).T).T @ gradients).T
        return of_x, None, None, of_a.float() * ctx.scale, of_b.float() * ctx.scale, None


def add_adapters(modules: Iterable[nn.Module], rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Replace every linear layer inside the modules by one with an adapter.

    Raises:
        BackboneError: if there is none.
    """
    found = [
        (parent, name, child)
        for module in modules
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    if not found:
        raise BackboneError("finetune.method lora: the trained layers have no torch.nn.Linear; expected method: full")
    for parent, name, child in found:
        setattr(parent, name, LoraLinear(child, rank, alpha, dropout))


def adapters_of(model: nn.Module, backbone: str = "") -> Adapters:
    """The adapters inside a decoder that `add_adapters` has changed."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    tensors = {name + _A: layer.lora_A.detach().cpu().clone() for name, layer in layers.items()}
    tensors |= {name + _B: layer.lora_B.detach().cpu().clone() for name, layer in layers.items()}
    first = next(iter(layers.values()))
    return Adapters(tensors, first.scale * len(first.lora_A), backbone)
