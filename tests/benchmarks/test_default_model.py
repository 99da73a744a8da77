"""The benchmark of the default model: its texts stay as they are, and figures are those computed by hand."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "tools"))

import everyday_page  # noqa: E402
from armorm.conversation import Conversation  # noqa: E402
from armorm.data.decontamination import KnownPrompts  # noqa: E402
from armorm.data.everyday import everyday_pairs  # noqa: E402
from armorm.data.preferences import preference_pair, read_preferences, row_conversations  # noqa: E402
from armorm.data.seen_prompts import SeenPrompts  # noqa: E402
from armorm.data.sources import Location  # noqa: E402
from armorm.evaluation.benchmarks import ratings  # noqa: E402
from armorm.evaluation.examples import Example, make_example  # noqa: E402
from targets import parts  # noqa: E402
from targets.figures import EXPLAIN, TARGETS, Target, score_parts  # noqa: E402
from tests.helpers.small_models import reward_model  # noqa: E402

EVERYDAY = ROOT / "benchmarks" / "everyday"
TEXTS = {
    "everyday_pairs.jsonl": (20, "ecbfd65768e2b1e7a8c45731b15b498d386e6de53ebed5be0cee410894aedf17"),
    "harmless_prompts.jsonl": (40, "dc5660d56026dade43fed9aca0c94e3dc20f978c0585ba76298797192c4b64ea"),
}


@pytest.fixture(scope="module")
def rm():
    return reward_model()


def pair(name: str, prompt: str, chosen: str, rejected: str) -> Example:
    builds = [partial(Conversation.from_prompt, prompt, reply) for reply in (chosen, rejected)]
    return make_example(builds, (1, 0), subset=name)


def pair_part(examples: list[Example]) -> parts.Part:
    return parts.Part("pairs", examples, partial(parts.measure_pairs, examples), parts.pair_metrics)


@pytest.mark.parametrize("name", TEXTS)
def test_everyday_texts_are_unchanged_and_balanced_in_length(name):
    count, digest = TEXTS[name]
    assert hashlib.sha256((EVERYDAY / name).read_bytes()).hexdigest() == digest, "these texts are never changed"
    pairs = read_preferences(Location.find(EVERYDAY / name))
    assert len({pair.prompt_key for pair in pairs}) == count
    assert sum(len(pair.chosen.response) < len(pair.rejected.response) for pair in pairs) == count // 2
    sizes = [sum(len(getattr(pair, side).response) for pair in pairs) for side in ("chosen", "rejected")]
    assert max(sizes) < 1.05 * min(sizes)


def test_the_pairs_of_the_demo_are_not_among_those_that_are_measured():
    measured = [pair for name in TEXTS for pair in read_preferences(Location.find(EVERYDAY / name))]
    assert not {pair.prompt_key for pair in everyday_pairs()} & {pair.prompt_key for pair in measured}


@pytest.mark.parametrize("embedded", ["plain-answers", "plain-replies"])
def test_no_embedded_question_is_one_that_is_measured_or_nearly_one(embedded):
    known = KnownPrompts()
    known.add(pair.chosen for name in TEXTS for pair in read_preferences(Location.find(EVERYDAY / name)))
    questions = [row_conversations(row)[0] for row in Location.find(embedded).rows()]
    assert not [question.prompt for question, found in zip(questions, known.find(questions), strict=True) if found]


def test_the_macro_counts_sets_alike_and_the_pooled_figure_pairs_of_similar_length():
    examples = [
        *(pair("finegrained", f"f{i}", "a" * 10, "b" * 12) for i in range(4)),
        pair("hh_harmless", "h", "a" * 10, "b" * 13),
        pair("pandalm", "p", "a" * 10, "b" * 8),
        pair("alpacaeval", "q", "a", "b"),
    ]
    scores = [np.array(values) for values in ((1, 0), (1, 0), (1, 0), (0, 1), (0, 1), (1, 0), (1, 1))]
    measurements = parts.measure_pairs(examples, scores)
    found = {metric.name: metric.on(measurements) for metric in parts.pair_metrics(measurements)}
    assert found[parts.MACRO] == pytest.approx((3 / 4 + 0 + 1) / 3)
    assert found[parts.POOLED] == pytest.approx((3 + 1 + 0) / 6), (
        "hh_harmless' 13 characters are too many, a tie is wrong"
    )
    assert math.isnan(found["hh_harmless, similar length"])


def test_the_mean_of_ratings_is_over_the_fixed_objectives_and_absent_without_one_of_them():
    generator = np.random.default_rng(0)
    names = [*parts.SPEARMAN_MEAN, "another-objective"]
    examples = [
        make_example(
            [partial(Conversation.from_prompt, f"prompt {i // 4}", f"reply {i}")], generator.random(len(names))
        )
        for i in range(40)
    ]
    scores = list(generator.random((40, len(names))))
    measurements = ratings.measure([example.item for example in examples], scores, names, raw=False)
    found = {metric.name: metric.on(measurements) for metric in parts.rating_metrics(measurements)}
    for title, kind, wanted in (
        (parts.SPEARMAN, ratings.SPEARMAN, parts.SPEARMAN_MEAN),
        (parts.WITHIN, ratings.WITHIN, parts.WITHIN_MEAN),
    ):
        assert found[title] == pytest.approx(np.mean([found[f"{name}: {kind}"] for name in wanted]))
    lacking = {group: values for group, values in measurements.items() if group[0] != "gsm8k-is_correct"}
    assert not {parts.SPEARMAN, parts.WITHIN} & {metric.name for metric in parts.rating_metrics(lacking)}


def test_verdicts_and_baselines_are_those_of_the_scores_and_seen_prompts_are_counted(rm):
    examples = [pair(parts.EVERYDAY, f"Question {i}?", "Yes, " * (i + 1), "No. " * (5 - i)) for i in range(5)]
    rm = copy.copy(rm)
    rm.seen = SeenPrompts.of({"pairs": [examples[0].conversations[0]]}, {examples[0].item.prompt: "0" * 64})
    margins = [float(np.subtract(*rm.score(example.conversations, same_prompt=True).scores)) for example in examples]
    (figures,) = score_parts(rm, [pair_part(examples)])
    row = {row["name"]: row for row in figures.rows}[parts.EVERYDAY]
    assert (row["right"], row["examples"], row["interval"]) == (sum(margin > 0 for margin in margins), 5, None)
    assert row["value"] == pytest.approx(row["right"] / 5) and row["met"] == (row["value"] >= 0.95)
    assert (row["longest"], row["shortest"]) == (pytest.approx(3 / 5), pytest.approx(2 / 5))
    assert row["seen"] == 1 and row["without_seen"] == pytest.approx(sum(m > 0 for m in margins[1:]) / 4)


def test_objectives_that_the_model_lacks_are_not_measured(rm):
    known = rm.objectives.names[0]
    names = [known, "no-such-objective"]
    labels = [(0.0, 1.0), (1.0, 0.0)]
    examples = [
        make_example([partial(Conversation.from_prompt, "A prompt", f"Reply {i}.")], label)
        for i, label in enumerate(labels)
    ]
    rule = partial(ratings.measure, [example.item for example in examples], names=names, raw=False)
    by_reward = parts.Part("ratings", examples, rule, partial(parts.construct_metrics, ""), names)
    by_score = replace(by_reward, metrics=partial(parts.construct_metrics, ", by the score"), objectives=[])
    own, score = ({row["name"]: row["value"] for row in part.rows} for part in score_parts(rm, [by_reward, by_score]))
    batch = rm.score([example.conversations[0] for example in examples])
    predicted = rm.objectives.to_raw(batch.rewards)[:, 0]
    assert own == {known: float(predicted[1] > predicted[0])}
    right = float(batch.scores[1] > batch.scores[0])
    assert score == {f"{known}, by the score": right, "no-such-objective, by the score": 1 - right}


def test_constructed_objectives_of_a_recipe_are_measured_on_its_test_rows(rm, tmp_path):
    rows = [
        {
            "prompt": f"Prompt {i // 2}",
            "response": f"Reply {i}.",
            "fluent": i % 2,
            "split": ("train", "test")[i // 2 % 2],
        }
        for i in range(12)
    ]
    (tmp_path / "constructed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"name: small\nbackbone: {{model: armorm-tiny}}\ndata_root: {tmp_path}\n"
        "ratings: [{data: constructed.jsonl, objectives: {fluent: [0, 1]}}]\n"
        "preferences: [{from_ratings: constructed-fluent, margin: 0.5}]\n"
    )
    (by_score,) = parts.constructed_parts(rm, tmp_path / "recipe.yaml")
    assert [example.conversations[0].response for example in by_score.examples] == [
        row["response"] for row in rows if row["split"] == "test"
    ]
    (row,) = score_parts(rm, [by_score])[0].rows
    scores = rm.score([example.conversations[0] for example in by_score.examples]).scores
    assert row["name"] == "constructed-fluent, by the score"
    assert row["value"] == pytest.approx(float(np.mean(scores[1::2] > scores[::2])))


def test_a_target_may_ask_for_an_interval_or_for_little():
    assert Target(0.5, above=0.5).met(0.6, (0.51, 0.7)) and not Target(0.5, above=0.5).met(0.6, (0.49, 0.7))
    assert not Target(0.5, above=0.5).met(0.6, None), "without an interval nothing is known"
    assert TARGETS[EXPLAIN].met(0.4) and not TARGETS[EXPLAIN].met(1.2)
    assert not Target(0.5).met(math.nan)


def test_the_page_of_everyday_pairs_states_every_verdict(rm):
    text = everyday_page.page(rm)
    rows = list(Location.find(everyday_page.PAIRS).rows())
    right = 0
    for row in rows:
        found = preference_pair(row)
        scores = rm.score([found.chosen, found.rejected], same_prompt=True).scores
        right += bool(scores[0] > scores[1])
        section = text.partition(f"\n## {row.values['id']}\n")[2].partition("\n## ")[0]
        best = "the good reply" if scores[0] > scores[1] else "the bad reply"
        assert ("\nright: " if scores[0] > scores[1] else "\n**wrong**: ") in section
        assert f"{best} is better" in section or f"Too close to call: {best} is " in section
    assert f"**{right} of {len(rows)} right.**" in text


@pytest.mark.slow
@pytest.mark.data
def test_a_quick_look_prints_every_target_and_writes_nothing(tmp_path, data_root):
    command = [sys.executable, "benchmarks/default_model.py", "--limit", "3", "--store", str(tmp_path / "store")]
    command += ["--output", str(tmp_path / "results.json"), "--against", "armorm-tiny-rm"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert all(name in run.stdout for name in TARGETS)
    assert not (tmp_path / "results.json").exists()


def test_results_that_are_committed_have_the_targets_of_today():
    for path in sorted((ROOT / "benchmarks" / "results").glob("default_model*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        assert sorted(name for names in results["verdicts"].values() for name in names) == sorted(TARGETS), path.name
