"""Output for notebooks: compact, escaped, and from one conversation or many."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from armorm.errors import ConversationError
from armorm.evaluation.runner import evaluate
from armorm.features.store import FeatureStore
from armorm.notebook import MOST_ROWS, bar, html_table, shortened
from armorm.objectives import RELEASED_OBJECTIVES
from tests.helpers.conversations import chat
from tests.helpers.small_models import reward_model

PROMPT = "How do I learn to juggle?"
REPLIES = ["Start with one ball.", "No.", "Practise every day with <b>three</b> balls."]


@pytest.fixture(scope="module")
def rm():
    return reward_model()


def test_cells_title_and_note_are_text():
    page = html_table("<b>", ["<i>", "n"], [["<script>", 3], ["a", bar(-0.5)]], "<u>")
    assert not re.search(r"<(b|i|u|script)>", page)
    assert "&lt;script&gt;" in page and 'aria-label="-0.50"' in page and "right:50%;width:25.0%" in page
    assert shortened("a  b\n" + "c" * 99, 10) == "a b ccccc…"


def test_one_conversation_is_scored_alone(rm):
    rows = [chat(PROMPT, reply) for reply in REPLIES]
    many = rm.score(rows)
    np.testing.assert_allclose(rm.score(rows[0]).scores, many.scores[:1], atol=1e-5)
    assert len(rm.score([])) == 0
    assert "1 score<" in rm.score(rows[0])._repr_html_()


def test_a_batch_is_a_table_of_its_first_rows(rm):
    batch = rm.score([chat(PROMPT, f"Reply {i}.") for i in range(MOST_ROWS + 3)])
    page = batch._repr_html_()
    assert page.count("<tr>") == MOST_ROWS + 1 and "and 3 more" in page
    assert f"{batch.scores[0]:+.4f}" in page and len(repr(batch)) < 120
    skipped = rm.score([chat(PROMPT, "Yes."), [{"role": "user", "content": "<x>"}]], on_refused="skip")
    assert "1 rejected" in skipped._repr_html_() and "1 rejected" in repr(skipped)
    assert "0 scores" in repr(batch.take([])) + batch.take([])._repr_html_()


def test_a_model_and_its_objectives_are_compact(rm):
    line = f"ArmoRM({rm.name!r}, {len(rm.objectives)} objectives, backbone 'LlamaModel')"
    assert repr(rm) == line, "the weights say no name of their backbone"
    page = rm._repr_html_()
    for objective in rm.objectives:
        assert objective.name in page
    assert "mean weight" in page and len(page) < 6000
    assert f"and {len(RELEASED_OBJECTIVES) - MOST_ROWS} more" in RELEASED_OBJECTIVES._repr_html_()


def test_results_are_their_overall_metrics_and_no_wall_of_text(rm, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    pair = {"chosen": "Start with one ball.", "rejected": "No."}
    rows.write_text("".join(json.dumps({"prompt": f"{PROMPT} <{i}>", **pair}) + "\n" for i in range(4)))
    results = evaluate("pairs", rm, [rows], quiet=True)
    page, line = results._repr_html_(), repr(results)
    value = results.level("overall")["accuracy"].value
    assert f"{100 * value:.1f}" in page and f"accuracy {100 * value:.1f}" in line and "4 examples" in line
    assert len(line) < 200 and len(page) < 3000


def test_the_sides_of_a_plotted_comparison_are_written_at_its_middle(rm):
    (axes,) = rm.compare(PROMPT, *REPLIES[:2]).plot().axes
    sides = {text.get_text(): text for text in axes.texts if text.get_text().startswith("for ")}
    assert set(sides) == {"for A", "for B"}
    assert all(side.xy[0] == 0 for side in sides.values())


def test_a_store_says_what_is_in_it(rm, tmp_path):
    store = FeatureStore.of(tmp_path / "store", rm.backbone)
    assert "0 conversations, 0 prompts" in repr(store)
    assert f"{store.response_size:,} numbers" in store._repr_html_()


def test_responses_are_ranked_with_a_verdict_between_the_best_two(rm):
    found = rm.rank(PROMPT, REPLIES)
    scores = rm.score([chat(PROMPT, reply) for reply in REPLIES]).scores
    assert found.order == np.argsort(-scores).tolist() and found.best == found.order[0]
    assert found.scores == pytest.approx(scores, abs=1e-5)
    two = rm.compare(PROMPT, *(REPLIES[i] for i in found.order[:2]))
    first, second = found.order[:2]
    assert found.verdict == two.in_words({"A": f"Response {first}", "B": f"response {second}"})
    page, text = found._repr_html_(), str(found)
    assert text.startswith(found.verdict[:60]) and found.verdict in page
    assert "&lt;b&gt;three" in page and "<b>three" not in page and "<b>three" in text
    assert found.to_dict()["verdict"] == found.verdict
    assert rm.rank(PROMPT, REPLIES[:1]).verdict == rm.explain(chat(PROMPT, REPLIES[0])).verdict
    for wrong in ([], "a text"):
        with pytest.raises(ConversationError, match="expected a list of responses"):
            rm.rank(PROMPT, wrong)


def test_where_there_is_no_notebook_show_prints(rm, capsys):
    found = rm.explain(chat(PROMPT, REPLIES[0]), tokens=True)
    found.show()
    rm.compare(PROMPT, *REPLIES[:2]).show(every=True)
    rm.rank(PROMPT, REPLIES).show()
    out = " ".join(capsys.readouterr().out.split())
    assert found.verdict in out and "how the score adds up" in out
    assert "margin" in out and "Response" in out
