"""Full fine-tuning from the command line: trained, resumed, and the model it leaves used by everything else."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.faults import kill_after_step
from tests.faults.jobs import SETTINGS, losses, make_inputs, state, train
from tests.faults.trials import printed

STEPS = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    common = {name: value for name, value in SETTINGS.items() if not name.startswith("lora")}
    made = make_inputs(tmp_path_factory.mktemp("inputs"), vocab_size=321)  # no number of ranks divides it
    return {**common, **made, "train_type": "full", "max_steps": STEPS, "lr": 1e-3}


@pytest.fixture(scope="module")
def runs(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Uninterrupted runs by number of ranks, with the same sequences a step."""
    found = {}
    for world_size in (1, 2):
        found[world_size] = tmp_path_factory.mktemp("runs") / f"{world_size}"
        settings = {**inputs, **of_world(world_size), "output_dir": found[world_size]}
        assert train(world_size, settings) == [0] * world_size, printed(found[world_size])
    return found


def of_world(world_size: int) -> dict[str, Any]:
    return {"gradient_accumulation_steps": 4 // world_size}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def test_one_and_two_ranks_train_the_same_model(inputs: dict[str, Any], runs: dict[int, Path]) -> None:
    one, two = (weights_of(run / "model") for run in runs.values())
    base = weights_of(Path(inputs["model"]))
    assert one.keys() == two.keys() == base.keys()
    for name, value in base.items():
        assert one[name].dtype == value.dtype
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)
        assert (one[name] - value).abs().max() > 1e-3, f"{name} was not trained"
    assert losses(runs[1]) == pytest.approx(losses(runs[2]), rel=1e-5)


def test_a_checkpoint_is_written_shard_by_shard(runs: dict[int, Path]) -> None:
    (folder,) = (runs[2] / "checkpoints").glob(f"step-{STEPS:06d}")
    parts = [load_file(folder / f"rank-{rank:05d}.safetensors") for rank in range(2)]
    for name, value in weights_of(runs[2] / "model").items():
        for suffix in ("", ".exp_avg", ".exp_avg_sq"):
            rows = [len(part[name + suffix]) for part in parts]
            assert sum(rows) == len(value)
            assert max(rows) == -(-len(value) // 2)
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, rtol=0, atol=0)
    assert not (folder / "adapter").exists()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_run_ends_with_the_same_bits(
    inputs: dict[str, Any], runs: dict[int, Path], tmp_path: Path, world_size: int
) -> None:
    settings = {**inputs, **of_world(world_size), "output_dir": tmp_path / "run"}
    codes = train(world_size, settings, functools.partial(kill_after_step, 3))
    assert codes == [-9] * world_size
    assert train(world_size, settings) == [0] * world_size, printed(tmp_path / "run")
    assert losses(tmp_path / "run") == losses(runs[world_size])
    assert state(tmp_path / "run", STEPS) == state(runs[world_size], STEPS)
