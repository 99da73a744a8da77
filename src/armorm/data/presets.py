"""Presets: public data sets by name, with hub id and revision, layout, objectives, licence and size.

`revision` is a commit of the set that is known to contain these files; None (the latest) if none could be verified,
which `docs/datasets.md` marks. `rows` is the number on the set's own page, where some are rounded; loading a set gives
the exact number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from armorm.data import layouts
from armorm.data.ratings import objective_name
from armorm.data.rows import Layout
from armorm.errors import RecipeError, nearest
from armorm.objectives import RELEASED_OBJECTIVES, Direction, Objective, ScaleMap

Range = tuple[float, float]
_AnyPreset = TypeVar("_AnyPreset", bound="Preset")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A public data set.

    Attributes:
        hub_id, revision, data_dir: where it is on the hub.
        split: the split that training reads.
        layout: from its rows to ours, None if they are the same.
        licence: of the data, as the set states it.
        rows: of the split, None if unknown.
        rounded: `rows` is rounded.
        each: rated rows (or pairs) per row of the set.
    """

    hub_id: str
    revision: str | None = None
    data_dir: str | None = None
    split: str = "train"
    layout: Layout | None = None
    licence: str
    rows: int | None = None
    rounded: bool = False
    each: int = 1

    @property
    def count(self) -> int | None:
        """Approximate number of rated rows or pairs."""
        return None if self.rows is None else self.rows * self.each


@dataclass(frozen=True, kw_only=True)
class RatingPreset(Preset):
    """A public rated set.

    Attributes:
        columns: raw range of each rating column, after the layout.
        names: objective of a column if it is not `source-column`.
        neutral: columns whose direction is `neutral`.
        groups: number of sets of rows with the same rated columns, each of which needs a Gram matrix in stage 1.
    """

    columns: Mapping[str, Range]
    names: Mapping[str, str] = field(default_factory=dict)
    neutral: frozenset[str] = frozenset()
    groups: int = 1

    def objectives(self, source: str, scale_map: ScaleMap = "min_max") -> dict[str, Objective]:
        """The objective of each column, named after the source; booleans are 0 and 1 on either map."""
        made = {}
        for column, (low, high) in self.columns.items():
            direction: Direction = "neutral" if column in self.neutral else "higher"
            name = self.names.get(column) or objective_name(column, source)
            fitting: ScaleMap = "min_max" if (low, high) == (0, 1) else scale_map
            origin = source if name.startswith(source) else name.partition("-")[0]
            made[column] = Objective.rated(name, low, high, source=origin, direction=direction, scale_map=fitting)
        return made


@dataclass(frozen=True, kw_only=True)
class PreferencePreset(Preset):
    """A public set of preference pairs."""


