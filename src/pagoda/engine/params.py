"""From a `GenerationConfig` and the model's own defaults to the `SamplingParams` of one request."""

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pagoda.config import GenerationConfig
from pagoda.engine.request import SamplingParams
from pagoda.engine.wire import EngineInfo
from pagoda.errors import CheckpointError, PromptTooLongError, RequestError

API_MAX_NEW_TOKENS = 512


def read_generation_defaults(folder: Path) -> dict[str, Any]:
    """`generation_config.json` beside a checkpoint or tokenizer; empty when there is none."""
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    try:
        defaults = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): restore the file.") from error
    return defaults if isinstance(defaults, dict) else {}


def id_list(value: Any) -> list[int]:
    """Token ids as checkpoints write them: one, a list, or none."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [int(value)]


def sampling_params(
    gen: GenerationConfig,
    defaults: Mapping[str, Any],
    info: EngineInfo,
    prompt_len: int,
    encode: Callable[[str], list[int]],
    *,
    stop_ids: tuple[int, ...] = (),
    max_new_tokens: int | None = API_MAX_NEW_TOKENS,
    grammar: str | None = None,
) -> SamplingParams:
    """Resolve every None of `gen` by the model's `defaults` (generation_config.json), then by our own.

    `prompt_len` counts the session's history. `stop_ids` come from the chat template. `max_new_tokens` is the limit
    when `gen` has none; None: the rest of the session. Sampling is on when the call sets temperature, top_k or top_p,
    or the model's file says so. Raises `PromptTooLongError` when not one token has room, and
    `RequestError` for token ids that the model does not have.
    """
    room = info.session_len - prompt_len
    if room < 1:
        raise PromptTooLongError(
            f"The prompt has {prompt_len} tokens and the session holds {info.session_len}: shorten the prompt or raise "
            "session_len.",
            "prompt",
        )
    asked = any(v is not None for v in (gen.temperature, gen.top_k, gen.top_p, gen.min_p))
    sampled = gen.do_sample if gen.do_sample is not None else asked or bool(defaults.get("do_sample"))
    given = _given(gen, defaults)
    ends = () if gen.ignore_eos else (*info.eos_ids, *id_list(defaults.get("eos_token_id")), *stop_ids)
    bad = [tuple(encode(word)) for word in gen.bad_words or ()]
    bad += [(token,) for token in id_list(defaults.get("suppress_tokens"))]
    _check_ids(info.vocab_size, "stop_token_ids", gen.stop_token_ids or ())
    _check_ids(info.vocab_size, "logit_bias", gen.logit_bias or ())
    possible = range(info.vocab_size)  # a tokenizer or a model's file may know more than there are logits
    max_tokens = min(room, gen.max_new_tokens or max_new_tokens or room)
    return SamplingParams(
        temperature=given("temperature", 1.0) if sampled else 0.0,
        top_k=min(given("top_k", 0), info.vocab_size),
        top_p=given("top_p", 1.0),
        min_p=given("min_p", 0.0),
        repetition_penalty=given("repetition_penalty", 1.0),
        presence_penalty=gen.presence_penalty,
        frequency_penalty=gen.frequency_penalty,
        seed=gen.random_seed if gen.random_seed is not None else secrets.randbits(64),
        max_tokens=max_tokens,
        min_tokens=min(gen.min_new_tokens, max_tokens),
        stop_ids=tuple(t for t in dict.fromkeys((*ends, *(gen.stop_token_ids or ()))) if t in possible),
        logprobs=gen.logprobs,
        prompt_logprobs=gen.prompt_logprobs,
        logit_bias=dict(gen.logit_bias or {}),
        bad_words=tuple(word for word in bad if word and all(t in possible for t in word)),
        grammar=grammar,
    )


def _given(gen: GenerationConfig, defaults: Mapping[str, Any]) -> Callable[[str, Any], Any]:
    """Look a value up: the call's, the model's, ours."""

    def look_up(name: str, ours: Any) -> Any:
        value = getattr(gen, name)
        value = defaults.get(name) if value is None else value
        return ours if value is None else value

    return look_up


def _check_ids(vocab_size: int, name: str, ids: Any) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise RequestError(f"{name} has the token id {token}, the model has ids from 0 to {vocab_size - 1}.", name)
