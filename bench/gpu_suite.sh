#!/usr/bin/env bash
# Every check that wants a GPU: search, refit, every method, parity, decoders, runtimes, timing of a family, latency
# table, fp16; about seven minutes on one GPU, from this checkout and the installed packages alone; `--check NAME` runs
# some. Results: bench/results/DEVICE/*.json.
#   bench/gpu_suite.sh                      on the first GPU
#   bench/gpu_suite.sh --small --out DIR    small models on the CPU, to test the suite
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1
python="${PYTHON:-python}"
if [[ -z "${PYTHON:-}" && -x .venv/bin/python ]]; then python=.venv/bin/python; fi
for argument in "$@"; do
  if [[ "$argument" == --out || "$argument" == --out=* ]]; then exec "$python" -m bench.suite "$@"; fi
done
exec "$python" -m bench.suite --out bench/results "$@"
