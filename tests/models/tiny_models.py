"""Tiny random checkpoints of every family, each with a transformers model that computes the same.

Families that transformers lacks are a Llama or Qwen2 of transformers whose tensors are renamed and reshuffled.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

SIZES = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


def random_model(config, seed: int = 0):
    """A model whose every tensor matters: matrices of gain about one, gains and biases off their defaults."""
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise * 1.2 / math.sqrt(parameter.shape[1]))
            else:
                parameter.copy_(parameter + 0.3 * noise if name.endswith("weight") else 0.5 * noise)
    return model


def llama(**more):
    return hf.LlamaConfig(**{**SIZES, **more})


def qwen2(**more):
    return hf.Qwen2Config(**{**SIZES, **more})


def qwen3(**more):
    return hf.Qwen3Config(**{**SIZES, "head_dim": 32, **more})


def phi3(**more):
    return hf.Phi3Config(**{**SIZES, **more})


def gemma2(**more):
    fields = {
        "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 16, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 4.0, "tie_word_embeddings": True,
    }  # fmt: skip
    return hf.Gemma2Config(**{**SIZES, **fields, **more})


def internlm3():
    if not hasattr(hf, "InternLM3Config"):
        pytest.skip("this release of transformers lacks InternLM3")
    return hf.InternLM3Config(**{**SIZES, "head_dim": 16}, qkv_bias=True, bias=True)


FAMILIES: dict[str, Callable] = {
    "llama": llama,
    "llama_biases": lambda: llama(attention_bias=True, mlp_bias=True, num_key_value_heads=4),
    "llama_tied": lambda: llama(tie_word_embeddings=True, head_dim=24, num_key_value_heads=1),
    "mistral_window": lambda: hf.MistralConfig(**SIZES, sliding_window=13),
    "qwen2": qwen2,
    "qwen2_window": lambda: qwen2(use_sliding_window=True, sliding_window=11, max_window_layers=1),
    "qwen3": qwen3,
    "phi3": phi3,
    "gemma2": gemma2,
    "internlm3": internlm3,
}

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1 + 0.05 * i for i in range(8)],
    "long_factor": [1.5 + 0.6 * i for i in range(8)], "factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
ROPES: dict[str, Callable] = {
    "linear": lambda: llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}),
    "dynamic": lambda: llama(rope_parameters=dict(DYNAMIC), max_position_embeddings=64),
    "llama3": lambda: llama(rope_parameters=dict(LLAMA3)),
    "yarn": lambda: qwen2(rope_parameters=dict(YARN)),
    "longrope": lambda: phi3(rope_parameters=dict(LONGROPE), original_max_position_embeddings=64),
    "partial": lambda: phi3(rope_parameters=dict(PARTIAL)),
}


def rewrite(folder: Path, model, tensors: Tensors, changes: dict) -> None:
    """A checkpoint of a family that transformers lacks: renamed tensors and that family's config.json."""
    folder.mkdir(exist_ok=True)
    config = {k: v for k, v in model.config.to_dict().items() if k in SIZES or k in ("rms_norm_eps", "hidden_act")}
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32", **changes}))
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors")


def rename(state: Tensors, table: dict[str, str]) -> Tensors:
    """Every name with the table's words replaced."""
    out = {}
    for name, tensor in state.items():
        for old, new in table.items():
            name = name.replace(old, new)
        out[name] = tensor
    return out


def fuse(state: Tensors, parts: tuple[str, ...], into: str, how: Callable = torch.cat) -> Tensors:
    """Tensors whose names differ only in the words `parts` become one."""
    out = dict(state)
    for name in state:
        if parts[0] in name:
            out[name.replace(parts[0], into)] = how([out.pop(name.replace(parts[0], p)) for p in parts])
    return out


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def internlm(folder: Path):
    model = random_model(llama(attention_bias=True, num_key_value_heads=4))
    changes = {"architectures": ["InternLMForCausalLM"], "model_type": "internlm", "bias": True}
    rewrite(folder, model, model.state_dict(), changes)
    return model


def internlm2(folder: Path):
    model = random_model(llama())

    def by_kv_head(parts: list[torch.Tensor]) -> torch.Tensor:
        q, k, v = (p.unflatten(0, (2, -1)) for p in parts)
        return torch.cat([q, k, v], 1).flatten(0, 1)

    names = {
        "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    changes = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False, "rope_theta": 1e4}
    rewrite(folder, model, rename(fuse(model.state_dict(), QKV, "attention.wqkv", by_kv_head), names), changes)
    return model


def baichuan(folder: Path, vocab_size: int = 131):
    model = random_model(llama(num_key_value_heads=4, vocab_size=vocab_size))
    changes = {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan"}
    rewrite(folder, model, fuse(model.state_dict(), QKV, "self_attn.W_pack"), changes)
    return model


def baichuan2(folder: Path):
    """The vocabulary of Baichuan 2 is how its normalised head is known."""
    model = baichuan(folder, 125696)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.nn.functional.normalize(model.lm_head.weight))
    return model


def qwen1(folder: Path, **more):
    model = random_model(qwen2(num_key_value_heads=4))
    names = {
        "model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "model.layers": "transformer.h",
        "self_attn.o_proj": "attn.c_proj", "mlp.down_proj": "mlp.c_proj", "mlp.gate_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w1", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
    }  # fmt: skip
    changes = {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "intermediate_size": 2 * SIZES["intermediate_size"],
        "layer_norm_epsilon": model.config.rms_norm_eps, "rotary_emb_base": 10000, "kv_channels": 16, "no_bias": True,
        "scale_attn_weights": True, "seq_length": 256, **more,
    }  # fmt: skip
    rewrite(folder, model, rename(fuse(model.state_dict(), QKV, "attn.c_attn"), names), changes)
    return model
