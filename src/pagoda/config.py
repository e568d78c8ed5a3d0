"""Every knob, in the one place where it lives: name, default, allowed values and help stand together.

Flags of the command line, `engine.toml`, the documentation and the API's defaults are derived from these frozen
dataclasses. An unknown name or a value out of range raises `ConfigError`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from pagoda.errors import ConfigError

KV_POLICIES = ("none", "int8", "int4", "fp8")
WEIGHT_FORMATS = ("auto", "int4", "int8", "fp8")
DTYPES = ("auto", "float32", "bfloat16", "float16")

T = TypeVar("T")


class Rule(NamedTuple):
    """What a value must be: whether it is, and in words."""

    holds: Callable[[Any], bool]
    words: str


def whole(low: int, high: float = math.inf) -> Rule:
    """A whole number within these bounds."""
    words = f"{low} or more" if high == math.inf else f"{low} to {high}"
    return Rule(lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high, words)


def _finite(v: Any) -> bool:
    return isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)


def between(low: float, high: float) -> Rule:
    return Rule(lambda v: _finite(v) and low <= v <= high, f"{low:g} to {high:g}")


def several(most: int, each: Callable[[Any], bool], what: str) -> Rule:
    """A list of at most `most` values for each of which `each` holds; `what` names them."""
    return Rule(
        lambda v: isinstance(v, (list, tuple)) and len(v) <= most and all(map(each, v)), f"at most {most} {what}"
    )


def knob(
    default: Any,
    help: str,
    rule: Rule | None = None,
    *,
    choices: tuple[Any, ...] | None = None,
    parse: Callable[[Any], Any] | None = None,
    cli: bool = True,
) -> Any:
    """A field with its help, its `rule` or allowed `choices`, and how to read it from text or an old spelling
    (`parse`). Where None is the default, it is always allowed. `cli=False` keeps it off the command line."""
    meta = {"help": help, "rule": rule, "choices": choices, "parse": parse, "cli": cli}
    return dataclasses.field(default=default, metadata=meta)


def parse_bool(value: Any) -> bool:
    """`True/False/1/0/yes/no/on/off` in any case, or a bool."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    raise ConfigError(f"{value!r} is not a boolean: write True or False.")


def parse_quant_policy(value: Any) -> str:
    """A name, or a number in its present meaning (0 none, 4 int4, 8 int8); version 1 workspaces translate their own."""
    names = {0: "none", 4: "int4", 8: "int8"}
    try:
        number = int(str(value))
    except ValueError:
        return str(value)
    if number not in names:
        raise ConfigError(f"quant_policy {value} is unknown: use one of {', '.join(KV_POLICIES)}.")
    return names[number]


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


class Checked:
    """Base of the config dataclasses: checks every field on construction, builds from a mapping loudly."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, rule, choices = getattr(self, field.name), field.metadata["rule"], field.metadata["choices"]
            if value is None and field.default is None:
                continue
            if field.metadata["parse"] is not None:
                value = field.metadata["parse"](value)
                object.__setattr__(self, field.name, value)
            if choices is not None and value not in choices:
                allowed = ", ".join(map(str, choices))
                raise ConfigError(f"{field.name} is {_brief(value)}: it must be one of {allowed}.")
            if rule is not None and not rule.holds(value):
                raise ConfigError(f"{field.name} is {_brief(value)}: it must be {rule.words}.")

    @classmethod
    def from_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
        """Build from names and values; an unknown name raises `ConfigError` that lists the known ones."""
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"{cls.__name__} has no field {', '.join(unknown)}: it knows {', '.join(known)}.")
        return cls(**values)

    def replace(self: T, **changes: Any) -> T:
        """A copy with some fields changed, checked anew."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@dataclass(frozen=True)
