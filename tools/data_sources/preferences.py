"""Readers of the preference sets: each takes the folder of clones and yields rows of `preferences/`."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from data_sources.benchmarks import finegrained_prompt, finegrained_questions, in_spans
from data_sources.rows import (
    Message,
    Row,
    SourceError,
    assistant,
    pair,
    read_json,
    read_lines,
    read_text,
    split_of,
    user,
)


def _transcript(text: str, markers: str) -> list[Message]:
    """Turns of a text in which a marker with `Human` or `Assistant` precedes each turn."""
    parts = re.split(markers, text)
    return [(user if who == "Human" else assistant)(turn) for who, turn in zip(parts[1::2], parts[2::2], strict=True)]


def hh_harmless(clones: Path) -> Iterator[Row]:
    """Pairs whose responses follow the same turns. The split is by the first turn."""
    for line in read_lines(clones / "hh-rlhf/harmless-base/test.jsonl.gz"):
        chosen, rejected = (_transcript(line[name], r"\n\n(Human|Assistant): ?") for name in ("chosen", "rejected"))
        prompt = chosen[:-1]
        if not prompt or prompt != rejected[:-1]:
            continue
        yield pair(prompt, chosen[-1]["content"], rejected[-1]["content"], split=split_of(prompt[0]["content"]))


def convarg(clones: Path) -> Iterator[Row]:
    """Pairs of arguments for one side of a topic. The split is by topic."""
    folder = clones / "acl2016-convincing-arguments/data/UKPConvArg1Strict-CSV"
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise SourceError(f"{folder}: no CSV files")
    for path in files:
        topic, side = (part.replace("-", " ").strip() for part in path.stem.rsplit("_", 1))
        topic = topic.capitalize()
        for line in read_text(path).split("\n")[1:]:
            if line.strip():
                _, better, *arguments = line.split("\t")
                first, second = (text.replace("<br/>", "\n") for text in arguments)
                chosen, rejected = (first, second) if better == "a1" else (second, first)
                yield pair([user(f"{topic}? Argue for: {side}.")], chosen, rejected, split=split_of(topic))


def pandalm(clones: Path) -> Iterator[Row]:
    """The majority of three annotators; ties and three different opinions are left out."""
    for line in read_json(clones / "PandaLM/data/testset-v1.json"):
        (winner, votes), *_ = Counter(line[f"annotator{number}"] for number in (1, 2, 3)).most_common()
        if winner == 0 or votes < 2:
            continue
        prompt = user(f"{str(line['instruction']).strip()}\n\n{str(line['input']).strip()}")
        responses = [str(line["response1"]), str(line["response2"])]
        chosen, rejected = responses if winner == 1 else reversed(responses)
        yield pair([prompt], chosen, rejected, split=split_of(prompt["content"]))


def finegrained(clones: Path) -> Iterator[Row]:
    """Pairs of four predictions without ties; training questions of `finegrained_spans` are left out. The split is by
    question."""
    for line in finegrained_questions(clones):
        split = split_of(line["question"])
        if split == "train" and in_spans(line):
            continue
        prompt = [user(finegrained_prompt(line))]
        for (first, second), better in zip(combinations(range(1, 5), 2), line["preference"], strict=True):
            if better:
                chosen, rejected = (first, second) if better == 1 else (second, first)
                yield pair(prompt, line[f"prediction {chosen}"], line[f"prediction {rejected}"], split=split)


_OASST_WEAKER = ("7b-flan", "13b-flan", "30b-flan", "65b-flan", "30b-chip2", "65b-unnatural-instructions")


def oasst_models(clones: Path) -> Iterator[Row]:
    """Replies of gpt-3.5-turbo against those of weaker models, cut where they write the user's next turn. Prompts whose
    last turn has more than two characters beyond ASCII are left out."""
    folder = clones / "qlora/eval/generations/oa"
    weaker = {
        name: {line["input"]: line for line in read_lines(folder / f"{name}-oa-generations-topp0.9-temp0.7.jsonl")}
        for name in _OASST_WEAKER
    }
    for line in read_lines(folder / "gpt-3.5-oa-generations.jsonl"):
        prompt = _transcript(line["input"], "### (Human|Assistant):")
        if not prompt[-1]["content"]:
            prompt = prompt[:-1]
        if sum(ord(character) > 127 for character in prompt[-1]["content"]) > 2:
            continue
        for name, replies in weaker.items():
            if line["input"] in replies:
                rejected = replies[line["input"]]["generation"].split("### Human")[0]
                by = {"chosen_by": "gpt-3.5-turbo", "rejected_by": name}
                yield pair(prompt, line["generation"], rejected, **by, split=split_of(prompt[-1]["content"]))


def vicuna_judged(clones: Path) -> Iterator[Row]:
    """Pairs of four assistants that GPT-4 judged alike in both orders."""
    folder = clones / "qlora/eval"
    names = ("bard", "gpt35", "gpt4", "vicuna-13b")
    answers = {
        name: {
            line["question_id"]: line["text"] for line in read_lines(folder / f"generations/vicuna/answer_{name}.jsonl")
        }
        for name in names
    }
    questions = {line["question_id"]: line["text"] for line in read_lines(folder / "prompts/vicuna_questions.jsonl")}

    def scores(first: str, second: str) -> dict[int, int]:
        file = f"answer-{first}-vs-answer-{second}-gpt-4-reviewer-threeclass.jsonl"
        return {
            line["question_id"]: line["score"] for line in read_lines(folder / "ratings-gpt4/vicuna/pairwise" / file)
        }

    for first, second in combinations(names, 2):
        forward, backward = scores(first, second), scores(second, first)
        for number, question in questions.items():
            judged = (forward.get(number), backward.get(number))
            if judged in ((1, 2), (2, 1)):
                chosen, rejected = (first, second) if judged == (1, 2) else (second, first)
                by = {"chosen_by": chosen, "rejected_by": rejected}
                texts = (answers[chosen][number], answers[rejected][number])
                yield pair([user(question)], *texts, **by, split=split_of(question))


def alpacaeval(clones: Path) -> Iterator[Row]:
    """At most 20 pairs of each prompt, drawn with seed 0, sorted by prompt."""
    files = sorted((clones / "alpaca_eval/results").glob("*/alpaca_eval_gpt4/annotations.json"))
    if not files:
        raise SourceError(f"{clones / 'alpaca_eval/results'}: no annotations")
    judged: dict[str, list[tuple[str, str]]] = {}
    for path in files:
        for line in read_json(path):
            outputs = (line["output_1"].strip(), line["output_2"].strip())
            if line["preference"] in (1, 2) and all(outputs) and outputs[0] != outputs[1]:
                chosen, rejected = outputs if line["preference"] == 1 else outputs[::-1]
                judged.setdefault(line["instruction"], []).append((chosen, rejected))
    rng = random.Random(0)
    for prompt, pairs in sorted(judged.items()):
        for chosen, rejected in rng.sample(pairs, min(20, len(pairs))):
            yield pair([user(prompt)], chosen, rejected, split=split_of(prompt))
