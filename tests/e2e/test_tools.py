"""`quantize`, killed and started again, as a user would run it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from fsdp_qlora.output_files import STATE_FILE

COMMAND = [sys.executable, "-c", "from fsdp_qlora.cli import main; main()"]
ROOT = Path(__file__).parents[2]


def run(arguments: list[str], environment: dict[str, str]) -> str:
    result = subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_quantize_survives_a_kill(base: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    def arguments(output: Path) -> list[str]:
        return ["quantize", "--model", str(base), "--output_dir", str(output), "--max_shard_size", "1KB"]

    killed = tmp_path / "killed"
    process = subprocess.Popen([*COMMAND, *arguments(killed)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(killed.glob("*.safetensors"))) < 3:
        assert time.monotonic() < deadline
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    finished = json.loads((killed / STATE_FILE).read_text())["finished"]
    assert finished
    output = run(arguments(killed), environment)
    assert output.count("complete and verified, kept") == len(finished)
    run(arguments(tmp_path / "whole"), environment)
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in killed.iterdir()} == files
