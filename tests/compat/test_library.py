"""armorm itself on the oldest line of transformers that it runs on: the same numbers, and the same tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from armorm import ArmoRM
from armorm.files import EMBEDDED_BACKBONE, embedded_path
from tests.compat.test_self_contained import LLAMA3_ROPE
from tests.helpers.backbones import backbone_of, config_of
from tests.helpers.conversations import chat
from tests.helpers.environments import CURRENT, NEWER, results, started
from tests.helpers.small_models import reward_model

pytestmark = pytest.mark.slow

CONVERSATIONS = [
    chat("What is the capital of France?", "Paris."),
    chat("Name a prime.", "Seven.", "A larger one?", "Eleven: nothing but one divides it."),
    [{"role": "system", "content": "Be brief."}, *chat("How do planes fly?", "Their wings push air down.")],
]
# What stands on the model and on its files, where versions differ.
TESTS = [
    "tests/model",
    "tests/backbone/test_decoder.py",
    "tests/features/test_extract.py",
    "tests/test_reward_model.py",
]
# What the older version does not do; where it matters, armorm refuses by name instead of scoring otherwise.
LEFT_OUT = [
    "recurrent_gemma",  # keeps its state from one call to the next
    "plain_model and gemma3_text",  # looks for the weights of a text model under other names
    "plain_model and gemma2",  # leaves its cap out by default, where armorm does not
    "every_fault or another_number or mismatched",  # reports the names of misshapen tensors without their shapes
    "config_means_the_same_to_this_version",  # has no `rope_parameters`
]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def folder(request, tmp_path_factory) -> Path:
    """A model saved here: with positions as in Llama 3.1, which the two versions write down differently, or with
    capped attention, which they compute differently by default."""
    folder = tmp_path_factory.mktemp("saved")
    config = config_of(request.param)
    if request.param == "llama":
        config.rope_parameters = dict(LLAMA3_ROPE)
    reward_model(backbone=backbone_of(request.param, config=config)).save_pretrained(folder, self_contained=True)
    return folder


@pytest.fixture(scope="module")
def both(folder, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What the program writes down in either environment."""
    found = {}
    for version in (CURRENT, NEWER):
        root = tmp_path_factory.mktemp(version)
        task = {"folder": str(folder), "saved": str(root / "saved"), "conversations": CONVERSATIONS}
        found[version] = results(version, "library.py", task, root, library=True) | {"saved": root / "saved"}
    return found


def test_it_runs_on_the_older_version(both):
    assert both[CURRENT]["transformers"].startswith("5.")
    assert both[NEWER]["transformers"].startswith("4.57.")


@pytest.mark.parametrize("what", ["scored", "steered", "again"])
def test_scores_are_those_of_the_current_version(both, what):
    for name, values in both[CURRENT][what].items():
        np.testing.assert_allclose(both[NEWER][what][name], values, atol=1e-5, err_msg=name)
    assert np.std(both[CURRENT]["scored"]["scores"]) > 0.01


def test_scores_survive_a_folder_on_the_older_version(both):
    np.testing.assert_allclose(both[NEWER]["again"]["scores"], both[NEWER]["scored"]["scores"], atol=1e-6)


def test_a_folder_that_the_older_version_saved_is_read_by_the_current_one(both):
    rm = ArmoRM.from_pretrained(both[NEWER]["saved"], dtype="float32", device="cpu")
    scores = rm.score(CONVERSATIONS).scores
    np.testing.assert_allclose(scores, both[CURRENT]["scored"]["scores"], atol=1e-5)
    assert "auto_map" not in json.loads((both[NEWER]["saved"] / "config.json").read_text())


def test_explanations_are_the_same(both):
    older, current = both[NEWER]["explained"], both[CURRENT]["explained"]
    assert older.keys() == current.keys()
    assert older["score"] == pytest.approx(current["score"], abs=1e-5)
    np.testing.assert_allclose(both[NEWER]["normalized"], both[CURRENT]["normalized"], atol=1e-4)


@pytest.mark.parametrize("how", ["auto", "auto with remote code"])
def test_the_auto_class_gives_the_score(both, how):
    for found in both.values():
        assert found[how]["class"] == "ArmoRMForSequenceClassification"
        assert found[how]["score"] == pytest.approx(found["scored"]["scores"][0], abs=1e-5)


def test_heads_are_float32_beside_a_narrow_backbone(both):
    for found in both.values():
        assert found["backbone in bfloat16"] == ["torch.bfloat16"]
        assert found["heads in bfloat16"] == ["torch.float32"]


def test_the_embedded_backbone_can_be_read_by_the_older_version():
    folder = embedded_path(EMBEDDED_BACKBONE)
    assert folder is not None
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(settings.get("extra_special_tokens"), list)
    assert "rope_theta" in json.loads((folder / "config.json").read_text())


def test_the_tests_of_model_and_files_pass_on_the_older_version(tmp_path):
    chosen = ["-m", "(not slow or family) and not weights", "-k", " and ".join(f"not ({names})" for names in LEFT_OUT)]
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *chosen, *TESTS]
    done = started(NEWER, arguments, tmp_path, library=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
