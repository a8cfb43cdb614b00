"""Do every trial of docs/reliability.md and write its table: kills, damage, full disks, failing ranks, signals.

python -m scripts.reliability_report            # all; about a quarter of an hour on two idle cores
python -m scripts.reliability_report R1 F3      # some; prints only
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdp_qlora import cli
from scripts.update_readme import replace_block
from tests.distributed import test_equivalence as equivalence
from tests.e2e.test_bad_inputs import CASES, Case, prepare
from tests.faults import test_disk, trials
from tests.faults.faults import PLACES, read_only
from tests.faults.jobs import make_inputs, of_world, start, train
from tests.tiny import save_tiny
from tests.unit import test_checkpoint

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
PARITY = DOCUMENT.with_name("parity.md")
MEMORY_DISK = Path("/dev/shm")
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGTERM, forwarded again")

Row = tuple[str, str, str]
"""Test id, what is done, what was found."""


@dataclass
class Lab:
    """Where trials are done.

    Attributes:
        references: uninterrupted runs by world size.
        failures: what trials that went wrong said.
    """

    folder: Path
    inputs: dict[str, str]
    references: dict[int, Path] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    num_runs: int = 0

    def new_run(self) -> Path:
        """Return the path of a run folder that does not exist."""
        self.num_runs += 1
        return self.folder / f"run-{self.num_runs}"

    def attempt(self, name: str, trial: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        """Return what a trial returns, in a list; note and print what went wrong, and return nothing then."""
        try:
            return [trial(*arguments, **named)]
        except AssertionError:
            self.failures.append(f"{name}\n{traceback.format_exc(limit=4)}")
            print(f"FAILED {self.failures[-1]}", flush=True)
            return []


def kills_after_steps(lab: Lab) -> Iterator[Row]:
    """R1: kill every rank after every step."""
    good = []
    for world_size in (1, 2):
        for step in range(1, 9):
            reference, name = lab.references[world_size], f"R1 world {world_size} step {step}"
            good += lab.attempt(name, trials.killed_after_step, lab.inputs, reference, lab.new_run(), world_size, step)
    what = "kill -9 after every step, 1 and 2 ranks: losses, adapters, optimizer, random numbers"
    yield "R1", what, f"{len(good)} / 16 bitwise equal to the uninterrupted run"


def kills_in_saves(lab: Lab) -> Iterator[Row]:
    """R2: kill at every moment of a save on one rank, and at some of them on either of two."""
    for world_size, victim, every in ((1, 0, 1), (2, 0, 6), (2, 1, 3)):
        total, good, moment = 0, 0, 1
        while True:
            reference, name = lab.references[world_size], f"R2 world {world_size} rank {victim} moment {moment}"
            result = lab.attempt(
                name, trials.killed_in_save, lab.inputs, reference, lab.new_run(), world_size, moment, victim
            )
            if result == [False]:  # the save was over by then
                break
            total, good, moment = total + 1, good + len(result), moment + every
        who = "the only rank" if world_size == 1 else f"rank {victim} of 2"
        when = "before, after and half-way through every" if every == 1 else f"at every {every}th moment of the"
        yield (
            "R2",
            f"kill -9 of {who} {when} disk operation of a save",
            f"{good} / {total} go on from the newest complete checkpoint, bitwise equal in the end",
        )


def other_world_sizes(lab: Lab) -> Iterator[Row]:
    """R3: go on with another number of ranks."""
    changes = {"lora_dropout": 0, "lora_rank": 3}
    differences = []
    for before, after in ((2, 1), (1, 2), (2, 4), (4, 2)):
        reference = lab.new_run()
        assert train(before, {**of_world(lab.inputs, before), **changes, "output_dir": reference}) == [0] * before
        differences += lab.attempt(
            f"R3 {before} to {after}", trials.resharded, lab.inputs, reference, lab.new_run(), before, after, **changes
        )
    largest = max(differences, default=float("nan"))
    if not largest < 1e-6:
        lab.failures.append(f"R3: {largest}")
    found = f"{len(differences)} / 4 with the same samples; largest relative difference of a loss {largest:.1e}"
    yield "R3", "resume on 2 -> 1, 1 -> 2, 2 -> 4, 4 -> 2 ranks", found


def damage(lab: Lab) -> Iterator[Row]:
    """D1: damage every file of a checkpoint."""
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK if MEMORY_DISK.is_dir() else None) as folder:
        silent = test_checkpoint.silent_loads(test_checkpoint.make(Path(folder), 1), test_checkpoint.NUM_EDITS)
    if silent:
        lab.failures.append(f"D1: {silent} silent loads")
    yield "D1", f"{test_checkpoint.NUM_EDITS:,} random edits of a checkpoint's files", f"{silent} silent loads"
    detected = []
    for name in test_checkpoint.FILES:
        for kind, harm in test_checkpoint.DAMAGE.items():
            folder = test_checkpoint.make(lab.new_run(), 1)
            harm(folder / name)
            detected += lab.attempt(f"D1 {kind} {name}", _must_not_load, folder)
    total = len(test_checkpoint.FILES) * len(test_checkpoint.DAMAGE)
    yield "D1", f"each file: {', '.join(test_checkpoint.DAMAGE)}", f"{len(detected)} / {total} detected"


def _must_not_load(folder: Path) -> None:
    try:
        test_checkpoint.load(folder)
    except test_checkpoint.CheckpointError:
        return
    raise AssertionError("loaded")


def full_disks(lab: Lab) -> Iterator[Row]:
    """D3: fill the disk of either rank."""
    faults: dict[str, tuple[Callable[[int], None], str]] = {
        "read-only": (functools.partial(read_only, 4), "Read-only file system")
    }
    for share, fault in test_disk.FULL.items():
        no_space = share == "0% written"
        for victim in (0,) if no_space else (0, 1):  # rank 0 looks for space
            message = "free space" if no_space else f"written by rank {victim} (File too large)"
            faults[f"{share}, rank {victim}"] = (functools.partial(fault, victim), message)
    good = []
    for name, (fault, message) in faults.items():
        good += lab.attempt(
            f"D3 {name}", test_disk.check_disk, lab.inputs, lab.references[2], lab.new_run(), fault, message
        )
    found = f"{len(good)} / {len(faults)}: one error on all ranks, the older checkpoint intact, the next start exact"
    yield "D3", "disk full at 0, 10, 50, 99 % of a save, on either of two ranks; read-only folder", found


def failing_ranks(lab: Lab) -> Iterator[Row]:
    """F1, F2: let one rank fail everywhere."""
    for test, places, kinds, what in (
        ("F1", PLACES, ("kill", "raise", "exit"), "one of two ranks is killed, raises, or exits with 0"),
        ("F2", PLACES[:3], ("pause",), "SIGSTOP of one of two ranks"),
    ):
        cases = [(place, kind, victim) for place in places for kind in kinds for victim in (0, 1)]
        seconds: list[float] = []
        for case in cases:
            seconds += [
                result[2]
                for result in lab.attempt(f"{test} {case}", trials.failing_rank, lab.inputs, lab.new_run(), *case)
            ]
        yield (
            test,
            f"{what}; at {', '.join(places)}; time limit {trials.TIMEOUT_S} s",
            f"{len(seconds)} / {len(cases)} end with one error that names rank and step; worst"
            f" {max(seconds, default=float('nan')):.1f} s from the fault to the end of the other",
        )


def skipped_collectives(lab: Lab) -> Iterator[Row]:
    """F6: let either rank leave out a collective."""
    seconds: list[float] = []
    for victim in (0, 1):
        seconds += lab.attempt(f"F6 rank {victim}", trials.skipped_collective, lab.inputs, lab.new_run(), victim)
    yield (
        "F6",
        f"one of two ranks leaves out a collective of a step; time limit {trials.TIMEOUT_S} s",
        f"{len(seconds)} / 2 end with an error that names step, rank, collective and the line it is in; longest run"
        f" {max(seconds, default=float('nan')):.1f} s",
    )


def signals(lab: Lab) -> Iterator[Row]:
    """F3: send signals at every place."""
    cases = [
        (world_size, place, kind)
        for world_size in (1, 2)
        for place in ("load", "evaluation", "first step", "later step", "save")
        for kind in SIGNALS
    ]
    lost = []
    for case in cases:
        reference = lab.references[case[0]]
        lost += [
            result[0]
            for result in lab.attempt(f"F3 {case}", trials.signalled, lab.inputs, reference, lab.new_run(), *case)
        ]
    if any(lost):
        lab.failures.append(f"F3: {lost} steps lost")
    what = f"{', '.join(SIGNALS)} to one rank at load, evaluation, first step, later step, save; 1 and 2 ranks"
    yield "F3", what, f"{len(lost)} / {len(cases)} resume exactly; {sum(lost)} steps lost"
    seconds: list[float] = []
    for world_size in (1, 2) * 5:
        seconds += lab.attempt("F3 timing", trials.stopped_between_steps, lab.inputs, lab.new_run(), world_size)
    found = f"median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s" if seconds else "-"
    yield (
        "F3",
        "SIGTERM to all ranks while they train: time to a durable checkpoint and the end of all processes",
        found,
    )


def costs(lab: Lab) -> Iterator[Row]:
    """Tell what saving a real model's state costs."""
    run = lab.new_run()
    settings = {"model": "smollm2-135m", "dataset": "demo", "output_dir": run, "context_length": 64, "max_steps": 6}
    settings |= {"save_steps": 2, "eval_split": 0, "gradient_accumulation_steps": 1, "lora_rank": 16}
    assert start(1, settings).wait(600) == [0], trials.printed(run)
    report = json.loads((run / "run.json").read_text())["result"]["checkpoints"]
    manifest = json.loads((run / "checkpoints" / "step-000006" / "manifest.json").read_text())
    ratio = report["size_bytes"] / manifest["files"]["adapter/adapter_model.safetensors"]["size"]
    yield "-", "size of a checkpoint (SmolLM2-135M, rank 16)", f"{ratio:.2f} bytes per trainable byte (float32)"
    stall = report["stall_seconds"] / report["count"]
    what = f"time that training stands still for a save of {report['size_bytes'] / 1e6:.0f} MB"
    yield "-", what, f"{stall:.2f} s on average of {report['count']}, the last of which waits for the disk"


