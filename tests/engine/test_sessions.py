"""Conversations: history, one turn at a time, what an aborted turn leaves, files."""

import asyncio
import os
import threading

import msgspec
import pytest
from fake_device import FakeDevice, expected, request

from pagoda.engine.request import EngineRequest, SamplingParams
from pagoda.engine.scheduler import Scheduler
from pagoda.engine.scheduler_config import SchedulerConfig
from pagoda.engine.session_files import SavedSessions, read_sessions, write_sessions
from pagoda.engine.sessions import Sessions
from pagoda.errors import NotFoundError, OverloadedError, SessionBusyError, SessionExpiredError, UsageError


def turn(scheduler, device, req):
    scheduler.add(req)
    tokens, cached = [], 0
    while scheduler.has_work:
        plan = scheduler.schedule()
        for output in scheduler.digest(plan, device.launch(plan)):
            tokens += output.token_ids
            cached += output.num_cached_tokens
    return tokens, cached


def save(sessions, path):
    write_sessions(path, "mini", sessions.snapshot())


def restore(sessions, path, vocab_size=2**31):
    return sessions.adopt(read_sessions(path, "mini", vocab_size))


def make(sessions=None, num_blocks=33):
    return Scheduler(SchedulerConfig(2, 16, 4, num_blocks, 100), sessions), FakeDevice(4, num_blocks)


def test_a_new_turn_sends_only_new_text_and_the_cache_supplies_the_rest():
    scheduler, device = make()
    first, _ = turn(scheduler, device, request("1", [1, 2, 3], session="s", max_tokens=9))
    second, cached = turn(scheduler, device, request("2", [4, 5], session="s", max_tokens=9))
    whole = [1, 2, 3, *first, 4, 5]
    assert second == expected(whole, request("2", [1], max_tokens=9).params, 100, 0)[0]
    assert cached == 8
    assert scheduler.sessions.tokens("s") == whole + second


def test_evicted_history_is_computed_again():
    scheduler, device = make(num_blocks=9)
    first, _ = turn(scheduler, device, request("1", [1, 2, 3], session="s", max_tokens=9))
    turn(scheduler, device, request("x", [5] * 28, max_tokens=4))
    second, cached = turn(scheduler, device, request("2", [4], session="s", max_tokens=5))
    assert cached == 0
    assert second == expected([1, 2, 3, *first, 4], request("2", [1], max_tokens=5).params, 100, 0)[0]


def test_restored_in_a_new_engine_the_next_turn_is_the_same(tmp_path):
    scheduler, device = make()
    turn(scheduler, device, request("1", [1, 2, 3], session="s", max_tokens=9))
    save(scheduler.sessions, tmp_path / "sessions")
    assert os.stat(tmp_path / "sessions").st_mode & 0o077 == 0
    here, _ = turn(scheduler, device, request("2", [4], session="s"))
    other, device = make()
    assert restore(other.sessions, tmp_path / "sessions") == 1
    assert turn(other, device, request("2", [4], session="s"))[0] == here


def test_bad_files_are_refused_and_nothing_is_half_written(tmp_path):
    sessions = Sessions()
    path = tmp_path / "sessions"
    with pytest.raises(UsageError, match="cannot be read"):
        restore(sessions, path)
    for data, message in (
        (b"\xc1", "damaged"),
        (msgspec.msgpack.encode(SavedSessions(9, "mini", {})), "version 9"),
        (msgspec.msgpack.encode(SavedSessions(1, "other", {})), "'other', not 'mini'"),
        (msgspec.msgpack.encode(SavedSessions(1, "mini", {"a": b"123"})), "damaged"),
    ):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=message):
            restore(sessions, path)
    assert len(sessions) == 0
    with pytest.raises(UsageError, match="make the folder"):
        save(sessions, tmp_path / "missing" / "sessions")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="Is a directory"):
        save(sessions, tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "sessions"]


def test_one_turn_at_a_time_and_delete_in_every_state():
    sessions = Sessions()
    sessions.begin("s", "1")
    with pytest.raises(SessionBusyError):
        sessions.tokens("s")
    assert sessions.delete("s") and not sessions.delete("s")
    sessions.begin("s", "2")
    sessions.end("s", "1", [1, 2], 1)
    assert [(s.id, s.num_tokens, s.busy) for s in sessions.list()] == [("s", 0, True)]
    sessions.end("s", "2", [3], 1)
    assert sessions.tokens("s") == [3]


def test_an_abort_that_comes_late_still_cuts_the_turn_to_what_was_received():
    scheduler, device = make()
    tokens, _ = turn(scheduler, device, request("1", [1, 2, 3], session="s", max_tokens=9))
    assert scheduler.abort("1") is None and len(scheduler.sessions.tokens("s")) == 12
    assert scheduler.abort("1", keep_tokens=4) is None
    assert scheduler.sessions.tokens("s") == [1, 2, 3, *tokens[:4]]
    turn(scheduler, device, request("2", [1], session="s", max_tokens=2))
    assert scheduler.abort("1", keep_tokens=0) is None and len(scheduler.sessions.tokens("s")) == 10


def test_idle_sessions_expire_and_busy_ones_do_not():
    now = [0.0]
    sessions = Sessions(ttl=10, clock=lambda: now[0])
    for name in "ab":
        sessions.begin(name, name)
        sessions.end(name, name, [1], 1)
    sessions.begin("busy", "1")
    now[0] = 8.0
    sessions.begin("a", "2")
    sessions.end("a", "2", None)
    now[0] = 11.0
    sessions.expire()
    assert {s.id for s in sessions.list()} == {"a", "busy"}
    assert [s.idle for s in sessions.list() if s.id == "a"] == [3.0] and sessions.tokens("a") == [1]


