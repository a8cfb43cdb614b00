"""The launch files, run whole with stand-ins for torchrun, srun and SLURM's commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
FILES = sorted([*LAUNCH.glob("*.s*"), *(ROOT / "scripts").glob("*.sh")])
JOBS = ("slurm_single_node.sbatch", "slurm_multi_node.sbatch")

TORCHRUN = """#!/usr/bin/env bash
# Writes down how it was called; ends as $BEHAVIOUR says.
printf '%s\\n' "$@" >"$RECORD/torchrun"
env >"$RECORD/environment"
output=$(printf '%s\\n' "$@" | grep -A 1 -x -e --output_dir | tail -1)
say() { mkdir -p "$output"; echo "{\\"status\\": \\"$1\\", \\"saved_step\\": $2}" >"$output/exit.json"; }
case $BEHAVIOUR in
    completed) say completed 9 ;;
    failed) say failed 3; exit 1 ;;
    crashed) exit 1 ;;
    preempted) # saves half a second after the signal, and exits as torchrun does
        trap 'sleep 0.5; say preempted 4; exit 1' TERM
        touch "$RECORD/started"
        while true; do sleep 0.1; done ;;
esac
"""

SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$RECORD/srun"
echo $$ >"$RECORD/srun_pid"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""

SCANCEL = """#!/usr/bin/env bash
echo "$@" >"$RECORD/scancel"
kill -TERM "$(<"$RECORD/srun_pid")"
"""

SCONTROL = """#!/usr/bin/env bash
echo "$@" >>"$RECORD/scontrol"
exit "${SCONTROL_CODE:-0}"
"""


SQUEUE = """#!/usr/bin/env bash
echo "${STATE:-RUNNING}"
"""


@dataclass
class Job:
    """A folder with the stand-ins and what they wrote, and the environment in which to run a launch file."""

    record: Path
    environment: dict[str, str]

    def start(self, file: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(LAUNCH / file), *arguments],
            env=self.environment | environment,
            cwd=self.record,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, file: str, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start(file, *arguments, **environment)
        out, _ = process.communicate(timeout=60)
        return process.returncode, out

    def called(self, name: str) -> list[str]:
        """Return the arguments of a stand-in's last call; [] if there was none."""
        path = self.record / name
        return path.read_text().splitlines() if path.exists() else []

    def variable(self, name: str) -> str | None:
        pairs = (line.partition("=") for line in self.called("environment"))
        return next((value for key, _, value in pairs if key == name), None)

    @property
    def output_dir(self) -> Path:
        return self.record / "out"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    commands, home = tmp_path / "bin", tmp_path / "home"
    commands.mkdir()
    home.mkdir()
    (home / "launch").symlink_to(LAUNCH)
    stand_ins = {"torchrun": TORCHRUN, "srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL, "squeue": SQUEUE}
    for name, text in stand_ins.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    kept.pop("OMP_NUM_THREADS", None)
    path = f"{commands}:{os.environ['PATH']}"
    slurm = {
        "SLURM_SUBMIT_DIR": str(home),
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": "tune",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_GPUS_ON_NODE": "4",
    }
    virtual = {
        "VIRTUAL_ENV": kept.get("VIRTUAL_ENV", "active"),
        "RECORD": str(tmp_path),
        "PATH": path,
        "PYTHONPATH": str(ROOT),
    }
    return Job(tmp_path, kept | slurm | virtual | {"BEHAVIOUR": "completed"})


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(file: Path) -> None:
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed")
    command = [checker, "--external-sources", "--source-path", str(ROOT), str(file)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.stdout == ""
    assert found.returncode == 0


@pytest.mark.parametrize("file", JOBS)
def test_arguments_pass_through(job: Job, file: str) -> None:
    odd = ["--run_name", "two words", "--lr=1e-3", "--output_dir", str(job.output_dir)]
    code, out = job.run(file, *odd)
    assert code == 0, out
    called = job.called("torchrun")
    assert called[called.index("train.py") :] == ["train.py", *odd]
    assert called[called.index("--nproc_per_node") + 1] == "4"
    assert job.variable("OMP_NUM_THREADS") == "4"
    assert job.called("scontrol") == []


def test_one_torchrun_a_node_meets_the_others_at_a_port_of_the_job(job: Job) -> None:
    code, out = job.run("slurm_multi_node.sbatch", "--output_dir", str(job.output_dir))
    assert code == 0, out
    assert {"--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=16"} <= set(job.called("srun"))
    called = dict(zip(job.called("torchrun"), job.called("torchrun")[1:], strict=False))
    host = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    assert called["--rdzv_endpoint"] == f"{host}:{10000 + 4242}"
    assert called["--nnodes"] == "2"
    assert called["--rdzv_id"] == "4242-0"


def test_what_the_user_has_set_stays(job: Job) -> None:
    arguments = ["--output_dir", str(job.output_dir), "--resume", "none"]
    own = {"OMP_NUM_THREADS": "3", "NPROC_PER_NODE": "1", "RDZV_HOST": "head", "NCCL_SOCKET_IFNAME": "ib0"}
    assert job.run("slurm_multi_node.sbatch", *arguments, **own)[0] == 0
    called = job.called("torchrun")
    assert called[-len(arguments) :] == arguments
    assert called[called.index("--nproc_per_node") + 1] == "1"
    assert "head:14242" in called
    assert (job.variable("OMP_NUM_THREADS"), job.variable("NCCL_SOCKET_IFNAME")) == ("3", "ib0")
    assert job.variable("GLOO_SOCKET_IFNAME") is None


def test_a_disk_of_each_node_holds_its_downloads(job: Job) -> None:
    job.run("slurm_single_node.sbatch", "--output_dir", str(job.output_dir), LOCAL_DISK="/scratch")
    assert job.variable("HF_HOME") == "/scratch/huggingface"


def test_a_run_folder_of_its_own_for_every_job(job: Job) -> None:
    assert job.run("slurm_single_node.sbatch")[0] == 0
    assert job.called("torchrun")[-2:] == ["--output_dir", "runs/tune-4242"]
    task = {"SLURM_ARRAY_JOB_ID": "4240", "SLURM_ARRAY_TASK_ID": "2"}
    assert job.run("slurm_single_node.sbatch", **task)[0] == 0
    assert job.called("torchrun")[-2:] == ["--output_dir", "runs/tune-4240-2"]


def test_wrong_settings_end_the_job_before_anything_starts(job: Job) -> None:
    code, out = job.run("slurm_single_node.sbatch", "--lr", "bad")
    assert code == 2
    assert "error: --lr='bad': must be a finite number" in out
    assert job.called("torchrun") == []


def test_a_line_of_the_sweep_for_every_task(job: Job, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    out = job.output_dir
    sweep.write_text(f"--lr 1e-3 --output_dir {out}/a\n--lr 1e-4 --run_name 'two words' --output_dir {out}/b\n")
    task = {"SWEEP": str(sweep), "SLURM_ARRAY_JOB_ID": "4241"}
    assert job.run("slurm_single_node.sbatch", "--seed", "7", SLURM_ARRAY_TASK_ID="2", **task)[0] == 0
    called = job.called("torchrun")
    expected = ["--seed", "7", "--lr", "1e-4", "--run_name", "two words", "--output_dir", f"{out}/b"]
    assert called[called.index("train.py") + 1 :] == expected
    code, text = job.run("slurm_single_node.sbatch", SLURM_ARRAY_TASK_ID="3", **task)
    assert code == 2
    assert "has no line 3; submit with --array=1-2" in text
    assert "needs a job array" in job.run("slurm_single_node.sbatch", SWEEP=str(sweep))[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('--output_dir={}/a --lr="5e-4', "line 2 has an unmatched quote: --output_dir="),
        ("  ", "line 2 is empty; write a task's flags there or remove it"),
    ],
)
def test_a_broken_line_of_the_sweep_starts_nothing(job: Job, tmp_path: Path, line: str, message: str) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text(f"--lr 1e-3\n{line.format(job.output_dir)}\n--lr 1e-4\n")
    task = {"SWEEP": str(sweep), "SLURM_ARRAY_JOB_ID": "4241", "SLURM_ARRAY_TASK_ID": "2"}
    code, text = job.run("slurm_single_node.sbatch", **task)
    assert code == 2
    assert f"error: {sweep}: {message}" in text
    assert job.called("torchrun") == []


@pytest.mark.parametrize("file", ["local.sh", "slurm_single_node.sbatch"])
@pytest.mark.parametrize(
    ("name", "value"), [("NPROC_PER_NODE", "0"), ("NPROC_PER_NODE", "two"), ("MAX_FRUITLESS", "x")]
)
def test_numbers_that_are_none_are_named(job: Job, file: str, name: str, value: str) -> None:
    code, text = job.run(file, "--output_dir", str(job.output_dir), **{name: value})
    assert code == 2
    assert f"error: {name}={value}: must be a whole number of at least 1" in text
    assert job.called("torchrun") == []


@pytest.mark.parametrize("file", JOBS)
def test_the_time_limit_lets_the_ranks_save_and_requeues(job: Job, file: str) -> None:
    process = job.start(file, "--output_dir", str(job.output_dir), BEHAVIOUR="preempted")
    deadline = time.monotonic() + 30
    while not (job.record / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    assert json.loads((job.output_dir / "exit.json").read_text())["saved_step"] == 4, "it had time to save"
    assert job.called("scontrol") == ["requeue 4242"]
    assert "interrupted with step 4 saved" in out


@pytest.mark.parametrize("file", JOBS)
def test_sigterm_requeues_too_and_reaches_the_ranks_through_slurm(job: Job, file: str) -> None:
    process = job.start(file, "--output_dir", str(job.output_dir), BEHAVIOUR="preempted")
    while not (job.record / "started").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    os.kill(int(job.called("srun_pid")[0]), signal.SIGTERM)  # as slurmd does
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    assert job.called("scancel") == [], "a second SIGTERM would end ranks that are saving"
    assert job.called("scontrol") == ["requeue 4242"]


@pytest.mark.parametrize("file", JOBS)
@pytest.mark.parametrize("behaviour", ["failed", "crashed"])
def test_an_error_is_not_requeued(job: Job, file: str, behaviour: str) -> None:
    code, out = job.run(file, "--output_dir", str(job.output_dir), BEHAVIOUR=behaviour)
    assert code == 1
    assert "not requeued" in out
    assert job.called("scontrol") == []


def test_gives_up_after_fruitless_attempts(job: Job) -> None:
    state = job.output_dir.with_name("out.attempts.json")
    state.write_text(json.dumps({"step": 4, "fruitless": 1, "running": True}))
    (job.output_dir / "checkpoints" / "step-000004").mkdir(parents=True)
    code, out = job.run("slurm_single_node.sbatch", "--output_dir", str(job.output_dir), MAX_FRUITLESS="2")
    assert code == 1
    assert "2 attempts got no further than step 4; giving up" in out
    assert job.called("torchrun") == []


def test_a_scheduler_that_refuses_is_reported(job: Job) -> None:
    process = job.start(
        "slurm_single_node.sbatch", "--output_dir", str(job.output_dir), BEHAVIOUR="preempted", SCONTROL_CODE="1"
    )
    while not (job.record / "started").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "submit it again to go on" in out


@pytest.mark.parametrize("state", ["PENDING", "COMPLETING"])
def test_a_job_that_slurm_has_ended_itself_is_left_to_it(job: Job, state: str) -> None:
    arguments = ["slurm_single_node.sbatch", "--output_dir", str(job.output_dir)]
    process = job.start(*arguments, BEHAVIOUR="preempted", STATE=state)
    while not (job.record / "started").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    assert job.called("scontrol") == []


def test_submitted_from_elsewhere(job: Job) -> None:
    code, out = job.run("slurm_single_node.sbatch", SLURM_SUBMIT_DIR="/")
    assert code == 2
    assert "submit from the repository, or set FSDP_QLORA_HOME" in out


def test_local(job: Job) -> None:
    code, out = job.run("local.sh", "--lr", "1e-3", NPROC_PER_NODE="2", MAX_RESTARTS="1")
    assert code == 0, out
    assert job.called("torchrun") == [
        *("--standalone", "--nproc_per_node", "2", "--max-restarts", "1"),
        *("train.py", "--lr", "1e-3"),
    ]
