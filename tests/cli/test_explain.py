"""`armorm explain --tokens` and `armorm compare --tokens`: the same numbers as the library, in the terminal and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from armorm import ArmoRM
from armorm.backbone.readout import Readout
from tests.helpers.commands import run
from tests.helpers.conversations import chat
from tests.helpers.shared_folders import shared_folder
from tests.helpers.small_models import reward_model

PROMPT, RESPONSE = (
    "How do I juggle?",
    "Start with one ball. Throw it high! Then take two, and do not look at your hands.",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A saved model that reads a mean."""
    rm = reward_model(readout=Readout(pooling="mean"))
    return shared_folder(tmp_path_factory, "mean-model", rm.save_pretrained)


@pytest.fixture(scope="module")
def shown(model):
    return ArmoRM.from_pretrained(model, dtype="float32").explain(chat(PROMPT, RESPONSE), tokens=True)


def test_json_has_every_token_and_the_sums_are_the_score(capsys, model, shown):
    arguments = (
        "explain",
        "--model",
        model,
        "--dtype",
        "float32",
        "--prompt",
        PROMPT,
        "--response",
        RESPONSE,
        "--json",
    )
    code, out, _ = run(capsys, *arguments, "--tokens")
    assert code == 0
    entry = json.loads(out)
    tokens = entry["tokens"]
    assert sum(row["contribution"] for row in tokens["tokens"]) == pytest.approx(entry["score"], abs=1e-5)
    assert "".join(RESPONSE[row["start"] : row["end"]] for row in tokens["tokens"]) == RESPONSE
    assert [part["text"] for part in tokens["sentences"]] == [part.text for part in shown.sentences()]
    assert tokens["exact_share"] == 1
    _, out, _ = run(capsys, *arguments)
    assert "tokens" not in json.loads(out)


def test_the_terminal_names_sentences_for_the_score_or_an_objective(capsys, model, shown):
    arguments = ("explain", "--model", model, "--dtype", "float32", "--prompt", PROMPT, "--response", RESPONSE)
    code, out, _ = run(capsys, *arguments, "--tokens")
    assert code == 0
    best = max(shown.sentences(), key=lambda part: part.deviations.sum())
    assert "how the score adds up over the response" in out
    assert f"{best.deviations.sum():+.4f}  {best.text}" in out
    code, out, _ = run(capsys, *arguments, "--objective", "code-style")
    assert code == 0
    column = shown.tokens.names.index("code-style")
    best = max(shown.sentences(), key=lambda part: part.deviations[column])
    assert "how the code-style adds up" in out
    assert f"{best.deviations[column]:+.4f}  {best.text}" in out
    assert out.count("adds up") == 1


def test_all_shows_the_objectives_that_are_folded(capsys, model, shown):
    arguments = ("explain", "--model", model, "--dtype", "float32", "--prompt", PROMPT, "--response", RESPONSE)
    _, out, _ = run(capsys, *arguments)
    assert " ".join(out.split()).startswith(shown.verdict)
    folded = {share.name for share in shown.folded}
    assert ("others, together" in out) == bool(folded)
    listed = {line.split()[0] for line in out.splitlines() if line.strip()}
    assert not folded & listed
    _, out, _ = run(capsys, *arguments, "--all")
    assert {share.name for share in shown.shares} <= {line.split()[0] for line in out.splitlines() if line.strip()}


def test_the_page_shows_prompt_response_and_the_map_of_words(capsys, model, tmp_path):
    path = tmp_path / "page.html"
    arguments = ("explain", "--model", model, "--prompt", PROMPT, "--response", RESPONSE, "--html", path)
    assert run(capsys, *arguments)[0] == 0
    assert PROMPT in path.read_text() and 'class="words"' not in path.read_text()
    assert run(capsys, *arguments, "--tokens", "--force")[0] == 0
    assert PROMPT in path.read_text() and 'class="words"' in path.read_text()


def test_an_unknown_objective_is_one_line_with_the_nearest_name(capsys, model):
    code, _, err = run(
        capsys, "explain", "--model", model, "--prompt", PROMPT, "--response", RESPONSE, "--objective", "code-stile"
    )
    assert code == 1
    assert "did you mean code-style" in err


def test_rows_of_a_file_keep_their_own_tokens(capsys, model, tmp_path):
    path = tmp_path / "rows.jsonl"
    responses = [RESPONSE, "No idea. 🎉"]
    path.write_text("".join(json.dumps({"prompt": PROMPT, "response": text}) + "\n" for text in responses))
    code, out, _ = run(capsys, "explain", path, "--model", model, "--tokens", "--json")
    assert code == 0
    for line, text in zip(out.splitlines(), responses, strict=True):
        rows = json.loads(line)["tokens"]["tokens"]
        assert "".join(text[row["start"] : row["end"]] for row in rows) == text


def test_compare_lists_the_sentences_that_carry_the_margin(capsys, model):
    code, out, _ = run(capsys, "compare", "--model", model, "--prompt", PROMPT, RESPONSE, "Buy balls.", "--tokens")
    assert code == 0
    assert "sentences that carry the margin" in out
    assert "B Buy balls." in out
    arguments = ("compare", "--model", model, "--prompt", PROMPT, RESPONSE, "Buy balls.", "--tokens", "--json")
    entry = json.loads(run(capsys, *arguments)[1])
    carried = sum(share["difference"] for share in entry["sentences"]) + entry["other_difference"]
    assert carried == pytest.approx(entry["margin"])
