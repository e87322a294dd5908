"""What `/metrics` shows, in a registry of its own so that two servers in one process do not mix."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self, in_work: Callable[[], int], rows: Callable[[], int]):
        self.registry = CollectorRegistry()
        registry = {"registry": self.registry}
        self.requests = Counter(
            "vreflection_requests", "Requests for answers by HTTP status, refused ones too", ["status"], **registry
        )
        self.disconnected = Counter("vreflection_disconnected", "Requests whose client went away", **registry)
        self.tokens = Counter("vreflection_tokens", "Tokens: prompt, completion, latent steps", ["kind"], **registry)
        self.seconds = Histogram(
            "vreflection_request_seconds", "From request to whole answer", buckets=SECONDS, **registry
        )
        self.first = Histogram(
            "vreflection_first_token_seconds", "From request to first token", buckets=SECONDS, **registry
        )
        Gauge("vreflection_answers_in_work", "Answers queued or decoding", **registry).set_function(in_work)
        Gauge("vreflection_rows_decoding", "Rows of the batch in use", **registry).set_function(rows)

    def text(self) -> bytes:
        return generate_latest(self.registry)
