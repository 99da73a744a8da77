"""Steps of a distilabel pipeline, in its own pipeline and processes (`make test-integrations`)."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from armorm import ArmoRM
from tests.helpers.conversations import chat
from tests.helpers.servers import question, served
from tests.helpers.small_models import reward_model

distilabel = pytest.importorskip("distilabel")
pytest.importorskip("httpx")

from distilabel.pipeline import Pipeline  # noqa: E402
from distilabel.steps import FormatTextGenerationDPO, LoadDataFromDicts  # noqa: E402

from armorm.errors import ArmormError  # noqa: E402
from armorm.integrations.distilabel import ArmoRMRatings, ArmoRMScore  # noqa: E402

pytestmark = pytest.mark.slow

ROWS = [
    {"instruction": "2+2?", "generations": ["4", "It is 5, I think.", "Four, since two and two make four."]},
    {"instruction": "Name a river.", "generations": ["The Rhine.", "A mountain."], "system_prompt": "Be short."},
    {"instruction": "Hi!", "generations": ["Hello.", None, " "]},
]


def conversations():
    """Those of ROWS that can be scored, by (row, generation)."""
    found = {}
    for i, row in enumerate(ROWS):
        system = [{"role": "system", "content": row["system_prompt"]}] if "system_prompt" in row else []
        for j, reply in enumerate(row["generations"]):
            if reply and reply.strip():
                found[i, j] = [*system, *chat(row["instruction"], reply)]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("reward") / "model"
    reward_model(seed=5).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def rm(folder) -> ArmoRM:
    return ArmoRM.from_pretrained(folder, dtype="float32", device="cpu")


def run(step, rows):
    step.load()
    try:
        return next(step.process([dict(row) for row in rows]))
    finally:
        step.unload()


@pytest.mark.parametrize("where", ["here", "server"])
def test_a_step_rates_every_generation_and_says_why_one_has_no_rating(rm, folder, where, caplog):
    options = {"steer": {"code-style": 2.0}, "drop": ["ultra-helpful"], "normalize": True}
    wanted = conversations()
    expected = rm.steer({"code-style": 2.0}, drop=["ultra-helpful"]).score(list(wanted.values()), normalize=True)
    with served(rm) as server, caplog.at_level(logging.WARNING):
        model = {"model": server.url} if where == "server" else {"model": folder, "dtype": "float32", "device": "cpu"}
        rows = run(ArmoRMRatings(name="rate", **model, **options), ROWS)
    for at, (i, j) in enumerate(wanted):
        assert rows[i]["ratings"][j] == pytest.approx(float(expected.scores[at]), abs=1e-4)
        assert rows[i]["refusals"][j] is None
        for part in ("rewards", "contributions"):
            assert list(rows[i][part][j]) == rm.objectives.names
            assert list(rows[i][part][j].values()) == pytest.approx(getattr(expected, part)[at].tolist(), abs=1e-4)
    assert [len(row["ratings"]) for row in rows] == [3, 2, 3]
    assert rows[2]["ratings"][1:] == rows[2]["rewards"][1:] == [None, None]
    assert all("messages[1].content" in reason for reason in rows[2]["refusals"][1:])
    assert "2 of 8 responses have no score" in caplog.text


def test_a_step_scores_single_responses_and_whole_conversations(rm, folder):
    dialogue = chat("Hi", "Hello", "And?", "Nothing.")
    rows = [{"instruction": "2+2?", "response": "4"}, {"conversation": dialogue}, {"instruction": "no response"}]
    found = run(ArmoRMScore(name="score", model=folder, dtype="float32", device="cpu"), rows)
    expected = rm.score([chat("2+2?", "4"), dialogue])
    assert [row["score"] for row in found[:2]] == pytest.approx(expected.scores.tolist(), abs=1e-4)
    assert sum(found[1]["contributions"].values()) == pytest.approx(found[1]["score"], abs=1e-4)
    assert found[2]["score"] is None
    assert "expected either" in found[2]["refusal"]


def test_settings_and_rows_that_cannot_be_meant_are_errors(folder):
    with pytest.raises(ArmormError, match="did you mean code-style"):
        run(ArmoRMScore(name="score", model=folder, steer={"code-stile": 1.0}), [])
    with pytest.raises(ArmormError, match="generations: found 'text', expected a list"):
        run(ArmoRMRatings(name="rate", model=folder), [{"instruction": "a", "generations": "text"}])
    with pytest.raises(ArmormError, match="not loaded"):
        next(ArmoRMScore(name="score", model=folder).process([{"conversation": question(1)}]))


def test_a_whole_pipeline_makes_preference_rows_from_the_ratings(rm, tmp_path):
    rows = [{"system_prompt": None, **row} for row in ROWS if None not in row["generations"]]
    with served(rm) as server:
        with Pipeline(name="rated", cache_dir=tmp_path) as pipeline:
            rate = ArmoRMRatings(name="rate", model=server.url, input_batch_size=2)
            LoadDataFromDicts(name="load", data=rows) >> rate >> FormatTextGenerationDPO(name="dpo")
        assert Pipeline.from_dict(pipeline.dump()).dump() == pipeline.dump()
        made = pipeline.run(use_cache=False)["default"]["train"]
    assert len(made) == 2
    for row in made:
        turns = [{"role": "system", "content": row["system_prompt"]}] if row["system_prompt"] else []
        scores = rm.score([[*turns, *chat(row["instruction"], reply)] for reply in row["generations"]]).scores
        assert row["ratings"] == pytest.approx(scores.tolist(), abs=1e-4)
        assert row["chosen"][-1]["content"] == row["generations"][int(np.argmax(scores))]
        assert row["rejected"][-1]["content"] == row["generations"][int(np.argmin(scores))]
        assert row["chosen_rating"] == pytest.approx(float(scores.max()), abs=1e-4)
