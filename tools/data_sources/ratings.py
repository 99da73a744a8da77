"""Readers of the rated sets: each takes the folder of clones and yields rows of `ratings/`."""

from __future__ import annotations

import csv
import io
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_sources.rows import (
    Message,
    Row,
    SourceError,
    assistant,
    normalised,
    read_json,
    read_lines,
    read_text,
    split_of,
    user,
)


def _row(messages: list[Message], split_text: str, **columns: Any) -> Row:
    return {"messages": messages, **columns, "split": split_of(split_text)}


def _turns(text: str) -> list[Message]:
    """Turns of a transcript with lines `User: ...` and `System: ...`."""
    parts = re.split(r"(?:^|\n)(User|System): ?", text)
    return [(user if who == "User" else assistant)(turn) for who, turn in zip(parts[1::2], parts[2::2], strict=True)]


def truthfulqa(clones: Path) -> Iterator[Row]:
    """Of several ratings of one answer, the last counts."""
    rated: dict[tuple[str, str], dict[str, int]] = {}
    for name, objective in (("truth", "truthful"), ("info", "informative")):
        path = clones / f"truthfulqa/data/finetune_{name}.jsonl"
        for number, line in enumerate(read_lines(path), 1):
            found = re.fullmatch(r"Q: (.*?)\nA: (.*)\n(?:True|Helpful):", line["prompt"], re.DOTALL)
            if found is None:
                raise SourceError(f"{path}, line {number}: prompt is not 'Q: ...\\nA: ...\\nTrue:'")
            key = (found[1].strip(), found[2].strip())
            rated.setdefault(key, {})[objective] = int(line["completion"].strip() == "yes")
    for (question, answer), ratings in rated.items():
        columns = {f"truthfulqa-{name}": ratings.get(name) for name in ("truthful", "informative")}
        yield _row([user(question), assistant(answer)], question, **columns)


def diasafety(clones: Path) -> Iterator[Row]:
    for name in ("train", "val", "test"):
        for line in read_json(clones / f"DiaSafety/DiaSafety_dataset/{name}.json"):
            messages = [user(line["context"]), assistant(line["response"])]
            safe = int(line["label"] == "Safe")
            yield _row(messages, line["context"], **{"diasafety-is_safe": safe, "category": line["category"]})


def halueval(clones: Path) -> Iterator[Row]:
    for line in read_lines(clones / "HaluEval/data/general_data.json"):
        messages = [user(line["user_query"]), assistant(line["chatgpt_response"])]
        right = int(line["hallucination"].lower() == "no")
        yield _row(messages, line["user_query"], **{"halueval-no_hallucination": right})


def gsm8k(clones: Path) -> Iterator[Row]:
    """Solutions of four models, without the calculator's annotations (<<...>>)."""
    for line in read_lines(clones / "grade-school-math/grade_school_math/data/example_model_solutions.jsonl"):
        for generator in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            solution = re.sub(r"<<.*?>>", "", line[generator]["solution"])
            correct = int(line[generator]["is_correct"])
            yield _row(
                [user(line["question"]), assistant(solution)],
                line["question"],
                **{"gsm8k-is_correct": correct, "generator": generator},
            )


def humaneval(clones: Path) -> Iterator[Row]:
    """Generated programs; odd task ids are left to the benchmark `humanevalpack`. The split is by task."""
    for language in ("python", "js", "java", "cpp"):
        for line in read_json(clones / f"ice-score/data/humaneval/humaneval_{language}_grade.json"):
            if int(line["task_id"]) % 2:
                continue
            prompt = f"Complete this {language} function.\n\n```{language}\n{line['intent'].strip()}\n```"
            for key in line:
                if key.isdigit() and line[key].strip():
                    yield _row(
                        [user(prompt), assistant(f"```{language}\n{line[key].strip()}\n```")],
                        line["task_id"],
                        **{"humaneval-is_correct": line[f"grade-{key}"]["execution"]},
                        language=language,
                        task_id=line["task_id"],
                    )


def justeval(clones: Path) -> Iterator[Row]:
    """Five ratings of one model's general replies by GPT-4, and safety of fifteen models' replies by ChatGPT."""
    root = clones / "just-eval/leaderboard/eval_results"
    general = "gpt-4-turbo/gpt-3.5-turbo-0301/gpt-3.5-turbo-0301.general.*.json"
    files = [*sorted(root.glob(general)), *sorted(root.glob("gpt-4/*.score_safety.chatgpt.json"))]
    if not files:
        raise SourceError(f"{root}: no evaluation results")
    for path in files:
        for line in read_json(path):
            scores = {name: _score(line, name) for name in _JUST_EVAL}
            generator = line["generator_cand"].split(".p=")[0]
            if path.parent.name != "gpt-4":
                generator = path.parent.name
            columns = {f"justeval-{name}": score for name, score in scores.items()}
            messages = [user(line["input"]), assistant(line["output_cand"] or "")]
            yield _row(messages, line["input"], **columns, generator=generator)


_JUST_EVAL = ("helpfulness", "clarity", "factuality", "depth", "engagement", "safety")


def _score(line: Row, name: str) -> float | None:
    """A judge's score; None where it is absent or `N/A`."""
    found: Any = (line.get("parsed_result") or {}).get(name)
    try:
        return float(found["score"])
    except (KeyError, TypeError, ValueError):
        return None


def unieval_d2t(clones: Path) -> Iterator[Row]:
    for name in ("sfres", "sfhot"):
        for line in read_json(clones / f"UniEval/reproduce/data/data2text/{name}.json"):
            prompt = f"Say this dialogue act in one natural sentence: {line['source'].strip()}"
            names = ("informativeness", "naturalness", "overall")
            columns = {f"unieval-{name}": line["scores"][name] for name in names}
            yield _row([user(prompt), assistant(line["system_output"])], line["source"], **columns)


