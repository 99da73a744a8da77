"""Readers of the benchmarks: each takes the folder of clones and yields rows of `benchmarks/`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_sources.rows import Row, assistant, normalised, pair, read_json, read_lines, split_of, user

_LLMBAR = {
    "natural": "Natural",
    "adver-neighbor": "Adversarial/Neighbor",
    "adver-GPTInst": "Adversarial/GPTInst",
    "adver-GPTOut": "Adversarial/GPTOut",
    "adver-manual": "Adversarial/Manual",
}
# Half of the training questions, drawn once: the first 8 digits of the SHA-1 of each question.
_SPAN_QUESTIONS = Path(__file__).parent / "finegrained_spans.txt"


def llmbar(clones: Path) -> Iterator[Row]:
    for subset, folder in _LLMBAR.items():
        for index, line in enumerate(read_json(clones / f"LLMBar/Dataset/LLMBar/{folder}/dataset.json")):
            outputs = [line["output_1"], line["output_2"]]
            chosen, rejected = outputs if line["label"] == 1 else reversed(outputs)
            yield pair([user(line["input"])], chosen, rejected, subset=f"llmbar-{subset}", id=index)


def humanevalpack(clones: Path) -> Iterator[Row]:
    """The canonical solution against the buggy one."""
    root = clones / "octopack/evaluation/create/humaneval-x/data"
    for language in ("cpp", "go", "java", "js", "python", "rust"):
        for line in read_lines(root / language / "data/humanevalpack.jsonl"):
            prompt = f"Write a {language} function `{line['signature']}` to solve the following problem:\n{line['docstring']}"
            chosen, rejected = (line["declaration"] + line[name] for name in ("canonical_solution", "buggy_solution"))
            yield pair([user(prompt)], chosen, rejected, subset=f"hep-{language}", id=line["task_id"])


def finegrained_questions(clones: Path) -> list[Row]:
    """The questions of FineGrainedRLHF with their passages, predictions and feedback."""
    return read_json(clones / "FineGrainedRLHF/tasks/qa_feedback/data/dev_feedback.json")


def finegrained_prompt(line: Row) -> str:
    """1,500 characters of the first two passages, then the question."""
    passages = "\n".join(f"{title}: {' '.join(sentences)}" for title, *sentences in line["passages"][:2])
    return f"{passages[:1500]}\n\nQuestion: {line['question']}"


def in_spans(line: Row) -> bool:
    """Whether the question belongs to `finegrained_spans`: a drawn training question, or a test question that has
    marked errors and a pair that is no tie."""
    if split_of(line["question"]) == "test":
        return bool(line["feedback"]["errors"]) and any(line["preference"])
    digits = hashlib.sha1(normalised(line["question"]).encode()).hexdigest()[:8]
    return digits in _SPAN_QUESTIONS.read_text(encoding="utf-8").split()


def finegrained_spans(clones: Path) -> Iterator[Row]:
    for line in finegrained_questions(clones):
        if in_spans(line):
            errors: list[dict[str, Any]] = [
                {"type": error["error type"], "start": error["start"], "end": error["end"]}
                for error in line["feedback"]["errors"]
            ]
            messages = [user(finegrained_prompt(line)), assistant(line["prediction 1"])]
            yield {"messages": messages, "errors": errors}


def rm_bench_prompts(clones: Path) -> Iterator[str]:
    """Prompts of the chat domain of RM-Bench, normalised."""
    for line in read_json(clones / "RM-Bench/data/chat_filtered.json"):
        yield normalised(line["prompt"])


def auto_j_prompts(clones: Path, ties: bool) -> Iterator[str]:
    """Prompts of Auto-J's pairs, normalised; with or without those that are ties."""
    for line in read_lines(clones / "prometheus-eval/eval/benchmark/autoj_utils/testdata_pairwise.jsonl"):
        if ties or line["label"] != 2:
            yield normalised(line["prompt"])
