"""Train: `python train.py --model ...`, or `torchrun --nproc_per_node 2 train.py --model ...` on two GPUs."""

import sys

from fsdp_qlora.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
