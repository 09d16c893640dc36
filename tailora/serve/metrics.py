"""The metrics of GET /metrics, in Prometheus' format."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tailora.engine.interface import Engine
from tailora.serve.registry import AdapterRegistry


class Metrics:
    def __init__(self, engine: Engine, registry: AdapterRegistry) -> None:
        self.collector = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.collector}
        self.requests = Counter("tailora_requests", "requests by model and status", ["model", "status"], **options)
        by_model: dict[str, Any] = {"labelnames": ["model"], **options}
        self.prompt_tokens = Counter("tailora_prompt_tokens", "prompt tokens", **by_model)
        self.tokens = Counter("tailora_generation_tokens", "generated tokens", **by_model)
        self.first_token = Histogram("tailora_time_to_first_token_seconds", "time to the first token", **by_model)
        Gauge("tailora_requests_running", "running completions", **options).set_function(lambda: engine.load[0])
        Gauge("tailora_requests_waiting", "waiting completions", **options).set_function(lambda: engine.load[1])
        Gauge("tailora_adapters", "available adapters", **options).set_function(lambda: len(registry.list()))
        Gauge("tailora_adapters_in_memory", "adapters in memory", **options).set_function(
            lambda: len(registry.in_memory())
        )

    def forget(self, model: str) -> None:
        """Drops a model's metrics, so that short-lived names do not accumulate in memory."""
        for metric in (self.requests, self.prompt_tokens, self.tokens, self.first_token):
            metric.remove_by_labels({"model": model})
