#!/usr/bin/env bash
# minitron under torchrun, on one node or several. All arguments go to minitron.
#
#   launch/torchrun.sh run --config configs/quickstart.yaml
#
# On several nodes, the same command on each, with its own NODE_RANK:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a launch/torchrun.sh distill --config recipe.yaml
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node-a launch/torchrun.sh distill --config recipe.yaml
#
# With MAX_RESTARTS=N the ranks are started again, up to N times, when one has failed or hangs; a training goes on from
# its newest checkpoint. NNODES=MIN:MAX goes on with fewer nodes where one is lost, and takes in those that come; more
# than MAX are spare. Then there is no NODE_RANK, and MASTER_ADDR is a node that must not be lost (docs/faults.md):
#   NNODES=3:4 MAX_RESTARTS=5 MASTER_ADDR=node-a launch/torchrun.sh distill --config recipe.yaml
set -euo pipefail

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | grep -c '^GPU ' || true)

NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MAX_RESTARTS=${MAX_RESTARTS:-0}
NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}

# One queue of kernels to the device: Megatron's overlap of communication and computation relies on their order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [[ $NNODES == *:* ]] || ((NNODES > 1 && MAX_RESTARTS > 0)); then
  nodes=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT")
  nodes+=(--rdzv-id "${RDZV_ID:-minitron}" --rdzv-conf "last_call_timeout=${LAST_CALL_SECONDS:-30}")
elif ((NNODES > 1)); then
  nodes=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
else
  nodes=(--standalone) # picks a free port
fi
if ((MAX_RESTARTS > 0)); then
  nodes+=(--max-restarts "$MAX_RESTARTS")
fi

# After Ctrl-C or SIGTERM the ranks finish their step and write a checkpoint; torchrun's own patience is 30 seconds.
export MINITRON_GRACE_SECONDS=${MINITRON_GRACE_SECONDS:-600}
exec python -m minitron_mcore.runtime.torchrun "${nodes[@]}" --shutdown-timeout "$MINITRON_GRACE_SECONDS" --nproc-per-node "$NPROC_PER_NODE" -m "${MINITRON_MODULE:-minitron_mcore}" "$@"
