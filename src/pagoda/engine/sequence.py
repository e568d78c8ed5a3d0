"""What the scheduler remembers of a live request, and of each of its rows in flight."""

from dataclasses import dataclass, field

from msgspec import Struct

from pagoda.engine.lookup import Lookup
from pagoda.engine.request import EngineRequest, TokenLogprobs


@dataclass(eq=False, slots=True)
class Sequence:
    """A live request: waiting (slot -1) or running. `tokens` is the prompt with its session's history, then what was
    generated and digested; `num_computed` positions and `pending` sampled tokens are launched, digested or not."""

    request: EngineRequest
    order: tuple[int, int]  # priority, then arrival: the smallest runs first, the largest is preempted first
    tokens: list[int]
    num_prompt: int
    limit: int  # most tokens, the prompt included
    root: bytes  # of the names of its blocks
    held: bool  # waits for something beside a slot
    names: list[bytes] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    slot: int = -1
    num_computed: int = 0
    num_found: int = 0  # blocks of the table that the prefix cache had
    anew: bool = False  # it failed with such blocks once: they are not looked for any more
    num_named: int = 0  # blocks of the table that the prefix cache was told of
    pending: int = 0
    sampled: bool = False  # the slot's last token lies on the device: from now on one token a step
    epoch: int = 0  # rows launched in an earlier epoch are void
    num_cached: int | None = None  # at the first admission
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    last_output: float = 0.0
    lookup: Lookup | None = None  # where its tokens are guessed
    watched: bool = False  # by a grammar or who guesses: its tokens must be known before its next step

    @property
    def scores_prompt(self) -> bool:
        """Log-probabilities of the prompt are still owed."""
        return self.request.params.prompt_logprobs is not None and len(self.tokens) == self.num_prompt


class Launched(Struct, gc=False):
    """One row of a step in flight."""

    seq: Sequence
    epoch: int
    slot: int
    end: int  # positions computed after the row
    samples: int
    guesses: list[int] | tuple[()]
