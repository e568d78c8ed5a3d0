"""Bodies of requests: read within limits, checked strictly, every known field honoured or refused."""

import asyncio
import re
from itertools import islice
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError
from starlette.requests import ClientDisconnect, Request

from pagoda.config import GenerationConfig
from pagoda.engine.request import MAX_LOGIT_BIAS
from pagoda.errors import MediaTypeError, RequestError, SlowRequestError
from pagoda.serve.error_map import ClientGoneError

READ_SECONDS = 20.0
MAX_CHOICES = 128

REFUSED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "functions": (None, []),
    "function_call": (None, "none"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "web_search_options": (None,),
    "image_data": (None, []),
    "allowed_token_ids": (None,),
    "truncate_prompt_tokens": (None,),
    "include_stop_str_in_output": (None, False),
    "return_token_ids": (None, False),
    "repetition_ngram_size": (None, 0),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1, 1.0),
    "continue_final_message": (None, False),
    "add_generation_prompt": (None, True),
    "sequence_start": (None, True),
    "sequence_end": (None, True),
    "prompt_logprobs": (None,),
    "documents": (None, []),
    "chat_template": (None,),
    "logits_processors": (None, []),
    "kv_transfer_params": (None,),
    "best_of": (None, 1),
    "n": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "max_tokens": (None,),
    "request_output_len": (None,),
    "input_ids": (None, []),
    "do_preprocess": (None, True),
    "add_special_tokens": (None, False),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None, {}),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), (None,)),
}
"""Fields that would change the output and are not supported, by no route or not by all, with the values that ask for
nothing."""

HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "prediction", "verbosity", "moderation", "request_id", "session_id",
    "spaces_between_special_tokens", "stream_interval", "repetition_ngram_threshold"
}  # fmt: skip
B, T = TypeVar("B", bound="Body"), TypeVar("T")


class First(FailFast):
    __hash__ = object.__hash__  # a union's members must have one


Many = Annotated[list[T], First()]
"""A list whose first wrong item is told. All of them would be millions, and take a minute."""


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"at most {MAX_LOGIT_BIAS} entries are possible")
    return value


class Body(BaseModel):
    """Strict types: no text for a number, no number for a truth value, no NaN."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore", protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(Body):
    """What every generating route understands. Null means: not given."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | Many[str | int] | bool | None = None
    stop_token_ids: Many[int] | None = None
    min_tokens: int | None = Field(None, ge=0)
    min_new_tokens: int | None = Field(None, ge=0)
    bad_words: Many[str] | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_few)] | None = None
    ignore_eos: bool | None = None
    do_sample: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = Field(None, gt=-(2**31), lt=2**31)
    cache_salt: str | None = Field(None, max_length=256)
    stream: bool | None = None

    def generation(self, tenant: str = "", **more: Any) -> GenerationConfig:
        """The same as `GenerationConfig`; `more` are fields that the family names in its own way."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if stops is True:
            raise RequestError("stop is true: give texts, token ids or false.", "stop")
        salt = f"{tenant}/{self.cache_salt or ''}"
        return GenerationConfig(
            do_sample=self.do_sample,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            random_seed=None if self.seed is None else self.seed % 2**64,
            stop_words=[s for s in stops if isinstance(s, str) and s] or None,
            stop_token_ids=[s for s in stops if isinstance(s, int)] + (self.stop_token_ids or []) or None,
            min_new_tokens=self.min_new_tokens or self.min_tokens or 0,
            bad_words=self.bad_words or None,
            logit_bias=_logit_bias(self.logit_bias),
            ignore_eos=bool(self.ignore_eos),
            priority=self.priority or 0,
            cache_salt=salt,
            **{"skip_special_tokens": self.skip_special_tokens is not False, **more},
        )


class OpenAIBody(SamplingBody):
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: Many[str] | None = None
    guided_grammar: str | None = None

    def format(self) -> dict[str, Any] | None:
        """The one response format that is asked for, under whatever name."""
        given = [] if self.response_format is None else [self.response_format]
        named = {k: v for k, v in (self.structured_outputs or {}).items() if v is not None}
        if named.get("json_object") is False:
            del named["json_object"]
        for kind in ("json", "regex", "choice", "grammar"):
            value = getattr(self, f"guided_{kind}")
            if value is not None:
                named[kind] = value
        for kind, value in named.items():
            if kind not in ("json", "json_object", "regex", "choice", "grammar"):
                raise RequestError(f"structured_outputs.{kind} is not supported: leave it out.", "structured_outputs")
            if kind == "json" and isinstance(value, str):
                value = load_json(value.encode())
            field = {"json": "schema", "choice": "choices"}.get(kind, kind)
            given.append({"type": {"json": "json_schema"}.get(kind, kind), field: value})
        if len(given) > 1:
            raise RequestError("Several response formats are given: give one.", "response_format")
        return given[0] if given else None


class ChatBody(OpenAIBody):
    messages: str | Many[dict[str, Any]] = Field(max_length=8 << 20)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Many[dict[str, Any]] | None = Field(None, max_length=256)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = Field(None, max_length=32)


class CompletionBody(OpenAIBody):
    prompt: str | Many[str] | Many[int] | Many[Many[int]]
    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=1)
    add_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)


def _logit_bias(given: dict[str, float] | None) -> dict[int, float] | None:
    try:
        return {int(k): float(v) for k, v in (given or {}).items()} or None
    except ValueError:
        raise RequestError("logit_bias must map token ids to numbers.", "logit_bias") from None


def load_json(data: bytes) -> Any:
    """Strict JSON: valid UTF-8, no lone surrogates, no NaN, nothing nested without bound."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body is not valid JSON: {error}.") from None


