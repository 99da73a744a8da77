"""Terminal tables of at most 80 columns: results with their audits, comparisons of two models, steering previews.

Shares are printed in percent, correlations and raw errors as they are. Next to each metric are its 95% interval (none
below 50 prompts), the number of prompts, and the values of baselines: the longest or the shortest response wins, the
prompt alone, chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from armorm.evaluation.audits.objectives import ALL
from armorm.evaluation.benchmarks import BENCHMARKS, ratings
from armorm.evaluation.leaderboard import Leaderboard
from armorm.evaluation.metrics import LEVELS
from armorm.evaluation.model_comparison import ModelComparison
from armorm.evaluation.results import MetricResult, Results, number, published, seen_in_training, span
from armorm.steering import sentences

if TYPE_CHECKING:
    from armorm.evaluation.steering_preview import Preview

_LACKING_SHOWN = 6
_OBJECTIVES_SHOWN = 8
_DECIDING_SHOWN = 3
_FLIPS_SHOWN = 3
_PROMPT_SHOWN = 60
_BASELINES = ("length", "shortest", "prompt_only", "chance")
LEADERBOARD_NOTE = (
    "to best: paired difference from the first model; * p < .05 after Holm's correction over the models; permutation "
    "test that exchanges two models on whole prompts; no test below 50 prompts."
)
_QUANTITIES = ("length", "markdown", "lists")
_LENGTH = (
    ("accuracy, longer response is better", "more_is_better", "share"),
    ("accuracy, longer response is worse", "more_is_worse", "share"),
    ("longer response wins", "more_wins", "share"),
    ("correlation of score and length", "correlation", "correlation"),
    ("the same within prompts", "correlation_within_prompts", "correlation"),
)


def results_tables(results: Results) -> RenderableType:
    """Metrics, published numbers and audits of one evaluation."""
    metrics = _rating_metrics(results) if results.benchmark == "ratings" else _metrics(results)
    return Group(_head(results), Text(""), metrics, *_lacking(results), *_published(results), *_audits(results.audits))


def comparison_table(comparison: ModelComparison) -> RenderableType:
    """Paired differences, first minus second."""
    head = Text.assemble(
        (BENCHMARKS[comparison.benchmark].title, "bold"),
        f": {comparison.first} against {comparison.second}, {comparison.shared:,} shared examples",
    )
    if comparison.only_first or comparison.only_second:
        head.append(f" ({comparison.only_first:,} only in the first, {comparison.only_second:,} only in the second)")
    table = _table(("", "this", "other", "difference", "95% interval", "p", "prompts"))
    for level in LEVELS:
        for entry in comparison.differences:
            if entry.level != level or (math.isnan(entry.first) and math.isnan(entry.second)):
                continue
            mark = "*" if entry.significant else ""
            table.add_row(
                _name(entry.name, level),
                number(entry.first, entry.unit),
                number(entry.second, entry.unit),
                Text(number(entry.difference, entry.unit, sign=True) + mark, style="bold" if mark else ""),
                span(entry.interval, entry.unit, sign=True),
                p_value(entry.p),
                f"{entry.prompts:,}",
            )
    note = Text(
        "* p < .05 after Holm's correction over the metrics of its level; permutation test that exchanges the models "
        "on whole prompts; no test below 50 prompts.",
        style="dim",
    )
    return Group(head, Text(""), table, Text(""), note)


def leaderboard_tables(boards: Sequence[Leaderboard]) -> RenderableType:
    """A table of each metric of each benchmark, best model first."""
    parts: list[RenderableType] = []
    for board in boards:
        title = BENCHMARKS[board.benchmark].title
        parts += [Text.assemble((title, "bold"), f": {len(board.models)} models, {board.shared:,} shared examples")]
        parts += [
            Text(f"{model}: {count:,} more examples are not shared", style="yellow")
            for model, count in zip(board.models, board.only, strict=True)
            if count
        ]
        for metric in board.metrics:
            part = " (part)" if metric.lacking else ""
            table = _table((f"{metric.name}{part}", "score", "95% interval", "to best", "95% interval", "p"), 28)
            for entry in metric.entries:
                mark = "*" if entry.significant else ""
                table.add_row(
                    Text(entry.model),
                    Text(number(entry.value, metric.unit), style="cyan"),
                    span(entry.interval, metric.unit),
                    number(entry.difference, metric.unit, sign=True) + mark,
                    span(entry.difference_interval, metric.unit, sign=True),
                    p_value(entry.p),
                )
            parts += [Text(""), table]
        parts += [
            Text(f"{model} did not score a response of {_count(count, 'example')}, counted as wrong", style="yellow")
            for model, count in zip(board.models, board.refused, strict=True)
            if count
        ]
        parts.append(Text(""))
    parts.append(Text(LEADERBOARD_NOTE, style="dim"))
    return Group(*parts)


def preview_tables(found: Preview) -> RenderableType:
    """All tables of a steering preview."""
    parts: list[RenderableType] = [Text(f"- {sentence}") for sentence in sentences(found.steering)]
    parts += [Text(""), _accuracy(found), Text(""), _flips(found), Text(""), _length(found), Text(""), _weights(found)]
    if found.changed:
        parts += [Text(""), _changed_pairs(found)]
    return Group(*parts)


def as_json(
    results: Results, comparison: ModelComparison | None = None, boards: Sequence[Leaderboard] = ()
) -> Mapping[str, Any]:
    """Output of `--json`: the results without their examples, and the comparison with one or several models if any."""
    found = results.to_dict(examples=False)
    table = published(results)
    found["published"] = {"columns": table.columns, "rows": table.rows, "withheld": table.withheld}
    if comparison is not None:
        found["against"] = comparison.to_dict()
    if boards:
        found["leaderboard"] = [board.to_dict() for board in boards]
    return found


def p_value(p: float | None) -> str:
    """A p-value with three digits; empty for None."""
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "<.001"


def _percent(value: float | None, *, sign: bool = False) -> str:
    return number(value, "share", sign=sign)


def _table(columns: Sequence[str], first_width: int = 31) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column(columns[0], max_width=first_width, overflow="fold")
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _name(name: str, level: str) -> Text:
    return Text(("  " if level == "subsets" else "") + name, style="bold" if level == "overall" else "")


def _head(results: Results) -> Text:
    backbone = results.model.get("backbone") or {}
    counts = results.counts
    text = Text.assemble((BENCHMARKS[results.benchmark].title, "bold"), ": ", (str(results.model["name"]), "bold"))
    text.append(f" ({results.model['kind']}")
    text.append(f" on {backbone['name']}, {backbone['dtype']})" if backbone.get("name") else ")")
    text.append(f"\n{', '.join(results.data['sources'])}: {_count(counts['examples'], 'example')} of ")
    text.append(f"{_count(counts['prompts'], 'prompt')}, {_count(counts['conversations'], 'distinct conversation')}")
    for reason, count in results.data.get("left_out", {}).items():
        text.append(f"\nskipped: {count:,} {reason}")
    if "seen" in results.data:
        text.append(f"\n{seen_in_training(results.data['seen'])}")
    if counts["refused_responses"]:
        responses, examples = _count(counts["refused_responses"], "response"), counts["refused_examples"]
        text.append(f"\nnot scored: {responses} of {_count(examples, 'example')}, counted as wrong", style="yellow")
    if counts.get("unparsed"):
        text.append(f"\nanswers without a verdict: {counts['unparsed']:,} of {counts['answers']:,}", style="yellow")
    if counts["truncated_examples"]:
        text.append(f"\ntruncated: prompts of {_count(counts['truncated_examples'], 'example')}", style="yellow")
    ties = f"{_count(counts['ties'], 'example')} with a tie; " if counts["ties"] else ""
    text.append(f"\n{ties}{BENCHMARKS[results.benchmark].rule}", style="dim")
    return text


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _values(metric: MetricResult, baselines: Sequence[str]) -> list[RenderableType]:
    return [
        Text(number(metric.value, metric.unit), style="cyan"),
        span(metric.interval, metric.unit),
        f"{metric.prompts:,}",
        *(number(metric.baselines.get(name), metric.unit) for name in baselines),
    ]


def _metrics(results: Results) -> Table:
    table = _table(("%", "score", "95% interval", "prompts", "longest", "shortest", "prompt", "chance"), 24)
    for level in LEVELS:
        for metric in results.level(level).values():
            if not math.isnan(metric.value):
                name = metric.name + (" (part)" if metric.lacking and level != "subsets" else "")
                table.add_row(_name(name, level), *_values(metric, _BASELINES))
    return table


def _rating_metrics(results: Results) -> Group:
    columns = ("value", "95% interval", "prompts", "length", "prompt")
    tables = [_table(("", *columns))]
    for metric in results.level("overall").values():
        tables[0].add_row(metric.name, *_values(metric, ("length", "prompt_only")))
    for kind, title in ((ratings.SPEARMAN, "Spearman"), (ratings.WITHIN, "within prompts, %"), (ratings.MAE, "error")):
        tables.append(_table((f"objective: {title}", *columns)))
        for objective, metric in ratings.by_objective(results.level("subsets"), kind).items():
            if not math.isnan(metric.value):
                tables[-1].add_row(Text(objective), *_values(metric, ("length", "prompt_only")))
    parts = [part for table in tables if table.row_count for part in (table, Text(""))]
    return Group(*parts[:-1])


def _lacking(results: Results) -> list[RenderableType]:
    """What the data lacks of the published benchmark, once for all metrics that lack the same."""
    found: dict[tuple[str, ...], list[str]] = {}
    for level in ("overall", "sections"):
        for metric in results.level(level).values():
            if metric.lacking:
                state = " (missing)" if math.isnan(metric.value) else " (in part)"
                found.setdefault(metric.lacking, []).append(metric.name + state)
    parts: list[RenderableType] = [Text("")] if found else []
    for lacking, names in found.items():
        more = len(lacking) - _LACKING_SHOWN
        named = ", ".join(lacking[:_LACKING_SHOWN]) + (f" and {more} more" if more > 0 else "")
        parts.append(Text.assemble((", ".join(names), "yellow"), f": the data lacks {named}"))
    return parts


def _published(results: Results) -> list[RenderableType]:
    found = published(results)
    parts: list[RenderableType] = []
    if found.rows:
        table = _table(("published, %", *found.columns.values()), 33)
        own = [Text(_percent(found.own[place]), style="cyan") for place in found.columns]
        table.add_row(Text(f"this: {results.model['name']}", style="bold"), *own)
        for row in found.rows:
            values = [_percent(row["figures"].get(place)) for place in found.columns]
            table.add_row(Text(f"{row['model']} (published)"), *values)
        sources = dict.fromkeys(str(row["source"]) for row in found.rows)
        parts += [Text(""), table, *(Text(f"published: {source}", style="dim") for source in sources)]
    elif found.withheld:
        headings = ", ".join(found.withheld)
        note = f"no published numbers to compare {headings} with: they are for the complete benchmark"
        parts += [Text(""), Text(note, style="dim")]
    return parts + [Text(f"published, computed differently: {line}", style="dim") for line in found.unplaced]


def _audits(audits: Mapping[str, Any]) -> list[RenderableType]:
    """The audits that the results hold."""
    parts: list[RenderableType] = []
    if any(name in audits for name in _QUANTITIES):
        parts.append(_bias({name: audits[name] for name in _QUANTITIES if name in audits}))
    if audits.get("objectives"):
        parts.append(_objectives(audits["objectives"], audits["decisions"].get(ALL, {})))
    if audits.get("decisions"):
        parts.append(_decisions(audits["decisions"]))
    if audits.get("gate"):
        parts.append(_gate(audits["gate"]))
    if audits.get("calibration", {}).get("comparisons"):
        parts.append(_calibration(audits["calibration"]))
    return [line for part in parts for line in (Text(""), part)]


def _bias(audits: Mapping[str, Any]) -> Table:
    """Accuracy where the response with more of a quantity is better and worse, its win rate, correlations."""
    compared = any(audit["examples_more_is_better"] for audit in audits.values())
    shares = ("more_is_better", "more_is_worse", "more_wins") if compared else ()
    columns = ("more is better", "is worse", "wins") if compared else ()
    table = _table(("preference for more", *columns, "corr.", "in prompt"), 30)
    for name, audit in audits.items():
        if compared:
            counts = [f"{audit[key]:,}" for key in ("examples_more_is_better", "examples_more_is_worse")]
            base_rate = _percent(audit["more_is_better"])
            table.add_row(f"{name}: examples, base rate", *counts, base_rate, "", "", style="dim")
        for view, values in audit["views"].items():
            correlations = [values[key] for key in ("correlation", "correlation_within_prompts")]
            table.add_row(
                f"{name}, {view}",
                *(_percent(values[key]) for key in shares),
                *("" if value is None or math.isnan(value) else f"{value:+.2f}" for value in correlations),
            )
    return table


def _objectives(alone: Mapping[str, Any], decisions: Mapping[str, Any]) -> Table:
    table = _table(("objective alone, %", "reward", "debiased", "weight", "decides wins", "losses"), 30)
    ranked = sorted(alone.items(), key=lambda entry: -entry[1]["mean_weight"])
    for name, values in ranked[:_OBJECTIVES_SHOWN]:
        shares = [decisions.get(f"deciding_{outcome}", {}).get(name, 0.0) for outcome in ("wins", "losses")]
        columns = [*(values[key] for key in ("reward", "debiased", "mean_weight")), *shares]
        table.add_row(Text(name), *map(_percent, columns))
    if len(ranked) > _OBJECTIVES_SHOWN:
        table.add_row(Text(f"and {len(ranked) - _OBJECTIVES_SHOWN} with less weight", style="dim"))
    return table


def _decisions(decisions: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for name, width in (("what decides", 24), ("wins", 26), ("losses", 26)):
        table.add_column(name, max_width=width, overflow="fold")
    for subset, entry in decisions.items():
        if subset == ALL and len(decisions) > 1:
            continue
        outcomes = []
        for outcome in ("wins", "losses"):
            outcomes.append(Text(f"{entry[outcome]:,}"))
            for name, share in list(entry[f"deciding_{outcome}"].items())[:_DECIDING_SHOWN]:
                outcomes[-1].append(f"\n{100 * share:.0f}% ", style="dim").append(name)
        table.add_row(Text(subset), *outcomes)
    return table


def _gate(gate: Mapping[str, Any]) -> Table:
    table = _table(("gate by source, %", "gate", "mean wts", "equal", "gain", "95% interval", "prompts"), 24)
    for source, values in gate.items():
        table.add_row(
            Text(source or "(no name)"),
            *(_percent(values[key]) for key in ("gate", "mean_weights", "uniform")),
            _percent(values["gain"], sign=True),
            span(values["interval"], "share", sign=True),
            f"{values['prompts']:,}",
        )
    return table


def _calibration(values: Mapping[str, Any]) -> Text:
    return Text.assemble(
        ("calibration  " if values.get("calibrated") else "calibration if margins were logits  ", "bold"),
        f"error {_percent(values['expected_calibration_error'])}%, log loss {values['log_loss']:.3f}, "
        f"Brier {values['brier']:.3f};\nmultiplying margins by {values['best_scale']:.3g} would give "
        f"log loss {values['log_loss_at_best_scale']:.3f}",
    )


def _accuracy(found: Preview) -> Table:
    table = _table(("accuracy, %", "before", "after", "change", "95% interval", "pairs"), 38)
    for name, entry in found.accuracy.items():
        table.add_row(
            Text(name, style="bold" if name == "all" else ""),
            _percent(entry["before"]),
            Text(_percent(entry["after"]), style="cyan"),
            _percent(entry["difference"], sign=True),
            span(entry["interval"], "share", sign=True),
            f"{entry['pairs']:,}",
        )
    return table


def _flips(found: Preview) -> Table:
    table = _table(("rankings that flip", "to right", "to wrong"), 38)
    flips = found.flips
    table.add_row(
        Text(f"all: {flips['share']:.1%} of scored pairs", style="bold"),
        f"{flips['to_right']:,.0f}",
        f"{flips['to_wrong']:,.0f}",
    )
    for subset, entry in found.by_subset.items():
        table.add_row(Text(f"  {subset}"), f"{entry['to_right']:,}", f"{entry['to_wrong']:,}")
    shorter, longer = found.by_length["to_shorter"], found.by_length["to_longer"]
    table.caption = f"{shorter:,} flip from the longer to the shorter response, {longer:,} the other way"
    table.caption_justify, table.caption_style = "left", "dim"
    return table


def _length(found: Preview) -> Table:
    from armorm.evaluation.steering_preview import AFTER, BEFORE  # loads torch, which other tables do not need

    table = _table(("length", "before", "after"), 38)
    for label, key, unit in _LENGTH:
        table.add_row(label, *(number(found.length[view][key], unit, sign=unit != "share") for view in (BEFORE, AFTER)))
    return table


def _weights(found: Preview) -> Table:
    table = _table(("mean weight, %", "before", "after"), 38)
    ranked = sorted(found.weights.items(), key=lambda entry: -abs(entry[1][1] - entry[1][0]))
    shown = [entry for entry in ranked if max(entry[1]) >= 0.0005]
    for name, weights in shown:
        table.add_row(Text(name), *map(_percent, weights))
    if len(shown) < len(ranked):
        table.add_row(Text(f"and {len(ranked) - len(shown)} with less than 0.05", style="dim"))
    return table


def _changed_pairs(found: Preview) -> RenderableType:
    parts: list[RenderableType] = [Text("flips with the largest change of margin", style="bold")]
    for flip in found.changed[:_FLIPS_SHOWN]:
        prompt = " ".join(flip.better.messages[-2].content.split())
        prompt = prompt if len(prompt) <= _PROMPT_SHOWN else prompt[: _PROMPT_SHOWN - 1] + "…"
        way = Text("right", "green") if flip.after > 0 else Text("wrong", "red")
        parts.append(Text.assemble(f"row {flip.row}, now ", way, f": {flip.before:+.3f} to {flip.after:+.3f}"))
        parts.append(Text(f"  {prompt}", style="dim"))
        parts.append(Text(f"  decided by {', '.join(flip.decided_by[:3])}", style="dim"))
    return Group(*parts)