def splits(lab: Lab) -> Iterator[Row]:
    """N2: take the same steps on 1, 2 and 4 ranks, in micro-batches of several sizes, offloaded and recomputed."""
    results = equivalence.Results(save_tiny("llama", lab.folder / "equivalence", num_hidden_layers=2))
    first, *others = equivalence.CASES
    expected = results[first]
    losses, whole, single = 0.0, 0.0, 0.0
    for found in (results[case] for case in others):
        pairs = zip(found["steps"], expected["steps"], strict=True)
        losses = max(losses, *(abs(one.loss - other.loss) / other.loss for one, other in pairs))
        compared = zip(
            (*found["gradients"], found["adapter"]), (*expected["gradients"], expected["adapter"]), strict=True
        )
        for total, each in (equivalence.differences(*pair) for pair in compared):
            whole, single = max(whole, total), max(single, *each.values())
    yield (
        "N2",
        f"{len(others)} ways to split the same three steps over 1, 2 and 4 ranks, unequal token counts; largest gaps",
        f"losses {losses:.1e}, whole gradient or adapter {whole:.1e}, a single matrix {single:.1e}",
    )


def parity(lab: Lab) -> Iterator[Row]:
    """N3: the worst of what `python -m scripts.parity_report` has measured."""
    table = re.findall(r"^\| (\w+) \| (yes|NO) \| (\S+) \| (\S+) \| (\S+) \|$", PARITY.read_text(), re.MULTILINE)
    equal = sum(row[1] == "yes" for row in table)
    worst = [max(float(row[column]) for row in table) for column in (2, 3, 4)]
    yield (
        "N3",
        f"{len(table)} families beside transformers + bitsandbytes + PEFT ([parity.md](parity.md)); largest gaps",
        f"base bitwise equal in {equal} / {len(table)}; loss {worst[0]:.1e}, gradients {worst[1]:.1e}, logits of the"
        f" exported adapter {worst[2]:.1e}",
    )


