"""Steering: explicit changes to how the objectives are weighted, as validated settings of a config or a YAML policy.

    weights = pinned + (1 - sum of pinned) * ((1 - blend) * gate + blend * fixed)          each row sums to 1
    gate    = softmax(logits + log factors), over the objectives that are neither dropped nor pinned
    T'      = D + debias_strength * (T - D)      D: the diagonal of T, but 1 for bias objectives

Steering acts on the gating weights, before the transform; dropped weight is redistributed in proportion. An objective
that others are debiased against cannot be dropped: its (negative) coefficient is what removes the bias.
`debias_strength` scales the transform instead: 0 is the model before debiasing, 1 as trained. All changes are relative
to the gate as trained. The model applies them (`steering_terms` in `armorm.model.remote_code`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from armorm.errors import ArmormError, nearest, read_fault, shown
from armorm.files import read_text, read_yaml
from armorm.objectives import ObjectiveSet

KEYS = ("multiply", "drop", "pin", "blend", "debias_strength")
_WHOLE = 1e-9  # tolerance for shares that sum to 1
_BEGIN, _END = "<!-- steering -->", "<!-- end of steering -->"


class SteeringError(ArmormError, ValueError):
    """Invalid steering."""


def steering_settings(
    objectives: ObjectiveSet,
    multiply: Mapping[str, float] | None = None,
    drop: str | Sequence[str] = (),
    biases: Sequence[str] = (),
    *,
    pin: Mapping[str, float] | None = None,
    blend: Mapping[str, Any] | None = None,
    debias_strength: float = 1.0,
) -> dict[str, Any]:
    """Validated settings for a config: `{"multiply": {name: factor}, "drop": [name]}`, and if given
    `"pin": {name: share}`, `"blend": {"share", "weights": {name: weight}}`, `"debias_strength"`. Empty for no change.

    Args:
        multiply: factor of each named gating weight, at least 0; 0 drops.
        drop: objectives whose weight is redistributed to the others.
        biases: objectives that others are debiased against.
        pin: fixed share of the total weight, 0 to 1, of each named objective; the others share the rest.
        blend: `share` (0 to 1) of the rest that is distributed in proportion to `weights`, by default equally.
        debias_strength: 0 removes the debiasing, 1 keeps it, 2 doubles every penalty.

    Raises:
        SteeringError: for a number out of range, for dropping a bias or every objective, for conflicting changes to
            one objective, for a debiasing strength of a model that is not debiased.
        ObjectiveError: for an unknown objective.
    """
    multiply, pin = dict(multiply or {}), dict(pin or {})
    named = [drop] if isinstance(drop, str) else list(drop)
    for name in [*multiply, *named, *pin]:
        objectives.position(name)
    for name, factor in multiply.items():
        if not _is_at_least_zero(factor):
            raise SteeringError(f"objective {name}: factor {shown(factor)}, expected a finite number >= 0")
    for name, share in pin.items():
        if not (_is_at_least_zero(share) and share <= 1):
            raise SteeringError(f"objective {name}: pinned to {shown(share)}, expected a share from 0 to 1")
        if name in named or multiply.get(name, 1) != 1:
            raise SteeringError(f"objective {name} is both pinned and {'dropped' if name in named else 'multiplied'}")
    absent = {name for values in (multiply, pin) for name, value in values.items() if value == 0}
    dropped = [name for name in objectives.names if name in named or name in absent]
    for name in dropped:
        if name in biases:
            raise SteeringError(
                f"objective {name} cannot be dropped: others are debiased against it, and the bias would return"
            )
    if len(dropped) == len(objectives):
        raise SteeringError("every objective is dropped, expected at least one to remain")
    factors = {name: float(factor) for name, factor in multiply.items() if name not in dropped and factor != 1}
    pinned = {name: float(share) for name, share in pin.items() if share > 0}
    free = [name for name in objectives.names if name not in dropped and name not in pinned]
    total = math.fsum(pinned.values())
    if total > 1 + _WHOLE:
        raise SteeringError(f"pinned shares sum to {total:g}, expected at most 1")
    if pinned and not free and abs(total - 1) > _WHOLE:
        raise SteeringError(f"pinned shares sum to {total:g} and no other objective remains, expected a sum of 1")
    settings: dict[str, Any] = {"multiply": factors, "drop": dropped}
    if pinned:
        settings["pin"] = pinned
    mixed = _blend(objectives, blend, free, dropped, pinned) if blend else None
    if mixed:
        settings["blend"] = mixed
    if not _is_at_least_zero(debias_strength):
        raise SteeringError(f"debias_strength {shown(debias_strength)}, expected a finite number >= 0")
    if debias_strength != 1:
        if not biases:
            raise SteeringError("debias_strength: this model is not debiased, so there is nothing to scale")
        settings["debias_strength"] = float(debias_strength)
    return settings if any(settings.values()) or "debias_strength" in settings else {}


def _blend(
    objectives: ObjectiveSet,
    blend: Mapping[str, Any],
    free: Sequence[str],
    dropped: Sequence[str],
    pinned: Mapping[str, float],
) -> dict[str, Any] | None:
    unknown = [str(key) for key in blend if key not in ("share", "weights")]
    if unknown:
        raise SteeringError(f"blend.{unknown[0]}: unknown key{nearest(unknown[0], ('share', 'weights'))}")
    share: Any = blend.get("share")
    weights: Mapping[str, float] = blend.get("weights") or {}
    if not (_is_at_least_zero(share) and share <= 1):
        raise SteeringError(f"blend.share: found {shown(share)}, expected a share from 0 to 1")
    if share == 0 or not free:
        return None
    if not weights:
        return {"share": float(share), "weights": dict.fromkeys(free, 1.0)}
    for name, weight in weights.items():
        objectives.position(name)
        if not _is_at_least_zero(weight):
            raise SteeringError(f"blend.weights.{name}: found {shown(weight)}, expected a finite number >= 0")
        if weight > 0 and (name in dropped or name in pinned):
            raise SteeringError(f"objective {name} is both blended and {'dropped' if name in dropped else 'pinned'}")
    kept = {name: float(weight) for name, weight in weights.items() if weight > 0}
    if not kept:
        raise SteeringError("blend.weights: every weight is 0, expected at least one > 0")
    return {"share": float(share), "weights": kept}


def _is_at_least_zero(value: Any) -> bool:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def read_policy(path: str | Path) -> dict[str, Any]:
    """Arguments of `ArmoRM.steer` from a YAML file; `steer` checks the names of objectives.

    Raises:
        SteeringError: for a file that cannot be read, an unknown key (with the nearest known one), or a value of the
            wrong type.
    """
    try:
        values = read_yaml(read_text(Path(path)))
    except (OSError, UnicodeError) as error:
        raise SteeringError(f"{path}: {read_fault(path, error)}") from None
    except yaml.YAMLError as error:
        raise SteeringError(f"{path}: not valid YAML: {error}") from None
    return checked_policy(values, str(path))


def checked_policy(values: Any, name: str = "policy") -> dict[str, Any]:
    """Arguments of `ArmoRM.steer` from plain values, as `read_policy`; `name` is used in error messages."""
    if not isinstance(values, Mapping):
        raise SteeringError(f"{name}: found {shown(values)}, expected keys and values: {', '.join(KEYS)}")
    for key in values:
        if key not in KEYS:
            raise SteeringError(f"{name}, {key}: unknown key{nearest(str(key), KEYS)}; known keys: {', '.join(KEYS)}")
    policy: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
    for key in ("multiply", "pin"):
        if key in policy:
            policy[key] = _numbers(policy[key], f"{name}, {key}")
    if "drop" in policy:
        dropped = [policy["drop"]] if isinstance(policy["drop"], str) else policy["drop"]
        if not (isinstance(dropped, list) and all(isinstance(entry, str) for entry in dropped)):
            raise SteeringError(f"{name}, drop: found {shown(dropped)}, expected a list of objectives")
        policy["drop"] = dropped
    if "blend" in policy:
        if not isinstance(policy["blend"], Mapping):
            raise SteeringError(f"{name}, blend: found {shown(policy['blend'])}, expected share and weights")
        blend = dict(policy["blend"])
        if blend.get("weights") is not None:
            blend["weights"] = _numbers(blend["weights"], f"{name}, blend.weights")
        policy["blend"] = blend
    return policy


def _numbers(values: Any, place: str) -> dict[str, float]:
    if not isinstance(values, Mapping):
        raise SteeringError(f"{place}: found {shown(values)}, expected a number for each objective")
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise SteeringError(f"{place}.{key}: found {shown(value)}, expected a number")
    return {str(key): float(value) for key, value in values.items()}


def to_policy(settings: Mapping[str, Any]) -> str:
    """Settings as a YAML policy, without keys that change nothing."""
    kept = {key: settings[key] for key in KEYS if settings.get(key) not in (None, {}, [])}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True) if kept else ""


def sentences(settings: Mapping[str, Any]) -> list[str]:
    """Settings in words, one sentence for each change."""
    found = [f"{name} is weighted {factor:g} times" for name, factor in settings.get("multiply", {}).items()]
    found += [f"{name} is dropped" for name in settings.get("drop", ())]
    found += [
        f"{name} has {share:.4g} of the weight on every prompt" for name, share in settings.get("pin", {}).items()
    ]
    blend = settings.get("blend")
    if blend:
        whole = math.fsum(blend["weights"].values())
        named = ", ".join(f"{name} {weight / whole:.3g}" for name, weight in blend["weights"].items())
        rest = "remaining weight" if settings.get("pin") else "weight"
        found.append(f"{blend['share']:.4g} of the {rest} is fixed on every prompt: {named}")
    if "debias_strength" in settings:
        found.append(f"debiasing is {settings['debias_strength']:g} times as strong as trained")
    return found


def without_model_index(card: str) -> str:
    """A model card without the results that the Hub shows: they are of the model as trained, not as steered."""
    head = re.match(r"---\n.*?^---\n", card, flags=re.DOTALL | re.MULTILINE)
    if head is None:
        return card
    return re.sub(r"^model-index:\n(?:[ -] .*\n)*", "", head[0], flags=re.MULTILINE) + card[head.end() :]


def with_steering_note(card: str, settings: Mapping[str, Any], figures: Sequence[str] = ()) -> str:
    """A model card with a note on the steering below its title, in place of an earlier note.

    Args:
        figures: lines of Markdown on the effect of the steering.
    """
    card = re.sub(rf"\n?{_BEGIN}.*?{_END}\n", "", card, flags=re.DOTALL)
    if not settings:
        return card
    changes = "".join(f"- {sentence}\n" for sentence in sentences(settings))
    effect = "".join(f"{line}\n" for line in figures)
    note = (
        f"\n{_BEGIN}\n**This model is steered**: it weights the objectives differently from how it was trained.\n\n"
        + changes
        + (f"\n{effect}" if figures else "")
        + f"\nAll other numbers of this card are of the model as trained.\n{_END}\n"
    )
    title = re.search(r"^# .*\n", card, flags=re.MULTILINE)
    place = title.end() if title else 0
    return card[:place] + note + card[place:]
