"""Steering: explicit changes to how the objectives are weighed.

In:  factors, objectives to drop, pinned shares, fixed weights to blend in, a strength of debiasing; or a YAML
     policy that says the same.
Out: settings as they stand in a config; from them a `Weighing`, which the model applies; sentences about them.

    weights = pinned + (1 - sum of pinned) * ((1 - blend) * gate + blend * fixed)          each row sums to 1
    gate    = softmax(logits + log factors), over the objectives that are neither dropped nor pinned
    T'      = I + debias_strength * (T - I)

Steering acts on the gating weights, before the transform; weight that is dropped is shared out among the
others in proportion. An objective that others are debiased against cannot be dropped: its (negative)
coefficient is what takes the bias out. `debias_strength` scales the transform instead: 0 is the model
before debiasing, 1 the model as trained. All of it counts from the gate as trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from armorm.errors import ArmormError, nearest, shown
from armorm.files import read_yaml
from armorm.objectives import ObjectiveSet

KEYS = ("multiply", "drop", "pin", "blend", "debias_strength")
_WHOLE = 1e-9  # how near to 1 shares must come to be the whole
_BEGIN, _END = "<!-- steering -->", "<!-- end of steering -->"


class SteeringError(ArmormError, ValueError):
    """A change to the weighing that makes no sense."""


class Weighing(NamedTuple):
    """What a model applies: weights = fixed + gate_share * softmax(logits + log factors).

    Attributes:
        factors: (k,) of each gating weight, or None for the gate as trained.
        fixed: (k,) weights that no prompt changes, or None for none; they sum to 1 - gate_share.
        gate_share: weight that the gate shares out, 0 to 1.
        debias_strength: factor of T - I, at least 0.
    """

    factors: list[float] | None = None
    fixed: list[float] | None = None
    gate_share: float = 1.0
    debias_strength: float = 1.0


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
    """Validated settings, as they stand in a config: `{"multiply": {name: factor}, "drop": [name]}`, and where given
    `"pin": {name: share}`, `"blend": {"share", "weights": {name: weight}}`, `"debias_strength"`. Empty for no change.

    Args:
        multiply: factor of each named gating weight, at least 0; 0 drops.
        drop: objectives whose weight is shared out among the others.
        biases: objectives that others are debiased against.
        pin: fixed share of the whole weight, 0 to 1, of each named objective; the others share the rest.
        blend: `share` (0 to 1) of the rest that goes by `weights`, in proportion; without `weights` by equal ones.
        debias_strength: 0 takes the debiasing back, 1 leaves it, 2 doubles every penalty.

    Raises:
        SteeringError: for a number out of its range, for dropping a bias, for dropping everything, for an objective
            that is asked for in two ways, for a strength of debiasing where nothing is debiased.
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
            raise SteeringError(f"objective {name} is pinned, and {'dropped' if name in named else 'multiplied'} too")
    absent = {name for values in (multiply, pin) for name, value in values.items() if value == 0}
    dropped = [name for name in objectives.names if name in named or name in absent]
    for name in dropped:
        if name in biases:
            raise SteeringError(
                f"objective {name} cannot be dropped: others are debiased against it, and the bias would come back"
            )
    if len(dropped) == len(objectives):
        raise SteeringError("every objective is dropped, expected at least one to remain")
    factors = {name: float(factor) for name, factor in multiply.items() if name not in dropped and factor != 1}
    pinned = {name: float(share) for name, share in pin.items() if share > 0}
    free = [name for name in objectives.names if name not in dropped and name not in pinned]
    total = math.fsum(pinned.values())
    if total > 1 + _WHOLE:
        raise SteeringError(f"pinned shares come to {total:g}, expected at most 1")
    if pinned and not free and abs(total - 1) > _WHOLE:
        raise SteeringError(f"pinned shares come to {total:g} and nothing else is left, expected 1 in all")
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
            raise SteeringError(f"objective {name} is blended in, and {'dropped' if name in dropped else 'pinned'} too")
    kept = {name: float(weight) for name, weight in weights.items() if weight > 0}
    if not kept:
        raise SteeringError("blend.weights: every weight is 0, expected at least one above it")
    return {"share": float(share), "weights": kept}


