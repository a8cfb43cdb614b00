"""The report of a trace agrees with what was worked out by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from scripts import trace_report
from scripts.trace_report import COLUMNS, covered, exposed, kind_of

GEMM, NCCL, TRITON = "nvjet_tst_128x256", "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgs)", "triton_poi_fused_add_0"
HTOD, DTOH = "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pinned)"

RAN = [
    # the first step, 0 to 10 ms: its collective is alone from 2 to 4 and from 5 to 6, its copy from the host from 7 to 9;
    # its first product began in the step before
    ("kernel", GEMM, 7, -1, 2),
    ("kernel", NCCL, 20, 1, 6),
    ("kernel", "_dequantize_kernel", 7, 4, 5),
    ("kernel", TRITON, 7, 6, 7),
    ("gpu_memcpy", HTOD, 24, 5, 9),
    ("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 7, 9, 9.4),
    # the second, 10 to 20 ms: attention on two streams at once; a copy to the host while the GPU's memory is set; and a
    # product that lasts beyond the end
    ("kernel", "cudnn_generated_sdpa_sm90_flash_fprop", 7, 11, 14),
    ("kernel", "flash_bwd_kernel", 20, 12, 16),
    ("gpu_memset", "Memset (Device)", 7, 17, 18),
    ("gpu_memcpy", DTOH, 24, 17, 18),
    ("kernel", GEMM, 7, 19, 23),
]
"""What runs on a GPU: category, name, stream, start and end in ms."""

MARKS = [(0, 10), (10, 20)]


def event(category: str, name: str, pid: int, tid: int, start: float, end: float) -> dict[str, Any]:
    """Return an event as Kineto writes it, from milliseconds."""
    return {
        "ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid, "ts": 5e9 + start * 1e3, "dur": (end - start) * 1e3
    }  # fmt: skip


def marks(category: str, spans: list[tuple[float, float]]) -> list[dict[str, Any]]:
    return [event(category, f"ProfilerStep#{i}", 4242, 4242, *span) for i, span in enumerate(spans, 3)]


def write(path: Path, events: list[dict[str, Any]]) -> Path:
    others = [{"ph": "M", "name": "process_name", "pid": 0}, event("cpu_op", "aten::mm", 4242, 4242, 0, 9)]
    text = json.dumps({"schemaVersion": 1, "traceEvents": [*others, *events]})
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def ran(gpu: int = 0) -> list[dict[str, Any]]:
    return [event(category, name, gpu, *rest) for category, name, *rest in RAN]


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """Return the rows of the table that was printed, by column."""
    header, rule, *lines = capsys.readouterr().out.splitlines()
    names = [cell.strip() for cell in header.strip("|").split("|")]
    assert names == ["trace", "GPU", "steps", *COLUMNS]
    assert rule == "|" + "---|" * len(names)
    return [dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines]


PER_STEP = {
    "steps": "2", "ms": "10.0",
    "collectives": "2.5", "attention": "3.5", "matmul": "1.5", "dequantise": "0.5", "copies": "2.7", "optimizer": "0.0",
    "pointwise and other": "1.0",
    "exposed communication": "1.5", "exposed host copies": "1.5",
    "idle": "1.8",  # from 9.4 to 11, 16 to 17 and 18 to 19
}  # fmt: skip


@pytest.mark.parametrize("name", ["profile-rank-0.json", "profile-rank-0.json.gz"])
def test_an_average_step(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = write(tmp_path / name, [*ran(), *marks("user_annotation", MARKS)])
    assert trace_report.main([str(path)]) == 0
    assert rows(capsys) == [{"trace": str(path), "GPU": "0", **PER_STEP}]


def test_the_cpus_marks_come_before_a_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inner = marks("gpu_user_annotation", [(1, 9), (11, 25)])
    both = write(tmp_path / "both.json", [*inner, *ran(), *marks("user_annotation", MARKS)])
    only = write(
        tmp_path / "only.json", [*ran(), *marks("gpu_user_annotation", MARKS), *marks("gpu_user_annotation", MARKS)]
    )
    assert trace_report.main([str(both), str(only)]) == 0
    assert rows(capsys) == [{"trace": str(path), "GPU": "0", **PER_STEP} for path in (both, only)]


def test_all_of_a_trace_without_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "trace.json", ran())
    assert trace_report.main([str(path)]) == 0
    (row,) = rows(capsys)
    kinds = {"matmul": "7.0", "attention": "7.0", "collectives": "5.0", "copies": "5.4"}
    rest = {"exposed communication": "3.0", "exposed host copies": "3.0", "idle": "3.6"}
    assert row == row | {"steps": "unknown", "ms": "24.0"} | kinds | rest


def test_kernels_of_another_gpu_hide_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = event("kernel", NCCL, 1, 20, 0, 4)
    path = write(tmp_path / "trace.json", [*ran(), alone, *marks("user_annotation", MARKS)])
    assert trace_report.main([str(path)]) == 0
    first, second = rows(capsys)
    assert first == {"trace": str(path), "GPU": "0", **PER_STEP}
    assert second == second | {"GPU": "1", "collectives": "2.0", "exposed communication": "2.0", "idle": "8.0"}


def test_what_is_no_trace_of_a_gpu_is_named_beside_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "good.json", ran())
    cpu = write(tmp_path / "cpu.json", marks("user_annotation", MARKS))
    foreign, short, gone = (tmp_path / name for name in ("list.json", "short.json.gz", "gone.json"))
    foreign.write_text("[]")
    short.write_bytes(gzip.compress(good.read_bytes())[:-40])
    assert trace_report.main([str(path) for path in (cpu, foreign, good, short, gone)]) == 1
    out, err = capsys.readouterr()
    assert [line.split("|")[1].strip() for line in out.splitlines()] == ["trace", "---", str(good)]
    told = err.splitlines()
    assert told[0] == f"error: {cpu}: the trace holds no GPU kernels; was the run on the CPU?"
    assert told[1] == f"error: {foreign}: no trace of torch.profiler: it has no traceEvents"
    assert [line.split(": ")[1] for line in told] == [str(path) for path in (cpu, foreign, short, gone)]


def test_overlapping_touching_and_nested_spans() -> None:
    assert covered([]) == 0
    assert covered([(5, 7), (0, 2), (1, 3), (3, 4), (6, 6.5)]) == 6
    assert exposed([(0, 10), (2, 3)], [(1, 2), (4, 6), (5, 7), (9, 12)]) == 5
    assert exposed([(0, 1)], []) == 1
    assert exposed([], [(0, 1)]) == 0


def test_the_first_kind_that_fits() -> None:
    assert kind_of("ncclDevKernel_AllReduce_Sum_bf16_RING_LL") == "collectives"
    assert kind_of("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>") == "matmul"
    assert kind_of("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>") == "attention"
    assert kind_of("multi_tensor_apply_kernel<FusedAdamMathFunctor>") == "optimizer"
    assert kind_of("triton_red_fused_mean_mul_1") == "pointwise and other"
