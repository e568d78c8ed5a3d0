"""Single rules of the scheduler, blocks and prefix cache, each in a small scene."""

import gc
import subprocess
import sys

import pytest
from fake_device import FakeDevice, expected, request

from pagoda.engine.blocks import BlockPool
from pagoda.engine.prefix import PrefixCache
from pagoda.engine.schedule import StepResult
from pagoda.engine.scheduler import Scheduler
from pagoda.engine.scheduler_config import SchedulerConfig
from pagoda.errors import OverloadedError, PromptTooLongError, RequestError, SessionBusyError


class Engine:
    """A scheduler and its fake device, run without run-ahead."""

    def __init__(self, max_batch_size=4, max_step_tokens=64, block_len=4, num_blocks=64, session_len=100, **limits):
        limits = {
            "max_batch_size": max_batch_size,
            "max_step_tokens": max_step_tokens,
            "session_len": session_len,
            **limits,
        }
        self.scheduler = Scheduler(SchedulerConfig(block_len=block_len, num_blocks=num_blocks, **limits))
        self.device = FakeDevice(block_len, num_blocks)
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}
        self.cached: dict[str, int] = {}

    def step(self):
        plan = self.scheduler.schedule()
        if plan is not None:
            for output in self.scheduler.digest(plan, self.device.launch(plan)):
                self.device.seen(plan)
                self.tokens.setdefault(output.id, []).extend(output.token_ids)
                if output.num_prompt_tokens:
                    self.cached[output.id] = output.num_cached_tokens
                if output.finish_reason is not None:
                    assert output.id not in self.ends
                    self.ends[output.id] = output.finish_reason
        return plan

    def run(self, *requests):
        for req in requests:
            self.scheduler.add(req)
        while self.scheduler.has_work:
            assert self.step() is not None
        return [self.tokens[r.id] for r in requests]


def alone(req, limit=100):
    return expected(req.prompt_ids, req.params, limit, 0)[0]


def test_the_five_files_import_no_torch():
    names = ["request", "schedule", "blocks", "prefix", "sessions", "metrics", "scheduler"]
    code = ";".join(f"import pagoda.engine.{n}" for n in names) + ";import sys;sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_batched_equals_alone_chunked_and_preempted():
    requests = [request(f"{i}", [1, 2, 3, i, 4] * (i + 1), seed=i, max_tokens=12) for i in range(5)]
    for engine in (Engine(), Engine(max_step_tokens=3), Engine(num_blocks=13), Engine(prefix_caching=False)):
        assert engine.run(*requests) == [alone(r, engine.scheduler.max_len) for r in requests]
    assert Engine(num_blocks=13).run(*requests)
    tight = Engine(num_blocks=13)
    tight.run(*requests)
    assert tight.scheduler.counters.preemptions > 0


def test_decode_rows_come_first_and_a_long_prompt_does_not_stall_them():
    engine = Engine(max_step_tokens=8)
    engine.scheduler.add(request("a", [1], max_tokens=30))
    engine.step()
    engine.scheduler.add(request("b", [2] * 40))
    for _ in range(5):
        plan = engine.step()
        assert [r.tokens is None for r in plan.rows] == [True, False]
        assert plan.rows[0].num_tokens == 1 and plan.rows[1].num_tokens == 7
    assert len(engine.tokens["a"]) == 6 and "b" not in engine.tokens


def test_cached_beginning_is_not_computed_but_the_last_token_is():
    engine = Engine()
    prompt = [1, 2, 3, 4] * 4
    engine.run(request("a", prompt))
    assert engine.run(request("b", prompt)) == [engine.tokens["a"]]
    assert (engine.cached["a"], engine.cached["b"]) == (0, 12)
    engine.run(request("c", prompt, salt="x"), request("d", prompt, prompt_logprobs=0))
    assert (engine.cached["c"], engine.cached["d"]) == (0, 0)


def test_rope_variants_share_no_blocks():
    engine = Engine(cache_variant=lambda n: 0 if n <= 8 else n)
    engine.device.variant = engine.scheduler.config.cache_variant
    engine.run(request("a", [1] * 8), request("b", [1] * 12))
    engine.run(request("c", [1] * 12), request("d", [1] * 13))
    assert (engine.cached["c"], engine.cached["d"]) == (8, 0)


def test_the_lowest_priority_and_then_the_youngest_is_preempted_and_waits_in_front():
    engine = Engine(num_blocks=7, prefix_caching=False)
    for id, priority in (("low", 1), ("old", 0), ("young", 0)):
        engine.scheduler.add(request(id, [1] * 7, priority=priority, max_tokens=17))
    order = []
    while engine.scheduler.has_work:
        engine.step()
        order += [id for id in engine.ends if id not in order]
    assert order == ["old", "young", "low"]


