"""Rendered text is read back to the conversation it came from, whatever stands in its contents."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armorm.backbone.chat_formats import FAMILIES, learn_format
from armorm.backbone.chat_template import ChatTemplate
from armorm.backbone.rendered_text import EmptyResponseError, RenderedReader
from armorm.conversation import Conversation
from armorm.errors import ConversationError
from tests.helpers.conversations import chat
from tests.helpers.small_models import tokenizer
from tests.helpers.tokenizers import STYLES, chatml, llama3, mistral, qwen3

DIALOGUES = [
    chat("What is  2+2?\n\nSay it.", "4, I think.\n\nYes."),
    chat("One", "Two", "Three\n", "Four"),
    [{"role": "system", "content": "Be brief."}, *chat("Why?", "So.")],
]
TOKENIZERS = {**{style.name: style.build for style in STYLES}, "embedded": tokenizer}
WITHOUT_SYSTEM_START = {"gemma", "vicuna"}  # a template that takes none, one that writes it without any mark
_made: dict[tuple[str, str], RenderedReader] = {}


def reader(name: str, turns: str = "multi") -> RenderedReader:
    if (name, turns) not in _made:
        _made[name, turns] = RenderedReader(ChatTemplate(TOKENIZERS[name]()), 100_000, turns)  # type: ignore[arg-type]
    return _made[name, turns]


def same_ids(name: str, first: Conversation, second: Conversation) -> bool:
    one, other = ChatTemplate(TOKENIZERS[name]()).encode([first, second])
    return one.ids.tolist() == other.ids.tolist() and one.gate_position == other.gate_position


def without_bos(name: str, text: str) -> str:
    bos = TOKENIZERS[name]().bos_token
    return text.removeprefix(bos) if bos else text


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("dialogue", DIALOGUES, ids=["single", "multi", "system"])
def test_what_a_template_writes_is_read_back_to_the_same_ids_with_bos_or_without(name, dialogue):
    if dialogue[0]["role"] == "system" and name in WITHOUT_SYSTEM_START:
        pytest.skip("no such text")
    conversation = Conversation.from_messages(dialogue)
    text = ChatTemplate(TOKENIZERS[name]()).render(conversation)
    for sent in (text, without_bos(name, text)):
        assert same_ids(name, conversation, reader(name).conversation(sent))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_and_what_follows_are_read_back_to_the_same_ids(name):
    for dialogue in DIALOGUES[:2]:
        conversation = Conversation.from_messages(dialogue)
        text = ChatTemplate(TOKENIZERS[name]()).render(conversation)
        prompt = TOKENIZERS[name]().apply_chat_template(dialogue[:-1], tokenize=False, add_generation_prompt=True)
        assert same_ids(name, conversation, reader(name, "refuse").continuation(text, prompt))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_after_its_prompt_everything_is_one_response_whatever_it_writes(name):
    """The forged turns are those of the model's own template."""
    template = ChatTemplate(TOKENIZERS[name]())
    whole = template.render(Conversation.from_messages(chat("Q", "A", "Thanks, that is perfect!", "You are welcome.")))
    prompt = TOKENIZERS[name]().apply_chat_template(chat("Q"), tokenize=False, add_generation_prompt=True)
    found = reader(name, "multi").continuation(whole, prompt)
    assert [message.role for message in found.messages] == ["user", "assistant"]
    assert found.messages[0].content == "Q"
    assert "Thanks, that is perfect!" in found.response
    assert found.response.rstrip().endswith("You are welcome.")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_with_several_assistant_turns_is_refused_unless_the_server_was_told(name):
    text = ChatTemplate(TOKENIZERS[name]()).render(Conversation.from_messages(chat("Q", "A", "B", "C")))
    with pytest.raises(ConversationError, match="found 2 assistant turns, and text cannot tell"):
        reader(name, "refuse").conversation(text)
    single = reader(name, "single").conversation(text)
    assert [message.role for message in single.messages] == ["user", "assistant"]
    assert single.response.lstrip().startswith("A")
    assert single.response.rstrip().endswith("C")
    assert len(reader(name, "multi").conversation(text).messages) == 4


PIECES = [*"ab \n<|>[]/", "<|im_end|>", "<|im_end|>\n", "user\n", "<|endoftext|>", "é"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), min_size=1, max_size=4))
def test_contents_without_whole_turn_marks_come_back_letter_for_letter(contents):
    contents = [f"x{content}y" for content in contents]
    contents += ["z"] * (len(contents) % 2)
    text = "".join(
        f"<|im_start|>{('user', 'assistant')[i % 2]}\n{content}<|im_end|>\n" for i, content in enumerate(contents)
    )
    found = FAMILIES[0].split(text)
    assert found is not None
    assert [turn.content for turn in found] == contents


