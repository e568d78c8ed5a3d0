"""How many KV blocks fit: the memory plan that the engine prints at start and `pagoda plan` prints without a device.

A block holds `block_len` tokens of all layers of one rank. Block 0 is scratch (padding rows write there) and is never
handed out, so a pool of `num_blocks` serves `num_blocks - 1`.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from pagoda.config import EngineConfig
from pagoda.errors import DeviceError
from pagoda.models.spec import ModelSpec, session_len


@dataclass(frozen=True)
class MemoryPlan:
    """What one rank holds. Bytes unless said otherwise; `notes` says aloud what was made smaller than asked."""

    device: str
    weight_bytes: int
    workspace_bytes: int
    block_bytes: int
    num_blocks: int
    block_len: int
    session_len: int
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the pool holds."""
        return (self.num_blocks - 1) * self.block_len

    @property
    def num_sessions(self) -> float:
        """Sessions of full length that the pool holds."""
        return self.num_tokens / self.session_len

    def lines(self) -> list[str]:
        """The plan for a person, one fact a line."""
        gib = 1 << 30
        return [
            f"weights    {self.weight_bytes / gib:8.2f} GiB on {self.device}",
            f"workspace  {self.workspace_bytes / gib:8.2f} GiB for the largest step",
            f"KV cache   {self.num_blocks * self.block_bytes / gib:8.2f} GiB: {self.num_blocks - 1} blocks of "
            f"{self.block_len} tokens, {self.num_tokens} tokens, "
            f"{self.num_sessions:.1f} sessions of {self.session_len}",
            *(f"note: {note}" for note in self.notes),
        ]


def workspace_bytes(spec: ModelSpec, config: EngineConfig, dtype_bytes: int) -> int:
    """Peak of a step's activations on one rank: the widest tensors of a layer for a full step of tokens, and three
    float32 copies of the logits (scores, filtered scores, noise) of a full batch with its guesses."""
    tokens = max(config.max_prefill_token_num, config.max_batch_size)
    logit_rows = config.max_batch_size * (1 + config.speculative_ngram)
    width = 4 * spec.hidden_size + 3 * spec.ffn_size + (spec.num_heads * 2 + 2 * spec.num_kv_heads) * spec.head_dim
    return tokens * width * dtype_bytes // config.tp + 3 * 4 * logit_rows * spec.vocab_size


def host_free_bytes() -> int:
    """Memory that this process may still take: what the kernel calls available, within the cgroup's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0)


def plan_memory(
    spec: ModelSpec,
    config: EngineConfig,
    *,
    device: str,
    weight_bytes: int,
    free_bytes: int,
    block_bytes: int,
    dtype_bytes: int,
) -> MemoryPlan:
    """Share out `free_bytes` (free after the weights are loaded). Shrinks the session length, and says so, when a
    single session of the configured length does not fit; raises `DeviceError` when not even one block does."""
    block_len, length, notes = config.cache_block_seq_len, session_len(spec, config), []
    work = workspace_bytes(spec, config, dtype_bytes)
    share = config.cache_max_entry_count
    enough = config.max_batch_size * -(-length // block_len) + 1
    if share > 1:
        num_blocks = int(share) + 1
        fit = max(0, free_bytes - work) // block_bytes
        if num_blocks > fit:
            notes.append(f"{int(share)} blocks were asked for, {max(fit - 1, 0)} fit")
            num_blocks = fit
    elif device == "cpu":
        num_blocks = min(enough, free_bytes // 4 // block_bytes)
    else:
        num_blocks = int(max(min(free_bytes * share, free_bytes - work), 0) // block_bytes)
    if num_blocks < 2:
        raise DeviceError(
            f"The KV cache does not fit: {free_bytes >> 20} MiB are free on {device} after the weights and a block "
            f"takes {block_bytes >> 10} KiB; free memory, lower max_prefill_token_num, or quantize weights or cache."
        )
    if (num_blocks - 1) * block_len < length:
        shorter = (num_blocks - 1) * block_len
        notes.append(f"session_len {length} does not fit, it is {shorter} now")
        length = shorter
    return MemoryPlan(device, weight_bytes, work, block_bytes, num_blocks, block_len, length, tuple(notes))
