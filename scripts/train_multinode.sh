#!/usr/bin/env bash
# Trains from a config on several machines: run the same command on each, with its own NODE_RANK.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash scripts/train_multinode.sh CONFIG.yaml --name my-run --resume latest
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 bash scripts/train_multinode.sh CONFIG.yaml --name my-run --resume latest
#
# The config, the data and the folder of the runs (--logs) must have the same paths everywhere, and the runs' folder
# must be shared: all processes read the checkpoint that is resumed. Variables:
#   NNODES        number of machines
#   NODE_RANK     number of this one, from 0 (default under SLURM: SLURM_NODEID)
#   MASTER_ADDR   host name or address of machine 0, as the others reach it
#   MASTER_PORT   a free port of machine 0 (default 29500)
#   NPROC         processes on each machine, the same on all (default: GPUs of this machine, or 1)
# and the others of scripts/train.sh, which starts the processes.
set -euo pipefail

fail() {
    echo "train_multinode: $*" >&2
    exit 2
}

NNODES="${NNODES:-}"
NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-}}"
MASTER_ADDR="${MASTER_ADDR:-}"
MASTER_PORT="${MASTER_PORT:-29500}"
case "$NNODES" in
    '' | 0* | *[!0-9]*) fail "NNODES must be the number of machines, not '$NNODES'." ;;
esac
case "$NODE_RANK" in
    '' | 0?* | *[!0-9]*) fail "NODE_RANK must be the number of this machine, from 0, not '$NODE_RANK'." ;;
esac
case "$MASTER_PORT" in
    0* | *[!0-9]*) fail "MASTER_PORT must be the number of a port, not '$MASTER_PORT'." ;;
esac
[ "$NODE_RANK" -lt "$NNODES" ] || fail "NODE_RANK is $NODE_RANK, but with NNODES=$NNODES it must be below $NNODES."
[ -n "$MASTER_ADDR" ] || [ "$NNODES" = 1 ] || fail "set MASTER_ADDR to the address of machine 0."

export NNODES NODE_RANK MASTER_ADDR MASTER_PORT
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" "$@"
