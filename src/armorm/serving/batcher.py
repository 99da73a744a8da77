"""Dynamic batching: the rows of all requests are batched for the model, which runs in a thread for each device.

A thread takes a first row, the other rows of its prompt, and then those nearest to it in length, prompt by prompt, up
to a token budget that counts padding, and shared prompts once. Batches are of similar length, and groups stay together.
The first row is that which has waited longest, or one of a much smaller request: each gets half of the model's work
while both wait. So a small request overtakes large ones, and no row starves. Where the model is slow, a batch is
limited in time too, and small requests are computed in the middle of it (`compute_small`), within their half. Identical
conversations, queued or running, are computed once. While the model is busy rows accumulate; while it is idle a row
waits a few milliseconds at most, and only until as many rows are queued as the last batch had, so that a single client
never waits.

Failures are isolated. A batch that the model fails on is halved until the faulty row is alone; that row is rejected,
the others are scored. Running out of memory also halves the budget for good. Rows of disconnected clients leave the
queue. Rows that do not fit into the queue are rejected at once, with a time after which to try again. A stopping
batcher finishes what it has accepted.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import is_out_of_memory
from armorm.serving.errors import RequestError
from armorm.serving.protocols.base import RejectedRow

_LOG = logging.getLogger("armorm.serving")

_WINDOW = 512  # oldest rows among which a batch of similar lengths is looked for
_BATCH_TOKENS = 2048  # a batch may have, however slow the model is
_SMALLER = 4  # a request overtakes those that have more than so many times its tokens
_SHORT_SECONDS = 0.05  # batches of less work are neither split by size of request nor interrupted
_SMALLEST_BUDGET = 128
_FAILURES_UNTIL_UNHEALTHY = 8
# Errors of a forward pass: torch raises RuntimeError, the model's own code the others.
_MODEL_ERRORS = (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)

Variant = Hashable
Compute = Callable[[Sequence[EncodedConversation], Sequence[Sequence[Any]]], Sequence[Mapping[Any, Any]]]


class Ticket:
    """A request in the queue; `future` yields its results, in the order of its rows."""

    def __init__(self, size: int, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.future: asyncio.Future[list[Any]] = loop.create_future()
        self.results: list[Any] = [None] * size
        self.left = size
        self.keys: list[bytes] = []
        self.dropped = False


@dataclass
class _Entry:
    """A distinct conversation and the rows that wait for its result: (ticket, index, variant)."""

    encoded: EncodedConversation
    since: float
    request_tokens: int  # of the smallest request that waits for it
    claims: list[tuple[Ticket, int, Variant]] = field(default_factory=list)
    variants: tuple[Variant, ...] = ()


class _Running(threading.local):
    """What a thread of the model computes now."""

    interruptible = 0  # tokens of the smallest request of the batch, 0 for none
    interrupted_seconds = 0.0
    compute: Compute


class Batcher:
    """Batches rows and computes them in one thread for each device.

    Args:
        computes: for each device, a function that gives the results of conversations, each a mapping from its variants.
        budget: most tokens of a batch, padding included.
        batch_seconds: most seconds of work of a batch, estimated from the speed of the last batches.
        wait: most seconds that a row waits while the model is idle.
        max_seconds: most seconds of work in the queue, estimated from the speed of the last batches; a request that
            finds the queue empty is accepted whatever its size.
        shares_prompts: whether a prompt that several rows of a batch share is computed once.
        free_memory: frees caches; returns whether there were any.
        on_batch: called in a model's thread with rows, tokens with padding, seconds and results of each batch.
        on_shared: called with the number of rows of a request that reuse the result of an identical one.
        on_out_of_memory: called in a model's thread with the new budget.
    """

    def __init__(
        self,
        *computes: Compute,
        budget: int,
        batch_seconds: float = 0.5,
        wait: float = 0.004,
        max_rows: int = 8192,
        max_tokens: int = 4_000_000,
        max_seconds: float = float("inf"),
        shares_prompts: Callable[[], bool] = lambda: False,
        free_memory: Callable[[], bool] = lambda: False,
        on_batch: Callable[[int, int, float, Sequence[Mapping[Any, Any]]], None] = lambda *_: None,
        on_shared: Callable[[int], None] = lambda _: None,
        on_out_of_memory: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.budget, self._batch_seconds = budget, batch_seconds
        self._shares_prompts, self._free_memory = shares_prompts, free_memory
        self._wait = wait
        self._max_rows, self._max_tokens, self._max_seconds = max_rows, max_tokens, max_seconds
        self._on_batch, self._on_shared, self._on_out_of_memory = on_batch, on_shared, on_out_of_memory
        self._changed = threading.Condition()
        self._waiting: dict[bytes, _Entry] = {}  # in order of arrival
        self._running: dict[bytes, _Entry] = {}
        self._waiting_tokens = 0
        self._tokens_per_second = 0.0  # of a device, of whole rows, cached and shared tokens included
        self._request_tokens = 1.0  # added to the queue per request, moving average
        self._last_rows = 0
        self._busy = 0  # threads that compute
        self._credit = 0  # tokens that overtaking requests may take before the oldest row's turn
        self._now = _Running()
        self._failures = 0
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._run, args=(compute,), name="armorm-model", daemon=True)
            for compute in computes
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Finish what was accepted and end the threads; what is left after `timeout` seconds fails."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(None if end is None else max(0.0, end - time.monotonic()))
        self._abandon("the server is shutting down")

    @property
    def running(self) -> bool:
        """Whether a thread of the model is alive; after `stop`, because a forward pass is not over."""
        return any(thread.is_alive() for thread in self._threads)

    @property
    def healthy(self) -> bool:
        """Whether the model's threads are alive and do not fail on row after row."""
        return self._alive and self._failures < _FAILURES_UNTIL_UNHEALTHY

    @property
    def _alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    @property
    def accepting(self) -> bool:
        """Whether another row would be accepted."""
        return not self._stopping and self.healthy and self._room_for(1, 1)

    def has_room_behind(self, requests: int) -> bool:
        """Whether another row would be accepted after this number of requests of average size."""
        return self._room_for(1, 1) and (not requests or self._in_time(requests * self._request_tokens))

    @property
    def waiting(self) -> tuple[int, int]:
        """Distinct rows and tokens in the queue."""
        return len(self._waiting), self._waiting_tokens

    def submit(self, rows: Sequence[tuple[EncodedConversation, Variant]]) -> Ticket:
        """Queue the rows of one request; called in the event loop that awaits the ticket's future.

        Raises:
            RequestError: 413 for rows that can never fit, 429 for a full queue, 503 for a stopping batcher.
        """
        ticket = Ticket(len(rows), asyncio.get_running_loop())
        if not rows:
            ticket.future.set_result([])
            return ticket
        with self._changed:
            new = {
                encoded.key: len(encoded) for encoded, variant in rows if self._joinable(encoded.key, variant) is None
            }
            tokens = sum(new.values())
            self._request_tokens += 0.1 * (tokens - self._request_tokens)
            self._admit(len(new), tokens)
            now, total = time.monotonic(), sum(len(encoded) for encoded, _ in rows)
            for index, (encoded, variant) in enumerate(rows):
                entry = self._joinable(encoded.key, variant)
                if entry is None:
                    entry = self._waiting[encoded.key] = _Entry(encoded, now, total)
                    self._waiting_tokens += len(encoded)
                entry.request_tokens = min(entry.request_tokens, total)
                entry.claims.append((ticket, index, variant))
                ticket.keys.append(encoded.key)
            self._changed.notify_all()
        if len(rows) > len(new):
            self._on_shared(len(rows) - len(new))
        return ticket

    def drop(self, ticket: Ticket) -> int:
        """Drop a request whose client has disconnected; returns the number of rows that leave the queue."""
        with self._changed:
            ticket.dropped = True
            gone = 0
            for key in ticket.keys:
                entry = self._waiting.get(key)
                if entry is None:
                    continue
                entry.claims = [claim for claim in entry.claims if claim[0] is not ticket]
                if not entry.claims:
                    del self._waiting[key]
                    self._waiting_tokens -= len(entry.encoded)
                    gone += 1
        ticket.future.cancel()
        return gone

    # --- the queue; called with the lock held ------------------------------------------------------

    def _joinable(self, key: bytes, variant: Variant) -> _Entry | None:
        """The entry of the same conversation that will produce this variant, if any."""
        running = self._running.get(key)
        return running if running is not None and variant in running.variants else self._waiting.get(key)

    def _room_for(self, rows: int, tokens: int) -> bool:
        if len(self._waiting) + rows > self._max_rows or self._waiting_tokens + tokens > self._max_tokens:
            return False
        return not self._waiting or self._in_time(tokens)

    def _in_time(self, tokens: float) -> bool:
        """Whether the queue with these tokens added takes at most `max_seconds` at the speed of the last batches."""
        if not self._tokens_per_second:
            return True
        return (self._waiting_tokens + tokens) / self._total_rate <= self._max_seconds

    @property
    def _total_rate(self) -> float:
        """Tokens per second of all devices."""
        return self._tokens_per_second * len(self._threads)

    def _admit(self, rows: int, tokens: int) -> None:
        if self._stopping:
            raise RequestError(503, "the server is shutting down", 5)
        if not self._alive:
            raise RequestError(503, "the model's thread has ended; restart the server")
        if rows > self._max_rows or tokens > self._max_tokens:
            raise RequestError(
                413,
                f"found {rows} distinct conversations of {tokens} tokens in one request, expected at most "
                f"{self._max_rows} and {self._max_tokens}: split them over several requests",
            )
        if not self._room_for(rows, tokens):
            raise RequestError(
                429,
                f"the queue is full ({len(self._waiting)} rows, {self._waiting_tokens} tokens); try again later",
                self.retry_after(),
            )

    def retry_after(self) -> int:
        """Estimated seconds until half of the queue is done, 1 to 30."""
        seconds = self._waiting_tokens / 2 / self._total_rate if self._tokens_per_second else 1
        return int(min(max(seconds, 1), 30))

    def _take(self, first: _Entry, window: list[_Entry]) -> list[_Entry]:
        """A batch: a first row, the rows of its prompt, then those nearest in length, within the budget."""
        shared = self._shares_prompts()
        most = min(self.budget, max(_BATCH_TOKENS, round(self._batch_seconds * self._tokens_per_second)))
        if (idle := len(self._threads) - self._busy) > 1:  # this one, and others that get a share
            most = min(most, max(_BATCH_TOKENS, self._waiting_tokens // idle))
        far = {entry.encoded.key: abs(len(entry.encoded) - len(first.encoded)) for entry in window}
        group = {entry.encoded.key: group_of(entry.encoded, shared) for entry in window}
        nearest: dict[bytes, int] = {}
        for key, distance in far.items():
            nearest[group[key]] = min(distance, nearest.get(group[key], distance))
        nearest[group_of(first.encoded, shared)] = -1
        ranks = {key: rank for rank, key in enumerate(sorted(nearest, key=nearest.__getitem__))}
        window.sort(key=lambda entry: (entry is not first, ranks[group[entry.encoded.key]], far[entry.encoded.key]))
        batch: list[_Entry] = []
        size, taken = BatchSize(shared), 0
        for entry in window:
            if (tokens := size.with_row(entry.encoded)) > most and batch:
                break
            batch.append(entry)
            taken = tokens
        if (
            next(iter(self._waiting.values())) is first and not self._now.interruptible
        ):  # (else it overtakes the running)
            self._credit = min(self._credit + taken, self.budget)
        else:
            self._credit -= taken
        for entry in batch:
            key = entry.encoded.key
            del self._waiting[key]
            self._waiting_tokens -= len(entry.encoded)
            entry.variants = tuple(dict.fromkeys(variant for _, _, variant in entry.claims))
            self._running[key] = entry
        return batch

    def _next_batch(self) -> list[_Entry]:
        """Of the oldest row, or of a smaller request while these have credit."""
        oldest = next(iter(self._waiting.values()))
        return self._overtaking(oldest.request_tokens) or self._take(
            oldest, list(islice(self._waiting.values(), _WINDOW))
        )

    def _overtaking(self, tokens: int) -> list[_Entry]:
        """A batch of requests that may overtake one of this many tokens; empty if there is none."""
        if self._credit <= 0 or not self._waiting:
            return []
        smallest = min(self._waiting.values(), key=lambda entry: entry.request_tokens)
        if smallest.request_tokens * _SMALLER >= tokens:
            return []
        most = max(_SMALLER * smallest.request_tokens, _SHORT_SECONDS * self._tokens_per_second)
        similar = (entry for entry in self._waiting.values() if entry.request_tokens <= most)
        return self._take(smallest, list(islice(similar, _WINDOW)))

    # --- the model's threads ------------------------------------------------------------------------

    def _run(self, compute: Compute) -> None:
        self._now.compute = compute
        try:
            while batch := self._next():
                long = sum(len(e.encoded) for e in batch) >= _SHORT_SECONDS * self._tokens_per_second
                self._now.interruptible = min(e.request_tokens for e in batch) if long else 0
                self._work(batch)
                self._now.interruptible, self._now.interrupted_seconds = 0, 0.0
        finally:
            if not self._stopping:
                self._abandon("the model's thread has ended; restart the server")

    def _next(self) -> list[_Entry]:
        """Wait for a batch; empty once stopped and done."""
        with self._changed:
            while True:
                if self._waiting:
                    left = next(iter(self._waiting.values())).since + self._wait - time.monotonic()
                    enough = len(self._waiting) >= self._last_rows or self._waiting_tokens >= self.budget
                    if left <= 0 or enough or self._stopping:
                        batch = self._next_batch()
                        self._busy += 1
                        self._changed.notify_all()  # for what is left
                        return batch
                    self._changed.wait(left)
                elif self._stopping:
                    return []
                else:
                    self._changed.wait()

    def compute_small(self) -> None:
        """Compute waiting requests that are much smaller than those of the running batch.

        To be called between the layers of a forward pass; in threads other than the model's it does nothing.
        """
        if not self._waiting or not self._now.interruptible:
            return
        start = time.monotonic()
        with self._changed:
            batch = self._overtaking(self._now.interruptible)
        if batch:
            outer, self._now.interruptible = self._now.interruptible, 0
            self._work(batch, interrupts=True)
            self._now.interruptible = outer
            self._now.interrupted_seconds += time.monotonic() - start

    def _work(self, batch: list[_Entry], *, interrupts: bool = False) -> None:
        start = time.monotonic()
        results = self._results(batch)
        seconds = time.monotonic() - start
        seconds = max(seconds if interrupts else seconds - self._now.interrupted_seconds, 1e-9)
        tokens = self._size(batch)
        rate = sum(len(entry.encoded) for entry in batch) / seconds
        deliveries: dict[asyncio.AbstractEventLoop, list[Ticket]] = {}
        with self._changed:
            if not interrupts:
                self._busy -= 1
                self._tokens_per_second += 0.2 * (rate - self._tokens_per_second) if self._tokens_per_second else rate
                self._last_rows = len(batch)
            for entry, result in zip(batch, results, strict=True):
                self._running.pop(entry.encoded.key, None)
                for ticket, index, variant in entry.claims:
                    ticket.results[index] = result[variant]
                    ticket.left -= 1
                    if not ticket.left and not ticket.dropped:
                        deliveries.setdefault(ticket.loop, []).append(ticket)
        self._on_batch(len(batch), tokens, seconds, results)
        for loop, tickets in deliveries.items():
            _finish(loop, tickets)

    def _results(self, batch: list[_Entry], *, freed: bool = False) -> list[Mapping[Variant, Any]]:
        """Results of a batch; if the model fails on it, of its halves, down to the faulty row."""
        try:
            results = list(self._now.compute([e.encoded for e in batch], [e.variants for e in batch]))
        except _MODEL_ERRORS as error:
            exhausted = is_out_of_memory(error)
            if len(batch) == 1 and not exhausted:
                self._failures += 1
                _LOG.exception("the model failed on a conversation of %d tokens", len(batch[0].encoded))
        else:
            self._failures = 0
            return results
        # (Not in the handler: the error's frames hold memory until it ends.)
        if exhausted and not freed and self._free_memory():
            return self._results(batch, freed=True)
        if exhausted:
            self._shrink(batch)
        if len(batch) > 1:
            middle = len(batch) // 2
            return self._results(batch[:middle]) + self._results(batch[middle:])
        message = "the model failed on this conversation"
        if exhausted:
            message = f"out of memory on a conversation of {len(batch[0].encoded)} tokens"
        return [dict.fromkeys(batch[0].variants, RejectedRow(message, failed=True))]

    def _shrink(self, batch: list[_Entry]) -> None:
        """Free memory and halve the budget, unless the batch is a single row that is too large."""
        used = self._size(batch)
        if len(batch) > 1:
            self.budget = min(self.budget, max(used // 2, _SMALLEST_BUDGET))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _LOG.warning("out of memory in a batch of %d tokens; limiting batches to %d tokens", used, self.budget)
        self._on_out_of_memory(self.budget)

    def _size(self, batch: Sequence[_Entry]) -> int:
        size = BatchSize(self._shares_prompts())
        return [size.with_row(entry.encoded) for entry in batch][-1]

    def _abandon(self, message: str) -> None:
        """Fail all remaining requests."""
        with self._changed:
            entries = [*self._waiting.values(), *self._running.values()]
            self._waiting.clear()
            self._running.clear()
            self._waiting_tokens = 0
        for ticket in dict.fromkeys(ticket for entry in entries for ticket, _, _ in entry.claims):
            _finish(ticket.loop, [ticket], RequestError(503, message, 5))


def _finish(loop: asyncio.AbstractEventLoop, tickets: Sequence[Ticket], error: RequestError | None = None) -> None:
    """Let the event loop of tickets set their results, or the error."""

    def finish() -> None:
        for ticket in tickets:
            if not ticket.future.done():
                ticket.future.set_result(ticket.results) if error is None else ticket.future.set_exception(error)

    if not loop.is_closed():
        loop.call_soon_threadsafe(finish)


def group_of(row: EncodedConversation, shares_prompts: bool) -> bytes:
    """Key of the rows that are computed together."""
    return row.prompt_key if shares_prompts else row.key


class BatchSize:
    """Tokens of a batch with padding, as rows are added; a shared prompt counts once."""

    def __init__(self, shares_prompts: bool) -> None:
        self._shares_prompts = shares_prompts
        self._groups: dict[bytes, tuple[int, int]] = {}  # rows, longest row
        # Number of rows that share no prompt, their longest, and tokens of the others.
        self._lone, self._longest, self._shared = 0, 0, 0

    def with_row(self, row: EncodedConversation) -> int:
        """The size with one more row."""
        key, start = group_of(row, self._shares_prompts), row.gate_position + 1
        before = self._groups.get(key, (0, 0))
        after = self._groups[key] = before[0] + 1, max(before[1], len(row))
        for sign, (rows, longest) in ((-1, before), (1, after)):
            if rows == 1:
                self._lone += sign
            elif rows:
                self._shared += sign * (start + rows * (longest - start))
        if after[0] == 1:
            self._longest = max(self._longest, len(row))
        return self._lone * self._longest + self._shared
