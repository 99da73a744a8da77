"""Scorers with real models: a small reward model of this library, a small sequence classifier."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoModelForSequenceClassification

from armorm.conversation import Conversation
from armorm.errors import CheckpointError, DataError, StoreError
from armorm.evaluation.audits import BEFORE, SERVED
from armorm.evaluation.baselines import prompt_words
from armorm.evaluation.results import Results
from armorm.evaluation.runner import evaluate
from armorm.evaluation.scorer import CallableScorer, ScorerError
from armorm.evaluation.scorers import ArmoRMScorer, ClassifierScorer, is_classifier, load_scorer
from armorm.locks import FILE as LOCK
from tests.helpers.marked_scorer import marked, values
from tests.helpers.scored_columns import scored
from tests.helpers.small_models import OBJECTIVES, changed, llama, reward_model, small_classifier, tokenizer

WORDS = ["cat", "sat", "on", "a", "warm", "mat", "and", "looked", "at", "rain", "that", "fell", "over", "old", "roofs"]


def text(rng, longest: int) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(1, longest)))


@pytest.fixture(scope="module")
def rm():
    return reward_model()


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Eighty pairs of forty prompts in two subsets."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    prompts = [f"{i} {text(rng, 8)}" for i in range(40)]
    lines = [
        {
            "prompt": prompts[i // 2],
            "chosen": text(rng, 20),
            "rejected": text(rng, 20),
            "subset": "xy"[i // 40],
            "id": i,
        }
        for i in range(80)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def results(rm, rows) -> Results:
    return evaluate("pairs", rm, rows, quiet=True)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A random Llama with one logit, saved with a chat template."""
    return small_classifier(tmp_path_factory.mktemp("classifier"))


def conversations(n: int = 12) -> list[Conversation]:
    rng = np.random.default_rng(1)
    return [Conversation.from_prompt(text(rng, 8), f"{i} {text(rng, 30)}") for i in range(n)]


def test_scores_are_those_of_the_model_and_the_sum_of_their_contributions(rm):
    asked = conversations()
    scored = ArmoRMScorer(rm).score(asked)
    batch = rm.score([conversation.to_list() for conversation in asked])
    np.testing.assert_allclose(scored.scores, batch.scores, atol=1e-6)
    np.testing.assert_allclose(scored.batch.contributions, batch.contributions, atol=1e-5)
    np.testing.assert_allclose(scored.batch.contributions.sum(1), scored.scores, atol=1e-5)
    np.testing.assert_allclose((scored.batch.gating_output * scored.debiased).sum(1), scored.scores, atol=1e-5)
    np.testing.assert_allclose(scored.ratings, rm.objectives.to_raw(batch.rewards), atol=1e-4)


def test_an_over_long_conversation_is_refused_in_its_place(rm):
    short = changed(rm, limits={"max_length": 40, "overflow": "error"})
    asked = [*conversations(3), Conversation.from_prompt("tell me", "word " * 100)]
    scored = ArmoRMScorer(short).score([asked[3], *asked[:3]])
    assert list(scored.unscored) == [0]
    assert "expected at most 40" in scored.unscored[0]
    assert np.isnan(scored.scores[0])
    assert np.isnan(scored.batch.contributions[0]).all()
    assert np.isfinite(scored.scores[1:]).all()


def test_a_pair_with_an_over_long_side_is_wrong_and_listed(rm, tmp_path):
    short = changed(rm, limits={"max_length": 40, "overflow": "error"})
    path = tmp_path / "rows.jsonl"
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b " * 99, "rejected": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    found = evaluate("pairs", short, path, quiet=True)
    assert [(entry["row"], entry["response"]) for entry in found.refused] == [(2, 0)]
    assert found.level("overall")["accuracy"].examples == 2
    assert math.isnan(found.scores[1][0])


