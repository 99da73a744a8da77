"""PPE: what people preferred in the arena, and whether the best of k answers is a correct one.

In:  scores of two responses with the vote of a person and the names of the models; scores of k answers
     with which of them are correct.
Out: accuracy on human votes, rank correlation of the models that were compared, correctness of the best
     of k on MMLU-Pro, MATH, GPQA, MBPP-Plus and IFEval.

Human votes. A pair that the person called a tie counts towards no accuracy; a tie of scores on a decided
pair is wrong. Models are ranked by Bradley-Terry strengths, once from the votes and once from the
verdicts of the reward model on the same pairs (a tie is half a win for either, and so is a refused pair);
reported are Spearman and Kendall (tau-b) of the two. Every model has one tie with an average
opponent on top, so that one that never won has a strength as well.

Best of k. The answer with the highest score is taken: 1 if it is correct; among several with that score,
the share of correct ones. A refused answer is never taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from scipy.stats import rankdata

from armorm.evaluation.benchmarks.pairs import RIGHT, strictly_right
from armorm.evaluation.examples import Item
from armorm.evaluation.metrics import Cell, Cells, Figure, Measured, Totals, by_group, mean_figure, mean_of, ratio

HUMAN = "human votes"
SETS = {"mmlu": "MMLU-Pro", "math": "MATH", "gpqa": "GPQA", "mbpp": "MBPP-Plus", "ifeval": "IFEval"}
HUMAN_ROWS = 16038
CORRECT = "correct"
BEST_OF_K = "best of k, mean of five sets"
SPEARMAN = "ranking of models, Spearman"
KENDALL = "ranking of models, Kendall"
VOTES, VERDICTS = "votes", "verdicts"
Correlation = Callable[[np.ndarray, np.ndarray], np.ndarray]
_ITERATIONS = 200
_PRIOR_TIE = 1.0


def best_of_k(scores: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Correctness (n,) of the answer with the highest score, of scores (n, k) and correct (n, k)."""
    scores = np.asarray(scores, np.float64)
    known = np.where(np.isnan(scores), -np.inf, scores)
    highest = known.max(1, keepdims=True)
    taken = (known == highest) & np.isfinite(highest)
    return np.nan_to_num(ratio((taken * np.asarray(correct, np.float64)).sum(1), taken.sum(1)))


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Strengths (..., m), as logarithms, of wins (..., m, m): how often the row beat the column, ties half each."""
    wins = np.asarray(wins, np.float64)
    games = wins + np.swapaxes(wins, -1, -2)
    won = wins.sum(-1) + _PRIOR_TIE / 2
    strength = np.ones(won.shape)
    for _ in range(_ITERATIONS):
        both = strength[..., :, None] + strength[..., None, :]
        strength = won / ((games / both).sum(-1) + _PRIOR_TIE / (strength + 1.0))
        strength /= np.exp(np.log(strength).mean(-1, keepdims=True))
    return np.log(strength)


def rank_spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman correlation (...) of strengths (..., m), ties at their mean rank."""
    a, b = (rankdata(np.round(side, 9), axis=-1) for side in (first, second))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    return ratio((a * b).sum(-1), np.sqrt((a**2).sum(-1) * (b**2).sum(-1)))


