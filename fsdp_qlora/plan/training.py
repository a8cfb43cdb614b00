"""What a training run asks of the planner: its settings of memory, and whether another sharding would be faster."""

from __future__ import annotations

from collections.abc import Callable

from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks, agree_on_errors
from fsdp_qlora.host_memory import GIB
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.plan.choice import NOT_SHARDED, Request, budget_of, choose, choose_on_cpu, copies, in_words
from fsdp_qlora.plan.model_shape import ModelShape
from fsdp_qlora.plan.planner import Run


def memory_settings(
    config: TrainConfig,
    ranks: Ranks,
    shape_of: Callable[[int], ModelShape],
    compiled: bool,
    say: Callable[[str], None],
) -> MemorySettings:
    """Resolve the autos, equally on all ranks, and say what was chosen.

    Args:
        shape_of: measures the model with a number of shards.

    Raises:
        ConfigError: the run cannot fit.
    """
    with agree_on_errors(ranks, "planning the memory"):
        shape = shape_of(ranks.num_shards)
    budget, local_ranks = budget_of(ranks, config.gpu_memory, config.cpu_memory)
    request = Request(
        Run(
            config.batch_size,
            config.context_length,
            local_ranks=local_ranks,
            num_replicas=ranks.num_replicas,
            accumulates=config.gradient_accumulation_steps > 1,
            has_dropout=config.lora_dropout > 0,
            compiled=compiled,
        ),
        config.cpu_offload,
        config.activation_checkpointing,
        config.activation_offload,
        sharded=config.sharding != "none",
    )
    if ranks.device.type == "cpu":
        memory = choose_on_cpu(shape, budget, request)
        say(f"memory: {in_words(shape, memory)}")
        return memory
    choice = choose(shape, budget, request)
    wanted = choice.estimate
    say(
        f"memory: {in_words(shape, choice.memory)}; about {wanted.gpu_bytes / GIB:.1f} of {budget.gpu / GIB:.1f}"
        f" GiB a GPU and {wanted.host_bytes / GIB:.1f} of {budget.host / GIB:.1f} GiB of host memory"
        + ("" if choice.fits else ": expected to run out of memory")
    )
    within_a_node = 1 < ranks.num_shards == local_ranks == ranks.world_size
    resident = not choice.memory.offload_blocks
    if within_a_node and resident and copies(shape_of(1), budget, request, choice, ranks.world_size) is not None:
        say(NOT_SHARDED)
    return choice.memory