def test_length_ends():
    engine = Engine(session_len=10)
    assert len(engine.run(request("a", [1] * 6, max_tokens=50))[0]) == 4
    assert engine.ends["a"] == "length"
    small = Engine(num_blocks=3)
    assert len(small.run(request("a", [1] * 6, max_tokens=50))[0]) == 2


def test_refusals_change_nothing():
    engine = Engine(session_len=10, max_queued=1)
    add = engine.scheduler.add
    with pytest.raises(PromptTooLongError, match=r"10 tokens.* 10 and"):
        add(request("a", [1] * 10))
    with pytest.raises(RequestError, match="empty"):
        add(request("a", []))
    with pytest.raises(RequestError, match="max_tokens"):
        add(request("a", [1], max_tokens=0))
    add(request("a", [1], session="s"))
    with pytest.raises(RequestError, match="in use"):
        add(request("a", [1]))
    with pytest.raises(OverloadedError):
        add(request("b", [1]))
    engine.step()
    with pytest.raises(SessionBusyError):
        add(request("b", [1], session="s"))
    engine.run(request("b", [1] * 9))
    with pytest.raises(PromptTooLongError, match="5 of the session's history"):
        add(request("c", [1] * 5, session="s"))
    assert engine.scheduler.counters.refused == 7 and not engine.scheduler.has_work


def test_prompts_of_so_many_tokens_may_wait_and_one_of_any_length():
    engine = Engine(max_batch_size=1, max_queued_tokens=10, num_blocks=9)
    for id, length in (("runs", 3), ("huge", 20)):
        engine.scheduler.add(request(id, [1] * length))
        engine.step()
    with pytest.raises(OverloadedError, match=r"20 tokens wait already, 10 "):
        engine.scheduler.add(request("late", [2]))
    assert engine.scheduler.counters.refused == 1
    while "runs" not in engine.ends:
        engine.step()
    engine.step()
    for id in ("a", "b"):
        engine.scheduler.add(request(id, [2] * 5))
    with pytest.raises(OverloadedError, match="10 tokens wait"):
        engine.scheduler.add(request("late", [2]))
    engine.scheduler.abort("a")
    engine.run(request("late", [2] * 5))
    assert set(engine.ends.values()) == {"length"} and not engine.scheduler.num_waiting


def test_stop_token_ends_and_is_not_in_the_answer():
    req = request("a", [1, 2], max_tokens=50)
    free = alone(req)
    stop = free[6]
    engine = Engine()
    assert engine.run(request("a", [1, 2], max_tokens=50, stop_ids=(stop,))) == [free[: free.index(stop)]]
    assert engine.ends["a"] == "stop"
    (late,) = engine.run(request("b", [1, 2], max_tokens=50, stop_ids=(stop,), min_tokens=9))
    assert len(late) >= 9 and stop not in late[:9]
    scheduler = Scheduler(SchedulerConfig(1, 8, 4, 9, 20))
    scheduler.add(request("c", [1], stop_ids=(5,), min_tokens=1, max_tokens=9))
    ends = [scheduler.digest(scheduler.schedule(), StepResult([5]))[0].finish_reason for _ in range(2)]
    assert ends == [None, "stop"]


def test_a_row_in_flight_of_an_ended_request_is_void_and_its_slot_reusable():
    scheduler = Scheduler(SchedulerConfig(1, 8, 4, 9, 20))
    device = FakeDevice(4, 9)
    scheduler.add(request("a", [1, 2, 3]))
    scheduler.add(request("b", [3, 2, 1]))
    plans = [scheduler.schedule(), scheduler.schedule()]
    results = [device.launch(p) for p in plans]
    assert scheduler.abort("a").finish_reason == "abort" and scheduler.abort("a") is None
    third = scheduler.schedule()
    assert third.freed == [0] and [i.id for i in third.inits] == ["b"]
    results.append(device.launch(third))
    outputs = [o for p, r in zip([*plans, third], results) for o in scheduler.digest(p, r)]
    assert [o.id for o in outputs] == ["b"]
    assert outputs[0].token_ids == expected([3, 2, 1], request("b", [1]).params, 20, 0)[0][:1]


def test_pool_evicts_nameless_blocks_first_then_the_least_recently_used():
    cache = PrefixCache(2)
    pool = BlockPool(7, cache)
    root, tokens = cache.root("", 0), [1, 2, 3, 4, 5, 6]
    blocks, names = pool.allocate(4), []
    for i in range(3):
        cache.put(blocks[i], i, names, root, tokens)
    pool.release(blocks)
    assert pool.num_free == 6
    assert set(pool.allocate(3)).isdisjoint(blocks[:3])
    assert pool.allocate(2) == [blocks[2], blocks[1]]
    assert cache.match([], root, tokens, 3) == blocks[:1]
    pool.acquire(blocks[:1])
    assert pool.allocate(1) is None
    with pytest.raises(AssertionError, match="twice"):
        pool.release([blocks[0], blocks[0]])


