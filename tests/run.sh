#!/usr/bin/env bash
# Sets up .venv as carve3d_train.sh does and runs the tests: `bash tests/run.sh [pytest arguments]`.
# The slow ones (whole trainings) are left out; `bash tests/run.sh -m slow` runs them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./setup_env.sh
setup_env
export HF_HUB_OFFLINE=1 WANDB_MODE=offline  # no test may need the network
# one test per core: every test computes with one thread; neighbours stay together, for they share what is made for them
exec "$VENV_PYTHON" -m pytest -q -m "not slow" -n logical --maxprocesses 4 --dist worksteal "$@"
