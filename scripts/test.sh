#!/usr/bin/env bash
# Runs the tests, setting up the environment first where that is needed. Arguments go to pytest:
#
#   bash scripts/test.sh
#   bash scripts/test.sh tests/open_clip_elip -k reduction
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

cd "$ROOT"
# No test may reach for the network. The models are tiny: more threads, NumPy's too, only get in each other's way.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
