"""The batch files on a real SLURM of one and of two nodes, all of this machine: python -m pytest -m cluster tests/slurm

Needs Debian's slurm-wlm and munge, and root; skipped without them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import rows, save_tokenizer
from tests.ranks import free_port
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "scripts" / "slurm_test_cluster.sh"
FILES = {"one node": "slurm_single_node.sbatch", "two nodes": "slurm_multi_node.sbatch"}
STEPS = 300

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))),
        reason="needs root and: apt-get install slurm-wlm munge",
    ),
]


@dataclass
class Cluster:
    """A running SLURM, and the folder in which its jobs work."""

    folder: Path
    environment: dict[str, str]

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, where: str, name: str, *flags: str, **settings: object) -> Job:
        """Submit a batch file with two ranks in all."""
        run = self.folder / name
        given = {"model": self.folder / "base", "dataset": self.folder / "rows.jsonl", "output_dir": run, **SETTINGS}
        arguments = [part for key, value in (given | settings).items() for part in (f"--{key}", str(value))]
        gpus = 2 if where == "one node" else 1
        log = f"{self.folder}/{name}.out"
        options = [f"--gpus-per-node={gpus}", "--cpus-per-task=2", f"--output={log}", f"--job-name={name}", *flags]
        number = self.call("sbatch", "--parsable", *options, f"launch/{FILES[where]}", *arguments)
        return Job(self, number.strip(), run, Path(log))


SETTINGS: dict[str, object] = {
    "context_length": 64,
    "gradient_accumulation_steps": 1,
    "lora_rank": 8,
    "max_steps": STEPS,
    "save_steps": 100,
    "eval_split": 0,
}


@dataclass
class Job:
    """A submitted job and what it writes."""

    cluster: Cluster
    number: str
    run: Path
    log: Path

    @property
    def details(self) -> dict[str, str]:
        text = self.cluster.call("scontrol", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    @property
    def losses(self) -> dict[int, float]:
        """Return the losses by step; a step that is written twice fails the test."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        # the last line may be in the middle of being written
        found = [json.loads(line) for line in lines if line.endswith("}")]
        steps = [record["step"] for record in found if "loss" in record]
        assert len(steps) == len(set(steps))
        return {record["step"]: record["loss"] for record in found if "loss" in record}

    @property
    def exit_note(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.run / "exit.json").read_text())
        return content

    def wait(self, what: str, holds: Callable[[], bool], timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline:
                said = self.log.read_text() if self.log.exists() else ""
                raise AssertionError(f"{what} did not come; {self.details}\n{said[-4000:]}")
            time.sleep(0.2)

    def wait_for_step(self, step: int) -> None:
        self.wait(f"step {step}", lambda: max(self.losses, default=0) >= step)

    def wait_for_end(self) -> str:
        """Return the state in which the job ends."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait("the end", lambda: self.details["JobState"] in ended)
        return self.details["JobState"]

    def wait_for_requeue(self) -> dict[str, Any]:
        """Return exit.json of the attempt that was interrupted, and let the next one begin."""

        def is_back() -> bool:
            return self.details["JobState"] == "PENDING" and self.details["Restarts"] == "1"

        self.wait("the queue", is_back)
        note = self.exit_note
        # SLURM lets requeued jobs wait for two minutes, so that the nodes have forgotten the old attempt ("credential
        # revoked" otherwise); a few seconds are enough
        time.sleep(5)
        self.cluster.call("scontrol", "update", f"JobId={self.number}", "StartTime=now")
        return note


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    save_tokenizer(save_tiny("llama", folder / "base", num_hidden_layers=2))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    removed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in removed and not name.startswith("SLURM")}
    more = {"SLURM_TEST_PORT": str(free_port()), "SLURM_CONF": str(folder / "cluster" / "slurm.conf")}
    environment = kept | more | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    control = ["bash", str(CLUSTER)]
    with (folder / "cluster.out").open("w") as out:
        started = subprocess.run(
            [*control, "start", str(folder / "cluster"), "2"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            timeout=90,
            check=False,
        )
    try:
        assert started.returncode == 0, (folder / "cluster.out").read_text()
        yield Cluster(folder, environment)
    finally:
        subprocess.run([*control, "stop", str(folder / "cluster")], env=environment, timeout=30, check=False)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> dict[int, float]:
    """Losses of a run on one node that nothing interrupts."""
    job = cluster.submit("one node", "undisturbed")
    job.wait("a place in squeue", lambda: "undisturbed" in cluster.call("squeue", "--format=%j"))
    assert job.wait_for_end() == "COMPLETED"
    assert "attempt 1 on" in job.log.read_text()
    assert list(job.losses) == list(range(1, STEPS + 1))
    return job.losses


def test_two_nodes_give_the_losses_of_one(cluster: Cluster, undisturbed: dict[int, float]) -> None:
    job = cluster.submit("two nodes", "two-nodes")
    assert job.wait_for_end() == "COMPLETED"
    assert job.details["NodeList"] == "n[1-2]"
    assert job.losses == undisturbed
    assert job.exit_note["status"] == "completed"


@pytest.mark.parametrize("where", FILES)
def test_a_requeued_job_loses_no_step(cluster: Cluster, undisturbed: dict[int, float], where: str) -> None:
    job = cluster.submit(where, f"requeued-{where[:3]}")
    job.wait_for_step(40)
    cluster.call("scontrol", "requeue", job.number)
    note = job.wait_for_requeue()
    assert note["status"] == "preempted"
    assert 40 <= note["step"] == note["saved_step"] < STEPS
    assert job.wait_for_end() == "COMPLETED"
    assert job.losses == undisturbed


@pytest.mark.parametrize("where", FILES)
def test_a_preempted_job_loses_no_step(cluster: Cluster, undisturbed: dict[int, float], where: str) -> None:
    job = cluster.submit(where, f"preempted-{where[:3]}")
    job.wait_for_step(40)
    urgent = cluster.call(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    )
    note = job.wait_for_requeue()
    assert 40 <= note["step"] == note["saved_step"] < STEPS
    assert job.wait_for_end() == "COMPLETED"
    assert job.losses == undisturbed
    assert "JobState=COMPLETED" in cluster.call("scontrol", "show", "job", urgent.strip())


def test_a_job_at_its_time_limit_goes_on_in_another(cluster: Cluster) -> None:
    # SLURM may send the signal a minute early, and the run needs some time to start
    job = cluster.submit("two nodes", "limit", "--time=3", "--signal=B:USR1@60", max_steps=100000)
    note = job.wait_for_requeue()
    assert note["status"] == "preempted"
    assert note["step"] == note["saved_step"]
    job.wait_for_step(note["step"] + 20)
    cluster.call("scancel", job.number)
    steps = list(job.losses)  # read once: the job may still be writing
    assert steps == list(range(1, len(steps) + 1))
    assert f"starting from step {note['step']}, 0 of 3 attempts without progress" in job.log.read_text()


def test_a_cancelled_job_saves_and_does_not_come_back(cluster: Cluster) -> None:
    job = cluster.submit("one node", "cancelled")
    job.wait_for_step(10)
    cluster.call("scancel", job.number)
    job.wait(
        "the end", lambda: job.details["JobState"] == "CANCELLED" and "not requeued from here" in job.log.read_text()
    )
    assert job.exit_note["step"] == job.exit_note["saved_step"] >= 10
    assert job.details["Restarts"] == "0"


@pytest.mark.parametrize("where", FILES)
def test_an_error_is_not_requeued(cluster: Cluster, where: str) -> None:
    job = cluster.submit(where, f"broken-{where[:3]}", dataset=cluster.folder / "absent.jsonl")
    assert job.wait_for_end() == "FAILED"
    assert job.details["Restarts"] == "0"
    assert "absent.jsonl" in job.log.read_text()
    assert "not requeued" in job.log.read_text()


def test_each_task_of_a_sweep_is_a_run(cluster: Cluster) -> None:
    sweep = cluster.folder / "sweep.txt"
    folders = [cluster.folder / f"sweep-{number}" for number in (1, 2)]
    sweep.write_text("".join(f"--seed {number} --output_dir {run}\n" for number, run in enumerate(folders)))
    cluster.environment["SWEEP"] = str(sweep)
    job = cluster.submit("one node", "sweep", "--array=1-2", max_steps=3)
    del cluster.environment["SWEEP"]
    job.wait("both runs", lambda: all((run / "adapter").exists() for run in folders))
    first, second = (json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"] for run in folders)
    assert first != second
