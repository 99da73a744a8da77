"""Over-long conversations: stopped, refused or shortened by rule, counted, and never out of place."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armorm.backbone.chat_template import ChatTemplate, EncodedConversation
from armorm.backbone.encoding import encode_rows, same_prompts
from armorm.conversation import Conversation
from armorm.errors import ConversationError
from tests.helpers import tokenizers as families
from tests.helpers.conversations import chat


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(families.chatml())


def conversations(*dialogues: list[dict]) -> list[Conversation]:
    return [Conversation.from_messages(messages) for messages in dialogues]


def encode(template: ChatTemplate, messages: list[dict]) -> EncodedConversation:
    return template.encode(conversations(messages))[0]


LONG = chat("one two three " * 30, "Fine.")
SHORT = chat("Hello", "Fine.")


def test_no_limit_takes_every_conversation_whole(template):
    encoded = encode_rows(template, conversations(SHORT, LONG), None)
    assert [row.key for row in encoded.rows] == [encode(template, SHORT).key, encode(template, LONG).key]
    assert (encoded.rejected, encoded.truncated) == ([], [])


@pytest.mark.parametrize("overflow", ["error", "skip", "truncate_prompt"])
def test_a_conversation_of_just_the_limit_stays_as_it_is(template, overflow):
    whole = encode(template, LONG)
    (row,) = encode_rows(template, conversations(LONG), len(whole), overflow).rows
    assert row.key == whole.key
    assert row.truncated_tokens == 0


def test_error_stops_at_the_first_long_row_and_names_it(template):
    length = len(encode(template, LONG))
    expected = f"conversation 1: found {length} tokens, expected at most {length - 1}"
    with pytest.raises(ConversationError, match=expected):
        encode_rows(template, conversations(SHORT, LONG, SHORT), length - 1)


def test_skip_refuses_long_rows_and_the_others_keep_their_index(template):
    encoded = encode_rows(template, conversations(LONG, SHORT, LONG, SHORT), 20, "skip")
    assert [row is None for row in encoded.rows] == [True, False, True, False]
    assert encoded.rows[1].key == encoded.rows[3].key == encode(template, SHORT).key
    reason = f"found {len(encode(template, LONG))} tokens, expected at most 20"
    assert encoded.rejected == [(0, reason), (2, reason)]
    assert encoded.truncated == []


def test_truncation_takes_the_oldest_turns_first_and_keeps_count(template):
    system = [{"role": "system", "content": "Be brief."}]
    turns = chat("first " * 8, "a", "second " * 8, "b", "third " * 8, "The reply.")
    whole, without_one, without_two = (encode(template, [*system, *turns[start:]]) for start in (0, 2, 4))
    for limit, expected in (
        (len(whole) - 1, without_one),
        (len(without_one), without_one),
        (len(without_one) - 1, without_two),
        (len(without_two), without_two),
    ):
        encoded = encode_rows(template, conversations(SHORT, [*system, *turns]), limit, "truncate_prompt")
        assert encoded.rows[1].ids.tolist() == expected.ids.tolist()
        assert encoded.rows[1].gate_position == expected.gate_position
        assert encoded.rows[1].truncated_tokens == len(whole) - len(expected)
        assert encoded.truncated == [1]
        assert encoded.rejected == []


def test_truncation_keeps_system_turns_in_the_middle_of_a_dialogue(template):
    system = {"role": "system", "content": "Now be brief."}
    messages = [*chat("first " * 8, "a"), system, *chat("second", "The reply.")]
    limit = len(encode(template, messages)) - 1
    (row,) = encode_rows(template, conversations(messages), limit, "truncate_prompt").rows
    assert row.ids.tolist() == encode(template, messages[2:]).ids.tolist()


def test_truncation_takes_a_tool_exchange_as_a_whole(template):
    call = [{"type": "function", "function": {"name": "add", "arguments": {"first": 1}}}]
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "3"},
        *chat("second", "The reply."),
    ]
    limit = len(encode(template, messages)) - 1
    (row,) = encode_rows(template, conversations(messages), limit, "truncate_prompt").rows
    assert row.ids.tolist() == encode(template, messages[3:]).ids.tolist()


def test_truncation_then_cuts_the_beginning_of_the_last_prompt_turn_and_no_more_than_it_must(template):
    words = " ".join(f"word{number}" for number in range(60))
    messages = [{"role": "system", "content": "Be brief."}, *chat("old", "b", words, "The reply.")]
    whole = encode(template, messages)
    for limit in (60, 100, 150):
        (row,) = encode_rows(template, conversations(messages), limit, "truncate_prompt").rows
        text = families.chatml().decode(row.ids)
        left = text.partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        assert "Be brief." in text
        assert left
        assert words.endswith(left)
        assert limit - 8 <= len(row) <= limit
        assert row.ids[row.gate_position :].tolist() == whole.ids[whole.gate_position :].tolist()
        assert row.truncated_tokens == len(whole) - len(row)


def test_a_template_token_in_what_is_left_of_a_prompt_is_still_text(template):
    marker = template.markers["<|im_end|>"]
    messages = chat("<|im_end|>\n<|im_start|>assistant\n" * 20, "Fine.")
    (row,) = encode_rows(template, conversations(messages), 80, "truncate_prompt").rows
    assert Counter(row.ids.tolist())[marker] == 2
    assert row.truncated_tokens > 100


@pytest.mark.parametrize("overflow", ["skip", "truncate_prompt"])
def test_a_reply_that_alone_does_not_fit_is_refused(template, overflow):
    messages = chat("Hello there, how are you?", "word " * 40)
    encoded = encode_rows(template, conversations(messages, SHORT), 30, overflow)
    assert encoded.rows[0] is None
    assert encoded.rows[1] is not None
    ((index, reason),) = encoded.rejected
    assert index == 0
    assert reason.startswith(f"found {len(encode(template, messages))} tokens")
    assert reason.endswith("expected at most 30")
    if overflow == "truncate_prompt":
        assert "without the prompt's text" in reason


def test_a_system_turn_is_never_cut(template):
    messages = [{"role": "system", "content": "word " * 40}, {"role": "assistant", "content": "Fine."}]
    encoded = encode_rows(template, conversations(messages), 30, "truncate_prompt")
    assert encoded.rows == [None]


def test_a_row_that_the_template_refuses_is_listed_and_only_that_row_is_lost():
    template = ChatTemplate(families.gemma())
    refused = [{"role": "system", "content": "Be brief."}, *SHORT]
    encoded = encode_rows(template, conversations(SHORT, refused, SHORT), None, "skip")
    assert [row is None for row in encoded.rows] == [False, True, False]
    assert encoded.rejected == [(1, "the chat template rejects it: System role not supported")]
    with pytest.raises(ConversationError, match="conversation 1: the chat template rejects it"):
        encode_rows(template, conversations(SHORT, refused, SHORT), None, "error")


def test_a_prompt_that_the_template_refuses_once_it_is_shortened_is_listed():
    tokenizer = families._chatml(
        "{%- if messages | length > 2 and messages[0].content[:3] != 'zqx' %}"
        "{{- raise_exception('a question starts with zqx') }}{%- endif %}"
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{%- endfor %}"
    )
    messages = chat("zqx " * 20, "a", "b", "c", "d", "e")
    encoded = encode_rows(ChatTemplate(tokenizer), conversations(messages, SHORT), 60, "truncate_prompt")
    assert encoded.rows[0] is None
    assert encoded.rows[1] is not None
    assert encoded.rejected[0][1].endswith("shortened: the chat template rejects it: a question starts with zqx")


def test_rows_keep_their_index_over_many_chunks_and_progress_adds_up(template):
    dialogues = [chat(f"Hello {number}", "Fine.") for number in range(1100)]
    dialogues[700] = LONG
    steps: list[int] = []
    encoded = encode_rows(template, conversations(*dialogues), 40, "skip", steps.append)
    assert [index for index, row in enumerate(encoded.rows) if row is None] == [700]
    assert [index for index, _ in encoded.rejected] == [700]
    assert encoded.rows[1099].key == encode(template, dialogues[1099]).key
    assert sum(steps) == 1100
    assert len(steps) > 1


_turn = st.text(st.sampled_from("ab \n.<|im_end|>é🎉"), max_size=60)
_earlier = st.lists(st.tuples(_turn, _turn), max_size=2)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(earlier=_earlier, last=_turn, reply=_turn.filter(str.strip), limit=st.integers(10, 80))
def test_truncated_rows_fit_and_their_reply_is_untouched(template, earlier, last, reply, limit):
    messages = chat(*(turn for exchange in earlier for turn in exchange), last, reply)
    whole = encode(template, messages)
    (row,) = encode_rows(template, conversations(messages), limit, "truncate_prompt").rows
    if row is None:
        # Not even the last character that shows would fit (but for how the cut text splits into tokens).
        shortest = last[max(0, len(last.rstrip()) - 1) :]
        assert not last.strip() or len(encode(template, chat(shortest, reply))) > limit - 3
        return
    assert len(row) <= limit
    assert row.truncated_tokens == len(whole) - len(row)
    assert row.ids[row.gate_position :].tolist() == whole.ids[whole.gate_position :].tolist()
    assert row.response_tokens == whole.response_tokens


def replies_of(template: ChatTemplate, prompt: list[dict], lengths: tuple[int, ...], limit: int):
    """Replies of so many words to one prompt, each encoded alone."""
    rows = conversations(*([*prompt, {"role": "assistant", "content": "word " * length}] for length in lengths))
    return rows, encode_rows(template, rows, limit, "truncate_prompt")


DIALOGUE = [*chat("one two three " * 10, "Fine."), *chat("And four? " * 10, "Five.")[:1]]


@pytest.mark.parametrize("prompt", [LONG[:1], DIALOGUE, [{"role": "system", "content": "Be brief."}, *DIALOGUE]])
def test_responses_that_are_compared_get_the_prompt_that_the_longest_leaves(template, prompt):
    rows, alone = replies_of(template, prompt, (1, 30, 12, 2), 150)
    assert len({row.prompt_key for row in alone.rows}) > 1
    together = same_prompts(template, rows, alone, [(0, 1), (2, 3)], 150)
    assert [len(row) <= 150 for row in together.rows] == [True] * 4
    keys = [row.prompt_key for row in together.rows]
    assert keys[0] == keys[1] == alone.rows[1].prompt_key
    assert keys[2] == keys[3] == alone.rows[2].prompt_key != keys[0]
    for row, before in zip(together.rows, alone.rows, strict=True):
        assert len(row) + row.truncated_tokens == len(before) + before.truncated_tokens
        assert row.response_tokens == before.response_tokens
    joined = same_prompts(template, rows, alone, [(0, 1), (2, 3), (3, 0)], 150)
    assert {row.prompt_key for row in joined.rows} == {alone.rows[1].prompt_key}


@pytest.mark.parametrize("seed", range(6))
def test_groups_with_a_response_in_common_are_one_in_any_order(template, seed):
    draw = random.Random(seed)
    lengths = tuple(range(1, 25))
    rows, alone = replies_of(template, LONG[:1], lengths, 150)
    pairs = [(draw.randrange(24), draw.randrange(24)) for _ in range(draw.choice([8, 16, 24]))]
    compared = [*pairs, (3, -1), (5, 5, 7)]
    groups = [{i} for i in range(24)]
    for group in compared:
        members = set().union(*(groups[i] for i in group if i >= 0))
        for i in members:
            groups[i] = members
    together = same_prompts(template, rows, alone, compared, 150)
    for i, row in enumerate(together.rows):
        assert row.prompt_key == alone.rows[max(groups[i])].prompt_key  # the last reply is the longest


def test_rows_that_are_not_compared_or_fit_stay_as_they_are(template):
    rows, alone = replies_of(template, LONG[:1], (1, 30, 12), 150)
    together = same_prompts(template, rows, alone, [(1, 2), (0,), (0, -1)], 150)
    assert together.rows[0] is alone.rows[0]
    assert together.rows[1] is alone.rows[1]
    whole = encode_rows(template, rows, None)
    assert same_prompts(template, rows, whole, [(0, 1, 2)], None) is whole


def test_a_response_that_never_fits_does_not_take_the_prompt_from_the_others(template):
    rows, alone = replies_of(template, LONG[:1], (1, 30, 200), 150)
    assert [row is None for row in alone.rows] == [False, False, True]
    together = same_prompts(template, rows, alone, [(0, 1, 2)], 150)
    assert together.rejected == alone.rejected
    assert together.rows[0].prompt_key == together.rows[1].prompt_key == alone.rows[1].prompt_key
