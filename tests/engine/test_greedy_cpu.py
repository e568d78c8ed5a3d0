"""On a CPU the vocabulary is what sampling costs: greedy reads it once."""

import numpy as np
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


def watched(names: list[str]) -> type[np.ndarray]:
    """An array that writes down every search and every arithmetic over a row of the vocabulary or more."""

    class Watched(np.ndarray):
        def argmax(self, *args, **kwargs):
            if self.size >= VOCAB:
                names.append("argmax")
            return np.asarray(self).argmax(*args, **kwargs)

        def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
            if self.size >= VOCAB:
                names.append(ufunc.__name__)
            return getattr(ufunc, method)(*map(np.asarray, inputs), **kwargs)

    return Watched


def test_greedy_reads_the_vocabulary_once(monkeypatch):
    state = SamplingState(ROWS + 1, VOCAB, torch.device("cpu"))
    params = SamplingParams(temperature=0.0, max_tokens=9, seed=1)
    state.set_slots([SlotInit(i, f"r{i}", params, [1, 2], 2, 2) for i in range(ROWS)])
    logits_RV, slot_R = torch.randn(ROWS, VOCAB), torch.arange(ROWS)
    plain = torch.Tensor.numpy
    with Reads() as reads:
        monkeypatch.setattr(torch.Tensor, "numpy", lambda self, **how: plain(self, **how).view(watched(reads.names)))
        chosen = sample(logits_RV, slot_R, state, state.flags(list(range(ROWS))))
    monkeypatch.undo()
    assert chosen.token_R.tolist() == logits_RV.argmax(-1).tolist()
    assert [name for name in reads.names if name != "detach"] == ["argmax"], "a view for numpy reads nothing"
