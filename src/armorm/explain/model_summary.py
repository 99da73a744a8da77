"""A reward model in a notebook: its objectives by mean weight, and what its features and scores are."""

from __future__ import annotations

from pathlib import Path

from armorm.model.configuration import ArmoRMConfig


def model_summary(name: str, config: ArmoRMConfig, *, calibrated: bool) -> str:
    """A compact table as HTML.

    Args:
        name: what the model was loaded from.
        calibrated: whether its margins have probabilities.
    """
    against = config.debiasing.get("against", ())
    notes = [
        f"response feature: {config.readout.get('pooling', 'last')}",
        f"debiased against {', '.join(against)}" if against else "",
        "calibrated" if calibrated else "",
        "steered" if config.steering else "",
    ]
    title = f"{Path(name).name or 'reward model'}: {len(config.objectives)} objectives"
    return config.objective_set.html(title, "; ".join(filter(None, notes)), config.reference.get("gating_weights"))
