"""Near-duplicate prompts are on one side of every split: decontamination, fine-tuning, folds, hold-outs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from armorm import Recipe
from armorm.backbone.decoder import Backbone
from armorm.conversation import Conversation
from armorm.data.decontamination import prompt_groups
from armorm.data.ratings import RatingTable
from armorm.data.seen_prompts import SeenPrompts
from armorm.heads.regression import RegressionHead, fold_of
from armorm.objectives import Objective, ObjectiveSet
from armorm.training.dataset import HELD_OUT_PAIRS, held_out_prompts, read_training_data
from armorm.training.featurize import Corpus, build_corpus
from armorm.training.finetune.record import Finetuned, without_finetuned
from armorm.training.stages import OutOfFoldRewards, RatedSplit

TASK = (
    "Write a short text of three paragraphs for the newsletter of a {} about the repair of the old wooden bridge over "
    "the river, which was closed last spring after the flood, and say who paid for it, who did the work, how long it "
    "took, and on which {} it will be opened again with music, coffee and cake for everybody who comes."
)
VERSIONS = [TASK.format(place, day) for place in ("village", "school", "museum", "choir") for day in ("day", "evening")]
OTHERS = [f"What is the {kind} word for a {thing}?" for kind in ("old", "Latin") for thing in ("bird", "tree", "fish")]


def asked(prompt: str, reply: str = "Gladly.") -> Conversation:
    return Conversation.from_prompt(prompt, reply)


def write(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    """Rows and pairs of two versions of a task, of which a benchmark and an evaluation set have others."""
    prompts = [*VERSIONS[:2], *OTHERS]
    write(tmp_path / "rated.jsonl", [{"prompt": p, "response": "a", "good": 1, "split": "train"} for p in prompts])
    sides = {"chosen": "yes", "rejected": "no"}
    write(tmp_path / "pairs.jsonl", [{"prompt": p, **sides, "split": "train"} for p in prompts])
    write(tmp_path / "mine.jsonl", [{"prompt": OTHERS[0].upper(), **sides}])
    write(tmp_path / "bench.jsonl", [{"prompt": VERSIONS[2], **sides, "subset": "mt-bench-hard", "id": 1}])
    return Recipe.from_text(
        f"data_root: {tmp_path}\nratings: [{{data: rated.jsonl, objectives: {{good: [0, 1]}}}}]\n"
        "preferences: [{data: pairs.jsonl}]\nfinetune: {share: 0.5}\n"
        "evaluation: [{benchmark: rewardbench, data: bench.jsonl}, {benchmark: pairs, data: mine.jsonl}]\n"
    )


def test_near_duplicates_of_benchmark_and_evaluation_prompts_are_not_trained_or_fine_tuned_on(recipe):
    """Fine-tuning takes its rows and pairs from these."""
    data = read_training_data(recipe)
    prompts = [data.table.conversations[i].prompt[0].content for i in data.train_rows]
    assert prompts == [pair.chosen.prompt[0].content for pair in data.pairs] == OTHERS[1:]
    assert data.left_out["rated training rows whose prompt is evaluated on, written otherwise"] == 3


def test_near_duplicates_of_what_a_backbone_was_fine_tuned_on_are_left_out_everywhere(recipe):
    data = read_training_data(recipe.model_copy(update={"evaluation": recipe.evaluation[1:]}))
    known = [asked(VERSIONS[5]), asked(OTHERS[0].replace(" ", "  ")), asked(OTHERS[1])]
    seen = SeenPrompts.of({"fine-tuning": known}, prompt_groups(known))
    left = without_finetuned(data, Finetuned(seen, [], np.zeros((0, 4), np.float32), {}))
    assert [left.table.conversations[i].prompt[0].content for i in left.train_rows] == OTHERS[2:]
    assert [pair.chosen.prompt[0].content for pair in left.pairs] == OTHERS[2:]
    assert [[*map(len, part.evaluations.values())] for part in (data, left)] == [[1], [0]]


@pytest.fixture(scope="module")
def corpus(one_layer_backbone, tmp_path_factory) -> Corpus:
    backbone = Backbone.load(one_layer_backbone, dtype="float32", device="cpu")
    conversations = [asked(prompt) for prompt in (*VERSIONS, *OTHERS)]
    store = tmp_path_factory.mktemp("features")
    return build_corpus(conversations, backbone, store, Console(quiet=True), max_length=None, overflow="error")


def test_folds_and_hold_outs_are_by_group(corpus):
    conversations = [asked(prompt) for prompt in (*VERSIONS, *OTHERS)]
    assert len({fold_of(c.prompt_key, 5) for c in conversations[:8]}) > 1, "by their own keys they would straddle"
    objectives = ObjectiveSet([Objective.rated("x-good", 0, 1)])
    table = RatingTable(conversations, np.ones((14, 1)), objectives, ["x"] * 14, ["train"] * 14)
    folds = RatedSplit(table, np.arange(14), np.empty(0, np.int64)).train_rows(corpus, 5).folds
    assert len(set(folds[:8])) == 1 and len(set(folds[8:])) > 1
    keys = corpus.group_keys(conversations)
    assert len(set(keys)) == 1 + len(OTHERS)
    for share in (HELD_OUT_PAIRS, 0.3, 0.5):
        assert len(set(held_out_prompts(keys, share)[:8])) == 1


def test_a_near_duplicate_of_a_trained_prompt_gets_weights_without_its_fold(corpus):
    size = corpus.responses([asked(VERSIONS[0])]).shape[1]
    weight = np.zeros((1, size))
    head = RegressionHead(weight, np.zeros(1), np.zeros((5, 1, size)), np.arange(1.0, 6.0)[:, None], [])
    rewards = OutOfFoldRewards(head, frozenset({asked(VERSIONS[0]).prompt_key}), corpus)
    fold = fold_of(corpus.groups[asked(VERSIONS[0]).prompt_key], 5)
    assert rewards([asked(VERSIONS[0]), asked(VERSIONS[3]), asked(OTHERS[0])]).ravel().tolist() == [
        fold + 1,
        fold + 1,
        0,
    ]
