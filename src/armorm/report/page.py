"""The report of a reward model: one self-contained HTML page, and its numbers as plain values.

The page begins with a verdict (`armorm.report.verdict`) and notices: warnings in plain words, each shown only if its
threshold below is crossed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from armorm.evaluation.benchmarks import BENCHMARKS, ratings
from armorm.evaluation.metrics import LEVELS
from armorm.evaluation.results import MetricResult, Results, number, seen_in_training, span
from armorm.explain.explanation import approximate_sentence
from armorm.explain.html import render
from armorm.files import plain
from armorm.report import sections
from armorm.report.evidence import Evidence, gather
from armorm.report.verdict import report_verdict
from armorm.steering import sentences
from armorm.version import __version__

if TYPE_CHECKING:
    from armorm.reward_model import ArmoRM

# Thresholds of the notices.
MOSTLY_LENGTH = 0.6  # |correlation| of an objective with length: it is mostly length
STILL_LENGTH = 0.3  # |correlation| with length of a debiased objective, or of the whole score
COLLAPSED = 0.9  # mean weight of one objective
CONSTANT = 0.02  # largest standard deviation of a weight over prompts, for a gate that ignores the prompt
UNUSED = (0.005, 0.02)  # mean and largest weight of an objective that no prompt uses
UNPREDICTED = 0.05  # R^2
GAP = 0.1  # difference of accuracy where the longer response is better and where it is worse
FEW = 30  # prompts, responses or pairs, below which nothing is concluded

_KINDS = ((ratings.SPEARMAN, "Spearman"), (ratings.WITHIN, "right within prompts, %"), (ratings.MAE, "mean error"))


def report(rm: ArmoRM, data: Sequence[str | Path] = (), **options: Any) -> tuple[str, dict[str, Any]]:
    """The report of a model: the page, and its numbers as plain values, without texts.

    Arguments and errors are those of `armorm.report.evidence.gather`.
    """
    found = contents(gather(rm, data, **options))
    return render("report", **found), without_texts(found)


def contents(evidence: Evidence) -> dict[str, Any]:
    """Everything that the page shows."""
    rm, config = evidence.rm, evidence.rm.model.config
    found: dict[str, Any] = {
        "version": __version__,
        "model": {
            "name": Path(rm.name).name or rm.name,
            "backbone": (evidence.metrics.get("backbone") or {}).get("name") or config.provenance.get("backbone") or "",
            "objectives": len(rm.objectives),
            "recipe": config.provenance.get("recipe_name") or "",
            "steering": sentences(config.steering),
            "debiased_against": config.debiasing.get("against", []),
        },
        "scale": sections.scale(evidence),
        "data": sections.data(evidence),
        "objectives": sections.objectives(evidence),
        "correlations": sections.correlations(evidence),
        "verbosity": sections.verbosity(evidence),
        "trained_debiasing": evidence.metrics.get("debiasing"),
        "gate": sections.gate(evidence),
        "evaluations": [_evaluation(results) for results in evidence.results.values()],
        "trained_evaluation": evidence.metrics.get("evaluation") or {},
        "perturbations": sections.perturbations(evidence),
        "mistakes": sections.mistakes(evidence),
    }
    notices = _notices(evidence, found)
    return found | {"notices": notices, "verdict": report_verdict(evidence.results, len(notices))}


def without_texts(found: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a report as plain values: no plots, no text of a conversation."""

    def only(entry: Mapping[str, Any] | None, *keys: str) -> dict[str, Any] | None:
        return {key: entry.get(key) for key in keys} if entry else None

    kept = dict(found)
    kept["notices"] = [vars(notice) for notice in found["notices"]]
    kept["objectives"] = [
        {"name": entry["objective"].name, **{key: entry.get(key) for key in ("n", "spearman", "error", "report")}}
        for entry in found["objectives"]
    ]
    kept["verbosity"] = only(found["verbosity"], "n", "biases", "lines")
    kept["gate"] = only(
        found["gate"], "prompts", "means", "kinds", "kind_counts", "mean_entropy", "most_entropy", "trained"
    )
    kept["perturbations"] = only(found["perturbations"], "unit", "std", "tolerance", "edits")
    kept["mistakes"] = found["mistakes"] and {
        "pairs": [
            only(entry, "place", "subset", "verdict", "margin", "shares") for entry in found["mistakes"]["pairs"]
        ],
        "ratings": [only(entry, "place", "name", "given", "predicted") for entry in found["mistakes"]["ratings"]],
    }
    result: dict[str, Any] = plain(
        {key: kept[key] for key in kept if kept[key] or key not in ("gate", "perturbations", "mistakes")}
    )
    return result


