"""How a checkpoint's linear layers are quantized: `quantization_config` of `config.json`, read strictly.

Known methods: AWQ (gemm layout), GPTQ, compressed-tensors (W4A16, W8A8, FP8) and fp8. All else is refused by name.
"""

import re
from dataclasses import dataclass
from typing import Any

from pagoda.errors import ConfigError, ModelError

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class QuantSpec:
    """One quantization of all linear layers but those in `skip`."""

    method: str  # awq | gptq | compressed-tensors | fp8: whose layout the checkpoint has; online: dense, rounded by us
    scheme: str  # int4 | int8 | fp8: a key of layers.schemes.SCHEMES
    bits: int
    group_size: int  # inputs that share a scale; 0: one scale per output (or per tensor, or `block`)
    zero_point: bool
    act_order: bool = False  # GPTQ's desc_act: inputs are grouped in a stored order
    layout: str = ""  # gptq | gptq_v2 (zeros stored minus one | as they are), else the format's own name
    block: tuple[int, int] | None = None  # fp8: outputs x inputs that share a scale
    skip: tuple[str, ...] = ()  # module names (or "re:" patterns) that stay dense

    def covers(self, module: str) -> bool:
        """Whether the module of this name is quantized. The output head never is."""
        for name in self.skip:
            if name.startswith("re:"):
                hit = re.match(name[3:], module) is not None
            else:
                hit = name == module or (self.method != "compressed-tensors" and name in module)
            if hit:
                return False
        return True

    def __post_init__(self) -> None:
        for key in ("block", "skip"):  # lists when read back from JSON
            value = getattr(self, key)
            object.__setattr__(self, key, tuple(value) if value is not None else None)


def parse_quant(given: dict[str, Any] | None) -> QuantSpec | None:
    """QuantSpec of a `quantization_config`, None when there is none. Raises ModelError for what is not implemented."""
    if not given:
        return None
    if not isinstance(given, dict):
        raise ModelError(f"config.json says quantization_config = {given!r}, but it must be an object.")
    method = str(given.get("quant_method", "")).lower()
    readers = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed, "fp8": _fp8}
    if method not in readers:
        raise ModelError(
            f"Quantization method {method or '(none named)'} is not implemented: Pagoda reads {', '.join(readers)} "
            "checkpoints, and can quantize the original 16-bit checkpoint itself."
        )
    return readers[method](given)


def online_quant(weight_format: str, found: QuantSpec | None) -> QuantSpec:
    """The quantization of a checkpoint that is to be held in `weight_format`: its own where that is the same, else
    rounding while loading (16-bit checkpoints only)."""
    if found is None:
        bits, group = (4, 128) if weight_format == "int4" else (8, 0)
        return QuantSpec("online", weight_format, bits, group, weight_format == "int4")
    if found.scheme != weight_format:
        raise ConfigError(
            f"The checkpoint is {found.scheme} already and cannot become {weight_format}: leave weight_format at auto, "
            "or give the original 16-bit checkpoint."
        )
    return found


def _refuse(method: str, key: str, value: Any, rule: str) -> ModelError:
    return ModelError(f"{method} quantization with {key} = {value!r} is not implemented: it must be {rule}.")


