"""Every kernel as its tests launch it compiles for a Hopper GPU, which the interpreter cannot tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
QUICK = ["argmax", "rms_norm"]
SLOW = ["act_mul", "attention_kernels", "batch_step", "eight_bit_linear", "embed_rows", "int4_linear"]
SLOW += ["sample", "small_linear"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_kernels_compile_for_hopper(name: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    report = tmp_path / "report.json"
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    own = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "COMPILE_REPORT": str(report)}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "compiling", "-p", "no:cacheprovider", f"{HERE}/test_{name}.py"],
        env={**os.environ, **own, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        timeout=880,
    )
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["errors"] == []
    assert found["compiled"] > 0
