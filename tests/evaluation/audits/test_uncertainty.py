"""The uncertainty audit against its definitions, on rows like the rated ones."""

from __future__ import annotations

import numpy as np
import pytest

from armorm.evaluation.audits.uncertainty import uncertainty_audit
from armorm.objectives import Objective, ObjectiveSet
from tests.heads.test_uncertainty import clustered, uncertainty_of

OBJECTIVES = ObjectiveSet([Objective("help", "ours", -100.0, 100.0, -20.0, 3.0)])


def audit(n: int):
    """Of a head fitted on n rows, on 2000 new rows."""
    head, uncertainty = uncertainty_of(*clustered(0, n, 20, 0.0)[:3])
    features, ratings, _, _ = clustered(1, 2000, 20, 0.0)
    raw = OBJECTIVES.to_raw(ratings)
    found = uncertainty_audit(uncertainty, head.predict(features), features, raw, [9], OBJECTIVES, ["ours"] * len(raw))
    return uncertainty, head, features, ratings, found


def test_coverage_width_and_deviations_are_those_of_the_rows_in_raw_units():
    uncertainty, head, features, ratings, found = audit(800)
    entry, leverage = found["objectives"]["help"], uncertainty.leverage(features)
    assert entry["unusual"] == (leverage > uncertainty.usual_leverage).mean()
    assert 0.002 < entry["unusual"] < 0.03
    assert entry["noise"] == pytest.approx(20 * 0.5, rel=0.1)
    assert entry["epistemic_std"] == pytest.approx(20 * uncertainty.epistemic_std(leverage).mean())
    spread = uncertainty.predictive_std(leverage)
    errors = np.abs(head.predict(features) - ratings)
    for level, interval in entry["intervals"].items():
        half = uncertainty.conformal[float(level)] * spread
        assert interval["coverage"] == pytest.approx((errors <= half).mean())
        assert interval["coverage"] == pytest.approx(float(level), abs=0.04)
        assert interval["width"] == pytest.approx(20 * 2 * half.mean())


def test_a_percentile_that_too_few_rows_determine_gives_no_share():
    uncertainty, *_, found = audit(60)
    assert np.isnan(uncertainty.usual_leverage[0])
    assert found["objectives"]["help"]["unusual"] is None
    assert found["unusual"] == {}
