"""Sums of rated rows against plain sums, whatever the order, the parts and the patterns."""

from __future__ import annotations

import numpy as np
import pytest

from armorm.errors import FitError
from armorm.heads.accumulation import _Sums, accumulate, blocks_of
from armorm.heads.regression import fit_from_statistics, fit_regression
from armorm.heads.statistics import RatingStatistics

NAMES = ["a", "b", "c", "d"]
D, FOLDS = 6, 3
SOURCES = [(0, 1), (2,), (3,)]  # columns that the rows of each source rate


def rated_rows(seed: int = 0, n: int = 500, at_random: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 features, ratings by source or missing at random (all 16 patterns), folds."""
    rng = np.random.default_rng(seed)
    features = (rng.normal(size=(n, D)) + 3 * rng.normal(size=D)).astype(np.float32)
    ratings = features @ rng.normal(size=(D, 4)) + rng.normal(size=(n, 4))
    missing = rng.random((n, 4)) < 0.5
    if not at_random:
        missing[:] = True
        for row, source in enumerate(rng.integers(0, len(SOURCES), n)):
            missing[row, list(SOURCES[source])] = False
    ratings[missing] = np.nan
    return features, ratings, rng.integers(0, FOLDS, n)


def of(features, ratings, folds, **options) -> RatingStatistics:
    return accumulate(blocks_of(features, ratings, folds, 64), NAMES, FOLDS, D, precision="float64", **options)


def assert_sums_are_plain(statistics: RatingStatistics, features, ratings, folds) -> None:
    """Every objective's sums in every fold, against sums over exactly its rated rows."""
    covered = []
    for columns in statistics.row_sets():
        covered += columns
        for fold in range(FOLDS):
            found = statistics.moments(columns, fold)
            for position, column in enumerate(columns):
                rows = (folds == fold) & ~np.isnan(ratings[:, column])
                x, r = features[rows].astype(np.float64), ratings[rows, column]
                assert found.count == rows.sum()
                np.testing.assert_allclose(found.gram, x.T @ x, rtol=1e-9, atol=1e-8)
                np.testing.assert_allclose(found.feature_sum, x.sum(0), rtol=1e-9, atol=1e-9)
                np.testing.assert_allclose(found.cross[:, position], x.T @ r, rtol=1e-9, atol=1e-8)
                np.testing.assert_allclose(found.rating_sum[position], r.sum(), rtol=1e-9, atol=1e-9)
                np.testing.assert_allclose(found.rating_products[position, position], r @ r, rtol=1e-9)
    assert sorted(covered) == list(range(4))
    np.testing.assert_array_equal(
        statistics.counts(),
        [[((folds == f) & ~np.isnan(ratings[:, c])).sum() for f in range(FOLDS)] for c in range(4)],
    )
    np.testing.assert_allclose(statistics.variances(), np.nanvar(ratings, 0), rtol=1e-9)


@pytest.mark.parametrize("at_random", [False, True])
def test_sums_are_those_over_the_rated_rows_of_each_objective(at_random):
    rows = rated_rows(at_random=at_random)
    assert_sums_are_plain(of(*rows), *rows)


def test_there_are_never_more_gram_matrices_than_objectives_or_patterns():
    by_source, at_random = of(*rated_rows()), of(*rated_rows(at_random=True))
    assert (by_source.by_pattern, by_source.gram_count) == (True, 3)
    assert (at_random.by_pattern, at_random.gram_count) == (False, 4)
    assert sorted(by_source.row_sets()) == [[0, 1], [2], [3]]


def test_objectives_rated_together_share_a_matrix_after_their_patterns_have_been_merged():
    features, ratings, folds = rated_rows(at_random=True)
    ratings[:, 1] = np.where(np.isnan(ratings[:, 0]), np.nan, 2 * ratings[:, 0])
    statistics = of(features, ratings, folds)
    assert not statistics.by_pattern
    assert statistics.row_sets() == [[0, 1], [2], [3]]
    assert_sums_are_plain(statistics, features, ratings, folds)


@pytest.mark.parametrize("at_random", [False, True])
@pytest.mark.parametrize("pending_bytes", [1, 40 * D * 8, 10**8])
def test_sums_do_not_depend_on_order_or_on_how_many_rows_wait(at_random, pending_bytes):
    features, ratings, folds = rated_rows(at_random=at_random)
    order = np.random.default_rng(1).permutation(len(features))
    statistics = of(features[order], ratings[order], folds[order], pending_bytes=pending_bytes)
    assert_sums_are_plain(statistics, features, ratings, folds)


def test_many_patterns_of_few_rows_take_few_products(monkeypatch):
    products = []
    add = _Sums.add
    monkeypatch.setattr(_Sums, "add", lambda self, *arrays: products.append(len(arrays[2])) or add(self, *arrays))
    rng = np.random.default_rng(2)
    names, k = [f"objective-{i}" for i in range(10)], 10
    features, folds = rng.normal(size=(2000, D)).astype(np.float32), rng.integers(0, FOLDS, 2000)
    ratings = np.where(rng.random((2000, k)) < 0.5, np.nan, rng.random((2000, k)))
    found = accumulate(blocks_of(features, ratings, folds, 500), names, FOLDS, D, pending_bytes=800 * D * 4)
    patterns = len(np.unique(np.column_stack([np.isnan(ratings), folds]), axis=0))
    assert patterns > 1200
    assert len(products) < 300  # of the first patterns, then k in each fold whenever the rows that wait are too many
    for column in range(k):
        rows = ~np.isnan(ratings[:, column])
        gram = sum(found.moments([column], fold).gram for fold in range(FOLDS))
        np.testing.assert_allclose(gram, features[rows].T @ features[rows], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_parts_add_up_to_the_whole_and_can_be_taken_off_again(first, second):
    """Parts by pattern and parts by objective, each with an origin of its own."""
    one, two = rated_rows(0, at_random=first), rated_rows(1, at_random=second)
    both = tuple(np.concatenate(pair) for pair in zip(one, two, strict=True))
    whole = of(*one) + of(*two)
    assert_sums_are_plain(whole, *both)
    assert_sums_are_plain(whole - of(*two), *one)


def test_new_objectives_come_in_with_new_data():
    features, ratings, folds = rated_rows()
    old = accumulate(blocks_of(features, ratings[:, :3], folds), NAMES[:3], FOLDS, D, precision="float64")
    new = accumulate(blocks_of(features, ratings[:, 3:], folds), NAMES[3:], FOLDS, D, precision="float64")
    whole = old + new
    assert whole.names == NAMES
    assert_sums_are_plain(whole, features, ratings, folds)
    with pytest.raises(FitError, match="have objectives c, which are not expected"):
        old.with_names(["b", "a"])


@pytest.mark.parametrize("at_random", [False, True])
def test_statistics_are_read_back_as_they_were_saved(tmp_path, at_random):
    rows = rated_rows(at_random=at_random)
    statistics = of(*rows)
    statistics.save(tmp_path / "statistics.safetensors")
    found = RatingStatistics.load(tmp_path / "statistics.safetensors")
    assert (found.names, found.folds, found.by_pattern) == (NAMES, FOLDS, statistics.by_pattern)
    assert_sums_are_plain(found, *rows)
    np.testing.assert_array_equal(fit_from_statistics(found).weight, fit_from_statistics(statistics).weight)


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    path = tmp_path / "statistics.safetensors"
    with pytest.raises(FitError, match="not a file of rating statistics"):
        RatingStatistics.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(FitError, match="not a file of rating statistics"):
        RatingStatistics.load(path)


def test_a_fit_on_parts_is_the_fit_on_all_rows():
    features, ratings, folds = rated_rows(n=900)
    whole = fit_regression(features, ratings, folds, NAMES, precision="float64", intercept=True)
    parts = [of(features[rows], ratings[rows], folds[rows]) for rows in np.array_split(np.arange(900), 3)]
    found = fit_from_statistics(parts[0] + parts[1] + parts[2], intercept=True)
    np.testing.assert_allclose(found.weight, whole.weight, rtol=1e-8, atol=1e-10)
    assert [report.alpha for report in found.reports] == [report.alpha for report in whole.reports]


@pytest.mark.parametrize("solver", ["cholesky", "eigen"])
def test_float32_products_of_features_far_from_zero_keep_their_digits(solver):
    """Features whose mean is forty times their spread, as those of real decoders have it."""
    rng = np.random.default_rng(2)
    n, d = 4000, 24
    features = (rng.normal(size=(n, d)) + 40 * rng.normal(size=d)).astype(np.float32)
    ratings = (features @ rng.normal(size=(d, 1)) / d + rng.normal(size=(n, 1))).astype(np.float64)
    folds = np.arange(n) % FOLDS
    options = {"solver": solver, "alphas": (1e-4, 1.0, 100.0)}
    exact = fit_regression(features, ratings, folds, ["a"], precision="float64", **options)
    narrow = fit_regression(features, ratings, folds, ["a"], **options)
    assert narrow.reports[0].alpha == exact.reports[0].alpha
    difference = narrow.predict(features) - exact.predict(features)
    assert np.abs(difference).max() < 1e-4 * ratings.std()


def test_both_solvers_give_the_same_weights():
    features, ratings, folds = rated_rows(n=300)
    found = [
        fit_regression(features, ratings, folds, NAMES, precision="float64", solver=solver)
        for solver in ("cholesky", "eigen")
    ]
    np.testing.assert_allclose(found[0].weight, found[1].weight, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found[0].fold_weight, found[1].fold_weight, rtol=1e-8, atol=1e-10)


def test_a_matrix_that_rounding_left_indefinite_is_solved_by_its_eigenvalues():
    rng = np.random.default_rng(3)
    features = np.repeat(rng.normal(size=(60, 3)), 20, axis=1).astype(np.float32) * 1000  # rank 3 of 60
    ratings = features[:, :1].astype(np.float64) / 1000 + 0.1 * rng.normal(size=(60, 1))
    head = fit_regression(features, ratings, np.arange(60) % FOLDS, ["a"], alphas=(1e-4,), solver="cholesky")
    assert np.isfinite(head.weight).all()
    assert np.corrcoef(head.predict(features)[:, 0], ratings[:, 0])[0, 1] > 0.98


def test_an_objectives_weight_divides_its_alpha():
    features, ratings, folds = rated_rows(n=300)
    weighed = fit_regression(features, ratings, folds, NAMES, alphas=(10.0,), weights={"b": 4.0})
    plain = fit_regression(features, ratings, folds, NAMES, alphas=(10.0,))
    stronger = fit_regression(features, ratings, folds, NAMES, alphas=(2.5,))
    np.testing.assert_allclose(weighed.weight[[0, 2, 3]], plain.weight[[0, 2, 3]], rtol=1e-12)
    np.testing.assert_allclose(weighed.weight[1], stronger.weight[1], rtol=1e-12)


def test_few_ratings_and_an_alpha_at_the_end_are_said():
    features, ratings, folds = rated_rows(n=200)
    reports = fit_regression(features, ratings, folds, NAMES, alphas=(0.1, 1e-9)).reports
    assert all("has only" in report.warning for report in reports)
    small = fit_regression(features, ratings, folds, NAMES, alphas=(1e-9, 1e-8)).reports
    assert any("the largest alpha is the best one" in report.warning for report in small + reports)


def test_folds_out_of_range_and_features_that_are_not_finite_are_refused():
    features, ratings, folds = rated_rows()
    with pytest.raises(FitError, match="folds from 0 to 2, expected 0 to 1"):
        accumulate(blocks_of(features, ratings, folds), NAMES, 2, D)
    features[3, 2] = np.inf
    with pytest.raises(FitError, match="not finite"):
        accumulate(blocks_of(features, ratings, folds), NAMES, FOLDS, D)
