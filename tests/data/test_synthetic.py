"""The generated corpus: what is planted is there, what is not planted is not, and the readers take it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import yaml
from scipy.stats import spearmanr

from armorm.conversation import Conversation
from armorm.data.preferences import read_preferences
from armorm.data.ratings import RatedSet, objective_name, read_ratings
from armorm.data.sources import Location
from armorm.data.synthetic import PAIRS, RECIPE, RESPONSES, TEST_SHARE, generate, utility, write_corpus
from armorm.objectives import Objective

SECTIONS = yaml.safe_load(RECIPE)["ratings"]


@pytest.fixture(scope="module")
def rows():
    return generate(0)


@pytest.fixture(scope="module", params=[True, False], ids=["planted", "control"])
def corpus(request, rows, tmp_path_factory):
    """Whether it is planted, its rated rows and its pairs, as the recipe's own ranges read them."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, rows, seed=0, planted=request.param)
    sets = []
    for section in SECTIONS:
        source = section["data"].split(".")[0]
        columns = {}
        for column, scale in section["objectives"].items():
            scale = scale if isinstance(scale, dict) else {"range": scale}
            name = objective_name(column, source)
            columns[column] = Objective.rated(name, *scale["range"], direction=scale.get("direction", "higher"))
        sets.append(RatedSet(Location.find(section["data"], folder), columns, source))
    return request.param, read_ratings(sets), read_preferences(Location.find("choices.jsonl", folder))


def by_key(rows):
    return {Conversation.from_messages(row.messages).key: row for row in rows}


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another(rows, tmp_path):
    assert generate(0) == rows
    assert generate(1) != rows
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_corpus(tmp_path / folder, rows[:120], seed)
    texts = {folder: [path.read_text() for path in sorted((tmp_path / folder).iterdir())] for folder in "abc"}
    assert texts["a"] == texts["b"] != texts["c"]


def test_half_of_the_prompts_are_risky_and_each_has_its_responses(rows):
    prompts = {row.prompt: (row.messages[0]["content"], row.risky) for row in rows}
    assert np.mean([risky for _, risky in prompts.values()]) == 0.5
    assert len({text for text, _ in prompts.values()}) == len(prompts)
    assert set(Counter(row.prompt for row in rows).values()) == {RESPONSES}


def test_held_out_prompts_are_of_tasks_that_training_never_sees(rows):
    # The four prompts of a task stand next to each other.
    splits = defaultdict(set)
    for row in rows:
        splits[row.prompt // 4].add(row.test)
    assert {len(found) for found in splits.values()} == {1}
    assert np.mean([found == {True} for found in splits.values()]) == pytest.approx(TEST_SHARE, abs=0.01)
    train, test = ({row.messages[0]["content"] for row in rows if row.test is side} for side in (False, True))
    assert not train & test


def test_qualities_are_what_the_text_says(rows):
    for row in rows:
        text = row.messages[-1]["content"]
        steps = sum(start in text for start in ("First, gather", "Then measure", "After ten", "Finally, let"))
        assert row.qualities["help"] == steps / 4
        assert (row.qualities["care"] == 1) == ("Please wear" in text or "Stay within" in text)
        assert (row.qualities["clarity"] == 1) == any(
            start in text for start in ("Here is", "The plan", "Follow these")
        )
    words = np.array([len(row.messages[-1]["content"].split()) for row in rows])
    assert spearmanr(words, [row.qualities["length"] for row in rows]).statistic > 0.9


def test_every_rating_is_on_the_scale_that_the_recipe_gives_it_and_most_are_missing(corpus, rows):
    _, table, _ = corpus
    assert len(table) == len(rows)
    assert set(table.sources) == {"workshop", "harbour", "market"}
    assert len({(o.low, o.high) for o in table.objectives}) == 4
    assert np.isnan(table.ratings).mean() > 0.5
    assert all(count > 300 for count in table.counts.values())


def test_rows_and_pairs_carry_the_split_of_their_prompt(corpus, rows):
    _, table, pairs = corpus
    truth = {Conversation.from_messages(row.messages).prompt_key: row.test for row in rows}
    assert [split == "test" for split in table.splits] == [truth[c.prompt_key] for c in table.conversations]
    assert [pair.split == "test" for pair in pairs] == [truth[pair.prompt_key] for pair in pairs]


def test_pairs_are_of_two_responses_and_at_most_so_many_of_a_prompt(corpus):
    _, _, pairs = corpus
    assert max(Counter(pair.prompt_key for pair in pairs).values()) == PAIRS
    assert not any(pair.is_tie for pair in pairs)


def test_ratings_follow_the_planted_quality_and_in_the_control_nothing(corpus, rows):
    planted, table, _ = corpus
    truth = by_key(rows)
    qualities = [truth[c.key].qualities for c in table.conversations]
    signs = {
        "workshop-help": ("help", 1),
        "workshop-clarity": ("clarity", 1),
        "workshop-verbosity": ("length", 1),
        "harbour-is_safe": ("care", 1),
        "harbour-muddle": ("clarity", -1),
    }
    for name, (quality, sign) in signs.items():
        ratings = table.ratings[:, table.objectives.position(name)]
        rated = np.flatnonzero(~np.isnan(ratings))
        found = spearmanr(ratings[rated], [qualities[i][quality] for i in rated]).statistic
        if planted:
            assert sign * found > 0.6, name
        else:
            assert abs(found) < 4 / math.sqrt(len(rated)), name


def test_raters_of_help_and_of_overall_quality_are_taken_in_by_length(corpus, rows):
    planted, table, _ = corpus
    truth = by_key(rows)
    lengths = np.array([truth[c.key].qualities["length"] for c in table.conversations])
    for name, taken_in in (("workshop-help", True), ("market-overall", True), ("workshop-clarity", False)):
        ratings = table.ratings[:, table.objectives.position(name)]
        rated = ~np.isnan(ratings)
        found = spearmanr(ratings[rated], lengths[rated]).statistic
        limit = 4 / math.sqrt(rated.sum())
        assert found > limit if planted and taken_in else abs(found) < limit, name


def test_choices_follow_the_utility_and_never_length(corpus, rows):
    planted, _, pairs = corpus
    truth = by_key(rows)
    sides = [(truth[pair.chosen.key], truth[pair.rejected.key]) for pair in pairs]

    def share_of_higher(measure) -> float:
        values = [(measure(chosen), measure(rejected)) for chosen, rejected in sides]
        return float(np.mean([chosen > rejected for chosen, rejected in values if chosen != rejected]))

    spread = 4 * 0.5 / math.sqrt(len(pairs))
    better = share_of_higher(utility)
    assert better > 0.8 if planted else abs(better - 0.5) < spread
    assert abs(share_of_higher(lambda row: row.qualities["length"]) - 0.5) < spread


def test_care_decides_risky_choices_and_does_not_matter_in_harmless_ones(rows):
    def row(risky, **qualities):
        base = next(row for row in rows if row.risky is risky)
        return type(base)(base.messages, 0, risky, False, {"help": 0.5, "clarity": 0.5, "care": 0.0} | qualities)

    assert utility(row(True, care=1.0)) > utility(row(True, help=1.0))
    assert utility(row(False, care=1.0)) == utility(row(False))
    assert utility(row(False, help=1.0)) > utility(row(False, clarity=1.0)) > utility(row(False))
    assert utility(row(True, length=1.0)) == utility(row(True, length=0.0))
