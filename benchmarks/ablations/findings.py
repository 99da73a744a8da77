"""Writes the tables, result sentences and plots of docs/findings.md from the JSON results.

Everything between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced and never edited by hand; the text outside
the marks contains no numbers. A rule here derives each verdict from its interval or p-value, so the page claims no more
than the last run supports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablations import backbones
from ablations.measuring import LONGER, OWN
from ablations.pictures import draw
from ablations.tables import WAYS, difference, lead, number, probability, side, spread, tables
from marked_page import fill

Results = Mapping[str, Any]
PICTURES = "images/findings"
CAPTIONS = {
    "methods": "Accuracy of each method on each set, with intervals",
    "references": "Remaining correlation with length in each set, for each choice of reference data",
    "weights": "Mean gating weight of each objective, by source",
    "quantiles": "Share of held-out ratings below each quantile",
}


def write(page: Path, results: Results, others: Sequence[Results] = ()) -> None:
    """Rewrite the marked parts of a page.

    Args:
        others: results of the same ablation on other backbones.

    Raises:
        SystemExit: for an unknown mark.
    """
    drawn = {path.stem for path in draw(page.parent / PICTURES, results)}
    parts = {name: table.markdown() for name, table in tables(results).items()}
    parts |= {f"{name}_read": "\n".join(f"- {line}" for line in lines) for name, lines in sentences(results).items()}
    parts |= {
        f"{name}_picture": f"![{caption}]({PICTURES}/{name}.svg)" if name in drawn else ""
        for name, caption in CAPTIONS.items()
    }
    several = [results, *others]
    parts["backbones"] = backbones.table(several).markdown()
    parts["backbones_read"] = "\n".join(f"- {line}" for line in backbones.sentences(several))
    fill(page, parts)


def sentences(results: Results) -> dict[str, list[str]]:
    """Sentences about the tables, by section."""
    return {
        "setting": _setting(results),
        "methods": _methods(results),
        "forms": _forms(results),
        "references": _references(results),
        "domains": _domains(results),
        "ratings_against_pairs": _ratings_against_pairs(results),
        "joint": _joint(results),
        "quantiles": _quantiles(results),
    }


def verdict(entry: Mapping[str, Any], unit: str = "") -> str:
    """A difference in words: better, worse, or not significant."""
    if entry["p"] is None:
        return f"too few prompts for a test ({entry['difference']:+.3f})"
    words = side(entry) or "no significant difference"
    return f"{words} ({difference(entry)}{unit}, p {_p(entry['p'])})"


def _p(p: float) -> str:
    text = probability(p)
    return text if text.startswith("<") else f"= {text}"


def _setting(results: Results) -> list[str]:
    setting = results["setting"]
    lines = [
        f"Backbone `{setting['backbone']['name']}`, recipe `{setting['recipe']}`, armorm {setting['armorm_version']}, "
        f"{setting['seeds']} seeds of each learned gate of the main comparison."
    ]
    if setting["changed"]:
        lines.append(f"Changes to the recipe: {', '.join(f'`{change}`' for change in setting['changed'])}.")
    if setting["train_rows_of_each_set"]:
        lines.append(
            f"A subset of the data: about {setting['train_rows_of_each_set']:,} training rows of each rated set and "
            "pairs of each preference set (whole prompts, chosen by their content)."
        )
    if setting["pairs_of_each_benchmark"]:
        lines.append(f"About {setting['pairs_of_each_benchmark']:,} pairs of each benchmark (whole prompts).")
    return lines


def _methods(results: Results) -> list[str]:
    figures, notes = results["methods"]["figures"], results["methods"]["notes"]
    benchmarks = [name for name in next(iter(figures.values())) if name not in ("against", OWN, LONGER)]
    lines = []
    for name in figures:
        if name == "gate":
            continue
        lines.append(f"**{name}** against the learned gate, on the own sets: {verdict(figures[name]['against'][OWN])}.")
    for name in benchmarks:
        entry = figures["gate"][name]
        chance = "at chance"
        if entry["interval"] and not entry["interval"][0] <= 0.5 <= entry["interval"][1]:
            chance = "above chance" if entry["value"] > 0.5 else "below chance"
        lines.append(f"The learned gate on {name}: {number(entry['value'])} {spread(entry['interval'])}, {chance}.")
    published = notes["published script"]
    lines.append(
        f"The published script's gate after {published['steps']:,} steps: all weights of all evaluated prompts are "
        f"within {published['furthest_weight_from_half']:.1e} of 0.5, so it ranks like uniform weights on rewards "
        f"without debiasing; its scale went from 1 to {published['scale']:.2f}."
    )
    runs = notes["gate"]
    seeds = figures["gate"][OWN]["seeds"]
    lines.append(
        f"Seeds of the learned gate, own sets: {', '.join(number(value) for value in seeds)}; entropy of its weights "
        f"{number(runs[0]['entropy'], 2)} nats, scale {runs[0]['scale']:.1f}, best step {runs[0]['best_step']}."
    )
    with_, without = figures["gate"], figures["gate, not debiased"]
    lines.append(
        f"Debiasing: the gate picks the longer response in {number(with_[LONGER]['value'])} of the pairs of unequal "
        f"length with debiasing, and in {number(without[LONGER]['value'])} without."
    )
    return lines


def _forms(results: Results) -> list[str]:
    figures = results["forms"]["figures"]
    return [
        f"**{name}** against two hidden layers, on the own sets: {verdict(entry['against'][OWN])}."
        for name, entry in figures.items()
        if "against" in entry
    ]


def _references(results: Results) -> list[str]:
    figures, table = results["references"]["figures"], results["references"]["table"]
    lines = []
    for name in ("all rating rows", "all rating rows, within prompts", "both sides of the pairs"):
        left, before = table[name]["left"], table["none"]["left"]
        worst = max(left, key=lambda place: left[place])
        lines.append(
            f"Debiased on {name}: the largest remaining correlation is {number(left[worst], 2)}, on {worst}, where it "
            f"was {number(before[worst], 2)} before."
        )
    significant = [
        f"{name} ({difference(entry['against'][OWN])}, p {_p(entry['against'][OWN]['p'])})"
        for name, entry in figures.items()
        if "against" in entry and entry["against"][OWN]["p"] is not None and entry["against"][OWN]["p"] < 0.05
    ]
    lines.append(
        "Reference data whose accuracy on the own sets differs from that of all rating rows (p < 0.05, not corrected "
        f"for multiple tests): {'; '.join(significant) if significant else 'none'}."
    )
    picks = {name: entry[LONGER]["value"] for name, entry in figures.items()}
    low, high = min(picks, key=lambda n: picks[n]), max(picks, key=lambda n: picks[n])
    lines.append(
        f"Depending on the reference data, the gate picks the longer response in {number(picks[low])} ({low}) to "
        f"{number(picks[high])} ({high}) of the pairs of unequal length."
    )
    return lines


def _domains(results: Results) -> list[str]:
    domains = results["domains"]
    lines = []
    for way in ("gate", "gate that never saw it"):
        tested = {s: e[way]["over_uniform"] for s, e in domains.items() if e[way]["over_uniform"]["p"] is not None}
        better = [s for s, d in tested.items() if d["p"] < 0.05 and d["difference"] > 0]
        worse = [s for s, d in tested.items() if d["p"] < 0.05 and d["difference"] < 0]
        lines.append(
            f"**{way}** against uniform weights, {len(tested)} sources with enough prompts: better on "
            f"{', '.join(better) or 'none'}; worse on {', '.join(worse) or 'none'} (p < 0.05 each)."
        )
    return lines


def _ratings_against_pairs(results: Results) -> list[str]:
    found = results["ratings_against_pairs"]
    lines = []
    for figure, label in (("spearman", "Spearman"), ("within_prompt", "accuracy within prompts")):
        for way in WAYS[1:]:
            ahead = sum(entry["ratings"][figure] > entry[way][figure] for entry in found.values())
            lines.append(
                f"{label}: ratings are better than {way} for {ahead} of {len(found)} objectives, mean difference "
                f"{lead(found, way, figure):+.3f}."
            )
    return lines


def _joint(results: Results) -> list[str]:
    figures, joint = results["methods"]["figures"], results["joint"]
    report = joint["report"]
    place = report["pair_weights"].index(report["pair_weight"])
    before, after = ([part[n]["spearman"] for n in part] for part in (joint["stage_1"], joint["joint"]))
    return [
        f"Chosen weight of the pair loss: {report['pair_weight']:g}; held-out pair loss {report['losses'][0]:.4f} -> "
        f"{report['losses'][place]:.4f}, mean held-out R² {report['mean_r2'][0]:.3f} -> "
        f"{report['mean_r2'][place]:.3f}.",
        f"Gate on joint heads against the gate on stage 1, own sets: "
        f"{verdict(figures['joint heads, gate']['against'][OWN])}.",
        f"Mean Spearman of predicted ratings on test rows: {sum(before) / max(len(before), 1):.3f} -> "
        f"{sum(after) / max(len(after), 1):.3f}.",
        f"Plain Bradley-Terry head against the gate on stage 1, own sets: "
        f"{verdict(figures['plain Bradley-Terry head']['against'][OWN])}.",
    ]


def _quantiles(results: Results) -> list[str]:
    found = {name: entry for name, entry in results["quantiles"].items() if entry["test"] >= 100}
    lines = []
    for interval in next(iter(found.values()))["quantile heads"]["coverage"] if found else ():
        inside = [entry["quantile heads"]["coverage"][interval] for entry in found.values()]
        lines.append(
            f"Coverage of {interval} intervals: {min(inside):.0%} to {max(inside):.0%} of held-out ratings, depending "
            f"on the objective ({len(found)} with at least 100 test rows)."
        )
    varying = [name for name, entry in found.items() if entry["penalty"] is not None]
    lines.append(f"A spread that depends on the response was selected for: {', '.join(varying) or 'no objective'}.")
    for way in ("one spread", "training ratings"):
        gains = [1 - e["quantile heads"]["pinball"] / e[way]["pinball"] for e in found.values()]
        if gains:
            lines.append(f"Reduction of the pinball loss relative to {way}: {min(gains):+.1%} to {max(gains):+.1%}.")
    ahead = [n for n, e in found.items() if e["spearman"]["mean of quantiles"] > e["spearman"]["reward"]]
    lines.append(
        f"As a reward, the mean of the quantiles has a higher Spearman than the ridge reward in {len(ahead)} of "
        f"{len(found)}."
    )
    return lines
