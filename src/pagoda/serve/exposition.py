"""The engine's counters in Prometheus' text format, under our names and those that existing dashboards read."""

from collections.abc import Iterator
from typing import Any

from pagoda.engine.metrics import EngineStats, Histogram

NAMES: list[tuple[str, str, str, str | None, str | None]] = [
    # ours, kind, what it tells, vllm's, lmdeploy's
    ("requests_running", "gauge", "requests in the batch", "num_requests_running", "num_requests_running"),
    ("requests_waiting", "gauge", "requests in the queue", "num_requests_waiting", "num_requests_waiting"),
    ("kv_cache_usage", "gauge", "share of the KV blocks in use", "kv_cache_usage_perc", "gpu_cache_usage_perc"),
    ("kv_blocks_cached", "gauge", "KV blocks that a prompt may find again", None, None),
    ("sessions", "gauge", "conversations remembered", None, None),
    ("prompt_tokens", "counter", "tokens of admitted prompts", "prompt_tokens", "prompt_tokens"),
    ("generation_tokens", "counter", "tokens generated", "generation_tokens", "generation_tokens"),
    ("cached_tokens", "counter", "prompt tokens found in the cache", "prefix_cache_hits", "cached_tokens"),
    ("queried_tokens", "counter", "prompt tokens looked up in the cache", "prefix_cache_queries", None),
    ("preemptions", "counter", "requests put back into the queue", "num_preemptions", None),
    ("refused", "counter", "requests refused by the engine", "admission_rejections", None),
    ("steps", "counter", "forward passes", None, None),
    ("request_success", "counter", "requests ended, by reason", "request_success", "request_success"),
    ("time_to_first_token_seconds", "histogram", "arrival to first token", "time_to_first_token_seconds",
     "time_to_first_token_seconds"),
    ("inter_token_latency_seconds", "histogram", "between tokens", "inter_token_latency_seconds",
     "iter_token_latency"),
    ("e2e_request_latency_seconds", "histogram", "arrival to end", "e2e_request_latency_seconds",
     "e2e_request_latency_seconds"),
    ("request_queue_time_seconds", "histogram", "in the queue", "request_queue_time_seconds", "queue_time_seconds"),
]  # fmt: skip


def values(stats: EngineStats) -> dict[str, Any]:
    """A number, a dict of numbers by reason, or a histogram for each of our names."""
    c = stats.counters
    return {
        "requests_running": stats.num_running,
        "requests_waiting": stats.num_waiting,
        "kv_cache_usage": stats.blocks_used / max(1, stats.num_blocks),
        "kv_blocks_cached": stats.blocks_cached,
        "sessions": stats.num_sessions,
        "prompt_tokens": c.prompt_tokens,
        "generation_tokens": c.generated_tokens,
        "cached_tokens": c.cached_tokens,
        "queried_tokens": c.prompt_tokens,
        "preemptions": c.preemptions,
        "refused": c.refused,
        "steps": c.steps,
        "request_success": c.finished,
        "time_to_first_token_seconds": c.first_token_time,
        "inter_token_latency_seconds": c.inter_token_time,
        "e2e_request_latency_seconds": c.total_time,
        "request_queue_time_seconds": c.queue_time,
    }


def exposition(stats: EngineStats, model: str) -> str:
    """The whole page."""
    escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    labels, found, lines = f'model_name="{escaped}",engine="0"', values(stats), []
    for name, kind, about, vllm, lmdeploy in NAMES:
        for prefix, alias in (("pagoda", name), ("vllm", vllm), ("lmdeploy", lmdeploy)):
            if alias is not None:
                lines += [f"# HELP {prefix}:{alias} {about}", f"# TYPE {prefix}:{alias} {kind}"]
                lines += _samples(f"{prefix}:{alias}" + ("_total" if kind == "counter" else ""), labels, found[name])
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
