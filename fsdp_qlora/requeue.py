"""Whether a batch job that ended goes back into the queue: `python -m fsdp_qlora.requeue begin|end TRAIN ARGUMENTS`.

The launch files call `begin` before an attempt and `end` after it. A job goes back as long as its attempts get somewhere;
after some that saved nothing new it gives up. What is known of earlier attempts is kept beside the run folder.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fsdp_qlora import cli, config
from fsdp_qlora.errors import ConfigError

GO, REQUEUE, GIVE_UP = 0, 75, 1
"""Exit codes: start (after `begin`) or done (after `end`); back into the queue; an error, stay out of it."""

EXIT, CHECKPOINTS, CHECKPOINT = "exit.json", "checkpoints", re.compile(r"step-(\d{6,})")
"""Names of run_folder.py and checkpoint.py. Those import torch, which takes long where a whole cluster reads one disk."""

ADVICE = "Read the log from its end, and mend or lengthen the job before submitting it again"


@dataclass(frozen=True)
class Attempts:
    """What is known of the attempts so far.

    Attributes:
        step: the newest step that was saved when last looked at.
        fruitless: attempts in a row that saved nothing newer.
        running: whether an attempt began and did not end: it was killed with its machine, or is going on.
    """

    step: int = 0
    fruitless: int = 0
    running: bool = False

    def ended(self, step: int) -> Attempts:
        """Count an attempt that ended with `step` as the newest one saved."""
        fruitless = 0 if step > self.step else self.fruitless + 1
        return Attempts(max(step, self.step), fruitless, running=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Say what to do next, and return it as an exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("moment", choices=("begin", "end"))
    parser.add_argument("--max_fruitless", type=int, default=3, help="attempts without progress before giving up")
    parser.add_argument("--signalled", action="store_true", help="the job was told to end: time limit or preemption")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the arguments of train.py")
    asked = parser.parse_args(argv)
    try:
        run_dir = output_dir(asked.arguments)
    except ConfigError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return error.exit_code
    if asked.moment == "begin":
        code, text = begin(run_dir, asked.max_fruitless)
    else:
        code, text = end(run_dir, asked.max_fruitless, asked.signalled)
    print(f"requeue: {text}", flush=True)
    return code


def output_dir(arguments: Sequence[str]) -> Path:
    """Return the folder that a training run with these arguments writes; ConfigError for arguments it would refuse."""
    command = next(command for command in cli.COMMANDS if command.name == "train")
    flags, problems = cli.read_flags(command, arguments)
    overrides = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    settings = config.parse(overrides, overrides.pop("config", None))
    if problems:
        raise ConfigError("\n".join(problems))
    return Path(settings.output_dir)


def begin(run_dir: Path, max_fruitless: int) -> tuple[int, str]:
    """Return whether to start an attempt, as exit code and words; forget how the last one ended."""
    attempts, saved = _read(run_dir), saved_step(run_dir)
    if saved < attempts.step:  # what was counted has been deleted: this is another run
        attempts = Attempts(saved)
    elif attempts.running:  # killed with its machine, or requeued by hand: it could not say how it ended
        attempts = attempts.ended(saved)
    if attempts.fruitless >= max_fruitless:
        _write(run_dir, Attempts(attempts.step))  # a job that is submitted anew starts counting anew
        return GIVE_UP, f"{attempts.fruitless} attempts got no further than step {attempts.step}; giving up. {ADVICE}"
    if _status(run_dir) != "completed":  # by which training sees that there is nothing left to do
        (run_dir / EXIT).unlink(missing_ok=True)
    _write(run_dir, replace(attempts, running=True))
    return GO, f"starting from step {attempts.step}, {attempts.fruitless} of {max_fruitless} attempts without progress"


def end(run_dir: Path, max_fruitless: int, signalled: bool) -> tuple[int, str]:
    """Return whether the job goes back into the queue, as exit code and words.

    Args:
        signalled: whether the job was told to end. One that was stopped while it loaded leaves no exit.json.
    """
    before, saved, status = _read(run_dir), saved_step(run_dir), _status(run_dir)
    if saved < before.step:  # --overwrite: this attempt began at step 0
        before = replace(before, step=0)
    attempts = before.ended(saved)
    progressed = attempts.step > before.step
    _write(run_dir, attempts)
    if status == "completed":
        _state_file(run_dir).unlink()
        return GO, f"{run_dir} is complete"
    if status == "failed":
        return GIVE_UP, f"the run failed; not requeued. {ADVICE}"
    interrupted = status == "preempted" or signalled
    if not interrupted and not progressed:
        return GIVE_UP, f"the run crashed before it saved anything new; not requeued. {ADVICE}"
    if attempts.fruitless >= max_fruitless:
        return GIVE_UP, f"{attempts.fruitless} attempts got no further than step {attempts.step}; giving up. {ADVICE}"
    why = "interrupted" if interrupted else "crashed after some progress"
    return REQUEUE, f"{why} with step {attempts.step} saved; going back into the queue"


def saved_step(run_dir: Path) -> int:
    """Return the newest step that is saved, 0 for none: from the checkpoints' names and the note of the last exit."""
    names = (CHECKPOINT.fullmatch(path.name) for path in (run_dir / CHECKPOINTS).glob("step-*"))
    return max([_exit_note(run_dir).get("saved_step") or 0, *(int(name[1]) for name in names if name)])


def _status(run_dir: Path) -> str:
    return str(_exit_note(run_dir).get("status", ""))


def _exit_note(run_dir: Path) -> dict[str, Any]:
    """Return exit.json; {} without one, as after a crash."""
    path = run_dir / EXIT
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _state_file(run_dir: Path) -> Path:
    """Return where the attempts are counted: beside the run folder, in which training wants nobody else's files."""
    return run_dir.with_name(f"{run_dir.name}.attempts.json")


def _read(run_dir: Path) -> Attempts:
    path = _state_file(run_dir)
    return Attempts(**json.loads(path.read_text())) if path.exists() else Attempts(saved_step(run_dir))


def _write(run_dir: Path, attempts: Attempts) -> None:
    path = _state_file(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(asdict(attempts)) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
