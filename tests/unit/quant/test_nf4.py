"""Our bytes and values are those of bitsandbytes' own quantize_4bit and dequantize_4bit."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from fsdp_qlora.quant.dequantize import dequantize
from fsdp_qlora.quant.layout import BLOCKSIZE, Layout, Section
from fsdp_qlora.quant.nf4 import (
    dequantize_reference,
    pack_statistics,
    quantize_blocks,
    quantize_matrix,
    scales,
)

SHAPES = {
    "square": (128, 128),
    "many_scales": (320, 104),  # 520 blocks: three runs of double quantisation, the last one short
    "ends_inside_a_block": (6, 50),
    "smaller_than_a_block": (2, 10),
    "one_row": (1, 192),
}
ODD_SHAPE = (5, 13)  # half a byte is left over
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, an all-zero block and large single values."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    matrix = torch.randn(shape, generator=generator) * torch.logspace(-3, 0, shape[0])[:, None]
    if matrix.numel() > 3 * BLOCKSIZE:
        matrix.view(-1)[BLOCKSIZE : 2 * BLOCKSIZE] = 0
        matrix.view(-1)[2 * BLOCKSIZE] = 50.0
    return matrix.to(dtype)


def assert_bytes_are_bitsandbytes(matrix: Tensor, layout: Layout) -> None:
    flat = quantize_matrix(matrix, layout)
    codes, state = bnb.quantize_4bit(
        matrix, blocksize=BLOCKSIZE, quant_type=layout.quant_type, compress_statistics=layout.double_quant
    )

    def part(section: Section) -> Tensor:
        return flat[section.start : section.stop]

    assert part(layout.codes).equal(codes.view(-1))
    assert part(layout.absmax).equal(state.absmax.view(torch.uint8))
    if layout.double_quant:
        assert part(layout.nested_absmax).equal(state.state2.absmax.view(torch.uint8))
        assert part(layout.offset).view(torch.float32).item() == state.offset.item()
    used = torch.zeros(layout.num_bytes, dtype=torch.bool)
    for section in (layout.codes, layout.absmax, layout.nested_absmax, layout.offset):
        used[section.start : section.stop] = True
    assert not flat[~used].any(), "bytes between the sections differ from run to run"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_bitsandbytes(
    shape: tuple[int, int], double_quant: bool, quant_type: str, dtype: torch.dtype
) -> None:
    assert_bytes_are_bitsandbytes(random_matrix(shape, dtype), Layout(*shape, quant_type, double_quant))


def test_bytes_of_an_odd_matrix() -> None:
    assert_bytes_are_bitsandbytes(random_matrix(ODD_SHAPE), Layout(*ODD_SHAPE))


def assert_values_are_bitsandbytes(matrix: Tensor, layout: Layout, dtype: torch.dtype) -> None:
    codes, state = bnb.quantize_4bit(
        matrix, blocksize=BLOCKSIZE, quant_type=layout.quant_type, compress_statistics=layout.double_quant
    )
    state.dtype = dtype
    expected = bnb.dequantize_4bit(codes, state)
    flat = quantize_matrix(matrix, layout)
    padding = torch.full((layout.padded_bytes - layout.num_bytes,), 255, dtype=torch.uint8)  # must not be read
    packed = torch.cat([flat, padding]).view(layout.storage_dtype)
    found = dequantize(packed, layout, dtype, "forward")
    assert (found.shape, found.dtype) == (matrix.shape, dtype)
    assert found.equal(expected)
    assert dequantize_reference(packed, layout, dtype).equal(expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_bitsandbytes(
    shape: tuple[int, int], double_quant: bool, quant_type: str, dtype: torch.dtype
) -> None:
    assert_values_are_bitsandbytes(random_matrix(shape), Layout(*shape, quant_type, double_quant), dtype)


@pytest.mark.parametrize("width", [64, 80, 81, 96, 104])
def test_blocks_run_on_from_row_to_row(width: int) -> None:
    """Decoded here weight by weight: bitsandbytes' CPU kernel begins a block in every row, see tests/bnb_cpu.py."""
    matrix = random_matrix((48, width))
    codes, state = bnb.quantize_4bit(matrix, blocksize=BLOCKSIZE, quant_type="nf4")
    indices = torch.stack((codes >> 4, codes & 15), 1).flatten().long()[: matrix.numel()]
    expected = state.code[indices] * state.absmax.repeat_interleave(BLOCKSIZE)[: matrix.numel()]
    layout = Layout(48, width, double_quant=False)
    padding = torch.zeros(layout.padded_bytes - layout.num_bytes, dtype=torch.uint8)
    packed = torch.cat([quantize_matrix(matrix, layout), padding]).view(layout.storage_dtype)
    assert dequantize_reference(packed, layout, torch.float32).equal(expected.view(48, width))


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16"])
def test_values_do_not_depend_on_storage_and_padding(storage: str) -> None:
    shape = SHAPES["many_scales"]
    assert_values_are_bitsandbytes(random_matrix(shape), Layout(*shape, storage=storage, num_shards=3), torch.float32)


def test_values_of_an_odd_matrix() -> None:
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles its fallback for odd shapes: ten seconds
        assert_values_are_bitsandbytes(random_matrix(ODD_SHAPE), Layout(*ODD_SHAPE), torch.float32)


def test_values_are_close_to_the_original() -> None:
    """bitsandbytes could agree with us on nonsense; the error of 4 bits is about a tenth of the weights."""
    matrix = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    layout = Layout(128, 128)
    values = dequantize_reference(quantize_matrix(matrix, layout), layout, torch.float32)
    assert 0.05 < (values - matrix).norm() / matrix.norm() < 0.12


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocks_a_run", [[520], [1, 519], [7, 256, 200, 57], [260, 260]], ids=str)
def test_runs_of_blocks_equal_the_whole(blocks_a_run: list[int], double_quant: bool) -> None:
    """What ranks do: each quantises its rows, all exchange scales, each packs the same statistics."""
    shape = SHAPES["many_scales"]
    layout = Layout(*shape, double_quant=double_quant)
    matrix = random_matrix(shape, torch.bfloat16)
    runs = matrix.view(-1).split([blocks * BLOCKSIZE for blocks in blocks_a_run])
    codes, absmax = zip(*(quantize_blocks(run, "nf4") for run in runs), strict=True)
    flat = quantize_matrix(matrix, layout)
    assert torch.cat(codes).equal(flat[: layout.codes.stop])
    assert pack_statistics(torch.cat(absmax), layout).equal(flat[layout.absmax.start :])


def test_scales_without_double_quantisation_are_the_largest_magnitudes() -> None:
    matrix = random_matrix((4, 128))
    layout = Layout(4, 128, double_quant=False)
    assert scales(quantize_matrix(matrix, layout), layout).equal(matrix.view(-1, BLOCKSIZE).abs().amax(dim=1))


def test_compiled_dequantise_is_the_eager_one() -> None:
    layout = Layout(16, 64)
    packed = quantize_matrix(random_matrix((16, 64)), layout).view(torch.float32)
    compiled = torch.compile(dequantize, backend="aot_eager", fullgraph=True)
    assert compiled(packed, layout, torch.float32, "forward").equal(
        dequantize(packed, layout, torch.float32, "forward")
    )
