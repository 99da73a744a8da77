"""Prometheus metrics of requests, batches and scores.

For drift: histograms of the score and of every objective's predicted reward, and sums of its gating weight and
contribution, over plain (not steered) rows; and as gauges the means of the model's reference data.
`rate(armorm_gating_weight_sum[1h]) / rate(armorm_gating_weight_count[1h])` is a mean to compare with
`armorm_reference_gating_weight`; for sums of signed values (scores, contributions) use `delta` instead of `rate`.
The gauges `armorm_recent_*` are exponentially weighted means over about the last thousand rows: score, response length,
contribution of each objective, which `armorm monitor` compares too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from armorm.score_batch import ScoreBatch

if TYPE_CHECKING:
    from armorm.serving.batcher import Batcher
    from armorm.serving.prefix_cache import CachedForward

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Ratings are mapped to 0..1; predictions exceed that range a little.
_REWARD_EDGES = np.round(np.arange(-0.2, 1.2001, 0.1), 1)
# Bucket edges of the score histogram, in standard deviations from the reference mean.
_DEVIATIONS = np.array([-4, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3, 4])
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics(Collector):
    """Metrics of one server; `reference`, statistics of the model's reference data, may be empty."""

    def __init__(self, names: Sequence[str], reference: Mapping[str, Any]) -> None:
        self.registry = CollectorRegistry()
        counter, histogram = partial(Counter, registry=self.registry), partial(Histogram, registry=self.registry)
        self._requests = counter("armorm_requests", "Requests answered.", ["route", "status"])
        self._seconds = histogram("armorm_request_seconds", "Seconds to the response.", ["route"], buckets=_SECONDS)
        self.in_flight = Gauge("armorm_requests_under_way", "Requests in flight.", registry=self.registry)
        self._rows = counter("armorm_rows", "Conversations of all requests, by outcome.", ["outcome"])
        self.shared = counter("armorm_shared_rows", "Conversations that reused the result of an identical one.")
        self._tokens = counter("armorm_computed_tokens", "Tokens passed through the model, including padding.")
        self._batch_rows = histogram("armorm_batch_rows", "Rows per batch.", buckets=_ROWS)
        self._batch_seconds = histogram("armorm_batch_seconds", "Seconds per batch.", buckets=_SECONDS)
        self.out_of_memory = counter("armorm_out_of_memory", "Batches that ran out of memory.")
        self._names, self._reference = list(names), reference
        self._lock = threading.Lock()
        mean, deviation = reference.get("score_mean"), reference.get("score_std")
        mean, deviation = (mean, deviation) if mean is not None and deviation else (0.0, 0.5)
        self._count = 0
        self._score = _Tally(1, np.round(mean + deviation * _DEVIATIONS, 6))
        self._rewards = _Tally(len(self._names), _REWARD_EDGES)
        self._sums = {name: np.zeros(len(self._names)) for name in ("gating_weight", "contribution")}
        self._recent = _Recent(2 + len(self._names))

    def watch(self, batcher: Batcher, forwards: Sequence[CachedForward]) -> None:
        """Include the state of the queue and of the prompt caches, as it is at each request for the metrics."""
        self._batcher, self._forwards = batcher, forwards
        self.registry.register(self)

    def request_ended(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request, or one whose client disconnected (status 499)."""
        self.in_flight.dec()
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def rows(self, **counts: int) -> None:
        """Count rows by outcome: scored, refused, or dropped from the queue as their client disconnected."""
        for outcome, count in counts.items():
            self._rows.labels(outcome).inc(count)

    def batch(self, rows: int, tokens: int, seconds: float) -> None:
        self._batch_rows.observe(rows)
        self._batch_seconds.observe(seconds)
        self._tokens.inc(tokens)

    def scored(self, batch: ScoreBatch) -> None:
        """Add plain (not steered, not normalised) scores."""
        contributions = batch.contributions.astype(np.float64)
        assert batch.response_tokens is not None
        with self._lock:
            self._recent.add(np.column_stack([batch.scores, batch.response_tokens, contributions]))
            self._count += len(batch)
            self._score.add(batch.scores[:, None].astype(np.float64))
            self._rewards.add(batch.rewards.astype(np.float64))
            self._sums["gating_weight"] += batch.gating_weights.sum(0, dtype=np.float64)
            self._sums["contribution"] += contributions.sum(0)

    def collect(self) -> Iterable[Any]:
        rows, tokens = self._batcher.waiting
        entries, size = (sum(counts) for counts in zip(*(forward.cached for forward in self._forwards), strict=True))
        hits, misses, saved = (
            sum(getattr(forward, name) for forward in self._forwards) for name in ("hits", "misses", "saved")
        )
        yield GaugeMetricFamily("armorm_waiting_rows", "Distinct conversations in the queue.", rows)
        yield GaugeMetricFamily("armorm_waiting_tokens", "Tokens in the queue.", tokens)
        yield GaugeMetricFamily("armorm_batch_token_budget", "Most tokens per batch.", self._batcher.budget)
        cache = "armorm_prompt_cache"
        yield CounterMetricFamily(f"{cache}_hits", "Prompts found in the cache.", hits)
        yield CounterMetricFamily(f"{cache}_misses", "Prompts not found in the cache.", misses)
        yield GaugeMetricFamily(f"{cache}_entries", "Cached prompts.", entries)
        yield GaugeMetricFamily(f"{cache}_bytes", "Bytes of cached keys and values.", size)
        text = "Tokens of shared prompts that were not computed again."
        yield CounterMetricFamily("armorm_spared_tokens", text, saved)
        yield from self._score_families()

    def _score_families(self) -> Iterable[Any]:
        text = "Scores of plain (not steered) distinct conversations."
        score = HistogramMetricFamily("armorm_score", text, labels=[])
        rewards = HistogramMetricFamily("armorm_reward", "Their predicted rewards.", labels=["objective"])
        with self._lock:
            self._score.show(score, 0, {})
            for i, name in enumerate(self._names):
                self._rewards.show(rewards, i, {"objective": name})
            count, sums = self._count, {name: values.tolist() for name, values in self._sums.items()}
            recent = self._recent.means.tolist()
        yield from (score, rewards)
        for name, values in sums.items():
            summary = SummaryMetricFamily(f"armorm_{name}", f"Their {name}s.", labels=["objective"])
            for objective, value in zip(self._names, values, strict=True):
                summary.add_metric([objective], count, value)
            yield summary
        if recent:
            yield GaugeMetricFamily("armorm_recent_score", "Mean score of about the last thousand rows.", recent[0])
            yield GaugeMetricFamily("armorm_recent_response_tokens", "Mean length of their responses.", recent[1])
            yield self._by_objective("armorm_recent_contribution", "Mean contribution to their score.", recent[2:])
        for key, name in (("reward_means", "reward"), ("gating_weights", "gating_weight")):
            if self._reference.get(key):
                text = f"Mean {name} of the reference data."
                yield self._by_objective(f"armorm_reference_{name}", text, self._reference[key])
        for key in ("score_mean", "score_std"):
            value = self._reference.get(key)
            if value is not None:
                yield GaugeMetricFamily(f"armorm_reference_{key}", f"{key} of the reference data.", value)

    def _by_objective(self, name: str, text: str, values: Sequence[float]) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, text, labels=["objective"])
        for objective, value in zip(self._names, values, strict=True):
            gauge.add_metric([objective], float(value))
        return gauge


class _Tally:
    """Histograms of several columns as arrays: a few operations per batch, not one per row and column."""

    def __init__(self, columns: int, edges: np.ndarray) -> None:
        self.edges = edges  # ascending upper bounds (inclusive) of the buckets
        self.buckets = np.zeros((columns, len(edges) + 1))
        self.sums = np.zeros(columns)

    def add(self, values: np.ndarray) -> None:
        bins = np.searchsorted(self.edges, values, side="left")
        np.add.at(self.buckets, (np.broadcast_to(np.arange(values.shape[1]), bins.shape), bins), 1)
        self.sums += values.sum(0)

    def show(self, family: HistogramMetricFamily, column: int, labels: Mapping[str, str]) -> None:
        """Add cumulative buckets, count and sum of a column to a metric family."""
        cumulative = self.buckets[column].cumsum().tolist()
        family.add_metric(
            list(labels.values()),
            list(zip([*map(str, self.edges.tolist()), "+Inf"], cumulative, strict=True)),
            sum_value=None,  # (The client library omits sum and count if an edge is negative.)
        )
        family.add_sample(f"{family.name}_count", dict(labels), cumulative[-1])
        family.add_sample(f"{family.name}_sum", dict(labels), float(self.sums[column]))


class _Recent:
    """Exponentially weighted means of columns: weight (1 - 1/`rows`) for each later row."""

    def __init__(self, columns: int, rows: int = 1000) -> None:
        self._keep = 1 - 1 / rows
        self._sums, self._weight = np.zeros(columns), 0.0

    def add(self, values: np.ndarray) -> None:
        """Add rows (n, columns), oldest first."""
        ages, fade = self._keep ** np.arange(len(values) - 1, -1, -1), self._keep ** len(values)
        self._sums = self._sums * fade + ages @ values
        self._weight = self._weight * fade + ages.sum()

    @property
    def means(self) -> np.ndarray:
        """(columns,), empty before the first row."""
        return self._sums / self._weight if self._weight else np.zeros(0)
