"""What torchrun starts in test_elastic.py: a training rank that is killed after a step, in its first life only."""

from __future__ import annotations

import os
import sys

from fsdp_qlora import cli
from tests.faults.faults import kill_after_step

if __name__ == "__main__":
    victim, step, *arguments = sys.argv[1:]
    if os.environ["RANK"] == victim and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        kill_after_step(int(step), int(victim))
    cli.main(["train", *arguments])
