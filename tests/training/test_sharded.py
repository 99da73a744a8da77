"""Statistics from a feature store: the same from one pass, from parts, from Ray tasks."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from armorm.features.store import KEY, FeatureStore, shard_name
from armorm.heads.accumulation import accumulate, blocks_of
from armorm.heads.regression import fit_regression
from armorm.heads.statistics import RatingStatistics
from armorm.training.featurize import StoredRows, statistics_by_ray, statistics_of
from armorm.training.schema import RegressionSection
from armorm.training.stages import STATISTICS, RatedRows, fit_stage1

N, D, FOLDS = 90, 6, 3
NAMES = ["a", "b"]


@pytest.fixture
def stored(tmp_path) -> tuple[StoredRows, np.ndarray]:
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
    return StoredRows(str(tmp_path), keys, ratings, np.arange(N) % FOLDS, NAMES, FOLDS), features


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
    assert_same(statistics_of(rows), expected)


def test_parts_hold_every_row_once_and_their_statistics_add_up(stored):
    rows, _ = stored
    parts = rows.parts(4)
    assert [key for part in parts for key in part.keys] == list(rows.keys)
    total = statistics_of(parts[0])
    for part in parts[1:]:
        total = total + statistics_of(part)
    assert_same(total, statistics_of(rows))


@pytest.mark.slow
def test_ray_tasks_give_the_statistics_of_one_process(stored):
    ray = pytest.importorskip("ray")
    rows, _ = stored
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        assert_same(statistics_by_ray(rows, 3), statistics_of(rows))
    finally:
        ray.shutdown()


def rated_rows(stored: StoredRows, order: np.ndarray) -> RatedRows:
    store = FeatureStore(stored.folder, fingerprint={"weights": "one"}, hidden_size=D)
    keys = np.array(stored.keys, KEY)
    return RatedRows(store, keys[order], stored.ratings[order], stored.folds[order], NAMES, [50, 50])


def test_blocks_of_a_store_are_its_rows_in_the_order_of_its_shards(stored):
    given, features = stored
    order = np.random.default_rng(1).permutation(N)
    rows, start = rated_rows(given, order), np.array([[1.0] * D, [2.0] * D])
    (block,) = rows.blocks()
    np.testing.assert_array_equal(block.features, features)
    np.testing.assert_array_equal(block.ratings, given.ratings)
    np.testing.assert_array_equal(block.folds, given.folds)
    (left,) = rows.blocks(start)
    np.testing.assert_allclose(left.ratings, given.ratings - features.astype(np.float64) @ start.T)
    travelling = rows.stored(FOLDS)
    np.testing.assert_array_equal(travelling.keys, np.array(given.keys, KEY))
    np.testing.assert_array_equal(travelling.ratings, given.ratings)
    np.testing.assert_array_equal(rows.features(), features[order])


def test_stage_1_is_that_of_rows_in_memory_whoever_sums(stored, tmp_path):
    given, features = stored
    rows = rated_rows(given, np.random.default_rng(1).permutation(N))
    section = RegressionSection(folds=FOLDS, alphas=(0.1, 1.0), uncertainty=False)
    expected = fit_regression(features, given.ratings, given.folds, NAMES, alphas=section.alphas, intercept=False)
    for total in (None, lambda: statistics_of(rows.stored(FOLDS))):
        head, _ = fit_stage1(section, rows.blocks, NAMES, D, rows.levels, tmp_path / STATISTICS, total)
        np.testing.assert_allclose(head.weight, expected.weight, rtol=1e-4, atol=1e-6)


def test_rows_of_a_store_are_never_in_memory_all_at_once(tmp_path):
    rows, width = 60_000, 32
    keys = np.array([number.to_bytes(16, "little") for number in range(rows)], KEY)
    store = FeatureStore(tmp_path, fingerprint={"weights": "one"}, hidden_size=width)
    store.write_shard(shard_name("0123", 0), keys, np.zeros((rows, width), np.float32), [], np.empty((0, width)))
    rated = RatedRows(store, keys, np.zeros((rows, 1)), np.zeros(rows, np.int64), ["a"], [1])
    tracemalloc.start()
    count = sum(len(block.features) for block in rated.blocks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == rows
    assert peak < rows * width * 4 * 0.6
