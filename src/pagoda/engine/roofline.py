"""What a set-up holds and how fast it can be, by arithmetic alone: `pagoda plan`.

Memory is shared out by the engine's own `plan_memory`; speed is the limit of `models.limits`, and what every layer
takes on top of it.
Legend: N out features, K in features of a matrix.
"""

from dataclasses import dataclass

import torch

from pagoda.config import EngineConfig
from pagoda.engine.kv_cache import MemoryPlan, plan_memory
from pagoda.errors import DeviceError
from pagoda.layers.kv_schemes import get_kv_scheme
from pagoda.models.layout import gate_up_parts, layer_name, qkv_parts
from pagoda.models.limits import CEILINGS, Ceiling, Limits
from pagoda.models.spec import ModelSpec

MIB = 1 << 20
# Measured on an H200 (docs/performance.md): W1 of shapes A and B give the share of the limit that a decode step's reads
# reach and what each layer takes on top of them, W1 of A4 the share of 4-bit weights; the share of the matmul rate that
# a long prompt reaches; what the driver and the libraries hold of a device's memory.
READ_SHARE = 0.88
READ_SHARE_INT4 = 0.57
LAYER_SECONDS = 14.5e-6
PROMPT_SHARE = 0.9
RESERVED_BYTES = 640 * MIB
# One all-reduce over NVLink: its latency, and the rate of the rest (estimates).
REDUCE_SECONDS = 4e-6
REDUCE_RATE = 200e9
MAX_TP = 8


@dataclass(frozen=True)
class Device:
    """One kind of device. `origin`: where the figures come from."""

    memory_bytes: int
    rates: Ceiling
    origin: str = "datasheet: 96% of the read rate and 70% of the dense matmul rates, as measured on an H200"


def _sheet(gib: float, tb: float, tflops16: float, tflops8: float) -> Device:
    return Device(int(gib * (1 << 30)), Ceiling(0.96e12 * tb, 0.7e12 * tflops16, 0.65e12 * tflops8))


DEVICES = {
    "h200": Device(143771 * MIB, CEILINGS["H200"], "measured"),
    "b200": _sheet(179, 7.7, 2250, 4500),
    "h100": _sheet(79.6, 3.35, 989, 1979),
    "a100-80g": _sheet(79.2, 2.04, 312, 624),
    "a100-40g": _sheet(39.5, 1.56, 312, 624),
    "l40s": _sheet(44.5, 0.864, 362, 733),
    "a10": _sheet(22.5, 0.6, 125, 250),
    "l4": _sheet(22.5, 0.3, 121, 242),
    "rtx4090": _sheet(23.5, 1.008, 165, 330),
}


def _matrix_bytes(scheme: str, group: int, n: int, k: int, dtype_bytes: int) -> int:
    """One matrix as it lies on a GPU (`layers.schemes`)."""
    if scheme == "dense":
        return n * k * dtype_bytes
    if scheme == "int4":
        n, k = -(-n // 64) * 64, -(-k // 128) * 128
        return n * k // 2 + 4 * n * (k // (group or 128))
    return n * k + 4 * n * (-(-k // group) if group else 1)


def weight_bytes(spec: ModelSpec, tp: int, dtype_bytes: int) -> int:
    """What the rank that holds most holds: rank 0."""
    local, C, total = spec.shard(0, tp), spec.hidden_size, 0
    heads = local.num_heads * spec.head_dim
    for layer in range(spec.num_layers):
        for module, n, k in (
            (qkv_parts(spec, layer)[0].module, heads + 2 * local.num_kv_heads * spec.head_dim, C),
            (layer_name(spec, layer, spec.row.names.o), C, heads),
            (gate_up_parts(spec, layer)[0].module, 2 * local.ffn_size, C),
            (layer_name(spec, layer, spec.row.names.down), C, local.ffn_size),
        ):
            quant = spec.quant if spec.quant is not None and spec.quant.covers(module) else None
            group = 0 if quant is None else quant.group_size or (quant.block[1] if quant.block else 0)
            if quant is not None and quant.method == "online" and quant.scheme == "int4":
                group = next((g for g in (128, 64, 32) if k % g == 0), 32)
            total += _matrix_bytes(quant.scheme if quant else "dense", group, n, k, dtype_bytes)
    return total + local.vocab_rows * C * dtype_bytes * (1 if spec.tied_embeddings else 2)


@dataclass(frozen=True)
class Prediction:
    """A set-up in numbers. Speeds with `running` sessions that each hold `context` tokens: `concurrency`, or as many of
    them as fit; the first token of a prompt of `prompt` tokens that runs alone. `limit_*` is the roofline, the others
    are what we reach of it, with the time of every layer added."""

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
    held, local = weight_bytes(spec, tp, dtype.itemsize), spec.shard(0, tp)
    cache = get_kv_scheme(config.quant_policy)
    block_bytes = spec.num_layers * cache.bytes_per_block(
        local.num_kv_heads, spec.head_dim, config.cache_block_seq_len, dtype
    )
    free = device.memory_bytes - RESERVED_BYTES - held
    if free <= 0:
        raise DeviceError(f"{held / 2**30:.1f} GiB of weights do not fit on one {gpu}.")
    memory = plan_memory(
        spec, config, device=gpu, weight_bytes=held, free_bytes=free, block_bytes=block_bytes,
        dtype_bytes=dtype.itemsize,
    )  # fmt: skip
    rows = max(1, min(wanted, memory.num_tokens // context))
    limits = Limits(spec, config, device.rates)
    step = limits.decode(rows, context)
    share = READ_SHARE_INT4 if limits.scheme == "int4" else READ_SHARE
    first = max(limits.prefill([prompt]), limits.weight_bytes / limits.read)
    layers = spec.num_layers * LAYER_SECONDS
    return Prediction(
        gpu=gpu, tp=tp, memory=memory, concurrency=wanted, running=rows, context=context, prompt=prompt,
        fits=memory.session_len >= context and memory.num_tokens >= wanted * context,
        tokens_per_second=rows / (step / share + layers + reduce_seconds(spec, tp, rows)),
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
