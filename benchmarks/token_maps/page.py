"""The tables and verdicts of docs/attribution.md, from the results (`marked_page`).

A rule here derives each sentence from its interval, so the page claims no more than the results support.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from marked_page import fill, markdown
from token_maps.maps import BOTH, GROWTH, LAST, MEAN, OCCLUSION, POSITION, READ, SURPRISAL
from token_maps.measures import ANY
from token_maps.replies import ERROR_TYPES, PLANTED

Results = Mapping[str, Any]
Entry = Mapping[str, Any]
PER_TOKEN, SUMS = "mean part, mean per token", "mean part, sum of deviations"
# Rows of the main table: title, map of tokens (spans), map of sentences (deletion, planted faults), method (cost).
ROWS = (
    ("random", "random", "random", ""),
    (POSITION, POSITION, POSITION, ""),
    (SURPRISAL, SURPRISAL, SURPRISAL, ""),
    ("mean part", MEAN, PER_TOKEN, "explain(tokens=True)"),
    ("mean part, averaged over sentences", f"{MEAN}, by sentence", PER_TOKEN, "explain(tokens=True)"),
    ("last part, integrated gradients", LAST, LAST, "gradient of the score"),
    ("both parts (mean part + gradients)", BOTH, BOTH, "gradient of the score"),
    (OCCLUSION, OCCLUSION, OCCLUSION, "occlude"),
    (GROWTH, GROWTH, GROWTH, ""),
    (READ, READ, READ, ""),
)
_UNMEASURED = "Not measured yet."


def write(page: Path, results: Results) -> None:
    """Rewrite the marked parts of the page; a table whose part was not measured says so.

    Raises:
        SystemExit: for an unknown mark.
    """
    tables: dict[str, tuple[Callable[[Results], str], Sequence[str]]] = {
        "main": (_main, ("deletion", "cost")),
        "types": (_types, ("spans",)),
        "objectives": (_objectives, ("spans",)),
        "every": (_every, ("spans",)),
        "gradient": (_gradient, ("gradient",)),
        "deletion": (_deletion, ("deletion",)),
        "predicted": (_predicted, ("deletion",)),
        "planted": (_planted, ()),
        "measured": (_measured, ()),
    }
    parts = {
        name: table(results) if all(part in results for part in needed) else _UNMEASURED
        for name, (table, needed) in tables.items()
    }
    fill(page, parts | {"verdicts": "\n".join(f"- {line}" for line in sentences(results))})


def number(entry: Entry | None, digits: int = 2, *, signed: bool = False) -> str:
    """Value and 95% interval; '' without an entry."""
    if entry is None:
        return ""
    form = f"{'+' if signed else ''}.{digits}f"
    value = format(round(entry["value"], digits) + 0.0, form)
    if entry["interval"] is None:
        return value
    low, high = (format(round(bound, digits) + 0.0, form) for bound in entry["interval"])
    return f"{value} ({low} to {high})"


def from_position(entry: Entry) -> Entry:
    """The difference of an AUC from that of position, as an entry."""
    value, interval = entry["minus_position"]
    return {"value": value, "interval": interval}


def _above(entry: Entry, bound: float = 0.0) -> bool:
    return entry["interval"] is not None and entry["interval"][0] > bound


def _below(entry: Entry, bound: float = 0.0) -> bool:
    return entry["interval"] is not None and entry["interval"][1] < bound


def _main(results: Results) -> str:
    spans, few = (results[part]["auc"][ANY]["maps"] if part in results else {} for part in ("spans", "gradient"))
    removed, cost = results["deletion"]["removed"]["1"], results["cost"]["relative"]
    columns = ["map", "marked spans, AUC", "AUC minus position", "gain, 1 sentence removed", *PLANTED, "cost"]
    rows = []
    for title, tokens, sentence, method in ROWS:
        entry = spans.get(tokens) or few.get(tokens)
        of_few = f" ({entry['replies']} answers)" if entry and tokens not in spans else ""
        difference = "" if entry is None or tokens == POSITION else number(from_position(entry), signed=True)
        gain = "" if sentence == "random" else number(removed.get(f"{sentence} minus random"), signed=True)
        planted = [number(results.get(kind, {}).get("lowest", {}).get(sentence)) for kind in PLANTED]
        times = f"{cost[method]:.1f}" if method else ""
        rows.append([f"{title}{of_few}", number(entry), difference, gain, *planted, times])
    return markdown(columns, rows)


def _types(results: Results) -> str:
    found = {kind: results["spans"]["auc"][kind]["maps"] for kind in ERROR_TYPES}
    shown = dict.fromkeys(tokens for _, tokens, _, _ in ROWS if tokens in found[ERROR_TYPES[0]])
    rows = [[name, *(number(maps[name]) for maps in found.values())] for name in shown]
    columns = [f"{kind} ({maps[POSITION]['replies']} prompts)" for kind, maps in found.items()]
    return markdown(["map", *columns], rows)


def _objectives(results: Results) -> str:
    found = {kind: results["spans"]["auc"][kind]["objectives"] for kind in (ANY, *ERROR_TYPES)}
    names = [name for name in found[ANY] if not name.endswith(", by sentence")]
    rows = [[name, *(number(values[name]) for values in found.values())] for name in names]
    return markdown(["objective", *found], rows)


def _gradient(results: Results) -> str:
    part = results["gradient"]
    maps, removed = part["auc"][ANY]["maps"], part["deletion"]["removed"]["1"]
    predicted = part["deletion"]["predicted"]["1"]
    rows = []
    for name in (POSITION, SURPRISAL, MEAN, LAST, BOTH, OCCLUSION):
        difference = "" if name == POSITION else number(from_position(maps[name]), signed=True)
        fits = [number(predicted[kind].get(name)) for kind in ("r2", "correlation_within_replies")]
        rows.append([name, number(maps[name]), difference, number(removed[f"{name} minus random"], signed=True), *fits])
    columns = ["map", "marked spans, AUC", "AUC minus position", "gain, 1 sentence removed"]
    return markdown([*columns, "R² of the gain", "correlation with the gain"], rows)


def _deletion(results: Results) -> str:
    removed = results["deletion"]["removed"]
    names = [name for name in removed["1"] if not name.endswith("minus random") and name != "random"]
    rows = [[n, *(number(found[f"{n} minus random"], signed=True) for found in removed.values())] for n in names]
    return markdown(["removed by", *(f"{k} removed" for k in removed)], rows)


def _predicted(results: Results) -> str:
    found = results["deletion"]["predicted"]
    rows, columns = [], ["predicted by"]
    for k in found:
        columns += [f"R², {k} removed", "correlation"]
    for name in found["1"]["r2"]:
        kinds = ("r2", "correlation_within_replies")
        rows.append([name, *(number(entry[kind][name]) for entry in found.values() for kind in kinds)])
    return markdown(columns, rows)


def _planted(results: Results) -> str:
    found = {kind: results[kind] for kind in PLANTED if kind in results}
    lowest = {kind: entry["lowest"] for kind, entry in found.items()}
    names = dict.fromkeys(name for shares in lowest.values() for name in shares)
    rows = [[name, *(number(shares[name]) for shares in lowest.values())] for name in names]
    for way in ("lowest", "highest"):
        values = [entry["shuffled"].get(way) for entry in found.values()]
        shown = [f"{value['mean']:.2f} (sd {value['std']:.2f})" if value else "" for value in values]
        rows.append([f"shuffled head weights, the planted sentence is the {way}", *shown])
    return markdown(["map", *found], rows)


def _every(results: Results) -> str:
    maps = results["spans"]["auc"][ANY]["maps"]
    rows = [
        [name, number(entry), number(from_position(entry), signed=True)]
        for name, entry in sorted(maps.items(), key=lambda item: -item[1]["value"])
    ]
    return markdown(["map", "AUC", "minus position"], rows)


def _measured(results: Results) -> str:
    used = {"spans": "answers", "gradient": "gradients"}
    rows = [
        [name, "1" if name == "cost" else str(part["sizes"][used.get(name, "good")]), part["machine"]["dtype"]]
        for name, part in results.items()
        if isinstance(part, Mapping) and "sizes" in part
    ]
    return markdown(["part", "replies", "dtype"], rows)


def sentences(results: Results) -> list[str]:
    """What the results support."""
    found, unmeasured = [], []
    of_parts: dict[str, Callable[[Results], list[str]]] = {
        "spans": _of_spans,
        "gradient": _of_gradients,
        "deletion": _of_deletions,
        **{kind: partial(_of_fault, kind) for kind in PLANTED},
    }
    for part, of_part in of_parts.items():
        if part in results:
            found += of_part(results)
        else:
            unmeasured.append(part)
    return [*found, *([f"Not measured yet: {', '.join(unmeasured)}."] if unmeasured else [])]


def _of_spans(results: Results) -> list[str]:
    spans = results["spans"]["auc"]
    maps = spans[ANY]["maps"]
    alone = {name: entry for name, entry in maps.items() if not _is_control(name)}
    added = {name: entry for name, entry in maps.items() if name.startswith(f"{POSITION} and ")}
    found = [
        f"Marked spans, {maps[POSITION]['replies']} prompts: "
        + _against_position(alone, "map")
        + f" Position alone has {number(maps[POSITION], 3)}.",
        "Added to position: " + _against_position(added, "sum"),
    ]
    shown = dict.fromkeys(name for _, name, _, _ in ROWS if name in alone)
    above = [f"{name} {number(maps[name], 3)}" for name in shown if _above(maps[name], 0.5)]
    found.append(f"Better than chance on marked spans, of the maps in the table: {'; '.join(above) or 'none'}.")
    for kind in ERROR_TYPES:
        of = {name: entry for name, entry in spans[kind]["maps"].items() if not _is_control(name)}
        found.append(f"{kind} spans: {_against_position(of, 'map')}")
    shuffled = results["spans"]["shuffled"]
    area, same = shuffled["AUC"], shuffled["correlation"]
    found.append(
        f"Shuffled head weights: AUC {area['mean']:.3f} (sd {area['std']:.3f} over shuffles), correlation with the "
        f"real map {same['mean'] + 0.0:.2f} (sd {same['std']:.2f})."
    )
    return found


def _is_control(name: str) -> bool:
    return name.startswith((POSITION, "random"))


def _against_position(maps: Mapping[str, Entry], kind: str) -> str:
    """Whether any of the maps is better than position, and the best one."""
    best = max(maps, key=lambda name: maps[name]["minus_position"][0])
    better = [name for name, entry in maps.items() if _above(from_position(entry))]
    of_best = f"{best}, {number(from_position(maps[best]), 3, signed=True)}"
    if maps[best]["interval"] is None:
        return f"too few prompts for intervals; the best of {len(maps)} {kind}s is {of_best} from position."
    if better:
        return f"{len(better)} of {len(maps)} {kind}s beat position; the best is {of_best}."
    return f"no {kind} of {len(maps)} beats position; the best is {of_best} from position."


def _of_gradients(results: Results) -> list[str]:
    part = results["gradient"]
    maps = {name: part["auc"][ANY]["maps"][name] for name in (LAST, BOTH)}
    error, change = part["median_completeness_error"], part["median_explained_change"]
    return [
        f"Integrated gradients, {maps[LAST]['replies']} prompts: {_against_position(maps, 'map')}",
        f"The sum of the gradients is off by {error:.2g} (median); the attributed change is {change:.2g} in size.",
    ]


def _of_deletions(results: Results) -> list[str]:
    removed, predicted = results["deletion"]["removed"]["1"], results["deletion"]["predicted"]
    names = [name for name in removed if f"{name} minus random" in removed and name != "random"]
    gains = {name: removed[f"{name} minus random"] for name in names}
    better = [f"{name} {number(gains[name], signed=True)}" for name in names if _above(gains[name])]
    others = [name for name in names if not _above(gains[name])]
    r2 = number(predicted["1"]["r2"][MEAN])
    correlation = number(predicted["1"]["correlation_within_replies"][MEAN])
    return [
        "Removing the lowest sentence raises the score more than removing a random one: "
        f"{'; '.join(better) or 'no map'}.",
        f"Not so: {'; '.join(others) or 'none'}.",
        f"The mean part ranks the gains of single sentences with a correlation of {correlation} within replies; of "
        f"their amounts it explains R² {r2}.",
    ]


def _of_fault(kind: str, results: Results) -> list[str]:
    lowest, shuffled = results[kind]["lowest"], results[kind]["shuffled"]
    chance = lowest["chance"]
    better = [n for n, e in lowest.items() if n not in ("chance", "random") and _above(e, chance["value"])]
    better.sort(key=lambda name: -lowest[name]["value"])
    named = "; ".join(f"{name} {number(lowest[name])}" for name in better)
    ways = " and ".join(f"the {way} in {entry['mean']:.2f}" for way, entry in shuffled.items())
    return [
        f"Planted {kind}, the lowest sentence more often than by chance, {number(chance)}: {named or 'no map'}. "
        f"With shuffled head weights it is {ways} of the replies."
    ]
