"""Step programs of small random models, made without a checkpoint: every feature of a spec in any combination."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pagoda.layers.linear import Linear
from pagoda.layers.parallel import Group
from pagoda.layers.schemes import SCHEMES
from pagoda.models.decoder import StepInput, StepProgram, build_program
from pagoda.models.rope_spec import RopeSpec
from pagoda.models.spec import ModelSpec

BLOCK_LEN = 16


@dataclass
class LayerParts:
    attention_norm: Tensor
    w_qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    wo: Linear
    attention_post_norm: Tensor | None
    ffn_norm: Tensor
    w_gate_up: Linear
    w_down: Linear
    ffn_post_norm: Tensor | None


@dataclass
class Parts:
    embed: Tensor
    norm: Tensor
    head: Linear
    layers: list[LayerParts]
    kv_ranges: tuple = ()


def tiny_spec(**changes: Any) -> ModelSpec:
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM", "family": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 16, "ffn_size": 96, "vocab_size": 131, "norm_eps": 1e-5, "act": "silu",
        "max_position": 2048, "dtype": "float32", "attn_scale": 0.25,
    }  # fmt: skip
    fields |= changes
    fields.setdefault("rope", RopeSpec(kind="default", theta=1e4, dim=fields["head_dim"]))
    fields.setdefault("windows", (0,) * fields["num_layers"])
    return ModelSpec(**fields)


def tiny_program(
    spec: ModelSpec, dtype: torch.dtype = torch.float32, scheme: str = "dense", group_size: int = 32, seed: int = 0
) -> StepProgram:
    """Random weights; matrices keep the size of what they multiply. A scheme other than dense quantizes all of them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def linear(role: str, n: int, k: int, biased: bool) -> Linear:
        canonical = SCHEMES[scheme]().quantize(randn(n, k) * k**-0.5, group_size)
        bias = randn(n) * 0.3 if biased else None
        return Linear.pack(role, scheme, canonical, bias, k, "cpu", dtype)

    def gain(n: int, wanted: bool = True) -> Tensor | None:
        return (1 + 0.3 * randn(n)).to(dtype) if wanted else None

    def layer() -> LayerParts:
        c, d, f = spec.hidden_size, spec.head_dim, spec.ffn_size
        width = spec.num_heads * d
        return LayerParts(
            gain(c), linear("qkv", width + 2 * spec.num_kv_heads * d, c, spec.qkv_bias),
            gain(d, spec.qk_norm), gain(d, spec.qk_norm), linear("o", c, width, spec.o_bias),
            gain(c, spec.post_norms), gain(c), linear("gate_up", 2 * f, c, spec.mlp_bias),
            linear("down", c, f, spec.mlp_bias), gain(c, spec.post_norms),
        )  # fmt: skip

    embed = randn(spec.vocab_size, spec.hidden_size).to(dtype)
    layers = [layer() for _ in range(spec.num_layers)]
    parts = Parts(embed, gain(spec.hidden_size), linear("head", spec.vocab_size, spec.hidden_size, False), layers)
    if spec.tied_embeddings:
        parts.head = Linear.pack("head", "dense", {"weight": embed}, None, spec.hidden_size, "cpu", dtype)
    return build_program(spec, parts, Group.single())


def make_step(rows: list[tuple[int, int]], vocab: int, block_len: int = BLOCK_LEN, seed: int = 0) -> StepInput:
    """rows: (tokens already cached, new tokens) of each sequence. Sequence r owns blocks in a scattered order that is
    the same in every call with as many rows; token ids depend only on the sequence and the position."""
    width = 40
    order = torch.randperm(len(rows) * width, generator=torch.Generator().manual_seed(9)) + 1
    table = order.view(len(rows), width).int()
    ids = torch.randint(0, vocab, (len(rows), width * block_len), generator=torch.Generator().manual_seed(seed))
    position = [torch.arange(done, done + new) for done, new in rows]
    slots = [table[r, p // block_len].long() * block_len + p % block_len for r, p in enumerate(position)]
    new_R = torch.tensor([new for _, new in rows])
    return StepInput(
        token_T=torch.cat([ids[r, p] for r, p in enumerate(position)]),
        position_T=torch.cat(position),
        slot_T=torch.cat(slots),
        query_start_R1=torch.cat([torch.zeros(1), new_R.cumsum(0)]).int(),
        kv_len_R=torch.tensor([done + new for done, new in rows], dtype=torch.int32),
        block_table_RB=table,
        logit_row_L=None,
        max_query_len=max(new for _, new in rows),
        decode=all(new == 1 for _, new in rows),
    )
