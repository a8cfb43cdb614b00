#!/usr/bin/env bash
# Set up and run the main job on an embedded default: fine-tune SmolLM2-135M-Instruct on arithmetic questions with its base
# in NF4 sharded over the ranks, then ask the adapter a question. Two ranks on the CPU where there is no GPU, else one rank
# a GPU. Further arguments go to train.py, such as --max_steps 100.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$SECONDS

scripts/setup.sh demo
# shellcheck source=/dev/null
source .venv/bin/activate
installed=$SECONDS

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
ranks=$((gpus > 0 ? gpus : 2))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + ranks - 1) / ranks))}

torchrun --nproc_per_node "$ranks" train.py \
    --model smollm2-135m --dataset demo --output_dir runs/demo --overwrite \
    --context_length 128 --batch_size 8 --gradient_accumulation_steps 1 --max_steps 20 \
    --lora_rank 16 --lora_alpha 32 --lr 1e-3 --activation_checkpointing none "$@"

prompt="Solve the following multiplication: 7 * 8. Give only the result as your final answer."
echo
echo "question: $prompt"
echo "answer:   $(fsdp-qlora generate --adapter runs/demo --prompt "$prompt" --max_new_tokens 24)"
echo "time:     $((installed - started)) s to install, $((SECONDS - installed)) s to train and answer"
