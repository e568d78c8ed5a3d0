"""Clients that are not ours, in a Python of their own (PAGODA_CLIENTS_PYTHON: with langchain-openai, litellm and
schemathesis), for their dependencies bite ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Running

pytestmark = pytest.mark.slow
PYTHON = os.environ.get("PAGODA_CLIENTS_PYTHON", sys.executable)
OFFLINE = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": ""}


def test_langchain_and_litellm(server: Running) -> None:
    script = Path(__file__).with_name("foreign_script.py")
    made = subprocess.run([PYTHON, script, server.url], capture_output=True, text=True, env=OFFLINE, timeout=200)
    assert made.returncode == 0, made.stderr[-3000:]
    if "missing" in made.stdout:
        pytest.skip(made.stdout)
    assert {"passed langchain_openai", "passed litellm"} <= set(made.stdout.splitlines())


def test_schemathesis_finds_no_fault(server: Running) -> None:
    """No 5xx, no status that the document does not name, whatever the body."""
    command = [PYTHON, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--phases=coverage,fuzzing"]
    command += [
        "--checks=not_a_server_error,status_code_conformance",
        "--max-examples=20",
        "--suppress-health-check=all",
    ]
    made = subprocess.run(command, capture_output=True, text=True, env=OFFLINE, timeout=280)
    if "No module named" in made.stderr:
        pytest.skip("schemathesis is not installed")
    assert made.returncode == 0, made.stdout[-5000:]


def test_curl_streams(server: Running) -> None:
    body = '{"messages": [{"role": "user", "content": "Who are you?"}], "stream": true, "temperature": 0}'
    command = ["curl", "-sN", f"{server.url}/v1/chat/completions", "-H", "content-type: application/json", "-d", body]
    text = subprocess.check_output(command, text=True)
    assert text.startswith("data: {") and text.endswith("data: [DONE]\n\n") and "Pagoda" in text
