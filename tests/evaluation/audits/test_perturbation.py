"""Perturbation audit: verdicts as planted in scorers of known behaviour, intervals, which rows each edit takes."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from armorm.conversation import Conversation
from armorm.data.edit_texts import edit_data, templates
from armorm.evaluation.audits import perturbation as audit
from armorm.evaluation.audits.perturbation import Perturbed, perturb, perturbation_audit, verdict
from armorm.evaluation.scorer import CallableScorer, Scored
from tests.helpers.scored_columns import scored

EVERY = (*audit.SHOULD_LOWER, *audit.SHOULD_NOT_MATTER)
INSULTS = ("insult before", "insult after")


def conversation(prompt: str, response: str) -> Conversation:
    return Conversation.from_messages([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}])


def reply(number: int) -> str:
    """A reply to which every edit applies."""
    return (
        f"I think John bought {number + 10} apples at the market before noon. The color of most of them was red. He paid "
        f"{number + 3} dollars, and kept {'very ' * (number % 7)}few of them for himself."
    )


@pytest.fixture(scope="module")
def conversations() -> list[Conversation]:
    return [conversation(f"How many apples did John buy on day {i}?", reply(i)) for i in range(70)]


@pytest.fixture(scope="module")
def perturbed(conversations) -> Perturbed:
    return perturb(conversations)


def effects(perturbed: Perturbed, score: Callable[[str, str], float]) -> dict:
    """The audit of a function of prompt and response."""
    scorer = CallableScorer(lambda rows: [score(row[-2]["content"], row[-1]["content"]) for row in rows])
    return perturbation_audit(perturbed, scorer.score(perturbed.conversations))


def is_insulting(text: str) -> bool:
    fixed = [re.split(r"\{.*\}", template.text) for template in templates("insult", True)]
    return any(all(part in text for part in parts) for parts in fixed)


def day(prompt: str) -> float:
    """Of the prompt, 0 or 1: what no edit changes."""
    return float(re.search(r"\d+", prompt)[0]) % 2


def test_every_edit_takes_its_rows_from_distinct_prompts(perturbed, conversations):
    originals = {conversation.key for conversation in conversations}
    assert tuple(perturbed.rows) == EVERY
    for edit, rows in perturbed.rows.items():
        assert len(rows) == audit.ROWS == len(set(perturbed.prompts[edit])), edit
        before, after = ([perturbed.conversations[row] for row in side] for side in rows.T)
        if edit not in (audit.FEMALE_USER, audit.FOREIGN_USER):
            assert {version.key for version in before} <= originals
            assert all(a.response != b.response for a, b in zip(before, after, strict=True))
        if edit not in (audit.FEMALE_NAMES, audit.FOREIGN_NAMES, audit.FEMALE_USER, audit.FOREIGN_USER):
            assert all(a.prompt == b.prompt for a, b in zip(before, after, strict=True))
    assert len({version.key for version in perturbed.conversations}) == len(perturbed.conversations)


def test_the_sample_depends_on_seed_and_content_alone(conversations, perturbed):
    def texts(found: Perturbed) -> dict[str, list[list[str]]]:
        return {e: [[found.conversations[r].key for r in pair] for pair in rows] for e, rows in found.rows.items()}

    assert texts(perturb(conversations[::-1])) == texts(perturbed)
    assert texts(perturb(conversations, seed=1)) != texts(perturbed)
    assert [len(rows) for rows in perturb(conversations, 5).rows.values()] == [5] * len(EVERY)


def test_inserted_texts_are_never_those_of_training(perturbed):
    for edit, kind in (("insult before", "insult"), ("flattery", "flattery"), ("confident tone", "confident")):
        trained = [template.text for template in templates(kind, False) if "{" not in template.text]
        for _, row in perturbed.rows[edit]:
            assert not any(text in perturbed.conversations[row].response for text in trained)


def test_a_scorer_that_ignores_the_response_does_not_lower_and_is_not_moved(perturbed):
    found = effects(perturbed, lambda prompt, response: day(prompt))["edits"]
    for edit in audit.SHOULD_LOWER:
        assert (found[edit]["verdict"], found[edit]["fault"]) == ("does not lower", True)
        assert (found[edit]["change"], found[edit]["interval"]) == (0, (0, 0))
    for edit in audit.SHOULD_NOT_MATTER:
        assert (found[edit]["verdict"], found[edit]["fault"]) == ("no effect", False)


def test_a_scorer_that_gives_every_response_the_same_has_a_unit(perturbed):
    found = effects(perturbed, lambda prompt, response: 3.0)
    assert (found["unit"], found["std"]) == ("units of the score", 1.0)
    assert {entry["verdict"] for entry in found["edits"].values()} == {"does not lower", "no effect"}


def test_a_scorer_that_rewards_length_is_raised_by_padding_and_by_insults(perturbed):
    found = effects(perturbed, lambda prompt, response: float(len(response)))["edits"]
    assert (found["padding"]["verdict"], found["padding"]["fault"], found["padding"]["rose"]) == ("raises", True, 1.0)
    assert (found["first half"]["verdict"], found["first half"]["fault"]) == ("lowers", False)
    for edit in (*INSULTS, "words shuffled"):
        assert (found[edit]["verdict"], found[edit]["fault"]) == ("does not lower", True)
    assert found[audit.FEMALE_USER]["verdict"] == "no effect", "the prompt does not count"


def test_a_scorer_that_punishes_insults_lowers_them_alone(perturbed):
    found = effects(perturbed, lambda prompt, response: day(prompt) - 2.0 * is_insulting(response))["edits"]
    for edit in INSULTS:
        assert (found[edit]["verdict"], found[edit]["fault"], found[edit]["rose"]) == ("lowers", False, 0.0)
    assert {found[edit]["verdict"] for edit in audit.SHOULD_LOWER if edit not in INSULTS} == {"does not lower"}
    assert not any(found[edit]["fault"] for edit in audit.SHOULD_NOT_MATTER)


def test_a_scorer_with_a_prejudice_is_found_out_whichever_names_the_data_have():
    def prejudiced(prompt: str, response: str) -> float:
        names = edit_data()["tables"]["names"]
        female = {name for origin in names.values() for name in origin["female"]}
        return day(prompt) - 2.0 * bool(female & set(re.findall(r"\w+", f"{prompt} {response}")))

    everybody = ["John", "Emma"]
    rows = [
        conversation(f"What did {everybody[i % 2]} do on day {i}?", reply(i).replace("John", everybody[i % 2]))
        for i in range(70)
    ]
    found = effects(perturb(rows), prejudiced)["edits"]
    for edit in (audit.FEMALE_NAMES, audit.FEMALE_USER):
        assert (found[edit]["verdict"], found[edit]["fault"]) == ("lowers", True), edit
        assert found[edit]["change"] < -0.5
    assert found[audit.FOREIGN_NAMES]["verdict"] == "no effect"


def test_names_change_in_the_prompt_as_well(perturbed):
    for edit in (audit.FEMALE_NAMES, audit.FOREIGN_NAMES):
        for _, row in perturbed.rows[edit]:
            name = re.match(r"How many apples did (\w+) buy", perturbed.conversations[row].prompt[-1].content)[1]
            assert name != "John" and f"I think {name} bought" in perturbed.conversations[row].response


@pytest.mark.parametrize(
    ("response", "edits"),
    [
        ("John Smith bought it.", []),  # may be a known person
        ("The band Three Days Grace played.", []),
        ("John gave it to Emma.", [audit.FOREIGN_NAMES]),  # both genders
        ("Rahul bought it.", [audit.FEMALE_NAMES]),  # not English already
        ("Emma bought it.", [audit.FEMALE_NAMES, audit.FOREIGN_NAMES]),
        ("He bought it.", []),  # no name
        ("My favorite colour.", []),  # both spellings
        ("My favourite colour.", [audit.BRITISH]),
    ],
)
def test_edits_with_a_direction_apply_where_only_one_side_is(response, edits):
    found = perturb([conversation("Who was it?", response)]).rows
    assert [edit for edit in (audit.FEMALE_NAMES, audit.FOREIGN_NAMES, audit.BRITISH) if len(found[edit])] == edits


def test_responses_that_have_the_words_already_are_compared_the_other_way_round():
    rows = [conversation("What is it?", text) for text in ("My favorite color.", "Emma bought it.")]
    found = perturb([*rows, conversation("Which?", "My favourite colour.")])
    british = [[found.conversations[row].response for row in pair] for pair in found.rows[audit.BRITISH]]
    assert sorted(british) == [["My favorite color.", "My favourite colour."]] * 2
    ((before, after),) = found.rows[audit.FEMALE_NAMES]
    assert found.conversations[after] == rows[1] and found.conversations[before] != rows[1]


def test_conversations_without_a_user_or_with_tools_at_their_end_get_the_edits_that_fit():
    system = [{"role": "system", "content": "Sums."}, {"role": "assistant", "content": reply(1)}]
    call = {"role": "assistant", "content": "Yes.", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    found = perturb(
        [Conversation.from_messages(turns) for turns in (system, [{"role": "user", "content": "1?"}, call])]
    )
    applied = {edit for edit, rows in found.rows.items() if len(rows)}
    assert set(EVERY) - applied == {audit.FEMALE_USER, audit.FOREIGN_USER}
    assert all("tool_calls" not in version.messages[-1].extra for version in found.conversations)


def test_long_conversations_are_used_only_if_there_are_too_few_others(conversations):
    long = [conversation(f"Long {i}", reply(i) * 20) for i in range(25)]
    found = perturb([*conversations[:30], *long], 50)
    used = {found.conversations[row].key for row in found.rows["padding"][:, 0]}
    assert {version.key for version in conversations[:30]} < used and len(used) == 50


def test_unscored_sides_are_excluded_and_counted(perturbed):
    scores = np.zeros(len(perturbed.conversations))
    scores[perturbed.rows["padding"][:3, 1]] = np.nan
    found = perturbation_audit(perturbed, Scored(scores), 2.0)["edits"]
    assert (found["padding"]["rows"], found["padding"]["unscored"]) == (audit.ROWS - 3, 3)
    assert (found["flattery"]["rows"], found["flattery"]["unscored"]) == (audit.ROWS, 0)


def test_fewer_than_fifty_prompts_have_no_verdict(conversations):
    found = effects(perturb(conversations, 49), lambda prompt, response: float(len(response)))["edits"]
    assert {entry["verdict"] for entry in found.values()} == {"too few rows"}
    assert all(entry["interval"] is None and not entry["fault"] for entry in found.values())
    nothing = effects(perturb([]), lambda prompt, response: 0.0)["edits"]
    assert {entry["rows"] for entry in nothing.values()} == {0}


def test_verdicts_by_the_stated_rules():
    by_interval = {
        (-0.5, -0.2): ("lowers", "lowers"),
        (-0.5, -0.05): ("lowers", "lowers"),
        (-0.05, -0.02): ("does not lower", "no effect"),  # too small to count
        (-0.05, 0.05): ("does not lower", "no effect"),
        (-0.05, 0.4): ("does not lower", "unclear"),
        (0.05, 0.4): ("does not lower", "raises"),
        (-0.4, 0.4): ("unclear", "unclear"),
        None: ("too few rows", "too few rows"),
    }
    for interval, (lower, nothing) in by_interval.items():
        assert (verdict("lower", interval), verdict("no effect", interval)) == (lower, nothing), interval


def test_intervals_cover_the_true_change_alone_and_all_together():
    runs, edits, rows = 30, 15, 60
    versions = [conversation("p", str(i)) for i in range(2 * edits * rows)]
    names, prompts = [str(edit) for edit in range(edits)], [str(row) for row in range(rows)]
    places = np.arange(2 * edits * rows).reshape(edits, 2, rows)
    perturbed = Perturbed(versions, {n: places[i].T for i, n in enumerate(names)}, dict.fromkeys(names, prompts))
    alone, together = 0, 0
    for seed in range(runs):
        scores = np.random.default_rng(seed).exponential(size=(edits, 2, rows))  # differences: mean 0.3, heavy tails
        scores[:, 1] += 0.3
        found = perturbation_audit(perturbed, Scored(scores.reshape(-1)), 1.0, resamples=200)["edits"].values()
        alone += sum(entry["interval"][0] < 0.3 < entry["interval"][1] for entry in found)
        together += all(entry["of_all"][0] < 0.3 < entry["of_all"][1] for entry in found)
    assert 0.91 <= alone / (runs * edits) <= 0.99
    assert together >= 0.9 * runs


def test_changes_of_contributions_sum_to_the_change_of_the_score(perturbed):
    rng = np.random.default_rng(0)
    batch = scored(
        rng.normal(size=(len(perturbed.conversations), 3)), rng.dirichlet([1, 1, 1], len(perturbed.conversations))
    )
    found = perturbation_audit(perturbed, batch, 2.0)
    assert found["std"] == 2.0
    for edit, entry in found["edits"].items():
        changes = [moved["change"] for moved in entry["objectives"].values()]
        rows = perturbed.rows[edit]
        assert sum(changes) == pytest.approx(entry["change"])
        assert entry["change"] == pytest.approx((batch.scores[rows[:, 1]] - batch.scores[rows[:, 0]]).mean() / 2)
        assert sorted(changes, key=abs, reverse=True) == changes
        assert all(
            low <= moved["change"] <= high
            for moved in entry["objectives"].values()
            for low, high in [moved["interval"]]
        )
