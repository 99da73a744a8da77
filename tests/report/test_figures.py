"""The arithmetic of a report, against slow and obvious versions."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy.stats import entropy, spearmanr

from armorm.evaluation.benchmarks.base import Loaded
from armorm.evaluation.examples import Example, Item
from armorm.report import plots
from armorm.report import sections as figures
from armorm.report.evidence import Evidence


@pytest.fixture
def values() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.round(rng.normal(size=(60, 4)) @ rng.normal(size=(4, 4)), 1)


def test_the_matrix_is_spearman_of_every_two_columns(values):
    found = figures.correlation_matrix(values)
    expected = [[spearmanr(a, b).statistic for b in values.T] for a in values.T]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    still = figures.correlation_matrix(np.column_stack([values, np.ones(60)]))
    assert np.isnan(still[4]).all() and np.isnan(still[:, 4]).all()


def test_length_is_correlated_over_all_rows_and_within_prompts(values):
    lengths = np.arange(60.0)[::-1] + 3 * values[:, 0]
    prompts = [f"p{i // 4}" for i in range(60)]
    found = figures.length_correlations(values, lengths, prompts)
    for column in range(4):
        assert found["pooled"][column] == pytest.approx(spearmanr(values[:, column], lengths).statistic)
        inside, sizes = values[:, column].copy(), lengths.copy()
        for start in range(0, 60, 4):
            inside[start : start + 4] -= inside[start : start + 4].mean()
            sizes[start : start + 4] -= sizes[start : start + 4].mean()
        assert found["within"][column] == pytest.approx(spearmanr(inside, sizes).statistic, abs=0.02)
    alone = figures.length_correlations(values, lengths, [str(i) for i in range(60)])
    assert np.isnan(alone["within"]).all()


def test_entropy_is_that_of_each_row():
    weights = np.array([[1.0, 0.0, 0.0], [0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(figures.entropies(weights), [entropy(row) for row in weights], atol=1e-12)


def test_extremes_and_group_means():
    weights = np.array([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5]])
    assert figures.extremes(weights, 2) == [[1, 2], [0, 2]]
    found = figures.mean_by_group(weights, ["a", "b", "a"])
    assert list(found) == ["a", "b"]
    np.testing.assert_allclose(found["a"], [0.3, 0.7])


def test_ratings_are_counted_by_objective_and_file():
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((40, 3)) < 0.4, np.nan, 1.0)
    labels[:, 2] = np.nan
    files = [str(name) for name in rng.choice(["b.csv", "a.csv", "c.csv"], 40)]
    examples = [
        Example(Item(str(i), "", "", str(i), tuple(row)), (), origin=(file, i))
        for i, (row, file) in enumerate(zip(labels.tolist(), files, strict=True))
    ]
    found = figures.data(Evidence(None, {}, ratings=Loaded(examples, names=["x", "y", "z"])))
    assert found["rated_files"] == list(dict.fromkeys(files))
    for entry, column in zip(found["rated"], labels.T, strict=True):
        cells = []
        for name in found["rated_files"]:
            inside = [value for value, file in zip(column, files, strict=True) if file == name]
            cells.append((sum(not np.isnan(value) for value in inside), len(inside)))
        assert entry["cells"] == cells
        assert entry["missing"] == float(np.isnan(column).mean())


def test_no_ratings_are_counted_as_missing():
    found = figures.data(Evidence(None, {"data": {"rows": 1}}, ratings=Loaded(names=["x"])))
    assert (found["rated_files"], found["missing"]) == ([], None)
    assert found["rated"] == [{"name": "x", "cells": [], "missing": 1.0}]


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("known", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (20, 4), (0, 3)])
def test_the_largest_errors_are_those_of_a_full_sort(levels, known, shape):
    rng = np.random.default_rng(levels)
    errors = np.where(rng.random(shape) < known, rng.integers(0, levels, shape) / 4, -1.0)
    cells = [(errors[row, column], row, column) for row in range(shape[0]) for column in range(shape[1])]
    expected = [(row, column) for error, row, column in sorted(cells, reverse=True) if error >= 0]
    assert figures.largest_errors(errors, 5) == expected[:5]


def test_bins_hold_every_row_once_along_x():
    x, y = np.arange(40.0)[::-1], np.arange(40.0) ** 2
    bins = figures.binned_means(x, y, bins=4)
    assert [count for _, _, count in bins] == [10] * 4
    assert bins[0] == (pytest.approx(4.5), pytest.approx(np.mean(np.arange(30.0, 40) ** 2)), 10)


def test_errors_are_shares_of_the_variance():
    report = {"validation_errors": [0.4, 0.3, 0.6, None], "r2": 0.25}
    np.testing.assert_allclose(figures.relative_errors(report), [1.0, 0.75, 1.5, np.nan])


def test_thinning_is_seeded_and_in_order():
    assert figures.thinned(5, 10).tolist() == [0, 1, 2, 3, 4]
    drawn = figures.thinned(1000, 50)
    assert len(set(drawn.tolist())) == 50 and (np.diff(drawn) > 0).all()
    np.testing.assert_array_equal(drawn, figures.thinned(1000, 50))


def test_effects_are_drawn_where_they_are_and_faults_have_a_shape_of_their_own():
    def edit(change: float, verdict: str, fault: bool = False, half: float | None = 0.1) -> dict:
        interval = None if half is None else (change - half, change + half)
        return {"change": change, "interval": interval, "of_all": interval, "verdict": verdict, "fault": fault}

    edits = {
        "insult": edit(-0.6, "lowers"),
        "padding": edit(0.4, "raises", True),
        "flattery": edit(0.0, "unclear"),
        "name": edit(0.1, "too few rows", half=None),
    }
    drawn = str(plots.effects(edits, (-1.0, 0.5), 0.1, "edits"))
    at = [float(x) for x in re.findall(r'<circle class="dot" cx="([\d.]+)"', drawn)]
    diamond = [float(x) for x in re.findall(r'<polygon class="dot other" points="([\d.]+)', drawn)]
    rings = [float(x) for x in re.findall(r'<circle class="ring open" cx="([\d.]+)"', drawn)]
    left, right = plots.Frame((-1.0, 0.5), (0, 1)).at(-1.0, 0)[0], plots.Frame((-1.0, 0.5), (0, 1)).at(0.5, 0)[0]
    expected = [left + (change + 1) / 1.5 * (right - left) for change in (-0.6, 0.4, 0.0, 0.1)]
    np.testing.assert_allclose(at + diamond + rings, expected, atol=0.1)
    assert drawn.count('class="whisker"') == 3 and drawn.count(">unclear<") == 1
    assert "padding +0.40, raises" in drawn