def _evaluation(results: Results) -> dict[str, Any]:
    """Tables of metrics with intervals and baselines, by group."""
    rows = []
    if results.benchmark == "ratings":
        rows += [_row(metric, metric.name, "all objectives") for metric in results.level("overall").values()]
        for kind, title in _KINDS:
            by_objective = ratings.by_objective(results.level("subsets"), kind)
            rows += [_row(metric, name, title) for name, metric in by_objective.items()]
    else:
        for level in LEVELS:
            rows += [_row(metric, metric.name, "accuracy, %") for metric in results.level(level).values()]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["value"]:
            groups.setdefault(row["group"], []).append(row)
    benchmark = BENCHMARKS[results.benchmark]
    return {"title": benchmark.title, "rule": benchmark.rule, "counts": dict(results.counts), "groups": groups}


def _row(metric: MetricResult, name: str, group: str) -> dict[str, Any]:
    return {
        "group": group,
        "name": name,
        "part": metric.level == "subsets" and group == "accuracy, %",
        "level": metric.level,
        "value": number(metric.value, metric.unit),
        "interval": span(metric.interval, metric.unit).replace(" ", " to "),
        "prompts": metric.prompts,
        "length": number(metric.baselines.get("length"), metric.unit),
        "prompt_only": number(metric.baselines.get("prompt_only"), metric.unit),
        "raw": (metric.value, metric.interval) if metric.unit == "share" else None,
    }


@dataclass(frozen=True)
class Notice:
    """A warning."""

    title: str  # what is wrong
    text: str  # the numbers behind it, and what can be done


def _notices(evidence: Evidence, found: dict[str, Any]) -> list[Notice]:
    names = evidence.rm.objectives.names
    biases = evidence.rm.model.config.debiasing.get("against", [])
    gate, verbosity, pairs = found["gate"], found["verbosity"], evidence.results.get("pairs")
    notices = steering_notices(found["model"]["steering"]) + seen_notices(evidence.seen)
    gap = None
    if pairs is not None:
        accuracy, audit = pairs.level("overall")["accuracy"], pairs.audits["length"]
        notices += accuracy_notices(accuracy.value, accuracy.interval, accuracy.examples)
        view = audit["views"]["as served"]
        fewest = min(audit["examples_more_is_better"], audit["examples_more_is_worse"])
        gap = (view["more_is_better"], view["more_is_worse"], fewest)
    enough = verbosity and verbosity["n"] >= FEW
    if enough:
        before, after = (float(verbosity[when]["pooled"][-1]) for when in ("before", "after"))
        notices += score_length_notices(after, gap, before=before if verbosity["debiased"] else None)
    notices += gate_training_notices(evidence.metrics.get("gate") or {})
    if gate and gate["prompts"]:
        notices += gate_notices(names, gate["weights"], biases)
    if enough:
        pooled = verbosity["before"]["pooled"][:-1], verbosity["after"]["pooled"][:-1]
        notices += objective_length_notices(names, *pooled, biases)
    notices += perturbation_notices(evidence.perturbations.get("edits", {}))
    notices += fit_notices(evidence.metrics.get("regression", []))
    if evidence.rm.uncertainty is not None:
        notices += uncertainty_notices(evidence.rm.uncertainty.approximate(names))
    unscored = len(evidence.scored.unscored) + sum(int((at < 0).sum()) for at in evidence.rows)
    return notices + row_notices(unscored, len(evidence.scored.truncated), len(evidence.conversations))


