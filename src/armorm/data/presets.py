"""Presets: public rated sets whose columns and scales are known, by one word in a recipe.

In:  the name of a preset.
Out: its hub id, columns and scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from armorm.data.ratings import objective_name
from armorm.errors import RecipeError, nearest
from armorm.objectives import Objective


@dataclass(frozen=True)
class RatingPreset:
    """A public rated set in the layout `prompt`, `response`, one column per attribute.

    Attributes:
        hub_id: where it is.
        split: the split that training reads.
        columns: raw range of each rating column.
        licence: of the data.
        neutral: columns of which more is not better.
    """

    hub_id: str
    split: str
    columns: Mapping[str, tuple[float, float]]
    licence: str
    neutral: frozenset[str] = frozenset()

    def objectives(self, source: str) -> dict[str, Objective]:
        """The objective of each column, named after the source."""
        return {
            column: Objective.rated(
                objective_name(column, source),
                low,
                high,
                source=source,
                direction="neutral" if column in self.neutral else "higher",
            )
            for column, (low, high) in self.columns.items()
        }


_HELPSTEER = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), (0.0, 4.0))
RATING_PRESETS: dict[str, RatingPreset] = {
    "helpsteer": RatingPreset("nvidia/HelpSteer", "train", _HELPSTEER, "CC BY 4.0", frozenset({"verbosity"})),
    "helpsteer2": RatingPreset("nvidia/HelpSteer2", "train", _HELPSTEER, "CC BY 4.0", frozenset({"verbosity"})),
    "beavertails": RatingPreset("PKU-Alignment/BeaverTails", "330k_train", {"is_safe": (0.0, 1.0)}, "CC BY-NC 4.0"),
}


def rating_preset(name: str) -> RatingPreset:
    """A preset by name.

    Raises:
        RecipeError: for an unknown name, with the nearest right one.
    """
    if name not in RATING_PRESETS:
        raise RecipeError(
            f"unknown preset {name!r}{nearest(name, RATING_PRESETS)}; there are {', '.join(RATING_PRESETS)}"
        )
    return RATING_PRESETS[name]
