"""The scorer: requests of any format in, their answers out, through one batcher.

In:  the body of a request and the function that reads its format.
Out: the answer, as plain values; or a `RequestError`.

Reading, rendering and tokenizing happen in a few threads, the model in one of its own; the event loop waits for
both. Requests may steer: the features of a row are computed once, the heads once for every steering that wants it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.encoding import encode_rows
from armorm.backbone.rendered_text import EmptyResponseError, RenderedReader
from armorm.conversation import Conversation
from armorm.errors import ArmormError, ConversationError
from armorm.features.extract import Features
from armorm.monitoring.log import append_samples, sample_line
from armorm.reward_model import ArmoRM
from armorm.serving.batcher import Batcher, BatcherEvents, RowFailure
from armorm.serving.errors import RequestError
from armorm.serving.metrics import Metrics
from armorm.serving.prefix_cache import Forward
from armorm.serving.protocols.base import Exchange, Outcome, Read, RefusedRow, Result, ScoredRow, parsed_body
from armorm.serving.settings import ServingSettings, SettingsError

_LOG = logging.getLogger("armorm.serving")
_READERS = 4  # threads that read and tokenize
_SMALL_ANSWER = 16  # rows up to which an answer is written in the event loop
T = TypeVar("T")


@dataclass(frozen=True)
class _Prepared:
    """A request, ready for the model.

    Attributes:
        exchange: what it asks for.
        rows: token ids of each row, or why it is refused.
        variant: its steering as text, empty for the model as it is.
    """

    exchange: Exchange
    rows: list[EncodedConversation | RefusedRow]
    variant: str


class Scorer:
    """A reward model that answers many requests at once.

    Attributes:
        rm: the model.
        settings: of the server.
        metrics: what is counted.
        batcher: where rows of all requests meet.
        forward: the model's passes.
        max_length: most tokens of a conversation, None for no limit.
    """

    def __init__(self, rm: ArmoRM, settings: ServingSettings | None = None, policy_tokenizer: Any = None) -> None:
        self.rm = rm
        self.settings = settings or ServingSettings()
        if self.settings.normalize and self._scale() is None:
            raise SettingsError("scores are to be normalised, and the model's config holds no reference figures")
        limits = (rm.model.config.limits.get("max_length"), rm.backbone.max_length, self.settings.max_length)
        self.max_length = min((limit for limit in limits if limit is not None), default=None)
        self._objectives = rm.objectives
        self._transform = rm.transform
        self._longest_token = max(map(len, rm.tokenizer.get_vocab()))
        self._max_characters = self._most_characters()
        self.reader = RenderedReader(
            rm.backbone.template,
            _vocabulary(rm),
            self.settings.rendered_turns,
            policy_tokenizer,
            self._max_characters,
        )
        self.metrics = Metrics(self._objectives.names, rm.reference)
        self.forward = Forward(rm.backbone, self.settings.prompt_cache, share=self.settings.share_prompts)
        self.batcher = Batcher(
            self._compute,
            budget=self.settings.batch_tokens,
            wait=self.settings.batch_wait,
            max_rows=self.settings.max_waiting_rows,
            max_tokens=self.settings.max_waiting_tokens,
            max_seconds=self.settings.max_waiting_seconds,
            shares=lambda: not self.forward.refusal,
            relieve=self.forward.forget,
            events=BatcherEvents(self._count_batch, self.metrics.shared, self.metrics.out_of_memory),
        )
        self.metrics.watch_queue(self.batcher)
        self.metrics.watch_prompts(self.forward)
        self._reading = 0  # requests that are read and not queued yet
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="armorm-reader")
        self._steered = lru_cache(maxsize=64)(self._steer)

    @property
    def transform(self) -> np.ndarray:
        """T (k, k) float64 as the model applies it."""
        return self._transform

    @property
    def full(self) -> int | None:
        """Seconds after which to try again while there is no room for a further row, else None.

        A request whose rows wait already would need none; it is turned away too, since nothing of it has been read.
        """
        return None if self.batcher.has_room_behind(self._reading) else self.batcher.retry_after()

    def start(self) -> None:
        """Start the model's thread."""
        self.batcher.start()

    def stop(self) -> None:
        """Finish what was accepted, then end all threads."""
        self.batcher.stop(self.settings.shutdown_seconds)
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def answer(self, read: Read, body: bytes) -> bytes:
        """The answer to a request, as JSON.

        Raises:
            RequestError: where there is no answer but an error.
        """
        self._reading += 1
        try:
            prepared = await self._in_thread(self._prepare, read, body)
        finally:
            self._reading -= 1
        jobs = [(row, prepared.variant) for row in prepared.rows if isinstance(row, EncodedConversation)]
        ticket = self.batcher.submit(jobs)
        try:
            found = await ticket.future
        except asyncio.CancelledError:
            self.metrics.dropped(self.batcher.drop(ticket))
            raise
        if len(prepared.rows) <= _SMALL_ANSWER:
            return self._write(prepared, found)
        return await self._in_thread(self._write, prepared, found)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)

    # --- before the model ----------------------------------------------------------------------------

    def _prepare(self, read: Read, body: bytes) -> _Prepared:
        exchange = read(parsed_body(body), self.reader)
        if len(exchange.rows) > self.settings.max_rows:
            raise RequestError(
                413, f"found {len(exchange.rows)} rows in one request, expected at most {self.settings.max_rows}"
            )
        if exchange.normalize and self._scale() is None:
            raise RequestError(400, "normalize: the model's config holds no reference figures to normalise by")
        variant = json.dumps(exchange.steering, sort_keys=True) if exchange.steering else ""
        try:
            self._steered(variant)
        except (ArmormError, OverflowError, TypeError) as error:  # the last: a key that this model's `steer` lacks
            raise RequestError(400, f"steer: {error}") from None
        return _Prepared(exchange, self._encode(exchange), variant)

    def _encode(self, exchange: Exchange) -> list[EncodedConversation | RefusedRow]:
        rows: list[EncodedConversation | RefusedRow] = [RefusedRow("")] * len(exchange.rows)
        max_length = min((n for n in (self.max_length, exchange.max_length) if n is not None), default=None)
        places: list[int] = []
        conversations: list[Conversation] = []
        for place, row in enumerate(exchange.rows):
            if isinstance(row, Conversation):
                fault = self._too_many_characters(row)
                if fault is not None:
                    rows[place] = fault
                    continue
                places.append(place)
                conversations.append(row)
            elif isinstance(row, ConversationError):
                empty = isinstance(row, EmptyResponseError) or row.problem.startswith("found an empty response")
                rows[place] = RefusedRow(str(row), empty=empty)
            elif max_length is not None and len(row) > max_length:
                rows[place] = RefusedRow(f"found {len(row)} tokens, expected at most {max_length}")
            else:
                rows[place] = row
        policy = self.rm.model.config.limits.get("overflow", "error")
        encoded = encode_rows(
            self.rm.backbone.template, conversations, max_length, "skip" if policy == "error" else policy
        )
        for i, ids in zip(encoded.kept, encoded.encoded, strict=True):
            rows[places[i]] = ids
        for i, reason in encoded.rejected:
            rows[places[i]] = RefusedRow(reason)
        return rows

    def _too_many_characters(self, row: Conversation) -> RefusedRow | None:
        """A conversation so long that it need not be tokenized to be refused."""
        if self._max_characters is None:
            return None
        found = sum(len(message.content) + self._longest_token for message in row.messages)  # a turn is a token or more
        if found <= self._max_characters:
            return None
        size = f"{sum(len(message.content) for message in row.messages)} characters in {len(row.messages)} messages"
        return RefusedRow(f"found {size}, expected at most {self.max_length} tokens")

    def _most_characters(self) -> int | None:
        """Characters of which no text can have few enough tokens; four times that where prompts are shortened, which
        takes time that grows with them. None where there is no limit."""
        if self.max_length is None:
            return None
        times = 4 if self.rm.model.config.limits.get("overflow") == "truncate_prompt" else 1
        return times * self.max_length * self._longest_token

    # --- the model -------------------------------------------------------------------------------------

    def _steer(self, variant: str) -> ArmoRM:
        """The model under a steering, which replaces that of its config."""
        if not variant:
            return self.rm
        return self.rm.steer(**json.loads(variant))

    def _compute(
        self, rows: Sequence[EncodedConversation], variants: Sequence[Sequence[Hashable]]
    ) -> list[dict[Hashable, ScoredRow | RowFailure]]:
        prompt, response = self.forward.features(rows, self.batcher.budget)
        outcomes: list[dict[Hashable, ScoredRow | RowFailure]] = [{} for _ in rows]
        for variant in dict.fromkeys(v for wanted in variants for v in wanted):
            places = [i for i, wanted in enumerate(variants) if variant in wanted]
            features = Features(response[places], prompt[places], np.arange(len(places)))
            tokens = np.array([rows[place].response_tokens for place in places], np.int64)
            batch = replace(self._steered(str(variant)).score_features(features), response_tokens=tokens)
            finite = np.isfinite(batch.scores) & np.isfinite(batch.contributions).all(1)
            for at, place in enumerate(places):
                row = rows[place]
                outcomes[place][variant] = (
                    ScoredRow(batch, at, len(row))
                    if finite[at]
                    else RowFailure("the model's score of this conversation is not a finite number")
                )
        return outcomes

    def _count_batch(self, rows: int, tokens: int, seconds: float, outcomes: Sequence[Mapping[str, Any]]) -> None:
        self.metrics.batch(rows, tokens, seconds)
        plain = [found for outcome in outcomes if isinstance(found := outcome.get(""), ScoredRow)]
        if plain:
            self.metrics.scored([row.batch for row in plain], [row.place for row in plain])

    # --- after the model -------------------------------------------------------------------------------

    def _write(self, prepared: _Prepared, found: Sequence[ScoredRow | RowFailure]) -> bytes:
        exchange = prepared.exchange
        computed = iter(found)
        results: list[Result] = []
        for row in prepared.rows:
            if isinstance(row, RefusedRow):
                results.append(row)
                continue
            result = next(computed)
            if isinstance(result, RowFailure):
                results.append(RefusedRow(result.message, failed=True))
            else:  # (The computation may have been another request's, whose prompt was whole.)
                results.append(replace(result, truncated=row.truncated_tokens))
        normalize = self.settings.normalize if exchange.normalize is None else exchange.normalize
        outcome = Outcome(
            results,
            self.settings.name,
            self._objectives,
            self._steered(prepared.variant).transform,
            self._scale() if normalize else None,
            None if exchange.partial else self.settings.empty_score,
        )
        refused = sum(isinstance(result, RefusedRow) for result in results)
        self.metrics.rows(len(results) - refused, refused)
        if self.settings.log_texts:
            _log_texts(exchange, outcome)
        if self.settings.score_log is not None and not exchange.steering:
            append_samples(self.settings.score_log, _sample_lines(prepared.rows, results, self._objectives.names))
        if not exchange.partial:
            outcome.require_something()
        return json.dumps(exchange.answer(outcome), allow_nan=False, separators=(",", ":")).encode()

    def _scale(self) -> tuple[float, float] | None:
        """Mean and standard deviation of reference scores, where the config holds them."""
        mean, deviation = self.rm.reference.get("score_mean"), self.rm.reference.get("score_std")
        return (float(mean), float(deviation)) if mean is not None and deviation else None


