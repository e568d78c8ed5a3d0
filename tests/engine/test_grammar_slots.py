"""Which row gets which request's grammar mask."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pagoda.engine.grammars import MAX_MADE, Grammars
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


class Maker:
    """Stands for `GrammarMasks`: makes matchers when it may, and counts them."""

    def __init__(self):
        self.may, self.made = threading.Event(), []

    def matcher(self, grammar: str):
        self.made.append(grammar)
        assert self.may.wait(10)
        if grammar == "wrong":
            raise GrammarError("The grammar failed: too complex", "response_format")
        if grammar == "bug":
            raise RuntimeError("a secret")
        return Copied(OnlyToken(7))


class Copied:
    def __init__(self, of):
        self.fill_mask, self.tokens = of.fill_mask, []

    def copy(self):
        return Copied(self)

    def accept(self, token):
        self.tokens.append(token)


def ask(engine, id, grammar=None, **more):
    params = SamplingParams(temperature=0.0, max_tokens=4, grammar=grammar)
    return engine.submit(EngineRequest(id, [5, 6], params, **more))


@pytest.fixture
def making(engines):
    """An engine whose grammars are made when the test says so."""
    engine, maker = engines(max_queued_requests=3, max_batch_size=2), Maker()
    engine._transport._loop._grammars._masks = maker
    yield engine, maker
    maker.may.set()


def test_the_engine_outlives_a_grammar_that_fails(making):
    engine, maker = making
    maker.may.set()
    maker.matcher = lambda grammar: type("Failing", (), {"copy": lambda self: Broken()})()
    tickets = ask(engine, "held", "g"), ask(engine, "free")
    (end,) = tickets[0]
    assert (end.finish_reason, end.error) == ("error", "The grammar failed: too complex")
    assert list(tickets[1])[-1].finish_reason == "length" and engine.dead is None


def test_others_go_on_while_a_grammar_is_made_and_it_is_made_once(making):
    engine, maker = making
    held = [ask(engine, f"held{i}", "g") for i in range(2)]
    assert list(ask(engine, "free"))[-1].finish_reason == "length", "it came later, and need not wait"
    stats = engine.stats()
    assert (stats.num_waiting, stats.num_running, maker.may.is_set()) == (2, 0, False)
    maker.may.set()
    for ticket in [*held, ask(engine, "later", "g")]:
        outputs = list(ticket)
        assert [t for output in outputs for t in output.token_ids] == [7] * 4
    assert maker.made == ["g"]
    state = engine._transport._loop._grammars
    assert not state._matchers and not state._wanted and not next(iter(state._made.values())).tokens


def test_who_waits_for_a_grammar_may_be_aborted_and_is_counted_in_the_queue(making):
    engine, maker = making
    tickets = [ask(engine, f"held{i}", f"g{i}", session_id=f"s{i}") for i in range(3)]
    (refusal,) = ask(engine, "fourth", "g")
    assert refusal.error_kind == "OverloadedError" and "3 requests wait" in refusal.error
    (late,) = ask(engine, "fifth", "g")
    assert late.error_kind == "OverloadedError"
    tickets[0].abort()
    (end,) = tickets[0]
    assert end.finish_reason == "abort"
    assert engine.call("abort_requests", session_id="s1") == 1
    (end,) = tickets[1]
    assert end.finish_reason == "abort"
    (busy,) = ask(engine, "sixth", session_id="s2")
    assert busy.error_kind == "SessionBusyError"
    maker.may.set()
    assert list(tickets[2])[-1].finish_reason == "length"
    (again,) = [list(ask(engine, "again", "g0", session_id="s0"))[-1]]
    assert again.finish_reason == "length"
    state = engine._transport._loop._grammars
    assert not state._matchers and not state._wanted and engine.stats().num_waiting == 0


@pytest.mark.parametrize(("grammar", "kind"), [("wrong", "GrammarError"), ("bug", "EngineError")])
def test_a_grammar_that_cannot_be_made_ends_all_who_wait_for_it(making, grammar, kind):
    engine, maker = making
    tickets = [ask(engine, f"held{i}", grammar, session_id=f"s{i}") for i in range(2)]
    maker.may.set()
    for ticket in tickets:
        (end,) = ticket
        assert (end.finish_reason, end.error_kind) == ("error", kind) and "secret" not in end.error
    assert list(ask(engine, "next", session_id="s0"))[-1].finish_reason == "length" and engine.dead is None


def test_who_waits_too_long_for_a_grammar_is_refused_and_an_engine_of_such_does_not_spin(making):
    engine, _ = making
    loop = engine._transport._loop
    (late,) = ask(engine, "late", "g", max_wait=1e-3, arrival=time.monotonic() - 1)
    assert late.error_kind == "OverloadedError" and "waited for 0.001 s" in late.error
    ask(engine, "held", "h")
    engine.call("ping")
    assert not loop._scheduler.has_work and 0 < loop._patience() <= 0.01


def test_few_of_many_grammars_are_kept(making):
    engine, maker = making
    maker.may.set()
    for i in range(40):
        list(ask(engine, f"r{i}", f"g{i}"))
    list(ask(engine, "again", "g39"))
    assert len(maker.made) == 40 and len(engine._transport._loop._grammars._made) == MAX_MADE
