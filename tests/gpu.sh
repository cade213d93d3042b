#!/usr/bin/env bash
# Everything that only a real GPU can show, in at most nine minutes: `bash tests/gpu.sh`. No network is needed once the
# environment is there; CARVE3D_VENV=system takes the Python on PATH, with the CUDA build of torch that it has.
# Prints one table for the README, and where the logs are. See tests/gpu.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./setup_env.sh
if ! { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }; then
    fail "nvidia-smi finds no GPU on this machine, and these tests are for one (bash tests/run.sh needs none)"
fi
setup_env
export HF_HUB_OFFLINE=1 WANDB_MODE=offline
exec "$VENV_PYTHON" -m tests.gpu "$@"