class EngineConfig(Checked):
    """How the engine runs a model. None means: taken from the model, or worked out at start and printed."""

    tp: int = knob(1, "number of devices one model is split over (tensor parallel)", whole(1))
    session_len: int | None = knob(
        None, "longest conversation in tokens; default: the model's own, at most 32768", whole(1)
    )
    max_batch_size: int = knob(64, "requests that run at once", whole(1))
    cache_max_entry_count: float = knob(
        0.8,
        "KV cache: share of the memory that is free after the weights are loaded, or, above 1, a number of blocks",
        Rule(
            lambda v: _finite(v) and v > 0 and (v <= 1 or float(v).is_integer()),
            "a share in (0, 1] or a whole number of blocks above 1",
        ),
    )
    cache_block_seq_len: int = knob(
        64,
        "tokens in one block of the KV cache",
        Rule(lambda v: whole(8, 256).holds(v) and v & (v - 1) == 0, "a power of two from 8 to 256"),
    )
    quant_policy: str = knob("none", "number format of the KV cache", choices=KV_POLICIES, parse=parse_quant_policy)
    weight_format: str = knob(
        "auto", "auto: as the checkpoint says; else quantize a 16-bit one while loading", choices=WEIGHT_FORMATS
    )
    enable_prefix_caching: bool = knob(
        True, "share cached blocks between equal beginnings of prompts", parse=parse_bool
    )
    dtype: str = knob("auto", "number format of activations and unquantized weights", choices=DTYPES)
    device: str = knob("auto", "auto, cpu, cuda, or cuda:N")
    max_prefill_token_num: int = knob(
        8192, "most tokens one step may compute (longer prompts are cut into chunks)", whole(1)
    )
    num_threads: int | None = knob(None, "CPU threads; default: what the process may use", whole(1))
    rope_scaling_factor: float = knob(
        0.0,
        "1 or more: dynamic NTK scaling of the rotary base by this factor; 0: as the checkpoint says",
        Rule(lambda v: v == 0 or (_finite(v) and v >= 1), "0, or 1 and above"),
    )
    use_logn_attn: bool | None = knob(
        None,
        "scale queries by log of the position beyond the trained length; default: as the checkpoint says",
        parse=parse_bool,
    )
    load_format: str = knob(
        "safetensors",
        "where weights come from: safetensors, bin (unpickled with weights_only), or dummy (random)",
        choices=("safetensors", "bin", "dummy"),
    )
    executor: str = knob("local", "how ranks are started: local processes, or Ray actors", choices=("local", "ray"))
    speculative_ngram: int = knob(
        0, "prompt-lookup speculation: tokens guessed a step from repeated text; 0: off", whole(0, 16)
    )
    session_ttl: float = knob(
        3600.0,
        "seconds after its last turn until an idle session is forgotten",
        Rule(lambda v: _finite(v) and v > 0, "above 0"),
    )
    max_queued_requests: int | None = knob(None, "requests that may wait; default: four times max_batch_size", whole(1))
    max_queued_tokens: int | None = knob(
        None, "tokens that the prompts of waiting requests may have in all; default: no limit", whole(1)
    )
    cuda_graph: bool = knob(True, "replay decode steps as CUDA graphs (GPU only)", parse=parse_bool)

    def under(self, settings: Mapping[str, Any]) -> "EngineConfig":
        """This configuration with the values of a workspace's `engine.toml` wherever it still has the default."""
        defaults = EngineConfig()
        free = {k: v for k, v in settings.items() if getattr(self, k, None) == getattr(defaults, k, None)}
        return EngineConfig.from_mapping({**vars(self), **free})


