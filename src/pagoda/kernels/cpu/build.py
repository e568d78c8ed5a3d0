"""Compiles the C++ step once per machine and source, and keeps it in the user's cache folder; a wheel may bring it.

One source, several variants: the compiler is told which vectors the machine has, and the source follows.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pagoda.errors import PagodaError

PREBUILT = "prebuilt"  # folder of the package: libraries that a wheel carries
SOURCES = ("vector.h", "barrier.h", "linear.h", "attention.h", "step.h", "step.cpp")
# -ffp-contract=off: which products are fused with sums is written in the source, so that results do not depend on how
# many tokens or rows a template handles.
FLAGS = ("-O3", "-std=gnu++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared",
         "-fPIC", "-fvisibility=hidden", "-w")  # fmt: skip

_AVX2 = {"avx2": "-mavx2", "fma": "-mfma", "f16c": "-mf16c"}
_AVX512 = _AVX2 | {
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512vl": "-mavx512vl",
    "avx512dq": "-mavx512dq",
    "avx512_vnni": "-mavx512vnni",
}
# name -> the CPU flags that it needs, each with the compiler flag that stands for it; best first
VARIANTS: dict[str, dict[str, str]] = {
    "avx512bf16": _AVX512 | {"avx512_bf16": "-mavx512bf16"},
    "avx512vnni": _AVX512,
    "avx2vnni": _AVX2 | {"avx_vnni": "-mavxvnni"},
    "avx2": _AVX2,
    "neondot": {"asimddp": "-march=armv8.2-a+dotprod"},
    "portable": {},
}


class BuildError(PagodaError):
    """The C++ step cannot be compiled or loaded here; the message is the reason in one line."""


def cpu_flags() -> frozenset[str]:
    """What the kernel says this CPU can do; empty where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def usable_variants() -> list[str]:
    """The variants that this CPU can run, best first."""
    flags = cpu_flags()
    return [name for name, needed in VARIANTS.items() if flags.issuperset(needed)]


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pagoda" / "cpu"


def library_name(variant: str, extra: tuple[str, ...] = ()) -> str:
    """The file that `build` makes: it names the source and the flags, so that another source is another file."""
    digest = hashlib.sha256(repr((FLAGS, VARIANTS[variant], extra)).encode())
    for name in SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return f"step-{variant}-{platform.machine()}-{digest.hexdigest()[:16]}.so"


def build(variant: str | None = None, extra: tuple[str, ...] = ()) -> Path:
    """The compiled library of `variant` (default: the best that this CPU runs): the wheel's, else the cache's, else
    compiled now, with a line on stderr that tells what takes so long. `extra`: more compiler flags (sanitizers). Raises
    BuildError."""
    variant = variant or usable_variants()[0]
    name = library_name(variant, extra)
    for folder in (Path(__file__).parent / PREBUILT, cache_folder()):
        if (folder / name).exists():
            return folder / name
    return _compile(cache_folder() / name, variant, extra)


def _compile(target: Path, variant: str, extra: tuple[str, ...] = ()) -> Path:
    """Two processes may compile at once: each writes its own file and moves it into place."""
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise BuildError(f"no C++ compiler ({compiler}) was found")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    except OSError as e:
        raise BuildError(f"the cache folder {target.parent} cannot be written ({e.strerror})") from None
    os.close(handle)
    print("compiling the CPU kernels for this machine, once: about 10 s", file=sys.stderr, flush=True)
    source = Path(__file__).parent / "step.cpp"
    try:
        command = [compiler, *FLAGS, *VARIANTS[variant].values(), *extra, str(source), "-o", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["unknown error"]
            raise BuildError(f"{compiler} could not compile the C++ step ({lines[0].strip()})")
        os.chmod(name, 0o755)
        os.replace(name, target)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise BuildError(f"{compiler} could not be run ({e})") from None
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def prebuild() -> list[Path]:
    """Compile every variant of this machine's architecture into the package, for a wheel (see docs/performance.md)."""
    arm = platform.machine() in ("aarch64", "arm64")
    names = [name for name in VARIANTS if name == "portable" or (name == "neondot") == arm]
    return [_compile(Path(__file__).parent / PREBUILT / library_name(name), name) for name in names]


def load(variant: str | None = None) -> ctypes.CDLL:
    """The library, ready to call. It links the same OpenMP runtime that torch has loaded: one pool of threads."""
    path = build(variant)
    try:
        return ctypes.CDLL(str(path))
    except OSError as e:
        raise BuildError(f"the compiled C++ step cannot be loaded ({e})") from None


if __name__ == "__main__":
    print(*prebuild(), sep="\n")