def steering_notices(sentences: Sequence[str]) -> list[Notice]:
    """A model that weights its objectives otherwise than it was trained to."""
    return [Notice("This model is steered", "; ".join(sentences) + ".")] if sentences else []


def seen_notices(seen: Mapping[str, Mapping[str, Any]]) -> list[Notice]:
    """Data of which nothing is left to evaluate on."""
    return [
        Notice(f"The model was trained on all prompts of the {BENCHMARKS[kind].title}", f"{seen_in_training(facts)}.")
        for kind, facts in seen.items()
        if facts["of"] == facts["examples"] and not facts["included"]
    ]


def accuracy_notices(accuracy: float, interval: tuple[float, float] | None, pairs: int) -> list[Notice]:
    """Preferences that guessing may predict as well, or better."""
    if interval is None or interval[0] > 0.5:
        return []
    text = f"{accuracy:.1%} of {pairs:,} pairs, 95% interval {interval[0]:.1%} to {interval[1]:.1%}."
    worse = interval[1] < 0.5
    title = (
        "Preferences are predicted worse than by guessing"
        if worse
        else "Guessing may predict these preferences as well"
    )
    return [Notice(title, text)]


def score_length_notices(score: float, gap: tuple[float, float, int] | None, *, before: float | None) -> list[Notice]:
    """A score that correlates with length, or that is right more often where the longer response is better.

    Args:
        score: its pooled correlation with the length of the response.
        gap: accuracy where the longer response is better and where it is worse, and the smaller number of pairs.
        before: the correlation before debiasing, None for a model without it.
    """
    found = []
    if abs(score) >= STILL_LENGTH:
        remedy = "strengthen its debiasing by steering (`debias_strength` above 1)"
        if before is None:
            remedy = "drop the objectives that are mostly length, or train it with debiasing"
        elif score * (score - before) > 0:
            remedy = (
                f"debiasing, from {before:+.2f}, goes too far here: weaken it by steering (`debias_strength` below 1)"
            )
        text = f"{'Longer' if score > 0 else 'Shorter'} responses score higher, whatever they say: {remedy}."
        found.append(Notice(f"The score correlates with length ({score:+.2f})", text))
    if gap is not None and gap[2] >= FEW and abs(gap[0] - gap[1]) >= GAP:
        long, short, _ = gap
        title = f"It is right more often where the {'longer' if long > short else 'shorter'} response is better"
        text = (
            f"Accuracy is {long:.1%} on the pairs whose better response is the longer one, "
            f"{short:.1%} on those whose better response is the shorter one."
        )
        found.append(Notice(title, text))
    return found


def gate_training_notices(gate: Mapping[str, Any]) -> list[Notice]:
    """A gate that is no better than equal weights on its own held-out pairs."""
    accuracy, uniform = gate.get("accuracy"), gate.get("uniform_accuracy")
    if accuracy is None or uniform is None or accuracy > uniform:
        return []
    text = f"On the pairs held out in training its accuracy is {accuracy:.1%}, that of equal weights {uniform:.1%}."
    return [Notice("The gate is no better than equal weights", text)]


def gate_notices(names: Sequence[str], weights: np.ndarray, biases: Sequence[str]) -> list[Notice]:
    """A collapsed gate, a gate that ignores the prompt, objectives without weight; `weights` (m, k) are of prompts."""
    found = []
    mean, largest = weights.mean(0), weights.max(0)
    top = int(mean.argmax())
    if mean[top] >= COLLAPSED and len(names) > 1:
        text = f"{names[top]} has {mean[top]:.0%} of the weight on average, whatever the prompt: "
        text += "the score is little more than this one objective."
        found.append(Notice("One objective makes up almost the whole score: the gate has collapsed", text))
    elif len(weights) >= FEW and weights.std(0).max() < CONSTANT:
        text = f"No weight varies by more than {weights.std(0).max():.3f} (standard deviation) over {len(weights):,} "
        text += "prompts: fixed weights would do the same."
        found.append(Notice("Every prompt gets the same weights: the gate ignores the prompt", text))
    unused = np.flatnonzero((mean < UNUSED[0]) & (largest < UNUSED[1])).tolist()
    idle = [names[i] for i in unused if names[i] not in biases]
    if idle and len(weights) >= FEW:
        one = "it" if len(idle) == 1 else "one of them"
        text = f"On none of {len(weights):,} prompts does the gate give {one} {UNUSED[1]:.0%} of the weight."
        found.append(Notice(f"No prompt uses {_listed(idle)}", text))
    return found