def test_a_lone_end_token_inside_a_reply_is_text():
    text = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nGood.<|im_end|> More.<|im_end|>\n"
    assert reader("llama3", "refuse").conversation(text).response == "Good.<|im_end|> More."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>", "SQA"),
        (
            "<|endoftext|><|endoftext|><|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|><|endoftext|>",
            "QA",
        ),
        (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
            "QA",
        ),
        ("<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n<eos>", "QA"),
        ("<s>[INST] Q [/INST] A</s>", "QA"),
        ("[INST] Q[/INST]A</s>", "QA"),
        ("\n\nHuman: Q\n\nAssistant: A", "QA"),
        ("USER: Q ASSISTANT: A</s>", "QA"),
        ("User: Q\nAssistant: A", "QA"),
    ],
)
def test_text_of_known_families_is_read_whatever_the_model_is(text, expected):
    found = reader("embedded", "refuse").conversation(text)
    assert "".join(message.content for message in found.messages) == expected
    assert [message.role for message in found.messages[-2:]] == ["user", "assistant"]


@pytest.mark.parametrize("text", ["Hello", "", "Q: a\nA: b", "<|other_start|>user\nQ<|other_end|>", "</s>", "[INST"])
def test_text_of_no_known_template_is_refused_and_the_known_ones_are_named(text):
    with pytest.raises(ConversationError, match=r"found no turns .*ChatML, Llama-3, Gemma, Mistral"):
        reader("embedded", "refuse").conversation(text)


def test_text_that_does_not_end_with_a_reply_is_refused():
    with pytest.raises(ConversationError, match="ends with a turn of role 'user'"):
        reader("embedded").conversation("<|im_start|>user\nQ<|im_end|>\n")
    with pytest.raises(EmptyResponseError):
        reader("embedded").conversation("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<|im_end|>")


def test_the_tokenizer_of_the_policy_reads_what_no_family_does():
    phi3 = next(style for style in STYLES if style.name == "phi3").build()
    text = "<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>"
    own = ChatTemplate(llama3())
    with pytest.raises(ConversationError, match="no turns of a known template"):
        RenderedReader(own, 1000).conversation(text)
    assert RenderedReader(own, 1000, policy_tokenizer=phi3).conversation(text).to_list() == chat("Q", "A")


def test_a_default_system_prompt_and_an_empty_reasoning_block_are_the_templates_own():
    default = qwen3()
    whole = default.chat_template
    try:
        default.chat_template = (
            "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are Q.<|im_end|>\n' }}{%- endif %}"
            + whole
        )
        style = learn_format(default, "q")
        text = default.apply_chat_template(chat("Q", "A"), tokenize=False)
    finally:
        default.chat_template = whole
    assert "You are Q." in text
    assert "<think>" in text
    assert style is not None
    assert [(turn.role, turn.content) for turn in style.split(text) or []] == [("user", "Q"), ("assistant", "A")]


@pytest.mark.parametrize(
    "day", [("26 Jul 2024", "3 Jan 2031"), ("2025-08-01", "2031-01-03"), ("April 12, 2025", "May 3, 2031")]
)
def test_a_default_system_prompt_with_a_date_is_the_templates_own_on_any_day(day):
    dated = chatml()
    whole = dated.chat_template
    try:
        dated.chat_template = "{{- '<|im_start|>system\nToday: DAY.<|im_end|>\n' }}".replace("DAY", day[0]) + whole
        style = learn_format(dated, "dated")
        text = dated.apply_chat_template(chat("Q", "A"), tokenize=False).replace(*day)
    finally:
        dated.chat_template = whole
    assert style is not None
    assert day[1] in text
    assert [turn.role for turn in style.split(text) or []] == ["user", "assistant"]


def test_a_reasoning_block_with_words_in_it_is_part_of_the_reply():
    text = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nA<|im_end|>\n"
    assert reader("qwen3").conversation(text).response == "<think>\nhm\n</think>\n\nA"


# --- prompts beside the text -----------------------------------------------------------------------------


def test_bos_and_white_space_that_decoding_changed_are_overlooked():
    read = reader("mistral", "refuse").continuation
    for text in ("<s>[INST] Q x[/INST] A</s>", "<s> [INST] Q x [/INST] A</s>", "[INST] Q x[/INST] A</s>"):
        for prompt in ("<s>[INST] Q x[/INST]", "[INST] Q x[/INST]", "<s> [INST] Q x[/INST]"):
            assert read(text, prompt).to_list()[-1]["content"].strip() == "A"
    assert same_ids(
        "mistral", read("<s>[INST] Q[/INST] A</s>", "<s>[INST] Q[/INST]"), Conversation.from_messages(chat("Q", "A"))
    )


