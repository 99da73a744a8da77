"""PPE (arXiv 2410.14872): human votes in the arena, and whether the best of k answers is a correct one.

Human votes. A pair that the person called a tie counts towards no accuracy; a tie of scores on a decided pair is wrong.
Models are ranked by Bradley-Terry strengths, once from the votes and once from the verdicts of the reward model on the
same pairs (a tie, or an unscored pair, is half a win for either); reported are Spearman and Kendall (tau-b) of the two
rankings. Every model gets one extra tie with an average opponent, so that one that never won has a finite strength.

Best of k on MMLU-Pro, MATH, GPQA, MBPP-Plus and IFEval. The answer with the highest score is selected: 1 if it is
correct; if several share that score, the share of correct ones. An unscored answer is never selected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from armorm.data.rows import Row
from armorm.data.sources import HubSet, Source
from armorm.errors import shown
from armorm.evaluation.benchmarks.base import Benchmark, Loaded, even_chance, replies, rows_of, text
from armorm.evaluation.benchmarks.pairs import RIGHT, strictly_right
from armorm.evaluation.examples import Example, Item, make_example
from armorm.evaluation.metrics import (
    Group,
    GroupSums,
    GroupValues,
    Measurements,
    Metric,
    by_group,
    mean_metric,
    nan_mean,
    ratio,
)

HUMAN = "human votes"
SETS = {"mmlu": "MMLU-Pro", "math": "MATH", "gpqa": "GPQA", "mbpp": "MBPP-Plus", "ifeval": "IFEval"}
HUMAN_ROWS = 16038
CORRECT = "correct"
BEST_OF_K = "best of k, mean of five sets"
SPEARMAN = "ranking of models, Spearman"
KENDALL = "ranking of models, Kendall"
VOTES, VERDICTS = "votes", "verdicts"
Correlation = Callable[[np.ndarray, np.ndarray], np.ndarray]
_KINDS = {"hard_prompt": "hard", "easy_prompt": "easy", "if_prompt": "instructions", "math_prompt": "mathematics"}
_KINDS |= {"is_code": "code"}
_WINNERS = {"model_a": (1, 0), "model_b": (0, 1), "tie": (0, 0), "tie (bothbad)": (0, 0)}
_ITERATIONS = 200
_PRIOR_TIE = 1.0


def read(sources: Sequence[Source]) -> Loaded:
    """Human votes (`winner`, `response_1`, `response_2`) and best of k (`scores`, `response_1` to `response_k`)."""
    loaded = Loaded()
    for source, row in rows_of(sources):
        if row.values.get("winner") is not None:
            loaded.examples.append(_vote(row))
        elif row.values.get("scores") is not None:
            loaded.examples.append(_best_of_k(row, source.name))
        else:
            raise row.error(f"found columns {shown(row.filled, 80)}, expected 'winner' or 'scores'")
    return loaded.checked(sources)


def _vote(row: Row) -> Example:
    winner = row.values["winner"]
    if winner not in _WINNERS:
        raise row.error(f"found {shown(winner)}, expected one of {', '.join(_WINNERS)}", "winner")
    kinds = [name for column, name in _KINDS.items() if row.values.get(column)]
    language = row.values.get("language")
    if isinstance(language, str):
        kinds.append("English" if language == "English" else "other languages")
    return make_example(
        replies(row, "prompt", [text(row, "response_1"), text(row, "response_2")]),
        _WINNERS[winner],
        id=row.values.get("question_id"),
        subset=HUMAN,
        facts={"models": [text(row, "model_a"), text(row, "model_b")], "kinds": kinds},
        origin=(row.file, row.number),
    )


def _best_of_k(row: Row, source: str) -> Example:
    places = [str(row.values.get("subset") or ""), source, *reversed(Path(row.file).parts[-3:])]
    name = next((name for place in places for word, name in SETS.items() if word in place.lower()), None)
    if name is None:
        raise row.error(f"found no set in the names {shown(places)}, expected one of {', '.join(SETS.values())}")
    scores = row.values["scores"]
    if not isinstance(scores, Sequence) or isinstance(scores, str) or not all(value in (0, 1) for value in scores):
        raise row.error(f"found {shown(scores)}, expected a list of true and false", "scores")
    responses = [text(row, f"response_{number}") for number in range(1, len(scores) + 1)]
    return make_example(
        replies(row, "prompt", responses),
        [float(value) for value in scores],
        id=row.values.get("question_id"),
        subset=name,
        origin=(row.file, row.number),
    )


def best_of_k(scores: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Correctness (n,) of the answer with the highest score, given scores (n, k) and correct (n, k)."""
    scores = np.asarray(scores, np.float64)
    known = np.where(np.isnan(scores), -np.inf, scores)
    highest = known.max(1, keepdims=True)
    taken = (known == highest) & np.isfinite(highest)
    return np.nan_to_num(ratio((taken * np.asarray(correct, np.float64)).sum(1), taken.sum(1)))


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Log strengths (..., m), given wins (..., m, m): how often the row beat the column, ties counted half."""
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


def measure(items: Sequence[Item], scores: Sequence[np.ndarray]) -> Measurements:
    """`right` of decided votes (all, and by kind of prompt), wins of models over models, correctness of the best."""
    human = [row for row, item in enumerate(items) if item.subset == HUMAN]
    decided = [row for row in human if len(set(items[row].labels)) > 1]
    right = [
        float(strictly_right(*(scores[row] if items[row].labels[0] > items[row].labels[1] else scores[row][::-1])))
        for row in decided
    ]
    rest = [row for row, item in enumerate(items) if item.subset != HUMAN]
    selected = [float(best_of_k(scores[row][None], np.array([items[row].labels]))[0]) for row in rest]
    return {
        **_by_kind(items, decided, np.array(right, np.float64)),
        **_wins_by_pairing(items, scores, human),
        **by_group([items[row].subset for row in rest], CORRECT, np.array(selected, np.float64), rest),
    }


def chance(equal: Measurements) -> Measurements:
    """A random order agrees with half of the votes, and selects a correct answer as often as equal scores do."""
    votes = {group: found for group, found in equal.items() if group[1] == RIGHT}
    return even_chance(votes) | {group: found for group, found in equal.items() if group[1] == CORRECT}


def metrics(measurements: Measurements) -> list[Metric]:
    """Of the available parts: votes, ranking of models, best of k of each set, and the mean of all five sets."""
    found: list[Metric] = []
    sets = [name for name in SETS.values() if (name, CORRECT) in measurements]
    votes = (HUMAN, RIGHT)
    played = tuple(group for group in measurements if group[0] in (VOTES, VERDICTS))
    if votes in measurements:
        rows = len({int(row) for group in played for row in measurements[group].rows})
        short = () if rows == HUMAN_ROWS else (f"votes ({rows:,} of {HUMAN_ROWS:,})",)
        found.append(mean_metric("overall", HUMAN, votes, lacking=short))
    if sets:
        every = tuple((name, CORRECT) for name in SETS.values())
        missing = tuple(name for name in SETS.values() if name not in sets)
        found.append(Metric("overall", BEST_OF_K, every, _mean_of_sets, missing))
    if played:
        models = sorted({name for _, pair in played for name in pair.split("\x1f")})
        for name, correlation in ((SPEARMAN, rank_spearman), (KENDALL, rank_kendall)):
            value = partial(_ranking, models=models, correlation=correlation)
            found.append(Metric("sections", name, played, value, unit="correlation"))
    found += [mean_metric("subsets", f"best of k, {name}", (name, CORRECT)) for name in sets]
    kinds = sorted({name for name, _ in measurements if name.startswith(f"{HUMAN}, ")})
    return found + [mean_metric("subsets", kind, (kind, RIGHT)) for kind in kinds]


def _wins_by_pairing(items: Sequence[Item], scores: Sequence[np.ndarray], human: Sequence[int]) -> Measurements:
    """Wins of each model over each other one, by the votes and by the verdicts of the scores."""
    wins: dict[Group, list[tuple[int, float]]] = {}
    for row in human:
        first, second = items[row].facts["models"]
        for side, (a, b) in ((VOTES, items[row].labels), (VERDICTS, scores[row])):
            share = 1.0 if a > b else 0.0 if a < b else 0.5
            for winner, loser, part in ((first, second, share), (second, first, 1.0 - share)):
                if winner != loser:
                    wins.setdefault((side, f"{winner}\x1f{loser}"), []).append((row, part))
    return {
        group: GroupValues(np.array([row for row, _ in parts], np.int64), np.array([part for _, part in parts]))
        for group, parts in wins.items()
    }


def _by_kind(items: Sequence[Item], rows: Sequence[int], values: np.ndarray) -> Measurements:
    measurements = by_group([HUMAN] * len(rows), RIGHT, values, rows)
    for kind in sorted({kind for row in rows for kind in items[row].facts.get("kinds", ())}):
        held = [place for place, row in enumerate(rows) if kind in items[row].facts.get("kinds", ())]
        measurements |= by_group([f"{HUMAN}, {kind}"] * len(held), RIGHT, values[held], [rows[place] for place in held])
    return measurements


def _ranking(sums: GroupSums, models: Sequence[str], correlation: Correlation) -> np.ndarray:
    return correlation(*(bradley_terry(_wins(sums, models, side)) for side in (VOTES, VERDICTS)))


def _wins(sums: GroupSums, models: Sequence[str], side: str) -> np.ndarray:
    rows = [np.stack([sums.sum((side, f"{one}\x1f{other}")) for other in models], -1) for one in models]
    return np.stack(rows, -2)


def _mean_of_sets(sums: GroupSums) -> np.ndarray:
    means = [sums.mean((name, CORRECT)) for name in SETS.values()]
    return np.where(np.isnan(means).any(0), np.nan, nan_mean(means))


BENCHMARK = Benchmark(
    "ppe",
    "PPE",
    read,
    measure,
    metrics,
    chance,
    published=(
        HubSet("lmarena-ai/PPE-Human-Preference-V1"),
        *(HubSet(f"lmarena-ai/PPE-{name}-Best-of-K") for name in SETS.values()),
    ),
    rule="votes that are ties do not count; a tie of scores is wrong; an unscored answer is never the best",
)