_HELPSTEER: dict[str, Range] = dict.fromkeys(
    ("helpfulness", "correctness", "coherence", "complexity", "verbosity"), (0.0, 4.0)
)
_CODE = ("complexity", "style", "explanation", "instruction-following", "readability")
_ULTRAFEEDBACK: dict[str, Range] = {"overall_score": (1.0, 10.0)} | dict.fromkeys(
    ("instruction_following", "truthfulness", "honesty", "helpfulness"), (1.0, 5.0)
)
RATING_PRESETS: dict[str, RatingPreset] = {
    "helpsteer": RatingPreset(
        hub_id="nvidia/HelpSteer", licence="CC BY 4.0", rows=37_000, rounded=True, layout=layouts.helpsteer,
        columns=_HELPSTEER, neutral=frozenset({"verbosity"}),
    ),
    "helpsteer2": RatingPreset(
        hub_id="nvidia/HelpSteer2", revision="990b2711a36180dd19d9c94b8627844866f8982a", licence="CC BY 4.0",
        rows=20_324, layout=layouts.helpsteer, columns=_HELPSTEER, neutral=frozenset({"verbosity"}),
    ),
    "ultrafeedback": RatingPreset(
        hub_id="openbmb/UltraFeedback", licence="MIT", rows=64_000, rounded=True, each=4,
        layout=layouts.ultrafeedback, columns=_ULTRAFEEDBACK,
    ),
    "beavertails": RatingPreset(
        hub_id="PKU-Alignment/BeaverTails", revision="8401fe609d288129cc684a9b3be6a93e41cfe678", split="330k_train",
        licence="CC BY-NC 4.0", rows=301_000, rounded=True, columns={"is_safe": (0.0, 1.0)},
    ),
    "code-ultrafeedback": RatingPreset(
        hub_id="coseal/CodeUltraFeedback", revision="2f4ced783997f4dc4ef58c3eca490af04c7f1b79", licence="MIT",
        rows=10_000, each=4, layout=layouts.code_ultrafeedback, columns=dict.fromkeys(_CODE, (1.0, 5.0)),
        names={name: f"code-{name}" for name in _CODE}, groups=len(_CODE),
    ),
    "feedback-collection": RatingPreset(
        hub_id="prometheus-eval/Feedback-Collection", licence="CC BY 4.0", rows=99_952,
        layout=layouts.feedback_collection, columns={"score": (1.0, 5.0)}, names={"score": "prometheus-score"},
    ),
    "capybara": RatingPreset(
        hub_id="argilla/Capybara-Preferences-Filtered", revision="c9ce1cae33b7ab9d84b4137d93e80538d218fddf",
        licence="Apache-2.0", rows=14_811, each=2, layout=layouts.rated_pair("chosen", "rejected"),
        columns={"rating": (1.0, 5.0)}, names={"rating": "argilla-overall_quality"},
    ),
    "distilabel-math": RatingPreset(
        hub_id="argilla/distilabel-math-preference-dpo", revision="440a59870da94a4c252c8f0031e7412cd1dfe3f2",
        licence="Apache-2.0", rows=2_418, each=2,
        layout=layouts.rated_pair("chosen_response", "rejected_response", "instruction"),
        columns={"rating": (1.0, 10.0)}, names={"rating": "argilla-math"},
    ),
    "distilabel-orca": RatingPreset(
        hub_id="argilla/distilabel-intel-orca-dpo-pairs", revision="ae5268f7e02aef8cdd45615257aae898c01fe46d",
        licence="Apache-2.0", rows=12_859, each=2, layout=layouts.judged_generations,
        columns={"rating": (1.0, 10.0)}, names={"rating": "argilla-judge_lm"},
    ),
    "armorm": RatingPreset(
        hub_id="RLHFlow/ArmoRM-Multi-Objective-Data-v0.1", licence="none stated", rows=600_000, rounded=True,
        layout=layouts.mapped_ratings({o.name: (o.scale, o.offset) for o in RELEASED_OBJECTIVES if o.scale != 1}),
        columns={o.name: (o.low, o.high) for o in RELEASED_OBJECTIVES}, names={n: n for n in RELEASED_OBJECTIVES.names},
        neutral=frozenset({"helpsteer-verbosity"}), groups=11,
    ),
}  # fmt: skip

