"""Ranks as Ray actors on two raylets of one machine; the oracle: one rank of our own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagoda.config import EngineConfig
from pagoda.engine.client import start_engine
from pagoda.engine.request import EngineRequest, SamplingParams
from pagoda.errors import MissingExtraError

CONFIG = EngineConfig(device="cpu", dtype="float32", max_batch_size=4, session_len=512, cache_block_seq_len=16)
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """Two raylets with one CPU each, so that two ranks cannot be on the same one."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    before, os.environ["RAY_ADDRESS"] = os.environ.get("RAY_ADDRESS"), made.address
    yield made
    made.shutdown()
    os.environ.pop("RAY_ADDRESS") if before is None else os.environ.__setitem__("RAY_ADDRESS", before)


def rank_processes() -> list[int]:
    """Process ids of our rank actors."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::RankActor"):
            found.append(int(folder.name))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_ranks_on_two_raylets(cluster: object, tiny_llama: Path) -> None:
    prompts = [[5, 6, 7], [9] * 40, list(range(3, 80))]

    def run(engine, name: str) -> list[list[int]]:
        tickets = [engine.submit(EngineRequest(f"{name}{n}", p, GREEDY)) for n, p in enumerate(prompts)]
        return [[t for o in ticket for t in o.token_ids] for ticket in tickets]

    with start_engine(tiny_llama, CONFIG) as one:
        want = run(one, "a")
    with start_engine(tiny_llama, CONFIG.replace(tp=2, executor="ray")) as both:
        assert both.info.report[0].startswith("2 ranks on Ray")
        assert run(both, "b") == want
        assert run(both, "c") == want
        ticket = both.submit(EngineRequest("long", prompts[0], SamplingParams(temperature=0.0, max_tokens=450)))
        news = iter(ticket)
        next(news)
        ranks = rank_processes()
        assert len(ranks) == 2
        struck = time.monotonic()
        os.kill(ranks[1], signal.SIGKILL)
        last = list(news)[-1]
        assert last.finish_reason == "error" and "ended unexpectedly" in str(last.error), last
        assert time.monotonic() - struck < 10
    deadline = time.monotonic() + 10
    while rank_processes():
        assert time.monotonic() < deadline, "ranks were left behind"
        time.sleep(0.05)


def test_without_ray_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from pagoda.engine.ray_ranks import connect_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pagoda-llm\[ray\]"):
        connect_ray()


def test_an_engine_without_ray_does_not_import_it() -> None:
    script = "import sys, pagoda.engine.process; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
