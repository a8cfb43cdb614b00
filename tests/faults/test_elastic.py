"""torchrun --max-restarts: all ranks start again from the last checkpoint when one is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.faults.jobs import ended, losses, of_world, state

ROOT = Path(__file__).resolve().parents[2]


def test_a_lost_rank_costs_the_steps_since_the_last_save(
    inputs: dict[str, str], references: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = {**of_world(inputs, 2), "output_dir": run}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    removed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests" / "faults" / "elastic_worker.py"), "1", "5", *arguments],
        env=kept | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 5/8" in done.stdout, "it got there before the rank was lost"
    assert done.stdout.count("step 6/8") == 1, "and no further"
    assert losses(run) == losses(references[2])
    assert state(run) == state(references[2])
    assert ended(run)["status"] == "completed"
