"""One row per entry of `architectures`: how the family's `config.json` and tensor names map to ours.

A new model is one row here and one test parameter. A row holds only what differs from Llama.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pagoda.errors import ModelError


@dataclass(frozen=True)
class Names:
    """Checkpoint names of the canonical tensors, without `.weight`. `{}` is the layer; several parts are stacked."""

    embed: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}."
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    attention_post_norm: str = ""
    ffn_post_norm: str = ""
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"


LLAMA = Names()
FUSED = replace(LLAMA, qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
INTERNLM2 = Names(
    embed="model.tok_embeddings", head="output", qkv=("attention.wqkv",), o="attention.wo",
    gate_up=("feed_forward.w1", "feed_forward.w3"), down="feed_forward.w2",
    attention_norm="attention_norm", ffn_norm="ffn_norm",
)  # fmt: skip
QWEN1 = Names(
    embed="transformer.wte", norm="transformer.ln_f", layer="transformer.h.{}.", qkv=("attn.c_attn",), o="attn.c_proj",
    gate_up=("mlp.w2", "mlp.w1"), down="mlp.c_proj", attention_norm="ln_1", ffn_norm="ln_2",
)  # fmt: skip
GEMMA2 = replace(
    LLAMA, attention_post_norm="post_attention_layernorm", ffn_norm="pre_feedforward_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What distinguishes a family. A bias is True, False, or the config key that says so."""

    name: str
    names: Names = LLAMA
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    tied: bool = False  # when config.json does not say
    windows: str = "none"  # none | all | qwen (layers from max_window_layers on) | alternate (even layers)
    grouped_qkv: bool = False  # fused rows lie per kv head: its query heads, its key, its value (InternLM2)
    normalised_head: bool = False  # head rows are scaled to length 1 at load when vocab_size is 125696 (Baichuan 2)
    gemma: bool = False  # gains stored minus one, norms after each block, scaled embeddings, soft caps
    su_is_longrope: bool = False
    translate: Callable[[dict[str, Any]], dict[str, Any]] = dict  # the family's own config spelling to Llama's


def _internlm(config: dict[str, Any]) -> dict[str, Any]:
    """`rotary` {base, type} is dynamic NTK with factor 1 unless it says otherwise, as in InternLM's own code."""
    config = {"bias": True, **config}
    rotary = config.pop("rotary", None)
    if config.get("rope_scaling") or config.get("rope_parameters"):
        return config
    if rotary is None and "rope_theta" in config:
        return config
    rotary = {"base": 10000, "type": "dynamic"} | (rotary or {})
    if rotary["type"] not in ("dynamic", "origin"):
        raise ModelError(f"InternLM's rotary type {rotary['type']!r} is not implemented: it must be dynamic or origin.")
    config["rope_theta"] = rotary["base"]
    if rotary["type"] == "dynamic":
        config["rope_scaling"] = {"type": "dynamic", "factor": rotary.get("scaling_factor", 1.0)}
    return config


def _internlm3(config: dict[str, Any]) -> dict[str, Any]:
    """transformers writes `attention_bias` and `mlp_bias` for what InternLM's own code calls `qkv_bias` and `bias`."""
    config = dict(config)
    config.setdefault("qkv_bias", config.pop("attention_bias", False))
    config.setdefault("bias", config.pop("mlp_bias", False))
    return config


def _baichuan(config: dict[str, Any]) -> dict[str, Any]:
    alibi = config.get("hidden_size") == 5120 or config.get("position_embedding", "ROPE").upper() == "ALIBI"
    if alibi or not config.get("max_position_embeddings"):
        raise ModelError("Baichuan 13B cannot be run: Pagoda lacks ALiBi position biases; the 7B models work.")
    return {k: v for k, v in config.items() if k != "position_embedding"}


