#!/usr/bin/env bash
# What several GPUs of one host do through NCCL: scripts/bench_multi_gpu.sh PART FOLDER
#   exact    gathered bytes, losses against PEFT, a killed and a stopped rank
#   70b      the 70B shape: all offloaded and auto in 24 GiB a GPU, whole cards sharded and replicated
#   scaling  the 8B shape at 1, 2, 4 ... GPUs, the same batch on each
# Checkpoints of random weights are made in FOLDER the first time; rows are appended to FOLDER/results.md, which each part
# prints at its end. Every part takes less than ten minutes on two H100s. STEPS=4 steps a run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

part=${1:?name a part: exact, 70b or scaling}
folder=${2:?name a folder for the checkpoints}
mkdir -p "$folder"
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')

# run SHAPE RANKS FLAGS...
run() {
    local shape=$1 ranks=$2
    shift 2
    python scripts/demo_70b_two_24gb.py --shape "$shape" --folder "$folder/$shape" --ranks "$ranks" \
        --steps "${STEPS:-4}" --output_dir "$folder/run" --results "$folder/results.md" "$@"
}

case $part in
exact)
    python -m pytest -q -o addopts= tests/gpu/test_gather_cuda.py tests/gpu/test_parity_cuda.py \
        tests/gpu/test_resume_cuda.py
    exit
    ;;
70b)
    run llama-70b "$gpus" --lora_rank 64 --batch_size 2 --gpu_memory 24 --cpu_offload all
    run llama-70b "$gpus" --lora_rank 64 --batch_size 2 --gpu_memory 24
    run llama-70b "$gpus" --lora_rank 64 --batch_size 2
    run llama-70b "$gpus" --lora_rank 64 --batch_size 2 --sharding none
    ;;
scaling)
    for ((ranks = 1; ranks <= gpus; ranks *= 2)); do
        run llama-8b "$ranks" --lora_rank 64 --batch_size 4 --activation_checkpointing full
        run llama-8b "$ranks" --lora_rank 64 --batch_size 4 --activation_checkpointing full --sharding none
    done
    ;;
*)
    echo "error: unknown part $part; choose exact, 70b or scaling" >&2
    exit 2
    ;;
esac
cat "$folder/results.md"
