"""Runs that are killed and started again end as if nothing had happened."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from fsdp_qlora.adapters import trained_step
from tests.faults import trials
from tests.faults.faults import fail_at, kill_after_step
from tests.faults.jobs import ended, losses, of_world, state, train
from tests.tiny import save_tiny


@pytest.mark.parametrize(("world_size", "step"), [(1, 1), (1, 5), (1, 8), (2, 2), (2, 6)])
def test_a_killed_run_ends_with_the_same_bits(
    inputs: dict[str, str], references: dict[int, Path], tmp_path: Path, world_size: int, step: int
) -> None:
    trials.killed_after_step(inputs, references[world_size], tmp_path / "run", world_size, step)


@pytest.mark.parametrize("moment", [1, 9, 30, 62, 85, 103, 112, 115, 118, 121])
def test_a_run_killed_in_a_save_goes_on_from_the_last_complete_one(
    inputs: dict[str, str], references: dict[int, Path], tmp_path: Path, moment: int
) -> None:
    assert trials.killed_in_save(inputs, references[1], tmp_path / "run", 1, moment)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks(inputs: dict[str, str], tmp_path: Path, before: int, after: int) -> None:
    reference = tmp_path / "reference"
    changes = {"lora_dropout": 0, "packing": True, "lora_rank": 3}
    assert train(before, {**of_world(inputs, before), **changes, "output_dir": reference}) == [0] * before
    difference = trials.resharded(inputs, reference, tmp_path / "run", before, after, **changes)
    assert difference < 1e-6
    warned = f"the checkpoint is of {before} ranks and the run has {after}" in trials.printed(tmp_path / "run")
    assert warned


@pytest.mark.parametrize("step", [3, 7])
def test_packed_and_shuffled_epochs(inputs: dict[str, str], tmp_path: Path, step: int) -> None:
    settings = {**of_world(inputs, 1), "packing": True, "gradient_accumulation_steps": 3, "save_steps": 1}
    reference, run = tmp_path / "reference", tmp_path / "run"
    assert train(1, {**settings, "output_dir": reference}) == [0]
    epochs = {line.split('"epoch": ')[1][0] for line in (reference / "metrics.jsonl").read_text().splitlines()}
    assert len(epochs) > 1, "it goes over the end of an epoch"
    assert train(1, {**settings, "output_dir": run}, functools.partial(kill_after_step, step)) == [-9]
    trials.finish_and_compare({**settings, "output_dir": run}, 1, reference)


def test_what_may_change_and_what_may_not(inputs: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {**of_world(inputs, 1), "output_dir": run, "max_steps": 2}
    assert train(1, settings) == [0]
    other = save_tiny("llama", tmp_path / "other", num_hidden_layers=2, seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (other / name).write_bytes((Path(inputs["model"]) / name).read_bytes())
    rows = Path(inputs["dataset"]).read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(rows[:-1]))
    refused = {
        "lora_rank": (8, "lora_rank is 8 and was 4"),
        "lora_target_modules": ("q_proj", "lora_target_modules is q_proj and was all-linear"),
        "seed": (1, "seed is 1 and was 42"),
        "dataset": (tmp_path / "fewer.jsonl", "data is "),
        "model": (other, "base is "),
        "gradient_accumulation_steps": (3, "no multiple of batch_size 1 x gradient_accumulation_steps 3 x 1 ranks = 3"),
    }
    for name, (value, message) in refused.items():
        codes = train(1, {**settings, "max_steps": 4, name: value})
        assert codes == [2 if name == "gradient_accumulation_steps" else 1], name
        assert message in trials.printed(run), name
    tokenizer = other / "chat_template.jinja"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert train(1, {**settings, "max_steps": 4, "model": other}) == [1]
    assert "tokenizer is " in trials.printed(run)
    assert train(1, {**settings, "max_steps": 4, "lr": 1e-3}) == [0]
    assert "settings changed since the checkpoint: max_steps 2 -> 4, lr 0.01 -> 0.001" in trials.printed(run)
    assert sorted(losses(run)) == [1, 2, 3, 4]


def test_only_damaged_checkpoints_stop_the_run(inputs: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {**of_world(inputs, 1), "output_dir": run, "max_steps": 4}
    assert train(1, settings) == [0]
    for folder in (run / "checkpoints").iterdir():
        (folder / "rank-00000.safetensors").write_bytes(b"")
    assert train(1, {**settings, "max_steps": 6}) == [1]
    assert "no older checkpoint is intact either" in trials.printed(run)
    assert train(1, {**settings, "max_steps": 6, "overwrite": True}) == [0]
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]


def test_from_another_folder_and_from_an_older_checkpoint(
    inputs: dict[str, str], references: dict[int, Path], tmp_path: Path
) -> None:
    settings = of_world(inputs, 1)
    older = references[1] / "checkpoints" / "step-000006"
    assert train(1, {**settings, "output_dir": tmp_path / "run", "resume": older}) == [0]
    assert state(tmp_path / "run") == state(references[1])
    assert train(1, {**settings, "output_dir": references[1], "resume": older}) == [2]
    assert "holds later checkpoints (step-000008); delete them" in trials.printed(references[1])
    assert train(1, {**settings, "output_dir": tmp_path / "new", "resume": tmp_path}) == [2]
    assert "holds no checkpoint" in trials.printed(tmp_path / "new")


def test_the_same_command_restarts_a_run_from_another_folder(
    inputs: dict[str, str], references: dict[int, Path], tmp_path: Path
) -> None:
    run, older = tmp_path / "run", references[1] / "checkpoints" / "step-000006"
    settings = {**of_world(inputs, 1), "output_dir": run, "resume": older}
    assert train(1, settings, functools.partial(kill_after_step, 7)) == [-9], "before its first checkpoint"
    preempted = functools.partial(fail_at, "first step", "SIGTERM", 0, tmp_path / "marker")
    assert train(1, settings, preempted) == [0], "after the checkpoint of step 7"
    assert train(1, settings) == [0]
    assert f"going on from {run / 'checkpoints' / 'step-000007'}\n" in trials.printed(run)
    assert state(run) == state(references[1])
    assert train(1, settings) == [0]
    assert "completed: nothing to do" in trials.printed(run)


def restarted_and_killed(step: int, rank: int) -> None:
    os.environ["SLURM_RESTART_COUNT"] = "1"
    kill_after_step(step, rank)


def test_a_restarted_job_goes_on_though_told_to_overwrite(inputs: dict[str, str], tmp_path: Path) -> None:
    """And the best adapter of a step that is lost goes with it."""
    run = tmp_path / "run"
    changes = {"overwrite": True, "eval_split": 0.2, "eval_steps": 1, "keep_best": True}
    settings = {**of_world(inputs, 1), **changes, "output_dir": run}
    assert train(1, settings, functools.partial(kill_after_step, 6)) == [-9]
    assert trained_step(run / "best") == 5
    assert train(1, settings, functools.partial(restarted_and_killed, 5)) == [-9]
    printed = trials.printed(run)
    assert "--overwrite: done at the first start of this job; this restart goes on" in printed
    assert f"going on from {run / 'checkpoints' / 'step-000004'}\n" in printed
    assert "best deleted: it was of step 5" in printed
    assert trained_step(run / "best") == 4, "as evaluated before"


def test_the_best_that_was_not_kept_is_kept_by_whoever_goes_on_from_it(inputs: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {**of_world(inputs, 2), "output_dir": run, "eval_split": 0.2, "eval_steps": 2}
    assert train(2, {**settings, "max_steps": 4}) == [0, 0]
    assert train(2, {**settings, "max_steps": 8, "keep_best": True, "lr": 1.0}) == [0, 0]
    evaluated = {step: loss for step, loss in losses(run, "eval_loss").items() if step >= 4}
    assert min(evaluated, key=lambda step: evaluated[step]) == 4 != max(evaluated)
    assert trained_step(run / "best") == 4
    assert f"best: {run / 'best'}, of step 4\n" in trials.printed(run)


@pytest.mark.parametrize("max_steps", [8, 4])
def test_a_run_without_a_step_left_completes(
    inputs: dict[str, str], references: dict[int, Path], tmp_path: Path, max_steps: int
) -> None:
    run = tmp_path / "run"
    settings = {**of_world(inputs, 1), "output_dir": run, "resume": references[1], "max_steps": max_steps}
    assert train(1, settings) == [0], trials.printed(run)
    end = ended(run)
    assert (end["status"], end["step"], end["num_steps"]) == ("completed", 8, 8)
    assert "done: 8 steps" in trials.printed(run)
    assert ("; --max_steps 4 is less than what is done" in trials.printed(run)) is (max_steps == 4)
