"""Best of n on real responses, scored by the embedded model: a taste for length is found out, honest selection is not.

The policy of a step takes the best of n responses to each prompt, n growing with the step. Its reward model is either
the embedded one as it is, or that model steered to look at verbosity, with debiasing off.
"""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from armorm import ArmoRM
from armorm.backbone.encoding import encode_rows
from armorm.conversation import Conversation
from armorm.features.extract import extract
from armorm.monitoring.log import RunLog
from armorm.monitoring.summary import summarize_run

pytestmark = [pytest.mark.slow, pytest.mark.data]
PROMPTS, RESPONSES = 30, 10


@pytest.fixture(scope="module")
def scored(data_root):
    """The model, and features, prompt number and length of ten real responses to each of thirty prompts."""
    replies: dict[str, set[str]] = {}
    with gzip.open(data_root / "preferences" / "alpacaeval.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            for side in ("chosen", "rejected"):
                replies.setdefault(json.dumps(row["prompt"]), set()).add(json.dumps(row[side]))
    conversations, groups = [], []
    for prompt, texts in replies.items():
        short = sorted((text for text in texts if len(text) < 900), key=lambda text: (len(text), text))
        if len(short) >= RESPONSES and len(prompt) < 300 and len(set(groups)) < PROMPTS:
            for text in short[:: len(short) // RESPONSES][:RESPONSES]:
                conversations.append(Conversation.from_messages(json.loads(prompt) + json.loads(text)))
                groups.append(len(groups) // RESPONSES)
    rm = ArmoRM.from_pretrained("armorm-tiny-rm", dtype="float32", device="cpu")
    encoded = encode_rows(rm.backbone.template, conversations, 2048, "error").encoded
    lengths = np.array([row.response_tokens for row in encoded], np.float64)
    return rm, extract(rm.backbone, encoded), np.array(groups), lengths


def pressed(rm, features, groups, lengths, steps=60, prompts=16, samples=4):
    """The log of a run against a model: in step s each sample is the best of n drawn responses, n from 1 to 10."""
    batch, generator = rm.score_features(features), np.random.default_rng(0)
    taken, at = [], []
    for step in range(steps):
        n = 1 + round((RESPONSES - 1) * step / (steps - 1))
        for prompt in generator.permutation(PROMPTS)[:prompts]:
            for _ in range(samples):
                drawn = generator.permutation(np.flatnonzero(groups == prompt))[:n]
                taken.append(drawn[np.argmax(batch.scores[drawn])])
                at.append(float(step))
    return RunLog(
        batch.names, np.array(at), batch.contributions[taken].astype(np.float64), lengths[taken], groups=groups[taken]
    )


def test_best_of_n_by_a_taste_for_length_is_flagged(scored):
    rm, features, groups, lengths = scored
    outcome = summarize_run(pressed(rm.steer(pin={"verbosity": 0.85}, debias_strength=0.0), features, groups, lengths))
    assert outcome.length.end > 1.3 * outcome.length.start
    (flag,) = outcome.flags
    assert (flag.kind, flag.objective) == ("one_objective", "verbosity")
    assert flag.share > 0.8
    assert flag.earliest == 0  # n grows from the first step on
    assert flag.latest < 15


def test_best_of_n_by_the_model_as_it_is_is_not_flagged(scored):
    outcome = summarize_run(pressed(*scored))
    assert outcome.score.change > 0.5
    assert outcome.flags == []
