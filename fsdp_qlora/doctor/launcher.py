"""Checks of what started this process: SLURM, torchrun, or neither."""

from __future__ import annotations

import os

import torch

from fsdp_qlora.doctor.finding import Finding, ok, problem, warning

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("JOB_ID", "JOB_NUM_NODES", "NTASKS", "CPUS_PER_TASK", "GPUS_ON_NODE", "RESTART_COUNT", "JOB_NODELIST")


def num_nodes() -> int:
    """Return the nodes of the SLURM job, 1 outside one."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))


def torchrun() -> Finding:
    """Find left-over or half-set variables of torchrun, which make a run wait for ranks that never come."""
    present = {name: os.environ[name] for name in TORCHRUN if name in os.environ}
    missing = [name for name in TORCHRUN if name not in present]
    if not present:
        return ok("torchrun", "not under torchrun: a world of one")
    text = ", ".join(f"{name}={value}" for name, value in present.items())
    if missing and int(present.get("WORLD_SIZE", "1")) > 1:
        remedy = f"unset {' '.join(present)}, and let torchrun set them"
        return problem("torchrun", f"{text}, but no {', '.join(missing)}: a run would wait for ranks for ever", remedy)
    return ok("torchrun", text)


def slurm() -> Finding:
    """Read the job's shape and compare it with what torchrun needs: one task a node, enough CPUs."""
    if "SLURM_JOB_ID" not in os.environ:
        return ok("SLURM", "not in a job")
    values = {name: os.environ[f"SLURM_{name}"] for name in SLURM if f"SLURM_{name}" in os.environ}
    text = ", ".join(f"SLURM_{name}={value}" for name, value in values.items())
    tasks, cpus = int(values.get("NTASKS", "1")), int(values.get("CPUS_PER_TASK", "0"))
    troubles = []
    if tasks > num_nodes():
        troubles.append(
            "several tasks a node: torchrun starts the ranks itself, so ask for --ntasks-per-node=1 (started by srun"
            " without torchrun, each task would train alone)"
        )
    gpus = torch.cuda.device_count()
    if 0 < cpus < gpus:
        troubles.append(
            f"{cpus} CPUs for {gpus} GPUs: every rank needs one at least, ask for --cpus-per-task={4 * gpus}"
        )
    if troubles:
        return warning("SLURM", text, "; ".join(troubles))
    return ok("SLURM", text)
