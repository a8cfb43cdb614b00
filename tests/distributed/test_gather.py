"""What a block computes with after FSDP's gather is byte-equal to what the checkpoint quantises to."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from fsdp_qlora.build import BuiltModel, build_model, gathered, verify_weights
from fsdp_qlora.distributed import Ranks, make_mesh, process_group
from fsdp_qlora.errors import ConfigError, WeightsError
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings, lora_linears
from fsdp_qlora.quant.layout import BLOCKSIZE, STORAGE_DTYPES, Layout
from fsdp_qlora.quant.linear import LoRALinear
from fsdp_qlora.quant.nf4 import quantize_matrix
from tests.distributed.checkpoints import save_odd, save_quantized
from tests.ranks import run_ranks
from tests.tiny import memory, save_tiny

LORA = LoraSettings(rank=2, alpha=4)
WORLDS = (1, 2, 4)


@dataclass(frozen=True)
class Case:
    """One way to hold the base. `source`: the 16- or 32-bit checkpoint that `folder` (default: itself) is made from."""

    source: Path
    folder: Path | None = None
    storage: str = "float32"
    sharding: str = "full"
    cpu_offload: bool = False
    recompute: bool = False
    quant_type: str = "nf4"
    double_quant: bool = True


def build(case: Case, ranks: Ranks, lora: LoraSettings | None = LORA) -> tuple[BuiltModel, Ranks]:
    """Build a case's model on this rank; the ranks returned have the case's mesh."""
    ranks = dataclasses.replace(ranks, mesh=make_mesh(ranks.device, ranks.world_size, case.sharding))
    quant = QuantSettings(case.quant_type, case.double_quant, case.storage, ranks.num_shards)
    folder = case.folder or case.source
    resting = memory(cpu_offload=case.cpu_offload, activation_checkpointing=case.recompute)
    return build_model(folder, ranks, quant, lora, torch.float32, memory=resting), ranks


def local(linear: LoRALinear) -> torch.Tensor:
    """Return this rank's part of a layer's packed weights, which FSDP need not hold where there is one shard."""
    return linear.packed.to_local() if isinstance(linear.packed, DTensor) else linear.packed.data


def gathered_hashes(case: Case, ranks: Ranks) -> dict[str, str]:
    """Compare every layer's gathered bytes with its matrix, quantised whole; return their sha256 by layer."""
    built, ranks = build(case, ranks)
    weights = load_file(case.source / "model.safetensors")
    # a quantised checkpoint was made on the CPU, where scales may be rounded another way than on a GPU
    device = torch.device("cpu") if case.folder else ranks.device
    hashes = {}
    for linear in lora_linears(built.root):  # before the first gather, which has the next block's weights on their way
        assert local(linear).dtype == STORAGE_DTYPES[case.storage]
        assert isinstance(linear.packed, DTensor) or ranks.num_shards == 1
        assert local(linear).device.type == ("cpu" if case.cpu_offload else ranks.device.type)
    for block in built.skeleton.blocks:
        with gathered(block):
            for linear in lora_linears(block):
                size = linear.layout.num_bytes
                found = linear.packed.view(torch.uint8)[:size].cpu()
                expected = quantize_matrix(weights[f"{linear.name}.weight"].to(device), linear.layout).cpu()
                wrong = int((found != expected).sum())
                assert wrong == 0, f"{case}: {wrong} of {size} bytes of {linear.name} are wrong after the gather"
                hashes[linear.name] = hashlib.sha256(bytes(found.tolist())).hexdigest()
    verify_weights(built, ranks)
    return hashes


def gather_cases(device: str, cases: list[Case]) -> list[dict[str, str]]:
    """Run on every rank: the hashes of each case."""
    with process_group("full", timeout_s=60, device=device) as ranks:
        return [gathered_hashes(case, ranks) for case in cases]


def flip_cases(device: str, cases: list[Case]) -> list[str]:
    """Run on every rank: the message of each case after one bit of the last rank's shard was changed."""
    messages = []
    with process_group("full", timeout_s=60, device=device) as ranks:
        for case in cases:
            built, own_ranks = build(case, ranks)
            if ranks.rank == ranks.world_size - 1:
                linear = list(lora_linears(built.root))[3]
                local(linear).view(torch.uint8)[17] ^= 4
            try:
                verify_weights(built, own_ranks)
            except WeightsError as error:
                messages.append(str(error))
    return messages


