"""Layers and poolings side by side: the states are those of each readout alone, and the best is named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from armorm.backbone.decoder import Backbone
from armorm.conversation import Conversation
from armorm.errors import BackboneError
from armorm.training.probe import Probe, ProbedReadout, layer_states, probe
from tests.helpers.commands import exit_code
from tests.helpers.conversations import chat
from tests.helpers.small_models import llama, tokenizer

DIALOGUES = [chat("Why is the sky blue?", "It scatters. " * n) for n in (1, 4, 9)]


def test_states_of_all_layers_are_those_of_each_readout(tmp_path):
    llama().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    whole = Backbone.load(tmp_path, dtype="float32", device="cpu")
    encoded = whole.template.encode([Conversation.from_messages(messages) for messages in DIALOGUES])
    states = layer_states(whole, encoded, [0, 1, 2], means=True)
    for number, layer in enumerate((0, 1, 2)):
        for pooling in ("last", "mean"):
            one = Backbone.load(tmp_path, dtype="float32", device="cpu", layer=layer, pooling=pooling)
            np.testing.assert_allclose(states[pooling][number], one.features(encoded)[1], atol=1e-5)


def test_a_recipe_is_probed_on_held_out_training_prompts(small_recipe):
    found = probe(small_recipe, layers=[0, 1.0], quiet=True)
    assert [(entry.layer, entry.pooling) for entry in found.readouts] == [
        (layer, pooling) for layer in (0, 1) for pooling in ("last", "mean", "last+mean")
    ]
    assert found.counts["train_rows"] > found.counts["test_rows"] > 0
    for entry in found.readouts:
        assert -1 <= entry.spearman <= 1 and 0 <= entry.within_prompt <= 1
        assert entry.cost == (0 if entry.layer == 0 else 1)
    best = found.best("spearman")
    assert best is not None and best.spearman == max(entry.spearman for entry in found.readouts)
    # The last token's embedding is that of the end of the turn, the same in every row.
    assert found.readouts[0].within_prompt == pytest.approx(0.5, abs=0.1)
    assert best.spearman > found.readouts[0].spearman + 0.1
    with pytest.raises(BackboneError, match="layer 2, expected 0 to 1"):
        probe(small_recipe, layers=[2], quiet=True)


@pytest.mark.slow
def test_the_command_prints_a_table_names_the_best_and_writes_a_page(small_recipe, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(small_recipe.to_yaml())
    assert exit_code("probe", path, "--layers", "0,1", "--poolings", "last,mean", "--html", tmp_path / "p.html") == 0
    out = capsys.readouterr().out
    assert "best for Spearman of ratings: backbone: {layer: " in out
    page = (tmp_path / "p.html").read_text()
    assert page.count("<svg") >= 2 and "1 of 1" in page
    assert exit_code("probe", path, "--poolings", "middle") == 2
    assert "--poolings: found 'middle', expected last, mean, last+mean" in capsys.readouterr().err
    assert exit_code("probe", path, "--layers", "0", "--poolings", "mean", "--json") == 0
    assert json.loads(capsys.readouterr().out)["best"]["spearman"] == {"layer": 0, "pooling": "mean"}


def test_a_figure_that_the_data_lacks_has_no_best():
    entry = ProbedReadout(1, "last", 0.5, float("nan"), float("nan"), 1.0)
    found = Probe("x", 1, {}, [entry])
    assert (found.best("spearman"), found.best("pairs")) == (entry, None)
