"""What a set-up holds and how fast it can be, by arithmetic alone: `pagoda plan`.

Memory is shared out by the engine's own `plan_memory`; a decode step is bound by bytes over the read rate, a prompt by
operations over the matmul rate (design section 6), and both pay a fixed time a layer.
Legend: N out features, K in features of a matrix.
"""

from dataclasses import dataclass

import torch

from pagoda.config import EngineConfig
from pagoda.engine.kv_cache import MemoryPlan, plan_memory
from pagoda.errors import DeviceError
from pagoda.layers.kv_schemes import get_kv_scheme
from pagoda.models.layout import gate_up_parts, layer_name, qkv_parts
from pagoda.models.spec import ModelSpec

MIB = 1 << 20
# Measured on an H200 (docs/performance.md): what a decode step of one row takes over its bytes, by layer; the share of
# the matmul rate that a long prompt reaches; what the driver and the libraries hold of a device's memory.
LAYER_SECONDS = 18e-6
PROMPT_SHARE = 0.9
RESERVED_BYTES = 640 * MIB
# One all-reduce over NVLink: its latency, and the rate of the rest.
REDUCE_SECONDS = 8e-6
REDUCE_RATE = 200e9
MAX_TP = 8


@dataclass(frozen=True)
class Device:
    """Rates in bytes and operations a second; 8 bit operations in `flops8`. `origin`: where the figures come from."""

    memory_bytes: int
    read_rate: float
    flops16: float
    flops8: float
    origin: str = "datasheet, dense rates at seven tenths, as measured on an H200"


def _sheet(gib: float, tb: float, tflops16: float, tflops8: float) -> Device:
    return Device(int(gib * (1 << 30)), 0.96e12 * tb, 0.7e12 * tflops16, 0.65e12 * tflops8)


DEVICES = {
    "h200": Device(143771 * MIB, 4.62e12, 686e12, 1257e12, "measured"),
    "b200": _sheet(179, 7.7, 2250, 4500),
    "h100": _sheet(79.6, 3.35, 989, 1979),
    "a100-80g": _sheet(79.2, 2.04, 312, 624),
    "a100-40g": _sheet(39.5, 1.56, 312, 624),
    "l40s": _sheet(44.5, 0.864, 362, 733),
    "a10": _sheet(22.5, 0.6, 125, 250),
    "l4": _sheet(22.5, 0.3, 121, 242),
    "rtx4090": _sheet(23.5, 1.008, 165, 330),
}


@dataclass(frozen=True)
class Matrices:
    """What one rank multiplies: bytes of its matrices (the head among them) and multiply-adds a token, and bytes of all
    its weights (the embedding, too)."""

    read_bytes: int
    macs: int
    head_macs: int  # of them, for tokens whose logits are wanted
    held_bytes: int


