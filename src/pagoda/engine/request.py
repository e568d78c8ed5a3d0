"""What enters and leaves the engine: plain structs that cross process borders as msgpack."""

from typing import Literal

from msgspec import Struct

from pagoda.errors import RequestError

FinishReason = Literal["stop", "length", "abort", "error"]

# Widths of device tensors that hold one request's lists.
MAX_STOP_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_LEN = 16
MAX_LOGPROBS = 20


class SamplingParams(Struct, frozen=True, omit_defaults=True):
    """How the tokens of one request are chosen. The client has checked every value against `GenerationConfig`
    and every token id against the width of the logits.

    The order of the filters is that of `engine/sampler.py`. `temperature` 0 is greedy. `stop_ids` includes the end of
    sequence ids unless they are ignored; at most 64. `min_tokens` counts generated tokens before which no stop id can
    be chosen. `logprobs` None: none; 0: the chosen token's; n: also the n most likely. `prompt_logprobs` alike.
    `grammar` is a grammar serialised by `text/grammar.py`. `seed` is set by the client, from 0 to 2^64-1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    max_tokens: int = 512
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] = {}
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str | None = None


def check_sizes(params: SamplingParams) -> None:
    """Raise `RequestError` for lists that are longer than the device holds."""
    for name, size, most in (
        ("stop_ids", len(params.stop_ids), MAX_STOP_IDS),
        ("logit_bias", len(params.logit_bias), MAX_LOGIT_BIAS),
        ("bad_words", len(params.bad_words), MAX_BAD_WORDS),
        ("bad_words", max(map(len, params.bad_words), default=0), MAX_BAD_WORD_LEN),
        ("logprobs", params.logprobs or 0, MAX_LOGPROBS),
        ("prompt_logprobs", params.prompt_logprobs or 0, MAX_LOGPROBS),
    ):
        if size > most:
            what = "a word of " if name == "bad_words" and most == MAX_BAD_WORD_LEN else ""
            raise RequestError(f"{name} has {what}{size} tokens or entries: at most {most} are possible.", name)
    if params.max_tokens < 1:
        raise RequestError(f"max_tokens is {params.max_tokens}: it must be 1 or more.", "max_tokens")
    if not all(params.bad_words):
        raise RequestError("bad_words has an empty word: leave it out.", "bad_words")


class EngineRequest(Struct):
    """One turn. `prompt_ids` has at least one id; with a `session_id` it is only the new text, which continues the
    session's history. `priority`: lower numbers run first. Blocks of the cache are shared among equal `salt`s only.
    `arrival` is `time.monotonic()` at the client; after `max_wait` seconds in the queue (0: no limit) the request is
    refused. `id` is made by the client and unique among live requests."""

    id: str
    prompt_ids: list[int]
    params: SamplingParams = SamplingParams()
    session_id: str | None = None
    priority: int = 0
    salt: str = ""
    arrival: float = 0.0
    max_wait: float = 0.0


class TokenLogprobs(Struct, gc=False):
    """Log-probabilities (natural logarithm) at one position: of the token itself and of the most likely ones, best
    first. They are of the model's own logits, before penalties, bias and temperature."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = []


class Output(Struct, omit_defaults=True, gc=False):
    """News of one request. Every request gets exactly one output with a `finish_reason`, and none after it.

    `token_ids` are new ones; a stop token is not among them, it is `stop_id`. `logprobs` stands beside `token_ids`.
    `prompt_logprobs` (once, with the first token): one entry for each token of the prompt, None for the first, which
    nothing predicts. `num_prompt_tokens` includes the session's history; `num_cached_tokens` of them were not computed.
    `time` is `time.monotonic()` when the engine gave it out.
    `error` is a sentence for the client, `error_kind` the class of our error tree that a refused request raised.
    """

    id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_id: int | None = None
    error: str | None = None
    error_kind: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    time: float = 0.0


def too_long(num_history: int, num_prompt: int, max_len: int) -> str:
    """Why a prompt is refused. All in tokens; `max_len`: what a session holds."""
    history = f", after {num_history} of the session's history," if num_history else ""
    return (
        f"The prompt has {num_prompt} tokens{history} but a session holds {max_len} and needs room for one more: "
        "shorten the prompt, or raise session_len and the size of the cache."
    )
