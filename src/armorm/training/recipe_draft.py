"""Draft of a recipe from inspected files of ratings and pairs: YAML with comments that can be trained on unchanged.

Without a file of pairs, responses to one prompt with different ratings are used as pairs; where these are too few, the
gate weights the objectives by their reliability, whatever the prompt (`too_few_pairs`). Response length is a measured
objective that all others are debiased against, since people and models alike rate length. Small sets get a small gate.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

from armorm.data.inspection import Inspection, ScaleGuess
from armorm.data.ratings import objective_name
from armorm.errors import DataError
from armorm.training.dataset import PAIRS_FOR_GATE

_SMALL = 20_000  # rows
_PAIR_MARGIN = 0.25  # minimum difference of two ratings for a pair, as a share of the scale

# Layer and pooling of backbones that were probed (docs/backbones.md); others are read as in the paper.
READOUTS = {"armorm-small": "layer: 18, pooling: last+mean, "}


def draft_recipe(sets: Sequence[Inspection], name: str, backbone: str, *, pairs_from_ratings: bool = True) -> str:
    """The text of a recipe for these files.

    Args:
        pairs_from_ratings: if there is no file of pairs, make pairs of responses to one prompt.

    Raises:
        DataError: if nothing is rated.
    """
    rated = [found for found in sets if found.kind == "ratings"]
    pairs = [found for found in sets if found.kind == "pairs"]
    if not any(found.guesses for found in rated):
        why = "".join(found.why_unrated for found in rated)
        raise DataError(f"no file has a column of ratings{why}; expected at least one", file=sets[0].location.name)
    from_ratings = not pairs and pairs_from_ratings and any(found.several and found.guesses for found in rated)
    sources, readout = _sources(sets), READOUTS.get(backbone, "")
    lines = [
        f"name: {json.dumps(name)}",
        "seed: 0",
        f"backbone: {{model: {json.dumps(backbone)}, {readout}max_length: 2048, overflow: truncate_prompt}}",
        "",
        "ratings:",
    ]
    for found in rated:
        if found.guesses:
            lines += _rated(found, sources[found.location.name])
    lines += ["  - {compute: response_length, name: verbosity}", ""]
    note = [f"# {line}" for line in textwrap.wrap(too_few_pairs(), 116)]
    lines += ["preferences:"] if pairs or from_ratings else note
    for found in pairs:
        columns = f", columns: {json.dumps(found.location.columns)}" if found.location.columns else ""
        lines += [f"  - {{data: {_quoted(found)}{columns}}}"]
    if from_ratings:
        for found in rated:
            for guess in found.guesses if found.several else ():
                objective = objective_name(guess.column, sources[found.location.name])
                margin = (guess.high - guess.low) * _PAIR_MARGIN
                if guess.direction != "neutral":
                    lines.append(
                        f"  - {{from_ratings: {json.dumps(objective)}, margin: {margin:g}, max_pairs_per_prompt: 16}}"
                    )
    lines += ["", "reference: ratings", "debias: {against: [verbosity], metric: spearman, level: pooled}"]
    if sum(found.rows for found in sets) < _SMALL:
        lines.append("gating: {hidden_size: 64, hidden_layers: 1, temperature: 1, steps: 600, batch_size: 512}")
    lines += ["evaluation:", "  - {benchmark: ratings}"]
    return "\n".join(lines) + "\n"


def too_few_pairs(pairs: int | None = None) -> str:
    """What training does without enough preference pairs, and what would change that.

    Args:
        pairs: number of training pairs, None if it is not known.
    """
    found = "Fewer preference pairs" if pairs is None else f"{pairs:,} preference pairs, fewer"
    return (
        f"{found} than the {PAIRS_FOR_GATE:,} that a gate needs: objectives are weighted by reliability, the same for "
        "every prompt. With more rated responses per prompt, or a file of pairs, weights follow the prompt and margins "
        "become probabilities."
    )


def _rated(found: Inspection, source: str) -> list[str]:
    lines = [f"  - data: {_quoted(found)}", f"    source: {json.dumps(source)}"]
    if found.location.columns:
        lines.append(f"    columns: {json.dumps(found.location.columns)}")
    lines.append("    objectives:")
    for guess in found.guesses:
        span = f"[{guess.low:g}, {guess.high:g}]"
        value = span if guess.direction == "higher" else f"{{range: {span}, direction: {guess.direction}}}"
        lines.append(f"      {json.dumps(guess.column)}: {value}  # {evidence(guess)}")
    return lines


def evidence(guess: ScaleGuess) -> str:
    """The ratings that a scale was derived from, in a few words."""
    details = [f"{guess.levels:,} levels, {guess.lowest:g} to {guess.highest:g}"]
    if not math.isnan(guess.spread):
        details.append(f"{guess.raters:.1f} raters each, sd between them {guess.spread:.2g}")
    if guess.odd:
        details.append(f"{guess.odd:,} skipped")
    seen = f"{guess.rated:,} ratings ({'; '.join(details)})"
    if guess.stated:
        return f"given; {seen}"
    others = ", ".join(f"{low:g} to {high:g}" for low, high in guess.others)
    return f"guessed from {seen}" + (f"; or {others}" if others else "")


def _quoted(found: Inspection) -> str:
    return json.dumps(found.location.name, ensure_ascii=False)


def _sources(sets: Sequence[Inspection]) -> dict[str, str]:
    """A unique source name for each file, without hyphens."""
    names: dict[str, str] = {}
    for found in sets:
        stem = Path(found.location.name).name.split(".")[0].replace("-", "_").replace(" ", "_")
        numbered = chain([stem], (f"{stem}{number}" for number in count(2)))
        names[found.location.name] = next(name for name in numbered if name not in names.values())
    return names
