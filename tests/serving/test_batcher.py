"""The batcher alone: what it computes together, in what order, and what it does when things go wrong."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest
import torch

from armorm.backbone.chat_template import EncodedConversation
from armorm.serving.batcher import Batcher
from armorm.serving.errors import RequestError
from armorm.serving.protocols.base import RejectedRow


def row(length, start=0):
    return EncodedConversation(np.arange(start, start + length, dtype=np.int32), 0, length - 1)


class Sums:
    """Computes the sum of each row's ids, and remembers its batches; it may be held."""

    def __init__(self):
        self.batches = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, rows, variants):
        self.batches.append([len(encoded) for encoded in rows])
        self.free.wait(10)
        return [{v: int(r.ids.sum()) + len(v) for v in wanted} for r, wanted in zip(rows, variants, strict=True)]


def run(compute, work, **options):
    """Run an async function on a started batcher."""

    async def whole():
        batcher = Batcher(compute, **{"budget": 100, "wait": 0.0, **options})
        batcher.start()
        try:
            return await asyncio.wait_for(work(batcher), 20)
        finally:
            if isinstance(compute, Sums):
                compute.free.set()
            await asyncio.to_thread(batcher.stop, 5)

    return asyncio.run(whole())


async def until(condition):
    while not condition():
        await asyncio.sleep(0.002)


def test_results_come_in_the_order_of_the_rows_whatever_the_batches_were():
    rows = [row(n, start=n) for n in (3, 60, 5, 90, 3, 200, 4)]

    async def work(batcher):
        return await batcher.submit([(r, "") for r in rows]).future

    sums = Sums()
    assert run(sums, work) == [int(r.ids.sum()) for r in rows]
    assert all(max(batch) * len(batch) <= 100 or len(batch) == 1 for batch in sums.batches)


def test_the_oldest_row_goes_first_with_those_nearest_to_it_in_length():
    sums = Sums()
    sums.free.clear()

    async def work(batcher):
        held = batcher.submit([(row(7), "")])
        await until(lambda: sums.batches)
        tickets = [batcher.submit([(row(n, start=n), "")]) for n in (10, 90, 11, 40, 9, 12, 95)]
        sums.free.set()
        for ticket in (held, *tickets):
            await ticket.future

    run(sums, work)
    assert [sorted(batch) for batch in sums.batches] == [[7], [9, 10, 11, 12], [90], [40], [95]]


def test_no_row_starves_under_a_stream_of_rows_of_another_length():
    sums = Sums()

    async def work(batcher):
        long = batcher.submit([(row(80), "")]).future
        for number in range(200):
            batcher.submit([(row(5, start=number), "")])
            if long.done():
                return number
            await asyncio.sleep(0.001)
        return None

    assert run(sums, work) is not None


def test_rows_gather_while_the_model_is_busy():
    sums = Sums()
    sums.free.clear()

    async def work(batcher):
        first = batcher.submit([(row(5), "")])
        await until(lambda: sums.batches)
        rest = [batcher.submit([(row(5, start=n), "")]) for n in range(1, 15)]
        sums.free.set()
        for ticket in (first, *rest):
            await ticket.future

    run(sums, work)
    assert [len(batch) for batch in sums.batches] == [1, 14]


def test_a_lone_client_never_waits_and_a_returning_crowd_is_waited_for():
    sums = Sums()

    async def work(batcher):
        start = time.monotonic()
        for number in range(10):
            await batcher.submit([(row(5, start=number), "")]).future
        alone = time.monotonic() - start
        await batcher.submit([(row(5, start=100 + n), "") for n in range(8)]).future
        last = [batcher.submit([(row(5, start=200), "")])]
        await asyncio.sleep(0.05)
        last += [batcher.submit([(row(5, start=201 + n), "")]) for n in range(7)]
        for ticket in last:
            await ticket.future
        return alone

    assert run(sums, work, wait=0.5) < 2
    assert [len(batch) for batch in sums.batches] == [1] * 10 + [8, 8]


def test_a_row_waits_for_a_crowd_that_does_not_come_only_so_long():
    async def work(batcher):
        await batcher.submit([(row(5, start=n), "") for n in range(8)]).future
        start = time.monotonic()
        await batcher.submit([(row(5, start=100), "")]).future
        return time.monotonic() - start

    assert 0.15 < run(Sums(), work, wait=0.2) < 5


def test_identical_conversations_are_computed_once_waiting_or_under_way():
    sums, shared = Sums(), []
    sums.free.clear()

    async def work(batcher):
        first = batcher.submit([(row(5), "")])
        await until(lambda: sums.batches)
        others = [batcher.submit([(row(5), ""), (row(6), ""), (row(6), "")]) for _ in range(4)]
        sums.free.set()
        return [await ticket.future for ticket in (first, *others)]

    assert run(sums, work, on_shared=shared.append) == [[10]] + [[10, 15, 15]] * 4
    assert sums.batches == [[5], [6]]
    assert sum(shared) == 11


