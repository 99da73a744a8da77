"""Training rows behind a reward: how it changes without a rated row, without all rows of a prompt, without a set.

The changes are exact (`armorm.heads.influence`): what a fit without these rows gives, with the same penalty, scales,
transform, backbone and start. Every effect is the reward with, minus the reward without the rows: above 0, they raise
it. Effects of single rows do not add up to that of all of them, because the others take over what a left-out row said.

The features of the rows are read twice: for their sums, and for each row's leverage. A set is one `ratings` entry of
the recipe, or one construct.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from armorm.errors import StoreError
from armorm.explain.text import signed
from armorm.heads.influence import FittedRidge, effect_of_rows, reward_of_rest
from armorm.heads.rated_record import RatedRecord, RatedRun
from armorm.heads.statistics import Moments
from armorm.objectives import Objective
from armorm.progress import progress

_LONGEST = 60  # characters of a text in a table


@dataclass(frozen=True)
class RowInfluences:
    """Effects of r rated rows, their q prompts and their sets on the reward of one objective, mapped scale.

    Attributes:
        objective: whose reward it is.
        reward: of the response, as the model gives it.
        coefficient: of the reward in the score; an effect times it is the effect on the score through this objective.
        rows: (r,) positions in the record.
        effects: (r,) reward with minus without each row alone.
        prompts: (q,) positions of distinct prompts in the record.
        prompt_effects: (q,) without all rows of each prompt.
        source_effects: by set, without all rows of it; NaN where an intercept would be left without rows.
        record: of the run's rows.
        shown: rows of each sign that are printed.
    """

    objective: Objective
    reward: float
    coefficient: float
    rows: np.ndarray
    effects: np.ndarray
    prompts: np.ndarray
    prompt_effects: np.ndarray
    source_effects: dict[str, float]
    record: RatedRecord
    shown: int = 5

    def top(self, count: int) -> RowInfluences:
        """The same, of which `count` rows of each sign are printed."""
        return replace(self, shown=count)

    def strongest(self, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Up to `count` rows that raise the reward most, and that lower it most, strongest first."""
        order = np.argsort(-self.effects, kind="stable")
        raising = [i for i in order[:count] if self.effects[i] > 0]
        return self._entries(raising), self._entries([i for i in order[::-1][:count] if self.effects[i] < 0])

    def _entries(self, places: list[Any]) -> list[dict[str, Any]]:
        ratings = self.record.ratings[:, self.record.objectives.position(self.objective.name)]
        return [
            {
                "effect": float(self.effects[i]),
                "rating": float(ratings[self.rows[i]]),
                **self.record.describe(int(self.rows[i])),
            }
            for i in places
        ]

    def strongest_prompts(self, count: int) -> list[dict[str, Any]]:
        """Up to `count` prompts of more than one row with the largest effects of either sign, largest first."""
        several = np.bincount(self.record.prompts[self.rows], minlength=len(self.record.prompt_texts))[self.prompts]
        order = [i for i in np.argsort(-np.abs(self.prompt_effects), kind="stable") if several[i] > 1]
        return [
            {
                "effect": float(self.prompt_effects[i]),
                "rows": int(several[i]),
                "prompt": self.record.prompt_texts[self.prompts[i]],
            }
            for i in order[:count]
        ]

    def to_dict(self, count: int | None = None) -> dict[str, Any]:
        """JSON values of the `count` strongest rows of each sign and of prompts, by default as many as are shown."""
        count = self.shown if count is None else count
        raising, lowering = self.strongest(count)
        return {
            "objective": self.objective.name,
            "reward": self.reward,
            "coefficient": self.coefficient,
            "rated_rows": len(self.rows),
            "raising": raising,
            "lowering": lowering,
            "prompts": self.strongest_prompts(count),
            "sources": self.source_effects,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        name = self.objective.name
        yield Text.assemble(
            (f"rated rows that moved {name}", "bold"),
            f"   reward {self.reward:.4f} by {len(self.rows):,} ratings; effect: with minus without the row",
        )
        raising, lowering = self.strongest(self.shown)
        for title, entries, style in (("raise it", raising, "blue"), ("lower it", lowering, "red")):
            yield Text("")
            yield _table(title, entries, style)
        prompts = self.strongest_prompts(self.shown)
        if prompts:
            yield Text("")
            yield _prompt_table(prompts)
        yield Text("")
        for source, effect in self.source_effects.items():
            yield Text(f"without all of {source}: " + ("undefined" if np.isnan(effect) else signed(-effect)))


def _table(title: str, entries: list[dict[str, Any]], style: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("effect", justify="right", no_wrap=True, style=style)
    table.add_column("rating", justify="right", no_wrap=True)
    table.add_column("set", no_wrap=True)
    table.add_column("row", justify="right", no_wrap=True)
    table.add_column(title, overflow="fold")
    for entry in entries:
        text = f"{_shortened(entry['prompt'])} / {_shortened(entry['response'])}"
        table.add_row(signed(entry["effect"]), f"{entry['rating']:g}", entry["source"], str(entry["row"]), Text(text))
    return table


def _prompt_table(entries: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("effect", "rows"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("all rows of a prompt", overflow="fold")
    for entry in entries:
        table.add_row(signed(entry["effect"]), str(entry["rows"]), Text(_shortened(entry["prompt"])))
    return table


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def row_influences(
    folder: str | Path, name: str, response: np.ndarray, weight: np.ndarray, reward: float, coefficient: float
) -> RowInfluences:
    """Effects on the reward of a response.

    Args:
        folder: of the training run.
        name: of the objective.
        response: (d,) its feature.
        weight: (d,) the model's reward head of the objective, which must be the one that the run fitted.
        reward, coefficient: of the response and the objective.

    Raises:
        ObjectiveError: for an objective that no row of the run rates.
        StoreError: for a folder without a run's rows, or if the reward is not the run's ridge regression alone
            (`joint`, another model).
    """
    run, response = RatedRun.open(folder), response.astype(np.float64)
    record = run.record
    column = record.objectives.position(name)
    if weight.shape != run.weight[column].shape or not np.allclose(weight, run.weight[column], rtol=1e-5, atol=1e-7):
        raise StoreError(
            f"{run.folder}: the model's reward of {name} is not the one that this run fitted to ratings; expected the "
            "run of this model, and no joint training"
        )
    rated = run.rated([column])
    rows, effects, prompts, prompt_effects = [], [], [], []
    with progress("rated rows", 2 * len(rated)) as advance:
        sums = run.sums([column], advance)
        ridge = run.fitted([column], _total(sums.values(), len(response)))
        target = ridge.rotated(response[None])[0]
        for here, features, ratings in run.blocks([column]):
            roots = run.roots([column], here)
            rotated, residuals = roots[:, None] * ridge.rotated(features), ridge.residuals(features, ratings)[:, 0]
            residuals, products = roots * residuals, ridge.products(rotated, target)[:, 0]
            rows.append(here)
            effects.append(products * residuals / (1 - ridge.leverage(rotated)[:, 0]))
            for prompt, effect in _by_prompt(record.prompts[here], ridge, rotated, residuals, products, effects[-1]):
                prompts.append(prompt)
                prompt_effects.append(effect)
            advance(len(here))
    by_source, fitted = {}, float(response @ ridge.weight[0] + ridge.bias[0])
    for source in sums:
        rest = _total((part for other, part in sums.items() if other != source), len(response))
        without = reward_of_rest(rest, record.penalties[column], record.intercept, response)
        by_source[record.source_names[source]] = fitted - without
    return RowInfluences(
        objective=record.objectives[column],
        reward=float(reward),
        coefficient=float(coefficient),
        rows=np.concatenate(rows),
        effects=np.concatenate(effects),
        prompts=np.array(prompts, np.int64),
        prompt_effects=np.array(prompt_effects),
        source_effects=by_source,
        record=record,
    )


def _total(parts: Iterable[Moments], d: int) -> Moments:
    return sum(parts, Moments.zero(d, 1))


def _by_prompt(
    prompts: np.ndarray,
    ridge: FittedRidge,
    rotated: np.ndarray,
    residuals: np.ndarray,
    products: np.ndarray,
    effects: np.ndarray,
) -> Iterator[tuple[int, float]]:
    """Each prompt of a block, whose rows are adjacent, and its effect; that of a prompt of one row is the row's."""
    starts = np.flatnonzero(np.diff(prompts, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(prompts)], strict=True):
        part = slice(start, end)
        if end - start == 1:
            effect = float(effects[start])
        else:
            effect = effect_of_rows(rotated[part], ridge.inverse[:, 0], residuals[part], products[part])
        yield int(prompts[start]), effect