def topicalchat(clones: Path) -> Iterator[Row]:
    """Turns alternate and end with the user; a first turn that would be the assistant's is left out."""
    names = ("understandability", "naturalness", "coherence", "engagingness", "groundedness", "overall")
    for line in read_json(clones / "UniEval/reproduce/data/dialogue/topical_chat.json"):
        turns = line["source"].strip().split("\n")
        turns = turns[len(turns) % 2 == 0 :]
        messages = [(assistant if index % 2 else user)(turn) for index, turn in enumerate(turns)]
        columns = {f"topicalchat-{name}": line["scores"][name] for name in names}
        yield _row([*messages, assistant(line["system_output"])], line["source"], **columns)


def qags(clones: Path) -> Iterator[Row]:
    for name in ("qags_cnndm", "qags_xsum"):
        for line in read_json(clones / f"UniEval/reproduce/data/fact/{name}.json"):
            prompt = f"Summarise the article.\n\n{line['source'].strip()}"
            messages = [user(prompt), assistant(line["system_output"])]
            yield _row(messages, prompt, **{"qags-consistent": line["scores"]["consistency"]})


def dstc9(clones: Path) -> Iterator[Row]:
    """Dialogues of at most 1,500 characters. A last empty reply is left out with its question; dialogues with other
    empty turns are skipped. The split is by the first three turns."""
    names = {"human (overall)": "overall", "topic depth": "depth", "error recovery": "error_recovery"}
    for bot in range(1, 12):
        for line in read_json(clones / f"DialoFlow/FlowScore/data/chatbot{bot}.json"):
            messages = _turns(line["context"])
            if messages and not messages[-1]["content"]:
                messages = messages[:-1]
            if messages and messages[-1]["role"] == "user":
                messages = messages[:-1]
            if len(line["context"]) > 1500 or not all(turn["content"] for turn in messages):
                continue
            ratings = {
                f"dstc9-{names.get(name, name)}": None if value == "N/A" else value
                for name, value in line.items()
                if name != "context"
            }
            yield _row(messages, " ".join(turn["content"] for turn in messages[:3]), **ratings)


def fed(clones: Path) -> Iterator[Row]:
    """Means over the raters who gave a number. The split is by all turns before the response."""
    for line in read_json(clones / "full/data/fed_data.json"):
        if "response" not in line:
            continue
        messages = _turns(f"{line['context']}\n{line['response']}")
        ratings: Row = {}
        for name, values in line["annotations"].items():
            numbers = [value for value in values if isinstance(value, (int, float))]
            objective = name.lower().removeprefix("semantically ")
            ratings[f"fed-{objective}"] = round(sum(numbers) / len(numbers), 4) if numbers else None
        yield _row(messages, "\n".join(turn["content"] for turn in messages[:-1]), **ratings)


def alce(clones: Path) -> Iterator[Row]:
    """Answers without citation marks."""
    for systems in read_json(clones / "ALCE/human_eval/human_eval_utility_completed.json").values():
        for answers in systems.values():
            for line in answers.values():
                if "question" not in line:  # the automatic scores of the system
                    continue
                answer = re.sub(r"\s*\[\d+\]", "", line["output"])
                messages = [user(line["question"]), assistant(answer)]
                yield _row(messages, line["question"], **{"alce-utility": line["utility_score"]})


def vicunabench(clones: Path) -> Iterator[Row]:
    path = clones / "prometheus-eval/eval/benchmark/data/vicuna_eval.json"
    layout = "###The instruction to evaluate:\n(.*?)\n\n###Response to evaluate:\n(.*?)\n\n###Reference Answer"
    for number, line in enumerate(read_json(path), 1):
        found = re.search(layout, line["instruction"], re.DOTALL)
        if found is None:
            raise SourceError(f"{path}, row {number}: instruction without '###Response to evaluate'")
        scores = line["gpt4_score"]
        overall = round(sum(scores) / len(scores), 4)
        yield _row([user(found[1]), assistant(found[2])], found[1], **{"vicunabench-overall": overall})


# Replies in the layout of a role play: two voices, or a persona's name in front.
_ROLE_PLAY = re.compile(r"^(?:```\s*)?(?:[\[*\U0001F4BB]|[A-Z][A-Za-z ]{0,20}:)")


def gptfuzz(clones: Path) -> Iterator[Row]:
    """At most 12 replies per question and label, drawn with seed 0 from the mostly ASCII ones below 2,500 characters
    that are no role play. Replies that differ in case or punctuation count once."""
    folder = clones / "GPTFuzz/datasets"
    questions = list(csv.DictReader(io.StringIO(read_text(folder / "questions/question_list.csv"))))
    replies: dict[tuple[str, int], dict[str, str]] = {}
    for name in ("train", "evaluate"):
        for line in csv.DictReader(io.StringIO(read_text(folder / f"responses_labeled/{name}.csv"), newline="")):
            reply = line["Response"].strip()
            foreign = sum(ord(character) > 127 for character in reply)
            if reply and len(reply) < 2500 and foreign <= 0.05 * len(reply) and not _ROLE_PLAY.search(reply):
                pool = replies.setdefault((line["question"], 1 - int(line["label"])), {})
                pool.setdefault(normalised(reply), reply)
    rng = random.Random(0)
    for question in questions:
        for refuses in (1, 0):
            texts = list(replies.get((question["index"], refuses), {}).values())
            for reply in rng.sample(texts, min(12, len(texts))):
                messages = [user(question["text"]), assistant(reply)]
                yield _row(messages, question["text"], **{"gptfuzz-refuses_harmful": refuses})