def _is_at_least_zero(value: Any) -> bool:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def steering_factors(objectives: ObjectiveSet, settings: Mapping[str, Any]) -> np.ndarray:
    """Factor (k,) float64 of each gating weight; ones where nothing is steered, zeros for what is dropped or pinned."""
    factors = np.ones(len(objectives))
    for name, factor in settings.get("multiply", {}).items():
        factors[objectives.position(name)] = factor
    for name in [*settings.get("drop", ()), *settings.get("pin", {})]:
        factors[objectives.position(name)] = 0.0
    return factors


def weighing(objectives: ObjectiveSet, settings: Mapping[str, Any]) -> Weighing:
    """What a model applies for settings that were validated."""
    fixed = np.zeros(len(objectives))
    for name, share in settings.get("pin", {}).items():
        fixed[objectives.position(name)] = share
    gate_share = 1.0 - math.fsum(fixed)
    if gate_share <= _WHOLE:
        fixed, gate_share = fixed / fixed.sum(), 0.0
    blend = settings.get("blend")
    if blend and gate_share:
        whole = math.fsum(blend["weights"].values())
        for name, weight in blend["weights"].items():
            fixed[objectives.position(name)] += gate_share * blend["share"] * weight / whole
        gate_share *= 1.0 - blend["share"]
    factors = steering_factors(objectives, settings)
    return Weighing(
        factors=factors.tolist() if gate_share and (factors != 1).any() else None,
        fixed=fixed.tolist() if fixed.any() else None,
        gate_share=gate_share,
        debias_strength=float(settings.get("debias_strength", 1.0)),
    )


def read_policy(path: str | Path) -> dict[str, Any]:
    """The arguments of `ArmoRM.steer` in a YAML file; names of objectives are checked by `steer`.

    Raises:
        SteeringError: for a file that cannot be read, an unknown key (with the nearest right one), or a value of
            another kind than its key holds.
    """
    try:
        values = read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SteeringError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise SteeringError(f"{path}: not valid YAML: {error}") from None
    return checked_policy(values, str(path))


def checked_policy(values: Any, name: str = "policy") -> dict[str, Any]:
    """The arguments of `ArmoRM.steer` in plain values; as `read_policy`.

    Args:
        name: what faults call it.
    """
    if not isinstance(values, Mapping):
        raise SteeringError(f"{name}: found {shown(values)}, expected keys and values: {', '.join(KEYS)}")
    for key in values:
        if key not in KEYS:
            raise SteeringError(f"{name}, {key}: unknown key{nearest(str(key), KEYS)}; there are {', '.join(KEYS)}")
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
    """Settings as the text of a YAML policy, without what they leave as it is."""
    kept = {key: settings[key] for key in KEYS if settings.get(key) not in (None, {}, [])}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True) if kept else ""


def sentences(settings: Mapping[str, Any]) -> list[str]:
    """What settings do, for a person; empty for none."""
    said = [f"{name} counts {factor:g} times" for name, factor in settings.get("multiply", {}).items()]
    said += [f"{name} is dropped" for name in settings.get("drop", ())]
    said += [f"{name} has {share:.4g} of the weight on every prompt" for name, share in settings.get("pin", {}).items()]
    blend = settings.get("blend")
    if blend:
        whole = math.fsum(blend["weights"].values())
        named = ", ".join(f"{name} {weight / whole:.3g}" for name, weight in blend["weights"].items())
        rest = " of what is left" if settings.get("pin") else " of the weight"
        said.append(f"{blend['share']:.4g}{rest} is shared out alike on every prompt: {named}")
    if "debias_strength" in settings:
        said.append(f"debiasing has {settings['debias_strength']:g} times its trained strength")
    return said


def with_steering_note(card: str, settings: Mapping[str, Any], figures: Sequence[str] = ()) -> str:
    """A model card that says how the model is steered, below its title; an earlier note gives way.

    Args:
        figures: lines of Markdown about what the steering does.
    """
    card = re.sub(rf"\n?{_BEGIN}.*?{_END}\n", "", card, flags=re.DOTALL)
    if not settings:
        return card
    said = "".join(f"- {sentence}\n" for sentence in sentences(settings))
    shown_figures = "".join(f"{line}\n" for line in figures)
    note = (
        f"\n{_BEGIN}\n**This model is steered**: it weighs the objectives otherwise than it was trained to.\n\n{said}"
        + (f"\n{shown_figures}" if figures else "")
        + "\nAll other figures of this card are those of the model as trained.\n"
        + f"{_END}\n"
    )
    title = re.search(r"^# .*\n", card, flags=re.MULTILINE)
    place = title.end() if title else 0
    return card[:place] + note + card[place:]
