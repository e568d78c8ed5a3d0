"""One step as plain data: what the scheduler asks of the runner, and what comes back."""

from msgspec import Struct

from pagoda.engine.request import SamplingParams, TokenLogprobs

NO_TOKEN = (
    "No next token could be chosen: the model's scores are not finite numbers, or every token is banned; "
    "send another prompt, or serve the model with another dtype."
)


class SlotInit(Struct):
    """A slot gets a new tenant, before this step's rows run.

    `history` is prompt + tokens generated so far (for penalties and bad words; `len(history) - num_prompt` tokens were
    generated, so sampling goes on at that count after a preemption). `rope_len` is the length of the prompt at the
    first admission: it decides the rope variant for the request's whole life.
    """

    slot: int
    id: str
    params: SamplingParams
    history: list[int]
    num_prompt: int
    rope_len: int


class Row(Struct, gc=False):
    """`num_tokens` positions of one slot, from `start` on, whose keys and values this step computes.

    `tokens` None: one token, the slot's last sampled one, which may still be only on the device. `samples`: so many of
    the row's last positions yield a token each; more than one where the tokens after the first of them are guesses,
    and then what follows a wrong guess is void: in the result, in the cache, and for the slot's counters.
    `prompt_logprobs`: the row must report those of the prompt's tokens start+1 ..
    min(start+num_tokens, num_prompt-1), which its positions predict.
    """

    slot: int
    start: int
    num_tokens: int = 1
    tokens: list[int] | None = None
    samples: int = 1
    prompt_logprobs: bool = False


class Schedule(Struct):
    """One step. Apply in this order: `freed` slots, `inits`, `block_updates` (slot,
    index in the slot's table, block), then run `rows`: those with `tokens` None first. `needs_masks`: a row that
    samples belongs to a request with a grammar (all its earlier tokens have been digested)."""

    step: int
    rows: list[Row]
    inits: list[SlotInit] = []
    block_updates: list[tuple[int, int, int]] = []
    freed: list[int] = []
    needs_masks: bool = False


class StepResult(Struct):
    """What a step yields: `tokens` and `logprobs` (None where not asked) stand beside the positions that sample, in the
    order of `Schedule.rows`; `prompt_logprobs` by slot; `errors` by slot end a request (sentence for the client), and
    so does a token -1: none could be chosen, for no score was finite."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None = None
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    errors: dict[int, str] = {}
