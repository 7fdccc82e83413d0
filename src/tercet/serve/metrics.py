"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

from collections.abc import Hashable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_JOBS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counts of one server, apart from those of any other in the process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "tercet_requests", "Answered requests", ["method", "path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "tercet_request_seconds", "From arrival to answer", ["path"], buckets=_SECONDS, registry=self.registry
        )
        self.waiting = Gauge("tercet_queue", "Requests that wait or are worked at", registry=self.registry)
        self.batch_jobs = Histogram(
            "tercet_batch_jobs", "Requests in a batch", ["kind"], buckets=_JOBS, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "tercet_batch_seconds", "The model's time for a batch", ["kind"], buckets=_SECONDS, registry=self.registry
        )
        self.images = Gauge("tercet_index_images", "Images in the index", registry=self.registry)

    def observe_batch(self, kind: Hashable, jobs: int, seconds: float) -> None:
        """Count a batch; `kind` is a tuple whose first part is its name."""
        name = kind[0] if isinstance(kind, tuple) else str(kind)
        self.batch_jobs.labels(name).observe(jobs)
        self.batch_seconds.labels(name).observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus's text form."""
        return generate_latest(self.registry)
