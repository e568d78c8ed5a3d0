"""ModelSpec: everything the engine must know of a model, as plain frozen data, read loudly from `config.json`."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagoda.config import EngineConfig
from pagoda.errors import CheckpointError, ConfigError, ModelError
from pagoda.models.config_reader import ConfigReader
from pagoda.models.families import FAMILIES, Family, find_family
from pagoda.models.quant_config import QuantSpec, online_quant, parse_quant
from pagoda.models.rope_spec import RopeSpec, parse_rope
from pagoda.models.sharding import LocalShape, local_shape

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
DTYPES = ("float32", "bfloat16", "float16")
DENSE_FFN_UNIT = 16  # padded ffn slices stay multiples of this, so that kernels keep whole vectors


@dataclass(frozen=True)
class ModelSpec:
    """One model. Sizes are global (before tensor parallelism); `shard` gives one rank's."""

    architecture: str
    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    norm_eps: float
    act: str  # silu | gelu_tanh
    rope: RopeSpec
    max_position: int
    dtype: str  # of the checkpoint
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    post_norms: bool = False
    embed_scale: float = 1.0  # rounded to the activations' dtype before it multiplies
    attn_scale: float = 1.0
    attn_softcap: float = 0.0  # 0: off
    final_softcap: float = 0.0
    windows: tuple[int, ...] = ()  # per layer; 0: full attention; w: sees the last w keys, itself included
    logn_len: int = 0  # 0: off; beyond this length queries are scaled by log(position + 1) / log(logn_len)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    quant: QuantSpec | None = None

    @property
    def row(self) -> Family:
        """The family's row."""
        return FAMILIES[self.architecture]

    def shard(self, rank: int, size: int) -> LocalShape:
        """What one tensor-parallel rank holds; any `size` works, padding with zero heads and features."""
        unit = DENSE_FFN_UNIT
        if self.quant is not None:
            unit = max(unit, self.quant.group_size, self.quant.block[1] if self.quant.block else 0)
        return local_shape(self.num_heads, self.num_kv_heads, self.ffn_size, self.vocab_size, unit, rank, size)

    def to_json(self) -> dict[str, Any]:
        """Plain data for model.json; `spec_from_json` reads it back."""
        return dataclasses.asdict(self)


def spec_from_json(values: dict[str, Any]) -> ModelSpec:
    """Inverse of `ModelSpec.to_json` after a trip through JSON. Raises ModelError on unknown or missing fields."""

    def build(cls: Any, data: dict[str, Any]) -> Any:
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})
        except (TypeError, AttributeError) as e:
            raise ModelError(f"model.json does not describe a {cls.__name__}: convert the model again ({e}).") from None

    values = dict(values)
    values["rope"] = build(RopeSpec, values.get("rope") or {})
    values["quant"] = build(QuantSpec, values["quant"]) if values.get("quant") else None
    spec = build(ModelSpec, values)
    if spec.architecture not in FAMILIES:
        raise ModelError(f"model.json names the architecture {spec.architecture!r}, which this version does not know.")
    return spec


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file; CheckpointError when it is absent or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: give the folder of a Hugging Face checkpoint.") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON ({e}): download it again.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object: download it again.")
    return values


def session_len(spec: ModelSpec, config: EngineConfig) -> int:
    """The configured length, else the model's own, at most 32768."""
    if config.session_len is not None:
        return config.session_len
    longest = float(spec.max_position)
    if config.rope_scaling_factor >= 1:
        longest *= config.rope_scaling_factor
    return min(int(longest), 32768)


