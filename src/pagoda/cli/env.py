"""`pagoda env`, also `check_env`: what a bug report needs, found without importing anything heavy."""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path

from pagoda import __version__
from pagoda.cli.flags import BOOL, Parser

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "llguidance", "msgspec",
            "fastapi", "uvicorn", "gradio", "ray")  # fmt: skip


def make_parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Print this machine and the versions of the packages that matter.")
    parser.add_argument("--json", **BOOL, default=False, help="print one JSON object")
    parser.add_argument("--dump-file", metavar="FILE", help="write it to a file, too")
    return parser


def _package(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> list[str]:
    """Names that the NVIDIA driver reports, by its files."""
    found = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        found += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model")]
    return found


def _memory_gib() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def collect() -> dict[str, str]:
    """Fact -> value, in the order in which they are printed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "pagoda": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cpu": f"{cpu_name()}, {cores} cores, {_memory_gib():.0f} GiB",
        "gpu": ", ".join(_gpus()) or "none",
        "c++ compiler": shutil.which("g++") or shutil.which("clang++") or "none",
    }
    return facts | {name: _package(name) for name in PACKAGES}


def run(args: argparse.Namespace) -> int:
    facts = collect()
    width = max(map(len, facts))
    text = "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
    text = json.dumps(facts) if args.json else text
    print(text)
    if args.dump_file:
        Path(args.dump_file).write_text(text + "\n", encoding="utf-8")
    return 0
