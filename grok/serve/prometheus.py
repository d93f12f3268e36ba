"""Metrics in Prometheus' text format: requests, latencies, and the engine's counts."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from grok.serve.engine_thread import EngineThread

BUCKET_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

# Fields of EngineStats that only grow, and those of the present state.
COUNTERS = {
    "tokens_in": "tokens of prompts, those found in the cache included",
    "tokens_cached": "tokens of prompts that were found in the cache",
    "tokens_out": "new tokens",
    "preempted": "times that a sequence lost its pages and was computed again",
}
GAUGES = {
    "running": "sequences in slots",
    "waiting": "sequences that wait for a slot",
    "pages_used": "pages of the cache that sequences in slots hold",
    "pages_cached": "pages of the cache that hold prefixes alone",
    "pages_free": "pages of the cache that hold nothing",
}


class Metrics:
    """Counts and latencies of requests; the engine's counts are read at each scrape."""

    def __init__(self, engine_thread: EngineThread):
        self._engine, self._registry = engine_thread, CollectorRegistry()
        self._registry.register(self)
        self.requests = Counter(
            "grok_requests", "requests answered", ("path", "code"), registry=self._registry
        )
        self.first_token = self._histogram(
            "grok_time_to_first_token_seconds", "from a request to its first token"
        )
        self.duration = self._histogram(
            "grok_request_seconds", "from a request to the end of its answer"
        )

    def _histogram(self, name: str, meaning: str) -> Histogram:
        return Histogram(name, meaning, registry=self._registry, buckets=BUCKET_SECONDS)

    def collect(self) -> Iterator[Metric]:
        """The engine's counts, for the registry."""
        stats = self._engine.stats
        for name, meaning in COUNTERS.items():
            yield CounterMetricFamily(f"grok_{name}", meaning, getattr(stats, name))
        for name, meaning in GAUGES.items():
            yield GaugeMetricFamily(f"grok_{name}", meaning, getattr(stats, name))
        yield GaugeMetricFamily("grok_requests_live", "requests under way", self._engine.live)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
