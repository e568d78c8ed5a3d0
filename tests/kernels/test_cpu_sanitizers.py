"""The C++ step under the compiler's sanitizers: steps for bounds and undefined behaviour, the barrier for races."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pagoda.kernels.cpu import build as building

FOLDER = Path(__file__).parent / "cpu_sanitizers"
SOURCES = Path(building.__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler"),
]


def compile_and_run(source: str, flags: list[str], folder: Path) -> None:
    program = folder / "program"
    command = [
        "g++",
        "-O1",
        "-g",
        "-std=gnu++17",
        "-w",
        f"-I{SOURCES}",
        *flags,
        str(FOLDER / source),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True, timeout=280)
    done = subprocess.run([program], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("variant", sorted({building.usable_variants()[0], "portable"}))
def test_steps_stay_in_bounds(variant, tmp_path):
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off", "-fopenmp"]
    flags += building.VARIANTS[variant].values()
    compile_and_run("step_bounds.cpp", flags, tmp_path)


def test_barrier_has_no_race(tmp_path):
    compile_and_run("barrier_race.cpp", ["-fsanitize=thread", "-pthread"], tmp_path)
