"""Two nodes as two network namespaces with addresses of their own: python -m pytest -m cluster tests/nodes

Needs root and iproute2; skipped without them. All traffic stays on a virtual cable between the two namespaces.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.jobs import ended, losses, make_inputs

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 29411
STEPS = 60
LIMIT_S = 15
"""--step_timeout_s of the run that is cut off."""

SETTINGS: dict[str, Any] = {
    "context_length": 64,
    "packing": False,
    "gradient_accumulation_steps": 2,
    "eval_split": 0,
    "max_steps": STEPS,
    "save_steps": 5,
    "lora_rank": 4,
    "lr_scheduler": "constant",
    "warmup_ratio": 0,
    "step_timeout_s": LIMIT_S,
}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


def can_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        ip("netns", "del", name)
    return made


pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not can_make_namespaces(), reason="needs root and iproute2, and leave to make namespaces"),
]


@dataclass
class Nodes:
    """Two namespaces, joined by a virtual cable, and what runs in them."""

    names: tuple[str, str]
    environment: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, ranks_each: int, settings: dict[str, Any], log: Path) -> list[subprocess.Popen[str]]:
        """Start one torchrun on each node."""
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        jobs = []
        for number, (name, address) in enumerate(zip(self.names, ADDRESSES, strict=True)):
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
            command += ["--nnodes", "2", "--nproc_per_node", str(ranks_each), "--rdzv_backend", "c10d"]
            # this machine's name is the same in both: addresses have to be given, and who holds the first
            command += ["--rdzv_endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv_conf", f"is_host={int(number == 0)}"]
            command += ["--rdzv_id", "test", "--local_addr", address]
            with log.with_name(f"{log.name}.{name[-1]}").open("a") as out:
                jobs.append(
                    subprocess.Popen(
                        [*command, str(ROOT / "train.py"), *arguments],
                        env=self.environment,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        text=True,
                        start_new_session=True,
                    )
                )
        self.started += jobs
        return jobs

    def run(self, ranks_each: int, settings: dict[str, Any], log: Path) -> None:
        codes = [job.wait(timeout=240) for job in self.start(ranks_each, settings, log)]
        said = [path.read_text()[-2500:] for path in sorted(log.parent.glob(f"{log.name}.*"))]
        assert codes == [0, 0], "\n".join(said)

    def ranks(self) -> list[str]:
        """Return the process ids of the training ranks, torchrun's own not among them."""
        found = []
        for name in self.names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True)
            for number in listed.stdout.split():
                command = Path("/proc", number, "cmdline")
                words = command.read_bytes() if command.exists() else b""
                if b"train.py" in words and b"torch.distributed.run" not in words:
                    found.append(number)
        return found

    def plug(self, state: str) -> None:
        """Put the cable 'up' or 'down'."""
        ip("-n", self.names[1], "link", "set", "cable", state)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    number = os.getpid() % 10000
    names = (f"fq-{number}-a", f"fq-{number}-b")
    removed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    more = {"GLOO_SOCKET_IFNAME": "cable", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = Nodes(names, kept | more)
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield found
    finally:
        for job in found.started:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def run_here(ranks: int, settings: dict[str, Any], environment: dict[str, str]) -> None:
    """Run the same job on one node: this machine."""
    here = {name: value for name, value in environment.items() if name != "GLOO_SOCKET_IFNAME"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    done = subprocess.run(
        [*command, str(ROOT / "train.py"), *arguments],
        env=here,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_nodes_equal_one_and_survive_a_cut(nodes: Nodes, inputs: dict[str, str], tmp_path: Path) -> None:
    settings = {**SETTINGS, **inputs}
    run_here(2, {**settings, "output_dir": tmp_path / "one"}, nodes.environment)
    expected = losses(tmp_path / "one")
    assert len(expected) == STEPS

    run = tmp_path / "two"
    jobs = nodes.start(1, {**settings, "output_dir": run, "max_steps": 100000}, tmp_path / "cut")
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or max(logged(run), default=0) < 12:
        assert time.monotonic() < deadline, (tmp_path / "cut.a").read_text()[-3000:]
        time.sleep(0.2)
    nodes.plug("down")
    cut = time.monotonic()
    assert jobs[0].wait(timeout=LIMIT_S + 60) != 0
    while nodes.ranks():
        assert time.monotonic() < cut + LIMIT_S + 60, "a rank outlives its time limit"
        time.sleep(0.2)
    print(f"\nall ranks had ended {time.monotonic() - cut:.0f} s after the cut")
    # torchrun on the other side waits for its store for minutes; under SLURM srun --wait ends it
    if jobs[1].poll() is None:
        os.killpg(jobs[1].pid, signal.SIGKILL)
    assert ended(run)["status"] == "failed"
    print(ended(run)["reason"])
    saved = ended(run)["saved_step"]
    assert 10 <= saved < STEPS, "the test was too slow to cut the cable"

    nodes.plug("up")
    nodes.run(1, {**settings, "output_dir": run}, tmp_path / "again")
    assert f"step {saved + 1}/{STEPS}" in (tmp_path / "again.a").read_text()
    assert f"step {saved}/{STEPS}" not in (tmp_path / "again.a").read_text()
    assert losses(run) == pytest.approx(expected, rel=1e-6)


def logged(run: Path) -> list[int]:
    """Return the steps in a file that is being written."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for line in lines if line.endswith("}") and "loss" in (record := json.loads(line))]


@pytest.mark.parametrize(("sharding", "loading"), [("full", "read"), ("hybrid", "read"), ("hybrid", "broadcast")])
def test_two_nodes_of_two_ranks_equal_one_of_four(
    nodes: Nodes, inputs: dict[str, str], tmp_path: Path, sharding: str, loading: str
) -> None:
    settings = {**SETTINGS, **inputs, "max_steps": 6, "gradient_accumulation_steps": 1, "step_timeout_s": 120}
    run_here(4, {**settings, "output_dir": tmp_path / "one"}, nodes.environment)
    run = tmp_path / "two"
    nodes.run(2, {**settings, "output_dir": run, "sharding": sharding, "loading": loading}, tmp_path / "log")
    ranks = json.loads((run / "run.json").read_text())["result"]["ranks"]
    assert [rank["bytes_read"] > 0 for rank in ranks] == [True, True, loading == "read", loading == "read"]
    expected = losses(tmp_path / "one")
    assert losses(run) == pytest.approx(expected, rel=1e-6)
