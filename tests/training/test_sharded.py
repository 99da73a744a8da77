"""Statistics from a feature store: the same from one pass, from parts, from Ray tasks."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from armorm.features.store import KEY, FeatureStore, shard_name
from armorm.heads.accumulation import accumulate, blocks_of
from armorm.heads.regression import fit_regression
from armorm.heads.statistics import RatingStatistics
from armorm.training.featurize import RatedRows, statistics_by_ray
from armorm.training.schema import RegressionSection
from armorm.training.stages import fit_stage1

N, D, FOLDS = 90, 6, 3
NAMES = ["a", "b"]


@pytest.fixture
def stored(tmp_path) -> tuple[RatedRows, np.ndarray]:
    """90 rows over three shards, two objectives by source; the features as they were written."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(N, D)).astype(np.float32)
    ratings = rng.random((N, 2))
    ratings[:40, 1] = ratings[60:, 0] = np.nan
    keys = [number.to_bytes(16, "little") for number in range(N)]
    store = FeatureStore(tmp_path, fingerprint={"weights": "one"}, hidden_size=D)
    for shard in range(3):
        part = slice(30 * shard, 30 * shard + 30)
        store.write_shard(shard_name("0123", shard), keys[part], features[part], [], np.empty((0, D), np.float32))
    return RatedRows(store, np.array(keys, KEY), ratings, np.arange(N) % FOLDS, NAMES), features


def assert_same(found: RatingStatistics, expected: RatingStatistics) -> None:
    assert sorted(found.row_sets()) == sorted(expected.row_sets())
    np.testing.assert_array_equal(found.counts(), expected.counts())
    for columns in found.row_sets():
        for fold in range(FOLDS):
            ours, theirs = (vars(statistics.moments(columns, fold)) for statistics in (found, expected))
            for name, value in ours.items():
                np.testing.assert_allclose(value, theirs[name], rtol=1e-5, atol=1e-4, err_msg=name)


def test_rows_of_a_store_have_the_statistics_of_the_same_rows_in_memory(stored):
    rows, features = stored
    expected = accumulate(blocks_of(features, rows.ratings, rows.folds), NAMES, FOLDS, D)
    assert expected.counts().sum() == 110
    assert_same(rows.statistics(FOLDS), expected)


def test_statistics_of_parts_add_up(stored):
    rows, _ = stored
    first, *others = (rows.take(part) for part in np.array_split(rows.store.order(rows.keys), 4))
    total = first.statistics(FOLDS)
    for part in others:
        total = total + part.statistics(FOLDS)
    assert_same(total, rows.statistics(FOLDS))


@pytest.mark.slow
def test_ray_tasks_give_the_statistics_of_one_process(stored):
    ray = pytest.importorskip("ray")
    rows, _ = stored
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        assert_same(statistics_by_ray(rows, FOLDS, 3), rows.statistics(FOLDS))
    finally:
        ray.shutdown()


def test_blocks_of_a_store_are_its_rows_in_the_order_of_its_shards(stored):
    given, features = stored
    order = np.random.default_rng(1).permutation(N)
    rows, start = given.take(order), np.array([[1.0] * D, [2.0] * D])
    (block,) = rows.blocks()
    np.testing.assert_array_equal(block.features, features)
    np.testing.assert_array_equal(block.ratings, given.ratings)
    np.testing.assert_array_equal(block.folds, given.folds)
    (left,) = rows.blocks(start)
    np.testing.assert_allclose(left.ratings, given.ratings - features.astype(np.float64) @ start.T)
    np.testing.assert_array_equal(rows.features(), features[order])


def test_stage_1_is_that_of_rows_in_memory(stored):
    given, features = stored
    rows = given.take(np.random.default_rng(1).permutation(N))
    section = RegressionSection(folds=FOLDS, alphas=(0.1, 1.0), uncertainty=False)
    expected = fit_regression(features, given.ratings, given.folds, NAMES, alphas=section.alphas, intercept=False)
    head, _ = fit_stage1(section, rows.statistics(FOLDS), rows)
    np.testing.assert_allclose(head.weight, expected.weight, rtol=1e-4, atol=1e-6)


def test_rows_of_a_store_are_never_in_memory_all_at_once(tmp_path):
    rows, width = 60_000, 32
    keys = np.array([number.to_bytes(16, "little") for number in range(rows)], KEY)
    store = FeatureStore(tmp_path, fingerprint={"weights": "one"}, hidden_size=width)
    store.write_shard(shard_name("0123", 0), keys, np.zeros((rows, width), np.float32), [], np.empty((0, width)))
    rated = RatedRows(store, keys, np.zeros((rows, 1)), np.zeros(rows, np.int64), ["a"])
    assert len(store) == rows  # (looks for the keys, whose index stays in memory)
    tracemalloc.start()
    count = sum(len(block.features) for block in rated.blocks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == rows
    assert peak < rows * width * 4 * 0.6
