"""A pytest plugin (`-p compiling`): launches of kernels compile them for a Hopper GPU instead, which needs none.

What the tests then find in their results means nothing; what counts is written to the file COMPILE_REPORT as JSON:
{"compiled": number of launches, "errors": [kernel and message]}.
"""

import json
import os
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

REPORT = {"compiled": 0, "errors": []}


class Hopper:
    """The driver of a GPU that is not here."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_only(self, *args, grid=None, warmup=False, **options):
    try:
        run(self, *args, grid=grid, warmup=True, **options)
        REPORT["compiled"] += 1
    except Exception as error:
        causes = []
        while error is not None:
            causes.append(str(error)[-500:])
            error = error.__cause__
        REPORT["errors"].append([self.fn.__name__, *causes])


def pytest_sessionfinish() -> None:
    Path(os.environ["COMPILE_REPORT"]).write_text(json.dumps(REPORT), encoding="utf-8")


assert os.environ.get("TRITON_INTERPRET") == "0", "it must be off before Triton is imported"
torch.version.cuda = "13.0"  # else Pagoda does without Triton
torch.cuda.get_device_capability = lambda *_: (9, 0)
driver.set_active(Hopper())
run, JITFunction.run = JITFunction.run, compile_only
