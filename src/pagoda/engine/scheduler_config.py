"""What the scheduler is told at the start."""

from collections.abc import Callable

from msgspec import Struct


class SchedulerConfig(Struct, frozen=True):
    """Limits. `num_blocks` counts block 0, which is scratch and never handed out. `max_queued` requests may wait, with
    `max_queued_tokens` in their prompts (0: any number). `num_guesses`: most tokens guessed a step for one request, 0
    for none. `cache_variant(prompt_len)` names the rope variant: requests of different variants share no blocks."""

    max_batch_size: int
    max_step_tokens: int
    block_len: int
    num_blocks: int
    session_len: int
    prefix_caching: bool = True
    max_queued: int = 256
    max_queued_tokens: int = 0
    num_guesses: int = 0
    cache_variant: Callable[[int], int] = lambda _: 0
