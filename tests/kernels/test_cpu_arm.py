"""The C++ step on Arm: cross-compiled, run under an emulator, held to the same program compiled for this machine."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pagoda.kernels.cpu import build as building

PROGRAM = Path(__file__).parent / "cpu_sanitizers" / "step_bounds.cpp"
SOURCES = Path(building.__file__).parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
INTEGER = ("3 ", "4 ")  # kinds of weights whose activations are rounded to 8 bit: a last bit may turn into a step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, ("g++", COMPILER, EMULATOR))), reason=f"needs g++, {COMPILER} and {EMULATOR}"
    ),
]


def logits(compiler: str, flags: list[str], runner: list[str], folder: Path) -> dict[str, torch.Tensor]:
    """By pair of formats (`weights cache`)."""
    program = folder / compiler
    plain = [flag for flag in building.FLAGS if flag not in ("-shared", "-fvisibility=hidden")]
    command = [compiler, *plain, *flags, "-static", f"-I{SOURCES}", str(PROGRAM), "-o", str(program)]
    subprocess.run(command, check=True, timeout=280)
    done = subprocess.run([*runner, program, "print"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-300:]
    lines = (line.partition(":") for line in done.stdout.splitlines() if ":" in line)
    return {name: torch.tensor([float(x) for x in numbers.split()]) for name, _, numbers in lines}


@pytest.mark.parametrize("variant", ["neondot", "portable"])
def test_arm_gives_the_same_logits(variant, tmp_path):
    wanted = logits("g++", [], [], tmp_path)
    got = logits(COMPILER, list(building.VARIANTS[variant].values()), [EMULATOR], tmp_path)
    assert len(wanted) == 25 and got.keys() == wanted.keys()
    for name, want in wanted.items():
        assert want.numel() == 5 * 2 * 35
        tolerance = 1e-2 if name.startswith(INTEGER) or not name.endswith(" 0") else 1e-4
        assert (got[name] - want).norm() <= tolerance * want.norm(), name


def test_the_library_of_an_arm_wheel_compiles(tmp_path):
    flags = [*building.FLAGS, *building.VARIANTS["neondot"].values(), "-Wall", "-Werror"]
    target = tmp_path / "step.so"
    subprocess.run([COMPILER, *flags, str(SOURCES / "step.cpp"), "-o", str(target)], check=True, timeout=280)
    text = subprocess.run(["aarch64-linux-gnu-objdump", "-d", str(target)], capture_output=True, text=True).stdout
    assert "sdot" in text and "fmla" in text