def _matrix_bytes(scheme: str, group: int, n: int, k: int, dtype_bytes: int) -> int:
    """One matrix as it lies on a GPU (`layers.schemes`)."""
    if scheme == "dense":
        return n * k * dtype_bytes
    if scheme == "int4":
        n, k = -(-n // 64) * 64, -(-k // 128) * 128
        return n * k // 2 + 4 * n * (k // (group or 128))
    return n * k + 4 * n * (-(-k // group) if group else 1)


def rank_matrices(spec: ModelSpec, tp: int, dtype_bytes: int) -> Matrices:
    """Of the rank that holds most: rank 0."""
    local, C = spec.shard(0, tp), spec.hidden_size
    heads, down_k = local.num_heads * spec.head_dim, local.ffn_size
    total = macs = 0
    for layer in range(spec.num_layers):
        modules = [
            (qkv_parts(spec, layer)[0].module, heads + 2 * local.num_kv_heads * spec.head_dim, C),
            (layer_name(spec, layer, spec.row.names.o), C, heads),
            (gate_up_parts(spec, layer)[0].module, 2 * local.ffn_size, C),
            (layer_name(spec, layer, spec.row.names.down), C, down_k),
        ]
        for module, n, k in modules:
            quant = spec.quant if spec.quant is not None and spec.quant.covers(module) else None
            group = 0 if quant is None else quant.group_size or (quant.block[1] if quant.block else 0)
            if quant is not None and quant.method == "online" and quant.scheme == "int4":
                group = next((g for g in (128, 64, 32) if k % g == 0), 32)
            total += _matrix_bytes(quant.scheme if quant else "dense", group, n, k, dtype_bytes)
            macs += n * k
    head = local.vocab_rows * C
    held = total + head * dtype_bytes * (1 if spec.tied_embeddings else 2)
    return Matrices(total + head * dtype_bytes, macs + head, head, held)


@dataclass(frozen=True)
class Prediction:
    """A set-up in numbers. Speeds with `running` sessions that each hold `context` tokens: `concurrency`, or as many of
    them as fit; the first token of a prompt of `prompt` tokens that runs alone. `limit_*` is the roofline, the others
    add the time of every layer."""

    gpu: str
    tp: int
    memory: MemoryPlan
    concurrency: int
    running: int
    context: int
    prompt: int
    fits: bool
    tokens_per_second: float
    limit_tokens_per_second: float
    first_token_seconds: float
    limit_first_token_seconds: float


def predict(spec: ModelSpec, config: EngineConfig, gpu: str, prompt: int) -> Prediction:
    """For `config.tp` devices of a kind, `config.max_batch_size` sessions of `config.session_len`. `DeviceError` when
    not even the weights and one block fit."""
    device, tp, context, wanted = DEVICES[gpu], config.tp, config.session_len or 0, config.max_batch_size
    dtype = getattr(torch, spec.dtype if config.dtype == "auto" else config.dtype)
    matrices, local = rank_matrices(spec, tp, dtype.itemsize), spec.shard(0, tp)
    cache = get_kv_scheme(config.quant_policy)
    block_bytes = spec.num_layers * cache.bytes_per_block(
        local.num_kv_heads, spec.head_dim, config.cache_block_seq_len, dtype
    )
    free = device.memory_bytes - RESERVED_BYTES - matrices.held_bytes
    if free <= 0:
        raise DeviceError(f"{matrices.held_bytes / 2**30:.1f} GiB of weights do not fit on one {gpu}.")
    memory = plan_memory(
        spec, config, device=gpu, weight_bytes=matrices.held_bytes, free_bytes=free, block_bytes=block_bytes,
        dtype_bytes=dtype.itemsize,
    )  # fmt: skip
    rows = max(1, min(wanted, memory.num_tokens // context))
    eight = spec.quant is not None and spec.quant.scheme in ("int8", "fp8")
    flops = device.flops8 if eight else device.flops16
    seen = [min(context, w) if w else context for w in spec.windows or (0,) * spec.num_layers]
    kv = rows * sum(seen) / spec.num_layers * block_bytes / config.cache_block_seq_len
    step = max(matrices.read_bytes / device.read_rate, 2 * matrices.macs * rows / flops) + kv / device.read_rate
    layers = spec.num_layers * LAYER_SECONDS
    attention = 2 * spec.num_layers * local.num_heads * spec.head_dim * prompt**2
    first = max(
        (2 * (matrices.macs - matrices.head_macs) * prompt + attention) / flops, matrices.read_bytes / device.read_rate
    )
    return Prediction(
        gpu=gpu, tp=tp, memory=memory, concurrency=wanted, running=rows, context=context, prompt=prompt,
        fits=memory.session_len >= context and memory.num_tokens >= wanted * context,
        tokens_per_second=rows / (step + layers + reduce_seconds(spec, tp, rows)),
        limit_tokens_per_second=rows / step,
        first_token_seconds=first / PROMPT_SHARE + layers + reduce_seconds(spec, tp, prompt),
        limit_first_token_seconds=first,
    )  # fmt: skip


def reduce_seconds(spec: ModelSpec, tp: int, tokens: int) -> float:
    """The all-reduces of one step: two a layer and the embedding's, 16 bit."""
    if tp == 1:
        return 0.0
    return (2 * spec.num_layers + 1) * (REDUCE_SECONDS + 2 * tokens * spec.hidden_size / REDUCE_RATE)


def smallest_fit(spec: ModelSpec, config: EngineConfig, prompt: int, gpus: list[str]) -> Prediction | None:
    """Of all numbers of these devices, the one of least memory in total on which the load fits."""
    fitting = []
    for gpu in gpus:
        for tp in range(1, min(MAX_TP, spec.num_heads) + 1):
            try:
                found = predict(spec, config.replace(tp=tp), gpu, prompt)
            except DeviceError:
                continue
            if found.fits:
                fitting.append((tp * DEVICES[gpu].memory_bytes, tp, found))
                break
    return min(fitting, key=lambda f: f[:2])[2] if fitting else None