def rank_kendall(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Kendall's tau-b (...) of strengths (..., m)."""
    signs = [np.sign(np.round(side[..., :, None] - side[..., None, :], 9)) for side in (first, second)]
    moved = [np.abs(sign).sum((-1, -2)) for sign in signs]
    return ratio((signs[0] * signs[1]).sum((-1, -2)), np.sqrt(moved[0] * moved[1]))


def measure(items: Sequence[Item], scores: Sequence[np.ndarray]) -> Cells:
    """`right` of decided votes (all, and by kind of prompt), wins of models over models, correctness of the best."""
    human = [row for row, item in enumerate(items) if item.subset == HUMAN]
    cells = _human_cells(items, scores, human)
    rest = [row for row, item in enumerate(items) if item.subset != HUMAN]
    picked = np.array(
        [float(best_of_k(scores[row][None], np.array([items[row].labels]))[0]) for row in rest], np.float64
    )
    return cells | by_group([items[row].subset for row in rest], CORRECT, picked, rest)


def chance(items: Sequence[Item]) -> Cells:
    """What a random order comes to: half of the votes; the share of correct answers."""
    human = [row for row, item in enumerate(items) if item.subset == HUMAN and len(set(item.labels)) > 1]
    rest = [row for row, item in enumerate(items) if item.subset != HUMAN]
    cells = _by_kind(items, human, np.full(len(human), 0.5))
    share = np.array([np.mean(items[row].labels) for row in rest], np.float64)
    return cells | by_group([items[row].subset for row in rest], CORRECT, share, rest)


def figures(cells: Cells) -> list[Figure]:
    """Of the parts at hand: votes, ranking, best of k of each set, and its mean where all five are there."""
    found: list[Figure] = []
    groups = list(dict.fromkeys(group for group, _ in cells))
    sets = [name for name in SETS.values() if (name, CORRECT) in cells]
    votes = (HUMAN, RIGHT)
    played = tuple(cell for cell in cells if cell[0] in (VOTES, VERDICTS))
    if votes in cells:
        rows = len({int(row) for cell in played for row in cells[cell].rows})
        short = () if rows == HUMAN_ROWS else (f"votes ({rows:,} of {HUMAN_ROWS:,})",)
        found.append(mean_figure("overall", HUMAN, votes, lacking=short))
    if sets:
        every = tuple((name, CORRECT) for name in SETS.values())
        missing = tuple(name for name in SETS.values() if name not in sets)
        found.append(Figure("overall", BEST_OF_K, every, _mean_of_sets, missing))
    if played:
        models = sorted({name for _, pair in played for name in pair.split("\x1f")})
        for name, correlation in ((SPEARMAN, rank_spearman), (KENDALL, rank_kendall)):
            found.append(
                Figure(
                    "sections",
                    name,
                    played,
                    partial(_ranking, models=models, correlation=correlation),
                    unit="correlation",
                )
            )
    found += [mean_figure("subsets", f"best of k, {name}", (name, CORRECT)) for name in sets]
    kinds = [group for group in groups if group.startswith(f"{HUMAN}, ")]
    return found + [mean_figure("subsets", kind, (kind, RIGHT)) for kind in sorted(kinds)]


def _human_cells(items: Sequence[Item], scores: Sequence[np.ndarray], human: Sequence[int]) -> Cells:
    decided = [row for row in human if len(set(items[row].labels)) > 1]
    right = [
        float(strictly_right(*(scores[row] if items[row].labels[0] > items[row].labels[1] else scores[row][::-1])))
        for row in decided
    ]
    cells = _by_kind(items, decided, np.array(right, np.float64))
    wins: dict[Cell, list[tuple[int, float]]] = {}
    for row in human:
        first, second = items[row].facts["models"]
        for side, (a, b) in ((VOTES, items[row].labels), (VERDICTS, scores[row])):
            share = 1.0 if a > b else 0.0 if a < b else 0.5
            for winner, loser, part in ((first, second, share), (second, first, 1.0 - share)):
                if winner != loser:
                    wins.setdefault((side, f"{winner}\x1f{loser}"), []).append((row, part))
    return cells | {
        cell: Measured(np.array([row for row, _ in parts], np.int64), np.array([part for _, part in parts]))
        for cell, parts in wins.items()
    }


def _by_kind(items: Sequence[Item], rows: Sequence[int], values: np.ndarray) -> Cells:
    cells = by_group([HUMAN] * len(rows), RIGHT, values, rows)
    for kind in sorted({kind for row in rows for kind in items[row].facts.get("kinds", ())}):
        held = [place for place, row in enumerate(rows) if kind in items[row].facts.get("kinds", ())]
        group = [f"{HUMAN}, {kind}"] * len(held)
        cells |= by_group(group, RIGHT, values[held], [rows[place] for place in held])
    return cells


def _ranking(totals: Totals, models: Sequence[str], correlation: Correlation) -> np.ndarray:
    return correlation(*(bradley_terry(_wins(totals, models, side)) for side in (VOTES, VERDICTS)))


def _mean_of_sets(totals: Totals) -> np.ndarray:
    means = [totals.mean((name, CORRECT)) for name in SETS.values()]
    return np.where(np.isnan(means).any(0), np.nan, mean_of(means))


def _wins(totals: Totals, models: Sequence[str], side: str) -> np.ndarray:
    rows = [np.stack([totals.sum((side, f"{one}\x1f{other}")) for other in models], -1) for one in models]
    return np.stack(rows, -2)
