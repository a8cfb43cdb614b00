"""What a run folder tells: its settings, results and metrics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.errors import ConfigError


@dataclass(frozen=True)
class RunData:
    """A run, finished or not."""

    name: str
    record: dict[str, Any]
    """run.json."""

    metrics: dict[int, dict[str, Any]]
    """What was logged, by step."""

    @property
    def result(self) -> dict[str, Any]:
        """The summary at the end of run.json; empty while the run goes on."""
        result: dict[str, Any] = self.record.get("result", {})
        return result

    @property
    def samples(self) -> dict[str, dict[int, str]]:
        """Answers to the sample prompts: prompt -> step -> answer."""
        found: dict[str, dict[int, str]] = {}
        for step, record in self.metrics.items():
            for sample in record.get("samples", []):
                found.setdefault(sample["prompt"], {})[step] = sample["answer"]
        return found

    def names(self) -> list[str]:
        """Return the names of all logged numbers."""
        numbers = ((name, value) for record in self.metrics.values() for name, value in record.items())
        return list(dict.fromkeys(name for name, value in numbers if isinstance(value, int | float)))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a number was logged, and its values."""
        points = [(step, record[name]) for step, record in sorted(self.metrics.items()) if name in record]
        return [step for step, _ in points], [value for _, value in points]


def read_run(folder: Path) -> RunData:
    """Read a run folder; of what was logged twice for a step (before and after a resume), the later counts.

    Raises:
        ConfigError: it is no run folder, or a file of it is damaged.
    """
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise ConfigError(f"{folder} holds no {missing}; give the --output_dir of a training run") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: run.json or metrics.jsonl cannot be read ({error})") from error
    metrics: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break  # the run is writing it, or was killed while it did
            raise ConfigError(
                f"{folder / 'metrics.jsonl'}:{number}: invalid JSON ({error}); remove the line"
            ) from error
        metrics.setdefault(entry["step"], {}).update(entry)
    return RunData(folder.resolve().name, record, metrics)