def test_names_need_equal_tokens_salt_variant_and_key():
    cache = PrefixCache(2, key=b"k")
    root, names = cache.root("", 0), []
    cache.put(5, 0, names, root, [1, 2])
    assert cache.match([], root, [1, 2, 9], 1) == [5]
    assert cache.match([], cache.root("a", 0), [1, 2], 1) == cache.match([], cache.root("", 1), [1, 2], 1) == []
    assert cache.match([], root, [1, 3], 1) == []
    assert cache.match(list(names), root, [1, 3], 1) == [], "tokens are compared even when the name is the same"
    for first in ([1, 2], [9, 9]):
        chain: list[bytes] = []
        for i, block in enumerate((first[0] * 10, first[0] * 10 + 1)):
            cache.put(block, i, chain, root, [*first, 3, 4])
    assert cache.match([], root, [1, 2, 3, 4], 2) == [5, 11] and cache.match([], root, [9, 9, 3, 4], 2) == [90, 91]
    assert PrefixCache(2, key=b"l").root("", 0) != root and PrefixCache(2).root("", 0) != PrefixCache(2).root("", 0)


def test_stats_count_times_and_tokens():
    now = [100.0]
    scheduler = Scheduler(SchedulerConfig(2, 8, 4, 9, 20), clock=lambda: now[0])
    device = FakeDevice(4, 9)
    req = request("a", [1, 2, 3], max_tokens=3)
    req.arrival = 98.0
    scheduler.add(req)
    while scheduler.has_work:
        plan = scheduler.schedule()
        now[0] += 0.5
        scheduler.digest(plan, device.launch(plan))
    counters = scheduler.stats().counters
    assert (counters.steps, counters.step_tokens, counters.generated_tokens, counters.prompt_tokens) == (3, 5, 3, 3)
    assert (counters.queue_time.total, counters.first_token_time.total) == (2.0, 2.5)
    assert (counters.inter_token_time.num, counters.inter_token_time.total) == (2, 1.0)
    assert counters.finished == {"stop": 0, "length": 1, "abort": 0, "error": 0}
    assert scheduler.stats().blocks_used == 0 and scheduler.stats().blocks_cached == 1


def test_a_token_that_could_not_be_chosen_ends_its_request_and_its_blocks_are_not_found_again():
    engine = Engine()
    bad, good = request("bad", [1, 2, 3, 4, 5] * 3, session="s", seed=7), request("good", [1, 2, 3])
    choose = engine.device.choose
    engine.device.choose = lambda last, n, params: -1 if params.seed == 7 and n else choose(last, n, params)
    assert engine.run(bad, good)[1] == alone(good)
    assert engine.ends == {"bad": "error", "good": "length"}
    assert engine.scheduler.sessions.tokens("s") == []
    engine.device.choose = choose
    again = request("again", [1, 2, 3, 4, 5] * 3)
    assert engine.run(again) == [alone(again)]
    assert engine.cached["again"] == 0


@pytest.mark.parametrize("num_failures", [1, 2])
def test_who_failed_with_blocks_of_others_is_computed_anew_once(num_failures):
    engine, prompt, left = Engine(), [1, 2, 3, 4, 5] * 3, [num_failures]
    engine.run(request("first", prompt))
    choose = engine.device.choose

    def fails(last, n, params):
        left[0] -= params.seed == 7 and n == 2
        return -1 if params.seed == 7 and n == 2 and left[0] >= 0 else choose(last, n, params)

    engine.device.choose = fails
    second = request("second", prompt, seed=7)
    whole = alone(second)
    assert engine.run(second) == [whole if num_failures == 1 else whole[:2]]
    assert engine.ends["second"] == ("length" if num_failures == 1 else "error")
    assert (engine.cached["second"], engine.scheduler.counters.preemptions) == (12, 1)
    engine.run(request("third", prompt))
    assert engine.cached["third"] == (12 if num_failures == 1 else 0)
    assert engine.scheduler.stats().blocks_used == 0


def test_rows_in_flight_are_nothing_to_the_garbage_collector():
    """Its walks over the rows of large batches cost more than planning them."""
    engine = Engine(max_batch_size=64, num_blocks=1000, block_len=16)
    for i in range(64):
        engine.scheduler.add(request(f"r{i}", [5, 6, 7], max_tokens=50))
    while engine.scheduler.num_waiting:
        engine.step()
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        plans = [engine.scheduler.schedule() for _ in range(8)]
        assert [len(plan.rows) for plan in plans] == [64] * 8
        assert len(gc.get_objects()) - before < 8 * 64 / 2
    finally:
        gc.enable()
