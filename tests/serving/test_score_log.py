"""The score log and the fading means: what a policy under training does to its rewards, seen from the server."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.helpers.servers import question, served
from tests.serving.test_metrics import samples


def test_every_plain_row_is_logged_as_numbers_and_no_text_is(rm, tmp_path):
    log = tmp_path / "scores.jsonl"
    conversations = [question(n, words=1 + n) for n in (1, 2, 1, 3)]
    batch = rm.score(conversations)
    with served(rm, score_log=log) as server:
        server.post("/v1/reward", conversations=conversations)
        server.post("/v1/reward", conversations=conversations, steer={"drop": ["code-style"]})
        server.post("/v1/reward", conversations=[[{"role": "user", "content": "Hi"}]])
        server.post("/v1/reward", prompt="What is 9 + 9?", responses=["18"])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 5
    assert [line["group"] for line in lines[:4]] == [0, 1, 0, 2]
    assert [line["length"] for line in lines[:4]] == batch.response_tokens.tolist()
    for line, contributions in zip(lines, batch.contributions, strict=False):
        assert list(line["contributions"].values()) == pytest.approx(contributions.tolist(), abs=1e-5)
        assert sum(line["contributions"].values()) == pytest.approx(line["score"], abs=1e-4)
        assert line["time"] > 1e9
    assert "answer" not in log.read_text()


def test_recent_means_are_those_of_the_rows_weighted_by_age(rm):
    conversations = [question(n, words=1 + n) for n in range(12)]
    batch = rm.score(conversations)
    with served(rm) as server:
        for part in (conversations[:5], conversations[5:]):
            server.post("/v1/reward", conversations=part)
        found = samples(server)
    # Which rows share a batch, and in which order, is the batcher's affair; twelve rows of a thousand count alike.
    assert found["armorm_recent_score",] == pytest.approx(float(batch.scores.mean()), rel=0.02, abs=0.01)
    assert found["armorm_recent_response_tokens",] == pytest.approx(float(batch.response_tokens.mean()), rel=0.02)
    for i, name in enumerate(rm.objectives.names):
        mean = float(batch.contributions[:, i].mean())
        assert found["armorm_recent_contribution", ("objective", name)] == pytest.approx(mean, rel=0.02, abs=0.01)


def test_what_is_long_ago_fades_from_the_recent_means():
    from armorm.serving.metrics import _Recent

    recent, rows = _Recent(1, rows=10), np.concatenate([np.zeros(100), np.ones(7)])
    for part in np.array_split(rows, 9):
        recent.add(part[:, None])
    weights = 0.9 ** np.arange(len(rows) - 1, -1, -1)
    assert recent.means == pytest.approx([float((weights * rows).sum() / weights.sum())])
