"""Where a GPU's time goes, as a table from the traces of `train --profile` or any other of torch.profiler.

    python scripts/trace_report.py runs/first/profile-rank-*.json.gz

Milliseconds of a step on average, or of all if the trace knows no steps. Kinds add up kernels and copies, which may overlap.
Exposed: a collective runs and no other kernel, or a copy from or to the host runs and no kernel. Idle: nothing runs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

Span = tuple[float, float]  # start and end, in microseconds

KINDS = {
    "collectives": ("nccl",),
    "attention": ("flash", "fmha"),
    "matmul": ("gemm", "nvjet", "cutlass", "sm90_xmma", "cublas"),
    "dequantise": ("dequantize",),
    "copies": ("memcpy", "copy_kernel", "direct_copy"),
    "optimizer": ("adam", "multi_tensor"),
}
"""How kernels are told apart in a profile, by parts of their names; what matches nothing is of kind OTHER."""

OTHER = "pointwise and other"
COLUMNS = ("ms", *KINDS, OTHER, "exposed communication", "exposed host copies", "idle")


def kind_of(name: str) -> str:
    """Return the kind of a kernel or copy, the first of KINDS that fits its name."""
    return next((kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts)), OTHER)


def covered(spans: Sequence[Span]) -> float:
    """Return for how many microseconds at least one of the spans runs."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def exposed(spans: Sequence[Span], others: Sequence[Span]) -> float:
    """Return for how many microseconds one of the spans runs and none of the others does."""
    return covered([*spans, *others]) - covered(others)


def hull(spans: Sequence[Span]) -> Span:
    """Return the first start and the last end of one span or more."""
    return min(start for start, _ in spans), max(stop for _, stop in spans)


class Event(NamedTuple):
    """A kernel, copy or mark of a step; process is the number of the GPU, or the CPU's process."""

    category: str
    name: str
    process: int
    span: Span


def load(path: Path) -> tuple[list[Event], list[Event]]:
    """Return what ran on GPUs and the marks of steps; raise OSError, EOFError or ValueError for no such trace."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        trace = json.load(file)
    if not isinstance(trace, dict) or "traceEvents" not in trace:
        raise ValueError("no trace of torch.profiler: it has no traceEvents")
    events = [
        Event(event.get("cat", ""), event["name"], event["pid"], (event["ts"], event["ts"] + event["dur"]))
        for event in trace["traceEvents"]
        if event["ph"] == "X"
    ]
    ran = [event for event in events if event.category in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not ran:
        raise ValueError("the trace holds no GPU kernels; was the run on the CPU?")
    return ran, [event for event in events if event.name.startswith("ProfilerStep#")]


def steps_of(marks: list[Event]) -> tuple[Span, int]:
    """Return the time of all steps and their number, from the CPU's marks: a GPU's leave out kernels under inner marks."""
    steps = [mark for mark in marks if mark.category == "user_annotation"] or marks
    return hull([step.span for step in steps]), len({step.name for step in steps})


def times(ran: list[Event], window: Span) -> dict[str, float]:
    """Return microseconds by COLUMNS, of what one GPU ran in a window."""
    spans = [(min(max(e.span[0], window[0]), window[1]), max(min(e.span[1], window[1]), window[0])) for e in ran]
    result = dict.fromkeys(COLUMNS, 0.0) | {"ms": window[1] - window[0], "idle": window[1] - window[0] - covered(spans)}
    collectives, others, host = (list[Span]() for _ in range(3))
    for event, span in zip(ran, spans, strict=True):
        kind = kind_of(event.name)
        result[kind] += span[1] - span[0]
        if event.category == "kernel":
            (collectives if kind == "collectives" else others).append(span)
        elif "HtoD" in event.name or "DtoH" in event.name:
            host.append(span)
    result["exposed communication"] = exposed(collectives, others)
    return result | {"exposed host copies": exposed(host, collectives + others)}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for each trace and GPU in it; return 1 if a trace is left out, after saying why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path, help="profile-rank-N.json.gz, or plain .json")
    lines, code = [], 0
    for path in parser.parse_args(argv).traces:
        try:
            ran, marks = load(path)
        except (OSError, EOFError, ValueError) as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            code = 1
            continue
        for gpu in sorted({event.process for event in ran}):
            own = [event for event in ran if event.process == gpu]
            window, count = steps_of(marks) if marks else (hull([event.span for event in own]), 0)
            cells = (f"{time / 1e3 / max(1, count):.1f}" for time in times(own, window).values())
            lines.append(f"| {path} | {gpu} | {count or 'unknown'} | {' | '.join(cells)} |")
    if lines:
        print(f"| trace | GPU | steps | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 3) + "|", *lines, sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
