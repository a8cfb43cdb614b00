"""Ranks, devices and the process group. One process without torchrun is a world of one through the same code."""

from __future__ import annotations

import datetime
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from fsdp_qlora.errors import ConfigError, FsdpQloraError, Interrupted, TrainingError

T = TypeVar("T")


def never() -> bool:
    """Return that this rank was not asked to end, where nothing listens to signals."""
    return False


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    Attributes:
        mesh: 1-D ("shard") where the base is sharded over all ranks, 2-D ("replicate", "shard") otherwise.
        ranks_on_gpu: how many ranks compute on this rank's GPU.
        is_interrupted: whether this rank was asked to end before training begins.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh
    ranks_on_gpu: int = 1
    is_interrupted: Callable[[], bool] = never

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shard_mesh(self) -> DeviceMesh:
        return self.mesh["shard"] if self.mesh.ndim == 2 else self.mesh

    @property
    def num_shards(self) -> int:
        return self.shard_mesh.size()

    @property
    def shard(self) -> int:
        """Which shard of the base this rank holds."""
        return self.shard_mesh.get_local_rank()

    @property
    def replica(self) -> int:
        """Which copy of the base this rank holds a shard of."""
        return self.mesh["replicate"].get_local_rank() if self.mesh.ndim == 2 else 0

    @property
    def num_replicas(self) -> int:
        return self.mesh["replicate"].size() if self.mesh.ndim == 2 else 1

    @property
    def replicate_group(self) -> dist.ProcessGroup:
        """The ranks with the same shard; only where there are replicas."""
        return self.mesh["replicate"].get_group()

    @property
    def shard_group(self) -> dist.ProcessGroup:
        return self.shard_mesh.get_group()


def pick_device(wanted: str) -> torch.device:
    """Return the device of a --device setting; ConfigError for a GPU that is not there."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError("--device=cuda: torch sees no CUDA device; use --device=auto")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """Return this rank's device: a GPU of its own where there are enough, a shared one where not, else the CPU.

    Args:
        wanted: as `pick_device`.
    """
    device = pick_device(wanted)
    if device.type == "cpu":
        return device
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype that a --precision setting means on a device: auto is bf16 on GPUs, float32 on CPUs.

    Few CPUs multiply bf16 matrices well; one measured here does float32 35 times as fast.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def count_ranks_by_gpu(device: torch.device, store: Store, rank: int, world_size: int) -> list[int]:
    """Return, by rank, how many ranks compute on its GPU (1 on the CPU). For all ranks to call.

    A rank may see all GPUs of its node, or only its own as number 0 (CUDA_VISIBLE_DEVICES, SLURM's --gpus-per-task): their
    UUIDs tell them apart.
    """
    if device.type == "cpu":
        return [1] * world_size
    store.set(f"gpu-of-rank/{rank}", str(torch.cuda.get_device_properties(device).uuid))
    everyones = store.multi_get([f"gpu-of-rank/{other}" for other in range(world_size)])  # waits until all are there
    return [everyones.count(gpu) for gpu in everyones]


def count_cores(store: Store, rank: int, world_size: int) -> int:
    """Return this rank's share of the CPU cores on which it may run, at least 1. For all ranks to call.

    torchrun's ranks may all run on the same cores, those of the node or of a SLURM task; srun may bind each to its own.
    """
    own = [f"{platform.node()}:{core}" for core in sorted(os.sched_getaffinity(0))]
    store.set(f"cores-of-rank/{rank}", " ".join(own))
    everyones = store.multi_get([f"cores-of-rank/{other}" for other in range(world_size)])  # waits until all are there
    num_users = Counter(core for cores in everyones for core in cores.decode().split())
    return max(1, int(sum(Fraction(1, num_users[core]) for core in own)))


def pick_backend(device: torch.device, ranks_on_gpu: list[int]) -> str:
    """Return torch's name of what carries the ranks' exchanges: NCCL where each has a GPU of its own.

    Args:
        ranks_on_gpu: as `count_ranks_by_gpu` returns them.
    """
    if device.type == "cpu" or max(ranks_on_gpu) > 1:
        return "gloo"  # NCCL refuses two ranks on one GPU
    return "cpu:gloo,cuda:nccl"


@contextmanager
def process_group(sharding: str, timeout_s: int, device: str = "auto") -> Iterator[Ranks]:
    """Join the process group for the length of a `with` block.

    Args:
        sharding: 'full' shards over all ranks, 'hybrid' over those of each node, 'none' replicates the base on each.
        timeout_s: seconds any collective may wait for the other ranks.
        device: 'cpu', 'cuda', or 'auto': the GPU if there is one.

    Raises:
        TrainingError: the other ranks could not be reached.
        ConfigError: 'hybrid' on nodes with unequal numbers of ranks, or 'cuda' without a GPU.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        store = _store(rank, world_size, timeout)
        if chosen.type == "cuda":
            # torchrun gives every rank one CPU thread, too few for the optimizer of what rests in CPU memory
            torch.set_num_threads(count_cores(store, rank, world_size))
        ranks_on_gpu = count_ranks_by_gpu(chosen, store, rank, world_size)
        backend = pick_backend(chosen, ranks_on_gpu)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"rank {rank} of {world_size} could not join the others within {timeout_s} s: {error}; start with torchrun,"
            " and check that every rank was started and can reach MASTER_ADDR:MASTER_PORT"
        ) from error
    try:
        if sharding == "hybrid":
            _require_equal_nodes(world_size, local_world_size)
        mesh = make_mesh(chosen, world_size, sharding, local_world_size)
        yield Ranks(rank, world_size, local_rank, chosen, mesh, ranks_on_gpu[rank])
    finally:
        dist.destroy_process_group()


