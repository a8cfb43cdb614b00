"""The command line: dispatch, flags, help, messages and exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from fsdp_qlora import __version__, cli
from fsdp_qlora.config import GenerateConfig, TrainConfig
from fsdp_qlora.errors import DataError, TrainingError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[object]]:
    """Put a stand-in for the modules behind the commands; return the list of settings they were called with."""

    def _install(error: BaseException | None = None) -> list[object]:
        calls: list[object] = []

        def run(settings: object) -> None:
            calls.append(settings)
            if error is not None:
                raise error

        for name in ("train", "generate"):
            module = types.ModuleType(f"fsdp_qlora.commands.{name}")
            module.run = run  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return calls

    return _install


def exit_code(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        ((), {}),
        (("--lora_rank", "8"), {"lora_rank": 8}),
        (("--lora-rank=8",), {"lora_rank": 8}),
        (("--max_steps", "-1", "--lr", "1e-3"), {"lr": 1e-3}),
        (("--model=123",), {"model": "123"}),
        (("--model", "1e3"), {"model": "1e3"}),
        (("--model=[1,2]",), {"model": "[1,2]"}),
        (("--model=a=b",), {"model": "a=b"}),
        (("--model", "-"), {"model": "-"}),
        (("--overwrite",), {"overwrite": True}),
        (("--overwrite", "--lr", "1"), {"overwrite": True, "lr": 1.0}),
        (("--overwrite=false",), {}),
        (("--nopacking",), {"packing": False}),
        (("--no-packing", "--noverify-weights"), {"packing": False, "verify_weights": False}),
        (("--packing", "no"), {"packing": False}),
        (("--lr", "1", "--lr", "2"), {"lr": 2.0}),
    ],
)
def test_flags_reach_the_command(
    install: Callable[..., list[object]], argv: tuple[str, ...], changed: dict[str, object]
) -> None:
    calls = install()
    cli.main(["train", *argv])
    assert calls == [TrainConfig(**changed)]  # type: ignore[arg-type]


def test_generate_takes_its_own_settings(install: Callable[..., list[object]]) -> None:
    calls = install()
    cli.main(["generate", "--adapter", "runs/a", "--prompt", "What is -1 --ish?"])
    assert calls == [GenerateConfig(adapter="runs/a", prompt="What is -1 --ish?")]


def test_config_file_beside_flags(install: Callable[..., list[object]], tmp_path: Path) -> None:
    calls = install()
    (tmp_path / "run.yaml").write_text("lr: 1e-3\nseed: 7\n")
    cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--seed=8"])
    assert calls == [TrainConfig(lr=1e-3, seed=8)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("trian",), "error: trian: unknown command; did you mean train?"),
        (("xyz",), "error: xyz: unknown command; commands are train, plan, "),
        (("--lr", "1"), "error: --lr: unknown command"),
        (("train", "--lora_rnak", "8"), "error: --lora_rnak: unknown setting; did you mean --lora_rank?"),
        (("train", "--lora_rnak"), "error: --lora_rnak: unknown setting; did you mean --lora_rank?"),
        (("train", "--learning-rate", "1"), "error: --learning_rate: unknown setting; did you mean --lr?"),
        (("train", "--nolr"), "error: --nolr: unknown setting"),
        (("train", "--help=1"), "error: --help: unknown setting"),
        (("train", "llama-70b"), "error: 'llama-70b' belongs to no setting; write --name value"),
        (("train", "-lr", "1"), "error: '-lr' belongs to no setting; write --name value"),
        (("train", "--"), "error: '--' belongs to no setting; write --name value"),
        (("train", "--model"), "error: --model has no value; write --model value"),
        (("train", "--model", "--lr", "1"), "error: --model has no value; write --model value"),
        (("train", "--config"), "error: --config has no value; write --config value"),
        (("train", "--config", "no.yaml"), "error: --config=no.yaml: cannot be read"),
        (("train", "--packing", "runs"), "error: --packing='runs': must be true or false"),
        (("generate",), "error: --prompt is required"),
    ],
)
def test_wrong_command_lines_end_with_2_before_anything_runs(
    install: Callable[..., list[object]], capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    calls = install()
    assert exit_code(*argv) == 2
    assert message in capsys.readouterr().err
    assert calls == []


def test_all_problems_of_a_command_line_come_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("train", "stray", "--seed", "--lr", "fast", "--typo", "1") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [re.split(r"[ :=]", line.removeprefix("error: "))[0] for line in lines] == [
        "'stray'",
        "--seed",
        "--lr",
        "--typo",
    ]
    assert all(line.startswith("error: ") for line in lines)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (DataError("rows.jsonl:3: no messages"), 1, "error: rows.jsonl:3: no messages\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_expected_errors_have_no_traceback(
    install: Callable[..., list[object]],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    text: str,
) -> None:
    install(error)
    assert exit_code("train") == code
    assert capsys.readouterr().err == text


def test_debug_shows_the_traceback(install: Callable[..., list[object]], capsys: pytest.CaptureFixture[str]) -> None:
    install(DataError("bad row"))
    assert exit_code("train", "--debug") == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: bad row\n")


def test_unexpected_errors_keep_their_traceback(install: Callable[..., list[object]]) -> None:
    install(ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


@pytest.mark.parametrize(("rank", "local", "printed"), [("0", False, True), ("1", False, False), ("1", True, True)])
def test_shared_errors_are_printed_by_rank_0_and_local_ones_by_their_rank(
    install: Callable[..., list[object]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rank: str,
    local: bool,
    printed: bool,
) -> None:
    error = TrainingError("loss is nan")
    error.rank_local = local  # type: ignore[attr-defined]
    install(error)
    monkeypatch.setenv("RANK", rank)
    assert exit_code("train") == 1
    said = "error: rank 1: loss is nan\n" if local else "error: loss is nan\n"
    assert capsys.readouterr().err == (said if printed else "")


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",), ("help",)])
def test_overview_lists_the_commands(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    cli.main(argv)
    out = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"  {command.name} " in out
        assert command.summary in out


@pytest.mark.parametrize("argv", [("train", "--help"), ("train", "--lr", "1", "-h"), ("help", "train")])
def test_command_help_shows_every_setting(
    install: Callable[..., list[object]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: tuple[str, ...],
) -> None:
    calls = install()
    monkeypatch.setenv("COLUMNS", "60")
    cli.main(argv)
    out = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert f"  --{name} " in out
    assert "\nLoRA\n  --lora_rank N  (default: 64)\n      Rank of the LoRA matrices.\n" in out
    assert "--quant_type auto|nf4|fp4|none  (default: auto)" in out
    assert all(len(line) <= 60 for line in out.splitlines() if line.startswith("      "))
    assert calls == []


def test_help_marks_required_settings(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["generate", "--help"])
    assert "--prompt TEXT  (required)" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"fsdp-qlora {__version__}\n"


def test_commands_differ_in_name() -> None:
    assert len({command.name for command in cli.COMMANDS}) == len(cli.COMMANDS)


@pytest.mark.parametrize("argv", [["--lora_rnak", "3"], ["--help"]])
def test_typo_and_help_are_answered_at_once_without_torch(argv: list[str]) -> None:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("RANK", None)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *argv], env=environment, capture_output=True, text=True, timeout=60
    )
    assert time.monotonic() - start < 5  # 0.2 s alone on a machine
    assert done.returncode == (0 if argv == ["--help"] else 2)
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "fsdp_qlora.config" in imported
    assert not imported & {"torch", "transformers", "bitsandbytes", "huggingface_hub", "datasets", "wandb"}


def test_own_warnings_are_lines_like_errors(
    install: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back at the end
    install()
    cli.main(["train"])
    assert warnings.formatwarning("wandb failed", UserWarning, cli.__file__, 7) == "warning: wandb failed\n"
    assert warnings.formatwarning("old", UserWarning, "/x/torch/a.py", 7) == "/x/torch/a.py:7: UserWarning: old\n"