async def read_body(request: Request, kind: type[B]) -> B:
    """Read and check a body. Unknown fields go into the header `x-ignored-fields`."""
    return check(request, await read_json(request), kind)


async def read_json(request: Request) -> Any:
    """The body, parsed."""
    sent = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if sent != "application/json" and not sent.endswith("+json"):
        raise MediaTypeError(f"The body is {sent[:64]!r}: send application/json.")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise MediaTypeError("The body is compressed: send it plain.")
    try:
        data = await asyncio.wait_for(request.body(), READ_SECONDS)
    except asyncio.TimeoutError:
        raise SlowRequestError(f"The body did not arrive within {READ_SECONDS:g} s.") from None
    except ClientDisconnect:
        raise ClientGoneError("The client left before its body was there.") from None
    return load_json(data)


def check(request: Request, given: Any, kind: type[B]) -> B:
    """A parsed body as `kind`."""
    if not isinstance(given, dict):
        raise RequestError("The body must be a JSON object.")
    for field in (f for f in REFUSED if f in given and f not in kind.model_fields):
        if not any(given[field] == value and type(given[field]) is type(value) for value in REFUSED[field]):
            raise RequestError(f"{field} is not supported here: leave it out.", field)
    unknown = (f for f in given if f not in kind.model_fields and f not in REFUSED and f not in HARMLESS)
    plain = (f for f in islice(unknown, 1000) if re.fullmatch(r"[\w.-]{1,64}", f, re.ASCII))
    request.state.ignored = sorted(islice(plain, 16))
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:128]
        raise RequestError(f"{where}: {first['msg']}.", str(first["loc"][0]) if first["loc"] else None) from None


class InteractiveBody(SamplingBody):
    """The stateful route of old; `stop: true` and `cancel` interrupt the session's running turn."""

    prompt: str | Many[dict[str, Any]] = ""
    session_id: int = Field(-1, ge=-1, lt=2**63)
    interactive_mode: bool = False
    cancel: bool = False
    request_output_len: int | None = Field(512, ge=0)


class GenerateBody(SamplingBody):
    """The newer body of `/generate`: a raw prompt, or its ids."""

    prompt: str | None = None
    input_ids: Many[int] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    add_special_tokens: bool | None = None
    return_logprob: bool | None = None


class EncodeBody(Body):
    input: str | Many[str]
    do_preprocess: bool = False
    add_bos: bool = True


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Many[dict[str, Any]] | None = None
    tools: Many[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Many[int]


class AbortBody(Body):
    """`request_id`: the id of an answer, or its number alone."""

    request_id: str | None = Field(None, max_length=128)
    abort_all: bool = False


class SessionFileBody(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}$")
