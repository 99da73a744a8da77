"""Metrics: what is counted is what happened."""

from __future__ import annotations

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from armorm.conversation import Conversation
from tests.helpers.servers import question, served
from tests.helpers.small_models import REFERENCE


def samples(server):
    """Value of every sample, by name and labels."""
    answer = server.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_scores_rewards_weights_and_contributions_can_be_watched_for_drift(rm):
    conversations = [question(n, words=1 + n) for n in range(12)]
    batch = rm.score(conversations)
    with served(rm) as server:
        server.post("/v1/reward", conversations=conversations)
        server.post("/v1/reward", conversations=conversations[:2], steer={"drop": ["code-style"]})
        found = samples(server)
    assert found["armorm_score_count",] == 12
    assert found["armorm_score_sum",] == pytest.approx(float(batch.scores.sum()), abs=1e-4)
    for i, name in enumerate(rm.objectives.names):
        label = ("objective", name)
        assert found["armorm_reward_count", label] == 12
        assert found["armorm_reward_sum", label] == pytest.approx(float(batch.rewards[:, i].sum()), abs=1e-4)
        for edge in (-0.2, 0.5, 1.2):
            below = int((batch.rewards[:, i] <= edge).sum())
            assert found["armorm_reward_bucket", ("le", str(edge)), label] == below
        for kind in ("gating_weight", "contribution"):
            total = float(getattr(batch, f"{kind}s")[:, i].sum())
            assert found[f"armorm_{kind}_sum", label] == pytest.approx(total, abs=1e-4)
            assert found[f"armorm_{kind}_count", label] == 12
        assert found["armorm_reference_reward", label] == REFERENCE["reward_means"][i]
    assert found["armorm_reference_score_mean",] == REFERENCE["score_mean"]
    deviations = (batch.scores - REFERENCE["score_mean"]) / REFERENCE["score_std"]
    assert found["armorm_score_bucket", ("le", str(REFERENCE["score_mean"]))] == np.sum(deviations <= 0)


def test_requests_rows_batches_and_the_queue_are_counted(rm):
    with served(rm, batch_tokens=777) as server:
        server.post("/v1/reward", conversations=[question(1), question(1), [], question(2)])
        server.post("/v1/score/evaluation", messages=[])
        server.client.get("/nope")
        found = samples(server)
    requests = "armorm_requests_total"
    assert found[requests, ("route", "/v1/reward"), ("status", "200")] == 1
    assert found[requests, ("route", "/v1/score/evaluation"), ("status", "400")] == 1
    assert found[requests, ("route", "other"), ("status", "404")] == 1
    assert found["armorm_request_seconds_count", ("route", "/v1/reward")] == 1
    assert found["armorm_rows_total", ("outcome", "scored")] == 3
    assert found["armorm_rows_total", ("outcome", "refused")] == 1
    assert found["armorm_shared_rows_total",] == 1
    assert found["armorm_batch_rows_sum",] == 2
    assert found["armorm_batch_seconds_count",] == found["armorm_batch_rows_count",] == 1
    assert found["armorm_computed_tokens_total",] > 20
    assert found["armorm_batch_token_budget",] == 777
    assert found["armorm_waiting_rows",] == found["armorm_waiting_tokens",] == 0
    assert found["armorm_requests_under_way",] == 1  # this one


def test_prompts_kept_between_batches_are_counted(rm):
    def ask(server, prompt, *replies):
        for reply in replies:
            server.post("/v1/reward", prompt=prompt, responses=[reply])
        found = samples(server)
        kinds = ("hits_total", "misses_total", "entries", "bytes")
        return *(found[f"armorm_prompt_cache_{kind}",] for kind in kinds), found["armorm_spared_tokens_total",]

    long, other = "Tell me all about rivers, lakes and seas. " * 4, "And what of mountains, hills and valleys? " * 4
    layers, heads, width, floats = 2, 2, 8, 4
    tokens = rm.backbone.template.encode([Conversation.from_prompt(long, "a")])[0].gate_position + 1
    with served(rm) as server:
        assert ask(server, long, "a") == (0, 1, 0, 0, 0)
        size = tokens * layers * 2 * heads * width * floats
        assert ask(server, long, "b") == (0, 2, 1, size, 0)  # (kept from its second coming on)
        assert ask(server, long, "c", "d") == (2, 2, 1, size, 2 * tokens)
        assert ask(server, other, "a") == (2, 3, 1, size, 2 * tokens)
    with served(rm, prompt_cache=0) as server:
        assert ask(server, long, "a", "b", "c") == (0, 3, 0, 0, 0)
    with served(rm, share_prompts=False) as server:
        assert ask(server, long, "a", "b", "c") == (0, 0, 0, 0, 0)
