"""Compares the ablation across backbones: a table, and sentences that count verdicts.

The first of several results is the one that the rest of the page shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ablations.measuring import GATE, OWN
from ablations.tables import WAYS, Table, difference, lead, number, probability, side

Results = Mapping[str, Any]
RATINGS = "rated test rows, mean Spearman"


def name_of(results: Results) -> str:
    """Name of the backbone: the last part of its folder or hub id."""
    return results["setting"]["backbone"]["name"].rsplit("/", 1)[-1]


def shared_methods(several: Sequence[Results]) -> list[str]:
    """Methods that every result measured, in the order of the first."""
    return [name for name in several[0]["methods"]["figures"] if all(name in r["methods"]["figures"] for r in several)]


def table(several: Sequence[Results]) -> Table:
    """Accuracy on the own sets and difference from the backbone's own gate, by method and backbone."""
    columns = [""]
    for results in several:
        columns += [name_of(results), "minus its gate", "p"]
    rows = [[RATINGS]]
    for results in several:
        rows[0] += [number(mean_spearman(results)), "", ""]
    for method in shared_methods(several):
        row = [method]
        for results in several:
            entry = results["methods"]["figures"][method]
            against = entry.get("against", {}).get(OWN)
            row.append(number(entry[OWN]["value"]))
            row += ["", ""] if against is None else [difference(against), probability(against["p"])]
        rows.append(row)
    return Table(f"Several backbones, {OWN}", columns, rows)


def mean_spearman(results: Results) -> float | None:
    """Mean over objectives of the Spearman correlation of rewards and ratings on test rows."""
    found = [entry["spearman"] for entry in results["joint"]["stage_1"].values()]
    return sum(found) / len(found) if found else None


def sentences(several: Sequence[Results]) -> list[str]:
    """For each method, on how many backbones it is better or worse than the gate; ratings against pairs likewise."""
    lines = []
    for method in shared_methods(several):
        if method == GATE:
            continue
        sides = Counter(side(results["methods"]["figures"][method]["against"][OWN]) for results in several)
        verdicts = [f"{word} on {sides[word]}" for word in ("better", "worse") if sides[word]]
        verdict = ", ".join(verdicts) or "no significant difference on any"
        lines.append(f"**{method}** against the learned gate: {verdict} of {len(several)}.")
    for figure, label in (("spearman", "Spearman"), ("within_prompt", "accuracy within prompts")):
        for way in WAYS[1:]:
            leads = [(lead(r["ratings_against_pairs"], way, figure), name_of(r)) for r in several]
            values = ", ".join(f"{mean:+.3f} ({name})" for mean, name in leads)
            lines.append(f"{label}: ratings minus {way}, mean over objectives: {values}.")
    return lines