def bad_inputs(lab: Lab) -> Iterator[Row]:
    """D2, T1, S2: give the command line models, data and settings that are wrong."""
    refused = [result for name, case in CASES.items() for result in lab.attempt(f"T1 {name}", _must_refuse, lab, case)]
    what = "malformed models, rows and settings through the command line"
    yield "D2, T1, S2", what, f"{len(refused)} / {len(CASES)} refused with one line that says what is wrong"


def _must_refuse(lab: Lab, case: Case) -> None:
    folder, err, code = lab.new_run(), io.StringIO(), None
    folder.mkdir()
    arguments = prepare(case, Path(lab.inputs["model"]), Path(lab.inputs["dataset"]), folder)
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main(arguments)
        except SystemExit as error:
            code = error.code
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    assert code == case.code, err.getvalue()
    assert len(errors) == 1, err.getvalue()
    assert case.message in errors[0]


TRIALS: dict[str, Callable[[Lab], Iterator[Row]]] = {
    "R1": kills_after_steps,
    "R2": kills_in_saves,
    "R3": other_world_sizes,
    "D1": damage,
    "D3": full_disks,
    "F1": failing_ranks,
    "F6": skipped_collectives,
    "F3": signals,
    "N2": splits,
    "N3": parity,
    "T1": bad_inputs,
    "costs": costs,
}