@dataclass(frozen=True)
class GenerationConfig(Checked):
    """How one reply is generated. None means: the model's `generation_config.json`, else the default stated here."""

    max_new_tokens: int | None = knob(
        None, "most tokens to generate; default 512, in a chat the rest of the session", whole(1)
    )
    min_new_tokens: int = knob(0, "no end of sequence before this many tokens", whole(0))
    do_sample: bool | None = knob(None, "False: always the most likely token", parse=parse_bool)
    temperature: float | None = knob(
        None, "softens (above 1) or sharpens (below 1) the distribution; 0 is greedy", between(0, 100)
    )
    top_k: int | None = knob(None, "sample among this many most likely tokens; 0: all", whole(0))
    top_p: float | None = knob(
        None,
        "sample among the most likely tokens that hold this share",
        Rule(lambda v: _finite(v) and 0 < v <= 1, "in (0, 1]"),
    )
    min_p: float | None = knob(None, "drop tokens less likely than this share of the most likely one", between(0, 1))
    repetition_penalty: float | None = knob(
        None, "divides (multiplies) positive (negative) scores of tokens seen before; 1: off", between(0.01, 100)
    )
    presence_penalty: float = knob(0.0, "taken from the score of a token that was generated before", between(-2, 2))
    frequency_penalty: float = knob(0.0, "taken from a token's score for each time it was generated", between(-2, 2))
    random_seed: int | None = knob(
        None, "equal seeds give equal replies", whole(0, 2**64 - 1)._replace(words="a whole number from 0 to 2^64-1")
    )
    stop_words: list[str] | None = knob(
        None,
        "texts that end the reply; they are not part of it",
        several(16, lambda s: isinstance(s, str) and 0 < len(s) <= 256, "texts of 1 to 256 characters"),
    )
    stop_token_ids: list[int] | None = knob(
        None, "token ids that end the reply", several(64, lambda t: isinstance(t, int) and t >= 0, "token ids")
    )
    bad_words: list[str] | None = knob(
        None,
        "texts that must not be generated",
        several(64, lambda s: isinstance(s, str) and s != "", "non-empty texts"),
    )
    logit_bias: dict[int, float] | None = knob(
        None,
        "token id -> number from -100 to 100 added to its score",
        Rule(
            lambda v: (
                isinstance(v, dict)
                and len(v) <= 1024
                and all(isinstance(t, int) and t >= 0 and _finite(b) and abs(b) <= 100 for t, b in v.items())
            ),
            "at most 1024 token ids with numbers from -100 to 100",
        ),
        cli=False,
    )
    ignore_eos: bool = knob(False, "go on after the end of sequence, up to max_new_tokens", parse=parse_bool)
    skip_special_tokens: bool = knob(True, "leave special tokens out of the text", parse=parse_bool)
    logprobs: int | None = knob(
        None, "log-probabilities of the chosen token (0) and of this many most likely ones; default: none", whole(0, 20)
    )
    prompt_logprobs: int | None = knob(None, "the same for the tokens of the prompt", whole(0, 20), cli=False)
    response_format: dict[str, Any] | None = knob(
        None,
        "grammar: {type: json_object}, {type: json_schema, json_schema: ...}, {type: regex, regex: ...}, "
        "{type: choice, choices: [...]} or {type: grammar, grammar: ...}",
        cli=False,
    )
    priority: int = knob(
        0,
        "requests with a lower number run first",
        whole(-(2**31) + 1, 2**31 - 1)._replace(words="a whole number"),
        cli=False,
    )
    cache_salt: str | None = knob(
        None,
        "requests share cached blocks only with requests of the same salt",
        Rule(lambda v: isinstance(v, str), "a text"),
        cli=False,
    )


@dataclass(frozen=True)
class ServeConfig(Checked):
    """How the API server listens, and what it refuses."""

    server_name: str = knob("127.0.0.1", "address to listen on; 0.0.0.0 for all")
    server_port: int = knob(23333, "port to listen on; 0: any free one", whole(0, 65535))
    model_name: str | None = knob(None, "name under which the model is listed; default: its folder's name")
    api_keys: list[str] | None = knob(None, "keys that clients must send, or @PATH of a file; also PAGODA_API_KEYS")
    allow_origins: list[str] | None = knob(None, "origins that browsers may call from (CORS); default: none")
    ssl_certfile: str | None = knob(None, "TLS certificate file")
    ssl_keyfile: str | None = knob(None, "TLS key file")
    log_level: str = knob("info", "least severe messages shown", choices=("debug", "info", "warning", "error"))
    max_log_len: int = knob(0, "characters of each prompt to log; 0: none", whole(0))
    max_body_bytes: int = knob(8 << 20, "largest request body", whole(1))
    max_concurrent_per_key: int = knob(0, "requests one key may have open; 0: no limit", whole(0))
    replicas: int = knob(
        0, "copies of the whole engine behind one address, by Ray Serve; 0: one engine, without Ray", whole(0)
    )
    max_replicas: int | None = knob(
        None, "with replicas: start more of them when they are busy, up to this number", whole(1)
    )
    more_models: list[str] | None = knob(
        None, "with replicas: further models behind the same address, chosen by a request's field `model`"
    )
    num_http_workers: int = knob(1, "HTTP processes in front of one engine", whole(1))
    drain_seconds: float = knob(30.0, "time open requests get after SIGTERM", between(0, 3600))
    session_dir: str | None = knob(None, "folder where sessions may be saved and restored; default: not possible")
    queue_seconds: float = knob(60.0, "longest wait of a request in the queue", between(0, 86400))
    request_seconds: float = knob(1800.0, "longest life of a request", between(1, 86400))
    tool_call_parser: str | None = knob(None, "how the model writes tool calls; default: by the model's family")
    reasoning_parser: str | None = knob(None, "how the model marks its reasoning; default: by its template")


TurbomindEngineConfig = EngineConfig
