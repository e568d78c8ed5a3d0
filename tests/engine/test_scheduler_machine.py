"""The scheduler under random adds, steps, delayed results, aborts, preemptions and sessions, against a brute force:
whatever happens, a request gets the tokens that it gets alone, exactly one end, and nothing leaks."""

from collections import Counter, deque
from random import Random

import pytest
from fake_device import VOCAB, FakeDevice, expected, request
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pagoda.engine.scheduler import Scheduler
from pagoda.engine.scheduler_config import SchedulerConfig
from pagoda.errors import GrammarError, OverloadedError, PromptTooLongError, SessionBusyError

PREFIX = [1, 2, 3, 1, 2, 3, 4, 5, 1, 2]


class Machine(RuleBasedStateMachine):
    @initialize(
        pool=st.sampled_from([13, 7, 2, 1]),
        batch=st.integers(1, 4),
        budget=st.sampled_from([1, 3, 7, 64]),
        caching=st.booleans(),
        depth=st.integers(1, 3),
        guesses=st.sampled_from([0, 1, 4]),
    )
    def start(self, pool, batch, budget, caching, depth, guesses):
        variant = lambda n: 0 if n <= 8 else n  # noqa: E731
        config = SchedulerConfig(
            batch, budget, 4, pool + 1, 30, caching, max_queued=6, num_guesses=guesses, cache_variant=variant
        )
        self.scheduler = Scheduler(config)
        self.device = FakeDevice(4, pool + 1, variant)
        self.depth, self.variant = depth, variant
        self.flights: deque = deque()
        self.live: dict = {}  # id -> (request, whole prompt)
        self.got: dict = {}  # id -> tokens received
        self.ended: dict = {}
        self.sessions: dict = {}  # session -> tokens
        self.turns: dict = {}  # session -> running id
        self.last: dict = {}  # session -> the id that was committed last, and its prompt's length
        self.held: set = set()
        self.num = 0

    @rule(
        shared=st.integers(0, len(PREFIX)),
        tail=st.lists(st.integers(0, VOCAB - 1), max_size=6),
        salt=st.sampled_from(["", "x"]),
        session=st.sampled_from([None, None, "s", "t"]),
        priority=st.integers(0, 1),
        max_tokens=st.integers(1, 9),
        min_tokens=st.integers(0, 3),
        stop=st.booleans(),
        seed=st.integers(0, 2),
        scored=st.booleans(),
        grammar=st.booleans(),
        held=st.booleans(),
    )
    def add(self, shared, tail, salt, session, priority, max_tokens, min_tokens, stop, seed, scored, grammar, held):
        prompt = (PREFIX[:shared] + tail) or [0]
        self.num += 1
        req = request(
            f"r{self.num}", prompt, salt, session, priority, max_tokens=max_tokens, min_tokens=min_tokens, logprobs=0,
            stop_ids=(0,) if stop else (), seed=seed, prompt_logprobs=0 if scored else None,
            grammar="g" if grammar else None,
        )  # fmt: skip
        whole = self.sessions.get(session, []) + prompt
        error = None
        if self.scheduler.num_waiting >= 6:
            error = OverloadedError
        elif session in self.turns:
            error = SessionBusyError
        elif len(whole) + 1 > self.scheduler.max_len:
            error = PromptTooLongError
        if error is not None:
            with pytest.raises(error):
                self.scheduler.add(req)
            return
        self.scheduler.add(req, held)
        self.held |= {req.id} if held else set()
        self.live[req.id], self.got[req.id] = (req, whole), []
        if session is not None:
            self.turns[session] = req.id
            self.sessions.setdefault(session, [])

    @rule()
    def step(self):
        if len(self.flights) >= self.depth:
            self.digest()
        plan = self.scheduler.schedule()
        if plan is not None:
            assert sum(r.num_tokens for r in plan.rows) <= self.scheduler.config.max_step_tokens
            self.flights.append((plan, self.device.launch(plan)))

    @rule()
    def digest(self):
        if self.flights:
            plan, result = self.flights.popleft()
            self.device.seen(plan)
            for output in self.scheduler.digest(plan, result):
                self.take(output)

    @rule(index=st.integers(1, 60), keep=st.one_of(st.none(), st.integers(0, 4)))
    def abort(self, index, keep):
        """Any state: waiting, running, in flight, ended, never added."""
        id = f"r{1 + index % (self.num + 1)}"
        req = self.live.get(id)
        output = self.scheduler.abort(id, keep)
        assert (output is not None) == (req is not None)
        assert self.scheduler.abort(id) is None
        if output is not None:
            assert output.finish_reason == "abort"
            self.take(output, keep)
        for session, (last, prompt_len) in self.last.items():
            if last == id and keep is not None and session in self.sessions and session not in self.turns:
                del self.sessions[session][prompt_len + keep :]

    @rule()
    def row_error(self):
        if self.flights:
            plan, result = self.flights[0]
            result.errors[plan.rows[-1].slot] = "not a number"

    @rule(at=st.integers(0, 7))
    def no_token(self, at):
        """None could be chosen: the request ends, or is computed anew."""
        if self.flights and self.flights[0][1].tokens:
            tokens = self.flights[0][1].tokens
            tokens[at % len(tokens)] = -1

    @rule(index=st.integers(1, 60), fails=st.booleans())
    def settle(self, index, fails):
        """Any state: held, settled, running, ended, never added."""
        id = f"r{1 + index % (self.num + 1)}"
        refused = self.scheduler.counters.refused
        output = self.scheduler.settle(id, GrammarError("no") if fails else None)
        assert (output is not None) == (fails and id in self.held)
        assert self.scheduler.counters.refused - refused == (output is not None)
        self.held.discard(id)
        if output is not None:
            assert (output.finish_reason, output.error_kind) == ("error", "GrammarError")
            self.take(output)

    @rule(session=st.sampled_from("st"))
    def delete_session(self, session):
        assert self.scheduler.sessions.delete(session) == (session in self.sessions)
        self.sessions.pop(session, None)
        self.last.pop(session, None)
        self.turns.pop(session, None)

    @precondition(lambda self: self.num > 2)
    @rule()
    def allocator_fails_once(self):
        pool = self.scheduler.pool

        def failing(count):
            pool.__dict__.pop("allocate", None)
            return None

        pool.allocate = failing

    def take(self, output, keep=None):
        assert output.id in self.live, "news of a request that has ended"
        req, whole = self.live[output.id]
        got = self.got[output.id]
        if not got and (output.token_ids or output.stop_id is not None):
            assert output.num_prompt_tokens == len(whole)
            assert output.num_cached_tokens < len(whole)
            if req.params.prompt_logprobs is not None:
                assert output.num_cached_tokens == 0 and output.prompt_logprobs[0] is None
                assert [(t.token, t.logprob) for t in output.prompt_logprobs[1:]] == [
                    (token, -float(i)) for i, token in enumerate(whole) if i
                ]
        assert [t.token for t in output.logprobs or []] == output.token_ids
        got += output.token_ids
        tokens, reason = expected(whole, req.params, self.scheduler.max_len, self.variant(len(whole)))
        assert got == tokens[: len(got)]
        if output.finish_reason is not None:
            if output.finish_reason in ("stop", "length"):
                assert (got, output.finish_reason) == (tokens, reason)
                keep = len(got)
            self.end(req, whole + got[:keep] if keep is not None else None, len(whole))

    def end(self, req, kept, prompt_len):
        del self.live[req.id]
        self.held.discard(req.id)
        if self.turns.get(req.session_id) == req.id:
            del self.turns[req.session_id]
            if kept is not None:
                self.sessions[req.session_id] = kept
                self.last[req.session_id] = (req.id, prompt_len)

    @invariant()
    def ownership(self):
        if not hasattr(self, "scheduler"):
            return
        scheduler, pool = self.scheduler, self.scheduler.pool
        refs = Counter(b for seq in scheduler._running for b in seq.blocks)
        assert all(pool.refs(b) == refs[b] for b in range(pool.num_blocks + 1))
        assert set(pool._free) == {b for b in range(1, pool.num_blocks + 1) if not refs[b]}
        assert scheduler.num_running + len(scheduler._slots) == scheduler.config.max_batch_size
        assert set(scheduler._live) == set(self.live)
        assert scheduler.num_running + scheduler.num_waiting == len(self.live)
        for name, found in self.sessions.items():
            if name not in self.turns:
                assert scheduler.sessions.tokens(name) == found
        assert len(scheduler.cache._entries) == len(scheduler.cache._names)
        assert not self.held & {seq.request.id for seq in scheduler._running}
        assert scheduler.has_work == bool(set(self.live) - self.held)
        stats = scheduler.stats()
        assert stats.blocks_used == len(refs) and stats.num_waiting == scheduler.num_waiting

    def teardown(self):
        """Whatever the state, it drains in bounded steps once nothing arrives, and nothing is left."""
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.pool.__dict__.pop("allocate", None)
        for id in list(self.held):
            self.settle(int(id[1:]) - 1, False)
        for _ in range(60 * (2 + len(self.live)) ** 2):
            if not self.scheduler.has_work:
                break
            before = len(self.flights)
            self.step()
            assert self.flights or not self.scheduler.has_work, "livelock"
            if len(self.flights) == before:
                self.digest()
        assert not self.scheduler.has_work and not self.live
        while self.flights:
            self.digest()
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_blocks
        finished = self.scheduler.stats().counters.finished
        assert sum(finished.values()) == len(self.got)
        self.ownership()


