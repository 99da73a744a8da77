"""Calibration of a finished model on preference pairs: by which factor are its score margins logits?

For any model with scores: one of this library, the released checkpoint, a sequence classifier. The fit is that of
`armorm.heads.calibration`; it changes no score. Pairs of prompts that the model was trained on are left out, as far as
they are known; those that chose its hyperparameters should not be given.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from armorm.data.sources import find_sources, places_of
from armorm.errors import DataError
from armorm.evaluation.benchmarks import find_benchmark
from armorm.evaluation.examples import LabelledPairs, fingerprint
from armorm.evaluation.results import seen_in_training
from armorm.evaluation.runner import distinct, leave_out_seen, load_examples, score_once
from armorm.evaluation.scorers import ArmoRMScorer, ClassifierScorer, load_scorer
from armorm.heads.calibration import Calibration, fit_scale, prompt_capped
from armorm.heads.gate_training import GateSettings

MIN_PROMPTS = 50


def calibrate(
    model: Any,
    data: Any,
    *,
    split: str | None = None,
    limit: int | None = None,
    strict: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> tuple[Calibration, dict[str, Any]]:
    """Fit the scale of a model's margins.

    Args:
        model: as of `armorm.evaluation.runner.evaluate`.
        data: files, folders or hub ids of preference pairs; of rows with a `split` only those of the test split.
        split, limit, strict: as of `evaluate`.

    Returns:
        the calibration, whose `scale` is the factor of the margins; what the config of the model gets.

    Raises:
        DataError: for faults in the data, or fewer than `MIN_PROMPTS` prompts.
    """
    benchmark = find_benchmark("pairs")
    sources = find_sources(places_of(data), (), (), split)
    loaded = load_examples(benchmark, sources, limit, strict=strict)
    scorer = load_scorer(model, dtype=dtype, device=device)
    seen: dict[str, Any] = {}
    if isinstance(scorer, ArmoRMScorer):
        loaded, seen = leave_out_seen(loaded, scorer.rm.seen)
    examples, items = loaded.examples, [example.item for example in loaded.examples]
    unique, rows = distinct(examples)
    pairs = LabelledPairs.of(items, rows)
    margins = pairs.difference(score_once(scorer, unique, None).scores)
    known = np.flatnonzero(np.isfinite(margins))
    prompts = np.array([items[int(item)].prompt for item in pairs.item[known]])
    if len(set(prompts)) < MIN_PROMPTS:
        known_to_it = f" ({seen_in_training(seen)})" if seen else ""
        raise DataError(
            f"found scored pairs of {len(set(prompts))} prompts, expected at least {MIN_PROMPTS}{known_to_it}",
            file=sources[0].location.name,
        )
    weights = prompt_capped(pairs.weight[known], prompts, GateSettings().prompt_cap)
    found = fit_scale(margins[known], weights, prompts)
    settings = found.to_dict() | {"margin_scale": found.scale, "sources": [source.location.name for source in sources]}
    return found, settings | {"fingerprint": fingerprint(items)} | ({"seen": seen} if seen else {})


def save_calibrated(model: str, settings: dict[str, Any], folder: Path) -> None:
    """Write a model with the calibration in its config: `calibration`, or `armorm_calibration` of a classifier.

    Weights are written as they are stored, whatever dtype the calibration was computed in.
    """
    scorer = load_scorer(model, dtype="weights", device="cpu")
    if isinstance(scorer, ArmoRMScorer):
        config = copy.deepcopy(scorer.rm.model.config)
        config.calibration = settings
        calibrated = copy.copy(scorer.rm)
        calibrated.model = scorer.rm.model.with_config(config)
        calibrated.save_pretrained(folder)
    else:
        assert isinstance(scorer, ClassifierScorer)
        scorer.model.config.armorm_calibration = settings
        scorer.save_pretrained(folder)
    card = Path(model) / "README.md"
    if card.is_file() and not (folder / card.name).exists():
        shutil.copyfile(card, folder / card.name)
