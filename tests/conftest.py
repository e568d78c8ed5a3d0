"""Fixtures for every room."""

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():  # read when a kernel is defined: must stand before the first import of one
    os.environ.setdefault("TRITON_INTERPRET", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes background jobs deaf to it


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real reference files, beside the checkout or at PAGODA_TEST_DATA; tests that need them skip without."""
    folder = Path(os.environ.get("PAGODA_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (folder / "README.md").exists():
        pytest.skip("the reference data folder is not here")
    return folder