def storage_cases(source: Path, storages: tuple[str, ...] = tuple(STORAGE_DTYPES)) -> list[Case]:
    """Return every storage dtype, sharded, sharded and offloaded, and replicated."""
    cases = []
    for storage in storages:
        cases += [Case(source, storage=storage), Case(source, storage=storage, cpu_offload=True)]
        cases.append(Case(source, storage=storage, cpu_offload=True, recompute=True))
        cases.append(Case(source, storage=storage, sharding="none"))
    return cases


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by name: a usual one, one whose sizes divide by nothing, and both quantised by bitsandbytes."""
    folder = tmp_path_factory.mktemp("gather")
    sources = {
        "usual": save_tiny("llama", folder / "usual", num_hidden_layers=2, vocab_size=64),
        "bf16": save_tiny("qwen2", folder / "bf16", dtype=torch.bfloat16, num_hidden_layers=2, vocab_size=64),
        "odd": save_odd(folder / "odd", vocab_size=61),
    }
    sources["odd nf4"] = save_quantized(sources["odd"], folder / "odd-nf4")
    sources["odd fp4"] = save_quantized(sources["odd"], folder / "odd-fp4", "fp4", double_quant=False)
    return sources


class Hashes(dict[int, list[dict[str, str]]]):
    """The hashes of all cases by world size, each found when first asked for; ranks compare their bytes on the way."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.cases = cases

    def __missing__(self, world_size: int) -> list[dict[str, str]]:
        by_rank = run_ranks(gather_cases, world_size, "cpu", self.cases)
        assert all(result == by_rank[0] for result in by_rank)
        self[world_size] = by_rank[0]
        return self[world_size]


@pytest.fixture(scope="module")
def hashes(sources: dict[str, Path]) -> Hashes:
    return Hashes(all_cases(sources))


def all_cases(sources: dict[str, Path]) -> list[Case]:
    """Return the cases, those of one checkpoint and code together."""
    odd = sources["odd"]
    return [
        *storage_cases(sources["usual"]),
        *storage_cases(odd, ("float32", "bfloat16")),
        *storage_cases(sources["bf16"], ("float32",)),
        Case(odd, sources["odd nf4"]),
        Case(odd, sources["odd nf4"], storage="bfloat16", cpu_offload=True),
        Case(odd, sources["odd nf4"], sharding="none"),
        Case(odd, quant_type="fp4", double_quant=False),
        Case(odd, sources["odd fp4"], quant_type="fp4", double_quant=False),
    ]


@pytest.mark.parametrize("world_size", WORLDS)
def test_gathered_bytes_are_those_of_the_checkpoint(hashes: Hashes, world_size: int) -> None:
    assert all(len(result) == 14 for result in hashes[world_size])


def test_bytes_depend_on_nothing_but_the_matrix(hashes: Hashes) -> None:
    by_matrix: dict[tuple[Path, str, bool], list[dict[str, str]]] = {}
    for world_size in WORLDS:
        for case, result in zip(hashes.cases, hashes[world_size], strict=True):
            by_matrix.setdefault((case.source, case.quant_type, case.double_quant), []).append(result)
    assert len(by_matrix) == 4
    for results in by_matrix.values():
        assert all(result == results[0] for result in results)
    assert len({name for results in by_matrix.values() for name in results[0].values()}) == 4 * 14


def test_the_odd_shapes_divide_by_nothing(sources: dict[str, Path]) -> None:
    shapes = [tuple(value.shape) for value in load_file(sources["odd"] / "model.safetensors").values()]
    layouts = [Layout(shape[0], shape[1], num_shards=4) for shape in shapes if len(shape) == 2]
    assert any(layout.padded_bytes > layout.num_bytes for layout in layouts), "bytes, by the ranks"
    assert all(layout.num_weights % BLOCKSIZE for layout in layouts), "weights, by the block"
    assert any(layout.shard_bytes % (BLOCKSIZE // 2) for layout in layouts), "shards, by the block"


def refuse_on_rank(source: Path, storage: str, dtype: torch.dtype) -> str:
    """Return the message with which a model without adapters is refused."""
    with process_group("full", timeout_s=60, device="cpu") as ranks:
        quant = QuantSettings(storage=storage, num_shards=ranks.num_shards)
        try:
            build_model(source, ranks, quant, None, dtype)
        except ConfigError as error:
            return str(error)
        return ""


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_blocks_of_one_16_bit_dtype_are_refused(sources: dict[str, Path], storage: str) -> None:
    (message,) = run_ranks(refuse_on_rank, 1, sources["usual"], storage, STORAGE_DTYPES[storage])
    assert f"quant_storage {storage}" in message
    assert "--quant_storage float32" in message


def test_blocks_of_several_dtypes_or_wide_storage_are_not_refused(sources: dict[str, Path]) -> None:
    assert run_ranks(refuse_on_rank, 1, sources["usual"], "bfloat16", torch.float32) == [""]
    assert run_ranks(refuse_on_rank, 1, sources["usual"], "float32", torch.bfloat16) == [""]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_changed_bit_in_one_shard_stops_every_rank(sources: dict[str, Path], world_size: int) -> None:
    cases = [Case(sources["usual"]), Case(sources["usual"], storage="uint8", cpu_offload=True)]
    cases.append(Case(sources["usual"], sharding="none"))
    by_rank = run_ranks(flip_cases, world_size, "cpu", cases)
    for messages in by_rank:
        assert messages == by_rank[0]
        assert len(messages) == len(cases)
        # sharded, every rank gathers the wrong byte; replicated, only the last one holds it
        for message, rank in zip(messages, (0, 0, world_size - 1), strict=True):
            assert message.startswith("'model.layers.0.self_attn.o_proj' (1 layers in all)")
            assert f"on rank {rank}" in message
