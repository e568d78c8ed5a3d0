"""One rank: weights, cache and batch on a device; launches a schedule, hands its tokens over later.

`launch` only enqueues device work (the CPU does it at once); `collect` waits for the oldest step's tokens. The same
runner runs on every tensor-parallel rank; all ranks sample the same tokens from the same gathered logits.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pagoda.config import EngineConfig
from pagoda.engine.batch import DeviceBatch, MixedShape, MixedStep, packed_size, scored_rows
from pagoda.engine.graphs import GraphCache, largest_mixed, padded_rows, padded_width
from pagoda.engine.guessed import GuessedStep, guessed_step, num_logit_rows
from pagoda.engine.kv_cache import MemoryPlan, host_free_bytes, plan_memory
from pagoda.engine.request import TokenLogprobs
from pagoda.engine.sampler import Sampled, SampleFlags, SamplingState, greedy_over_ranks, sample
from pagoda.engine.schedule import Row, Schedule, SlotInit, StepResult
from pagoda.errors import DeviceError
from pagoda.layers.parallel import Group
from pagoda.models.decoder import StepInput, build_program
from pagoda.models.executors import make_executor
from pagoda.models.loader import load_model, pick_dtype
from pagoda.models.spec import ModelSpec


def pick_device(config: EngineConfig, rank: int = 0) -> torch.device:
    """The device of a rank: `auto` is CUDA where there is one. A device or number of devices that the machine lacks
    raises `DeviceError`."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise DeviceError("device is cuda, but torch sees no CUDA device here: use --device cpu.")
        index = (device.index or 0) + rank
        if (device.index or 0) + config.tp > count:
            raise DeviceError(f"tp {config.tp} needs {config.tp} CUDA devices, this machine has {count}: lower --tp.")
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise DeviceError(f"device {config.device!r} is unknown: use auto, cpu, cuda or cuda:N.")
    return device


class DecodeKey(NamedTuple):
    """What a decode graph is made for: rows and table width, both padded, and what its rows need of the sampler."""

    rows: int
    width: int
    flags: SampleFlags


class MixedKey(NamedTuple):
    """The same for a step with prompt chunks."""

    shape: MixedShape
    flags: SampleFlags


@dataclass
class InFlight:
    """A launched step whose tokens may still be on their way to the host."""

    sampled: Sampled
    sampling: list[SlotInit]  # the tenants of the positions that sample
    places: list[int] | None  # where they stand among the step's logit rows; None: they are all of them
    prompt_rows: list[tuple[Row, torch.Tensor]]
    event: torch.cuda.Event | None