def test_a_turn_that_runs_for_long_keeps_no_idle_session_alive():
    now = [0.0]
    sessions = Sessions(ttl=10, clock=lambda: now[0], max_sessions=5)
    for name in ("busy", "busy too"):
        sessions.begin(name, name)
    for i in range(9):
        now[0] += 1
        sessions.begin(f"s{i}", f"r{i}")
        sessions.end(f"s{i}", f"r{i}", [1], 1)
        sessions.expire()
    assert {s.id for s in sessions.list()} == {"busy", "busy too", "s6", "s7", "s8"}
    now[0] = 18.0
    sessions.expire()
    assert {s.id for s in sessions.list()} == {"busy", "busy too", "s7", "s8"}
    assert [s.id for s in sessions.list("s8")] == ["s8"]
    for i in range(20, 24):
        sessions.begin(f"s{i}", f"r{i}")
    sessions.expire()
    assert {s.id for s in sessions.list() if s.busy} == {"busy", "busy too", "s20", "s21", "s22", "s23"}
    assert len(sessions) == 6


def test_memory_is_bounded_and_the_longest_idle_go_first():
    sessions = Sessions(max_sessions=3, max_tokens=10)
    for i in range(5):
        sessions.begin(f"s{i}", f"r{i}")
        sessions.end(f"s{i}", f"r{i}", [1, 2], 1)
        sessions.expire()
    assert [s.id for s in sessions.list()] == ["s2", "s3", "s4"]
    sessions.begin("s4", "r")
    sessions.end("s4", "r", list(range(9)), 1)
    sessions.expire()
    assert [s.id for s in sessions.list()] == ["s4"]
    sessions.delete("s4")
    assert sessions._num_tokens == 0


def test_a_file_with_foreign_ids_is_refused(tmp_path):
    large = Sessions()
    large.begin("s", "r")
    large.end("s", "r", [5, 99], 1)
    save(large, tmp_path / "file")
    assert restore(Sessions(), tmp_path / "file", 100) == 1
    with pytest.raises(UsageError, match="of another model"):
        restore(Sessions(), tmp_path / "file", 99)


def test_a_file_holds_those_of_a_prefix_as_they_were_and_any_reader_of_msgpack_reads_it(tmp_path):
    sessions = Sessions()
    for name, tokens in (("a:1", [1, 2, 3]), ("a:2", []), ("b:1", [4])):
        sessions.begin(name, name)
        sessions.end(name, name, tokens, 1)
    taken = sessions.snapshot("a:")
    sessions.trim("a:1", 0)
    write_sessions(tmp_path / "file", "folder/mini", taken)
    saved = msgspec.msgpack.decode((tmp_path / "file").read_bytes())
    ids = {"a:1": b"\1\0\0\0\2\0\0\0\3\0\0\0", "a:2": b""}
    assert saved == {"version": 1, "model": "folder/mini", "sessions": ids}
    assert list(read_sessions(tmp_path / "file", "folder/mini", 9, "a:2")) == ["a:2"]
    assert sessions.adopt(read_sessions(tmp_path / "file", "folder/mini", 9)) == 2
    assert (sessions.tokens("a:1"), sessions.tokens("b:1")) == ([1, 2, 3], [4])


def test_files_do_not_hold_up_the_streams(engines, monkeypatch):
    """The disk of this save is busy until a whole answer has come."""
    engine, written, busy = engines(), [], threading.Event()

    def slow(path, model, histories):
        assert busy.wait(30)
        written.append(sorted(histories))

    monkeypatch.setattr("pagoda.engine.process.write_sessions", slow)
    params = SamplingParams(max_tokens=5)
    list(engine.submit(EngineRequest("1", [5, 6], params, session_id="a:1")))

    async def both():
        saving = asyncio.create_task(engine.ask("save_sessions", path="x", prefix="a:"))
        await engine.ask("ping")
        outputs = [output async for output in engine.submit(EngineRequest("2", [5, 6], params, session_id="a:2"))]
        assert not saving.done()
        busy.set()
        return outputs[-1].finish_reason, await saving

    assert asyncio.run(both()) == ("length", 1) and written == [["a:1"]]
    with pytest.raises(UsageError, match="cannot be read"):
        engine.call("restore_sessions", path="nowhere")
    busy.clear()
    for _ in range(16):
        engine.tell("save_sessions", path="x")
    with pytest.raises(OverloadedError):
        engine.call("save_sessions", path="x")
    busy.set()
    engine.close()  # which waits for the files
    assert len(written) == 17


def test_a_forgotten_session_is_told_once():
    now = [0.0]
    sessions = Sessions(ttl=10, clock=lambda: now[0], max_sessions=2)
    for name in "abc":
        now[0] += 1
        sessions.begin(name, name)
        sessions.end(name, name, [1, 2])
    with pytest.raises(SessionExpiredError):
        sessions.look_up("a")  # for lack of room
    with pytest.raises(NotFoundError) as never:
        sessions.look_up("a")
    assert type(never.value) is NotFoundError
    now[0] = 12.5
    assert sessions.look_up("c") == [1, 2]  # and keeps it for the turn that follows
    now[0] = 22.0
    assert sessions.look_up("c") == [1, 2]
    with pytest.raises(SessionExpiredError):
        sessions.look_up("b")
    sessions.lose(["c", "of a former engine"])
    assert sessions.look_up("c") == [1, 2]
    with pytest.raises(SessionExpiredError):
        sessions.look_up("of a former engine")
    now[0] = 99.0
    sessions.expire()
    assert not sessions.delete("c")
    with pytest.raises(NotFoundError) as ended:
        sessions.look_up("c")
    assert type(ended.value) is NotFoundError
