"""Scores by token: exact sums for means, estimates named as such, in parts of the text, in pairs, in batches."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from armorm import ArmoRM
from armorm.backbone.decoder import Backbone
from armorm.backbone.readout import Readout
from armorm.conversation import Conversation
from armorm.errors import ArmormError, ConversationError
from armorm.explain.integrated_gradients import attribute_last_state
from armorm.explain.text_spans import sentences, words
from armorm.explain.token_attribution import token_rewards
from armorm.explain.token_map import TokenMap
from armorm.files import EMBEDDED_BACKBONE, embedded_path
from armorm.objectives import ObjectiveError
from tests.helpers.backbones import FAMILIES, OTHER_POSITIONS, STATEFUL, backbone_of, families
from tests.helpers.conversations import chat
from tests.helpers.small_models import OBJECTIVES, changed, reward_model

POOLINGS = ("mean", "last+mean", "last")
PROMPT = "What is the capital of France?"
PARIS = "I believe it is Paris. It lies on the Seine, e.g. near Versailles!  \n\nBut do look it up: 🎉 it's great."
ROME = "Rome. I am sure of it, and it has 3.5 times as many cats."
CONVERSATIONS = [
    chat(PROMPT, PARIS),
    chat(PROMPT, ROME),
    chat("Hi", "Hello! " * 30),
    chat("Say it in Japanese.", "今日は。天気がいい。"),
    chat("Name a prime.", "Seven.", "A larger one?", "Eleven."),
]


@pytest.fixture(scope="module")
def models() -> dict[str, ArmoRM]:
    """By pooling, with an intercept."""
    return {pooling: reward_model(readout=Readout(pooling=pooling), intercept=True) for pooling in POOLINGS}


def slow_token_contributions(rm: ArmoRM, messages: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(t, k) of the mean and (k,) of the last token, one token and one objective at a time, from `hidden_states`."""
    encoded = rm.backbone.template.encode([Conversation.from_messages(messages)])[0]
    with torch.no_grad():
        ids = torch.from_numpy(encoded.ids.astype(np.int64))[None]
        states = rm.backbone.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].double().numpy()
        gating = rm.model(ids, gate_positions=torch.tensor([encoded.gate_position])).gating_output[0].double().numpy()
    response = states[encoded.gate_position + len(rm.backbone.template.gate_pattern()) :]
    weight = rm.model.regression_layer.weight.detach().double().numpy()
    bias = rm.model.regression_layer.bias.detach().double().numpy()
    d, transform, pooling = states.shape[1], rm.transform, rm.backbone.readout.pooling
    by_token, last = np.zeros((len(response), len(weight))), np.zeros(len(weight))
    for k in range(len(weight)):
        coefficient = sum(gating[j] * transform[k, j] for j in range(len(weight)))
        mean_weight = {"mean": weight[k], "last+mean": weight[k][d:], "last": None}[pooling]
        if pooling != "mean":
            last[k] = coefficient * (weight[k][:d] @ response[-1] + (bias[k] if pooling == "last" else 0.0))
        if mean_weight is not None:
            for t, state in enumerate(response):
                by_token[t, k] = coefficient * (mean_weight @ state + bias[k]) / len(response)
    return by_token, last


# --- exact sums ----------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_for_a_mean_the_sum_over_tokens_and_objectives_is_the_score(models, messages):
    rm = models["mean"]
    shown, batch = rm.explain(messages, tokens=True), rm.score([messages])
    found = shown.token_contributions
    assert found.dtype == np.float64
    assert found.shape == (len(shown.tokens.places), len(OBJECTIVES))
    np.testing.assert_allclose(found.sum(0), batch.contributions[0], atol=1e-5)
    assert found.sum() == pytest.approx(float(batch.scores[0]), abs=1e-5)
    np.testing.assert_allclose(shown.tokens.unattributed, 0, atol=1e-12)
    assert shown.tokens.exact_share == 1
    assert shown.tokens.completeness_error is None


