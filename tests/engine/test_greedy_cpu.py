"""On a CPU the vocabulary is what sampling costs: greedy reads it once."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pagoda.engine.request import SamplingParams
from pagoda.engine.sampler import SamplingState, sample
from pagoda.engine.schedule import SlotInit

ROWS, VOCAB = 3, 5003


class Reads(TorchDispatchMode):
    """The operations that take or give a row of the vocabulary or more."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.numel() >= VOCAB for t in [*args, out]):
            self.names.append(func.overloadpacket.__name__)
        return out


def test_greedy_reads_the_vocabulary_once():
    state = SamplingState(ROWS + 1, VOCAB, torch.device("cpu"))
    params = SamplingParams(temperature=0.0, max_tokens=9, seed=1)
    state.set_slots([SlotInit(i, f"r{i}", params, [1, 2], 2, 2) for i in range(ROWS)])
    logits_RV, slot_R = torch.randn(ROWS, VOCAB), torch.arange(ROWS)
    with Reads() as reads:
        chosen = sample(logits_RV, slot_R, state, state.flags(list(range(ROWS))))
    assert chosen.token_R.tolist() == logits_RV.argmax(-1).tolist()
    assert reads.names in (["argmax"], ["detach"]), "one search by torch, or one view handed to numpy's"
