"""The benchmark's load, clock and arithmetic; and the command itself on the bundled model, over HTTP too."""

import asyncio
import json
import random
import statistics
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagoda.cli.bench_record import Record, commit, draw
from pagoda.cli.bench_targets import HttpTarget, Timing, Timings, _Chunks, drive, must_succeed, percentile
from pagoda.cli.bench_traffic import Arrival, Job, parse_range, poisson, random_jobs, read_trace, trace_jobs
from pagoda.cli.main import main
from pagoda.errors import EngineError, UsageError

# ---- load


def test_random_jobs_and_poisson():
    jobs = random_jobs(random.Random(1), 400, (3, 9), (5, 5), 11)
    assert {len(j.prompt) for j in jobs} == set(range(3, 10)) and {j.num_tokens for j in jobs} == {5}
    assert {t for j in jobs for t in j.prompt} == set(range(11))
    spread = poisson(random.Random(2), jobs, 8.0)
    assert spread[-1].at == pytest.approx(400 / 8, rel=0.15)
    assert [j.at for j in spread] == sorted(j.at for j in spread)
    assert jobs == random_jobs(random.Random(1), 400, (3, 9), (5, 5), 11)


@pytest.mark.parametrize("text", ["0", "x", "5:3", "", "1:2:3"])
def test_lengths_that_are_none(text):
    with pytest.raises(UsageError, match="is not a length"):
        parse_range(text)


def test_traces(tmp_path):
    azure = tmp_path / "a.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.6805900,0,9\n"
    )
    assert read_trace(azure) == [Arrival(0.0, 374, 44), Arrival(pytest.approx(4.0), 1, 9)]
    mooncake = tmp_path / "m.jsonl"
    rows = [
        {"timestamp": 1500, "input_length": 600, "output_length": 3, "hash_ids": [7, 8]},
        {"timestamp": 500, "input_length": 700, "output_length": 5, "hash_ids": [7, 9]},
    ]
    mooncake.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace = read_trace(mooncake)
    assert [(a.at, a.input_len) for a in trace] == [(0.0, 700), (1.0, 600)]
    first, second = trace_jobs(random.Random(0), trace, 1000, 10000)
    assert len(first.prompt) == 700 and first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:600] != second.prompt[512:600]
    azure.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="cannot be read as a trace"):
        read_trace(azure)


def test_real_traces(shared_data: Path):
    conv = read_trace(shared_data / "traces" / "azure_llm_2023_conv.csv", 1000)
    assert len(conv) == 1000 and conv[0] == Arrival(0.0, 374, 44)
    jobs = trace_jobs(random.Random(0), conv, 100, 2048, rate=20.0)
    assert jobs[-1].at == pytest.approx(999 / 20)
    assert all(len(j.prompt) + j.num_tokens <= 2048 and j.prompt and j.num_tokens for j in jobs)
    mooncake = read_trace(shared_data / "traces" / "mooncake_conversation.jsonl", 50)
    assert all(a.blocks for a in mooncake)


# ---- the clock


class FakeTarget:
    """Two tokens at once, then one more; a job that asks for 99 fails."""

    async def generate(self, job: Job):
        if job.num_tokens == 99:
            raise EngineError("no room")
        yield 2
        await asyncio.sleep(0)
        yield 1


def test_drive_times_every_token_from_the_moment_it_was_due():
    run = drive(FakeTarget(), [Job(0.0, [1], 3), Job(0.05, [1], 3), Job(0.0, [1], 99)])
    assert [len(j.arrivals) for j in run.jobs] == [3, 3, 0]
    assert run.jobs[1].sent == 0.05 <= run.jobs[1].arrivals[0]
    assert run.summary()["requests"] == 3 and run.summary()["failed"] == 1
    assert run.jobs[0].gaps[0] == 0.0
    with pytest.raises(EngineError, match="no room"):
        must_succeed(run)


def test_figures_of_a_run():
    run = Timings([Timing(0.0, [1.0, 2.0, 3.0, 4.0]), Timing(2.0, [2.5, 3.5, 4.5])])
    assert run.wall == 4.5 and run.num_tokens == 7
    assert run.decode_rate == pytest.approx(4 / (4.5 - 2.5))  # 3.0, 4.0, 3.5, 4.5 come after 2.5
    assert run.steady_rate == pytest.approx(2 / 1.5)  # 1.0 and 2.0 lie in (0.5, 2]
    assert run.summary()["first_token_p50_ms"] == 750 and run.summary()["gap_p99_ms"] == 1000


def test_percentiles_lie_between_ranks():
    rng = random.Random(3)
    values = [rng.random() for _ in range(11)]
    between = statistics.quantiles(values, n=1000, method="inclusive")
    assert [percentile(values, p / 10) for p in range(1, 1000)] == pytest.approx(between)
    assert (percentile(values, 0), percentile(values, 100)) == (min(values), max(values))
    assert (percentile([], 50), percentile([2.0], 99)) == (0, 2)


# ---- over HTTP


