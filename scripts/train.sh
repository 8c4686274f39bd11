#!/usr/bin/env bash
# Trains from a config on one machine, one process for each GPU, with the global batch that the recipe asks for:
#
#   DATA=/data bash scripts/train.sh configs/pretrain/cc3m_plus_vit_s_16_elip.yaml --name my-run --resume latest
#   NPROC=1 bash scripts/train.sh CONFIG.yaml --accum-freq 4      # the same global batch on one GPU
#
# Everything after the config goes to training.main. Variables:
#   NPROC          processes on this machine (default: its GPUs, or 1)
#   GLOBAL_BATCH   samples of one optimizer step, over all processes (default: 4 x the config's batch-size x accum-freq:
#                  the paper's four GPUs). With --batch-size among the flags, that is taken instead, as it is.
#   PYTHON         interpreter (default python3), of the same environment as torchrun
# scripts/train_multinode.sh, which starts this script on each of several machines, adds
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
set -euo pipefail

fail() {
    echo "train: $*" >&2
    exit 2
}

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ $# -gt 0 ] || fail "name a config: bash scripts/train.sh configs/pretrain/NAME.yaml [flags]"
CONFIG="$1"
shift
[ -f "$CONFIG" ] || fail "there is no config file $CONFIG."

if ! command -v torchrun >/dev/null && [ -x "$ROOT/.venv/bin/torchrun" ]; then
    PATH="$ROOT/.venv/bin:$PATH"
fi
command -v torchrun >/dev/null || fail "torchrun is not on the PATH: activate the environment that has PyTorch."
PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$ROOT/src${PYTHONPATH:+:$PYTHONPATH}"

NNODES="${NNODES:-1}"
NPROC="${NPROC:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
GLOBAL_BATCH="${GLOBAL_BATCH:-}"
for variable in NNODES NPROC GLOBAL_BATCH; do
    value="${!variable}"
    case "$value" in
        '') [ "$variable" = GLOBAL_BATCH ] || fail "$variable is empty: give a number, or leave it unset." ;;
        0* | *[!0-9]*) fail "$variable must be a whole number of at least 1, not '$value'." ;;
    esac
done
if [ "$NNODES" != 1 ] && [ -z "${NODE_RANK:-}" ]; then
    fail "NNODES is $NNODES: use scripts/train_multinode.sh for several machines, or unset it."
fi

# Samples of a batch for each process. Whatever else is wrong with the config or the flags is also told here, once.
batch_size="$("$PYTHON" - "$((NNODES * NPROC))" "$GLOBAL_BATCH" "$CONFIG" "$@" <<'PY'
import sys

from training.errors import EXIT_USER_ERROR, UserError
from training.options import parse
from training.tasks.contrastive import PretrainingOptions

RECIPE_PROCESSES = 4


def without(flag, words):
    """The words of a command line without a flag and its value."""
    kept, is_value = [], False
    for word in words:
        if not is_value and word != flag and not word.startswith(f"{flag}="):
            kept.append(word)
        is_value = word == flag and not is_value
    return kept


def batch_size(processes, global_batch, config, *flags):
    args = parse(PretrainingOptions, ["--config", config, *flags])
    parts = processes * args.accum_freq
    if any(word.partition("=")[0] == "--batch-size" for word in flags):
        return args.batch_size, args.accum_freq
    if not global_batch:
        recipe = parse(PretrainingOptions, ["--config", config, *without("--accum-freq", flags)])
        global_batch = RECIPE_PROCESSES * recipe.batch_size * recipe.accum_freq
    if global_batch % parts:
        fitting = ", ".join(str(n) for n in range(1, 65) if global_batch % n == 0)
        raise UserError(
            f"The global batch of {global_batch} cannot be divided by {processes} process(es) x --accum-freq "
            f"{args.accum_freq} = {parts}: choose NPROC and --accum-freq so that this number is one of {fitting}, or "
            "set GLOBAL_BATCH."
        )
    return global_batch // parts, args.accum_freq


processes, global_batch, *words = sys.argv[1:]
try:
    size, accumulated = batch_size(int(processes), int(global_batch or 0), *words)
except UserError as error:
    print(f"train: {error}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
times = f" x {accumulated} accumulated batches" if accumulated > 1 else ""
total = int(processes) * size * accumulated
print(f"train: {processes} process(es) x {size} samples{times} = global batch {total}", file=sys.stderr)
print(size)
PY
)"

if [ "$NNODES" = 1 ]; then
    rendezvous=(--standalone)
else
    rendezvous=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
fi
# A process that is asked to stop finishes its step and saves: it gets more than torchrun's 30 seconds for that.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}"
# The two dashes: torchrun would take flags that begin like its own (--logs, --log-local) for these.
exec torchrun "${rendezvous[@]}" --nproc_per_node "$NPROC" -m training.main -- \
    --config "$CONFIG" "$@" --batch-size "$batch_size"
