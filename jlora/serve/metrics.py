"""What the server counts, in Prometheus' text format."""

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from jlora.serve.engine import Engine

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """Of one engine."""

    def __init__(self, engine: Engine):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("jlora_requests", "Requests by path and status.", ("path", "status"), registry=registry)
        self.prompt_tokens = Counter("jlora_prompt_tokens", "Tokens of prompts.", ("model",), registry=registry)
        self.generated_tokens = Counter("jlora_generated_tokens", "Tokens of answers.", ("model",), registry=registry)
        self.first_token = Histogram(
            "jlora_time_to_first_token_seconds",
            "From a request to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.seconds = Histogram(
            "jlora_request_seconds", "From a request to the end of its answer.", buckets=_SECONDS, registry=registry
        )
        gauges = {
            "jlora_slots": ("Rows at a time.", lambda: engine.slots),
            "jlora_slots_busy": ("Rows that are being computed.", lambda: engine.running),
            "jlora_queue_length": ("Rows that wait for a slot.", lambda: engine.waiting),
            "jlora_steps": ("Steps of all rows at once.", lambda: engine.steps),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=registry).set_function(value)

    def text(self) -> bytes:
        return prometheus_client.generate_latest(self._registry)
