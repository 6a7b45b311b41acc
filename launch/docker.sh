#!/usr/bin/env bash
# minitron in its image, on all GPUs of this node. All arguments go to minitron.
#
#   launch/docker.sh run --config configs/quickstart.yaml
#   DOCKER_MOUNTS='/data /checkpoints:/checkpoints:ro' launch/docker.sh distill --config recipe.yaml
#
# This folder is mounted where it is, and what is written is the caller's. DOCKER_MOUNTS: further ones, separated by
# blanks. MINITRON_IMAGE: the image. DOCKER: docker, or podman. DOCKER_NETWORK: none, unless, as for wandb, it is bridge.
set -euo pipefail

options=(--rm --init --user "$(id -u):$(id -g)" --env HOME=/tmp --env USER=minitron --workdir "$PWD" --volume "$PWD:$PWD")
# NCCL and the readers of data share memory, and RDMA pins it.
options+=(--ipc host --ulimit memlock=-1 --ulimit stack=67108864 --network "${DOCKER_NETWORK:-none}")
# Time to finish a step and save.
options+=(--stop-timeout "${MINITRON_GRACE_SECONDS:-600}")
nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU ' && options+=(--gpus all)
[[ -t 0 && -t 1 ]] && options+=(--interactive --tty)
for mount in ${DOCKER_MOUNTS:-}; do
  [[ $mount == *:* ]] || mount=$mount:$mount
  options+=(--volume "$mount")
done
# By name alone: no secret is on the command line.
for name in NPROC_PER_NODE OMP_NUM_THREADS MINITRON_GRACE_SECONDS MINITRON_TIMEOUT_MINUTES MINITRON_PROGRESS \
  WANDB_API_KEY WANDB_MODE; do
  [[ -v $name ]] && options+=(--env "$name")
done

exec "${DOCKER:-docker}" run "${options[@]}" --entrypoint /opt/minitron/launch/torchrun.sh "${MINITRON_IMAGE:-minitron}" "$@"