class Runner:
    """Everything that a rank holds. `plan` says how much memory it took; `describe` how it runs."""

    def __init__(
        self,
        model: Path,
        spec: ModelSpec,
        config: EngineConfig,
        group: Group,
        progress: Callable[[float], None] | None = None,
        device: torch.device | None = None,
    ):
        self.spec, self.config, self.group = spec, config, group
        self.device = device or pick_device(config, group.rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        elif config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        dtype = pick_dtype(config, spec)
        before = self._free_bytes()
        with torch.inference_mode():
            weights = load_model(model, spec, config, self.device, dtype, group, progress)
            program = build_program(spec, weights, group)
            self.executor = make_executor(program, config, self.device, dtype, group)
            del weights, program  # what the executor did not keep is free again
        free, held = self._free_bytes(), self.executor.weight_bytes
        self.plan: MemoryPlan = plan_memory(
            spec,
            config,
            device=str(self.device),
            weight_bytes=max(0, before - free) if held is None else held,
            free_bytes=group.smallest(free),
            block_bytes=self.executor.bytes_per_block(),
            dtype_bytes=dtype.itemsize,
        )
        # A CPU computes a step while it is launched: to run ahead would only waste rows.
        self.run_ahead = 1 if self.device.type == "cuda" else 0
        self._in_flight: deque[InFlight] = deque()
        self._last_slots: list[int] = []
        self._inits: dict[int, SlotInit] = {}

    def describe(self) -> list[str]:
        """Lines for the start-up report."""
        return [self.executor.describe(), *self.plan.lines()]

    def start(self) -> None:
        """Take the cache and the batch's memory; called once, after `plan` is agreed among the ranks."""
        plan, slots = self.plan, self.config.max_batch_size
        width = -(-plan.session_len // plan.block_len)
        with torch.inference_mode():
            self.executor.allocate_cache(plan.num_blocks)
            self.batch = DeviceBatch(slots, width, plan.block_len, self.device)
            self.state = SamplingState(slots + 1, self.spec.vocab_size, self.device)
        self._most_mixed = largest_mixed(num_weights(self.spec) // self.config.tp)
        self._graphs: tuple[GraphCache, GraphCache] | None = None  # of decode steps, of steps with prompt chunks
        if self.device.type == "cuda" and self.config.cuda_graph and self.executor.graph_safe:
            place = (self.device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device))
            most = packed_size(min(slots, self._most_mixed), self._most_mixed)
            self._graphs = (
                GraphCache(self._decode, lambda key: self._pad_slots([], key), slots, *place),
                GraphCache(self._mixed, self._blank_mixed, most, *place, patience=1, most=128),
            )

    @torch.inference_mode()
    def launch(self, schedule: Schedule, mask_LW: np.ndarray | None = None) -> None:
        """Enqueue one step. `mask_LW`: packed grammar bitmasks beside the sampling positions (int32)."""
        self.batch.apply(schedule)
        if schedule.inits:
            self._inits.update((init.slot, init) for init in schedule.inits)
            self.state.set_slots(schedule.inits)
        rows = at = schedule.rows
        if any(row.samples > 1 for row in rows):
            at = [row for row in rows for _ in range(num_logit_rows(row))]
        slots = [row.slot for row in at if row.samples]
        places = None if len(slots) == len(at) else [i for i, row in enumerate(at) if row.samples]
        flags = self.state.flags(slots)
        prompt_rows: list[tuple[Row, torch.Tensor]] = []
        if all(row.tokens is None for row in rows) and mask_LW is None:
            sampled = self._launch_decode(rows, slots, flags)
        else:
            sampled = self._launch_mixed(rows, flags, self._spread(mask_LW, len(at), places), prompt_rows)
        event = None
        if self.device.type == "cuda":
            sampled = sampled.to_host(len(at))
            event = torch.cuda.Event()
            event.record()
        self._in_flight.append(InFlight(sampled, [self._inits[slot] for slot in slots], places, prompt_rows, event))

    def collect(self) -> StepResult:
        """Wait for the oldest launched step and read its tokens."""
        step = self._in_flight.popleft()
        if step.event is not None:
            step.event.synchronize()
        tokens = step.sampled.token_R.tolist()
        logprobs = step.sampled.read_logprobs(tokens)
        if step.places is None:
            tokens = tokens[: len(step.sampling)]
        else:
            tokens = [tokens[i] for i in step.places]
            logprobs = logprobs and [logprobs[i] for i in step.places]
        for init, entry in zip(step.sampling, logprobs or (), strict=False):
            if entry is not None:  # a step computes as many as its most curious row wants
                del entry.top[init.params.logprobs or 0 :]
        prompt = {row.slot: _read_prompt(packed) for row, packed in step.prompt_rows}
        return StepResult(tokens=tokens, logprobs=logprobs, prompt_logprobs=prompt)

    def _launch_decode(self, rows: list[Row], slots: list[int], flags: SampleFlags) -> Sampled:
        """Every row computes its last sampled token: a graph where there are graphs."""
        blocks = max(row.start for row in rows) // self.batch.block_len + 1
        changed = slots != self._last_slots
        self._last_slots = slots
        if self._graphs is None:
            return self._decode(self.batch.upload(np.array(slots)), DecodeKey(len(slots), blocks, flags))
        width = padded_width(blocks, self.batch.block_table_SB.shape[1])
        key = DecodeKey(padded_rows(len(slots), self.batch.trash), width, flags)
        return self._graphs[0].run(key, self._pad_slots(slots, key) if changed else None)

    def _pad_slots(self, slots: list[int], key: DecodeKey) -> np.ndarray:
        """The input of a decode graph."""
        return np.array(slots + [self.batch.trash] * (key.rows - len(slots)), np.int64)

    def _decode(self, slot_R: torch.Tensor, key: DecodeKey) -> Sampled:
        """The whole decode step; device work only."""
        step = self.batch.decode_input(slot_R, key.width)
        sampled = self._choose(step, slot_R, key.flags)
        self.batch.advance(slot_R, step.kv_len_R, slot_R, sampled.token_R, self.state.count_S)
        return sampled

    def _choose(self, step: StepInput, slot_R: torch.Tensor, flags: SampleFlags) -> Sampled:
        """Forward and sample; where only the largest score counts, the ranks exchange no more than that."""
        if self.group.size > 1 and flags.plain:
            return greedy_over_ranks(self.executor.forward(step, gather=False), self.state, self.group)
        return sample(self.executor.forward(step), slot_R, self.state, flags)

    def _launch_mixed(
        self, rows: list[Row], flags: SampleFlags, mask_LW: torch.Tensor | None, prompt_rows: list[tuple[Row, Any]]
    ) -> Sampled:
        """Prompt chunks, decode rows and rows that follow guesses together: a graph where the step is small and its
        shape has come before, but for guesses and prompts that report log-probabilities."""
        scored, guessed = any(row.prompt_logprobs for row in rows), any(row.samples > 1 for row in rows)
        if self._graphs is not None and mask_LW is None and not scored and not guessed:
            padded = self.batch.padded_shape(rows, self._most_mixed)
            if padded is not None and self._graphs[1].takes(key := MixedKey(padded, flags)):
                return self._graphs[1].run(key, self.batch.pack_mixed(rows, padded))
        shape = self.batch.exact_shape(rows)
        packed = self.batch.upload(self.batch.pack_mixed(rows, shape))
        if not scored and not guessed:
            return self._mixed(packed, MixedKey(shape, flags), mask_LW)
        mixed = self.batch.mixed_input(packed, shape)
        mixed.step.logit_row_L, at_L = (self.batch.upload(part) for part in scored_rows(rows))
        logits_LV = self.executor.forward(mixed.step)
        if scored:
            self._prompt_logprobs(rows, logits_LV, prompt_rows)
            logits_LV = logits_LV.index_select(0, at_L)
        if guessed:
            guesses = guessed_step(rows, self.batch.trash, self.batch.upload)
            return self._finish_guessed(mixed, guesses, logits_LV, flags, mask_LW)
        return self._finish_mixed(mixed, logits_LV, flags, mask_LW)

    def _blank_mixed(self, key: MixedKey) -> np.ndarray:
        return self.batch.pack_mixed([], key.shape)

    def _mixed(self, packed_N: torch.Tensor, key: MixedKey, mask_RW: torch.Tensor | None = None) -> Sampled:
        """The whole of a step with prompt chunks; device work only."""
        mixed = self.batch.mixed_input(packed_N, key.shape)
        return self._finish_mixed(mixed, self.executor.forward(mixed.step), key.flags, mask_RW)

    def _finish_mixed(
        self, mixed: MixedStep, logits_RV: torch.Tensor, flags: SampleFlags, mask_RW: torch.Tensor | None
    ) -> Sampled:
        """Sample all rows of a mixed step, those that should not for the trash slot."""
        sampled = sample(logits_RV, mixed.sample_slot_R, self.state, flags, mask_RW)
        after = (mixed.slot_R, mixed.step.kv_len_R, mixed.sample_slot_R, sampled.token_R)
        self.batch.advance(*after, self.state.count_S)
        return sampled

    def _finish_guessed(
        self, mixed: MixedStep, guesses: GuessedStep, logits_LV: torch.Tensor, flags: SampleFlags,
        mask_LW: torch.Tensor | None,
    ) -> Sampled:  # fmt: skip
        """Sample all logit rows; what stands behind a wrong guess is as if it had never been computed."""
        sampled = sample(logits_LV, guesses.slot_L, self.state, flags, mask_LW, guesses.ahead_L)
        right_R, wrong_R, token_R = guesses.accept(sampled.token_R)
        kv_len_R = mixed.step.kv_len_R - wrong_R.to(torch.int32)
        self.batch.advance(mixed.slot_R, kv_len_R, mixed.sample_slot_R, token_R, self.state.count_S)
        self.state.count_S.index_add_(0, mixed.sample_slot_R, right_R)
        return sampled

    def _spread(self, mask_LW: np.ndarray | None, num_rows: int, places: list[int] | None) -> torch.Tensor | None:
        """The masks of the positions that sample, on the device, beside all logit rows: the others allow everything."""
        if mask_LW is not None and places is not None:
            mask_RW = np.full((num_rows, mask_LW.shape[1]), -1, np.int32)
            mask_RW[places] = mask_LW
            mask_LW = mask_RW
        return None if mask_LW is None else torch.from_numpy(mask_LW).to(self.device, non_blocking=True)

    def _prompt_logprobs(self, rows: list[Row], logits_LV: torch.Tensor, out: list[tuple[Row, Any]]) -> None:
        """Log-probabilities of the prompt tokens that the rows' positions predict; packed as a float tensor
        [positions, 1 + top] of values and an int tensor of ids, on the host when the step is collected."""
        first = 0
        for row in rows:
            if not row.prompt_logprobs:
                first += num_logit_rows(row)
                continue
            assert row.tokens is not None
            init = self._inits[row.slot]
            known = init.history[row.start + 1 : min(row.start + row.num_tokens + 1, init.num_prompt)]
            logprob_NV = logits_LV[first : first + len(known)].log_softmax(-1)
            ids = torch.tensor(known, device=self.device)[:, None]
            top = logprob_NV.topk(init.params.prompt_logprobs or 0, -1)
            value = torch.cat([logprob_NV.gather(1, ids), top.values], 1)
            packed = torch.stack([value.double(), torch.cat([ids, top.indices], 1).double()])
            out.append((row, packed.cpu()))
            first += row.num_tokens

    def _free_bytes(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            return torch.cuda.mem_get_info(self.device)[0]
        return host_free_bytes()

    def close(self) -> None:
        """Give all memory back."""
        self._in_flight.clear()
        if self._graphs is not None:
            for graphs in self._graphs:
                graphs.clear()
        self.executor.free_cache()
        del self.executor, self.batch, self.state
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()


def num_weights(spec: ModelSpec) -> int:
    """That each token is multiplied with, in all layers."""
    heads, hidden = 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim, spec.hidden_size
    return spec.num_layers * hidden * (heads + 3 * spec.ffn_size)


def _read_prompt(packed: torch.Tensor) -> list[TokenLogprobs]:
    values, ids = packed[0].tolist(), packed[1].long().tolist()
    return [
        TokenLogprobs(token=i[0], logprob=v[0], top=list(zip(i[1:], v[1:], strict=True)))
        for v, i in zip(values, ids, strict=True)
    ]