def _gemma2(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("use_bidirectional_attention"):
        raise ModelError("This Gemma 2 checkpoint attends in both directions, so it cannot generate text.")
    defaults = {"sliding_window": 4096, "query_pre_attn_scalar": 256, "head_dim": 256}
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return {**defaults, **caps, **config}


def _qwen1(config: dict[str, Any]) -> dict[str, Any]:
    """Qwen 1 counts both halves of the gated ffn, and names its rope and norm keys in its own way."""
    out = dict(config)
    for key, fixed in (("no_bias", True), ("scale_attn_weights", True), ("rotary_pct", 1.0)):
        if out.pop(key, fixed) != fixed:
            raise ModelError(f"config.json says {key} = {config[key]!r}, but Qwen 1 is implemented for {fixed} only.")
    if out.get("kv_channels"):
        out["head_dim"] = out.pop("kv_channels")
    out["intermediate_size"] = out.get("intermediate_size", 0) // 2
    out["rms_norm_eps"] = out.pop("layer_norm_epsilon", 1e-6)
    out["rope_theta"] = out.pop("rotary_emb_base", 10000.0)
    trained = out.pop("seq_length", 8192)
    if out.pop("use_dynamic_ntk", False):
        out["rope_scaling"] = {"type": "dynamic", "factor": 1.0, "stepped_from": trained}
    out["use_logn_attn"] = out.get("use_logn_attn", False)
    out["logn_len"] = trained
    out["hidden_act"] = "silu"
    out["torch_dtype"] = out.get("torch_dtype") or ("float16" if out.get("fp16") else "bfloat16")
    return out


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "InternLMForCausalLM": Family("internlm", qkv_bias="bias", o_bias="bias", translate=_internlm),
    "InternLM2ForCausalLM": Family("internlm2", INTERNLM2, qkv_bias="bias", o_bias="bias", grouped_qkv=True),
    "InternLM3ForCausalLM": Family(
        "internlm3", qkv_bias="qkv_bias", o_bias="bias", mlp_bias="bias", translate=_internlm3
    ),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, windows="qwen"),
    "Qwen3ForCausalLM": Family(
        "qwen3", qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, windows="qwen"
    ),
    "MistralForCausalLM": Family("mistral", windows="all", translate=lambda c: {"sliding_window": 4096, **c}),
    "BaichuanForCausalLM": Family(
        "baichuan", replace(LLAMA, qkv=("self_attn.W_pack",)), normalised_head=True, translate=_baichuan
    ),
    "Phi3ForCausalLM": Family("phi3", FUSED, windows="all", su_is_longrope=True),
    "Gemma2ForCausalLM": Family(
        "gemma2", GEMMA2, qkv_bias="attention_bias", o_bias="attention_bias", tied=True, windows="alternate",
        gemma=True, translate=_gemma2,
    ),
    "QWenLMHeadModel": Family("qwen", QWEN1, qkv_bias=True, translate=_qwen1),
}  # fmt: skip
FAMILIES["BaiChuanForCausalLM"] = FAMILIES["BaichuanForCausalLM"]

LEFTOVER = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|attention\.rope\.inv_freq|attn\.masked_bias|attn\.bias)$"
)
"""Tensors of old checkpoints that hold no weights."""

MISSING_PARTS = {
    "vision_config": "a vision encoder",
    "audio_config": "an audio encoder",
    "visual": "a vision encoder",
    "num_experts": "mixture-of-experts layers",
    "num_local_experts": "mixture-of-experts layers",
    "n_routed_experts": "mixture-of-experts layers",
    "kv_lora_rank": "multi-head latent attention",
    "swiglu_limit": "attention sinks and the clamped gate",
    "original_rope": "ChatGLM's interleaved half rotary embedding",
    "ssm_state_size": "state-space layers",
    "is_encoder_decoder": "an encoder",
}
"""Config keys that betray what an unknown architecture would need."""

REFUSED_KEYS = {
    "alibi": "ALiBi position biases",
    "num_experts": "mixture-of-experts layers",
    "num_local_experts": "mixture-of-experts layers",
    "parallel_attn": "parallel attention and ffn",
    "logit_scale": "scaled logits",
    "logits_scaling": "scaled logits",
    "residual_multiplier": "scaled residuals",
    "embedding_multiplier": "scaled embeddings",
    "no_rope_layers": "layers without rotary embedding",
    "attention_chunk_size": "chunked attention",
    "use_qk_norm": "query and key norms outside Qwen 3",
}
"""Keys that would change the mathematics of a family that is known without them."""


def find_family(config: dict[str, Any]) -> tuple[str, Family]:
    """(architecture, row). Raises ModelError that names the architecture and what is missing for it."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(f"config.json names architectures {names!r}, but exactly one name is needed.")
    name = names[0]
    family = FAMILIES.get(name)
    if family is None:
        parts = dict.fromkeys(what for key, what in MISSING_PARTS.items() if config.get(key))
        missing = " and ".join(parts) or "a description of its layers"
        raise ModelError(f"{name} cannot be run: Pagoda lacks {missing}; it runs {', '.join(sorted(FAMILIES))}.")
    for key, what in REFUSED_KEYS.items():
        value = config.get(key)
        neutral = value in (None, False, []) or (value == 1.0 and value is not True)
        if not neutral:
            raise ModelError(f"{name} with {key} = {value!r} cannot be run: Pagoda lacks {what}.")
    return name, family
