"""Maps to figures with intervals: AUC on marked tokens, gains of deletions, planted faults, shuffled weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata, spearmanr

from armorm import ArmoRM
from armorm.conversation import Conversation
from armorm.evaluation.bootstrap import Clusters, intervals
from armorm.evaluation.metrics import Group, GroupSums, GroupValues, Measurements, Metric, ratio
from armorm.explain.occlusion import occluded
from armorm.explain.token_attribution import token_rewards
from token_maps.maps import mean_part, predicted_gains, sentence_maps, token_maps
from token_maps.reading import Reading
from token_maps.replies import ERROR_TYPES

REMOVED = (1, 2, 3)  # sentences
RANDOM_SETS = 2
SHUFFLES = 20
ANY = "any"


class Table:
    """Values by name, each of a reply; and figures with intervals by prompt."""

    def __init__(self, readings: Sequence[Reading]) -> None:
        self._values: dict[Group, list[tuple[int, float]]] = defaultdict(list)
        prompts = [reading.reply.conversation.prompt_key for reading in readings]
        self.clusters = Clusters.of_items(prompts, [""] * len(prompts))

    def add(self, row: int, name: str, value: float, quantity: str = "") -> None:
        self._values[name, quantity].append((row, float(value)))

    def means(self) -> dict[str, dict[str, Any]]:
        """Mean of each name, its interval and its number of replies."""
        return self._figures([_metric(name, ((name, ""),), _mean) for name, _ in self._values])

    def fits(self) -> dict[str, dict[str, Any]]:
        """R^2 of `predicted` for `measured` as it stands, by name; it is below 0 if their mean predicts better.

        Resamples keep the mean of all measured values: its own error is small against theirs.
        """
        names = dict.fromkeys(name for name, _ in self._values)
        for name in names:
            measured = self._values[name, "y"]
            mean = np.mean([value for _, value in measured])
            self._values[name, "yy"] = [(row, (value - mean) ** 2) for row, value in measured]
        groups = [((name, "error"), (name, "yy")) for name in names]
        return self._figures([_metric(name, found, _fit) for name, found in zip(names, groups, strict=True)])

    def correlations(self) -> dict[str, dict[str, Any]]:
        """Correlation of `predicted` and `measured` within replies, by name: both minus their mean over the reply."""
        names = dict.fromkeys(name for name, _ in self._values)
        groups = [tuple((name, quantity) for quantity in ("cxx", "cyy", "cxy")) for name in names]
        return self._figures([_metric(name, found, _correlation) for name, found in zip(names, groups, strict=True)])

    def add_fit(self, row: int, name: str, predicted: Sequence[float], measured: Sequence[float]) -> None:
        x, y = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
        for quantity, values in (("y", y), ("error", (y - x) ** 2)):
            for value in values:
                self.add(row, name, value, quantity)
        dx, dy = x - x.mean(), y - y.mean()
        for quantity, values in (("cxx", dx * dx), ("cyy", dy * dy), ("cxy", dx * dy)):
            for value in values:
                self.add(row, name, value, quantity)

    def _figures(self, metrics: Sequence[Metric]) -> dict[str, dict[str, Any]]:
        measured: Measurements = {
            group: GroupValues(np.array([row for row, _ in found]), np.array([value for _, value in found]))
            for group, found in self._values.items()
        }
        return {
            metric.name: {
                "value": metric.on(measured),
                "interval": interval,
                "replies": self.clusters.count(metric, measured),
            }
            for metric, interval in zip(metrics, intervals(metrics, measured, self.clusters), strict=True)
        }


def _metric(name: str, groups: tuple[Group, ...], value: Any) -> Metric:
    return Metric("overall", name, groups, partial(value, groups), unit="correlation")


def _mean(groups: Sequence[Group], sums: GroupSums) -> np.ndarray:
    return sums.mean(*groups)


def _fit(groups: Sequence[Group], sums: GroupSums) -> np.ndarray:
    error, spread = (sums.sum(group) for group in groups)
    return 1 - ratio(error, spread)


def _correlation(groups: Sequence[Group], sums: GroupSums) -> np.ndarray:
    xx, yy, xy = (sums.sum(group) for group in groups)
    return ratio(xy, np.sqrt(xx * yy))


def auc(worth: np.ndarray, marked: np.ndarray) -> float:
    """Share of (marked, unmarked) pairs in which the marked one has the lower worth; ties count half."""
    bad, good = int(marked.sum()), int((~marked).sum())
    ranks = rankdata(-worth)
    return float((ranks[marked].sum() - bad * (bad + 1) / 2) / (bad * good))


def span_figures(readings: Sequence[Reading], rm: ArmoRM) -> dict[str, Any]:
    """AUC within answers of every map, by type of error, and its difference from position; of every objective."""
    objectives = list(rm.objectives)
    maps, found = token_maps(objectives), {}
    for kind in (ANY, *ERROR_TYPES):
        table, against, single = Table(readings), Table(readings), Table(readings)
        for row, reading in enumerate(readings):
            faulty = reading.share(reading.reply.marked()) >= 0.5
            wanted = faulty if kind == ANY else reading.share(reading.reply.marked(kind)) >= 0.5
            kept = reading.text_tokens & (wanted | ~faulty)
            if not wanted[kept].any() or wanted[kept].all():
                continue
            of_position = auc(-np.arange(kept.sum(), dtype=np.float64), wanted[kept])
            for name, function in maps.items():
                values = function(reading)
                if values is not None:
                    value = auc(values[kept], wanted[kept])
                    table.add(row, name, value)
                    against.add(row, name, value - of_position)
            for column, objective in enumerate(objectives):
                rewards = reading.attribution.mean_rewards[:, column]
                smooth = reading.by_sentence(rewards)[reading.sentence_of]
                single.add(row, objective.name, auc(rewards[kept], wanted[kept]))
                single.add(row, f"{objective.name}, by sentence", auc(smooth[kept], wanted[kept]))
        differences = against.means()
        figures = {
            name: entry | {"minus_position": [differences[name]["value"], differences[name]["interval"]]}
            for name, entry in table.means().items()
        }
        found[kind] = {"maps": figures, "objectives": single.means()}
    return found


def deletion_figures(
    readings: Sequence[Reading], rm: ArmoRM, removed: Sequence[int] = REMOVED, seed: int = 0
) -> dict[str, Any]:
    """Gain of the score, in reference standard deviations, if the sentences said to be worst are removed; predictions.

    A map that predicts the change by removal removes what it predicts the largest gain for, the others what is lowest.
    Only replies of more sentences than are removed count.
    """
    deviation = float(rm.reference["score_std"])
    known = [reading for reading in readings if len(reading.reply.sentences) > max(removed)]
    chosen = _chosen_sentences(known, removed, seed)
    wanted = sorted({(row, places) for row, found in enumerate(chosen) for sets in found.values() for places in sets})
    several = [(row, places) for row, places in wanted if len(places) > 1]
    scores = rm.score([_without(known[row], places) for row, places in several]).scores if several else np.empty(0)
    gains = {
        (row, places): (float(score) - known[row].score) / deviation
        for (row, places), score in zip(several, scores, strict=True)
    }
    gains |= {
        (row, (place,)): -float(change) / deviation
        for row, reading in enumerate(known)
        for place, change in enumerate(reading.occlusion)
    }
    curves, fits = {}, {}
    for count in removed:
        table, fit = Table(known), Table(known)
        for row, reading in enumerate(known):
            by_map = {
                name: float(np.mean([gains[row, places] for places in sets]))
                for (name, number), sets in chosen[row].items()
                if number == count
            }
            for name, value in by_map.items():
                table.add(row, name, value)
                table.add(row, f"{name} minus random", value - by_map["random"])
            sets = [places for r, places in wanted if r == row and len(places) == count]
            predicted = [predicted_gains(reading, places) for places in sets]
            for name in predicted[0]:
                values = [entry[name] / deviation for entry in predicted]
                fit.add_fit(row, name, values, [gains[row, places] for places in sets])
        curves[str(count)] = table.means()
        fits[str(count)] = {"r2": fit.fits(), "correlation_within_replies": fit.correlations()}
    return {"unit": "reference standard deviations", "removed": curves, "predicted": fits}


def _chosen_sentences(
    readings: Sequence[Reading], removed: Sequence[int], seed: int
) -> list[dict[tuple[str, int], list[tuple[int, ...]]]]:
    """For each reply, by map and number, the sets of sentences to remove; of single ones, every sentence is random."""
    generator = np.random.default_rng(seed)
    chosen = []
    for reading in readings:
        count = len(reading.reply.sentences)
        gains = [predicted_gains(reading, [place]) for place in range(count)]
        worth = {name: values for name, values in sentence_maps(reading).items() if name != "random"}
        worth |= {name: -np.array([entry[name] for entry in gains]) for name in gains[0]}
        found: dict[tuple[str, int], list[tuple[int, ...]]] = {}
        for number in removed:
            drawn = [generator.choice(count, number, replace=False).tolist() for _ in range(RANDOM_SETS)]
            every: list[tuple[int, ...]] = [(place,) for place in range(count)]
            found["random", number] = every if number == 1 else [tuple(sorted(places)) for places in drawn]
            for name, values in worth.items():
                found[name, number] = [tuple(sorted(np.argsort(values, kind="stable")[:number].tolist()))]
        chosen.append(found)
    return chosen


def _without(reading: Reading, sentences: Sequence[int]) -> Conversation:
    conversation = reading.reply.conversation
    for place in sorted(sentences, reverse=True):
        (shorter,) = occluded(conversation, [reading.reply.sentences[place]])
        assert shorter is not None
        conversation = shorter
    return conversation


def planted_figures(readings: Sequence[Reading]) -> dict[str, Any]:
    """Share of replies whose lowest sentence is a planted one, by map, and the share by chance."""
    table = Table(readings)
    for row, reading in enumerate(readings):
        planted = _planted(reading)
        table.add(row, "chance", planted.mean())
        for name, values in sentence_maps(reading).items():
            table.add(row, name, planted[int(values.argmin())])
    return table.means()


def shuffled_maps(readings: Sequence[Reading], rm: ArmoRM, seed: int = 0) -> list[list[np.ndarray]]:
    """The mean part's map (t,) of every reply, its head weights shuffled within each objective, `SHUFFLES` times."""
    head = rm.model.regression_layer
    generator = torch.Generator().manual_seed(seed)
    last, mean = rm.backbone.readout.split(head.weight.detach().cpu())
    assert last is not None and mean is not None
    found = []
    for _ in range(SHUFFLES):
        order = torch.argsort(torch.rand(mean.shape, generator=generator), 1)
        shuffled = torch.nn.Linear(head.in_features, head.out_features, head.bias is not None)
        shuffled.weight.data = torch.cat([last, mean.gather(1, order)], 1)
        if head.bias is not None:
            shuffled.bias.data = head.bias.detach().cpu()
        rewards = [token_rewards(reading.states, shuffled, rm.backbone.readout)[0] for reading in readings]
        found.append([r @ reading.attribution.coefficients for r, reading in zip(rewards, readings, strict=True)])
    return found


