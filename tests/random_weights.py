"""Small random models without a checkpoint, for tests that compare executors with each other."""

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from pagoda.layers.linear import Linear
from pagoda.models.spec import ModelSpec, spec_from_config

BASE = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 10000.0,
}  # fmt: skip
GEMMA = {
    "query_pre_attn_scalar": 64, "sliding_window": 48, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
SHAPES: dict[str, dict] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "llama_biases": {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "num_attention_heads": 4},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "head_dim": 128, "num_attention_heads": 4, **GEMMA},
}


def small_spec(shape: str, **more) -> ModelSpec:
    return spec_from_config({**BASE, **SHAPES[shape], **more})


def random_weights(spec: ModelSpec, device: str, dtype: torch.dtype, rounded_to: torch.dtype, seed: int = 0):
    """What `build_program` takes. Values are exact in `rounded_to`, so that models of several dtypes are the same."""
    generator = torch.Generator().manual_seed(seed)
    c, d, ffn = spec.hidden_size, spec.head_dim, spec.ffn_size
    qkv_width = (spec.num_heads + 2 * spec.num_kv_heads) * d

    def make(*shape: int, scale: float, plus: float = 0.0) -> Tensor:
        value = torch.randn(shape, generator=generator) * scale + plus
        return value.to(rounded_to).to(device=device, dtype=dtype)

    def gain(size: int, wanted: bool = True) -> Tensor | None:
        return make(size, scale=0.2, plus=1.0).float() if wanted else None

    def matrix(role: str, n: int, k: int, bias: bool = False) -> Linear:
        weight, offset = make(n, k, scale=1.2 / math.sqrt(k)), make(n, scale=0.3) if bias else None
        return Linear.pack(role, "dense", {"weight": weight}, offset, k, device, dtype)

    layers = [
        SimpleNamespace(
            attention_norm=gain(c),
            w_qkv=matrix("qkv", qkv_width, c, spec.qkv_bias),
            q_norm=gain(d, spec.qk_norm),
            k_norm=gain(d, spec.qk_norm),
            wo=matrix("o", c, spec.num_heads * d, spec.o_bias),
            attention_post_norm=gain(c, spec.post_norms),
            ffn_norm=gain(c),
            w_gate_up=matrix("gate_up", 2 * ffn, c, spec.mlp_bias),
            w_down=matrix("down", c, ffn, spec.mlp_bias),
            ffn_post_norm=gain(c, spec.post_norms),
        )
        for _ in range(spec.num_layers)
    ]
    embed = make(spec.vocab_size, c, scale=1.0)
    head = matrix("head", spec.vocab_size, c)
    return SimpleNamespace(embed=embed, norm=gain(c), head=head, layers=layers, kv_ranges=())
