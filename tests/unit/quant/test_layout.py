"""Where the bytes of a quantised matrix lie in its flat parameter."""

from __future__ import annotations

import itertools

import pytest

from fsdp_qlora.quant.layout import SECTION_ALIGNMENT, STORAGE_DTYPES, Layout

SHAPES = [(1, 2), (3, 5), (5, 13), (32, 64), (96, 104), (257, 320), (4096, 1024)]


def layouts(**settings: object) -> list[Layout]:
    return [
        Layout(out_features, in_features, double_quant=double_quant, **settings)
        for (out_features, in_features), double_quant in itertools.product(SHAPES, (True, False))
    ]


@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_sections_are_aligned_and_do_not_overlap(layout: Layout) -> None:
    sections = [layout.codes, layout.absmax, layout.nested_absmax, layout.offset]
    assert layout.codes.start == 0
    for before, after in itertools.pairwise(sections):
        assert before.stop <= after.start < before.stop + SECTION_ALIGNMENT
    assert all(section.start % SECTION_ALIGNMENT == 0 for section in sections)
    assert sections[-1].stop <= layout.num_bytes < sections[-1].stop + SECTION_ALIGNMENT
    assert layout.num_bytes % SECTION_ALIGNMENT == 0


def test_sizes_count_what_bitsandbytes_stores() -> None:
    layout = Layout(257, 320)  # 82,240 weights: 1,285 blocks, the last of them whole; 6 runs of up to 256 scales
    assert (layout.codes.size, layout.absmax.size, layout.nested_absmax.size, layout.offset.size) == (
        41120,
        1285,
        24,
        4,
    )
    layout = Layout(257, 320, double_quant=False)
    assert (layout.absmax.size, layout.nested_absmax.size, layout.offset.size) == (4 * 1285, 0, 0)
    odd = Layout(5, 13)  # 65 weights: half a byte and 63 weights of the last block are not used
    assert (odd.codes.size, odd.num_blocks) == (33, 2)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("storage", STORAGE_DTYPES)
def test_equal_shards_cover_the_parameter(num_shards: int, storage: str) -> None:
    for layout in layouts(num_shards=num_shards, storage=storage):
        ranges = [layout.shard_range(shard) for shard in range(num_shards)]
        assert ranges[0].start == 0
        assert all(before.stop == after.start for before, after in itertools.pairwise(ranges))
        assert {shard.size for shard in ranges} == {layout.shard_bytes}
        assert layout.shard_bytes % SECTION_ALIGNMENT == 0
        assert layout.num_bytes <= ranges[-1].stop == layout.padded_bytes
        assert layout.padded_bytes - layout.num_bytes < SECTION_ALIGNMENT * num_shards
        assert layout.numel * STORAGE_DTYPES[storage].itemsize == layout.padded_bytes
        assert layout.numel % num_shards == 0, "FSDP would pad"


def test_sections_do_not_depend_on_shards_or_storage() -> None:
    """A world of another size must hold the same bytes."""
    whole, sharded = Layout(96, 104), Layout(96, 104, storage="uint8", num_shards=3)
    for section in ("codes", "absmax", "nested_absmax", "offset", "num_bytes"):
        assert getattr(whole, section) == getattr(sharded, section)