@pytest.mark.parametrize("pooling", ["mean", "last+mean"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_contributions_are_those_of_each_hidden_state(models, pooling, messages):
    tokens = models[pooling].explain(messages, tokens=True).tokens
    by_token, last = slow_token_contributions(models[pooling], messages)
    np.testing.assert_allclose(tokens.token_contributions, by_token, atol=1e-6)
    np.testing.assert_allclose(tokens.last_contributions, last, atol=1e-6)


def test_of_two_parts_both_are_told_apart_and_sum_to_the_contributions(models):
    rm = models["last+mean"]
    shown, batch = rm.explain(CONVERSATIONS[0], tokens=True), rm.score(CONVERSATIONS[:1])
    tokens = shown.tokens
    whole = tokens.token_contributions.sum(0) + tokens.last_contributions
    np.testing.assert_allclose(whole, batch.contributions[0], atol=1e-5)
    np.testing.assert_allclose(tokens.unattributed, tokens.last_contributions, atol=1e-12)
    sizes = [np.abs(part).sum() for part in (tokens.token_contributions.sum(0), tokens.last_contributions)]
    assert tokens.exact_share == pytest.approx(sizes[0] / sum(sizes))
    assert 0 < tokens.exact_share < 1


def test_the_prompt_acts_through_the_coefficients_alone(models):
    rm = models["mean"]
    tokens, batch = rm.explain(CONVERSATIONS[0], tokens=True).tokens, rm.score(CONVERSATIONS[:1])
    np.testing.assert_allclose(tokens.coefficients, batch.coefficients[0], atol=1e-7)
    np.testing.assert_allclose(tokens.mean_rewards.sum(0), batch.rewards[0], atol=1e-5)
    np.testing.assert_allclose(tokens.token_contributions, tokens.coefficients * tokens.mean_rewards)


@pytest.mark.parametrize("pooling", ["mean", "last+mean"])
def test_steered_models_are_sums_too(models, pooling):
    steered = models[pooling].steer({"beaver-harm": 3.0}, pin={"code-style": 0.4}, debias_strength=0.5)
    batch = steered.score(CONVERSATIONS[:2], per_token=True)
    tokens = [steered.explain(messages, tokens=True).tokens for messages in CONVERSATIONS[:2]]
    for row, found in enumerate(tokens):
        np.testing.assert_allclose(found.contributions, batch.contributions[row], atol=1e-5)
        assert batch.token_scores[row].sum() == pytest.approx(float(batch.scores[row]), abs=1e-9)
    plain = models[pooling].explain(CONVERSATIONS[0], tokens=True).tokens
    assert np.abs(plain.coefficients - tokens[0].coefficients).max() > 0.01


def test_a_lower_layer_gives_the_same_sums():
    rm = reward_model(readout=Readout(pooling="mean", layer=1, layers=2))
    shown = rm.explain(CONVERSATIONS[0], tokens=True)
    assert shown.token_contributions.sum() == pytest.approx(float(rm.score(CONVERSATIONS[:1]).scores[0]), abs=1e-5)


def test_in_bfloat16_sums_differ_by_rounding_alone():
    """A hundredth of the reference scores' standard deviation; promise 1 allows 0.02 for a batch."""
    rm = reward_model(readout=Readout(pooling="mean"), dtype=torch.bfloat16)
    batch = rm.score(CONVERSATIONS, per_token=True)
    for row, messages in enumerate(CONVERSATIONS):
        found = rm.explain(messages, tokens=True).token_contributions.sum()
        assert abs(found - float(batch.scores[row])) < 0.01 * rm.reference["score_std"]
        assert batch.token_scores[row].sum() == pytest.approx(float(batch.scores[row]), abs=1e-9)


@pytest.mark.slow
def test_the_sums_hold_for_the_small_backbone(small_backbone_path):
    backbone = Backbone.load(small_backbone_path, dtype="float32", device="cpu", layer=18, pooling="last+mean")
    head = torch.nn.Linear(backbone.response_size, 3)
    encoded = backbone.template.encode([Conversation.from_messages(messages) for messages in CONVERSATIONS[:2]])
    response = backbone.features(encoded)[1]
    for row, states in enumerate(backbone.response_states(encoded)):
        mean, last = token_rewards(states, head, backbone.readout)
        with torch.no_grad():
            expected = head(torch.from_numpy(response[row])).numpy()
        np.testing.assert_allclose(mean.sum(0) + last, expected, atol=1e-5 * np.abs(expected).max() + 1e-5)


# --- integrated gradients ------------------------------------------------------------------------


def test_gradients_sum_to_the_change_from_the_baseline_and_say_how_well(models):
    rm = models["last"]
    encoded = rm.backbone.template.encode([Conversation.from_messages(CONVERSATIONS[1])])[0]
    directions = rm.model.regression_layer.weight.detach()[:2]
    few, many = (attribute_last_state(rm.backbone, encoded, directions, steps=steps) for steps in (2, 32))
    start, neutral = rm.backbone.response_start(encoded), rm.tokenizer.encode("\n", add_special_tokens=False)[-1]
    baseline = encoded.ids.astype(np.int64).copy()
    baseline[start:] = neutral
    with torch.no_grad():
        ends = [
            rm.backbone.model(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0, -1] @ directions.T
            for ids in (encoded.ids.astype(np.int64), baseline)
        ]
    change = (ends[0] - ends[1]).double().numpy()
    for attributed, error in (few, many):
        np.testing.assert_allclose(attributed.sum(0) - change, error, atol=1e-4)
    assert np.abs(many[1]).max() < 0.02 * np.abs(change).max()
    assert np.abs(many[1]).max() < np.abs(few[1]).max()
    assert many[0].shape == (len(encoded) - start, len(directions))


@pytest.mark.parametrize("family", families(*FAMILIES, *OTHER_POSITIONS, *STATEFUL))
def test_gradients_after_a_cached_prompt_are_those_of_the_whole_text(family):
    tokenizer = AutoTokenizer.from_pretrained(embedded_path(EMBEDDED_BACKBONE))
    backbone = Backbone(family, backbone_of(family), tokenizer)
    row = backbone.template.encode([Conversation.from_messages(chat("One two three four?", "Five six."))])[0]
    start, embed = backbone.response_start(row), backbone.model.get_input_embeddings()
    direction = torch.randn(1, backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    found, _ = attribute_last_state(backbone, row, direction, steps=2)
    every = embed(torch.from_numpy(row.ids.astype(np.int64))[None]).detach()
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1:]
    neutral = every.clone()
    neutral[:, start:] = embed(torch.tensor([newline])).detach()
    slopes = []
    for node in (0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5):
        point = (neutral + node * (every - neutral)).requires_grad_()
        state = backbone.model(inputs_embeds=point, use_cache=False).last_hidden_state[0, -1]
        slopes.append(torch.autograd.grad(direction[0] @ state, point)[0])
    expected = (torch.stack(slopes).mean(0) * (every - neutral)).sum(-1)[0, start:].double().numpy()
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-3 * np.abs(expected).max())


def test_for_the_last_token_all_is_an_estimate_that_names_its_error(models):
    rm = models["last"]
    shown = rm.explain(CONVERSATIONS[1], tokens=True)
    tokens = shown.tokens
    assert tokens.exact_share == 0
    assert 0 < tokens.completeness_error < 0.1
    np.testing.assert_allclose(tokens.contributions, rm.score(CONVERSATIONS[1:2]).contributions[0], atol=1e-5)
    np.testing.assert_allclose(tokens.token_contributions.sum(0) + tokens.unattributed, tokens.contributions)
    assert np.abs(tokens.token_contributions).max() > 0.01


def test_of_two_parts_the_last_is_attributed_on_request(models):
    plain, both = (models["last+mean"].explain(CONVERSATIONS[1], tokens=way).tokens for way in (True, "gradient"))
    assert plain.gradient_rewards is None
    assert both.completeness_error > 0
    np.testing.assert_allclose(both.mean_rewards, plain.mean_rewards)
    assert np.abs(both.token_contributions - plain.token_contributions).max() > 0.01
    assert both.exact_share == plain.exact_share


# --- parts of the text ---------------------------------------------------------------------------


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_words_sentences_and_template_tokens_sum_to_the_whole(models, messages):
    shown = models["mean"].explain(messages, tokens=True)
    whole = shown.token_contributions.sum(0)
    parts = (shown.words(), shown.sentences(), shown.spans([(0, len(messages[-1]["content"]))]))
    for found in parts[:2]:
        white = np.setdiff1d(
            np.arange(len(shown.tokens.places.text)), [c for p in found for c in range(p.start, p.end)]
        )
        rest = shown.spans([(int(place), int(place) + 1) for place in white])  # tokens of white space alone
        total = sum(part.contributions for part in (*found, *alone(shown, rest)))
        np.testing.assert_allclose(total + shown.tokens.template_contributions, whole, atol=1e-9)
    (everything,) = parts[2]
    np.testing.assert_allclose(everything.contributions + shown.tokens.template_contributions, whole, atol=1e-9)
    template = shown.tokens.places.template
    assert everything.tokens == (~template).sum()
    np.testing.assert_allclose(everything.deviations, 0, atol=1e-9)


def alone(shown, parts):
    """Parts of white space, of the tokens that have no other text."""
    places = shown.tokens.places
    blank = [not places.text[low:high].strip() for low, high in places.spans]
    inside = {c for (low, high), of in zip(places.spans, blank, strict=True) if of for c in range(low, high)}
    return [part for part in parts if part.start in inside]


def test_a_token_that_is_cut_counts_by_its_characters(models):
    shown = models["mean"].explain(chat(PROMPT, "Paris is great."), tokens=True)
    places = shown.tokens.places
    long = max(range(len(places)), key=lambda token: len(places.text[slice(*places.spans[token])].strip()))
    low, high = (int(place) for place in places.spans[long])
    low += places.text[low].isspace()
    (first,), (whole,) = shown.spans([(low, low + 1)]), shown.spans([(low, high)])
    assert first.tokens == pytest.approx(1 / (high - low))
    assert whole.tokens == pytest.approx(1)
    np.testing.assert_allclose(whole.contributions, shown.token_contributions[long])
    np.testing.assert_allclose(first.contributions, shown.token_contributions[long] / (high - low))


@pytest.mark.parametrize("span", [(0, 0), (3, 2), (-1, 4), (0, 1000)])
def test_a_span_outside_of_the_response_is_an_error(models, span):
    with pytest.raises(ConversationError, match=r"expected one inside the \d+ characters"):
        models["mean"].explain(CONVERSATIONS[1], tokens=True).spans([span])
    with pytest.raises(ConversationError, match=r"expected one inside the \d+ characters"):
        models["mean"].occlude(CONVERSATIONS[1], [span])


def test_sentences_end_at_marks_and_lines_but_not_at_abbreviations_or_numbers():
    def texts(text: str) -> list[str]:
        return [text[low:high] for low, high in sentences(text)]

    assert texts(PARIS) == [
        "I believe it is Paris.",
        "It lies on the Seine, e.g. near Versailles!",
        "But do look it up: 🎉 it's great.",
    ]
    assert texts("It is 12. Dr. Smith (of U.S. fame) agrees.") == ["It is 12.", "Dr. Smith (of U.S. fame) agrees."]
    assert texts("1. First\n2. Second\n") == ["1. First", "2. Second"]
    assert texts('He said "no." Then he left…') == ['He said "no."', "Then he left…"]
    assert texts("今日は。天気がいい。") == ["今日は。", "天気がいい。"]
    assert texts("  no end ") == ["no end"]
    assert texts(" \n ") == []


def test_words_are_without_white_space_and_single_characters_in_scripts_without_spaces():
    def texts(text: str) -> list[str]:
        return [text[low:high] for low, high in words(text)]

    assert texts(" it's  a\ttest,\nnamed e\u0301! ") == ["it's", "a", "test,", "named", "e\u0301!"]
    assert texts("今日は。ok नमस्ते") == ["今", "日", "は。", "ok", "नमस्ते"]


# --- occlusion and comparison --------------------------------------------------------------------


def test_occlusion_scores_the_response_without_each_sentence(models):
    rm = models["last"]
    found = rm.occlude(chat(PROMPT, "One. Two, e.g. three!\nFour."))
    assert [part.text for part in found] == ["One.", "Two, e.g. three!", "Four."]
    without = ["Two, e.g. three!\nFour.", "One. Four.", "One. Two, e.g. three!"]
    batch = rm.score([chat(PROMPT, text) for text in ("One. Two, e.g. three!\nFour.", *without)])
    for part, row in zip(found, (1, 2, 3), strict=True):
        assert part.change == pytest.approx(float(batch.scores[0] - batch.scores[row]), abs=1e-5)
        np.testing.assert_allclose(part.changes, batch.contributions[0] - batch.contributions[row], atol=1e-5)


def test_without_its_only_sentence_nothing_remains(models):
    (part,) = models["last"].occlude(chat(PROMPT, "Paris."))
    assert np.isnan(part.change)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_sentences_of_both_responses_carry_the_margin(models, pooling):
    found = models[pooling].compare(PROMPT, PARIS, ROME, tokens=True)
    assert {share.response for share in found.sentences} == {"A", "B"}
    assert [
        share.text for share in sorted(found.sentences, key=lambda share: share.start) if share.response == "B"
    ] == [
        "Rome.",
        "I am sure of it, and it has 3.5 times as many cats.",
    ]
    sizes = [abs(share.difference) for share in found.sentences]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(share.difference for share in found.sentences) + found.other_difference == pytest.approx(found.margin)
    for share in found.sentences:
        assert sum(share.differences.values()) == pytest.approx(share.difference)
    entry = found.to_dict()["sentences"]
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    text = str(found)
    assert all(share.text in text for share in found.sentences)
    assert "all else" in text


def test_for_a_mean_the_margin_is_that_of_the_tokens_of_both(models):
    """From the definition, and the same for the responses in the other order."""
    rm = models["mean"]
    found = rm.compare(CONVERSATIONS[0], CONVERSATIONS[1], tokens=True)
    one, two = (rm.explain(messages, tokens=True) for messages in CONVERSATIONS[:2])
    texts = [found.token_contributions[~found.tokens.places.template].sum(1) for found in (one, two)]
    middle = (texts[0].sum() + texts[1].sum()) / 2
    share = next(share for share in found.sentences if share.response == "A" and share.start == 0)
    part = one.sentences()[0]
    expected = part.contributions.sum() - part.tokens / len(texts[0]) * middle
    assert share.difference == pytest.approx(expected, abs=1e-6)
    mirrored = rm.compare(CONVERSATIONS[1], CONVERSATIONS[0], tokens=True)
    by_text = {share.text: share.difference for share in mirrored.sentences}
    assert all(by_text[share.text] == pytest.approx(-share.difference, abs=1e-6) for share in found.sentences)


def test_for_a_mean_all_else_is_what_template_tokens_and_white_space_carry(models):
    rm = models["mean"]
    found = rm.compare(PROMPT, "Paris, of course.", "Rome, I think.", tokens=True)
    one, two = (rm.explain(chat(PROMPT, text), tokens=True).tokens for text in ("Paris, of course.", "Rome, I think."))
    expected = (one.template_contributions - two.template_contributions).sum()
    assert found.other_difference == pytest.approx(expected, abs=1e-5)
    assert abs(found.other_difference) < abs(found.margin)


def test_a_prompt_and_two_responses_are_compared_like_two_conversations(models):
    rm = models["mean"]
    assert rm.compare(PROMPT, PARIS, ROME).to_dict() == rm.compare(*CONVERSATIONS[:2]).to_dict()
    assert rm.compare(PROMPT, PARIS, PARIS, tokens=True).margin == 0
    with pytest.raises(TypeError, match="expected two conversations"):
        rm.compare(PROMPT)


# --- scores per token ----------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
def test_scores_per_token_are_the_contributions_and_the_last_token_has_its_own(models, pooling):
    rm = models[pooling]
    batch = rm.score(CONVERSATIONS, per_token=True)
    assert batch.to_pandas().equals(rm.score(CONVERSATIONS).to_pandas())
    for row, messages in enumerate(CONVERSATIONS):
        by_token, last = slow_token_contributions(rm, messages)
        expected = by_token.sum(1)
        expected[-1] += last.sum()
        np.testing.assert_allclose(batch.token_scores[row], expected, atol=1e-5)
        assert batch.token_scores[row].sum() == pytest.approx(float(batch.scores[row]), abs=1e-9)
        text = messages[-1]["content"]
        assert "".join(text[low:high] for low, high in batch.token_spans[row]) == text


def test_scores_per_token_do_not_depend_on_the_batch(models):
    rm = models["mean"]
    whole = rm.score(CONVERSATIONS, per_token=True)
    small = rm.score(CONVERSATIONS, per_token=True, batch_tokens=64)
    for row, messages in enumerate(CONVERSATIONS):
        alone = rm.score([messages], per_token=True)
        for other in (alone.token_scores[0], small.token_scores[row]):
            np.testing.assert_allclose(whole.token_scores[row], other, atol=1e-6)
    part = whole.take([2, 0])
    assert part.token_scores == [whole.token_scores[2], whole.token_scores[0]]
    masked = whole.take(np.arange(len(whole)) == 1)
    assert len(masked.token_spans) == 1
    assert masked.token_spans[0] is whole.token_spans[1]


def test_normalised_scores_per_token_sum_to_the_normalised_score(models):
    rm = models["mean"]
    plain = rm.score(CONVERSATIONS, per_token=True)
    batch = rm.score(CONVERSATIONS, per_token=True, normalize=True)
    for row, values in enumerate(batch.token_scores):
        assert values.sum() == pytest.approx(float(batch.scores[row]), abs=1e-9)
        expected = (plain.token_scores[row] - rm.reference["score_mean"] / len(values)) / rm.reference["score_std"]
        np.testing.assert_allclose(values, expected, atol=1e-5)


def test_rejected_rows_and_truncated_prompts_keep_their_places(models):
    rm = changed(models["mean"], limits={"max_length": 60, "overflow": "truncate_prompt"})
    rows = [chat("Tell me about rivers. " * 40, "They flow. 🎉"), chat("Hi", "x " * 200), chat("Hi", "Hello.")]
    batch = rm.score(rows, on_refused="skip", per_token=True)
    assert batch.rows.tolist() == [0, 2]
    assert batch.truncated == [0]
    for place, row in enumerate(batch.rows):
        text = rows[row][-1]["content"]
        assert "".join(text[low:high] for low, high in batch.token_spans[place]) == text
        found = rm.explain(rows[row], tokens=True).token_contributions
        np.testing.assert_allclose(found.sum(1), batch.token_scores[place], atol=1e-5)
    assert [shown.tokens.places.text for shown in rm.explanations(batch, rows)] == ["They flow. 🎉", "Hello."]


# --- what people and programs get ----------------------------------------------------------------


def test_a_plain_explanation_has_no_tokens_and_says_how_to_get_them(models):
    shown = models["mean"].explain(CONVERSATIONS[0])
    assert shown.tokens is None
    assert "tokens" not in shown.to_dict()
    for use in (lambda: shown.token_contributions, shown.words, shown.sentences, shown.to_pandas):
        with pytest.raises(ArmormError, match="tokens=True"):
            use()


@pytest.mark.parametrize("pooling", ["mean", "last+mean"])
def test_the_dictionary_and_the_table_hold_every_token(models, pooling):
    shown = models[pooling].explain(CONVERSATIONS[0], tokens=True)
    entry = shown.to_dict()
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    tokens = entry["tokens"]
    assert tokens["exact_share"] == shown.tokens.exact_share
    assert [row["start"] for row in tokens["tokens"]] == shown.tokens.places.spans[:, 0].tolist()
    assert sum(row["contribution"] for row in tokens["tokens"]) == pytest.approx(shown.token_contributions.sum())
    assert [part["text"] for part in tokens["sentences"]] == [part.text for part in shown.sentences()]
    table = shown.to_pandas()
    assert list(table.columns[:5]) == ["token", "start", "end", "template", "contribution"]
    assert table["contribution"].sum() == pytest.approx(shown.token_contributions.sum())
    for k, name in enumerate(OBJECTIVES.names):
        np.testing.assert_allclose(table[f"contribution/{name}"], shown.token_contributions[:, k])


def printed(shown, **options) -> str:
    file = io.StringIO()
    Console(width=100, file=file, **options).print(shown)
    return file.getvalue()


def test_the_map_names_the_best_and_worst_sentences_without_colour(models):
    shown = models["mean"].explain(
        chat(PROMPT, " ".join(f"Sentence {name} it is." for name in "abcdefgh")), tokens=True
    )
    text = printed(TokenMap(shown.tokens))
    parts = sorted(shown.sentences(), key=lambda part: part.deviations.sum())
    raising, lowering = text.split("raises it most")[1].split("lowers it most")
    for part in parts[-3:]:
        assert part.text in raising
        assert f"{part.deviations.sum():+.4f}" in raising
    for part in parts[:3]:
        assert part.text in lowering
    assert parts[3].text not in lowering
    assert "exact sum" in text
    assert "not where the fault is" in " ".join(text.split())
    assert "\x1b" not in text


def test_the_map_of_one_objective_shows_that_objective(models):
    shown = models["last+mean"].explain(CONVERSATIONS[0], tokens=True)
    column = OBJECTIVES.names.index("code-style")
    text = " ".join(printed(TokenMap(shown.tokens, "code-style")).split())
    worst = min(shown.sentences(), key=lambda part: part.deviations[column])
    assert f"{worst.deviations[column]:+.4f}" in text
    assert f"{shown.tokens.last_contributions[column]:+.4f} is read from the last token, not shown" in text
    assert "how the code-style adds up" in text
    with pytest.raises(ObjectiveError, match="did you mean code-style"):
        TokenMap(shown.tokens, "code-stile")


def test_words_are_coloured_by_their_sign(models):
    shown = models["mean"].explain(CONVERSATIONS[1], tokens=True)
    text = TokenMap(shown.tokens)._coloured()
    strongest = max(shown.words(), key=lambda word: abs(word.deviations.sum() / word.tokens))
    (span,) = [span for span in text.spans if (span.start, span.end) == (strongest.start, strongest.end)]
    assert ("blue" in str(span.style)) == (strongest.deviations.sum() > 0)
    assert "\x1b" in printed(TokenMap(shown.tokens), force_terminal=True)


def test_markup_in_a_response_stays_text(models):
    hostile = "[bold red]not markup[/] [link=http://x]y[/link]."
    shown = models["mean"].explain(chat(PROMPT, hostile), tokens=True)
    assert hostile in printed(shown)