def test_a_truncated_prompt_is_scored_and_marked(rm, tmp_path):
    short = changed(rm, limits={"max_length": 60, "overflow": "truncate_prompt"})
    path = tmp_path / "rows.jsonl"
    pairs = [{"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in ("word " * 99, "a")]
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    found = evaluate("pairs", short, path, quiet=True)
    assert (found.counts["truncated_examples"], found.counts["refused_examples"]) == (1, 0)
    assert [entry.get("truncated", False) for entry in found.examples] == [True, False]
    assert np.isfinite(found.scores[0]).all()


def test_all_refused_is_a_result_and_no_crash(rm, rows):
    found = evaluate("pairs", changed(rm, limits={"max_length": 3, "overflow": "skip"}), rows, quiet=True)
    assert values(found, "overall") == {"accuracy": 0.0}
    assert found.counts["refused_examples"] == 80


def test_examples_carry_what_decided_them(results, rm):
    for entry in results.examples:
        assert entry["margin"] == pytest.approx(entry["scores"][0] - entry["scores"][1])
        decided = entry["decided_by"]
        assert decided
        assert all(np.sign(part["contribution"]) == np.sign(entry["margin"]) for part in decided)
        rest = entry["margin"] - sum(part["contribution"] for part in decided)
        assert rest * np.sign(entry["margin"]) <= 1e-5
    assert results.model["backbone"]["fingerprint"] == rm.backbone.fingerprint


def test_audits_of_an_interpretable_model(results, rm, rows):
    audits = results.audits
    assert set(audits["length"]["views"]) == {SERVED, BEFORE}
    assert set(audits["objectives"]) == set(rm.objectives.names)
    assert set(audits["decisions"]) == {"all", "x", "y"}
    overall = results.level("overall")["accuracy"].value
    assert audits["gate"]["all"]["gate"] == pytest.approx(overall)
    assert audits["gate"]["x"]["gain"] == pytest.approx(
        audits["gate"]["x"]["gate"] - audits["gate"]["x"]["mean_weights"]
    )
    assert sum(audits["gate"]["y"]["weights"].values()) == pytest.approx(1)
    # Each by the slow way: the plain rewards under the same weights, and each objective as the only judge.
    pairs = [json.loads(line) for line in rows.read_text().splitlines()]
    sides = [
        rm.score([Conversation.from_prompt(p["prompt"], p[side]) for p in pairs]) for side in ("chosen", "rejected")
    ]
    transform = rm.model.reward_transform_matrix.numpy()
    for column, name in enumerate(rm.objectives.names):
        plain = np.mean(sides[0].rewards[:, column] > sides[1].rewards[:, column])
        assert audits["objectives"][name]["reward"] == pytest.approx(plain)
    uniform = [(side.rewards @ transform).mean(1) for side in sides]
    assert audits["gate"]["all"]["uniform"] == pytest.approx(np.mean(uniform[0] > uniform[1]))
    before = [(side.gating_output * side.rewards).sum(1) for side in sides]
    longer = np.array([len(p["chosen"]) > len(p["rejected"]) for p in pairs])
    expected = np.mean((before[0] > before[1])[longer])
    assert audits["length"]["views"][BEFORE]["more_is_better"] == pytest.approx(expected)


def test_a_store_is_filled_once_and_read_again(rm, rows, results, tmp_path, monkeypatch):
    store = tmp_path / "features"
    first = evaluate("pairs", rm, rows, features=store, quiet=True)
    files = {path.name: path.stat().st_mtime_ns for path in store.iterdir() if path.name != LOCK}
    assert any(name.startswith("shard-") for name in files)

    def forward(*_):
        raise AssertionError("a feature that is in the store was computed again")

    monkeypatch.setattr(type(rm.backbone), "features", forward)
    again = evaluate("pairs", rm, rows, features=store, output=tmp_path / "r.json", quiet=True)
    assert {path.name: path.stat().st_mtime_ns for path in store.iterdir() if path.name != LOCK} == files
    assert again.to_dict() == first.to_dict()
    assert [e["scores"] for e in first.examples] == [
        pytest.approx(entry["scores"], abs=1e-5) for entry in results.examples
    ]


def test_a_stopped_run_of_a_reward_model_goes_on_with_its_features(rm, rows, results, tmp_path, monkeypatch):
    monkeypatch.setattr("armorm.features.engine.SHARD_TOKENS", 300)
    monkeypatch.setattr("armorm.features.engine.LARGE_TOKENS", {"cpu": 10**9, "cuda": 10**9})  # batches are plain
    monkeypatch.setattr("armorm.features.engine.LEAST_SAVING", 10**9)
    output = tmp_path / "r.json"
    forward, tokens = type(rm.backbone).features, []

    def counted(backbone, batch):
        if len(tokens) == 2:
            tokens.append(0)
            raise KeyboardInterrupt
        tokens.append(len(batch))
        return forward(backbone, batch)

    monkeypatch.setattr(type(rm.backbone), "features", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate("pairs", rm, rows, output=output, quiet=True)
    assert list((tmp_path / "r.json.partial").glob("features-*/shard-*"))
    found = evaluate("pairs", rm, rows, output=output, quiet=True)
    assert sum(tokens) == found.counts["conversations"]  # every one once, over both runs
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert values(found, "subsets") == values(results, "subsets")


def test_what_a_stopped_run_of_another_model_left_is_in_nobodys_way(rm, rows, results, tmp_path, monkeypatch):
    output, forward = tmp_path / "r.json", type(rm.backbone).features

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(rm.backbone), "features", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate("pairs", reward_model(seed=1), rows, output=output, quiet=True)
    assert (tmp_path / "r.json.partial").is_dir()
    monkeypatch.setattr(type(rm.backbone), "features", forward)
    found = evaluate("pairs", rm, rows, output=output, quiet=True)
    assert values(found, "subsets") == values(results, "subsets")


def test_a_conversation_whose_features_are_no_numbers_is_refused_with_a_reason(rows, tmp_path):
    poisoned = reward_model(backbone=copy.deepcopy(llama()))
    asked = [*conversations(5), Conversation.from_prompt("tell me", "zebra")]
    used = [set(e.ids.tolist()) for e in poisoned.backbone.template.encode(asked)]
    own = sorted(used[5] - set.union(*used[:5]))
    with torch.no_grad():
        poisoned.model.model.embed_tokens.weight[own[-1]] = math.nan
    scored = ArmoRMScorer(poisoned).score([asked[5], *asked[:5]])
    assert scored.unscored == {0: "the model's score is not a finite number"}
    assert np.isnan(scored.scores[0])
    assert np.isnan(scored.batch.contributions[0]).all()
    assert scored.batch.prompt_index[0] == -1
    np.testing.assert_allclose(scored.scores[1:], ArmoRMScorer(reward_model()).score(asked[:5]).scores, atol=1e-5)


class EightAlike(ArmoRMScorer):
    """A model whose score is what each reply is marked with, in eight equal contributions."""

    names = tuple(f"o{i}" for i in range(8))

    def score(self, asked, compared=()):
        marks = np.array(marked([c.to_list() for c in asked]))
        rewards = np.repeat(marks[:, None], 8, 1)
        return scored(rewards, np.full(rewards.shape, 1 / 8), names=self.names)


def test_every_deciding_objective_is_written_down(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b <3>", "rejected": "c <1>"}) + "\n")
    (entry,) = evaluate("pairs", EightAlike(reward_model()), path, quiet=True).examples
    # None of the eight can be missed: without seven of them, the eighth still prefers the first.
    assert entry["margin"] == pytest.approx(2)
    assert {part["objective"] for part in entry["decided_by"]} == set(EightAlike.names)
    assert [part["contribution"] for part in entry["decided_by"]] == pytest.approx([2 / 8] * 8)


def test_the_prompt_alone_stands_beside_ratings_of_any_scorer(tmp_path):
    # What is asked decides most of the rating; within a prompt the longer answer is rated one higher.
    path = tmp_path / "asked.jsonl"
    entries = [
        {"prompt": f"{'sunny' if i % 2 else 'rainy'} day {i}", "response": "x" * (j + 1), "kind": 4 * (i % 2) + j}
        for i in range(60)
        for j in range(2)
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = evaluate("ratings", lambda asked: [float(len(c[-1]["content"])) for c in asked], path, quiet=True)
    subsets = found.level("subsets")
    spearman, within = subsets["asked-kind: Spearman"], subsets["asked-kind: within prompts"]
    # Ratings are 0, 1, 4, 5, thirty each: centred ranks -45, -15, 15, 45. A judge that knows the weather puts the 120
    # rows in sixty twos, thirty of them on either side: covariance 30 * 30, variance (120**2 - 2**2) / 12.
    variance = (45**2 + 15**2) / 2
    expected = 30 * 30 / math.sqrt(variance * (120**2 - 2**2) / 12)
    assert spearman.baselines["prompt_only"] == pytest.approx(expected, abs=0.005)
    assert within.baselines["prompt_only"] == 0.5
    assert within.value == 1
    # Length puts 0 and 4 together, and 1 and 5: covariance 15 * 30, variance 30 * 30.
    assert spearman.value == pytest.approx(15 * 30 / math.sqrt(variance * 30 * 30))


def test_words_of_prompts_are_of_length_one_and_know_no_order():
    asked = [
        Conversation.from_prompt(p, r)
        for p, r in (("red car", "a"), ("car, RED!", "b"), ("blue sky", "c"), ("red car", "d"))
    ]
    features, index = prompt_words(asked)
    assert index.tolist() == [0, 1, 2, 0]
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(features[0], features[1])
    assert abs(features[0] @ features[2]) < 0.6


def test_a_store_of_another_backbone_is_refused(rm, rows, tmp_path):
    evaluate("pairs", rm, rows, features=tmp_path, limit=2, quiet=True)
    with pytest.raises(StoreError, match="another backbone"):
        evaluate("pairs", reward_model(seed=1), rows, features=tmp_path, limit=2, quiet=True)


def test_ratings_of_a_model_are_in_raw_units_with_the_prompt_beside_them(rm, tmp_path):
    rng = np.random.default_rng(2)
    path = tmp_path / "ultra.jsonl"
    entries, asked, given = [], [], np.full((120, len(OBJECTIVES)), np.nan)
    for i in range(120):
        prompt, response = f"{i // 2} question", f"{i} {text(rng, 15)}"
        given[i, 0], given[i, 1] = rng.integers(1, 6), rng.integers(0, 5)
        entries.append({"prompt": prompt, "response": response, "helpful": int(given[i, 0]), "other": 3})
        entries[-1]["beaver-harm"] = int(given[i, 1])
        asked.append(Conversation.from_prompt(prompt, response))
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = evaluate("ratings", rm, path, quiet=True)
    assert found.objectives == ["ultra-helpful", "beaver-harm"]
    assert found.data["left_out"] == {"ratings of 'other', no objective of the model": 120}
    raw = OBJECTIVES.to_raw(rm.score([c.to_list() for c in asked]).rewards)
    subsets = values(found, "subsets")
    for column, name in enumerate(found.objectives):
        x, y = raw[:, column], given[:, column]
        # Two responses to each prompt, one after the other.
        differs = y[::2] != y[1::2]
        right = (np.sign(x[::2] - x[1::2]) == np.sign(y[::2] - y[1::2]))[differs].mean()
        assert subsets[f"{name}: Spearman"] == pytest.approx(spearmanr(x, y).statistic, abs=1e-6)
        assert subsets[f"{name}: error"] == pytest.approx(np.abs(x - y).mean(), abs=1e-6)
        assert subsets[f"{name}: within prompts"] == pytest.approx(right, abs=1e-6)
        beside = found.level("subsets")[f"{name}: Spearman"].baselines
        assert {"length", "prompt_only"} <= set(beside)
        # A judge that reads the prompt alone cannot tell its responses apart.
        assert found.level("subsets")[f"{name}: within prompts"].baselines["prompt_only"] == 0.5
        assert "length" not in found.level("subsets")[f"{name}: error"].baselines


def test_ratings_without_an_objective_of_the_model_or_out_of_range_are_refused(rm, tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "a", "response": "b", "ultra-helpfull": 3}\n')
    with pytest.raises(DataError, match="did you mean ultra-helpful"):
        evaluate("ratings", rm, path, quiet=True)
    path.write_text('{"prompt": "a", "response": "b", "ultra-helpful": 9}\n')
    with pytest.raises(DataError, match=r"row 1, field 'ultra-helpful'.*from 1 to 5"):
        evaluate("ratings", rm, path, quiet=True)


def test_a_classifier_scores_each_conversation_as_if_alone(classifier):
    scorer = ClassifierScorer.from_pretrained(str(classifier), dtype="float32", device="cpu")
    asked = conversations()
    together = scorer.score(asked)
    backwards = scorer.score(asked[::-1])
    np.testing.assert_allclose(together.scores, backwards.scores[::-1], atol=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32)
    model.config.pad_token_id = None  # then the last token is the last token
    for conversation, score in zip(asked, together.scores, strict=True):
        ids = torch.tensor([tokenizer().apply_chat_template(conversation.to_list(), return_dict=False)])
        with torch.inference_mode():
            assert float(model(ids).logits[0, 0]) == pytest.approx(score, abs=1e-5)
    assert len(set(np.round(together.scores, 5))) == len(asked)


def test_a_classifier_stands_beside_a_reward_model_on_the_same_benchmark(classifier, rows, results):
    found = evaluate("pairs", str(classifier), rows, dtype="float32", device="cpu", quiet=True)
    assert found.model["kind"] == "sequence classifier"
    assert len(found.model["backbone"]["fingerprint"]) == 32
    assert [entry["key"] for entry in found.examples] == [entry["key"] for entry in results.examples]
    assert found.level("overall")["accuracy"].baselines == results.level("overall")["accuracy"].baselines
    assert "gate" not in found.audits
    assert "calibration" in found.audits


def test_a_classifier_without_its_head_or_with_several_is_refused(tmp_path, classifier):
    AutoModel.from_pretrained(classifier).save_pretrained(tmp_path / "headless")
    settings = json.loads((classifier / "config.json").read_text())
    (tmp_path / "headless" / "config.json").write_text(json.dumps(settings))
    tokenizer().save_pretrained(tmp_path / "headless")
    with pytest.raises(CheckpointError, match=r"lacks score\.weight"):
        ClassifierScorer.from_pretrained(str(tmp_path / "headless"))
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    model.config.num_labels = 2
    with pytest.raises(CheckpointError, match="2 labels"):
        ClassifierScorer("x", model, tokenizer())
    with pytest.raises(CheckpointError, match="no such folder"):
        load_scorer(str(tmp_path / "nothing"))


def test_an_over_long_conversation_of_a_classifier_is_refused(classifier):
    scorer = ClassifierScorer.from_pretrained(str(classifier), dtype="float32", device="cpu")
    scored = scorer.score([Conversation.from_prompt("a", "word " * 400), Conversation.from_prompt("a", "b")])
    assert list(scored.unscored) == [0]
    assert np.isfinite(scored.scores[1])


def test_what_a_function_raises_is_one_line_with_the_place_where():
    def broken(conversations):
        return [1 / 0 for _ in conversations]

    with pytest.raises(ScorerError) as caught:
        CallableScorer(broken, "mine:broken").score([Conversation.from_prompt("a", "b")])
    line = broken.__code__.co_firstlineno + 1
    assert str(caught.value).startswith("scorer mine:broken: raised ZeroDivisionError: division by zero (")
    assert str(caught.value).endswith(f"test_scorers.py, line {line})")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_scorer_of_ones_own_keeps_its_parts_and_is_measured_on_ratings(rm, tmp_path):
    class Own:
        """Delegates; no class of this library."""

        objectives = rm.objectives

        def describe(self):
            return {"name": "own", "kind": "own"}

        def score(self, conversations):
            return ArmoRMScorer(rm).score(conversations)

    name = rm.objectives.names[0]
    rows = [{"prompt": f"p{i}", "response": "word " * (i + 1), name: 1.0 + i % 5} for i in range(12)]
    path = tmp_path / "rated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own, usual = (evaluate("ratings", scorer, path, quiet=True) for scorer in (Own(), rm))
    assert list(own.objectives) == list(usual.objectives) == [name]
    assert own.raw
    assert own.examples == usual.examples


def test_names_lead_to_the_right_kind_of_scorer(classifier, rm, tmp_path, monkeypatch):
    rm.save_pretrained(tmp_path / "rm")
    assert is_classifier(str(classifier))
    assert not is_classifier(str(tmp_path / "rm"))
    assert not is_classifier("armorm-tiny-rm")
    assert isinstance(load_scorer(str(tmp_path / "rm"), dtype="float32"), ArmoRMScorer)
    assert isinstance(load_scorer(rm), ArmoRMScorer)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_scorers.py").write_text("LIMIT = 3\ndef length(cs): return [len(c[-1]['content']) for c in cs]\n")
    scorer = CallableScorer.from_name("my_scorers:length")
    assert scorer.score([Conversation.from_prompt("a", "four")]).scores.tolist() == [4]
    for name in ("my_scorers", "my_scorers:width", "my_scorers:LIMIT", "no_such_module:f"):
        with pytest.raises(ScorerError, match="scorer"):
            CallableScorer.from_name(name)


@pytest.mark.data
@pytest.mark.slow
def test_a_reward_model_makes_a_partial_rewardbench_of_the_real_sets(rm, data_root, tmp_path):
    places = [data_root / "benchmarks" / f"{name}.jsonl.gz" for name in ("llmbar", "humanevalpack")]
    found = evaluate("rewardbench", rm, places, output=tmp_path / "r.json", quiet=True)
    assert found.counts["examples"] == 419 + 984
    assert set(found.audits["gate"]) == {"all", *found.level("subsets")}
    assert found.level("overall")["mean of four sections"].lacking
