"""Spans of tokens: each character of a response belongs to one token, for every template and every kind of text."""

from __future__ import annotations

import copy
import unicodedata
from functools import cache

import numpy as np
import pytest

from armorm.backbone.chat_template import ChatTemplate
from armorm.backbone.encoding import encode_rows
from armorm.backbone.token_spans import TokenSpans, token_spans
from armorm.conversation import Conversation
from armorm.errors import ConversationError
from tests.helpers.conversations import chat
from tests.helpers.small_models import tokenizer
from tests.helpers.tokenizers import STYLES, Style

every_style = pytest.mark.parametrize("style", STYLES, ids=repr)

HARD = [
    "A plain sentence. And another one!",
    "  two spaces first",
    "white space last \t \n",
    "\n\nnewlines first\n\n\nand between\n\n",
    "runs  of   spaces     and\ttabs\r\nand lines",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Füchse, café, 今日は。天気がいい。 Привет, ναι, नमस्ते",
    "e\u0301 and é, ﬁ, １２３, \u200bzero\u00a0width\ufeff",
    "🎉👍🏽👩‍👩‍👧 emoji 🇪🇺🎉",
    "שלום עולם, مرحبا بالعالم.",
    "<b>a tag</b> <|im_end|> <|eot_id|> </s> [INST] <0x0A> <|im_",
    "private \ue000\ue001 \U000f0000 \U0010fffd",
    ") starts like the end of something",
    "assistant\n\nuser\n\nassistant",
    "7",
]


@cache
def template_of(style: Style) -> ChatTemplate:
    return ChatTemplate(style.build())


def spans_of(template: ChatTemplate, messages: list[dict]) -> tuple[TokenSpans, np.ndarray]:
    """Spans and ids of the response's tokens."""
    conversation = Conversation.from_messages(messages)
    encoded = template.encode([conversation])[0]
    start = encoded.gate_position + max(len(template.gate_pattern()), 1)
    return token_spans(template, conversation, encoded, start), encoded.ids[start:]


@every_style
@pytest.mark.parametrize("text", HARD)
def test_each_character_belongs_to_exactly_one_token(style, text):
    found, ids = spans_of(template_of(style), chat("Why?", text))
    assert len(found) == len(ids) == len(found.names) == len(found.template)
    assert found.unread == []
    assert found.text == text
    assert found.spans[0, 0] == 0
    assert found.spans[-1, 1] == len(text)
    assert (found.spans[1:, 0] == found.spans[:-1, 1]).all()  # one after the other, without gap or overlap
    assert (found.spans[:, 0] <= found.spans[:, 1]).all()
    assert "".join(text[low:high] for low, high in found.spans) == text


@every_style
@pytest.mark.parametrize("text", HARD)
def test_template_tokens_are_those_around_the_text_and_have_names(style, text):
    found, ids = spans_of(template_of(style), chat("Why?", text))
    low, high = np.flatnonzero(~found.template)[[0, -1]]
    assert not found.template[low : high + 1].any()  # text has no template token inside
    decode = template_of(style).tokenizer.decode
    for token in np.flatnonzero(found.template):
        assert found.spans[token, 0] == found.spans[token, 1]
        assert found.names[token] == (decode([int(ids[token])]) or "▁")
    assert all(found.names)


@pytest.mark.parametrize("style", [style for style in STYLES if style.exact], ids=repr)
@pytest.mark.parametrize("text", [text for text in HARD if unicodedata.is_normalized("NFC", text)])
def test_spans_are_what_the_tokens_decode_to(style, text):
    """In vocabularies that decode to the very text: what the tokens up to each one give back."""
    template = template_of(style)
    found, ids = spans_of(template, chat("Why?", text))
    inside = np.flatnonzero(~found.template)
    decoded = template.tokenizer.decode(ids[inside], clean_up_tokenization_spaces=False)
    lead = decoded.find(text.strip())
    assert lead >= 0
    shift = len(text) - len(text.lstrip()) - lead  # what the template stripped, or merged into the first token
    for last, token in enumerate(inside, 1):
        so_far = template.tokenizer.decode(ids[inside[:last]], clean_up_tokenization_spaces=False).rstrip("\ufffd")
        end = min(len(so_far) + shift, len(text))
        if not text[end:].isspace():
            assert found.spans[token, 1] == max(end, 0)


def test_the_end_of_the_turn_and_the_newline_of_the_template_are_named():
    (chatml,) = (style for style in STYLES if style.name == "chatml")
    found, _ = spans_of(template_of(chatml), chat("Why?", "Because."))
    assert [name for name, of in zip(found.names, found.template, strict=True) if of] == ["\n", "<|im_end|>", "\n"]


def test_a_character_of_several_tokens_belongs_to_the_last_of_them():
    found, _ = spans_of(ChatTemplate(tokenizer()), chat("Why?", "a 🦤 b"))
    whole = [(found.text[low:high], bool(of)) for (low, high), of in zip(found.spans, found.template, strict=True)]
    texts = [text for text, of in whole if not of]
    assert len(texts) > 3
    assert texts[0] == "a"
    assert "".join(texts) == "a 🦤 b"
    assert sum("🦤" in text for text in texts) == 1
    place = next(i for i, text in enumerate(texts) if "🦤" in text)
    assert "" in texts[:place] or " " in texts[:place]  # bytes that are no character yet
    assert "" not in texts[place:]


def test_reasoning_that_the_template_rewrites_is_found_again():
    (qwen3,) = (style for style in STYLES if style.name == "qwen3")
    text = "<think>It is two.</think>The answer is two."
    found, _ = spans_of(template_of(qwen3), chat("1+1?", text))
    assert found.unread == [(0, len("<think>"))]  # the template writes it before every reply that reasons
    assert "".join(text[low:high] for low, high in found.spans) == "It is two.</think>The answer is two."


def test_text_that_the_template_does_not_render_belongs_to_no_token():
    (chatml,) = (style for style in STYLES if style.name == "chatml")
    tokens = copy.deepcopy(chatml.build())
    tokens.chat_template = tokens.chat_template.replace("message.content", "message.content.split('</think>')[-1]")
    found, _ = spans_of(ChatTemplate(tokens), chat("1+1?", "<think>It is two.</think>It is two."))
    assert [found.text[low:high] for low, high in found.unread] == ["<think>It is two.</think>"]
    assert "".join(found.text[low:high] for low, high in found.spans) == "It is two."


def test_a_truncated_prompt_changes_no_span():
    template = ChatTemplate(tokenizer())
    conversation = Conversation.from_messages(chat("Tell me about rivers. " * 40, "They flow. 🎉"))
    whole = template.encode([conversation])[0]
    short = encode_rows(template, [conversation], 60, "truncate_prompt").encoded[0]
    header = len(template.gate_pattern())
    assert len(short) <= 60 < len(whole)
    spans = [token_spans(template, conversation, row, row.gate_position + header).spans for row in (whole, short)]
    assert np.array_equal(*spans)


def test_the_ids_of_another_response_are_an_error():
    template = ChatTemplate(tokenizer())
    one, other = (Conversation.from_messages(chat("Why?", text)) for text in ("Because.", "I do not know."))
    encoded = template.encode([other])[0]
    with pytest.raises(ConversationError, match="expected the same conversation"):
        token_spans(template, one, encoded, encoded.gate_position + len(template.gate_pattern()))
