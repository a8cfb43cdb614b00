"""torchrun, on one node and on two: lost ranks are started again, and a run goes on with another number of nodes.

Two nodes are two torchruns on this machine, which meet as on a cluster; tests/nodes gives them addresses of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.jobs import ended, losses, of_world, state, train
from tests.faults.trials import targets
from tests.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [str(ROOT / "train.py")]
WORKER = [str(ROOT / "tests" / "faults" / "elastic_worker.py")]
LIMIT_S = 240


def torchrun(num_nodes: int, ranks_each: int, script: list[str], settings: dict[str, Any], *flags: str) -> list[int]:
    """Run one torchrun a node; return the exit codes. What node N prints goes to <output_dir>.node-N."""
    removed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    # as launch/job.sh sets it
    more = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(num_nodes), *flags]
    command += ["--nproc_per_node", str(ranks_each), "--rdzv_backend", "c10d", "--rdzv_id", "test"]
    command += ["--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--local_addr", "127.0.0.1"]
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    jobs = []
    for node in range(num_nodes):
        with Path(f"{settings['output_dir']}.node-{node}").open("a") as out:
            job = subprocess.Popen(
                [*command, "--rdzv_conf", f"is_host={int(node == 0)}", *script, *arguments],
                env=kept | more | {"OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        jobs.append(job)
    try:
        return [job.wait(timeout=LIMIT_S) for job in jobs]
    finally:
        for job in jobs:
            job.kill()  # no more than a formality for one that has ended


def printed(run: Path) -> str:
    """Return what all nodes printed."""
    return "".join(path.read_text(errors="replace") for path in sorted(run.parent.glob(f"{run.name}.node-*")))


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_a_lost_rank_costs_the_steps_since_the_last_save(
    inputs: dict[str, str], references: dict[int, Path], tmp_path: Path, num_nodes: int
) -> None:
    run = tmp_path / "run"
    settings = {**of_world(inputs, 2), "output_dir": run}
    codes = torchrun(num_nodes, 2 // num_nodes, [*WORKER, "1", "5"], settings, "--max-restarts", "1")
    assert codes == [0] * num_nodes, printed(run)
    assert "step 5/8" in printed(run), "it got there before the rank was lost"
    assert printed(run).count("step 6/8") == 1, "and no further"
    assert losses(run) == losses(references[2])
    assert state(run) == state(references[2])
    assert ended(run)["status"] == "completed"


@pytest.fixture(scope="module")
def reference(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts, without dropout, whose random numbers depend on the ranks."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert train(2, {**of_world(inputs, 2), "output_dir": run, "lora_dropout": 0}) == [0, 0]
    return run


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_nodes(
    inputs: dict[str, str], reference: Path, tmp_path: Path, before: int, after: int
) -> None:
    """One rank a node; rank 0 is lost after step 5, when the checkpoint of step 4 may not be complete yet."""
    run = tmp_path / "run"
    first, second = ({**of_world(inputs, nodes), "output_dir": run, "lora_dropout": 0} for nodes in (before, after))
    assert all(torchrun(before, 1, [*WORKER, "0", "5"], first)), printed(run)
    assert "step 5/8" in printed(run)
    assert torchrun(after, 1, TRAIN, second) == [0] * after, printed(run)
    assert re.search("going on from .*/checkpoints/step-00000[24]\n", printed(run))
    assert f"the checkpoint is of {before} ranks and the run has {after}" in printed(run)
    assert losses(run) == pytest.approx(losses(reference), rel=1e-6)
    assert targets(run) == targets(reference), "every step has the same samples"
