"""Rewards of the tokens of a policy: sums are kept, and every character's share is where the character is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armorm.errors import ConversationError
from armorm.explain.dense_rewards import Division, PolicyTokenizer, align_rewards, policy_spans
from armorm.explain.text_spans import sentences
from tests.helpers.small_models import tokenizer

TEXT = "One two.  Three\n\nfour 🙂!"


def by_character(values, places, owner, text):
    """The rule as it is stated, one token and one character at a time."""
    rewards = np.zeros(max(owner) + 1)
    for value, (low, high) in zip(values, places, strict=True):
        visible = [place for place in range(low, high) if not text[place].isspace()] or range(low, high)
        for place in visible:
            rewards[owner[place]] += value / len(visible)
    return rewards


@st.composite
def splits(draw):
    """A text and two ways to cut it into tokens."""
    text = draw(st.text("ab \n.é🙂", min_size=1, max_size=30))
    ends = [sorted({*draw(st.lists(st.integers(1, len(text)), max_size=8)), len(text)}) for _ in range(2)]
    return text, *[np.array(list(zip([0, *found[:-1]], found, strict=True))) for found in ends]


@settings(max_examples=40, deadline=None)
@given(splits())
def test_rewards_follow_the_characters_and_sum_to_the_same(found):
    text, places, spans = found
    values = np.arange(1.0, len(places) + 1) * 0.37 - 1
    rewards = align_rewards(values, places, spans, text)
    owner = [index for index, (low, high) in enumerate(spans) for _ in range(low, high)]
    assert rewards == pytest.approx(by_character(values, places, owner, text), abs=1e-12)
    assert rewards.sum() == pytest.approx(values.sum(), abs=1e-12)
    assert align_rewards(values, places, places, text) == pytest.approx(values, abs=1e-12)


def test_texts_counts_and_offsets_are_three_forms_of_one_thing():
    texts = ["One", " two", ".  Three\n\nfour ", "", "🙂", "!", ""]
    spans = [[0, 3], [3, 7], [7, 22], [22, 22], [22, 23], [23, 24], [24, 24]]
    assert "".join(texts) == TEXT
    for form in (texts, [len(text) for text in texts], spans, [tuple(span) for span in spans]):
        assert policy_spans(form, TEXT).tolist() == spans


def test_offsets_of_a_tokenizer_are_read_as_they_are():
    text = " Straße 🙂 naïve,  日本語"
    offsets = tokenizer()(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert any(a == b for a, b in zip(offsets, offsets[1:], strict=False))  # pieces of a character
    spans = policy_spans(offsets, text)
    assert (spans == PolicyTokenizer(tokenizer()).spans(text)).all()
    rewards = align_rewards(np.array([1.0]), np.array([[0, len(text)]]), spans, text)
    assert rewards.sum() == pytest.approx(1)
    # Of the pieces of a character the last one has it.
    emoji = text.index("🙂")
    pieces = [index for index, (low, high) in enumerate(offsets) if low <= emoji < high]
    assert len(pieces) > 1
    assert [rewards[index] > 0 for index in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_policy_tokenizer_that_truncates_does_not_truncate_here():
    cutting = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer)
    cutting("a b c d e f", truncation=True, max_length=2)
    assert PolicyTokenizer(cutting).spans("a b c d e f")[-1, 1] == len("a b c d e f")


def test_white_space_in_no_token_belongs_to_the_next_token_or_to_the_last_one_with_text():
    spans = policy_spans([[0, 3], [5, 6], [8, 8]], "One  t  ")
    rewards = align_rewards(np.array([1.0, 2, 4]), np.array([[0, 3], [3, 5], [5, 8]]), spans, "One  t  ")
    assert rewards.tolist() == [1.0, 6.0, 0.0]


def test_tokens_after_the_text_and_the_rest_are_paid_at_the_end():
    places = np.array([[0, 2], [2, 2], [2, 4], [4, 4], [4, 4]])
    spans = policy_spans(["a", "b", "cd", ""], "abcd")
    found = Division.of("abcd", places, "token", spans).reward(np.array([2.0, 8, 1, 16, 32]), 64.0, 0.5)
    assert found.rewards.tolist() == [1, 1, 8 + 1, 16 + 32 + 64]
    assert (found.rest, found.exact_share) == (64.0, 0.5)
    own = Division.of("abcd", places).reward(np.array([2.0, 8, 1, 16, 32]), 64.0, 0.5)
    assert own.rewards.tolist() == [2, 8, 1, 16, 96]


def test_sentences_sum_their_tokens_and_say_where_they_end():
    places = np.array([[0, 3], [3, 8], [8, 15], [15, 21], [21, 24], [24, 24]])
    policy = policy_spans([*TEXT, ""], TEXT)
    found = Division.of(TEXT, places, "sentence", policy).reward(np.array([1.0, 2, 4, 8, 16, 32]), 64.0, 0.5)
    assert found.spans.tolist() == [list(span) for span in sentences(TEXT)]
    assert found.rewards.tolist() == [3, 4, 8 + 16 + 32 + 64]
    assert found.last_tokens.tolist() == [7, 14, 24]
    assert Division.of(TEXT, places, "sentence").last_tokens is None


def test_a_reply_without_text_has_its_score_at_its_end():
    places = np.array([[0, 0], [0, 0]])
    for unit in ("token", "sentence"):
        found = Division.of("", places, unit, policy_spans(["", ""], "")).reward(np.array([1.0, 2.0]), 4.0, 0.1)
        assert found.rewards[-1] == 7
        assert found.rewards.sum() == 7


def test_text_that_the_template_drops_gets_nothing():
    text, places = "<think>no</think>yes", np.array([[17, 20], [20, 20]])
    found = Division.of(text, places, "token", policy_spans([17, 3, 0], text)).reward(np.array([1.0, 2.0]), 0.0, 1.0)
    assert found.rewards.tolist() == [0, 1, 2]
    assert Division.of(text, places).reward(np.array([1.0, 2.0]), 0.0, 1.0).rewards.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "expected texts"),
        ("abcd", "expected texts"),
        (3, "expected texts"),
        (["ab", "c"], "differ from the response at character 3: found '', expected 'd'"),
        (["ab", "cx"], "differ from the response at character 3: found 'x'"),
        (["abcd", "e"], "differ from the response at character 4"),
        ([2, 1], "found 3 characters in all, expected 4"),
        ([10**30], "expected 4"),
        ([[0, 2], [2, 5]], r"found \[2, 5\] at position 1"),
        ([[0, 2], 2], "found 2 at position 1"),
        ([[0, 2], [1, 4], [0, 4]], "expected ascending ones"),
        ([[0, 4, 5]], "position 0"),
        ([True, 3], "found True at position 0"),
        ([-1, 5], "found -1 at position 0"),
        (["ab", 2], "found 'ab' at position 0"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_in_one_sentence(tokens, message):
    with pytest.raises(ConversationError, match=message) as refused:
        policy_spans(tokens, "abcd")
    assert str(refused.value).startswith("policy_tokens: ")


def test_tokens_that_leave_out_text_are_refused():
    with pytest.raises(ConversationError, match="character 2 of the response, 'c', is in no token"):
        Division.of("abcd", np.array([[0, 4]]), "token", policy_spans([[0, 2], [3, 4]], "abcd"))
