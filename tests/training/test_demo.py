"""The closing words of `armorm demo`: verdicts on everyday replies that follow from the scores."""

from __future__ import annotations

from armorm.data.everyday import everyday_pairs
from armorm.training.demo import everyday_verdicts
from tests.helpers.small_models import reward_model


def test_verdicts_on_everyday_pairs_follow_from_the_scores():
    rm = reward_model()
    found = everyday_verdicts(rm)["verdicts"]
    assert len(found) == 3
    for pair, entry in zip(everyday_pairs(), found, strict=True):
        better, worse = rm.score([pair.chosen, pair.rejected]).scores
        assert entry["right"] == (better > worse)
        assert entry["reason"].startswith("A is better" if better > worse else "B is better")
        assert (entry["A"], entry["B"]) == (pair.chosen.response, pair.rejected.response)