def _store(rank: int, world_size: int, timeout: datetime.timedelta) -> Store:
    """Return where the ranks find each other.

    When torchrun restarts the ranks it keeps its store, in which they would find the addresses of dead ones and wait for
    them (torch 2.13). On one node the number of the restart tells the lives apart. On several each node counts its own
    restarts, so torchrun has to make a new store, as TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 lets it (launch/job.sh).
    """
    if world_size == 1:
        return HashStore()
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1"
    if restart == "0" or not is_kept:
        store: Store = next(rendezvous("env://", rank, world_size, timeout=timeout))[0]
        store.set_timeout(timeout)
        return PrefixStore("default_pg", store)
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return PrefixStore(f"restart-{restart}", TCPStore(*address, world_size, is_master=False, timeout=timeout))


def _require_equal_nodes(world_size: int, local_world_size: int) -> None:
    """Raise ConfigError, on every rank, unless each node has as many ranks as the others."""
    sizes = [0] * world_size
    dist.all_gather_object(sizes, local_world_size)
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"--sharding=hybrid: nodes have {' and '.join(str(size) for size in sorted(set(sizes)))} ranks; start equally"
            " many on each (--nproc_per_node), or use --sharding full"
        )


def make_mesh(device: torch.device, world_size: int, sharding: str, local_world_size: int = 1) -> DeviceMesh:
    """Return the mesh over which the base is sharded: over all ranks, or over neighbours, of which there are replicas.

    Args:
        sharding: 'full': one shard a rank; 'hybrid': one a rank of a node; 'none': one in all.
        local_world_size: ranks of a node; torchrun numbers them without gaps.
    """
    if sharding == "full":
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    num_shards = local_world_size if sharding == "hybrid" else 1
    return init_device_mesh(device.type, (world_size // num_shards, num_shards), mesh_dim_names=("replicate", "shard"))


def all_gather_single(output: torch.Tensor, local: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Fill `output` with the ranks' equal pieces, one after the other (torch renamed the operation in 2.13)."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, local, group=group)


def reduce_scatter_single(output: torch.Tensor, pieces: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Fill `output` with this rank's piece of the sum of everyone's `pieces` (renamed likewise)."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(output, pieces, group=group)


def sum_over_ranks(value: int | float) -> float:
    """Return the sum of a number over all ranks (float64: exact for token counts).

    The exchange is on the CPU, through gloo, and so does not wait for the GPU.
    """
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total.item())


def largest_of_ranks(value: int) -> int:
    """Return the largest of the ranks' numbers; exchanged like a sum (`sum_over_ranks`)."""
    largest = torch.tensor(value)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


def end_together(is_asked: bool, doing: str) -> None:
    """Raise Interrupted, on every rank, if any rank was asked to end. Every rank must call this."""
    if sum_over_ranks(is_asked):
        raise Interrupted(f"interrupted while {doing}")


def from_main(value: T) -> T:
    """Return what rank 0 passes, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def shard_rows(num_rows: int, shard: int, num_shards: int) -> tuple[int, int]:
    """Return the rows of a matrix that a shard holds under FSDP's sharding of the first dimension: from, to."""
    per_shard = -(-num_rows // num_shards)
    start = min(shard * per_shard, num_rows)
    return start, min(start + per_shard, num_rows)


@contextmanager
def agree_on_errors(ranks: Ranks, doing: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Make an error of any rank inside the `with` block an error of every rank, so that none waits for a dead one.

    The block must not contain collectives that a failing rank would skip. The rank that failed raises its own error; the
    others raise TrainingError with its message. A rank that is to end (Ranks.is_interrupted) ends all of them; if another
    failed meanwhile, all fail.

    Args:
        group: all ranks, with a time limit of its own; default: that of --timeout_s.

    Raises:
        Interrupted: on every rank.
    """
    message = ""
    failure: FsdpQloraError | None = None
    try:
        yield
        if ranks.is_interrupted():
            raise Interrupted(f"interrupted while {doing}")
    except FsdpQloraError as error:
        failure, message = error, str(error)
    is_interrupted = isinstance(failure, Interrupted)
    messages: list[tuple[str, bool]] = [("", False)] * ranks.world_size
    dist.all_gather_object(messages, (message, is_interrupted), group=group)
    failed = [(rank, text) for rank, (text, interrupted) in enumerate(messages) if text and not interrupted]
    if failure is not None and not is_interrupted:
        failure.rank_local = ranks.rank == failed[0][0]
        raise failure
    if failed:
        rank, text = failed[0]
        told = TrainingError(f"rank {rank} failed while {doing}: {text}")
        told.is_reported = True  # by the rank that failed
        raise told
    interruption = next((text for text, interrupted in messages if interrupted), None)
    if interruption is not None:
        raise Interrupted(interruption)
