#!/usr/bin/env bash
# Train on this machine, one rank a GPU: launch/local.sh --model qwen3-8b --dataset chats.jsonl --output_dir runs/mine
# NPROC_PER_NODE chooses the number of ranks. A run that ended early goes on where it last saved when started again;
# MAX_RESTARTS=N does so by itself after a crash, up to N times.
set -euo pipefail

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/job.sh
source "$home/launch/job.sh"
if [[ -z ${NPROC_PER_NODE:-} ]] && command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus | grep -c '^GPU ') || gpus=1 # without any, one rank computes on the CPU
    NPROC_PER_NODE=$gpus
fi
prepare "$home"
exec torchrun --standalone --nproc_per_node "$nproc" --max-restarts "${MAX_RESTARTS:-0}" train.py "$@"
