"""What the model says of a reply: tokens, sentences, and the scores of the reply without a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from armorm import ArmoRM
from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.backbone.encoding import encode_rows
from armorm.backbone.token_spans import token_spans
from armorm.conversation import Conversation, Message
from armorm.explain.integrated_gradients import attribute_last_state
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


def read_replies(
    rm: ArmoRM, language_model: Backbone, replies: Sequence[Reply], *, gradient_steps: int = 0
) -> list[Reading]:
    """Readings of all replies, with integrated gradients of so many steps; 0 for none."""
    conversations = [reply.conversation for reply in replies]
    limits = rm.model.config.limits
    rows = encode_rows(rm.backbone.template, conversations, limits.get("max_length"), "truncate_prompt").encoded
    variants = [[reply.conversation, *_without_sentences(reply), *_beginnings(reply)] for reply in replies]
    batch = rm.score([conversation for found in variants for conversation in found])
    first, head = 0, rm.model.regression_layer
    last_weight = rm.backbone.readout.split(head.weight.detach().cpu().double())[0]
    assert last_weight is not None  # a model with both parts
    readings = []
    with progress("states and surprisal", sum(map(len, rows)), "tokens") as advance:
        for reply, row, found in zip(replies, rows, variants, strict=True):
            scores = batch.scores[first : first + len(found)].astype(np.float64)
            coefficients = batch.coefficients[first].astype(np.float64)
            first += len(found)
            states, log_likelihoods = _states(rm.backbone, language_model, row)
            mean, last = token_rewards(states, head, rm.backbone.readout)
            start = rm.backbone.response_start(row)
            places = token_spans(rm.backbone.template, reply.conversation, row, start)
            direction = torch.from_numpy(coefficients) @ last_weight
            gradient = completeness = None
            if gradient_steps:
                by_token, errors = attribute_last_state(rm.backbone, row, direction.float()[None], steps=gradient_steps)
                gradient, completeness = by_token[:, 0], abs(float(errors[0]))
            count = len(reply.sentences)
            ends = np.array([*scores[count + 1 :], scores[0]])
            readings.append(
                Reading(
                    reply,
                    TokenAttribution(places, list(batch.names), coefficients, mean, last),
                    states,
                    log_likelihoods,
                    (states.double() @ direction).numpy(),
                    scores[0],
                    scores[0] - scores[1 : count + 1],
                    np.diff(ends, prepend=ends[0]),
                    gradient,
                    completeness,
                )
            )
            advance(len(row))
    return readings


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
