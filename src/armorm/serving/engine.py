"""The scoring engine: requests of any protocol in, response bodies out, through one batcher.

Requests are parsed and tokenized in a few threads, the model runs in one for each of its devices, and the event loop
waits for both. Features of a row are computed once; the heads run once for each steering that the waiting requests use.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar, Union

import numpy as np
import torch

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.encoding import encode_rows, same_prompts
from armorm.backbone.readout import decoder_layers
from armorm.backbone.rendered_text import EmptyResponseError, RenderedReader
from armorm.backbone.token_spans import token_spans
from armorm.conversation import Conversation
from armorm.errors import ArmormError, ConversationError
from armorm.explain.dense_rewards import DenseReward, Division, PolicyTokenizer, policy_spans
from armorm.explain.token_attribution import TokenAttribution, TokenScores, attribute_tokens, token_rewards
from armorm.features.extract import Features
from armorm.files import json_text
from armorm.monitoring.log import append_samples, batch_lines
from armorm.reward_model import ArmoRM
from armorm.score_batch import ScoreBatch
from armorm.serving.batcher import Batcher
from armorm.serving.errors import RequestError
from armorm.serving.metrics import Metrics
from armorm.serving.prefix_cache import CachedForward
from armorm.serving.protocols.base import ParsedRequest, PerToken, RejectedRow, RequestScores, RowInput
from armorm.serving.settings import ServingSettings, SettingsError

_LOG = logging.getLogger("armorm.serving")
_READERS = 4  # threads that parse and tokenize
_SMALL_REQUEST = 16  # rows up to which a response is written in the event loop
T = TypeVar("T")


class Variant(NamedTuple):
    """What a request wants of a conversation."""

    steering: str = ""  # as JSON; empty for the model as it is
    per_token: bool = False


@dataclass(frozen=True)
class Scored:
    """The scores of a row, at an index of a batch, and its score by token if that is wanted."""

    batch: ScoreBatch
    at: int
    tokens: TokenScores | None = None


Found = Union[Scored, RejectedRow]  # what the model finds for a row, or why it has no score


@dataclass(frozen=True)
class _Prepared:
    """A request ready for the model."""

    request: ParsedRequest
    rows: list[EncodedConversation | RejectedRow]
    variant: Variant
    divisions: Mapping[int, Division]  # of the rows that are wanted by token, by index


class ScoringEngine:
    """A reward model that answers many requests at once."""

    def __init__(self, rm: ArmoRM, settings: ServingSettings | None = None, policy_tokenizer: Any = None) -> None:
        self.rm = rm
        self.settings = settings or ServingSettings()
        # Mean and standard deviation of the reference scores; None if the model's config lacks them.
        mean, deviation = rm.reference.get("score_mean"), rm.reference.get("score_std")
        self.reference_score = (float(mean), float(deviation)) if mean is not None and deviation else None
        if self.settings.normalize and self.reference_score is None:
            raise SettingsError("normalize: the model's config contains no reference scores to normalise by")
        # Most tokens of a conversation, None for no limit.
        limits = (rm.model.config.limits.get("max_length"), rm.backbone.max_length, self.settings.max_length)
        self.max_length = min((limit for limit in limits if limit is not None), default=None)
        self._longest_token = max(map(len, rm.tokenizer.get_vocab()))
        # No text of more characters has few enough tokens; four times that where prompts are truncated, which takes
        # time that grows with the text.
        times = 4 if rm.model.config.limits.get("overflow") == "truncate_prompt" else 1
        self._max_characters = None if self.max_length is None else times * self.max_length * self._longest_token
        embeddings: Any = rm.backbone.model.get_input_embeddings()
        turns, size = self.settings.rendered_turns, len(embeddings.weight)
        self.reader = RenderedReader(
            rm.backbone.template, size, turns, policy_tokenizer, self._max_characters, "--rendered-turns"
        )
        fast = getattr(policy_tokenizer, "backend_tokenizer", None) is not None
        self._policy_tokenizer = PolicyTokenizer(policy_tokenizer) if fast else None
        self.metrics = Metrics(rm.objectives.names, rm.reference)
        backbones = [rm.backbone, *rm.backbone.replicas]
        cache = self.settings.prompt_cache // (1 if rm.backbone.device.type == "cuda" else len(backbones))
        self.forwards = [CachedForward(some, cache, share=self.settings.share_prompts) for some in backbones]
        interruptible = rm.backbone.device.type == "cpu"
        self.batcher = Batcher(
            *(partial(self._compute, forward) for forward in self.forwards),
            budget=self.settings.batch_tokens,
            batch_seconds=2.0 if interruptible else 0.5,
            wait=self.settings.batch_wait,
            max_rows=self.settings.max_waiting_rows,
            max_tokens=self.settings.max_waiting_tokens,
            max_seconds=self.settings.max_waiting_seconds,
            shares_prompts=lambda: not any(forward.fault for forward in self.forwards),
            free_memory=lambda: sum(forward.clear() for forward in self.forwards) > 0,
            on_batch=self._count_batch,
            on_shared=self.metrics.shared.inc,
            on_out_of_memory=lambda budget: self.metrics.out_of_memory.inc(),
        )
        self.metrics.watch(self.batcher, self.forwards)
        # Before each matrix product. (Those of an accelerator are queued long before they run: nothing comes between.)
        self._hooks: list[Any] = []
        if interruptible:
            for decoder in (some.model for some in backbones):
                holder, name = decoder_layers(decoder, decoder.config.get_text_config().num_hidden_layers)
                for module in getattr(holder, name).modules():
                    if isinstance(module, torch.nn.Linear):
                        self._hooks.append(module.register_forward_pre_hook(lambda *_: self.batcher.compute_small()))
        self._reading = 0  # requests that are parsed and not yet queued
        self._attributing = threading.Lock()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="armorm-reader")
        # The model under a steering, which replaces that of its config.
        self._steered = lru_cache(maxsize=64)(lambda variant: rm.steer(**json.loads(variant)) if variant else rm)
        sizes = rm.backbone.response_size, rm.backbone.hidden_size
        response, prompt = (np.empty((0, size), np.float32) for size in sizes)
        self._no_rows = rm.score_features(Features(response, prompt, np.arange(0)))

    @property
    def queue_full(self) -> int | None:
        """Seconds after which to try again while the queue has no room for another row, else None.

        A request whose rows are queued already would need no room; it is rejected too, since its body is not yet read.
        """
        return None if self.batcher.has_room_behind(self._reading) else self.batcher.retry_after()

    def stop(self, seconds: float) -> None:
        """Finish what was accepted, for at most this many seconds, then end all threads."""
        self.batcher.stop(seconds)
        for hook in self._hooks:
            hook.remove()
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def answer(self, read: Callable[[], ParsedRequest]) -> bytes:
        """The response as JSON to the request that `read` parses, in a reader thread; errors are a RequestError."""

        def write(prepared: _Prepared, found: Sequence[Found]) -> bytes:
            response = prepared.request.write(self._scores(prepared, found))
            return json.dumps(response, allow_nan=False, separators=(",", ":")).encode()

        return await self._run(read, write)

    async def score(self, rows: Sequence[RowInput]) -> RequestScores:
        """Plain scores of rows of this process, under the limits of all requests; errors as `answer`."""
        request = ParsedRequest(rows, lambda scores: None, normalize=False, partial=True)
        return await self._run(lambda: request, self._scores)

    async def attribute(self, batch: ScoreBatch, conversations: Sequence[Conversation]) -> list[TokenAttribution]:
        """Each score of a batch of `score` by token, for a forward pass each, one request at a time.

        Empty for a model that reads the last token alone, whose attribution is many times as slow, and if a prompt was
        truncated.

        Args:
            conversations: of the batch's rows.
        """
        if self.rm.backbone.readout.pooling == "last":
            return []

        def attribute() -> list[TokenAttribution]:
            encoded = encode_rows(self.rm.backbone.template, list(conversations), self.max_length, "skip")
            if encoded.rejected:
                return []
            head = self.rm.model.regression_layer
            with self._attributing:
                return attribute_tokens(self.rm.backbone, head, conversations, encoded.encoded, batch)

        return await self._in_thread(attribute)

    async def _run(self, read: Callable[[], ParsedRequest], finish: Callable[[_Prepared, Sequence[Found]], T]) -> T:
        self._reading += 1
        try:
            prepared = await self._in_thread(lambda: self._prepare(read()))
        finally:
            self._reading -= 1
        jobs = [(row, prepared.variant) for row in prepared.rows if isinstance(row, EncodedConversation)]
        ticket = self.batcher.submit(jobs)
        try:
            found = await ticket.future
        except asyncio.CancelledError:
            self.metrics.rows(dropped=self.batcher.drop(ticket))
            raise
        if len(prepared.rows) <= _SMALL_REQUEST and not prepared.divisions:
            return finish(prepared, found)
        return await self._in_thread(lambda: finish(prepared, found))

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, function)

    # --- before the model ----------------------------------------------------------------------------

    def _prepare(self, request: ParsedRequest) -> _Prepared:
        count, most = len(request.rows), self.settings.max_rows
        if count > most:
            raise RequestError(413, f"found {count} rows in one request, expected at most {most}")
        if request.normalize and self.reference_score is None:
            raise RequestError(400, "normalize: the model's config contains no reference scores to normalise by")
        if request.per_token and request.per_token.policy_tokens == "tokenizer" and self._policy_tokenizer is None:
            raise RequestError(
                400, "policy_tokens: the server has no fast tokenizer of the policy (--policy-tokenizer)"
            )
        steering = json.dumps(request.steering, sort_keys=True) if request.steering else ""
        try:
            self._steered(steering)
        except (ArmormError, OverflowError, TypeError) as error:  # TypeError: not a keyword of `steer`
            raise RequestError(400, f"steer: {error}") from None
        rows = self._encode(request)
        divisions = {} if request.per_token is None else self._divide(request.rows, request.per_token, rows)
        return _Prepared(request, rows, Variant(steering, request.per_token is not None), divisions)

    def _divide(
        self, given: Sequence[RowInput], wanted: PerToken, rows: list[EncodedConversation | RejectedRow]
    ) -> dict[int, Division]:
        """How the scores of rows are divided; a row whose tokens do not fit is rejected in `rows`."""
        backbone, policy, found = self.rm.backbone, wanted.policy_tokens, {}
        for index, (conversation, row) in enumerate(zip(given, rows, strict=True)):
            if isinstance(row, RejectedRow):
                continue
            assert isinstance(conversation, Conversation)  # (Token ids have no text.)
            text, spans = conversation.response, None
            try:
                if policy == "tokenizer" and self._policy_tokenizer is not None:
                    spans = self._policy_tokenizer.spans(text)
                elif policy is not None and policy[index] is not None:
                    spans = policy_spans(policy[index], text)
                places = token_spans(backbone.template, conversation, row, backbone.response_start(row)).spans
                found[index] = Division.of(text, places, wanted.unit, spans)
            except ConversationError as error:
                rows[index] = RejectedRow(str(error))
        return found

    def _encode(self, request: ParsedRequest) -> list[EncodedConversation | RejectedRow]:
        rows: list[EncodedConversation | RejectedRow] = [RejectedRow("")] * len(request.rows)
        max_length = min((n for n in (self.max_length, request.max_length) if n is not None), default=None)
        conversations: dict[int, Conversation] = {}
        for index, row in enumerate(request.rows):
            if isinstance(row, ConversationError):
                empty = isinstance(row, EmptyResponseError) or row.problem.startswith("found an empty response")
                rows[index] = RejectedRow(str(row), empty=empty)
            elif isinstance(row, EncodedConversation):
                fits = max_length is None or len(row) <= max_length
                rows[index] = row if fits else RejectedRow(f"found {len(row)} tokens, expected at most {max_length}")
            else:
                # A conversation that is certainly too long is not tokenized; each turn is at least a token.
                count, characters = len(row.messages), sum(len(message.content) for message in row.messages)
                most = self._max_characters
                if most is None or characters + count * self._longest_token <= most:
                    conversations[index] = row
                else:
                    size = f"{characters} characters in {count} messages"
                    rows[index] = RejectedRow(f"found {size}, expected at most {self.max_length} tokens")
        policy = request.overflow or self.rm.model.config.limits.get("overflow", "error").replace("error", "skip")
        texts, template = list(conversations.values()), self.rm.backbone.template
        encoded = encode_rows(template, texts, max_length, policy)
        if request.same_prompt:
            encoded = same_prompts(template, texts, encoded, [range(len(texts))], max_length)
        reasons = dict(encoded.rejected)
        for i, (index, ids) in enumerate(zip(conversations, encoded.rows, strict=True)):
            rows[index] = RejectedRow(reasons[i]) if ids is None else ids
        return rows

    # --- the model -------------------------------------------------------------------------------------

    def _compute(
        self, forward: CachedForward, rows: Sequence[EncodedConversation], variants: Sequence[Sequence[Variant]]
    ) -> list[dict[Variant, Found]]:
        head, readout = self.rm.model.regression_layer, self.rm.backbone.readout
        by_token: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # the two results of `token_rewards`

        def read(place: int, states: torch.Tensor) -> None:
            by_token[place] = token_rewards(states, head, readout)

        readers = {i: partial(read, i) for i, wanted in enumerate(variants) if any(v.per_token for v in wanted)}
        prompt, response = forward.features(rows, self.batcher.budget, readers)
        found: list[dict[Variant, Found]] = [{} for _ in rows]
        for steering in dict.fromkeys(v.steering for wanted in variants for v in wanted):
            places = [i for i, wanted in enumerate(variants) if any(v.steering == steering for v in wanted)]
            features = Features(response[places], prompt[places], np.arange(len(places)))
            tokens = np.array([rows[place].response_tokens for place in places], np.int64)
            batch = replace(self._steered(steering).score_features(features), response_tokens=tokens)
            finite = np.isfinite(batch.scores) & np.isfinite(batch.contributions).all(1)
            bad = RejectedRow("the model's score of this conversation is not a finite number", failed=True)
            for at, place in enumerate(places):
                for variant in (v for v in variants[place] if v.steering == steering):
                    parts = by_token[place] if variant.per_token else None
                    scores = None if parts is None else TokenScores.of(*parts, batch.coefficients[at])
                    found[place][variant] = Scored(batch, at, scores) if finite[at] else bad
        return found

    def _count_batch(self, rows: int, tokens: int, seconds: float, found: Sequence[Mapping[Variant, Found]]) -> None:
        self.metrics.batch(rows, tokens, seconds)
        unsteered = (row.get(Variant()) or row.get(Variant(per_token=True)) for row in found)
        plain = [scored for scored in unsteered if isinstance(scored, Scored)]
        if plain:
            self.metrics.scored(_gathered(plain))

    # --- after the model -------------------------------------------------------------------------------

    def _scores(self, prepared: _Prepared, found: Sequence[Found]) -> RequestScores:
        request = prepared.request
        computed = iter(found)
        results = [row if isinstance(row, RejectedRow) else next(computed) for row in prepared.rows]
        scored = {index: result for index, result in enumerate(results) if not isinstance(result, RejectedRow)}
        encoded = {index: row for index, row in enumerate(prepared.rows) if isinstance(row, EncodedConversation)}
        rows = [encoded[index] for index in scored]
        batch = _gathered(list(scored.values())) if scored else self._no_rows
        # Token counts are of this request's rows; the computed ones may be identical rows of another request, whose
        # prompt was not truncated.
        batch = replace(
            batch,
            rows=np.array(list(scored), np.int64),
            response_tokens=np.array([row.response_tokens for row in rows], np.int64),
        )
        normalize = self.settings.normalize if request.normalize is None else request.normalize
        scores = RequestScores(
            batch,
            tokens=[len(row) for row in rows],
            truncated={index: encoded[index].truncated_tokens for index in scored if encoded[index].truncated_tokens},
            rejected={index: result for index, result in enumerate(results) if isinstance(result, RejectedRow)},
            model=self.settings.name,
            objectives=self.rm.objectives,
            transform=self._steered(prepared.variant.steering).transform,
            scale=self.reference_score if normalize else None,
            empty_score=None if request.partial else self.settings.empty_score,
        )
        if prepared.divisions:
            scores = replace(scores, dense=_dense(scores, scored, prepared.divisions))
        self.metrics.rows(scored=len(scored), refused=len(scores.rejected))
        if self.settings.log_texts:
            for row, (score, reason) in zip(request.rows, scores.rows, strict=True):
                entry: dict[str, Any] = {"messages": row.to_list() if isinstance(row, Conversation) else None}
                entry |= {"score": score} if reason is None else {"error": reason}
                _LOG.info("%s", json_text(entry))
        if self.settings.score_log is not None and not request.steering:
            prompts, now = [row.prompt_key for row in rows], round(time.time(), 3)
            lines = batch_lines(batch, prompts, batch.response_tokens, batch.scores, time=now)
            append_samples(self.settings.score_log, lines)
        if not request.partial:
            scores.require_a_score()
        return scores


def _dense(
    scores: RequestScores, scored: Mapping[int, Scored], divisions: Mapping[int, Division]
) -> dict[int, DenseReward]:
    """The scores of rows as sums, by index."""
    sums, deviation, found = scores.scores, (scores.scale or (0.0, 1.0))[1], {}
    for index, row in scored.items():
        total = sums[index]
        assert row.tokens is not None and total is not None
        tokens = row.tokens.scaled(total, deviation)
        found[index] = divisions[index].reward(tokens.values, tokens.rest, tokens.exact_share)
    return found


def _gathered(rows: Sequence[Scored]) -> ScoreBatch:
    """Rows of several batches as one batch."""
    first = rows[0].batch
    if all(row.batch is first for row in rows):
        return first.take([row.at for row in rows])
    names = [name for name, value in vars(first).items() if isinstance(value, np.ndarray)]
    columns: dict[str, Any] = {name: np.stack([getattr(row.batch, name)[row.at] for row in rows]) for name in names}
    return replace(first, **columns)
