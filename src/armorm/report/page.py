"""The report of a reward model: one file that a person reads.

In:  a model, data to look at it on, the folder of its run.
Out: a self-contained HTML page, or the figures behind it as plain values.

Sections: what to know first; data; objectives; how they go together; verbosity; the gate; evaluation; mistakes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from armorm.evaluation.benchmarks import ratings as rating_figures
from armorm.evaluation.metrics import LEVELS
from armorm.evaluation.registry import BENCHMARKS
from armorm.evaluation.results import FigureResult, Results
from armorm.evaluation.tables import number as in_unit
from armorm.explain.html import render
from armorm.files import plain
from armorm.report import sections
from armorm.report.evidence import Evidence, gather
from armorm.steering import sentences
from armorm.version import __version__

if TYPE_CHECKING:
    from armorm.reward_model import ArmoRM

_KINDS = (
    (rating_figures.SPEARMAN, "Spearman"),
    (rating_figures.WITHIN, "right within prompts, %"),
    (rating_figures.MAE, "mean error"),
)


def report(
    rm: ArmoRM,
    data: Sequence[str | Path] = (),
    *,
    run: str | Path | None = None,
    features: str | Path | None = None,
    limit: int | None = None,
) -> tuple[str, dict[str, Any]]:
    """The report of a model.

    Args:
        data: files, folders or hub ids of rated rows and of preference pairs.
        run: folder of the run, by default the one that the model was loaded from.
        features: feature store to read and fill.
        limit: about how many examples of each kind to keep.

    Returns:
        the page, and its figures as plain values, without texts.

    Raises:
        DataError: for data that is neither, or that the model has no objective for.
    """
    evidence = gather(rm, data, run=run, features=features, limit=limit)
    found = contents(evidence)
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
        "data": sections.data(evidence),
        "objectives": sections.objectives(evidence),
        "correlations": sections.correlations(evidence),
        "verbosity": sections.verbosity(evidence),
        "trained_debiasing": evidence.metrics.get("debiasing"),
        "gate": sections.gate(evidence),
        "evaluations": [_evaluation(results) for results in evidence.results.values()],
        "trained_evaluation": evidence.metrics.get("evaluation") or {},
        "mistakes": sections.mistakes(evidence),
    }
    return found | {"notices": _notices(evidence, found)}


def without_texts(found: dict[str, Any]) -> dict[str, Any]:
    """The figures of a report as plain values: no plot, no text of a conversation."""
    kept = {
        key: value
        for key, value in found.items()
        if key not in ("objectives", "gate", "mistakes", "notices", "verbosity")
    }
    kept["notices"] = [{"title": notice.title, "text": notice.text} for notice in found["notices"]]
    kept["objectives"] = [
        {"name": entry["objective"].name, **{key: entry.get(key) for key in ("n", "spearman", "error", "report")}}
        for entry in found["objectives"]
    ]
    kept["verbosity"] = None
    if found["verbosity"]:
        kept["verbosity"] = {key: found["verbosity"][key] for key in ("n", "biases", "lines")}
    if found["gate"]:
        kept["gate"] = {
            key: found["gate"].get(key)
            for key in ("prompts", "means", "kinds", "kind_counts", "mean_entropy", "most_entropy", "trained")
        }
    if found["mistakes"]:
        kept["mistakes"] = {
            "pairs": [{k: e[k] for k in ("place", "subset", "margin", "shares")} for e in found["mistakes"]["pairs"]],
            "ratings": [
                {k: e[k] for k in ("place", "name", "given", "predicted")} for e in found["mistakes"]["ratings"]
            ],
        }
    result: dict[str, Any] = plain(kept)
    return result


def _evaluation(results: Results) -> dict[str, Any]:
    """A table of figures with intervals and baselines."""
    rows = []
    if results.benchmark == "ratings":
        by_objective = rating_figures.by_objective(results.level("subsets"))
        for kind, title in _KINDS:
            for name, found in by_objective.items():
                figure = found.get(kind)
                if isinstance(figure, FigureResult) and np.isfinite(figure.value):
                    rows.append(_row(figure, name, title))
        overall = [_row(figure, figure.name, "all objectives") for figure in results.level("overall").values()]
        rows = [row for row in overall if row["value"]] + rows
    else:
        for level in LEVELS:
            for figure in results.level(level).values():
                if np.isfinite(figure.value):
                    rows.append(_row(figure, figure.name, "accuracy, %", part=level == "subsets"))
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return {
        "title": BENCHMARKS[results.benchmark].title,
        "rule": BENCHMARKS[results.benchmark].rule,
        "counts": dict(results.counts),
        "groups": groups,
    }


def _row(figure: FigureResult, name: str, group: str, *, part: bool = False) -> dict[str, Any]:
    interval = figure.interval
    return {
        "group": group,
        "name": name,
        "part": part,
        "level": figure.level,
        "value": in_unit(figure.value, figure.unit),
        "interval": "" if interval is None else " to ".join(in_unit(end, figure.unit) for end in interval),
        "prompts": figure.prompts,
        "length": in_unit(figure.baselines.get("length"), figure.unit),
        "prompt_only": in_unit(figure.baselines.get("prompt_only"), figure.unit),
        "raw": (figure.value, interval) if figure.unit == "share" else None,
    }


def _notices(evidence: Evidence, found: dict[str, Any]) -> list[Notice]:
    rm = evidence.rm
    biases = rm.model.config.debiasing.get("against", [])
    gate, verbosity = found["gate"], found["verbosity"]
    said = of_steering(found["model"]["steering"])
    if "pairs" in evidence.results:
        accuracy = evidence.results["pairs"].level("overall")["accuracy"]
        said += of_accuracy(accuracy.value, accuracy.interval, accuracy.examples)
    if verbosity:
        audit = evidence.results["pairs"].audits["length"] if "pairs" in evidence.results else None
        gap = None
        if audit is not None:
            view = audit["views"]["as served"]
            fewest = min(audit["examples_more_is_better"], audit["examples_more_is_worse"])
            gap = (view["more_is_better"], view["more_is_worse"], fewest)
        said += of_score(float(verbosity["after"]["pooled"][-1]), gap, debiased=verbosity["debiased"])
    said += of_training(evidence.metrics.get("gate") or {})
    if gate and gate["prompts"]:
        said += of_gate(rm.objectives.names, gate["weights"], biases)
    if verbosity:
        pooled = verbosity["before"]["pooled"][:-1], verbosity["after"]["pooled"][:-1]
        said += of_length(rm.objectives.names, *pooled, biases)
    said += of_objectives(evidence.metrics.get("regression", []))
    refused = len(evidence.scored.refused) + sum(int((at < 0).sum()) for at in evidence.rows)
    return said + of_rows(refused, len(evidence.scored.truncated), len(evidence.conversations))


MOSTLY_LENGTH = 0.6  # |correlation| with the length from which on an objective is mostly that

STILL_LENGTH = 0.3  # the same for what debiasing, or the whole score, should have kept down

COLLAPSED = 0.9  # mean weight of one objective

BLIND = 0.02  # standard deviation of a weight over prompts, below which a gate does not look at them

UNNEEDED = (0.005, 0.02)  # mean and largest weight below which nobody needs an objective

UNPREDICTED = 0.05  # R^2

GAP = 0.1  # accuracy where the longer response is better, less that where it is worse

FEW = 30


@dataclass(frozen=True)
class Notice:
    """One of them.

    Attributes:
        title: what is wrong.
        text: with which figures, and what may be done.
    """

    title: str
    text: str


def of_steering(sentences: Sequence[str]) -> list[Notice]:
    """A model that weighs otherwise than it was trained to."""
    return [Notice("This model is steered", "; ".join(sentences) + ".")] if sentences else []


def of_gate(names: Sequence[str], weights: np.ndarray, biases: Sequence[str]) -> list[Notice]:
    """A collapsed gate, a blind one, objectives without weight.

    Args:
        weights: (m, k) of distinct prompts.
    """
    found = []
    mean, largest = weights.mean(0), weights.max(0)
    top = int(mean.argmax())
    if mean[top] >= COLLAPSED and len(names) > 1:
        found.append(
            Notice(
                "The gate has collapsed",
                f"{names[top]} has {mean[top]:.0%} of the weight on average, whatever is asked: "
                "the score is little more than this one objective.",
            )
        )
    elif len(weights) >= FEW and weights.std(0).max() < BLIND:
        found.append(
            Notice(
                "The gate does not look at the prompt",
                f"No weight varies by more than {weights.std(0).max():.3f} (standard deviation) over {len(weights):,} "
                "prompts: fixed weights would do the same.",
            )
        )
    idle = [
        name
        for name, average, most in zip(names, mean, largest, strict=True)
        if average < UNNEEDED[0] and most < UNNEEDED[1] and name not in biases
    ]
    if idle:
        found.append(
            Notice(
                f"Nobody needs {_listed(idle)}",
                f"On none of {len(weights):,} prompts does the gate give {'it' if len(idle) == 1 else 'one of them'} "
                f"{UNNEEDED[1]:.0%} of the weight.",
            )
        )
    return found


def of_training(gate: Mapping[str, Any]) -> list[Notice]:
    """A gate that was no better than none on its own held-out pairs."""
    accuracy, uniform = gate.get("accuracy"), gate.get("uniform_accuracy")
    if accuracy is None or uniform is None or accuracy > uniform:
        return []
    return [
        Notice(
            "The gate is no better than equal weights",
            f"On the pairs held out in training it is right in {accuracy:.1%}, equal weights in {uniform:.1%}.",
        )
    ]


def of_score(score: float, gap: tuple[float, float, int] | None, *, debiased: bool) -> list[Notice]:
    """A score that goes with length, and one that is right where length is.

    Args:
        score: its pooled correlation with the length of the response.
        gap: accuracy where the longer response is better, where it is worse, pairs on the smaller side.
        debiased: whether a transform takes anything out of the objectives.
    """
    found = []
    if abs(score) >= STILL_LENGTH:
        remedy = "steer its debias_strength" if debiased else "drop what is mostly length, or train it with debias"
        found.append(
            Notice(
                f"The score goes with length ({score:+.2f})",
                f"{'Longer' if score > 0 else 'Shorter'} responses score higher, whatever they say: {remedy}.",
            )
        )
    if gap is not None and gap[2] >= FEW and abs(gap[0] - gap[1]) >= GAP:
        long, short, _ = gap
        found.append(
            Notice(
                f"It is right more often where the {'longer' if long > short else 'shorter'} response is better",
                f"{long:.1%} of the pairs whose better response is the longer one, "
                f"{short:.1%} of those whose better response is the shorter one.",
            )
        )
    return found


def of_length(names: Sequence[str], before: np.ndarray, after: np.ndarray, biases: Sequence[str]) -> list[Notice]:
    """Objectives that are mostly length, the strongest first.

    Args:
        before, after: (k,) pooled correlations of rewards with the length of the response, as predicted and debiased.
        biases: objectives that others are debiased against.
    """
    found, taken_out = [], []
    for column in np.argsort(-np.abs(before), kind="stable"):
        name, plain, debiased = names[column], before[column], after[column]
        if name in biases:
            continue
        mostly = abs(plain) >= MOSTLY_LENGTH
        stays = abs(plain) >= STILL_LENGTH and abs(debiased) >= STILL_LENGTH
        if mostly and not stays:
            taken_out.append((name, plain, debiased))
        elif mostly or stays:
            title = f"{name} is mostly length" if mostly else f"{name} goes with length"
            rest = f"after debiasing {debiased:+.2f}" if biases else "and nothing takes it out"
            found.append(Notice(title, f"Its rewards correlate {plain:+.2f} with the length of the response, {rest}."))
    if taken_out:
        title = f"{_listed([name for name, _, _ in taken_out])} {'is' if len(taken_out) == 1 else 'are'} mostly length"
        figures = "; ".join(f"{plain:+.2f}, after debiasing {debiased:+.2f}" for _, plain, debiased in taken_out)
        subject = "Its rewards correlate" if len(taken_out) == 1 else "In this order, rewards correlate"
        found.append(
            Notice(title, f"{subject} {figures} with the length of the response: debiasing takes most of it out.")
        )
    return found


def of_objectives(reports: Sequence[Mapping[str, Any]]) -> list[Notice]:
    """Objectives that are hardly predicted, and what stage 1 warned of."""
    poor = [entry["objective"] for entry in reports if entry.get("r2") is not None and entry["r2"] < UNPREDICTED]
    found = []
    if poor:
        found.append(
            Notice(
                f"Hardly predicted: {_listed(poor)}",
                f"On held-out folds less than {UNPREDICTED:.0%} of the variance of the ratings is explained (R2).",
            )
        )
    found += [
        Notice(f"{entry['objective']}: a fit to distrust", f"{entry['warning']}.")
        for entry in reports
        if entry.get("warning")
    ]
    return found


def of_accuracy(accuracy: float, interval: tuple[float, float] | None, pairs: int) -> list[Notice]:
    """Preferences no better than chance."""
    if interval is None or interval[0] > 0.5:
        return []
    return [
        Notice(
            "Preferences are predicted no better than by chance",
            f"{accuracy:.1%} of {pairs:,} pairs, 95% interval {interval[0]:.1%} to {interval[1]:.1%}.",
        )
    ]


def of_rows(refused: int, truncated: int, conversations: int) -> list[Notice]:
    """Rows that were not scored, or not whole."""
    found = []
    if refused:
        found.append(Notice(f"{refused:,} of {conversations:,} responses were refused", "They count as wrong."))
    if truncated:
        found.append(
            Notice(
                f"{truncated:,} of {conversations:,} conversations were cut",
                "They lost the beginning of a prompt that was too long.",
            )
        )
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]
