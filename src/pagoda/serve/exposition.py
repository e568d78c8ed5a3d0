"""The engine's counters in Prometheus' text format, under our names and those that existing dashboards read."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pagoda.engine.metrics import EngineStats, Histogram

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metric(NamedTuple):
    """`value`: a number, a dict of numbers by reason, or a histogram."""

    name: str
    kind: str
    about: str
    value: Callable[[EngineStats], Any]
    vllm: str | None = None
    lmdeploy: str | None = None


METRICS = (
    Metric("requests_running", "gauge", "requests in the batch", lambda s: s.num_running,
           "num_requests_running", "num_requests_running"),
    Metric("requests_waiting", "gauge", "requests in the queue", lambda s: s.num_waiting,
           "num_requests_waiting", "num_requests_waiting"),
    Metric("kv_cache_usage", "gauge", "share of the KV blocks in use", lambda s: s.blocks_used / max(1, s.num_blocks),
           "kv_cache_usage_perc", "gpu_cache_usage_perc"),
    Metric("kv_blocks_cached", "gauge", "KV blocks that a prompt may find again", lambda s: s.blocks_cached),
    Metric("sessions", "gauge", "conversations remembered", lambda s: s.num_sessions),
    Metric("prompt_tokens", "counter", "tokens of admitted prompts", lambda s: s.counters.prompt_tokens,
           "prompt_tokens", "prompt_tokens"),
    Metric("generation_tokens", "counter", "tokens generated", lambda s: s.counters.generated_tokens,
           "generation_tokens", "generation_tokens"),
    Metric("cached_tokens", "counter", "prompt tokens found in the cache", lambda s: s.counters.cached_tokens,
           "prefix_cache_hits", "cached_tokens"),
    Metric("queried_tokens", "counter", "prompt tokens looked up in the cache", lambda s: s.counters.prompt_tokens,
           "prefix_cache_queries"),
    Metric("preemptions", "counter", "requests put back into the queue", lambda s: s.counters.preemptions,
           "num_preemptions"),
    Metric("refused", "counter", "requests refused by the engine", lambda s: s.counters.refused,
           "admission_rejections"),
    Metric("steps", "counter", "forward passes", lambda s: s.counters.steps),
    Metric("request_success", "counter", "requests ended, by reason", lambda s: s.counters.finished,
           "request_success", "request_success"),
    Metric("time_to_first_token_seconds", "histogram", "arrival to first token", lambda s: s.counters.first_token_time,
           "time_to_first_token_seconds", "time_to_first_token_seconds"),
    Metric("inter_token_latency_seconds", "histogram", "between tokens", lambda s: s.counters.inter_token_time,
           "inter_token_latency_seconds", "iter_token_latency"),
    Metric("e2e_request_latency_seconds", "histogram", "arrival to end", lambda s: s.counters.total_time,
           "e2e_request_latency_seconds", "e2e_request_latency_seconds"),
    Metric("request_queue_time_seconds", "histogram", "in the queue", lambda s: s.counters.queue_time,
           "request_queue_time_seconds", "queue_time_seconds"),
)  # fmt: skip


def exposition(stats: EngineStats, model: str) -> str:
    """The whole page."""
    escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    labels, lines = f'model_name="{escaped}",engine="0"', []
    for metric in METRICS:
        for prefix, alias in (("pagoda", metric.name), ("vllm", metric.vllm), ("lmdeploy", metric.lmdeploy)):
            if alias is not None:
                name = f"{prefix}:{alias}" + ("_total" if metric.kind == "counter" else "")
                lines += [f"# HELP {name} {metric.about}", f"# TYPE {name} {metric.kind}"]
                lines += _samples(name, labels, metric.value(stats))
    return "\n".join(lines) + "\n"


def _samples(name: str, labels: str, value: Any) -> Iterator[str]:
    if isinstance(value, Histogram):
        seen = 0
        for bound, count in zip((*value.bounds, "+Inf"), value.counts):
            seen += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {seen}'
        yield f"{name}_sum{{{labels}}} {value.total}"
        yield f"{name}_count{{{labels}}} {seen}"
    elif isinstance(value, dict):
        for reason, count in sorted(value.items()):
            yield f'{name}{{{labels},finished_reason="{reason}"}} {count}'
    else:
        yield f"{name}{{{labels}}} {value}"