def shuffled_answers(readings: Sequence[Reading], rm: ArmoRM) -> dict[str, dict[str, float]]:
    """Of maps with shuffled weights: correlation with the real map within answers, its size, AUC on marked tokens."""
    correlations: list[float] = []
    sizes: list[float] = []
    areas: list[float] = []
    marked = [(reading.share(reading.reply.marked()) >= 0.5)[reading.text_tokens] for reading in readings]
    for maps in shuffled_maps(readings, rm):
        texts = [values[reading.text_tokens] for values, reading in zip(maps, readings, strict=True)]
        real = [mean_part(reading)[reading.text_tokens] for reading in readings]
        found = np.array([spearmanr(*pair).statistic for pair in zip(texts, real, strict=True)])
        correlations.append(float(found.mean()))
        sizes.append(float(np.abs(found).mean()))
        kept = [auc(t, m) for t, m in zip(texts, marked, strict=True) if m.any() and not m.all()]
        areas.append(float(np.mean(kept)))
    return _draws({"correlation": correlations, "absolute correlation": sizes, "AUC": areas})


def shuffled_planted(readings: Sequence[Reading], rm: ArmoRM) -> dict[str, dict[str, float]]:
    """Of maps with shuffled weights: share of replies whose lowest, and highest, sentence by mean is a planted one.

    Both are above chance if the planted sentence differs from the others in any direction.
    """
    lowest: list[float] = []
    highest: list[float] = []
    for maps in shuffled_maps(readings, rm):
        sentences = [r.by_sentence(values) for values, r in zip(maps, readings, strict=True)]
        lowest.append(float(np.mean([_planted(r)[v.argmin()] for v, r in zip(sentences, readings, strict=True)])))
        highest.append(float(np.mean([_planted(r)[v.argmax()] for v, r in zip(sentences, readings, strict=True)])))
    return _draws({"lowest": lowest, "highest": highest})


def _draws(values: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    return {name: {"mean": float(np.mean(found)), "std": float(np.std(found))} for name, found in values.items()}


def _planted(reading: Reading) -> np.ndarray:
    """(s,) whether each sentence has a part of the planted fault."""
    (_, start, end), *_ = reading.reply.errors
    return np.array([low < end and start < high for low, high in reading.reply.sentences])
