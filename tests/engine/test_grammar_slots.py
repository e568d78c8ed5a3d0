"""Which row gets which request's grammar mask."""

from pathlib import Path

import numpy as np

from pagoda.engine.grammars import Grammars
from pagoda.engine.request import EngineRequest, SamplingParams
from pagoda.engine.schedule import Row, Schedule, SlotInit
from pagoda.errors import GrammarError


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


class Broken:
    def fill_mask(self, row_W):
        raise GrammarError("The grammar failed: too complex", "response_format")


def test_a_grammar_that_fails_ends_its_own_request_only():
    grammars = Grammars(Path(), 64)
    grammars._matchers.update(a=OnlyToken(5), b=Broken())
    rows = [Row(0, 0, 1, [1]), Row(1, 0, 1, [1])]
    mask_LW = grammars.masks(Schedule(7, rows, inits=[init(0, "a"), init(1, "b")], needs_masks=True))
    assert mask_LW.tolist() == [[1 << 5, 0], [-1, -1]]
    assert grammars.take_errors(6) == {}
    assert grammars.take_errors(7) == {1: "The grammar failed: too complex"}
    assert grammars.take_errors(7) == {}


def test_the_engine_outlives_a_grammar_that_fails(engines, monkeypatch):
    engine = engines()
    monkeypatch.setattr(Grammars, "add", lambda self, id, grammar: self._matchers.update({id: Broken()}))
    held = EngineRequest("held", [5, 6], SamplingParams(temperature=0.0, max_tokens=4, grammar="g"))
    free = EngineRequest("free", [5, 6], SamplingParams(temperature=0.0, max_tokens=4))
    tickets = [engine.submit(request) for request in (held, free)]
    (end,) = tickets[0]
    assert (end.finish_reason, end.error) == ("error", "The grammar failed: too complex")
    assert list(tickets[1])[-1].finish_reason == "length" and engine.dead is None
