"""What is measured: examples of every set, the rule that measures their scores, and the figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from armorm import ArmoRM, Recipe
from armorm.conversation import Conversation
from armorm.data.ratings import sample_by_prompt
from armorm.data.rows import Row
from armorm.data.sources import Location, find_sources
from armorm.evaluation.benchmarks import ratings
from armorm.evaluation.benchmarks.base import is_held_out
from armorm.evaluation.benchmarks.pairs import RIGHT, pair_example, pairs_right
from armorm.evaluation.bootstrap import Clusters
from armorm.evaluation.examples import Example, make_example, numbered
from armorm.evaluation.metrics import GroupSums, GroupValues, Measurements, Metric, mean_metric, nan_mean
from armorm.evaluation.runner import load_examples
from armorm.training.dataset import read_training_data

DATA = Path(os.environ.get("ARMORM_DATA", "../shared/data"))
EVERYDAY_TEXTS = Path(__file__).parents[1] / "everyday"
RATED = (
    "truthfulqa", "diasafety", "halueval", "gsm8k", "humaneval", "justeval", "unieval_d2t", "topicalchat", "dstc9",
    "fed", "alce", "vicunabench", "gptfuzz", "qags",
)  # fmt: skip
# Objectives with at least 100 test ratings; and of these, those with at least 100 pairs within prompts.
SPEARMAN_MEAN = (
    "truthfulqa-truthful", "truthfulqa-informative", "diasafety-is_safe", "halueval-no_hallucination",
    "gsm8k-is_correct", "humaneval-is_correct", "justeval-safety", "unieval-informativeness", "unieval-naturalness",
    "unieval-overall",
)  # fmt: skip
WITHIN_MEAN = (
    "truthfulqa-truthful", "truthfulqa-informative", "diasafety-is_safe", "gsm8k-is_correct", "humaneval-is_correct",
    "justeval-safety", "unieval-overall",
)  # fmt: skip
JUDGED = ("finegrained", "hh_harmless", "pandalm")
ALPACAEVAL, LLMBAR = "alpacaeval", "llmbar"
SIMILAR_FACTOR = 1.25  # characters of the longer response over those of the shorter one
SIMILAR = "right, similar length"  # a quantity, as `RIGHT`

SPEARMAN = "Spearman, ten ratings"
WITHIN = "within prompts, seven ratings"
MACRO = "pairs, macro of three sets"
POOLED = "pairs of similar length, pooled"
ODD, EVEN = "humanevalpack, odd tasks", "humanevalpack, even tasks"
EVERYDAY, HARMLESS = "everyday pairs", "harmless prompts, answered"


@dataclass
class Part:
    """Examples that are measured by one rule.

    Attributes:
        kind: benchmark of the library that the rule is of, `pairs` or `ratings`.
        examples: the first response of a pair is the better one; labels of rated rows are ratings.
        measure: from the scores of every example to measurements.
        metrics: the figures that measurements allow.
        objectives: those whose predicted ratings are the scores; empty for the score itself.
    """

    kind: str
    examples: list[Example]
    measure: Callable[[Sequence[np.ndarray]], Measurements]
    metrics: Callable[[Measurements], list[Metric]]
    objectives: list[str] = field(default_factory=list)

    @property
    def clusters(self) -> Clusters:
        """Examples by prompt, within their sets."""
        items = [example.item for example in self.examples]
        return Clusters.of_items([item.prompt for item in items], [item.subset for item in items])


def pair_part(limit: int | None = None, only: Sequence[str] = ()) -> Part:
    """The pairs of all sets, or only of some; about `limit` of each set."""
    code = DATA / "benchmarks" / "humanevalpack.jsonl.gz"
    sets: list[tuple[str, Path, Callable[[Row], bool]]] = [
        ("finegrained", DATA / "preferences" / "finegrained.jsonl.gz", is_held_out),
        ("hh_harmless", DATA / "preferences" / "hh_harmless.jsonl.gz", is_held_out),
        ("pandalm", DATA / "preferences" / "pandalm.jsonl.gz", _every_row),
        (ALPACAEVAL, DATA / "preferences" / "alpacaeval.jsonl.gz", is_held_out),
        (ODD, code, lambda row: _task(row) % 2 == 1),
        (EVEN, code, lambda row: _task(row) % 2 == 0),
        (LLMBAR, DATA / "benchmarks" / "llmbar.jsonl.gz", _every_row),
        (EVERYDAY, EVERYDAY_TEXTS / "everyday_pairs.jsonl", _every_row),
        (HARMLESS, EVERYDAY_TEXTS / "harmless_prompts.jsonl", _every_row),
    ]
    examples = numbered(
        [
            example
            for name, path, keep in sets
            if not only or name in only
            for example in _pairs(name, path, keep, limit)
        ]
    )
    return Part("pairs", examples, partial(measure_pairs, examples), pair_metrics)


def _pairs(name: str, path: Path, keep: Callable[[Row], bool], limit: int | None) -> list[Example]:
    examples = []
    for row in Location.find(path).rows():
        if keep(row):
            example = pair_example(row, str(row.values["subset"]) if name == LLMBAR else name)
            if name in (ODD, EVEN):  # six languages of one problem are not independent
                example = replace(example, item=replace(example.item, prompt=f"humanevalpack {_task(row)}"))
            if name != ALPACAEVAL or similar_length(example):
                examples.append(example)
    return [examples[i] for i in sample_by_prompt([example.item.prompt for example in examples], limit)]


def _every_row(row: Row) -> bool:
    return True


def _task(row: Row) -> int:
    return int(str(row.values["id"]).rpartition("/")[2])


def similar_length(example: Example) -> bool:
    """Whether the responses of a pair differ in length by at most `SIMILAR_FACTOR`."""
    sizes = [len(conversation.response) for conversation in example.conversations if conversation is not None]
    return len(sizes) == 2 and max(sizes) <= SIMILAR_FACTOR * min(sizes)


def measure_pairs(examples: Sequence[Example], scores: Sequence[np.ndarray]) -> Measurements:
    """Of each set, whether each pair is ranked right (`RIGHT`), and the same for pairs of similar length."""
    right = pairs_right(scores)
    similar = np.array([similar_length(example) for example in examples], bool)
    subsets = np.array([example.item.subset for example in examples], object)
    found: Measurements = {}
    for name in dict.fromkeys(subsets.tolist()):
        for quantity, mask in ((RIGHT, subsets == name), (SIMILAR, (subsets == name) & similar)):
            rows = np.flatnonzero(mask)
            found[name, quantity] = GroupValues(rows, right[rows])
    return found


def pair_metrics(measurements: Measurements) -> list[Metric]:
    """The macro and the pooled figure, then every set."""
    judged = tuple((name, RIGHT) for name in JUDGED)
    llmbar = [name for name, quantity in measurements if quantity == RIGHT and name.startswith(LLMBAR)]
    groups = {
        POOLED: tuple((name, SIMILAR) for name in (*JUDGED, ALPACAEVAL)),
        **{name: ((name, RIGHT),) for name in (ODD, EVERYDAY, HARMLESS, *JUDGED)},
        **{f"{name}, similar length": ((name, SIMILAR),) for name in (*JUDGED, ALPACAEVAL)},
        EVEN: ((EVEN, RIGHT),),
        LLMBAR: tuple((name, RIGHT) for name in llmbar),
        **{name: ((name, RIGHT),) for name in llmbar},
    }
    macro = Metric("overall", MACRO, judged, lambda sums: nan_mean([sums.mean(group) for group in judged]))
    metrics = [macro, *(mean_metric("overall", name, *found) for name, found in groups.items())]
    return [metric for metric in metrics if metric.groups and measurements.keys() >= {*metric.groups}]


def rating_part(rm: ArmoRM, limit: int | None = None) -> Part:
    """Test rows of the rated sets with the objectives that the model predicts; about `limit` of each set."""
    sources = find_sources([DATA / "ratings" / f"{name}.jsonl.gz" for name in RATED])
    loaded = load_examples(ratings.BENCHMARK, sources, limit and limit * len(RATED), rm.objectives)
    rule = partial(ratings.measure, [example.item for example in loaded.examples], names=loaded.names, raw=False)
    return Part("ratings", loaded.examples, rule, rating_metrics, loaded.names)


def rating_metrics(measurements: Measurements) -> list[Metric]:
    """Means over the fixed objectives (absent if the model lacks one of them), then every objective."""
    single = [metric for metric in ratings.metrics(measurements) if metric.level == "subsets"]
    by_name = {metric.name: metric for metric in single}
    means = []
    for title, names, kind in ((SPEARMAN, SPEARMAN_MEAN, ratings.SPEARMAN), (WITHIN, WITHIN_MEAN, ratings.WITHIN)):
        found = [by_name[name] for name in (f"{objective}: {kind}" for objective in names) if name in by_name]
        if len(found) == len(names):
            groups = tuple(group for metric in found for group in metric.groups)
            means.append(Metric("overall", title, groups, partial(_mean, found), unit=found[0].unit))
    return [*means, *(replace(metric, level="overall") for metric in single)]


def _mean(metrics: Sequence[Metric], sums: GroupSums) -> np.ndarray:
    return nan_mean([metric.value(sums) for metric in metrics])


def constructed_parts(rm: ArmoRM, recipe: Path | None, limit: int | None = None) -> list[Part]:
    """Test rows of the constructed objectives of a recipe, by their own reward and by the score; none without."""
    if recipe is None:
        return []
    data = read_training_data(Recipe.from_yaml(recipe))
    table = data.table.take(data.test_rows)
    columns = [i for i, objective in enumerate(table.objectives) if objective.source == "constructed"]
    names, labels = [table.objectives[i].name for i in columns], table.ratings[:, columns]
    rated = np.flatnonzero(~np.isnan(labels).all(1)) if columns else np.empty(0, np.int64)
    conversations = [table.conversations[row] for row in rated]
    kept = sample_by_prompt([conversation.prompt_key for conversation in conversations], limit)
    examples = numbered(
        [make_example([partial(Conversation.from_messages, conversations[i])], labels[rated[i]].tolist()) for i in kept]
    )
    rule = partial(ratings.measure, [example.item for example in examples], names=names, raw=False)
    own = any(name in rm.objectives.names for name in names)
    by_reward = [Part("ratings", examples, rule, partial(construct_metrics, ""), names)] if own else []
    by_score = [Part("ratings", examples, rule, partial(construct_metrics, ", by the score"))] if examples else []
    return by_reward + by_score


def construct_metrics(suffix: str, measurements: Measurements) -> list[Metric]:
    """Accuracy within prompts of each constructed objective."""
    found = ratings.by_objective({m.name: m for m in ratings.metrics(measurements)}, ratings.WITHIN)
    return [replace(metric, level="overall", name=name + suffix) for name, metric in found.items()]
