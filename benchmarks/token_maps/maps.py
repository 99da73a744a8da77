"""Maps: a number for each token, or sentence, of a reply; lower where the map sees a fault.

Maps of tokens are also averaged over sentences (`NAME, by sentence`). Maps that are combined are first standardised
over the tokens of the reply and added with equal weights: nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from armorm.objectives import Objective
from token_maps.reading import Reading

Map = Callable[[Reading], "np.ndarray | None"]
POSITION, SURPRISAL, OCCLUSION, GROWTH = "position", "surprisal", "sentence occlusion", "growth by sentence"
MEAN, LAST, BOTH = "mean part", "last part, gradient", "mean part + gradient"
RUNNING, READ = "mean part, against the running mean", "last part, read at every token"


def token_maps(objectives: Sequence[Objective]) -> dict[str, Map]:
    """Maps of tokens, (t,) each; None for a reply without a gradient."""
    kinds = np.array(
        [o.source if o.source in ("constructed", "computed", "preferences") else "rated" for o in objectives]
    )
    raised = np.array([objective.direction == "higher" for objective in objectives])
    maps: dict[str, Map] = {
        "random": lambda r: np.random.default_rng(int(r.reply.conversation.key[:8], 16)).random(len(r.text_tokens)),
        POSITION: lambda r: -np.arange(len(r.text_tokens), dtype=np.float64),
        SURPRISAL: lambda r: r.log_likelihoods,
        MEAN: mean_part,
        LAST: lambda r: r.gradient,
        BOTH: lambda r: None if r.gradient is None else mean_part(r) + r.gradient,
        "mean part, unweighted": lambda r: _standard(r, r.attribution.mean_rewards)[:, raised].mean(1),
        **{
            f"mean part, {kind} objectives": partial(_of_objectives, chosen=kinds == kind)
            for kind in dict.fromkeys(kinds.tolist())
        },
        RUNNING: lambda r: mean_part(r) - _running_mean(mean_part(r)),
        READ: lambda r: r.last_scores,
        "last part, change at every token": lambda r: np.diff(r.last_scores, prepend=r.last_scores[:1]),
    }
    smoothed: dict[str, Map] = {f"{name}, by sentence": partial(_by_sentence, of=of) for name, of in maps.items()}
    by_sentence: dict[str, Map] = {
        OCCLUSION: lambda r: _at_tokens(r, r.occlusion),
        "sentence occlusion, per token": lambda r: _at_tokens(
            r, r.occlusion / np.maximum(np.bincount(r.sentence_of[r.text_tokens], minlength=len(r.occlusion)), 1)
        ),
        GROWTH: lambda r: _at_tokens(r, r.growth),
    }
    every = maps | smoothed | by_sentence
    pairs = [(SURPRISAL, MEAN), (SURPRISAL, OCCLUSION), (MEAN, OCCLUSION)]
    pairs += [(POSITION, other) for other in (SURPRISAL, MEAN, LAST, BOTH, OCCLUSION, GROWTH, RUNNING, READ)]
    combined: dict[str, Map] = {f"{a} and {b}": partial(_sum, first=every[a], second=every[b]) for a, b in pairs}
    return every | combined


def mean_part(reading: Reading) -> np.ndarray:
    """(t,) contributions of the mean part, summed over objectives."""
    found: np.ndarray = reading.attribution.token_contributions.sum(1)
    return found


def sentence_maps(reading: Reading) -> dict[str, np.ndarray]:
    """Maps of sentences, (s,) each: sums of deviations are what `armorm explain --tokens` names sentences by."""
    deviations = reading.attribution.token_deviations.sum(1)
    count = len(reading.reply.sentences)
    generator = np.random.default_rng(int(reading.reply.conversation.key[:8], 16))
    found = {
        "random": generator.random(count),
        POSITION: -np.arange(count, dtype=np.float64),
        SURPRISAL: reading.by_sentence(reading.log_likelihoods),
        "mean part, sum of deviations": reading.by_sentence(deviations, mean=False),
        "mean part, mean per token": reading.by_sentence(deviations),
        OCCLUSION: reading.occlusion,
        GROWTH: reading.growth,
        READ: reading.by_sentence(reading.last_scores),
    }
    if reading.gradient is not None:
        both = mean_part(reading) + reading.gradient
        found[LAST] = reading.by_sentence(reading.gradient, mean=False)
        found[BOTH] = reading.by_sentence(both - both[reading.text_tokens].mean(), mean=False)
    return found


def predicted_gains(reading: Reading, sentences: Sequence[int]) -> dict[str, float]:
    """What removing sentences adds to the score, according to each map that predicts it.

    The mean part predicts the mean over the other tokens, minus the present one. Integrated gradients predict minus
    their sum. Occlusion of several sentences predicts the sum of the changes of each.
    """
    inside = np.isin(reading.sentence_of, sentences) & ~reading.attribution.places.template
    removed = mean_part(reading)[inside].sum()
    total, count = mean_part(reading).sum(), len(inside)
    left = count - int(inside.sum())
    gain = (total - removed) * count / left - total
    found = {MEAN: float(gain), OCCLUSION: float(-reading.occlusion[list(sentences)].sum())}
    if reading.gradient is not None:
        found[LAST] = float(-reading.gradient[inside].sum())
        found[BOTH] = found[MEAN] + found[LAST]
    return found


def _running_mean(values: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.cumsum(values) / np.arange(1, len(values) + 1)
    return found


def _standard(reading: Reading, values: np.ndarray) -> np.ndarray:
    """Values (t,) or (t, k) with mean 0 and standard deviation 1 over the text tokens."""
    text = values[reading.text_tokens]
    found: np.ndarray = (values - text.mean(0)) / np.maximum(text.std(0), 1e-12)
    return found


def _sum(reading: Reading, *, first: Map, second: Map) -> np.ndarray | None:
    a, b = first(reading), second(reading)
    return None if a is None or b is None else _standard(reading, a) + _standard(reading, b)


def _of_objectives(reading: Reading, *, chosen: np.ndarray) -> np.ndarray:
    """(t,) contributions of the chosen objectives (k,) alone."""
    found: np.ndarray = reading.attribution.token_contributions[:, chosen].sum(1)
    return found


def _by_sentence(reading: Reading, *, of: Map) -> np.ndarray | None:
    """(t,) mean of a map over the sentence of each token."""
    values = of(reading)
    return None if values is None else _at_tokens(reading, reading.by_sentence(values))


def _at_tokens(reading: Reading, values: np.ndarray | None) -> np.ndarray | None:
    """Values (s,) of sentences at each of their tokens."""
    return None if values is None else values[reading.sentence_of]
