"""What a chat on a CPU must not wait for."""

import os
import subprocess
import sys

SLOW = ("transformers", "llguidance", "huggingface_hub", "sentencepiece", "tiktoken", "pandas", "scipy")
SCRIPT = f"""
import sys
from pagoda.cli import chat, main
from pagoda.config import EngineConfig
from pagoda.offline import pipeline
with pipeline("mini", EngineConfig(max_batch_size=2, device="cpu")) as pipe:
    assert pipe("What is the capital of France?").text
import torch
slow = {SLOW} + (() if torch.version.cuda or torch.version.hip else ("triton",))
print(*(name for name in slow if name in sys.modules))
"""


def test_a_reply_of_mini_imports_nothing_slow():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