def _expect(method: str, given: dict[str, Any], key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
    value = given.get(key)
    value = default if value is None else value
    if value not in allowed:
        raise _refuse(method, key, value, " or ".join(map(str, allowed)))
    return value


def _names(*lists: Any) -> tuple[str, ...]:
    return tuple(str(name) for names in lists for name in (names or ()))


def _awq(given: dict[str, Any]) -> QuantSpec:
    _expect("awq", given, "version", ("gemm", "GEMM"), "gemm")
    return QuantSpec(
        method="awq",
        scheme="int4",
        bits=_expect("awq", given, "bits", (4,), given.get("w_bit")),
        group_size=_expect("awq", given, "group_size", GROUP_SIZES, given.get("q_group_size")),
        zero_point=_expect("awq", given, "zero_point", (True, False), True),
        layout="gemm",
        skip=_names(given.get("modules_to_not_convert")),
    )


def _gptq(given: dict[str, Any]) -> QuantSpec:
    if given.get("lm_head"):
        raise _refuse("gptq", "lm_head", True, "false")
    if given.get("dynamic"):
        raise _refuse("gptq", "dynamic", "per-layer settings", "absent")
    layout = given.get("checkpoint_format") or "gptq"
    return QuantSpec(
        method="gptq",
        scheme="int4",
        bits=_expect("gptq", given, "bits", (4,)),
        group_size=_expect("gptq", given, "group_size", GROUP_SIZES),
        zero_point=not _expect("gptq", given, "sym", (True, False), True),
        act_order=_expect("gptq", given, "desc_act", (True, False), False),
        layout=_expect("gptq", {"checkpoint_format": layout}, "checkpoint_format", ("gptq", "gptq_v2")),
        skip=_names(given.get("modules_to_not_convert")),
    )


def _fp8(given: dict[str, Any]) -> QuantSpec:
    _expect("fp8", given, "fmt", ("e4m3",), "e4m3")
    _expect("fp8", given, "activation_scheme", ("dynamic", "static"), "dynamic")
    block = given.get("weight_block_size")
    if block is not None and (not isinstance(block, list) or block != [128, 128]):
        raise _refuse("fp8", "weight_block_size", block, "[128, 128]")
    return QuantSpec(
        method="fp8",
        scheme="fp8",
        bits=8,
        group_size=0,
        zero_point=False,
        layout="fp8",
        block=tuple(block) if block else None,
        skip=_names(given.get("modules_to_not_convert"), given.get("ignored_layers")),
    )


def _compressed(given: dict[str, Any]) -> QuantSpec:
    groups = given.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise _refuse("compressed-tensors", "config_groups", list(groups or ()), "exactly one group")
    if given.get("kv_cache_scheme"):
        raise _refuse("compressed-tensors", "kv_cache_scheme", given["kv_cache_scheme"], "null (use quant_policy)")
    if (given.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _refuse("compressed-tensors", "sparsity_config", given["sparsity_config"], "dense")
    group = next(iter(groups.values()))
    if group.get("targets") != ["Linear"]:
        raise _refuse("compressed-tensors", "targets", group.get("targets"), '["Linear"]')
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    kind = (weights.get("type"), weights.get("num_bits"), (inputs or {}).get("num_bits"))
    skip = _names(given.get("ignore"))
    layout = group.get("format") or given.get("format") or ""
    name = "compressed-tensors"
    if kind == ("int", 4, None):
        _expect(name, weights, "strategy", ("group",), "group")
        _expect(name, {"format": layout}, "format", ("pack-quantized",))
        size = _expect(name, weights, "group_size", GROUP_SIZES)
        order = bool(weights.get("actorder")) and weights["actorder"] != "weight"
        return QuantSpec(name, "int4", 4, size, not weights.get("symmetric", True), order, layout, None, skip)
    if kind == ("int", 8, 8):
        _expect(name, weights, "strategy", ("channel",))
        _expect(name, weights, "symmetric", (True,), True)
        _expect(name, inputs, "dynamic", (True,))
        _expect(name, inputs, "symmetric", (True,), True)
        _expect(name, {"format": layout}, "format", ("int-quantized", "naive-quantized"))
        return QuantSpec(name, "int8", 8, 0, False, False, layout, None, skip)
    if kind in (("float", 8, 8), ("float", 8, None)):
        strategy = _expect(name, weights, "strategy", ("tensor", "channel", "block"))
        block = tuple(weights.get("block_structure") or ()) if strategy == "block" else None
        if block is not None and block != (128, 128):
            raise _refuse(name, "block_structure", block, "[128, 128]")
        _expect(name, {"format": layout}, "format", ("float-quantized", "naive-quantized"))
        return QuantSpec(name, "fp8", 8, 0, False, False, layout, block, skip)
    raise _refuse(name, "config_groups", kind, "4-bit integer weights, 8-bit integers throughout, or 8-bit floats")