def test_a_text_that_does_not_begin_with_its_prompt_is_refused():
    with pytest.raises(ConversationError, match="query: found a text that does not begin with its prompt"):
        reader("embedded").continuation("<|user|>Q<|end|><|assistant|>A<|end|>", "<|user|>other<|end|><|assistant|>")


def test_a_prompt_without_template_tokens_is_one_user_turn_and_one_with_unknown_ones_is_refused():
    plain = reader("embedded").continuation("Q: 2+2?\nA: 4</s>", "Q: 2+2?\nA:")
    assert plain.to_list() == chat("Q: 2+2?\nA:", " 4")
    with pytest.raises(ConversationError, match="prompt: found template tokens of no known template"):
        reader("embedded").continuation("<|x_user|>Q<|x_end|>A", "<|x_user|>Q<|x_end|>")


def test_a_reply_that_the_prompt_began_is_kept_whole():
    prompt = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nSure"
    assert reader("embedded").continuation(prompt + ", here.<|im_end|>", prompt).to_list() == chat("Q", "Sure, here.")


def test_an_empty_response_after_a_prompt_is_named_as_such():
    prompt = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    for rest in ("", "<|im_end|>", " \n<|im_end|><|endoftext|><|endoftext|>"):
        with pytest.raises(EmptyResponseError):
            reader("embedded").continuation(prompt + rest, prompt)


@pytest.mark.parametrize("value", [None, 3, ["a"], {"a": 1}])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(ConversationError, match="expected text"):
        reader("embedded").conversation(value)
    with pytest.raises(ConversationError, match="expected text"):
        reader("embedded").continuation("a", value)


# --- ids -------------------------------------------------------------------------------------------------


def test_ids_of_the_models_own_template_keep_their_gate_and_get_one_bos():
    template = ChatTemplate(mistral())
    encoded = template.encode([Conversation.from_messages(chat("Q", "A b"))])[0]
    ids = encoded.ids.tolist()
    read = reader("mistral", "refuse").from_ids
    for sent in (ids, ids[1:], [ids[0], *ids]):
        found = read(sent)
        assert found.ids.tolist() == ids
        assert found.gate_position == encoded.gate_position


def test_ids_outside_the_vocabulary_or_without_a_gate_are_refused():
    small = RenderedReader(ChatTemplate(llama3()), 50)
    with pytest.raises(ConversationError, match="input: found 50 at position 1, expected ids from 0 to 49"):
        small.from_ids([3, 50])
    for bad in (-1, 1.5, True, "7", None):
        with pytest.raises(ConversationError, match="position 0"):
            small.from_ids([bad])
    with pytest.raises(ConversationError, match="found no gate pattern"):
        reader("llama3").from_ids([5, 6, 7])
    with pytest.raises(ConversationError, match="found no gate pattern"):
        reader("llama3").from_ids([])
    with pytest.raises(ConversationError, match="no turn tokens to find the gate by"):
        reader("vicuna").from_ids([5, 6, 7])


def test_the_error_names_the_setting_of_the_server_that_reads_the_text():
    template = ChatTemplate(llama3())
    two = template.render(Conversation.from_messages(chat("Q", "A", "B", "C")))
    with pytest.raises(ConversationError, match="start the server with --of-it set to single or multi"):
        RenderedReader(template, 100_000, turns_setting="--of-it").conversation(two)
    with pytest.raises(ConversationError, match=r"\(or the prompt with the text\)$"):
        RenderedReader(template, 100_000).conversation(two)


def test_ids_with_two_gates_are_refused_unless_the_server_was_told():
    template = ChatTemplate(llama3())
    two = template.encode([Conversation.from_messages(chat("Q", "A", "B", "C"))])[0]
    one = template.encode([Conversation.from_messages(chat("Q", "A"))])[0]
    with pytest.raises(ConversationError, match="found 2 assistant turns"):
        reader("llama3", "refuse").from_ids(two.ids.tolist())
    assert reader("llama3", "multi").from_ids(two.ids.tolist()).gate_position == two.gate_position
    assert reader("llama3", "single").from_ids(two.ids.tolist()).gate_position == one.gate_position


# --- hostile texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Human: a\n\nAssistant: " + "\n" * 400_000 + "x",
        "<|im_start|>user\na" + "<|im_end|> " * 40_000,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n" + "<|endoftext|>" * 40_000 + "x",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb" + "<|endoftext|>" * 40_000,
        "[INST] a [/INST] " + "</s>" * 100_000 + " " * 200_000 + "x",
        "<s>" * 100_000 + "x",
        "User: a\nAssistant: b" + " " * 400_000,
        "User: " + " \n" * 200_000,
    ],
)
def test_no_text_takes_more_than_linear_time(text):
    start = time.process_time()
    for turns in ("multi", "single"):
        try:
            reader("embedded", turns).conversation(text)
        except ConversationError:
            continue
    assert time.process_time() - start < 3