class Server(threading.Thread):
    """Answers completions in chunks cut at awkward places, one token or more an event."""

    def __init__(self, usage: bool):
        super().__init__(daemon=True)
        self.usage, self.bodies, self.ready = usage, [], threading.Event()
        self.start()
        assert self.ready.wait(10)

    def run(self):
        asyncio.run(self.serve())

    async def serve(self):
        self.loop, self.done = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        await self.done.wait()

    async def answer(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(h.split(":")[1]) for h in head.split("\r\n") if h.lower().startswith("content-length"))
        body = await reader.readexactly(length)
        if head.startswith("GET"):
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 29\r\n\r\n{"data": [{"id": "the one"}]}')
        elif b'"max_tokens": 99' in body:
            writer.write(b'HTTP/1.1 400 Bad Request\r\nX: y\r\n\r\n{"error": "too many"}')
        else:
            self.bodies.append(json.loads(body))
            events = []
            for total in (1, 3):
                event = {"choices": [{"text": "é"}]}
                if self.usage:
                    event["usage"] = {"completion_tokens": total}
                events.append(f"data: {json.dumps(event)}\n\n")
            events += ['data: {"choices": [], "usage": {"completion_tokens": 4}}\n\n', "data: [DONE]\n\n"]
            text = "".join(events).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for start in range(0, len(text), 17):
                piece = text[start : start + 17]
                writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()


@pytest.fixture(params=[True, False], ids=["usage in every chunk", "usage at the end"])
def server(request) -> Iterator[Server]:
    server = Server(request.param)
    yield server
    server.loop.call_soon_threadsafe(server.done.set)
    server.join(10)


def test_a_server_is_driven_over_http(server):
    target = HttpTarget(f"http://127.0.0.1:{server.port}/v1")
    run = must_succeed(drive(target, [Job(0.0, [5, 6], 4), Job(0.0, [7], 4)]))
    assert [len(j.arrivals) for j in run.jobs] == [4, 4]
    assert sorted(b["prompt"] for b in server.bodies) == [[5, 6], [7]]
    assert all(b["model"] == "the one" and b["ignore_eos"] and b["temperature"] == 0 for b in server.bodies)
    failed = drive(target, [Job(0.0, [5], 99)])
    assert "400 Bad Request" in failed.jobs[0].error and "too many" in failed.jobs[0].error


def test_chunks_are_put_together_wherever_they_are_cut():
    body, framed = b"data: one\r\n\r\ndata: two", b"b\r\ndata: one\r\n\r\n2;x=y\r\n\r\n\r\n9\r\ndata: two\r\n0\r\n\r\n"
    assert framed.count(b"data") == 2
    for first in range(len(framed) + 1):
        for second in range(first, len(framed) + 1):
            chunks = _Chunks()
            parts = [framed[:first], framed[first:second], framed[second:]]
            assert b"".join(map(chunks.take, parts)) == body and chunks.ended


def test_a_server_that_is_not_there():
    run = drive(HttpTarget("127.0.0.1:9", "m"), [Job(0.0, [5], 1)])
    assert "is gone" in run.jobs[0].error
    with pytest.raises(UsageError, match="is not the address"):
        HttpTarget("ftp://x")


# ---- results


def test_every_line_says_where_it_comes_from(capsys, tmp_path):
    record = Record({"device": "d"}, tmp_path / "lines")
    record.say("w", 50.0, "tok/s", 200.0, batch=3)
    line = json.loads(capsys.readouterr().out)
    assert line == json.loads((tmp_path / "lines").read_text())
    assert (line["of_limit"], line["limit"], line["batch"]) == (0.25, 200.0, 3)
    assert line["device"] == "d" and line["command"] and line["commit"] == commit()


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    same = {"model": "m", "device": "d", "commit": "c", "unit": "tok/s"}
    served = {"first_token_p95_ms": 3.0, "gap_p95_ms": 2.0}
    lines = [
        {"workload": "decode", "value": 3.0, "limit": 4.0, "label": "1 x 2", **same},
        {"workload": "serving", "value": 3.0, "rate": 1.0, **served, **same},
        {"workload": "serving", "value": 3.0, "rate": 2.0, **served, **same},
    ]
    draw(lines, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_the_command_measures_the_bundled_model(capsys, tmp_path):
    small = ["--input-len", "20:30", "--output-len", "8", "--num-prompts", "3", "--device", "cpu", "--inline"]
    assert main(["bench", "mini", *small, "--batch-sizes", "2", "--input-lens", "16"]) == 0
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [line["workload"] for line in lines] == ["throughput", "first token", "decode"]
    assert all(line["value"] > 0 and line["engine"] == {"device": "cpu"} for line in lines)
    assert main(["bench", "throughput", "mini", *small, "--output-len", "60", "--speculative-ngram", "3"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["guessed"] > 0 and 0 <= line["accepted"] <= 1
    assert main(["bench", "serving", "mini", *small, "--rates", "50,100", "--out", str(tmp_path / "out")]) == 0
    lines = [json.loads(text) for text in (tmp_path / "out").read_text().splitlines()]
    assert [line["rate"] for line in lines] == [50, 100] and all(line["requests"] == 3 for line in lines)


def test_the_profile_names_operations_and_writes_traces(capsys, tmp_path):
    words = ["--batch-sizes", "2", "--input-len", "16", "--profile-steps", "3", "--out", str(tmp_path)]
    assert main(["bench", "mini", "--profile", "--device", "cpu", *words]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(text) for text in out.splitlines()]
    assert [line["workload"] for line in lines] == ["profile of decode, batch 2", "profile of prefill of 16"]
    assert all(any("aten::" in key for key, _, _ in line["top"]) for line in lines)
    assert "outside torch's operations" in err
    for line in lines:
        assert json.loads(Path(line["trace"]).read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["bench"], "needs a MODEL"),
        (["bench", "mini", "--rates", "0"], "not a list of numbers"),
        (["bench", "--url", "http://x", "--profile"], "give a MODEL instead of --url"),
        (["bench", "mini", "--num-prompts", "0"], "must be 1 or more"),
    ],
)
def test_mistakes(capsys, words, sentence):
    assert main(words) == 2
    assert sentence in capsys.readouterr().err
