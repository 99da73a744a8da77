"""The tables of the ablation, built from its JSON results, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as Printed

from ablations.measuring import LONGER, OWN
from ablations.studies import INTERVALS
from marked_page import markdown

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Columns and rows of text; the first column is a label, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        return markdown(self.columns, self.rows)


def tables(results: Results) -> dict[str, Table]:
    """Every table, by its mark on the page."""
    return {
        "setting": _setting(results),
        "methods": _methods(results),
        "forms": _figures("The gate's form", results["forms"]["figures"], entropy=results["forms"]["notes"]),
        "references": _references(results),
        "domains": _domains(results),
        "ratings_against_pairs": _ratings_against_pairs(results),
        "joint_weights": _joint_weights(results),
        "joint_ratings": _joint_ratings(results),
        "quantiles": _quantiles(results),
    }


def show(shown: Iterable[Table]) -> None:
    console = Console(width=170, highlight=False)
    for table in shown:
        printed = Printed(title=table.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for place, name in enumerate(table.columns):
            printed.add_column(name, justify="right" if place else "left", no_wrap=not place, overflow="fold")
        for row in table.rows:
            printed.add_row(*row)
        console.print(printed)
        console.print()


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def spread(interval: Sequence[float] | None) -> str:
    """An interval, or '' if there are too few prompts for one."""
    if interval is None:
        return ""
    low, high = (round(bound, 3) + 0.0 for bound in interval)  # (no -0.000)
    return f"[{low:.3f}, {high:.3f}]"


def difference(entry: Mapping[str, Any]) -> str:
    """A difference with its interval."""
    return f"{entry['difference']:+.3f} {spread(entry['interval'])}".strip()


def side(entry: Mapping[str, Any]) -> str | None:
    """`better` or `worse` if a difference is significant (p < 0.05), else None."""
    if entry["p"] is None or entry["p"] >= 0.05:
        return None
    return "better" if entry["difference"] > 0 else "worse"


def lead(found: Mapping[str, Any], way: str, figure: str) -> float:
    """Mean over objectives of a metric with ratings minus the same metric with `way`."""
    return sum(entry["ratings"][figure] - entry[way][figure] for entry in found.values()) / max(len(found), 1)


def probability(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _sets(figures: Mapping[str, Any]) -> list[str]:
    return [name for name in next(iter(figures.values())) if name != "against"]


def _setting(results: Results) -> Table:
    setting = results["setting"]
    rows = [[name.replace("_", " "), f"{count:,}"] for name, count in setting["counts"].items()]
    rows += [["backbone", setting["backbone"]["name"]], ["objectives", str(len(setting["objectives"]))]]
    return Table("Data and backbone", ["", "count"], rows)


def _methods(results: Results) -> Table:
    table = _figures("Weighting the objectives", results["methods"]["figures"])
    rows = []
    for row, entry in zip(table.rows, results["methods"]["figures"].values(), strict=True):
        against = entry.get("against", {}).get(OWN)
        rows.append([*row, *(("", "") if against is None else (difference(against), probability(against["p"])))])
    return Table(table.title, [*table.columns, f"{OWN}: minus the gate", "p"], rows)


def _figures(title: str, figures: Mapping[str, Any], entropy: Mapping[str, Any] | None = None) -> Table:
    names = _sets(figures)
    rows = []
    for method, entry in figures.items():
        row = [method]
        for name in names:
            bounds = "" if name == LONGER else f" {spread(entry[name]['interval'])}".rstrip()
            row.append(number(entry[name]["value"]) + bounds)
        if entropy is not None:
            row.append(number(entropy[method][0]["entropy"], 2))
        rows.append(row)
    return Table(title, ["", *names, *(["entropy"] if entropy is not None else [])], rows)


def _references(results: Results) -> Table:
    figures, table = results["references"]["figures"], results["references"]["table"]
    benchmarks = [name for name in _sets(figures) if name not in (OWN, LONGER)]
    places = list(next(iter(table.values()))["left"])
    shown = places[:2]
    rows = []
    for choice, entry in table.items():
        penalties = entry["penalties"]
        mean = sum(map(abs, penalties)) / len(penalties)
        worst = max(places, key=lambda place: entry["left"][place])
        rows.append(
            [
                choice,
                number(mean, 2),
                *(number(entry["left"][place], 2) for place in shown),
                f"{number(entry['left'][worst], 2)} ({worst})",
                *(number(figures[choice][name]["value"]) for name in (OWN, *benchmarks, LONGER)),
            ]
        )
    columns = [
        "",
        "mean penalty",
        *(f"remaining on {place}" for place in shown),
        "largest remaining",
        OWN,
        *benchmarks,
        LONGER,
    ]
    return Table("Reference data of the debiasing", columns, rows)


def _domains(results: Results) -> Table:
    rows = []
    for source, entry in results["domains"].items():
        most = sorted(entry["weights"].items(), key=lambda pair: -pair[1])[:2]
        rows.append(
            [
                source,
                f"{entry['pairs']:,}",
                f"{entry['prompts']:,}",
                *(
                    f"{number(entry[way]['value'])} {spread(entry[way]['interval'])}".rstrip()
                    for way in ("uniform weights", "gate", "gate that never saw it")
                ),
                difference(entry["gate"]["over_uniform"]),
                difference(entry["gate that never saw it"]["over_uniform"]),
                ", ".join(f"{name} {weight:.2f}" for name, weight in most),
            ]
        )
    columns = ["", "pairs", "prompts", "uniform weights", "gate", "gate that never saw it"]
    columns += ["gate minus uniform", "never saw it, minus uniform", "largest weights"]
    return Table("Domains", columns, rows)


WAYS = ("ratings", "pairs within prompts", "pairs across prompts")


def _ratings_against_pairs(results: Results) -> Table:
    found = results["ratings_against_pairs"]
    rows = [
        [
            name,
            f"{entry['rows']:,}",
            f"{entry['pairs']:,}",
            f"{entry['test']:,}",
            *(number(entry[way]["spearman"]) for way in WAYS),
            *(number(entry[way]["within_prompt"]) for way in WAYS),
        ]
        for name, entry in found.items()
    ]
    if found:
        means = [
            number(sum(entry[way][figure] for entry in found.values()) / len(found))
            for figure in ("spearman", "within_prompt")
            for way in WAYS
        ]
        rows.append(["mean", "", "", "", *means])
    columns = ["", "rows", "pairs", "test rows", *(f"Spearman: {way}" for way in WAYS)]
    columns += [f"within prompts: {way}" for way in WAYS]
    return Table("Absolute ratings against the same ratings as pairs", columns, rows)


def _joint_weights(results: Results) -> Table:
    report = results["joint"]["report"]
    rows = [
        [
            f"{beta:g}" + (" (chosen)" if beta == report["pair_weight"] else ""),
            number(report["losses"][i], 4),
            number(report["accuracies"][i]),
            number(report["mean_r2"][i]),
        ]
        for i, beta in enumerate(report["pair_weights"])
    ]
    columns = ["weight of the pair loss", "pair loss", "pair accuracy", "mean R²"]
    return Table("Heads trained on ratings and pairs together, held-out folds", columns, rows)


def _joint_ratings(results: Results) -> Table:
    before, after = results["joint"]["stage_1"], results["joint"]["joint"]
    rows = [
        [name, *(number(part[name][figure]) for figure in ("spearman", "within_prompt") for part in (before, after))]
        for name in before
    ]
    if before:
        means = []
        for figure in ("spearman", "within_prompt"):
            for part in (before, after):  # (no accuracy where no prompt has two ratings that differ)
                found = [entry[figure] for entry in part.values() if entry[figure] is not None]
                means.append(number(sum(found) / len(found) if found else None))
        rows.append(["mean", *means])
    columns = ["", "Spearman: ratings alone", "Spearman: joint"]
    columns += ["within prompts: ratings alone", "within prompts: joint"]
    return Table("Predicted ratings before and after joint training, test rows", columns, rows)


def _quantiles(results: Results) -> Table:
    rows = []
    for name, entry in results["quantiles"].items():
        heads = entry["quantile heads"]
        rows.append(
            [
                name,
                f"{entry['test']:,}",
                "one spread" if entry["penalty"] is None else f"{entry['penalty']:g}",
                *(number(heads["coverage"][interval], 2) for interval in INTERVALS),
                *(number(entry[way]["pinball"], 4) for way in ("quantile heads", "one spread", "training ratings")),
                *(number(entry["spearman"][way]) for way in ("reward", "mean of quantiles")),
            ]
        )
    columns = ["", "test rows", "penalty", *(f"inside {interval}" for interval in INTERVALS)]
    columns += ["loss: quantile heads", "loss: one spread", "loss: training ratings"]
    columns += ["Spearman: reward", "Spearman: mean of quantiles"]
    return Table("Quantile heads on held-out prompts", columns, rows)