def objective_length_notices(
    names: Sequence[str], before: np.ndarray, after: np.ndarray, biases: Sequence[str]
) -> list[Notice]:
    """Objectives that are mostly length, strongest first.

    Args:
        before, after: (k,) pooled correlations of rewards with the length of the response, as predicted and debiased.
        biases: objectives that others are debiased against.
    """
    found, removed = [], []
    for column in np.argsort(-np.abs(before), kind="stable"):
        name, plain, debiased = names[column], before[column], after[column]
        if name in biases:
            continue
        mostly = abs(plain) >= MOSTLY_LENGTH
        remains = abs(plain) >= STILL_LENGTH and abs(debiased) >= STILL_LENGTH
        if mostly and not remains:
            removed.append((name, plain, debiased))
        elif mostly or remains:
            title = f"{name} is mostly length" if mostly else f"{name} correlates with length"
            rest = f"after debiasing {debiased:+.2f}" if biases else "and nothing removes it"
            found.append(Notice(title, f"Its rewards correlate {plain:+.2f} with the length of the response, {rest}."))
    if removed:
        title = f"{_listed([name for name, _, _ in removed])} {'is' if len(removed) == 1 else 'are'} mostly length"
        values = "; ".join(f"{plain:+.2f}, after debiasing {debiased:+.2f}" for _, plain, debiased in removed)
        subject = "Its rewards correlate" if len(removed) == 1 else "In this order, rewards correlate"
        text = f"{subject} {values} with the length of the response: debiasing removes most of it."
        found.append(Notice(title, text))
    return found


def perturbation_notices(edits: Mapping[str, Mapping[str, Any]]) -> list[Notice]:
    """Edits of the responses that should lower the score and do not, and those that should not matter and do."""
    found = []
    for expected, text in (
        ("lower", "They should lower the score, and do not"),
        ("no effect", "They should not matter, and move the score"),
    ):
        faults = {n: e for n, e in edits.items() if e["fault"] and e["expected"] == expected}
        if faults:
            title = f"Edits of responses: {_listed(list(faults))}"
            changes = ", ".join(f"{entry['change']:+.2f}" for entry in faults.values())
            found.append(Notice(title, f"{text}: by {changes} standard deviations."))
    return found


def fit_notices(reports: Sequence[Mapping[str, Any]]) -> list[Notice]:
    """Objectives that are hardly predicted, and warnings of the regression."""
    poor = [entry["objective"] for entry in reports if entry.get("r2") is not None and entry["r2"] < UNPREDICTED]
    text = f"On prompts that it was not fitted on, the model explains less than {UNPREDICTED:.0%} of the differences "
    text += "between ratings (R2): do not rely on these numbers."
    found = [Notice(f"Hardly predicted: {_listed(poor)}", text)] if poor else []
    warned = [entry for entry in reports if entry.get("warning")]
    return found + [
        Notice(f"{entry['objective']}: its ratings are predicted unreliably", f"{entry['warning']}.")
        for entry in warned
    ]


def uncertainty_notices(bounds: Mapping[str, float]) -> list[Notice]:
    """Standard deviations that are stored approximately, from the error bounds of objectives by name."""
    if not bounds:
        return []
    return [Notice("The ± of some ratings is approximate", approximate_sentence(bounds))]


def row_notices(unscored: int, truncated: int, conversations: int) -> list[Notice]:
    """Responses that could not be scored, or whose prompt was truncated."""
    rows = (
        (unscored, "responses could not be scored", "They count as wrong."),
        (truncated, "conversations were truncated", "Their prompts were too long and lost their beginning."),
    )
    return [Notice(f"{count:,} of {conversations:,} {what}", text) for count, what, text in rows if count]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]
