"""The report of a reward model: one file that a person reads.

In:  a model, data to look at it on, the folder of its run.
Out: a self-contained HTML page, or the figures behind it as plain values.

Sections: what to know first; data; objectives; how they go together; verbosity; the gate; evaluation; mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import armorm
from armorm.evaluation.benchmarks import ratings as rating_figures
from armorm.evaluation.cells import LEVELS
from armorm.evaluation.registry import BENCHMARKS
from armorm.evaluation.rendering import number as in_unit
from armorm.evaluation.results import FigureResult, Results
from armorm.explain.html import render
from armorm.files import plain
from armorm.report import notices, sections
from armorm.report.evidence import Evidence, gather
from armorm.steering import sentences

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
        "version": armorm.__version__,
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


def _notices(evidence: Evidence, found: dict[str, Any]) -> list[notices.Notice]:
    rm = evidence.rm
    biases = rm.model.config.debiasing.get("against", [])
    gate, verbosity = found["gate"], found["verbosity"]
    said = notices.of_steering(found["model"]["steering"])
    if "pairs" in evidence.results:
        accuracy = evidence.results["pairs"].level("overall")["accuracy"]
        said += notices.of_accuracy(accuracy.value, accuracy.interval, accuracy.examples)
    if verbosity:
        audit = evidence.results["pairs"].audits["length"] if "pairs" in evidence.results else None
        gap = None
        if audit is not None:
            view = audit["views"]["as served"]
            fewest = min(audit["examples_more_is_better"], audit["examples_more_is_worse"])
            gap = (view["more_is_better"], view["more_is_worse"], fewest)
        said += notices.of_score(float(verbosity["after"]["pooled"][-1]), gap, debiased=verbosity["debiased"])
    said += notices.of_training(evidence.metrics.get("gate") or {})
    if gate and gate["prompts"]:
        said += notices.of_gate(rm.objectives.names, gate["weights"], biases)
    if verbosity:
        pooled = verbosity["before"]["pooled"][:-1], verbosity["after"]["pooled"][:-1]
        said += notices.of_length(rm.objectives.names, *pooled, biases)
    said += notices.of_objectives(evidence.metrics.get("regression", []))
    refused = len(evidence.scored.refused) + sum(int((at < 0).sum()) for at in evidence.rows)
    return said + notices.of_rows(refused, len(evidence.scored.truncated), len(evidence.conversations))
