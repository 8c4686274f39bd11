#!/usr/bin/env bash
# Runs a module of this project on one machine, in one process for each GPU:
#
#   bash scripts/launch.sh training.zero_shot --pretrained epoch_32.pt --data imagenet=/data/imagenet
#
# Variables:
#   NPROC    processes (default: the GPUs of this machine, or 1)
#   PYTHON   interpreter (default: that of .venv, else python3)
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ $# -eq 0 ]; then
    echo "launch: name a module: bash scripts/launch.sh training.zero_shot [flags]" >&2
    exit 2
fi
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON="$ROOT/.venv/bin/python"; fi
fi
export PYTHONPATH="$ROOT/src${PYTHONPATH:+:$PYTHONPATH}"
NPROC="${NPROC:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
module="$1"
shift
case "$NPROC" in
    0* | '' | *[!0-9]*)
        echo "launch: NPROC must be a whole number of at least 1, not '$NPROC'." >&2
        exit 2
        ;;
    1) exec "$PYTHON" -m "$module" "$@" ;;
    # The two dashes keep torchrun from taking flags that begin like its own.
    *) exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" -m "$module" -- "$@" ;;
esac
