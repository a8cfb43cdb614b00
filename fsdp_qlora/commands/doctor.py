"""The list of checks, and the report of what they found."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fsdp_qlora.config.command import DoctorConfig
from fsdp_qlora.doctor import gpus, host, launcher, software
from fsdp_qlora.doctor.finding import Finding, problem

Check = Callable[[], Finding]


def checks(config: DoctorConfig) -> list[tuple[str, Check]]:
    """Return the checks that apply to this machine, in the order of the report, with what they look at."""
    from huggingface_hub import constants

    folder = Path(config.disk_path or constants.HF_HUB_CACHE).expanduser()
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found: list[tuple[str, Check]] = [
        ("packages", software.packages),
        ("CUDA", software.cuda),
        ("bitsandbytes", software.quantisation),
    ]
    if num_gpus:
        found += [
            ("compiler", software.compiler),
            ("GPUs", gpus.gpus),
            ("host copies", gpus.host_copies),
        ]
    if num_gpus > 1:
        found += [("NCCL", software.nccl), ("GPU to GPU", gpus.gpu_copies)]
    found += [
        ("host memory", host.memory),
        ("locked memory", host.locked_memory),
        ("shared memory", host.shared_memory),
        ("disk", partial(host.disk, folder)),
        ("network", host.network),
        ("host name", partial(host.host_name, launcher.num_nodes())),
        ("SLURM", launcher.slurm),
        ("torchrun", launcher.torchrun),
        ("hub login", software.hub_login),
    ]
    if config.model is not None:
        found.append(("model", partial(software.model, config.model, folder)))
    return found


def examine(name: str, check: Check) -> Finding:
    """Return what a check found; one that fails itself has found a problem."""
    try:
        return check()
    except (OSError, RuntimeError, ImportError, ValueError) as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return problem(name, f"the check itself failed ({text})", "what it looks at is broken or of an unknown form")


def run(config: DoctorConfig) -> None:
    """Examine this machine; the command line's `doctor`. Exit code 1 if a run would fail."""
    findings = []
    for name, check in checks(config):
        findings.append(examine(name, check))
        if not config.json:
            print("\n".join(_lines(findings[-1])), flush=True)
    counts = Counter(finding.status for finding in findings)
    if config.json:
        report = {"host": socket.gethostname(), "findings": [dataclasses.asdict(finding) for finding in findings]}
        print(json.dumps(report, indent=2))
    else:
        verdict = "a run here would fail" if counts["problem"] else "a run here should work"
        print(f"\n{socket.gethostname()}: {counts['problem']} problems, {counts['warning']} warnings; {verdict}")
    if counts["problem"]:
        sys.exit(1)


def _lines(finding: Finding) -> list[str]:
    width = max(60, min(120, shutil.get_terminal_size(fallback=(120, 24)).columns))
    wrap = partial(textwrap.wrap, width=width, subsequent_indent=" " * 25, break_on_hyphens=False)
    lines = wrap(f"{finding.status:<8} {finding.name:<15} {finding.found}")
    return lines + (wrap(f"{'':<22}-> {finding.remedy}") if finding.remedy else [])
