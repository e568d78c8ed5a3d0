"""The Llama decoder of Pagoda mini in plain PyTorch; weights are stacked over layers so the optimizer can batch them.

Shape letters: B rows, T tokens, L layers, H query heads, K key heads, D head size, C hidden, F ffn, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Cache(NamedTuple):
    """Keys and values [L, B, K, T_max, D] of earlier tokens, and which of them count, [B, T_max]."""

    k: Tensor
    v: Tensor
    valid_BT: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    first, second = x_BHTD.float().chunk(2, -1)
    turned = torch.cat((first * cos_TD - second * sin_TD, second * cos_TD + first * sin_TD), -1)
    return turned.to(x_BHTD.dtype)


class Model(nn.Module):
    """Float32 parameters; the forward pass runs in `compute` (residual stream too, as at inference)."""

    def __init__(self, config: dict, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.compute = config, compute
        c, f, v, layers = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers"))
        self.heads, self.kv_heads, self.head_dim = (
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["head_dim"],
        )
        q, kv, self.eps = self.heads * self.head_dim, self.kv_heads * self.head_dim, config["rms_norm_eps"]
        self.split = (q, kv, kv)
        self.embed_VC = nn.Parameter(torch.randn(v, c) * 0.02)
        self.w_qkv = nn.Parameter(torch.randn(layers, q + 2 * kv, c) * c**-0.5)
        self.w_o = nn.Parameter(torch.randn(layers, c, q) * q**-0.5 / (2 * layers) ** 0.5)
        self.w_gate_up = nn.Parameter(torch.randn(layers, 2 * f, c) * c**-0.5)
        self.w_down = nn.Parameter(torch.randn(layers, c, f) * f**-0.5 / (2 * layers) ** 0.5)
        self.attention_norm = nn.Parameter(torch.ones(layers, c))
        self.ffn_norm = nn.Parameter(torch.ones(layers, c))
        self.norm = nn.Parameter(torch.ones(c))
        frequency = config["rope_theta"] ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angle = torch.arange(config["max_position_embeddings"]).float()[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)  # [T_max, D/2], float32
        self.register_buffer("sin", angle.sin(), persistent=False)

    def _attend(
        self,
        x_BTC: Tensor,
        layer: int,
        w_qkv: Tensor,
        w_o: Tensor,
        position: Tensor | None,
        cache: Cache | None,
        past: int,
    ) -> Tensor:
        b, t, _ = x_BTC.shape
        q, k, v = F.linear(x_BTC, w_qkv).split(self.split, -1)
        q, k, v = (part.view(b, t, -1, self.head_dim).transpose(1, 2) for part in (q, k, v))
        cos, sin = (
            (self.cos[:t], self.sin[:t])
            if position is None
            else (self.cos[position][:, None], self.sin[position][:, None])
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = None
        if cache is not None:
            cache.k[layer, :, :, past : past + t], cache.v[layer, :, :, past : past + t] = k, v
            k, v = cache.k[layer, :, :, : past + t], cache.v[layer, :, :, : past + t]
            reach = torch.ones(t, past + t, dtype=torch.bool, device=k.device).tril(past)
            own = torch.ones_like(reach).triu(past)  # padding sees itself, so that no row of the softmax is empty
            mask = reach & (cache.valid_BT[:, None, None, : past + t] | own)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return F.linear(out.transpose(1, 2).reshape(b, t, -1), w_o)

    def hidden(
        self, token_BT: Tensor, position_BT: Tensor | None = None, cache: Cache | None = None, past: int = 0
    ) -> Tensor:
        """Final hidden states [B, T, C]; without `cache` plain causal attention from position 0."""
        x = F.embedding(token_BT, self.embed_VC).to(self.compute)
        stacks = [w.to(self.compute) for w in (self.w_qkv, self.w_o, self.w_gate_up, self.w_down)]
        stacks += [self.attention_norm, self.ffn_norm]
        for layer, (w_qkv, w_o, w_gate_up, w_down, norm_1, norm_2) in enumerate(zip(*(w.unbind(0) for w in stacks))):
            x = x + self._attend(rms_norm(x, norm_1, self.eps), layer, w_qkv, w_o, position_BT, cache, past)
            gate, up = F.linear(rms_norm(x, norm_2, self.eps), w_gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, w_down)
        return rms_norm(x, self.norm, self.eps)

    def loss(self, token_BT: Tensor, target_BT: Tensor, weight_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean of the cross entropy, and the plain mean over tokens of weight 1 (what the assistant says)."""
        logits = F.linear(self.hidden(token_BT), self.embed_VC.to(self.compute))
        each = F.cross_entropy(logits.flatten(0, 1).float(), target_BT.flatten(), reduction="none")
        weight = weight_BT.flatten()
        said = (weight == 1).float()
        return (each * weight).sum() / weight.sum(), (each.detach() * said).sum() / said.sum()


def export(model: Model) -> dict[str, Tensor]:
    """bf16 tensors under Hugging Face's names; the tied head is left out."""
    q, k, v = model.split
    tensors = {"model.embed_tokens.weight": model.embed_VC, "model.norm.weight": model.norm}
    for i in range(model.config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        tensors[at + "input_layernorm.weight"] = model.attention_norm[i]
        tensors[at + "post_attention_layernorm.weight"] = model.ffn_norm[i]
        parts = dict(zip(("q_proj", "k_proj", "v_proj"), model.w_qkv[i].split((q, k, v))))
        parts["o_proj"] = model.w_o[i]
        tensors |= {f"{at}self_attn.{name}.weight": part for name, part in parts.items()}
        gate, up = model.w_gate_up[i].chunk(2)
        tensors |= {
            f"{at}mlp.{name}.weight": part
            for name, part in (("gate_proj", gate), ("up_proj", up), ("down_proj", model.w_down[i]))
        }
    return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous().clone() for name, tensor in tensors.items()}
