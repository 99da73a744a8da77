"""The batcher: rows of all requests meet here, and go through the model together.

In:  encoded conversations of a request, each with a variant (how the model weighs its objectives).
Out: their results, in order, through one future a request.

One thread owns the model. It takes the row that has waited longest, those of its prompt, and then those nearest to it
in length, prompt by prompt, as many as the token budget holds with padding counted and shared prompts counted once.
So neighbours in a batch are of about one length, groups stay together, and no row starves. Identical conversations,
waiting or under way, are computed once. While the model is busy rows gather by themselves; while it is idle a row
waits at most a few milliseconds, and only for as many others as the last batch had: a lone client never waits.

What goes wrong stays small. A batch that the model fails on is halved until the faulty row stands alone; it
gets an error, the others their scores. Out of memory halves the budget too, for good. Rows of clients that have
gone leave the queue. What does not fit into the queue is turned away at once, with a time after which to try
again. A stopping batcher finishes what it has accepted.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import is_out_of_memory
from armorm.serving.errors import RequestError

_LOG = logging.getLogger("armorm.serving")

_WINDOW = 512  # rows among which those of like length are looked for

_SMALLEST_BUDGET = 128

_FAILURES_UNTIL_UNHEALTHY = 8

# What a forward pass may raise: torch's errors are RuntimeErrors, and a model's own code raises the others.
_MODEL_FAULTS = (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)

Variant = Hashable

Compute = Callable[[Sequence[EncodedConversation], Sequence[Sequence[Any]]], Sequence[Mapping[Any, Any]]]


@dataclass(frozen=True)
class RowFailure:
    """A row that the model failed on.

    Attributes:
        message: one sentence.
    """

    message: str


class Ticket:
    """One request's place in the queue; `future` holds the list of its results when all are there."""

    def __init__(self, size: int, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.future: asyncio.Future[list[Any]] = loop.create_future()
        self.results: list[Any] = [None] * size
        self.left = size
        self.keys: list[bytes] = []
        self.dropped = False


@dataclass
class _Entry:
    """One distinct conversation, and who wants its result: (ticket, place, variant)."""

    encoded: EncodedConversation
    since: float
    claims: list[tuple[Ticket, int, Variant]] = field(default_factory=list)
    variants: tuple[Variant, ...] = ()


@dataclass
class BatcherEvents:
    """Called by the batcher as things happen, from its own thread.

    Attributes:
        batch: rows, tokens with padding, seconds, results of one batch.
        shared: rows that needed no computation of their own.
        out_of_memory: the new budget.
    """

    batch: Callable[[int, int, float, Sequence[Mapping[Any, Any]]], None] = lambda *_: None
    shared: Callable[[int], None] = lambda _: None
    out_of_memory: Callable[[int], None] = lambda _: None


class Batcher:
    """Gathers rows and computes them in one thread.

    Args:
        compute: results of conversations, each a mapping from each of its variants; called in the model's thread.
        budget: most tokens of a batch, padding included.
        wait: seconds that a row waits at most while the model is idle.
        max_rows, max_tokens: what may wait.
        max_seconds: how long the model may need for it, at the speed of its last batches; a request that finds nothing
            waiting is taken whatever its size.
        shares: whether a prompt that several rows of a batch have is computed once.
        relieve: gives back memory that is kept for speed alone, and says whether there was any.
    """

    def __init__(
        self,
        compute: Compute,
        *,
        budget: int,
        wait: float = 0.004,
        max_rows: int = 8192,
        max_tokens: int = 4_000_000,
        max_seconds: float = float("inf"),
        shares: Callable[[], bool] = lambda: False,
        relieve: Callable[[], bool] = lambda: False,
        events: BatcherEvents | None = None,
    ) -> None:
        self.budget = budget
        self._shares, self._relieve = shares, relieve
        self._compute, self._wait = compute, wait
        self._max_rows, self._max_tokens, self._max_seconds = max_rows, max_tokens, max_seconds
        self._events = events or BatcherEvents()
        self._changed = threading.Condition()
        self._waiting: dict[bytes, _Entry] = {}  # in order of arrival
        self._running: dict[bytes, _Entry] = {}
        self._waiting_tokens = 0
        self._tokens_per_second = 0.0  # of whole rows, however little of them had to be computed
        self._request_tokens = 1.0  # that a request lately added, on the mean
        self._last_rows = 0
        self._failures = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="armorm-model", daemon=True)

    def start(self) -> None:
        """Start the model's thread."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Take nothing more, finish what was accepted, end the thread; what is left after `timeout` seconds fails."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._abandon("the server is going down")

    @property
    def healthy(self) -> bool:
        """Whether the model's thread lives and does not fail row after row."""
        return self._thread.is_alive() and self._failures < _FAILURES_UNTIL_UNHEALTHY

    @property
    def accepting(self) -> bool:
        """Whether a further row would be taken."""
        return not self._stopping and self.healthy and self._room_for(1, 1)

    def has_room_behind(self, requests: int) -> bool:
        """Whether a further row would be taken when so many requests, of the usual size, have been queued before it."""
        if not self._room_for(1, 1):
            return False
        return not requests or self._in_time(requests * self._request_tokens)

    @property
    def waiting(self) -> tuple[int, int]:
        """Distinct rows and tokens that wait."""
        return len(self._waiting), self._waiting_tokens

    def submit(self, rows: Sequence[tuple[EncodedConversation, Variant]]) -> Ticket:
        """Queue the rows of one request; call it in the event loop that awaits the ticket's future.

        Raises:
            RequestError: 413 for rows that would never fit, 429 for a full queue, 503 for a stopping batcher.
        """
        ticket = Ticket(len(rows), asyncio.get_running_loop())
        if not rows:
            ticket.future.set_result([])
            return ticket
        with self._changed:
            fresh = {
                encoded.key: len(encoded) for encoded, variant in rows if self._joinable(encoded.key, variant) is None
            }
            tokens = sum(fresh.values())
            self._request_tokens += 0.1 * (tokens - self._request_tokens)
            self._admit(len(fresh), tokens)
            now = time.monotonic()
            for place, (encoded, variant) in enumerate(rows):
                entry = self._joinable(encoded.key, variant)
                if entry is None:
                    entry = self._waiting[encoded.key] = _Entry(encoded, now)
                    self._waiting_tokens += len(encoded)
                entry.claims.append((ticket, place, variant))
                ticket.keys.append(encoded.key)
            self._changed.notify_all()
        if len(rows) > len(fresh):
            self._events.shared(len(rows) - len(fresh))
        return ticket

    def drop(self, ticket: Ticket) -> int:
        """Forget a request whose client has gone; returns how many rows leave the queue for it."""
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
        """An entry of the same conversation that will yield this variant."""
        running = self._running.get(key)
        if running is not None and variant in running.variants:
            return running
        return self._waiting.get(key)

    def _room_for(self, rows: int, tokens: int) -> bool:
        if len(self._waiting) + rows > self._max_rows or self._waiting_tokens + tokens > self._max_tokens:
            return False
        return not self._waiting or self._in_time(tokens)

    def _in_time(self, tokens: float) -> bool:
        """Whether the model, at the speed of its last batches, is soon enough done with what waits and so much more."""
        if not self._tokens_per_second:
            return True
        return (self._waiting_tokens + tokens) / self._tokens_per_second <= self._max_seconds

    def _admit(self, rows: int, tokens: int) -> None:
        if self._stopping:
            raise RequestError(503, "the server is going down", 5)
        if not self._thread.is_alive():
            raise RequestError(503, "the model's thread has ended; the server must be started again")
        if rows > self._max_rows or tokens > self._max_tokens:
            raise RequestError(
                413,
                f"found {rows} distinct conversations of {tokens} tokens in one request, expected at most "
                f"{self._max_rows} and {self._max_tokens}: send them in several",
            )
        if not self._room_for(rows, tokens):
            raise RequestError(
                429,
                f"{len(self._waiting)} conversations of {self._waiting_tokens} tokens are waiting already; "
                "try again later",
                self.retry_after(),
            )

    def retry_after(self) -> int:
        """Seconds in which half of what waits should be done, 1 to 30."""
        if not self._tokens_per_second:
            return 1
        return int(min(max(self._waiting_tokens / 2 / self._tokens_per_second, 1), 30))

    def _take(self) -> list[_Entry]:
        """The next batch: the oldest row, those of its prompt, and those nearest to it in length, within the budget."""
        window = [entry for entry, _ in zip(self._waiting.values(), range(_WINDOW), strict=False)]
        first, shares = window[0].encoded, self._shares()
        nearest: dict[bytes, int] = {}
        for entry in window:
            key, far = group_of(entry.encoded, shares), abs(len(entry.encoded) - len(first))
            nearest[key] = -1 if key == group_of(first, shares) else min(far, nearest.get(key, far))
        places = {key: place for place, key in enumerate(sorted(nearest, key=nearest.__getitem__))}
        window.sort(
            key=lambda entry: (
                entry.encoded is not first,
                places[group_of(entry.encoded, shares)],
                abs(len(entry.encoded) - len(first)),
            )
        )
        batch: list[_Entry] = []
        size = BatchSize(shares)
        for entry in window:
            if size.with_row(entry.encoded) > self.budget and batch:
                break
            batch.append(entry)
        for entry in batch:
            key = entry.encoded.key
            del self._waiting[key]
            self._waiting_tokens -= len(entry.encoded)
            entry.variants = tuple(dict.fromkeys(variant for _, _, variant in entry.claims))
            self._running[key] = entry
        return batch

    # --- the model's thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while batch := self._next():
                self._work(batch)
        finally:
            self._abandon("the model's thread has ended; the server must be started again")

    def _next(self) -> list[_Entry]:
        """Wait for a batch; empty when stopped and done."""
        with self._changed:
            while True:
                if self._waiting:
                    left = next(iter(self._waiting.values())).since + self._wait - time.monotonic()
                    enough = len(self._waiting) >= self._last_rows or self._waiting_tokens >= self.budget
                    if left <= 0 or enough or self._stopping:
                        return self._take()
                    self._changed.wait(left)
                elif self._stopping:
                    return []
                else:
                    self._changed.wait()

    def _work(self, batch: list[_Entry]) -> None:
        start = time.monotonic()
        outcomes = self._settle(batch)
        seconds = max(time.monotonic() - start, 1e-9)
        tokens = self._size(batch)
        rate = sum(len(entry.encoded) for entry in batch) / seconds
        deliveries: dict[asyncio.AbstractEventLoop, list[Ticket]] = {}
        with self._changed:
            self._tokens_per_second += 0.2 * (rate - self._tokens_per_second) if self._tokens_per_second else rate
            self._last_rows = len(batch)
            for entry, outcome in zip(batch, outcomes, strict=True):
                del self._running[entry.encoded.key]
                for ticket, place, variant in entry.claims:
                    ticket.results[place] = outcome[variant]
                    ticket.left -= 1
                    if not ticket.left and not ticket.dropped:
                        deliveries.setdefault(ticket.loop, []).append(ticket)
        self._events.batch(len(batch), tokens, seconds, outcomes)
        for loop, tickets in deliveries.items():
            _call(loop, _deliver, tickets)

    def _settle(self, batch: list[_Entry], *, relieved: bool = False) -> list[Mapping[Variant, Any]]:
        """Results of a batch; where the model fails on it, of its halves, down to the row at fault."""
        try:
            outcomes = list(self._compute([e.encoded for e in batch], [e.variants for e in batch]))
        except _MODEL_FAULTS as error:
            exhausted = is_out_of_memory(error)
            if len(batch) == 1 and not exhausted:
                self._failures += 1
                _LOG.exception("the model failed on a conversation of %d tokens", len(batch[0].encoded))
        else:
            self._failures = 0
            return outcomes
        # (Only here, with the error gone, is the memory free that its frames held.)
        if exhausted and not relieved and self._relieve():
            return self._settle(batch, relieved=True)
        if exhausted:
            self._shrink(batch)
        if len(batch) > 1:
            middle = len(batch) // 2
            return self._settle(batch[:middle]) + self._settle(batch[middle:])
        message = "the model failed on this conversation"
        if exhausted:
            message = f"memory does not suffice for a conversation of {len(batch[0].encoded)} tokens"
        return [dict.fromkeys(batch[0].variants, RowFailure(message))]

    def _shrink(self, batch: list[_Entry]) -> None:
        """Free memory, and halve the budget; a row that is too large alone says nothing about batches."""
        used = self._size(batch)
        if len(batch) > 1:
            self.budget = min(self.budget, max(used // 2, _SMALLEST_BUDGET))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _LOG.warning("out of memory in a batch of %d tokens; batches hold at most %d from now on", used, self.budget)
        self._events.out_of_memory(self.budget)

    def _size(self, batch: Sequence[_Entry]) -> int:
        size = BatchSize(self._shares())
        return [size.with_row(entry.encoded) for entry in batch][-1]

    def _abandon(self, message: str) -> None:
        """Fail whatever is left."""
        with self._changed:
            entries = [*self._waiting.values(), *self._running.values()]
            self._waiting.clear()
            self._running.clear()
            self._waiting_tokens = 0
            tickets = {id(ticket): ticket for entry in entries for ticket, _, _ in entry.claims}
        for ticket in tickets.values():
            _call(ticket.loop, _fail, ticket, message)


def _deliver(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        if not ticket.future.done():
            ticket.future.set_result(ticket.results)


def _fail(ticket: Ticket, message: str) -> None:
    if not ticket.future.done():
        ticket.future.set_exception(RequestError(503, message, 5))


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *arguments)


def group_of(row: EncodedConversation, shares: bool) -> bytes:
    """What rows that are computed together have in common."""
    return row.prompt_key if shares else row.key


class BatchSize:
    """Tokens of a batch with padding, as rows are added: a prompt counts once where it is shared."""

    def __init__(self, shares: bool) -> None:
        self._shares = shares
        self._groups: dict[bytes, tuple[int, int, int]] = {}  # rows, longest row, tokens of the prompt
        self._lone, self._longest, self._shared = 0, 0, 0

    def with_row(self, row: EncodedConversation) -> int:
        """The size with one row more."""
        key, start = group_of(row, self._shares), row.gate_position + 1
        rows, longest, _ = self._groups.get(key, (0, 0, start))
        self._groups[key] = rows + 1, max(longest, len(row)), start
        if rows == 0:
            self._lone += 1
            self._longest = max(self._longest, len(row))
        else:
            if rows == 1:
                self._lone -= 1
            else:
                self._shared -= start + rows * (longest - start)
            self._shared += start + (rows + 1) * (max(longest, len(row)) - start)
        return self._lone * self._longest + self._shared