def test_one_conversation_in_two_variants_is_computed_once_and_answered_twice():
    sums = Sums()
    sums.free.clear()

    async def work(batcher):
        held = batcher.submit([(row(9), "")])
        await until(lambda: sums.batches)
        plain, steered = batcher.submit([(row(5), "")]), batcher.submit([(row(5), "abc")])
        late = batcher.submit([(row(9), "abc")])  # under way already, but not in this variant
        sums.free.set()
        return [await ticket.future for ticket in (held, plain, steered, late)]

    assert run(sums, work) == [[36], [10], [13], [39]]
    assert sorted(map(sorted, sums.batches)) == [[5, 9], [9]]


def test_what_would_wait_too_long_at_the_speed_of_the_last_batches_is_turned_away():
    sums = Sums()

    async def work(batcher):
        sums.free.clear()
        held = batcher.submit([(row(10), "")])
        await until(lambda: sums.batches)
        await asyncio.sleep(0.1)
        sums.free.set()
        await held.future  # ten tokens took 0.1 s or more: at most a hundred a second
        sums.free.clear()
        running = batcher.submit([(row(10, start=1), "")])
        await until(lambda: len(sums.batches) == 2)
        kept = [batcher.submit([(row(10, start=2 + n), "")]) for n in range(4)]  # 40 tokens
        with pytest.raises(RequestError) as full:
            batcher.submit([(row(1000, start=50), "")])  # more than ten seconds
        assert full.value.status == 429
        sums.free.set()
        for ticket in (running, *kept):
            await ticket.future
        await batcher.submit([(row(5000, start=100), "")]).future  # nothing waits: taken, however long

    run(sums, work, max_seconds=9.0)


def test_what_does_not_fit_into_the_queue_is_turned_away_and_what_never_would_is_told_so():
    sums = Sums()
    sums.free.clear()

    async def work(batcher):
        held = batcher.submit([(row(5), "")])
        await until(lambda: sums.batches)
        kept = batcher.submit([(row(5, start=1), ""), (row(5, start=2), "")])
        assert batcher.accepting
        with pytest.raises(RequestError) as full:
            batcher.submit([(row(5, start=3), ""), (row(5, start=4), "")])
        assert full.value.status == 429
        assert full.value.retry_after >= 1
        with pytest.raises(RequestError) as never:
            batcher.submit([(row(5, start=n), "") for n in range(9)])
        assert never.value.status == 413
        with pytest.raises(RequestError) as long:
            batcher.submit([(row(500), "")])
        assert long.value.status == 413
        again = batcher.submit([(row(5, start=1), "")])  # costs nothing: it waits already
        one = batcher.submit([(row(5, start=3), "")])
        assert not batcher.accepting
        assert batcher.waiting == (3, 15)
        sums.free.set()
        for ticket in (held, kept, again, one):
            await ticket.future
        assert batcher.waiting == (0, 0)
        assert batcher.accepting

    run(sums, work, max_rows=3, max_tokens=400)


def test_rows_of_a_client_that_has_gone_are_not_computed_unless_another_wants_them():
    sums = Sums()
    sums.free.clear()

    async def work(batcher):
        held = batcher.submit([(row(5), "")])
        await until(lambda: sums.batches)
        gone = batcher.submit([(row(6), ""), (row(7), "")])
        other = batcher.submit([(row(7), "")])
        assert batcher.drop(gone) == 1
        assert batcher.waiting == (1, 7)
        sums.free.set()
        await held.future
        assert await other.future == [21]
        assert gone.future.cancelled()

    run(sums, work)
    assert sums.batches == [[5], [7]]


def test_a_row_that_the_model_fails_on_fails_alone():
    def compute(rows, variants):
        if any(len(encoded) == 13 for encoded in rows):
            raise ValueError("unlucky")
        return [{"": len(encoded)} for encoded in rows]

    async def work(batcher):
        found = await batcher.submit([(row(n), "") for n in (11, 12, 13, 14)]).future
        assert batcher.healthy
        return found

    found = run(compute, work)
    assert found[:2] + found[3:] == [11, 12, 14]
    assert found[2] == RejectedRow("the model failed on this conversation", failed=True)


def test_memory_that_does_not_suffice_halves_the_budget_and_loses_no_row():
    budgets = []

    def compute(rows, variants):
        if sum(map(len, rows)) > 300:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return [{"": len(encoded)} for encoded in rows]

    async def work(batcher):
        found = await batcher.submit([(row(40, start=n), "") for n in range(20)]).future
        assert batcher.budget == 200
        too_long = await batcher.submit([(row(310), "")]).future
        assert batcher.healthy
        after = await batcher.submit([(row(40, start=n), "") for n in range(30, 40)]).future
        return found, too_long, after

    found, too_long, after = run(compute, work, budget=800, on_out_of_memory=budgets.append)
    assert found == [40] * 20
    assert too_long == [RejectedRow("out of memory on a conversation of 310 tokens", failed=True)]
    assert after == [40] * 10
    assert budgets == [400, 200, 200, 200]  # two halves of the first batch, and the row that fits nowhere


