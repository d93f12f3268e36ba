"""Metrics in Prometheus' text format: requests, latencies, and the engine's counts."""

import dataclasses
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from grok.serve.engine_thread import EngineThread

BUCKET_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


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
        for field in dataclasses.fields(stats):
            family = CounterMetricFamily if field.metadata["total"] else GaugeMetricFamily
            value = getattr(stats, field.name)
            yield family(f"grok_{field.name}", field.metadata["meaning"], value)
        yield GaugeMetricFamily("grok_requests_live", "requests under way", self._engine.live)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
