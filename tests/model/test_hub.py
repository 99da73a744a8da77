"""Pushing a model: what would be sent, and a round trip over a Hub that runs on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load

from armorm import ArmoRM
from armorm.steering import with_steering_note
from tests.helpers.conversations import chat
from tests.helpers.local_hub import local_hub
from tests.helpers.small_models import changed, reward_model

CONVERSATION = chat("What is the capital of France?", "Paris.")
CARD = "---\nlicense: apache-2.0\n---\n# A card\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved model with its card."""
    reward_model().save_pretrained(tmp_path / "rm")
    (tmp_path / "rm" / "README.md").write_text(CARD)
    return tmp_path / "rm"


def test_a_dry_run_lists_what_would_be_sent(folder):
    rm = ArmoRM.from_pretrained(folder, device="cpu", dtype="weights")
    files = dict(rm.push_to_hub("someone/a-model", dry_run=True))
    assert files["README.md"] == len(CARD)
    assert files["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} < set(files)
    assert list(files) == sorted(files)
    sharded = dict(rm.push_to_hub("someone/a-model", dry_run=True, max_shard_size="300KB"))
    assert "model.safetensors.index.json" in sharded


def test_the_card_of_a_steered_model_says_so_when_it_is_sent(folder):
    rm = ArmoRM.from_pretrained(folder, device="cpu")
    files = dict(rm.steer({"code-style": 2.0}).push_to_hub("someone/a-model", dry_run=True))
    assert files["README.md"] == len(with_steering_note(CARD, {"multiply": {"code-style": 2.0}}).encode()) > len(CARD)
    assert "README.md" not in dict(changed(reward_model()).push_to_hub("someone/a-model", dry_run=True))


@pytest.mark.parametrize("name", ["a/b/c", "some one/x", "x--y", "", "x.git"])
def test_what_cannot_be_a_repository_is_refused_before_anything_is_done(name):
    with pytest.raises(ValueError, match=r"[Rr]epo"):
        reward_model().push_to_hub(name, dry_run=True)


PROGRAM = """
import json, sys
import armorm
from armorm import ArmoRM
from transformers import AutoModelForSequenceClassification

folder, conversation = sys.argv[1], json.loads(sys.argv[2])
rm = ArmoRM.from_pretrained(folder, device="cpu", dtype="float32")
commit = rm.push_to_hub("someone/whole", private=True, commit_message="First")
rm.push_to_hub("someone/whole", revision="next")
rm.model.push_to_hub("someone/bare")
rm.tokenizer.push_to_hub("someone/bare")
scores = [float(ArmoRM.from_pretrained(name, device="cpu", dtype="float32", **options).score([conversation]).scores[0])
          for name, options in [("someone/whole", {}), ("someone/whole", {"revision": "next"}), ("someone/bare", {})]]
assert type(AutoModelForSequenceClassification.from_pretrained("someone/whole")).__name__.startswith("ArmoRM")
print(json.dumps({"commit": commit, "scores": scores}))
"""


@pytest.mark.slow
def test_what_is_pushed_is_what_is_loaded(folder, tmp_path):
    """In a process of its own: the address of the Hub is read once, when huggingface_hub is imported."""
    score = reward_model().score([CONVERSATION]).scores[0]
    with local_hub() as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_local", "HF_HOME": str(tmp_path / "home")}
        environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        arguments = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(CONVERSATION)]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(told["scores"], [score] * 3, atol=1e-5)
    whole, bare = hub.repositories["someone/whole"], hub.repositories["someone/bare"]
    assert told["commit"].startswith(f"{hub.endpoint}/someone/whole/commit/")
    assert hub.private == {"someone/whole"}
    assert hub.tokens == {"Bearer hf_local"}
    assert hub.messages[:2] == [("someone/whole", "main", "First"), ("someone/whole", "next", "Upload reward model")]
    assert set(whole) == {"main", "next"}
    assert whole["main"] == whole["next"]
    assert whole["main"]["README.md"].decode() == CARD
    assert "regression_layer.weight" in load(bare["main"]["model.safetensors"])
