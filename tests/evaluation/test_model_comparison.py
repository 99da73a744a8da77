"""Alignment of results that hold other examples, and other objectives, in another order."""

from __future__ import annotations

import numpy as np
import pytest

from armorm.errors import DataError
from armorm.evaluation.examples import Item
from armorm.evaluation.model_comparison import align
from armorm.evaluation.results import Results


def rated(names: list[str], keys: list[int], seed: int) -> Results:
    """Results on rated rows; the label of an objective follows from its name and the row."""
    rng = np.random.default_rng(seed)
    examples = []
    for key in keys:
        labels = tuple(float((ord(name) * key) % 5) for name in names)
        item = Item(f"k{key}", "", "", f"p{key}", labels)
        examples.append(item.to_dict() | {"scores": rng.normal(size=len(names)).tolist()})
    return Results("ratings", {"name": str(seed)}, {}, {}, [], {}, examples, objectives=names, raw=True)


@pytest.mark.parametrize("seed", range(5))
def test_columns_of_each_result_are_found_by_the_names_of_its_objectives(seed):
    rng = np.random.default_rng(seed)
    results = []
    for number in range(3):
        names = [*rng.permutation(list("abc")).tolist(), *rng.choice(list("defg"), 2, replace=False).tolist()]
        keys = rng.choice(40, 30, replace=False).tolist()
        results.append(rated(rng.permutation(names).tolist(), keys, number))
    found = align(results)
    shared = [name for name in results[0].objectives if all(name in other.objectives for other in results)]
    keys = [e["key"] for e in results[0].examples if all(e["key"] in {x["key"] for x in r.examples} for r in results)]
    assert [item.key for item in found.items] == keys
    held = [{entry["key"]: entry for entry in other.examples} for other in results]
    for item in found.items:
        entry = held[0][item.key]
        assert item.labels == tuple(entry["labels"][results[0].objectives.index(name)] for name in shared)
    for other, entries, measured in zip(results, held, found.measurements, strict=True):
        scores = [np.array([entries[key]["scores"][other.objectives.index(name)] for name in shared]) for key in keys]
        expected = found.benchmark.measure(found.items, scores)
        assert list(measured) == list(expected)
        for group, values in expected.items():
            np.testing.assert_array_equal(measured[group].rows, values.rows)
            np.testing.assert_array_equal(measured[group].values, values.values)


def test_results_without_a_shared_objective_are_not_aligned():
    with pytest.raises(DataError, match="found no objective in both results"):
        align([rated(["a"], [1, 2], 0), rated(["b"], [1, 2], 1)])
