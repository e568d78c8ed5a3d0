#!/usr/bin/env bash
# The whole suite natively on a machine with a GPU: first correctness, then nothing else. Logs go to $1 (default: .).
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-.}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
python3 -m pytest -q -x --maxfail=40 -p no:cacheprovider -n "${JOBS:-8}" tests/kernels tests/layers tests/gpu tests/models tests/engine \
  -m "not slow" 2>&1 | tee "$out/native_tests.log" | tail -60
