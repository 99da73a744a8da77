"""What the model says of a reply: tokens, sentences, and the scores of the reply without a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from armorm import ArmoRM
from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.backbone.encoding import encode_rows
from armorm.backbone.token_spans import token_spans
from armorm.conversation import Conversation, Message
from armorm.explain.integrated_gradients import STEPS, attribute_last_state
from armorm.explain.occlusion import occluded
from armorm.explain.token_attribution import TokenAttribution, token_rewards
from armorm.progress import progress
from token_maps.replies import Reply


@dataclass(frozen=True)
class Reading:
    """A reply of t tokens, of which the text's are `text_tokens`, and s sentences.

    Attributes:
        attribution: the score by token and objective, without a gradient.
        states: (t, d) of the backbone.
        log_likelihoods: (t,) of each token given all before it, by the backbone with its language-model head.
        last_scores: (t,) what the last part of the heads reads, weighted, at every token instead of the last.
        score: of the whole reply.
        occlusion: (s,) score minus the score without the sentence.
        growth: (s,) score of the reply up to the end of the sentence minus that up to its beginning; 0 for the first.
        gradient: (t,) integrated gradients of what is read from the last token; None if they were not computed.
        completeness: error of their sum; None without them.
    """

    reply: Reply
    attribution: TokenAttribution
    states: torch.Tensor
    log_likelihoods: np.ndarray
    last_scores: np.ndarray
    score: float
    occlusion: np.ndarray
    growth: np.ndarray
    gradient: np.ndarray | None = None
    completeness: float | None = None

    @cached_property
    def _visible(self) -> np.ndarray:
        return np.array([not character.isspace() for character in self.reply.conversation.response])

    def share(self, characters: np.ndarray) -> np.ndarray:
        """(t,) share of each token's characters, white space aside, that are in a mask (characters,)."""
        before = np.concatenate([[0], np.cumsum(characters & self._visible)])
        every = np.concatenate([[0], np.cumsum(self._visible)])
        starts, ends = self.attribution.places.spans.T
        return (before[ends] - before[starts]) / np.maximum(every[ends] - every[starts], 1)

    @cached_property
    def text_tokens(self) -> np.ndarray:
        """(t,) bool, whether a token has a character that is no white space."""
        return (self.share(self._visible) > 0) & ~self.attribution.places.template

    @cached_property
    def sentence_of(self) -> np.ndarray:
        """(t,) sentence of each token."""
        ends = np.array([end for _, end in self.reply.sentences])
        last = np.maximum(self.attribution.places.spans[:, 1] - 1, 0)
        return np.minimum(np.searchsorted(ends, last, side="right"), len(ends) - 1)

    def by_sentence(self, values: np.ndarray, *, mean: bool = True) -> np.ndarray:
        """(s,) mean, or sum, of values (t,) over the text tokens of each sentence."""
        at, count = self.sentence_of[self.text_tokens], len(self.reply.sentences)
        sums = np.bincount(at, values[self.text_tokens], minlength=count)
        return sums / np.maximum(np.bincount(at, minlength=count), 1) if mean else sums


def read_replies(rm: ArmoRM, language_model: Backbone, replies: Sequence[Reply]) -> list[Reading]:
    """Readings of all replies, without gradients; each by itself, so it does not depend on the others."""
    rows, readings = _encoded(rm, replies), []
    with progress("replies", len(replies), "replies") as advance:
        for reply, row in zip(replies, rows, strict=True):
            readings.append(_read(rm, language_model, reply, row))
            advance(1)
    return readings


def _read(rm: ArmoRM, language_model: Backbone, reply: Reply, row: EncodedConversation) -> Reading:
    without = _without_sentences(reply)
    batch = rm.score([reply.conversation, *without, *_beginnings(reply)])
    scores, coefficients = batch.scores.astype(np.float64), batch.coefficients[0].astype(np.float64)
    states, log_likelihoods = _states(rm.backbone, language_model, row)
    mean, last = token_rewards(states, rm.model.regression_layer, rm.backbone.readout)
    places = token_spans(rm.backbone.template, reply.conversation, row, rm.backbone.response_start(row))
    count = len(reply.sentences)
    ends = np.array([*scores[len(without) + 1 :], scores[0]])
    # (A reply of one sentence has nothing without it: its tokens all get 0.)
    occlusion = scores[0] - scores[1 : count + 1] if without else np.zeros(count)
    return Reading(
        reply,
        TokenAttribution(places, list(batch.names), coefficients, mean, last),
        states,
        log_likelihoods,
        (states.double() @ _last_direction(rm, coefficients)).numpy(),
        scores[0],
        occlusion,
        np.diff(ends, prepend=ends[0]),
    )


def _last_direction(rm: ArmoRM, coefficients: np.ndarray) -> torch.Tensor:
    """(d,) float64, what the weighted heads read from the state of the last token."""
    last_weight, _ = rm.backbone.readout.split(rm.model.regression_layer.weight.detach().cpu().double())
    assert last_weight is not None  # a model with both parts
    return torch.from_numpy(coefficients) @ last_weight


def with_gradients(rm: ArmoRM, readings: Sequence[Reading], steps: int = STEPS) -> list[Reading]:
    """The readings with integrated gradients of what is read from the last token, weighted."""
    rows, found = _encoded(rm, [reading.reply for reading in readings]), []
    with progress("replies with gradients", len(rows), "replies") as advance:
        for reading, row in zip(readings, rows, strict=True):
            direction = _last_direction(rm, reading.attribution.coefficients).float()
            by_token, errors = attribute_last_state(rm.backbone, row, direction[None], steps=steps)
            found.append(replace(reading, gradient=by_token[:, 0], completeness=abs(float(errors[0]))))
            advance(1)
    return found


def _encoded(rm: ArmoRM, replies: Sequence[Reply]) -> Sequence[EncodedConversation]:
    conversations, longest = [reply.conversation for reply in replies], rm.model.config.limits.get("max_length")
    return encode_rows(rm.backbone.template, conversations, longest, "truncate_prompt").encoded


@torch.inference_mode()
def _states(backbone: Backbone, language_model: Backbone, row: EncodedConversation) -> tuple[torch.Tensor, np.ndarray]:
    """States (t, d) of the response's tokens at the layer that is read, and log-likelihoods (t,), of one pass."""
    start, layer = backbone.response_start(row), backbone.readout.layer
    ids = torch.from_numpy(row.ids.astype(np.int64))[None].to(language_model.device)
    kept = len(row) - start + 1
    output = language_model.model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=kept)
    states = output.hidden_states[-1 if layer is None else layer][0, start:].float().cpu()
    logits = output.logits[0, :-1].float().log_softmax(-1)
    return states, logits.gather(1, ids[0, start:, None])[:, 0].cpu().double().numpy()


def _without_sentences(reply: Reply) -> list[Conversation]:
    found = occluded(reply.conversation, reply.sentences)
    return [conversation for conversation in found if conversation is not None]  # (several sentences: all of them)


def _beginnings(reply: Reply) -> list[Conversation]:
    """The reply up to the end of each sentence but the last."""
    text, prompt = reply.conversation.response, reply.conversation.prompt
    return [Conversation((*prompt, Message("assistant", text[:end]))) for _, end in reply.sentences[:-1]]
