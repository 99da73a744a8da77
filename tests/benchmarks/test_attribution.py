"""The attribution benchmark: its measures on made-up maps, its planted faults, and a map that points at the fault."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from armorm.backbone.readout import Readout
from armorm.backbone.token_spans import TokenSpans
from armorm.conversation import Conversation
from armorm.explain.token_attribution import TokenAttribution
from armorm.objectives import Objective

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from token_maps import page
from token_maps.maps import MEAN, OCCLUSION, POSITION, predicted_gains, sentence_maps, token_maps
from token_maps.measures import ANY, Table, auc, planted_figures, shuffled_planted
from token_maps.reading import Reading
from token_maps.replies import ERROR_TYPES, PLANTED, Reply, plant

ROOT = Path(__file__).parents[2]
TEXT = "A first. Bad one. A third."
WORDS = [(0, 1), (1, 8), (8, 12), (12, 17), (17, 19), (19, 26), (26, 26)]  # the last one is of the template


def reading(number: int = 0, rewards: tuple[float, ...] = (1, 1, -3, -1, 1, 1, 0), fault: str = "insult") -> Reading:
    """Seven tokens of one objective; the second sentence has a fault and the lowest rewards."""
    conversation = Conversation.from_prompt(f"Question {number}?", TEXT)
    spans, template = np.array(WORDS), np.array([False] * 6 + [True])
    places = TokenSpans(TEXT, spans, template, [TEXT[a:b] for a, b in WORDS], [])
    mean = np.array(rewards, np.float64)[:, None] / len(WORDS)
    attribution = TokenAttribution(places, ["good"], np.array([2.0]), mean, np.zeros(1))
    nothing = np.zeros(len(WORDS))
    occlusion = np.array([0.1, -0.5, 0.2])
    reply = Reply(conversation, ((fault, 9, 17),))
    return Reading(reply, attribution, torch.zeros(len(WORDS), 2), nothing, nothing, 0.0, occlusion, np.zeros(3))


def test_auc_is_the_share_of_pairs_with_the_marked_token_lower():
    worth, marked = np.array([3.0, 1.0, 2.0, 2.0]), np.array([False, True, True, False])
    pairs = [(a, b) for a in worth[marked] for b in worth[~marked]]
    assert auc(worth, marked) == np.mean([1.0 if a < b else 0.5 if a == b else 0.0 for a, b in pairs])
    assert auc(-worth, marked) == 1 - auc(worth, marked)


def test_tokens_belong_to_sentences_and_marked_characters_without_white_space():
    found = reading()
    assert found.sentence_of[:6].tolist() == [0, 0, 1, 1, 2, 2]
    assert found.text_tokens.tolist() == [True] * 6 + [False]
    assert found.share(found.reply.marked())[:6].tolist() == [0, 0, 1, 1, 0, 0]


def test_a_map_that_is_lowest_at_the_fault_has_auc_one_and_position_has_not():
    found, marked = reading(), np.array([False, False, True, True, False, False])
    maps = token_maps([Objective("good", "set", 0.0, 1.0, 1.0, 0.0)])
    values = {name: maps[name](found) for name in (MEAN, f"{MEAN}, by sentence", OCCLUSION, POSITION)}
    areas = {name: auc(value[found.text_tokens], marked) for name, value in values.items()}
    assert areas == {MEAN: 1.0, f"{MEAN}, by sentence": 1.0, OCCLUSION: 1.0, POSITION: 0.5}


def test_the_mean_part_predicts_the_mean_over_the_other_tokens():
    found = reading()
    kept = 2.0 * np.array([1, 1, 1, 1, 0]).mean() - 2.0 * np.array([1, 1, -3, -1, 1, 1, 0]).mean()
    predicted = predicted_gains(found, [1])
    np.testing.assert_allclose([predicted[MEAN], predicted[OCCLUSION]], [kept, 0.5])


def test_the_planted_sentence_counts_as_found_where_it_is_the_lowest():
    found = planted_figures([reading(), reading(1, (-3, -3, 1, 1, 1, 1, 0))])
    assert found["mean part, sum of deviations"]["value"] == 0.5
    assert found[OCCLUSION]["value"] == 1.0
    np.testing.assert_allclose(found["chance"]["value"], 1 / 3)
    assert sentence_maps(reading())[POSITION].argmin() == 2


def test_a_perfect_prediction_fits_and_a_constant_error_counts_against_it_alone():
    rng = np.random.default_rng(0)
    readings = [reading(number) for number in range(60)]
    table = Table(readings)
    for row in range(60):
        measured = rng.normal(size=4)
        for name, predicted in (("same", measured), ("shifted", measured + 1), ("noise", rng.normal(size=4))):
            table.add_fit(row, name, predicted, measured)
    fits, correlations = table.fits(), table.correlations()
    assert fits["same"]["value"] == 1.0
    assert fits["shifted"]["value"] < 0.3
    np.testing.assert_allclose([correlations[name]["value"] for name in ("same", "shifted")], 1.0)
    low, high = correlations["noise"]["interval"]
    assert low < 0 < high
    assert fits["same"]["replies"] == 60
    assert fits["same"]["interval"] == (1.0, 1.0)
    low, high = fits["shifted"]["interval"]
    assert low < fits["shifted"]["value"] < high < 1


def test_r2_is_that_of_the_textbook():
    rng = np.random.default_rng(1)
    readings = [reading(number) for number in range(60)]
    measured, predicted = rng.normal(1, 1, (60, 4)), rng.normal(1, 1, (60, 4))
    table = Table(readings)
    for row in range(60):
        table.add_fit(row, "map", predicted[row], measured[row])
    expected = 1 - ((measured - predicted) ** 2).sum() / ((measured - measured.mean()) ** 2).sum()
    np.testing.assert_allclose(table.fits()["map"]["value"], expected)


def test_a_sentence_of_other_states_is_lowest_or_highest_with_shuffled_weights():
    states = torch.zeros(len(WORDS), 8)
    states[2:4] = torch.randn(8, generator=torch.Generator().manual_seed(0))
    found = [replace(reading(), states=states)]
    model = SimpleNamespace(regression_layer=torch.nn.Linear(16, 1, bias=False))
    torch.nn.init.normal_(model.regression_layer.weight, generator=torch.Generator().manual_seed(1))
    rm = SimpleNamespace(model=model, backbone=SimpleNamespace(readout=Readout("last+mean")))
    shares = shuffled_planted(found, rm)
    assert shares["lowest"]["mean"] + shares["highest"]["mean"] == 1
    assert 0 < shares["lowest"]["mean"] < 1


def spans_with(difference: float) -> dict:
    """Results of marked spans in which the mean part differs from position by `difference` and 0.1 to each side."""
    entry = {"interval": (0.5, 0.7), "replies": 60}
    maps = {
        name: {**entry, "value": 0.6 + d, "minus_position": [d, (d - 0.1, d + 0.1)]}
        for name, d in (("random", -0.1), (POSITION, 0.0), (MEAN, difference), (f"{POSITION} and {MEAN}", -0.05))
    }
    shuffled = {name: {"mean": 0.5, "std": 0.1} for name in ("AUC", "correlation")}
    return {"spans": {"auc": {kind: {"maps": maps} for kind in (ANY, *ERROR_TYPES)}, "shuffled": shuffled}}


def test_a_verdict_says_that_a_map_beats_position_only_if_the_interval_is_above_it():
    above, level = ("\n".join(page.sentences(spans_with(difference))) for difference in (0.15, 0.05))
    assert f"1 of 1 maps beat position; the best is {MEAN}, +0.150 (+0.050 to +0.250)" in above
    assert f"no map of 1 beats position; the best is {MEAN}, +0.050 (-0.050 to +0.150)" in level
    assert "no sum of 1 beats position" in above
    assert "Not measured yet: gradient, deletion, insult" in above


def test_the_page_has_the_committed_results(tmp_path):
    committed = (ROOT / "docs" / "attribution.md").read_text()
    (tmp_path / "attribution.md").write_text(committed)
    results = json.loads((ROOT / "benchmarks" / "results" / "attribution.json").read_text())
    page.write(tmp_path / "attribution.md", results)
    assert (tmp_path / "attribution.md").read_text() == committed


@pytest.mark.parametrize("kind", PLANTED)
def test_a_fault_is_planted_in_one_place_of_each_reply(kind):
    text = "There are 12 months in a year. Each has about 30 days. The shortest is February. It has 28 of them."
    replies = [
        Reply(Conversation.from_prompt(f"Months of year {n}?", text.replace("year", f"year {n}"))) for n in (1, 2, 3)
    ]
    for before, after in zip(replies, plant(kind, replies), strict=True):
        old, new = before.conversation.response, after.conversation.response
        ((name, start, end),) = after.errors
        assert name == kind
        assert new != old
        if kind == "false number":
            assert new[:start] == old[:start] and new[end:] == old[len(old) - len(new) + end :]
        else:
            assert "".join((new[:start] + new[end:]).split()) == "".join(old.split())
    assert plant(kind, replies) == plant(kind, [replace(reply) for reply in replies])
