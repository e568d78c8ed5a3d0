"""What a chat on a CPU must not wait for."""

import os
import subprocess
import sys
import time

import pytest

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


@pytest.mark.slow
def test_a_chat_answers_before_one_wonders(tmp_path):
    """In a terminal, the kernels built: the best of three starts, for a busy neighbour is not the chat's fault."""
    pexpect = pytest.importorskip("pexpect")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    env |= {"XDG_STATE_HOME": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    waited, started = [], []
    for _ in range(3):
        begin = time.monotonic()
        words = ["-m", "pagoda.cli.main", "chat", "--device", "cpu", "--do-sample", "False"]
        child = pexpect.spawn(sys.executable, words, env=env, encoding="utf-8", timeout=60, dimensions=(40, 100))
        child.delaybeforesend = None
        child.expect_exact(">>>")
        enter = time.monotonic()
        child.send("What is the capital of France?\r\r")
        child.expect_exact("France is")  # some tokens later than the first, even
        waited.append(time.monotonic() - enter)
        started.append(time.monotonic() - begin)
        child.expect_exact(">>>")
        child.send("exit\r\r")
        child.expect(pexpect.EOF)
        child.close()
    assert min(waited) < 0.5 and min(started) < 3.0, (waited, started)
