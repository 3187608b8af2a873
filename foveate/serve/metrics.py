"""Metrics for Prometheus, of one server."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """What is counted.

    Args:
        waiting: says how many questions no batch has begun.
        held: says how many requests are held.
    """

    def __init__(self, waiting: Any, held: Any) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry, "namespace": "foveate"}
        self._requests = Counter("requests", "Requests by outcome.", ["path", "outcome"], **own)
        self._visual = Counter("visual_tokens", "Visual tokens of prompts.", ["when"], **own)
        self._kv = Counter("kv_bytes", "Cache bytes after prompts.", ["when"], **own)
        self._tokens = Counter("answer_tokens", "Tokens of answers.", **own)
        self._first = Histogram("first_token_seconds", "From the queue to the first token.",
                                buckets=SECONDS, **own)  # fmt: skip
        self._total = Histogram("answer_seconds", "From the queue to the end of an answer.",
                                buckets=SECONDS, **own)  # fmt: skip
        self._batch = Histogram("batch_rows", "Requests that were answered together, "
                                "as each of them saw it.", buckets=ROWS, **own)  # fmt: skip
        Gauge("queue_length", "Requests that wait for the model.", **own).set_function(waiting)
        Gauge("held_requests", "Requests that are held.", **own).set_function(held)

    def answered(self, said: dict[str, Any]) -> None:
        """Count an answer.

        Args:
            said: of it, `foveate`, `tokens` and `batch`.
        """
        visual, kv = said["foveate"]["visual_tokens"], said["foveate"]["kv_bytes"]
        seconds = said["foveate"]["seconds"]
        self._visual.labels("before").inc(visual["before"])
        self._visual.labels("after").inc(visual["after"])
        self._kv.labels("all").inc(kv["all"])
        self._kv.labels("now").inc(kv["now"])
        self._tokens.inc(said["tokens"])
        self._first.observe(seconds["first_token"])
        self._total.observe(seconds["total"])
        self._batch.observe(said["batch"])

    def ended(self, path: str, outcome: str) -> None:
        """Count a request: `answered`, `cancelled`, or the status of what was said instead."""
        self._requests.labels(path, outcome).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' format."""
        return generate_latest(self._registry)
