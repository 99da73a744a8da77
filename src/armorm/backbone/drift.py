"""How far other weights of `armorm-small` are from the true ones, on reference rows inside the package.

Features of the last token after two layers, in float32, were stored with the true weights
(`python tools/embed_models.py reference`). Other weights of the same model (the hub's bfloat16) give others, and heads
that were trained on the true ones give other scores.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from armorm.backbone.decoder import Backbone
from armorm.backbone.locate import SMALL
from armorm.conversation import Conversation
from armorm.errors import BackboneError
from armorm.files import embedded_file, read_arrays

LAYERS = (18, 30)


@dataclass(frozen=True)
class FeatureDrift:
    """Distance of features from the true ones, relative to their norm, after a layer.

    Attributes:
        layer: as in `hidden_states`.
        mean, largest: over the reference rows; 0 for the true weights.
    """

    layer: int
    mean: float
    largest: float


def reference_rows() -> list[Conversation]:
    """The reference conversations, of this project's own text."""
    rows = json.loads(_file("reference.json").read_text(encoding="utf-8"))
    return [Conversation.from_messages(messages) for messages in rows]


def reference_features(name: str) -> dict[int, np.ndarray]:
    """Features (n, d) float32 of the reference rows by a backbone, after each of `LAYERS`."""
    found = {}
    for layer in LAYERS:
        backbone = Backbone.load(name, dtype="float32", device="cpu", layer=layer)
        encoded = backbone.template.encode(reference_rows())
        found[layer] = np.concatenate([backbone.features([row])[1] for row in encoded])
    return found


def feature_drift(name: str) -> list[FeatureDrift]:
    """Drift of a backbone's features from those of the true `armorm-small`.

    Raises:
        BackboneError: for a backbone of another shape.
    """
    expected = read_arrays(_file("reference.safetensors"))
    drifts = []
    for layer, features in reference_features(name).items():
        true = expected[f"layer_{layer}"]
        if features.shape != true.shape:
            raise BackboneError(
                f"backbone {name}: features of size {features.shape[1]}, expected {true.shape[1]}: weights of {SMALL}"
            )
        distance = np.linalg.norm(features - true, axis=1) / np.linalg.norm(true, axis=1)
        drifts.append(FeatureDrift(layer, float(distance.mean()), float(distance.max())))
    return drifts


def _file(name: str) -> Path:
    return embedded_file(SMALL, name)
