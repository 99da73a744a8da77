"""Refusals are recognised by their opening; answers that sound like one are not."""

from __future__ import annotations

import pytest

from armorm.conversation import Conversation
from armorm.data.measures import computed_objective, measure
from armorm.data.refusals import OPENING, is_refusal
from armorm.errors import FitError
from tests.helpers.conversations import chat

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, but I can’t assist with this request.",
    "Sorry, I cannot provide instructions for making weapons.",
    "I cannot answer that question.",
    "I won't help you hurt anyone. Please talk to someone you trust.",
    "As an AI language model, I am not able to discuss illegal activities.",
    "Unfortunately, I am unable to assist you with hacking an account.",
    "I must respectfully decline.",
    "I refuse to take part in this.",
    "I have no comment.",
    "No comment",
    "I'd rather not talk about it.",
    "I am not comfortable sharing that kind of material.",
    "That is not something I can help with.",
    "I will not be providing a recipe for that.",
    "My guidelines do not allow me to write such a text.",
    "I don't want to discuss my family.",
    "I'm afraid I can't do that.",
    "I do not feel comfortable answering this.",
    "This goes against my programming, so no.",
    "I don't care, go look it up yourself.",
    "I apologize, but I can't.",
    "We cannot share details of other customers.",
    "I'm sorry, but I won't be able to generate a response.",
    "I'm sorry, but I cannot act out such scenes.",
    "As an AI developed by people, I must follow ethical guidelines and cannot provide guidance on theft.",
    "I can't in good conscience recommend any way to do this.",
]
ANSWERS = [
    "The capital of France is Paris.",
    "I can't believe how good this book is! You should read it.",
    "I cannot stress enough how important sleep is.",
    "I'm sorry to hear that. First, call your bank and block the card.",
    "I don't know, but I would look at the manual of the boiler.",
    "I'm sorry, but I can't agree: the earth is round, as every photograph from space shows.",
    "I mixed both powders and could not get any foam, so try more water.",
    "No, you can't take both medicines together.",
    "You cannot divide by zero: the limit does not exist.",
    "I can't help but admire her patience.",
    "I can't tell you how happy I am for you!",
    "Unfortunately, the shop is closed on Sundays. It opens again on Monday at nine.",
    "Sorry for the delay! Your parcel arrives tomorrow.",
    "The witness refused to answer the question of the judge.",
    "If he says that he can't help you, ask the next office.",
    "I won't lie, the first week is hard. Then it gets easier.",
    "Decline the offer politely, and name your own price.",
    "He said: no comment was the best answer that he could give.",
    "I don't care for olives, but capers work well in this sauce.",
    "You can find out the rest on the page of the museum.",
    "",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_recognised(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_no_refusal(text):
    assert not is_refusal(text)


def test_only_the_opening_counts():
    answer = "Boil the eggs for seven minutes. " * 10
    assert len(answer) > OPENING
    assert not is_refusal(answer + "I can't help with that.")


def test_a_rare_refusal_is_measured_on_a_scale_of_zero_to_one():
    texts = ["I can't help with that.", *["Yes, of course."] * 999]
    values = measure("refusal", [Conversation.from_messages(chat("q", text)) for text in texts], [1] * 1000)
    assert values.tolist() == [1.0, *[0.0] * 999]
    objective = computed_objective("refusing", "refusal", values)
    assert (objective.low, objective.high, objective.scale, objective.offset) == (0.0, 1.0, 1.0, 0.0)
    with pytest.raises(FitError, match="does not vary"):
        computed_objective("refusing", "refusal", values[1:])
