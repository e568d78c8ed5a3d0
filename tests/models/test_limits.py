"""The limits by arithmetic, against the figures that were worked out by hand for Llama-3.1-8B and Qwen3-0.6B."""

import random
from pathlib import Path

import pytest

from pagoda.config import EngineConfig
from pagoda.models.limits import Ceiling, Limits, ceiling_of
from pagoda.models.spec import read_spec

SHAPES = Path(__file__).resolve().parents[2] / "benchmarks" / "shapes"
H200 = ceiling_of("NVIDIA H200")


def limits(shape: str, **knobs: object) -> Limits:
    config = EngineConfig(**knobs)
    assert H200 is not None
    return Limits(read_spec(SHAPES / shape, config), config, H200)


def w2() -> list[tuple[int, int]]:
    rng = random.Random(0)
    lengths = []
    for _ in range(256):
        lengths.append(rng.randint(100, 1024))
        for _ in range(lengths[-1]):
            rng.randint(0, 10000)
    return list(zip(lengths, [rng.randint(100, 1024) for _ in range(256)]))


def test_the_known_limits_of_the_race():
    a, a4, b = limits("llama-3.1-8b"), limits("llama-3.1-8b", weight_format="int4"), limits("qwen3-0.6b")
    near = pytest.approx
    assert a.weight_bytes == near(15.0e9, rel=0.01) and b.weight_bytes == near(1.19e9, rel=0.01)
    assert a4.weight_bytes == near(4.7e9, rel=0.01)
    assert 1 / a.decode(1, 256) == near(308, rel=0.01)
    assert 1 / a4.decode(1, 256) == near(980, rel=0.01)
    assert 1 / b.decode(1, 256) == near(3790, rel=0.01)
    assert 64 / a.decode(64, 576) == near(15000, rel=0.01)
    assert 256 / a.decode(256, 576) == near(26000, rel=0.01)
    assert 16 * 4096 / a.prefill([4096] * 16) == near(45670, rel=0.01)
    jobs = w2()
    assert (sum(p for p, _ in jobs), sum(n for _, n in jobs)) == (142827, 133966)
    assert 133966 / a.run(jobs) == near(13045, rel=0.01)
    assert 133966 / b.run(jobs) == near(38170, rel=0.01)


def test_windows_and_cache_formats_read_less():
    full = limits("llama-3.1-8b")
    narrow = limits("llama-3.1-8b", quant_policy="int8")
    assert full.decode(64, 4000) - full.decode(64, 0) == pytest.approx(
        (narrow.decode(64, 4000) - narrow.decode(64, 0)) / (132 / 256), rel=1e-6
    )
    full._windows = (100,) * 32
    assert full.decode(8, 5000) == full.decode(8, 100)
    assert full.prefill([100]) == limits("llama-3.1-8b").prefill([100])
    assert full.prefill([5000]) < limits("llama-3.1-8b").prefill([5000])


def test_devices_that_were_not_measured_have_no_limit():
    assert ceiling_of("AMD EPYC, 2 threads") is None
    assert ceiling_of("NVIDIA H200 NVL") == Ceiling(4.62e12, 686e12, 1257e12)