def wander(seed: int, num_moves: int) -> Machine:
    """A long random walk through the same rules, which hypothesis prefers to keep short."""
    random = Random(seed)
    machine = Machine()
    pool = random.choice([2, 5, 7, 13, 29])
    machine.start(pool, random.randint(1, 4), random.choice([1, 3, 7, 64]), random.random() < 0.8, random.randint(1, 3),
                  random.choice([0, 1, 4]))  # fmt: skip
    moves = (
        ["add"] * 6
        + ["step"] * 12
        + ["digest"] * 6
        + ["abort", "abort", "row_error", "delete_session", "settle", "settle", "no_token"]
    )
    for _ in range(num_moves):
        move = random.choice([*moves, "allocator_fails_once"])
        if move == "add":
            tail = [random.randrange(VOCAB) for _ in range(random.randint(0, 6))]
            stop, scored, grammar = random.random() < 0.3, random.random() < 0.2, random.random() < 0.2
            session, salt = random.choice([None, None, "s", "t"]), random.choice(["", "", "x"])
            lengths = random.randint(0, len(PREFIX)), random.randint(1, 9), random.randint(0, 3)
            machine.add(
                shared=lengths[0], tail=tail, salt=salt, session=session, priority=random.randint(0, 1),
                grammar=grammar, held=random.random() < 0.2, scored=scored, stop=stop, seed=random.randint(0, 2),
                max_tokens=lengths[1], min_tokens=lengths[2],
            )  # fmt: skip
        elif move == "abort":
            machine.abort(max(1, machine.num - random.randint(0, 8)), random.choice([None, 0, 1, 2, 3]))
        elif move == "no_token":
            machine.no_token(random.randrange(8))
        elif move == "settle":
            machine.settle(max(1, machine.num - random.randint(0, 8)), random.random() < 0.3)
        elif move == "delete_session":
            machine.delete_session(random.choice("st"))
        elif move != "row_error" or random.random() < 0.4:
            getattr(machine, move)()
        machine.ownership()
    machine.teardown()
    return machine


def test_long_random_histories():
    total = Counter()
    for seed in range(240):
        counters = wander(seed, 120).scheduler.counters
        total.update(preempted=counters.preemptions, cached=counters.cached_tokens, **counters.finished)
        total.update(right=counters.accepted_tokens, wrong=counters.guessed_tokens - counters.accepted_tokens)
    assert min(total.values()) > 100, f"the walks must reach everything: {total}"


@pytest.mark.slow
def test_many_long_random_histories():
    for seed in range(1000, 4000):
        wander(seed, 200)


def test_random_histories():
    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=200, stateful_step_count=40, deadline=None, derandomize=True,
                          suppress_health_check=list(HealthCheck)),
    )  # fmt: skip


@pytest.mark.slow
def test_many_random_histories():
    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=5000, stateful_step_count=80, deadline=None,
                          suppress_health_check=list(HealthCheck)),
    )  # fmt: skip
