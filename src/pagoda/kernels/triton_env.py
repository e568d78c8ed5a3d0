"""Triton where there is Triton. A CPU build of torch comes without it, so kernels import `triton`, `tl` and `jit` from
here: without the package a kernel can be defined but not launched, and the doors never try (`HAS_TRITON`). A CPU build
of torch does as if it were absent, even where it is installed: the import would cost each start a third of a second.
"""

import os
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class _Absent:
    """Stands for a module that is not installed: any attribute exists (annotations need `tl.constexpr`), none can be
    called.
    """

    def __getattr__(self, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return self


def _inert_jit(fn=None, **options):
    """The decorator without Triton: keeps the name, launches nothing."""
    return _Absent() if fn is not None else lambda f: _Absent()


triton: Any
tl: Any
jit: Any
gdc_wait: Any
gdc_launch_dependents: Any
try:
    if not (INTERPRETED or torch.version.cuda or torch.version.hip):
        raise ImportError("this torch has no GPU to launch on: its importer need not wait for Triton")
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    HAS_TRITON = True
except ImportError:
    triton = tl = gdc_wait = gdc_launch_dependents = _Absent()
    jit = _inert_jit
    HAS_TRITON = False


def starts_early(device: torch.device) -> bool:
    """Whether kernels on this device may start before the one ahead has ended (programmatic dependent launch)."""
    on_gpu = HAS_TRITON and not INTERPRETED and device.type == "cuda"
    return on_gpu and torch.cuda.get_device_capability(device) >= (9, 0)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
