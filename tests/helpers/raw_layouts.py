"""Hand-written rows of each public set in its exact raw layout, in files as the hub has them, and what they mean.

`RATED`: name of a preset -> file, rows, files by split (None where the hub names none), and for each row the prompt,
the response and the ratings that the preset reads. `PAIRED`: the same with prompt, chosen, rejected and margin.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import yaml

from armorm.objectives import RELEASED_OBJECTIVES
from tests.helpers.conversations import chat

HELPSTEER = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]


def written(root: Path, hub_id: str, file: str, rows: list[dict], splits: dict[str, str] | None = None) -> Path:
    """The files of a set below its name, with the README that names its splits where the hub has one."""
    folder = root / hub_id
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if file.endswith(".gz") else lines)
    if splits:
        files = [{"split": split, "path": place} for split, place in splits.items()]
        head = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files}]})
        (folder / "README.md").write_text(f"---\n{head}---\n")
    return folder


def annotation(rating: str, **more: str) -> dict:
    return {"Rating": rating, "Rationale": "It says so.", **more}


def completion(response: str, overall: float, ratings: list[str], model: str) -> dict:
    kinds = {"Type": ["1"], "Rationale For Rating": "Fine."}
    names = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    annotations = {name: annotation(rating, **kinds) for name, rating in zip(names, ratings, strict=True)}
    return {
        "annotations": annotations,
        "custom_system_prompt": "You are an AI assistant.",
        "model": model,
        "principle": "helpfulness",
        "response": response,
        "critique": "Good.",
        "fine-grained_score": 4.0,
        "overall_score": overall,
    }


# Of each rated preset: file, rows as published, splits, and the (prompt, response, ratings) they mean.
RATED = {
    "helpsteer": (
        "train.jsonl.gz",
        [{"prompt": "Name a colour.", "response": "Red.", **dict(zip(HELPSTEER, (4, 3, 4, 0, 1), strict=True))}],
        None,
        [(["Name a colour."], "Red.", (4, 3, 4, 0, 1))],
    ),
    "helpsteer2": (
        "train.jsonl.gz",
        [
            {"prompt": "c#", "response": "A language.", **dict(zip(HELPSTEER, (3, 4, 4, 2, 1), strict=True))},
            {
                "prompt": "Hi\n<extra_id_1>Assistant\nHello, how are you?\n<extra_id_1>User\nWell.\nAnd you?",
                "response": "Fine.",
                **dict(zip(HELPSTEER, (2, 2, 4, 1, 0), strict=True)),
            },
        ],
        None,
        [
            (["c#"], "A language.", (3, 4, 4, 2, 1)),
            (["Hi", "Hello, how are you?", "Well.\nAnd you?"], "Fine.", (2, 2, 4, 1, 0)),
        ],
    ),
    "ultrafeedback": (
        "evol_instruct.jsonl",
        [
            {
                "source": "evol_instruct",
                "instruction": "Add 2 and 3.",
                "models": ["alpaca-7b", "gpt-4", "bard"],
                "completions": [
                    completion("5", 8.5, ["5", "4", "5", "3"], "gpt-4"),
                    completion("6", 1.0, ["1", "N/A", "2", "1"], "alpaca-7b"),
                    completion("", 1.0, ["1", "1", "1", "1"], "bard"),
                ],
                "correct_answers": ["5"],
                "incorrect_answers": ["6"],
            }
        ],
        None,
        [(["Add 2 and 3."], "5", (8.5, 5, 5, 4, 3)), (["Add 2 and 3."], "6", (1, 1, 2, np.nan, 1))],
    ),
    "beavertails": (
        "round0/330k/train.jsonl.gz",
        [
            {"prompt": "p", "response": "r", "category": {"animal_abuse": False, "violence": True}, "is_safe": False},
            {"prompt": "q", "response": "s", "category": {"animal_abuse": False, "violence": False}, "is_safe": True},
        ],
        {"330k_train": "round0/330k/train.jsonl.gz"},
        [(["p"], "r", (0,)), (["q"], "s", (1,))],
    ),
    "code-ultrafeedback": (
        "data/train-00000-of-00001.parquet",
        [
            {
                "instruction": f"Sort a list, {preference}.",
                "preference": preference,
                "models": ["gpt-4", "wizard"],
                "responses": [{"model": "gpt-4", "response": "sorted(x)"}, {"model": "wizard", "response": "x.sort()"}],
                "annotations": [
                    {"model": "wizard", "rating": str(1 + place), "rationale": "So."},
                    {"model": "gpt-4", "rating": "N/A" if place else "5", "rationale": "So."},
                ],
            }
            for place, preference in enumerate(
                ("complexity", "style", "explanation", "instruction-following", "readability")
            )
        ],
        None,
        [(["Sort a list, complexity."], "x.sort()", (1, *[np.nan] * 4)), (["Sort a list, complexity."], "sorted(x)", (5, *[np.nan] * 4))]
        + [
            ([f"Sort a list, {name}."], "x.sort()", tuple(1 + i if i == j else np.nan for j in range(5)))
            for i, name in ((1, "style"), (2, "explanation"), (3, "instruction-following"), (4, "readability"))
        ],
    ),
    "feedback-collection": (
        "new_feedback_collection.json",
        [
            {
                "instruction": "###Task Description: ...",
                "output": "Feedback: good. [RESULT] 4",
                "input": "",
                "orig_instruction": "Write a poem.",
                "orig_response": "Roses are red.",
                "orig_reference_answer": "Better roses.",
                "orig_criteria": "Does it rhyme?",
                "orig_score1_description": "no",
                "orig_score2_description": "hardly",
                "orig_score3_description": "somewhat",
                "orig_score4_description": "well",
                "orig_score5_description": "fully",
                "orig_feedback": "good",
                "orig_score": "4",
            }
        ],
        None,
        [(["Write a poem."], "Roses are red.", (4,))],
    ),
    "capybara": (
        "data/train-00000-of-00001.parquet",
        [
            {
                "source": "Dove",
                "chosen": chat("a", "b", "c", "good"),
                "chosen_rating": 5,
                "chosen_model": "m",
                "rejected": chat("a", "b", "c", "bad"),
                "rejected_rating": 2,
                "rejected_model": "n",
            }
        ],
        None,
        [(["a", "b", "c"], "good", (5,)), (["a", "b", "c"], "bad", (2,))],
    ),
    "distilabel-math": (
        "data/train-00000-of-00001.parquet",
        [
            {
                "metadata": "{}",
                "instruction": "1+1?",
                "chosen_response": "2",
                "chosen_rating": 9.0,
                "rejected_response": "3",
                "rejected_rating": 4.5,
            }
        ],
        None,
        [(["1+1?"], "2", (9,)), (["1+1?"], "3", (4.5,))],
    ),
    "distilabel-orca": (
        "data/train-00000-of-00001.parquet",
        [
            {
                "system": system,
                "input": "Name a bird.",
                "chosen": "Robin.",
                "rejected": "Salmon.",
                "generations": ["Robin.", "Salmon."],
                "order": ["chosen", "rejected"],
                "labelling_model": "gpt-4-1106-preview",
                "rating": rating,
                "rationale": "One is a fish.",
                "status": "unchanged",
                "original_chosen": "Robin.",
                "original_rejected": "Salmon.",
                "chosen_score": 9.0,
                "in_gsm8k_train": False,
            }
            for system, rating in (("Be brief.", [9.0, 1.0]), ("", [7.0, 2.0]), ("", None))
        ],
        None,
        [
            (["Be brief.", "Name a bird."], "Robin.", (9,)),
            (["Be brief.", "Name a bird."], "Salmon.", (1,)),
            (["Name a bird."], "Robin.", (7,)),
            (["Name a bird."], "Salmon.", (2,)),
        ],
    ),
    "armorm": (
        "data/train-00000-of-00001.parquet",
        [
            {"dataset": "helpsteer", "messages": chat("h", "i"), **dict.fromkeys(RELEASED_OBJECTIVES.names)}
            | {f"helpsteer-{name}": value for name, value in zip(HELPSTEER, (0.9, 0.7, 0.5, 0.3, 0.1), strict=True)},
            {"dataset": "rest", "messages": chat("j", "k"), **dict.fromkeys(RELEASED_OBJECTIVES.names)}
            | {"ultrafeedback-overall_score": 0.95, "beavertails-is_safe": 1.0, "code-style": 0.9, "argilla-judge_lm": 0.05},
        ],
        None,
        [
            (["h"], "i", (4, 3, 2, 1, 0, *[np.nan] * 14)),
            (["j"], "k", (*[np.nan] * 5, 10, *[np.nan] * 4, 1, np.nan, np.nan, 1, np.nan, 5, *[np.nan] * 3)),
        ],
    ),
}  # fmt: skip

SCORED = {"rejected": chat("a", "bad"), "rejected_score": 1.0, "chosen_score": 4.0, "chosen": chat("a", "good")}
SAFE = {
    "prompt": "a",
    "response_0": "bad",
    "response_1": "good",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "better_response_id": 0,
    "safer_response_id": 1,
}
GOOD = (["a"], "good", "bad", None)
# Of each preference preset: file, rows as published, splits, and the (prompt, chosen, rejected, margin) they mean.
PAIRED = {
    "ultrafeedback-binarized": (
        "data/train_prefs-00000-of-00001.parquet",
        [
            {
                "prompt": "a",
                "prompt_id": "0",
                "chosen": chat("a", "good"),
                "rejected": chat("a", "bad"),
                "messages": chat("a", "good"),
                "score_chosen": 8.5,
                "score_rejected": 7.0,
            }
        ],
        {"train_prefs": "data/train_prefs-*"},
        [(["a"], "good", "bad", 1.5)],
    ),
    "ultrafeedback-cleaned": (
        "data/train-00000-of-00001.parquet",
        [
            {
                "source": "evol_instruct",
                "prompt": "a",
                "chosen": chat("a", "good"),
                "chosen-rating": 5.0,
                "chosen-model": "m",
                "rejected": chat("a", "bad"),
                "rejected-rating": 4.5,
                "rejected-model": "n",
            }
        ],
        None,
        [(["a"], "good", "bad", 0.5)],
    ),
    "ultrafeedback-pairs": ("data/train-00000-of-00003.parquet", [SCORED], None, [(["a"], "good", "bad", 3)]),
    "helpsteer-pairs": ("data/train-00000-of-00001.parquet", [SCORED], None, [(["a"], "good", "bad", 3)]),
    "helpsteer2-pairs": (
        "preference/preference.jsonl.gz",
        [
            {
                "split": split,
                "prompt": "a",
                "response_1": first,
                "response_2": second,
                "preference_strength": strength,
                "preference_statement": "Better.",
                "preference_elaboration": "It is.",
            }
            for split, first, second, strength in (
                ("train", "good", "bad", -2),
                ("train", "bad", "good", 3),
                ("train", "one", "two", 0),
            )
        ],
        None,
        [(["a"], "good", "bad", 2), (["a"], "good", "bad", 3)],
    ),
    "shp": (
        "askbaking/train.json",
        [
            {"post_id": "x", "domain": "askbaking_train", "history": "a", "human_ref_A": first, "human_ref_B": second,
             "labels": label, "score_A": 5, "score_B": 2, "score_ratio": 2.5}
            for first, second, label in (("good", "bad", 1), ("bad", "good", 0))
        ],
        None,
        [GOOD, GOOD],
    ),
    "hh-rlhf": (
        "harmless-base/train.jsonl.gz",
        [{"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good", "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad"}],
        None,
        [(["a", "b", "c"], "good", "bad", None)],
    ),
    "safe-rlhf": (
        "data/Alpaca-7B/train.jsonl",
        [SAFE | {"prompt_source": "x", "response_0_severity_level": 2, "response_0_sha256": "0"}],
        {"train": "data/Alpaca-7B/train.jsonl"},
        [GOOD],
    ),
    "safe-rlhf-helpful": ("data/Alpaca-7B/train.jsonl", [SAFE], {"train": "data/Alpaca-7B/train.jsonl"}, [(["a"], "bad", "good", None)]),
    "safe-rlhf-30k": ("round0/train.jsonl.gz", [SAFE], {"train": "round0/train.jsonl.gz"}, [GOOD]),
    "capybara-pairs": (RATED["capybara"][0], RATED["capybara"][1], None, [(["a", "b", "c"], "good", "bad", 3)]),
    "distilabel-math-pairs": (RATED["distilabel-math"][0], RATED["distilabel-math"][1], None, [(["1+1?"], "2", "3", None)]),
    "distilabel-orca-pairs": (
        RATED["distilabel-orca"][0],
        [RATED["distilabel-orca"][1][0], RATED["distilabel-orca"][1][1] | {"status": "tie"}],
        None,
        [(["Be brief.", "Name a bird."], "Robin.", "Salmon.", None)],
    ),
    "skywork-80k": ("data/train-00000-of-00001.parquet", [{"chosen": chat("a", "good"), "rejected": chat("a", "bad"), "source": "x"}], None, [GOOD]),
    "skywork-80k-v0.1": ("data/train-00000-of-00001.parquet", [{"chosen": chat("a", "good"), "rejected": chat("a", "bad"), "source": "x"}], None, [GOOD]),
    "armorm-pairs": ("data/train-00000-of-00002.parquet", [SCORED], None, [(["a"], "good", "bad", 3)]),
}  # fmt: skip
