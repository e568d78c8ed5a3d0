"""Where kernel tests run: on the GPU, or in Triton's interpreter, which tests/conftest.py switches on without one."""

import contextlib
import os

import pytest
import torch


def _mend_interpreter() -> None:
    """Triton 3.6's interpreter makes loop bounds of arrays of one element; NumPy 2.4 refuses to convert them."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = mended


if os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError):  # no Triton: the fixture skips
        _mend_interpreter()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU under the interpreter. Skips where there is no Triton."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
