"""What /metrics tells to Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from grok.serve.engine_thread import EngineThread

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

# Of the engine's counts: those that only grow, and those of now.
TOTALS = {
    "tokens_in": "tokens of prompts, those found in the cache included",
    "tokens_cached": "tokens of prompts that were found in the cache",
    "tokens_out": "new tokens",
    "preempted": "times that an answer gave up its pages and was run again",
}
NOW = {
    "running": "answers in slots",
    "waiting": "answers that wait for a slot",
    "pages_used": "pages of the cache that answers in slots hold",
    "pages_cached": "pages of the cache that hold prefixes alone",
    "pages_free": "pages of the cache that hold nothing",
}


class Metrics:
    """Counts of requests and times, and the engine's own counts whenever someone looks."""

    def __init__(self, engine_thread: EngineThread):
        self._engine_thread, self._registry = engine_thread, CollectorRegistry()
        self._registry.register(self)
        self.requests = Counter(
            "grok_requests", "requests answered", ("path", "code"), registry=self._registry
        )
        self.first_token = Histogram(
            "grok_time_to_first_token_seconds",
            "from a request to its first token",
            registry=self._registry,
            buckets=SECONDS,
        )
        self.duration = Histogram(
            "grok_request_seconds",
            "from a request to the end of its answer",
            registry=self._registry,
            buckets=SECONDS,
        )

    def collect(self) -> Iterator[Metric]:
        """The engine's counts, for the registry."""
        stats = self._engine_thread.stats
        for name, meaning in TOTALS.items():
            yield CounterMetricFamily(f"grok_{name}", meaning, getattr(stats, name))
        for name, meaning in NOW.items():
            yield GaugeMetricFamily(f"grok_{name}", meaning, getattr(stats, name))
        yield GaugeMetricFamily(
            "grok_requests_live", "requests under way", self._engine_thread.live
        )

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
