"""`tools/build_data.py` on small hand-written clones."""

import contextlib
import gzip
import hashlib
import io
import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def clones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clones")
    for subset in ("Natural", *(f"Adversarial/{name}" for name in ("Neighbor", "GPTInst", "GPTOut", "Manual"))):
        known = {"input": "A benchmark's question?", "output_1": "Yes.", "output_2": "No.", "label": 2}
        _write(folder / f"LLMBar/Dataset/LLMBar/{subset}/dataset.json", json.dumps([known]))
    for language in ("cpp", "go", "java", "js", "python", "rust"):
        _write(folder / f"octopack/evaluation/create/humaneval-x/data/{language}/data/humanevalpack.jsonl", "")
    _write(folder / "RM-Bench/data/chat_filtered.json", json.dumps([{"prompt": "What is kevlar made of?"}]))
    answers = [("Why?", "So.", " yes"), ("Why?", "", " yes"), ("A benchmark's question?", "No.", " no")]
    for name, label in (("truth", "True"), ("info", "Helpful")):
        rows = [{"prompt": f"Q: {q}\nA: {a}\n{label}:", "completion": right} for q, a, right in answers]
        rows.append({"prompt": f"Q: Why?\nA: So.\n{label}:", "completion": " no"})
        _write(folder / f"truthfulqa/data/finetune_{name}.jsonl", _lines(*rows[: 4 if name == "truth" else 3]))
    argument = "#id\tlabel\ta1\ta2\na_b\ta2\tweak\tstrong<br/>and long\n"
    for topic in range(40):
        _write(folder / f"acl2016-convincing-arguments/data/UKPConvArg1Strict-CSV/topic-{topic}_yes.csv", argument)
    opinions = [(2, 2, 1), (0, 0, 1), (0, 1, 2)]
    rated = [
        {"instruction": "Rewrite.", "input": "", "response1": "a", "response2": True}
        | {f"annotator{number}": vote for number, vote in enumerate(votes, 1)}
        for votes in opinions
    ]
    kevlar = rated[0] | {"instruction": "what is KEVLAR made of"}
    _write(folder / "PandaLM/data/testset-v1.json", json.dumps([*rated, kevlar]))
    return folder


@pytest.fixture(scope="module")
def build():
    """Runs the tool; returns its exit code or message, and what it printed."""
    sys.path.insert(0, str(TOOLS))
    try:
        from build_data import main
    finally:
        sys.path.remove(str(TOOLS))

    def run(clones, output, *options):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
            main(["--clones", str(clones), "--output", str(output), *options])
        return ended.value.code, printed.getvalue()

    return run


@pytest.fixture(scope="module")
def built(clones, build, tmp_path_factory):
    output = tmp_path_factory.mktemp("built")
    code, _ = build(clones, output, "--only", "truthfulqa", "convarg", "pandalm", "llmbar")
    assert code == 0
    return output


def _rows(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_last_rating_counts_and_empty_answers_and_benchmark_prompts_are_left_out(built):
    (row,) = _rows(built / "ratings/truthfulqa.jsonl.gz")
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert row["messages"] == messages
    assert (row["truthfulqa-truthful"], row["truthfulqa-informative"]) == (0, 1)


def test_pairs_are_ordered_by_the_label(built):
    rows = _rows(built / "preferences/convarg.jsonl.gz")
    assert list(rows[0]) == ["prompt", "chosen", "rejected", "split"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Topic 0? Argue for: yes."}]
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "strong\nand long"}]
    (benchmark, *_) = _rows(built / "benchmarks/llmbar.jsonl.gz")
    assert benchmark["chosen"][0]["content"] == "No."
    assert "split" not in benchmark


def test_ties_are_left_out(built):
    (row,) = _rows(built / "preferences/pandalm.jsonl.gz")
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("True", "a")


def test_a_tenth_of_the_prompts_by_hash_is_test(built):
    rows = _rows(built / "preferences/convarg.jsonl.gz")
    digits = {row["prompt"][0]["content"].split("?")[0].lower(): row["split"] for row in rows}
    expected = {
        topic: "test" if int(hashlib.sha1(topic.encode()).hexdigest(), 16) % 10 == 0 else "train" for topic in digits
    }
    assert digits == expected
    assert set(expected.values()) == {"train", "test"}


def test_equal_clones_give_equal_bytes_and_a_changed_row_is_reported(built, build, clones, tmp_path):
    code, printed = build(clones, tmp_path, "--only", "pandalm", "--compare", str(built))
    file = "preferences/pandalm.jsonl.gz"
    assert code == 0
    assert "1 equal      0 missing      0 extra" in printed
    assert (tmp_path / file).read_bytes() == (built / file).read_bytes()
    other = tmp_path / "other" / file
    other.parent.mkdir(parents=True)
    other.write_bytes(gzip.compress(b'{"prompt": []}\n'))
    code, printed = build(clones, tmp_path, "--only", "pandalm", "--compare", str(tmp_path / "other"))
    assert code == 1
    assert "0 equal      1 missing      1 extra" in printed


def test_a_missing_file_is_named(build, clones, tmp_path):
    code, _ = build(clones, tmp_path, "--only", "gsm8k")
    assert "example_model_solutions.jsonl: no such file" in code
