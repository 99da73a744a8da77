"""Training on ratings of several people: rows are weighted by their spread, and the run says so."""

from __future__ import annotations

import json

import numpy as np

from armorm import Recipe, train
from armorm.heads.rated_record import RatedRun


def rows(several: bool):
    random = np.random.default_rng(0)
    for i in range(60):
        for polite in (1, 3, 5):
            count = int(random.integers(2, 6)) if several else 1
            cell = [int(v) for v in np.clip(polite + random.integers(-1, 2, count), 1, 5)]
            yield {"prompt": f"Question {i}?", "response": f"{'Please! ' * polite}Go {i}.", "polite": cell}


def trained(folder, several: bool):
    folder.mkdir()
    (folder / "ours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(several)))
    text = f"""
name: several
backbone: {{model: armorm-tiny, dtype: float32, max_length: 128}}
data_root: {folder}
ratings: [{{data: ours.jsonl, objectives: {{polite: [1, 5]}}}}]
"""
    train(Recipe.from_text(text), folder / "run", quiet=True)
    return json.loads((folder / "run" / "metrics.json").read_text())


def test_several_raters_weight_rows_and_the_report_says_so(tmp_path):
    metrics = trained(tmp_path / "several", True)
    low, high = metrics["regression"][0]["rater_weights"]
    assert low < 0.95 and high > 1.05
    run = RatedRun.open(tmp_path / "several" / "run")
    sums = list(run.sums([0]).values())
    np.testing.assert_allclose(run.fitted([0], sums[0]).weight, run.weight, rtol=2e-3, atol=2e-6)
    weights = run.record.weights[:, 0]
    np.testing.assert_allclose((weights.min(), weights.max()), (low, high), rtol=1e-6)
    card = (tmp_path / "several" / "run" / "README.md").read_text()
    assert "weighted by the spread" in card
    assert trained(tmp_path / "single", False)["regression"][0]["rater_weights"] is None
