"""Which row gets which request's grammar mask."""

from pathlib import Path

import numpy as np

from pagoda.engine.process import Grammars
from pagoda.engine.request import SamplingParams
from pagoda.engine.schedule import Row, Schedule, SlotInit


class OnlyToken:
    def __init__(self, token):
        self.token = token

    def fill_mask(self, row_W):
        row_W[:] = 0
        row_W[self.token // 32] = 1 << self.token % 32


def init(slot, id):
    return SlotInit(slot, id, SamplingParams(grammar="g" if id != "free" else None), [1], 1, 1)


def test_masks_follow_the_tenants_of_slots():
    """A long prompt's slot is taken in a step that samples nothing; a preempted request comes back in another slot."""
    grammars = Grammars(Path(), 64)
    grammars._matchers.update(a=OnlyToken(5), b=OnlyToken(40))
    assert grammars.masks(Schedule(0, [Row(0, 0, 4, [1] * 4, samples=False)], inits=[init(0, "a")])) is None
    mask_LW = grammars.masks(Schedule(1, [Row(0, 4, 1, [1])], needs_masks=True))
    assert mask_LW.tolist() == [[1 << 5, 0]]
    assert grammars.masks(Schedule(2, [Row(0, 0, 1, [1])], inits=[init(0, "free")], freed=[0])) is None
    rows = [Row(0, 1), Row(2, 0, 5, [1] * 5), Row(1, 0, 1, [1])]
    plan = Schedule(3, rows, inits=[init(1, "b"), init(2, "a")], needs_masks=True)
    assert grammars.masks(plan).tolist() == np.array([[-1, -1], [1 << 5, 0], [0, 1 << 8]]).tolist()