def _vocabulary(rm: ArmoRM) -> int:
    """Rows of the model's embedding."""
    weight = rm.model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return len(weight)


def _sample_lines(
    rows: Sequence[EncodedConversation | RefusedRow], results: Sequence[Result], names: Sequence[str]
) -> Iterator[str]:
    """Lines of the score log; a request's prompts are its groups."""
    now, groups = round(time.time(), 3), dict[bytes, int]()
    for row, result in zip(rows, results, strict=True):
        if isinstance(row, EncodedConversation) and isinstance(result, ScoredRow):
            batch, place = result.batch, result.place
            yield sample_line(
                names,
                contributions=batch.contributions[place].tolist(),
                score=result.score,
                group=groups.setdefault(row.prompt_key, len(groups)),
                length=row.response_tokens,
                rewards=batch.rewards[place].tolist(),
                uncertainty=None if batch.uncertainty is None else batch.uncertainty[place].tolist(),
                time=now,
            )


def _log_texts(exchange: Exchange, outcome: Outcome) -> None:
    for row, result in zip(exchange.rows, outcome.results, strict=True):
        entry: dict[str, Any] = {"messages": row.to_list() if isinstance(row, Conversation) else None}
        if isinstance(result, RefusedRow):
            entry["error"] = result.reason
        else:
            entry["score"] = outcome.score(result)
        _LOG.info("%s", json.dumps(entry, ensure_ascii=False))