def main() -> int:
    """Do the trials, print and write the table; return 1 if any went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="*", help=f"some of {' '.join(TRIALS)}; default: all")
    chosen = parser.parse_args().trials
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), make_inputs(Path(folder)))
        for world_size in (1, 2):
            lab.references[world_size] = lab.new_run()
            settings = {**of_world(lab.inputs, world_size), "output_dir": lab.references[world_size]}
            assert train(world_size, settings) == [0] * world_size, trials.printed(lab.references[world_size])
        rows: list[Row] = []
        for name in chosen or TRIALS:
            for row in TRIALS[name](lab):
                print(f"[{time.monotonic() - started:.0f} s] {' | '.join(row)}", flush=True)
                rows.append(row)
    print("\n".join(lines(rows)))
    DOCUMENT.write_text(updated(DOCUMENT.read_text(), rows))
    print(
        f"{len(lab.failures)} trials went wrong, {(time.monotonic() - started) / 60:.0f} min on {os.cpu_count()} CPU cores"
    )
    return 1 if lab.failures else 0


def lines(rows: list[Row]) -> list[str]:
    """Return rows of the table, dated."""
    return [f"| {' | '.join(row)} | {time.strftime('%Y-%m-%d')} |" for row in rows]


def updated(document: str, rows: list[Row]) -> str:
    """Return the page with the rows of the same ids replaced by new ones."""
    block = document.partition("<!-- trials:begin -->")[2].partition("<!-- trials:end -->")[0]
    new = {row[0] for row in rows}
    old = [line for line in block.strip().splitlines()[2:] if line.split(" | ")[0].removeprefix("| ") not in new]
    order = ["R1", "R2", "R3", "D1", "D3", "F1", "F2", "F3", "F6", "N2", "N3", "D2, T1, S2", "-"]
    found = sorted(old + lines(rows), key=lambda line: order.index(line.split(" | ")[0].removeprefix("| ")))
    table = ["| id | what is done | found | when |", "|---|---|---|---|", *found]
    return replace_block(document, "trials", "\n".join(table))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
