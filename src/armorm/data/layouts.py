"""Layouts of public data sets: functions from a published row to the rows that it contains.

A layout yields rated rows (`messages`, or `prompt` and `response`, with a column per rating) or preference rows
(`prompt`, `chosen`, `rejected`, `margin`) as plain dictionaries; none for a row without a rating or preference. A row
that lacks a column of its layout is an error naming the column; ratings that the set marks as absent ("N/A") are
missing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from armorm.data.rows import Layout, Row
from armorm.errors import shown

_STEERLM_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_SHP_MARKS = {1: ("human_ref_A", "human_ref_B"), 0: ("human_ref_B", "human_ref_A")}


def helpsteer(row: Row) -> Iterator[Mapping[str, Any]]:
    """`prompt`, `response`, five ratings; HelpSteer2 has earlier turns in the prompt, separated by `<extra_id_1>`."""
    values = dict(row.values)
    prompt = _get(row, "prompt", str)
    if _STEERLM_TURN.search(prompt):
        values["prompt"] = _steerlm_turns(prompt)
    yield values


def ultrafeedback(row: Row) -> Iterator[Mapping[str, Any]]:
    """`instruction` and `completions`, each with `response`, `overall_score` and `annotations.NAME.Rating`."""
    instruction = _get(row, "instruction", str)
    for number, completion in enumerate(_get(row, "completions", list)):
        place = f"completions[{number}]"
        response = _inner(row, completion, "response", place)
        if not isinstance(response, str) or not response.strip():
            continue  # empty answer: no response to rate
        annotations = _inner(row, completion, "annotations", place)
        ratings = {
            name: _rating(row, (annotations.get(name) or {}).get("Rating"), f"{place}.annotations.{name}.Rating")
            for name in ("instruction_following", "truthfulness", "honesty", "helpfulness")
        }
        overall = _rating(row, completion.get("overall_score"), f"{place}.overall_score")
        yield {"prompt": instruction, "response": response, "overall_score": overall, **ratings}


def code_ultrafeedback(row: Row) -> Iterator[Mapping[str, Any]]:
    """`instruction`, `preference` (what is rated), `responses` and `annotations`, matched by their `model`."""
    instruction, preference = _get(row, "instruction", str), _get(row, "preference", str)
    responses = {entry["model"]: entry["response"] for entry in _get(row, "responses", list)}
    for number, annotation in enumerate(_get(row, "annotations", list)):
        model = _inner(row, annotation, "model", f"annotations[{number}]")
        if model not in responses:
            raise row.error(f"found {shown(model)}, expected one of {', '.join(responses)}", f"annotations[{number}]")
        rating = _rating(row, annotation.get("rating"), f"annotations[{number}].rating")
        if rating is not None and responses[model].strip():
            yield {"prompt": instruction, "response": responses[model], preference: rating}


def feedback_collection(row: Row) -> Iterator[Mapping[str, Any]]:
    """`orig_instruction`, `orig_response`, `orig_score` (a number as text)."""
    yield {
        "prompt": _get(row, "orig_instruction", str),
        "response": _get(row, "orig_response", str),
        "score": _rating(row, row.values.get("orig_score"), "orig_score"),
    }


def rated_pair(chosen: str, rejected: str, prompt: str | None = None) -> Layout:
    """The layout of sets of pairs with rated sides: two rated rows per pair.

    Args:
        chosen, rejected: columns of text or messages; ratings are in `NAME_rating` (without `_response`).
        prompt: column of the prompt; None if the sides are whole conversations.
    """

    def layout(row: Row) -> Iterator[Mapping[str, Any]]:
        for column in (chosen, rejected):
            rating_column = f"{column.removesuffix('_response')}_rating"
            rating = _rating(row, _get(row, rating_column), rating_column)
            if prompt is None:
                yield {"messages": _get(row, column, list), "rating": rating}
            else:
                yield {"prompt": _get(row, prompt, str), "response": _get(row, column, str), "rating": rating}

    return layout


def judged_generations(row: Row) -> Iterator[Mapping[str, Any]]:
    """`system`, `input`, `generations` (two texts) and `rating` (the judge's two numbers, in the same order)."""
    ratings, generations = row.values.get("rating"), _get(row, "generations", list)
    if ratings is None:
        return  # no rating (42 rows of the published set)
    if len(ratings) != len(generations):
        raise row.error(f"found {len(ratings)} ratings of {len(generations)} generations, expected one each", "rating")
    for generation, rating in zip(generations, ratings, strict=True):
        yield {"prompt": _asked(row), "response": generation, "rating": _rating(row, rating, "rating")}


def mapped_ratings(scales: Mapping[str, tuple[float, float]]) -> Layout:
    """The layout of a merged set of mapped rewards, which are mapped back to raw ratings.

    Args:
        scales: (scale, offset) of each column: raw = scale * reward + offset.
    """

    def layout(row: Row) -> Iterator[Mapping[str, Any]]:
        values = dict(row.values)
        for column, (scale, offset) in scales.items():
            value = values.get(column)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                values[column] = round(value * scale + offset, 6)  # 5 * 0.7 - 0.5 is 3 up to rounding
        yield values

    return layout


# --- preferences ---------------------------------------------------------------------------------


def shp(row: Row) -> Iterator[Mapping[str, Any]]:
    """`history`, `human_ref_A`, `human_ref_B`, `labels` (1: A is preferred)."""
    label = _get(row, "labels")
    if label not in _SHP_MARKS:
        raise row.error(f"found {shown(label)}, expected 0 or 1", "labels")
    chosen, rejected = _SHP_MARKS[label]
    yield {"prompt": _get(row, "history", str), "chosen": _get(row, chosen, str), "rejected": _get(row, rejected, str)}


def safe_rlhf(by: str) -> Layout:
    """`prompt`, `response_0`, `response_1` and the index of the preferred one.

    Args:
        by: column of the index, `better_response_id` or `safer_response_id`.
    """

    def layout(row: Row) -> Iterator[Mapping[str, Any]]:
        preferred = _get(row, by)
        if preferred not in (0, 1):
            raise row.error(f"found {shown(preferred)}, expected 0 or 1", by)
        sides = [_get(row, f"response_{number}", str) for number in (0, 1)]
        if all(side.strip() for side in sides):
            yield {"prompt": _get(row, "prompt", str), "chosen": sides[preferred], "rejected": sides[1 - preferred]}

    return layout


def helpsteer2_preference(row: Row) -> Iterator[Mapping[str, Any]]:
    """`prompt`, `response_1`, `response_2`, `preference_strength` (-3: the first is much better); ties are skipped."""
    strength = _get(row, "preference_strength")
    if strength not in range(-3, 4):
        raise row.error(f"found {shown(strength)}, expected a whole number from -3 to 3", "preference_strength")
    if strength == 0:
        return
    first, second = _get(row, "response_1", str), _get(row, "response_2", str)
    prompt = _get(row, "prompt", str)
    chosen, rejected = (second, first) if strength > 0 else (first, second)
    split = {"split": row.values["split"]} if "split" in row.values else {}
    turns = _steerlm_turns(prompt) if _STEERLM_TURN.search(prompt) else prompt
    yield {"prompt": turns, "chosen": chosen, "rejected": rejected, "margin": abs(strength), **split}


def scored_pair(chosen_score: str, rejected_score: str) -> Layout:
    """`chosen` and `rejected` with a score each; the margin is the difference if both are numbers."""

    def layout(row: Row) -> Iterator[Mapping[str, Any]]:
        first, second = (row.values.get(name) for name in (chosen_score, rejected_score))
        values = {name: row.values.get(name) for name in ("prompt", "chosen", "rejected") if name in row.values}
        if isinstance(first, (int, float)) and isinstance(second, (int, float)):
            values["margin"] = float(first - second)
        yield values

    return layout


def responses_apart(row: Row) -> Iterator[Mapping[str, Any]]:
    """`instruction`, `chosen_response`, `rejected_response`."""
    names = {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"}
    yield {ours: _get(row, own, str) for ours, own in names.items()}


def judged_pair(row: Row) -> Iterator[Mapping[str, Any]]:
    """`system`, `input`, `chosen`, `rejected`, `status`; ties are skipped."""
    if row.values.get("status") != "tie":
        yield {
            "prompt": _asked(row),
            "chosen": _get(row, "chosen", str),
            "rejected": _get(row, "rejected", str),
        }


# --- pieces --------------------------------------------------------------------------------------


def _get(row: Row, column: str, kind: type | None = None) -> Any:
    value = row.values.get(column)
    if value is None:
        raise row.error(f"found columns {shown(row.filled, 80)}, expected it", column)
    if kind is not None and not isinstance(value, kind):
        raise row.error(f"found {shown(value)}, expected {'text' if kind is str else 'a list'}", column)
    return value


def _inner(row: Row, entry: Any, name: str, place: str) -> Any:
    if not isinstance(entry, Mapping) or name not in entry:
        raise row.error(f"found {shown(entry)}, expected an object with {name}", place)
    return entry[name]


def _rating(row: Row, value: Any, place: str) -> float | None:
    """A number, also as text; None if the set marks it as absent."""
    if value is None or (isinstance(value, str) and value.strip().upper() in ("", "N/A")):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise row.error(f"found {shown(value)}, expected a rating", place) from None
    return None if math.isnan(number) else number


def _asked(row: Row) -> list[dict[str, str]]:
    system = row.values.get("system")
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": _get(row, "input", str)}]


def _steerlm_turns(text: str) -> list[dict[str, str]]:
    first, *rest = _STEERLM_TURN.split(text)
    roles = {"User": "user", "Assistant": "assistant"}
    turns = [{"role": "user", "content": first}]
    turns += [{"role": roles[role], "content": words} for role, words in zip(rest[::2], rest[1::2], strict=True)]
    # Published prompts end with the opening of the response's turn, or before it.
    return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip() else turns