def read_spec(folder: Path, config: EngineConfig) -> ModelSpec:
    """The spec of a checkpoint folder, with the overrides of `config` (rope_scaling_factor, use_logn_attn).
    End-of-sequence ids come from `generation_config.json` where it names them, as in transformers."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the folder of a Hugging Face checkpoint.")
    values = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = read_json(generation).get("eos_token_id")
        if eos is not None:
            values["eos_token_id"] = eos
    return spec_from_config(values, config)


def spec_from_config(values: dict[str, Any], config: EngineConfig | None = None) -> ModelSpec:
    """The spec of a parsed `config.json`. Raises ModelError for anything that cannot be run as it says."""
    architecture, family = find_family(values)
    values = family.translate(values)
    read = ConfigReader(values)
    sizes = _sizes(read)
    max_position = read.integer("max_position_embeddings", 2048)
    rope = parse_rope(values, sizes["head_dim"], max_position, family.su_is_longrope)
    stepped = (values.get("rope_scaling") or {}).get("stepped_from")
    if stepped:
        rope = dataclasses.replace(rope, stepped=True, original_max_position=stepped)
    for key in ("rope_parameters", "rope_scaling"):
        read.mapping(key)
    acts = tuple(ACTIVATIONS)
    act = read.choice("hidden_activation", acts, "") if values.get("hidden_activation") else ""
    act = act or read.choice("hidden_act", acts, "gelu_pytorch_tanh" if family.gemma else "silu")
    bias = {k: _bias(read, getattr(family, k)) for k in ("qkv_bias", "o_bias", "mlp_bias")}
    spec = ModelSpec(
        architecture=architecture,
        family=family.name,
        **sizes,
        act=ACTIVATIONS[act],
        rope=rope,
        max_position=max_position,
        dtype=_dtype(values),
        **bias,
        qk_norm=family.qk_norm,
        tied_embeddings=read.flag("tie_word_embeddings", family.tied),
        post_norms=family.gemma,
        attn_scale=read.number("query_pre_attn_scalar", float(sizes["head_dim"])) ** -0.5,
        windows=_windows(values, read, family, sizes["num_layers"]),
        logn_len=read.integer("logn_len", 0) if read.flag("use_logn_attn", False) else 0,
        bos_id=next(iter(read.ids("bos_token_id")), None),
        eos_ids=read.ids("eos_token_id"),
        quant=parse_quant(values.get("quantization_config")),
        **(_gemma(read, sizes["hidden_size"]) if family.gemma else {}),
    )
    read.read |= {"logn_len", "use_logn_attn"}
    read.finish()
    _check_unused_bias(values, spec)
    return with_overrides(spec, config) if config else spec


def _sizes(read: ConfigReader) -> dict[str, Any]:
    hidden = read.integer("hidden_size")
    heads = read.integer("num_attention_heads")
    kv_heads = read.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise read.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    head_dim = read.integer("head_dim", 0)
    if not head_dim and hidden % heads:
        raise read.refuse("hidden_size", f"a multiple of num_attention_heads ({heads}) when head_dim is not given")
    head_dim = head_dim or hidden // heads
    if head_dim % 2:
        raise ModelError(f"A head dimension of {head_dim} cannot be rotated in pairs: it must be even.")
    return {
        "hidden_size": hidden,
        "num_layers": read.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn_size": read.integer("intermediate_size"),
        "vocab_size": read.integer("vocab_size"),
        "norm_eps": read.number("rms_norm_eps", 1e-6),
    }


def _dtype(values: dict[str, Any]) -> str:
    """`dtype` (transformers 5) or `torch_dtype`; bfloat16 when neither is there."""
    name = str(values.get("dtype") or values.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(f"config.json says torch_dtype = {name!r}, but it must be one of {', '.join(DTYPES)}.")
    return name


def _bias(read: ConfigReader, rule: bool | str) -> bool:
    return read.flag(rule, False) if isinstance(rule, str) else rule


def _check_unused_bias(values: dict[str, Any], spec: ModelSpec) -> None:
    """A bias that the family's row does not know must not be dropped in silence."""
    for key, has in (("attention_bias", spec.qkv_bias), ("mlp_bias", spec.mlp_bias), ("bias", spec.o_bias)):
        if values.get(key) and not has:
            raise ModelError(f"config.json says {key} = true, which {spec.architecture} does not have in Pagoda.")


def _windows(values: dict[str, Any], read: ConfigReader, family: Family, num_layers: int) -> tuple[int, ...]:
    """Sliding window per layer: `layer_types` where given, else the family's rule."""
    window = read.integer("sliding_window", 0)
    if family.windows == "qwen" and not read.flag("use_sliding_window", False):
        window = 0
    if family.windows == "none" and window:
        raise read.refuse("sliding_window", f"null: {family.name} models have none")
    types = values.get("layer_types")
    if types:
        known = {"full_attention": 0, "sliding_attention": window}
        if len(types) != num_layers or any(t not in known for t in types):
            raise ModelError(
                f"config.json's layer_types must name {' or '.join(known)} for each of {num_layers} layers."
            )
        return tuple(known[t] for t in types)
    start = read.integer("max_window_layers", num_layers, low=0) if family.windows == "qwen" else 0
    step = 2 if family.windows == "alternate" else 1
    return tuple(window if i >= start and i % step == 0 else 0 for i in range(num_layers))


def _gemma(read: ConfigReader, hidden_size: int) -> dict[str, float]:
    return {
        "embed_scale": math.sqrt(hidden_size),
        "attn_softcap": read.number("attn_logit_softcapping", 0.0),
        "final_softcap": read.number("final_logit_softcapping", 0.0),
    }


def with_overrides(spec: ModelSpec, config: EngineConfig) -> ModelSpec:
    """The spec under the engine's own wishes: dynamic NTK with a factor, log-n attention on or off, weight format."""
    changes: dict[str, Any] = {}
    if config.rope_scaling_factor:
        if spec.rope.kind not in ("default", "dynamic"):
            raise ConfigError(
                f"rope_scaling_factor cannot be combined with the model's own {spec.rope.kind} rotary embedding: "
                "leave it at 0."
            )
        original = spec.rope.original_max_position or spec.max_position
        changes["rope"] = dataclasses.replace(
            spec.rope,
            kind="dynamic",
            factor=float(config.rope_scaling_factor),
            original_max_position=original,
            stepped=False,
        )
    if config.use_logn_attn is not None:
        changes["logn_len"] = (
            (spec.logn_len or spec.rope.original_max_position or spec.max_position) if config.use_logn_attn else 0
        )
    if config.weight_format != "auto":
        changes["quant"] = online_quant(config.weight_format, spec.quant)
    return dataclasses.replace(spec, **changes) if changes else spec