def test_a_model_that_fails_on_every_row_is_called_unhealthy_until_it_works_again():
    broken = True

    def compute(rows, variants):
        if broken:
            raise RuntimeError("device-side assert")
        return [{"": 1} for _ in rows]

    async def work(batcher):
        nonlocal broken
        found = await batcher.submit([(row(n), "") for n in range(5, 15)]).future
        assert all(isinstance(result, RejectedRow) for result in found)
        assert not batcher.healthy
        broken = False
        await batcher.submit([(row(4), "")]).future
        assert batcher.healthy

    run(compute, work)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_thread_that_ends_fails_what_waits_and_what_comes():
    def compute(rows, variants):
        raise SystemExit

    async def work(batcher):
        ticket = batcher.submit([(row(5), "")])
        with pytest.raises(RequestError, match="the model's thread has ended") as ended:
            await ticket.future
        assert ended.value.status == 503
        await until(lambda: not batcher.healthy)
        with pytest.raises(RequestError, match="the model's thread has ended"):
            batcher.submit([(row(5), "")])

    run(compute, work)


def test_a_stopping_batcher_finishes_what_it_has_and_takes_nothing_more():
    sums = Sums()
    sums.free.clear()

    async def work(batcher):
        tickets = [batcher.submit([(row(90, start=n), "")]) for n in range(4)]
        await until(lambda: sums.batches)
        stopping = asyncio.create_task(asyncio.to_thread(batcher.stop, 10))
        await until(lambda: not batcher.accepting)
        with pytest.raises(RequestError) as refused:
            batcher.submit([(row(5), "")])
        assert refused.value.status == 503
        sums.free.set()
        await stopping
        return [(await ticket.future)[0] for ticket in tickets]

    assert run(sums, work) == [int(row(90, start=n).ids.sum()) for n in range(4)]


def test_a_request_of_no_rows_is_answered_at_once():
    async def work(batcher):
        return await batcher.submit([]).future

    assert run(Sums(), work) == []


def test_a_small_request_overtakes_large_ones_and_each_side_gets_half_of_the_work():
    sums = Sums()
    sums.free.clear()

    async def work(batcher):
        held = batcher.submit([(row(50), "")])
        await until(lambda: sums.batches)
        large = [batcher.submit([(row(90, start=n), "")]) for n in range(3)]
        many = batcher.submit([(row(11, start=n), "") for n in range(20)])  # small rows, but a large request
        small = [batcher.submit([(row(10, start=100 + n), "")]) for n in range(24)]
        sums.free.set()
        for ticket in (held, *large, many, *small):
            await ticket.future

    run(sums, work)
    lengths = [batch[0] for batch in sums.batches]
    assert lengths[0] == 50  # runs before the others arrive
    # Ten of ten tokens are a batch. After a batch of the oldest as many tokens go to the smallest, up to one batch over.
    assert lengths[1:7] == [10, 90, 10, 90, 10, 90]
    assert set(lengths[7:]) == {11}


def test_a_batch_is_limited_to_half_a_second_where_the_model_is_slow():
    class Slow(Sums):
        def __call__(self, rows, variants):
            time.sleep(sum(map(len, rows)) / 20_000)
            return super().__call__(rows, variants)

    sums = Slow()

    async def work(batcher):
        await batcher.submit([(row(1000), "")]).future
        await batcher.submit([(row(1500, start=n), "") for n in range(1, 9)]).future

    run(sums, work, budget=16_384)
    assert all(1 <= len(batch) <= 6 for batch in sums.batches)  # 10,000 tokens at most
    assert len(sums.batches) < 9


def test_a_small_request_is_computed_between_the_layers_of_a_large_one_within_its_share():
    finished, started = [], threading.Event()

    def compute(rows, variants):
        if len(rows[0]) >= 1000:
            started.set()
            for _ in range(200):  # layers
                time.sleep(0.002)
                holder[0].compute_small()
        finished.extend(map(len, rows))
        return [{"": len(encoded)} for encoded in rows]

    holder = []

    async def work(batcher):
        holder.append(batcher)
        large = batcher.submit([(row(1000), "")]).future
        await asyncio.to_thread(started.wait, 10)
        batcher.compute_small()  # in another thread, where it does nothing
        similar = batcher.submit([(row(900), "")]).future
        small = [batcher.submit([(row(100, start=n), "")]).future for n in range(30)]
        return [await future for future in (large, similar, *small)]

    assert run(compute, work, budget=1000, wait=0.0)[:2] == [[1000], [900]]
    before = finished.index(1000)
    assert 1 <= before <= 20  # as many tokens as the large one has, up to one batch of ten rows over
    assert 900 not in finished[:before]
