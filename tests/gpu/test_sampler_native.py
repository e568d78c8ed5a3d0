"""The whole sampler on a GPU: as on the CPU, inside a captured graph, and without waiting for the device."""

import pytest
import torch

from pagoda.engine.request import SamplingParams
from pagoda.engine.sampler import SamplingState, sample
from pagoda.engine.schedule import SlotInit
from pagoda.kernels.sample import choose_tokens_reference, choose_tokens_triton

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

V = 50257
PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_k=40, top_p=0.8),
    SamplingParams(seed=3, top_p=0.95, repetition_penalty=1.2, logprobs=3),
    SamplingParams(seed=4, min_p=0.05, frequency_penalty=0.5, presence_penalty=0.3),
    SamplingParams(seed=2**64 - 1, top_k=5, bad_words=((5,), (1, 2)), logit_bias={7: 3.0}, stop_ids=(9,), min_tokens=4),
]


def make(device: str) -> SamplingState:
    state = SamplingState(len(PARAMS) + 1, V, torch.device(device))
    state.set_slots([SlotInit(i, "", p, [1, 2, 3, 4], 2, 2) for i, p in enumerate(PARAMS)])
    return state


def logits(step: int) -> torch.Tensor:
    return torch.randn(len(PARAMS), V, generator=torch.Generator().manual_seed(step)) * 3


def sampled(logits_RV, slot_R, state, flags):
    """One step, after which the counters stand as `advance_rows` leaves them."""
    result = sample(logits_RV, slot_R, state, flags)
    state.count_S.index_copy_(0, slot_R, state.count_S.index_select(0, slot_R) + 1)
    return result


def test_the_gpu_chooses_as_the_cpu():
    slots = list(range(len(PARAMS)))
    results = []
    for device in ("cpu", "cuda"):
        state = make(device)
        slot_R = torch.tensor(slots, device=device)
        steps = [sampled(logits(i).to(device), slot_R, state, state.flags(slots)) for i in range(12)]
        results.append(steps)
    for cpu, gpu in zip(*results, strict=True):
        assert torch.equal(cpu.token_R, gpu.token_R.cpu())
        torch.testing.assert_close(cpu.logprob_R, gpu.logprob_R.cpu())
        assert torch.equal(cpu.top_token_RN, gpu.top_token_RN.cpu())


def test_a_captured_graph_samples_as_eager_steps_and_nothing_waits():
    slots = list(range(len(PARAMS)))
    eager, graphed = make("cuda"), make("cuda")
    slot_R = torch.tensor(slots, device="cuda")
    flags = eager.flags(slots)
    fixed_RV = logits(0).cuda()
    expected = [sampled(logits(i).cuda(), slot_R, eager, flags).token_R.tolist() for i in range(6)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        sampled(fixed_RV, torch.full_like(slot_R, graphed.num_slots - 1), graphed, flags)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        result = sampled(fixed_RV, slot_R, graphed, flags)
    seen = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(6):
            fixed_RV.copy_(logits(i).pin_memory(), non_blocking=True)
            graph.replay()
            seen.append(result.to_host(len(slots)).token_R)
            graphed.flags(slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert [t.tolist() for t in seen] == expected


def test_new_tenants_arrive_without_waiting():
    state = make("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        state.set_slots([SlotInit(i, "", p, [4, 3, 2, 1], 3, 3) for i, p in enumerate(reversed(PARAMS))])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.count_S[: len(PARAMS)].tolist() == [1] * len(PARAMS)


@pytest.mark.parametrize("width", [32000, 151936, 256000])
def test_real_vocabularies(width):
    knob_SK = torch.tensor(
        [[1, 40, 0.8, 0], [0.7, 0, 0.95, 0], [1, 20, 1, 0], [1, 0, 1, 0.02], [1, 0, 1, 0], [0, 0, 1, 0]], device="cuda"
    )
    slot_R = torch.arange(6, device="cuda")
    for seed in range(4):
        logits_RV = torch.randn(6, width, generator=torch.Generator().manual_seed(seed)).cuda() * (1 + seed)
        args = (logits_RV, slot_R, knob_SK, slot_R * 7919, slot_R + seed, True)
        assert torch.equal(choose_tokens_triton(*args), choose_tokens_reference(*args))
