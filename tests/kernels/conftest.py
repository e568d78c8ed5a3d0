"""Where kernel tests run: on the GPU, or in Triton's interpreter, which tests/conftest.py switches on without one."""

import contextlib
import os

import pytest
import torch
from mended import mend_interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError):  # no Triton: the fixture skips
        mend_interpreter()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU under the interpreter. Skips where there is no Triton."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
