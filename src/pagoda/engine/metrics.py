"""What the engine counts about itself, as plain data; `serve/` turns it into its own format."""

from bisect import bisect_left

from msgspec import Struct, field

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Histogram(Struct):
    """`counts[i]` values were at most `bounds[i]` and above the bound before; the last count has no bound."""

    bounds: tuple[float, ...] = SECONDS
    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def add(self, value: float) -> None:
        """Negative values (clocks of two processes) count as 0."""
        value = value if value > 0.0 else 0.0
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def num(self) -> int:
        return sum(self.counts)


class Counters(Struct):
    """Sums since the start; they only grow. Times are in seconds; tokens of the prompt count at each admission;
    `accepted_tokens` of the `guessed_tokens` were right (speculation)."""

    steps: int = 0
    step_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    refused: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "abort", "error"), 0))
    queue_time: Histogram = field(default_factory=Histogram)
    first_token_time: Histogram = field(default_factory=Histogram)
    inter_token_time: Histogram = field(default_factory=Histogram)
    total_time: Histogram = field(default_factory=Histogram)


class EngineStats(Struct):
    """One moment. `blocks_used` have an owner; `blocks_cached` can be found by their tokens, owned or not."""

    num_running: int
    num_waiting: int
    num_sessions: int
    num_blocks: int
    blocks_used: int
    blocks_cached: int
    counters: Counters