_RLHFLOW = layouts.scored_pair("chosen_score", "rejected_score")
PREFERENCE_PRESETS: dict[str, PreferencePreset] = {
    "ultrafeedback-binarized": PreferencePreset(
        hub_id="HuggingFaceH4/ultrafeedback_binarized", revision="2a3fb934ee563e5441bf211adaf5215c3fa508dd",
        split="train_prefs", licence="MIT", rows=61_135, layout=layouts.scored_pair("score_chosen", "score_rejected"),
    ),
    "ultrafeedback-cleaned": PreferencePreset(
        hub_id="argilla/ultrafeedback-binarized-preferences-cleaned",
        revision="91376df778fc031c79bf47bf69df0d611fb46387", licence="MIT", rows=60_917,
        layout=layouts.scored_pair("chosen-rating", "rejected-rating"),
    ),
    "ultrafeedback-pairs": PreferencePreset(
        hub_id="RLHFlow/UltraFeedback-preference-standard", revision="03bae668c67d5f0d127ca8298f62a6cdbdcd23d3",
        licence="none stated (UltraFeedback: MIT)", rows=340_000, rounded=True, layout=_RLHFLOW,
    ),
    "helpsteer-pairs": PreferencePreset(
        hub_id="RLHFlow/Helpsteer-preference-standard", licence="none stated (HelpSteer: CC BY 4.0)", rows=37_100,
        rounded=True, layout=_RLHFLOW,
    ),
    "helpsteer2-pairs": PreferencePreset(
        hub_id="nvidia/HelpSteer2", revision="990b2711a36180dd19d9c94b8627844866f8982a", data_dir="preference",
        licence="CC BY 4.0", rows=7_118, layout=layouts.helpsteer2_preference,
    ),
    "shp": PreferencePreset(
        hub_id="stanfordnlp/SHP", revision="ff19d325b725bce35d7b78b8c6a588c13a75befc",
        licence="none stated; Reddit's terms", rows=385_000, rounded=True, layout=layouts.shp,
    ),
    "hh-rlhf": PreferencePreset(hub_id="Anthropic/hh-rlhf", licence="MIT", rows=161_000, rounded=True),
    "safe-rlhf": PreferencePreset(
        hub_id="PKU-Alignment/PKU-SafeRLHF", revision="8b87c3304fe428df5ae84a5a00f9d3ef9e4f135e",
        licence="CC BY-NC 4.0", rows=83_400, rounded=True, layout=layouts.safe_rlhf("safer_response_id"),
    ),
    "safe-rlhf-helpful": PreferencePreset(
        hub_id="PKU-Alignment/PKU-SafeRLHF", revision="8b87c3304fe428df5ae84a5a00f9d3ef9e4f135e",
        licence="CC BY-NC 4.0", rows=83_400, rounded=True, layout=layouts.safe_rlhf("better_response_id"),
    ),
    "safe-rlhf-30k": PreferencePreset(
        hub_id="PKU-Alignment/PKU-SafeRLHF-30K", licence="CC BY-NC 4.0", rows=26_900, rounded=True,
        layout=layouts.safe_rlhf("safer_response_id"),
    ),
    "capybara-pairs": PreferencePreset(
        hub_id="argilla/Capybara-Preferences-Filtered", revision="c9ce1cae33b7ab9d84b4137d93e80538d218fddf",
        licence="Apache-2.0", rows=14_811, layout=layouts.scored_pair("chosen_rating", "rejected_rating"),
    ),
    "distilabel-math-pairs": PreferencePreset(
        hub_id="argilla/distilabel-math-preference-dpo", revision="440a59870da94a4c252c8f0031e7412cd1dfe3f2",
        licence="Apache-2.0", rows=2_418, layout=layouts.responses_apart,
    ),
    "distilabel-orca-pairs": PreferencePreset(
        hub_id="argilla/distilabel-intel-orca-dpo-pairs", revision="ae5268f7e02aef8cdd45615257aae898c01fe46d",
        licence="Apache-2.0", rows=12_859, layout=layouts.judged_pair,
    ),
    "skywork-80k": PreferencePreset(
        hub_id="Skywork/Skywork-Reward-Preference-80K-v0.2", revision="196326738b67b9c3e6aa6829cab639d8401ad385",
        licence="those of its sources", rows=77_016,
    ),
    "skywork-80k-v0.1": PreferencePreset(
        hub_id="Skywork/Skywork-Reward-Preference-80K-v0.1", licence="those of its sources", rows=81_973,
    ),
    "armorm-pairs": PreferencePreset(
        hub_id="RLHFlow/pair_data_v2_80K_wsafety", licence="none stated", rows=800_000, rounded=True, layout=_RLHFLOW,
    ),
}  # fmt: skip


def rating_preset(name: str) -> RatingPreset:
    """A preset of rated rows by name; a `RecipeError` with the nearest name for an unknown one."""
    return _preset(name, RATING_PRESETS, PREFERENCE_PRESETS, "preference pairs")


def preference_preset(name: str) -> PreferencePreset:
    """A preset of preference pairs by name; a `RecipeError` with the nearest name for an unknown one."""
    return _preset(name, PREFERENCE_PRESETS, RATING_PRESETS, "ratings")


def _preset(name: str, presets: Mapping[str, _AnyPreset], others: Mapping[str, Preset], other_kind: str) -> _AnyPreset:
    if name not in presets:
        hint = f"; it is a preset of {other_kind}" if name in others else nearest(name, presets)
        raise RecipeError(f"unknown preset {name!r}{hint}; there are {', '.join(presets)}")
    return presets[name]
