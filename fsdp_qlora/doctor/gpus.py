"""Checks of the GPUs and of the ways between them and to the host; only called where there are GPUs."""

from __future__ import annotations

import itertools
import time

import torch
from torch import Tensor

from fsdp_qlora.doctor.finding import Finding, ok, problem, warning
from fsdp_qlora.host_memory import GIB

COPY_BYTES = 256 * 2**20
REPEATS = 4

SLOW_HOST = 8.0
"""GB/s to a GPU below which offloaded blocks are slow: PCIe 3.0 x16 gives about 12, x8 about 6."""

SLOW_LINK = 5.0
"""GB/s between GPUs below which the gathers of blocks are slow."""


def gpus() -> Finding:
    """List the GPUs; find old ones, unlike ones and such as others use."""
    found, troubles = [], []
    names = set()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        names.add(properties.name)
        version = f"{properties.major}.{properties.minor}"
        found.append(f"{index}: {properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, sm {version}")
        if properties.major < 8:
            troubles.append(f"GPU {index} (sm {version}) has no bf16 arithmetic: use --precision fp32, which is slow")
        if free < 0.9 * total:
            troubles.append(f"GPU {index} is in use: end what runs there (nvidia-smi), or set CUDA_VISIBLE_DEVICES")
    if len(names) > 1:
        troubles.append("the GPUs are of several kinds: the smallest and the slowest decide for all")
    if troubles:
        return warning("GPUs", "; ".join(found), "; ".join(troubles))
    return ok("GPUs", "; ".join(found))


def host_copies() -> Finding:
    """Measure copies between pinned host memory and each GPU, in both directions."""
    try:
        pinned = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        remedy = (
            "raise the limit of locked memory (ulimit -l, and the container's); without it nothing can be offloaded"
        )
        return problem("host copies", f"cannot pin {COPY_BYTES >> 20} MiB: {str(error).splitlines()[0]}", remedy)
    found, slowest = [], float("inf")
    for index in range(torch.cuda.device_count()):
        there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{index}")
        to_gpu, from_gpu = _rate(there, pinned), _rate(pinned, there)
        found.append(f"GPU {index}: {to_gpu:.1f} GB/s there, {from_gpu:.1f} back")
        slowest = min(slowest, to_gpu, from_gpu)
    text = "; ".join(found)
    if slowest < SLOW_HOST:
        remedy = (
            "offloaded blocks will be slow: put the card into an x16 slot, look at the PCIe generation in the BIOS and"
            " at nvidia-smi -q (Link Width), or offload fewer blocks with --cpu_offload"
        )
        return warning("host copies", text, remedy)
    return ok("host copies", text)


def gpu_copies() -> Finding:
    """Measure copies between each two GPUs, and look whether they reach each other without the host."""
    count = torch.cuda.device_count()
    buffers = [torch.empty(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{index}") for index in range(count)]
    rates, without_peer = {}, []
    for source, target in itertools.permutations(range(count), 2):
        rates[source, target] = _rate(buffers[target], buffers[source])
        if not torch.cuda.can_device_access_peer(source, target):
            without_peer.append((source, target))
    (source, target), slowest = min(rates.items(), key=lambda pair: pair[1])
    text = f"{slowest:.1f} GB/s at the slowest ({source} -> {target}), {max(rates.values()):.1f} at the fastest; "
    text += f"{len(without_peer)} of {len(rates)} pairs without peer access" if without_peer else "all have peer access"
    if slowest < SLOW_LINK:
        remedy = "gathers will be slow: prefer --sharding none where the model fits each GPU, and larger --batch_size"
        return warning("GPU to GPU", text, remedy)
    return ok("GPU to GPU", text)


def _rate(target: Tensor, source: Tensor) -> float:
    """Return GB/s of copies from one tensor to another."""
    target.copy_(source, non_blocking=True)
    _wait(target, source)
    started = time.perf_counter()
    for _ in range(REPEATS):
        target.copy_(source, non_blocking=True)
    _wait(target, source)
    return REPEATS * COPY_BYTES / (time.perf_counter() - started) / 1e9


def _wait(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
