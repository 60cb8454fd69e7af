"""What the server counts, for Prometheus."""

import prometheus_client as prometheus

from keras_cifar.serving.batching import Batcher
from keras_cifar.serving.servable import Versions

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST

# Bounds of the histograms: seconds of a request, rows of a batch.
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters and histograms for Prometheus."""

    def __init__(self, versions: Versions, batcher: Batcher):
        self._registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self._registry)
        common = {"registry": self._registry, "namespace": "keras_cifar"}
        self._requests = prometheus.Counter(
            "requests", "Requests answered.", ("kind", "code"), **common
        )
        self._seconds = prometheus.Histogram(
            "request_seconds", "Seconds per request.", ("kind",), **common, buckets=_SECONDS
        )
        rows = prometheus.Histogram("batch_rows", "Images per batch.", **common, buckets=_ROWS)
        batcher.observe = rows.observe
        waiting = prometheus.Gauge("waiting_rows", "Images waiting for a batch.", **common)
        waiting.set_function(lambda: batcher.waiting)
        version = prometheus.Gauge("model_version", "The version being served.", **common)
        version.set_function(lambda: versions.current.version)
        loaded = prometheus.Gauge("versions_in_memory", "Replaced ones are freed soon.", **common)
        loaded.set_function(lambda: 1 + len(versions.replaced))

    def count(self, kind: str, code: int | str, seconds: float) -> None:
        """Counts a request of a kind that was answered with a status."""
        self._requests.labels(kind, code).inc()
        self._seconds.labels(kind).observe(seconds)

    def text(self) -> bytes:
        """All metrics, in Prometheus's text format."""
        return prometheus.generate_latest(self._registry)
