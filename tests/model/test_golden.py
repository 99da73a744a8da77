"""The released weights themselves: results that the published code printed (model card of RLHFlow/ArmoRM-Llama3-8B-v0.1)."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from armorm import ArmoRM

CHECKPOINT = "RLHFlow/ArmoRM-Llama3-8B-v0.1"
SYNONYMS = [
    {"role": "user", "content": 'What are some synonyms for the word "beautiful"?'},
    {
        "role": "assistant",
        "content": "Nicely, Beautifully, Handsome, Stunning, Wonderful, Gorgeous, Pretty, Stunning, Elegant",
    },
]
SUM = "How much is 2+2?"

pytestmark = [pytest.mark.weights, pytest.mark.slow]


def checkpoint() -> str:
    """The checkpoint's folder in the local cache; skipped where it is not whole."""
    try:
        return snapshot_download(CHECKPOINT, local_files_only=True, allow_patterns=["*.json", "*.safetensors"])
    except LocalEntryNotFoundError:
        pytest.skip(f"{CHECKPOINT} is not in the local cache")


@pytest.fixture(scope="module")
def released() -> ArmoRM:
    return ArmoRM.from_pretrained(checkpoint(), dtype="bfloat16")


def test_the_published_example(released):
    batch = released.score([SYNONYMS])
    helpsteer = released.objectives.to_raw(batch.rewards)[0, :5]
    assert helpsteer.tolist() == pytest.approx([2.78125, 2.859375, 3.484375, 1.3847656, 1.296875], abs=0.05)
    order = abs(batch.coefficients[0]).argsort()[::-1][:3]
    assert [batch.names[i] for i in order] == [
        "code-complexity",
        "helpsteer-verbosity",
        "ultrafeedback-instruction_following",
    ]
    assert batch.coefficients[0, order].tolist() == pytest.approx([0.19922, -0.10864, 0.07861], abs=0.01)


def test_the_published_scores_in_float32():
    wide = ArmoRM.from_pretrained(checkpoint(), dtype="float32")
    conversations = [
        [{"role": "user", "content": SUM}, {"role": "assistant", "content": reply}]
        for reply in ("The output of 2+2 is 4", "4")
    ]
    scores = wide.score(conversations).scores
    assert scores.tolist() == pytest.approx([0.11690367758274078, 0.10300665348768234], abs=1e-4)
    assert wide.model.regression_layer.weight.dtype == torch.float32
