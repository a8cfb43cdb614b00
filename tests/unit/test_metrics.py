"""metrics.jsonl is always written, progress shown; a tracker that fails warns once and never stops a run."""

from __future__ import annotations

import json
import sys
import threading
import time
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fsdp_qlora import metrics as metrics_module
from fsdp_qlora.config import TRACKERS, TrainConfig
from fsdp_qlora.metrics import LOGGERS, Metrics, memory_gib

SECRET = "0123456789abcdef0123456789abcdef01234567"


STEP = {"loss": 1.5, "grad_norm": 0.25, "lr": 2e-4, "tokens_per_second": 1234.0, "peak_gpu_gib": 0.0}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_record_is_on_disk_at_once(tmp_path: Path) -> None:
    with Metrics(TrainConfig(output_dir=str(tmp_path)), {}, 2, enabled=True) as metrics:
        metrics.log({"loss": 1.5, "lr": 2e-4}, 1)
        (first,) = records(tmp_path)
        metrics.log({"loss": float("nan")}, 2)
        assert len(records(tmp_path)) == 2
    assert first["step"] == 1
    assert (first["loss"], first["lr"]) == (1.5, 2e-4)
    assert first["time"] == pytest.approx(time.time(), abs=60)


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(TrainConfig(output_dir=str(tmp_path), log_to="wandb"), {}, 2, enabled=False) as metrics:
        metrics.log({"loss": 1.5}, 1)
        metrics.show("step 1")
        metrics.progress(STEP, 1, 2, 60.0)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_lines_are_plain_text_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(TrainConfig(output_dir=str(tmp_path)), {}, 2, enabled=True) as metrics:
        metrics.show("hello")
        metrics.progress(STEP, 1, 2, 90.0)
        metrics.progress({**STEP, "peak_gpu_gib": 7.25}, 2, 2, 0.0)
    assert capsys.readouterr().out.splitlines() == [
        "hello",
        "step 1/2  loss 1.5000  grad norm 0.25  lr 2.00e-04  1,234 tok/s  1.5 min left",
        "step 2/2  loss 1.5000  grad norm 0.25  lr 2.00e-04  1,234 tok/s  7.2 GiB  0.0 min left",
    ]


def test_a_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "110")
    with Metrics(TrainConfig(output_dir=str(tmp_path)), {}, 2, enabled=True) as metrics:
        metrics.show("an event [1]")
        metrics.progress({**STEP, "peak_gpu_gib": 7.25}, 1, 2, 90.0)
    assert "loss 1.5000  1,234 tok/s  7.2 GiB  saves at 2" in capsys.readouterr().err


def test_a_bar_stays_off_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "110")
    with Metrics(TrainConfig(output_dir=str(tmp_path), save_steps=2), {}, 9, enabled=True) as metrics:
        metrics.show("an event [1]")
        for step in (1, 2, 9):
            metrics.progress(STEP, step, 9, 90.0)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "an event [1]" in shown.err
    assert "9/9" in shown.err
    assert "saving" in shown.err


def wait_for(path: Path, expected: tuple[bytes, ...]) -> bytes:
    """Return a file's content once it holds all of the expected bytes, or after 10 seconds.

    wandb's own process writes the run; finish() may return some 50 ms before the bytes are there.
    """
    deadline = time.monotonic() + 10
    while not all(part in (content := path.read_bytes()) for part in expected) and time.monotonic() < deadline:
        time.sleep(0.05)
    return content


@pytest.mark.filterwarnings("error")
def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", "hf_" + SECRET)
    config = TrainConfig(output_dir=str(tmp_path / "run-7"), log_to="wandb")
    Path(config.output_dir).mkdir()
    with Metrics(config, {"config": {"lora_rank": 8}}, 3, enabled=True) as metrics:
        for step in (1, 2, 3):
            metrics.log({"loss": 1 / step}, step)
    assert [record["step"] for record in records(tmp_path / "run-7")] == [1, 2, 3]
    (stored,) = (tmp_path / "run-7" / "wandb").glob("offline-run-*/*.wandb")
    expected = (b"lora_rank", b"run-7", b"loss")
    content = wait_for(stored, expected)
    assert [part for part in expected if part not in content] == []
    for path in (tmp_path / "run-7").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), f"a secret is in {path}"


class FakeRun:
    """A wandb run that fails in the methods named."""

    def __init__(self, failing: str) -> None:
        self.failing, self.logged = failing, 0

    def log(self, record: dict[str, Any], step: int) -> None:
        self.logged += 1
        if self.failing == "log":
            raise RuntimeError("the connection broke")

    def finish(self) -> None:
        if self.failing == "finish":
            raise TimeoutError("no answer")


def install_wandb(monkeypatch: pytest.MonkeyPatch, failing: str) -> tuple[FakeRun, dict[str, Any]]:
    """Put a stand-in for wandb; return its run and the arguments of init."""
    run, given = FakeRun(failing), {}
    module = types.ModuleType("wandb")

    def init(**arguments: Any) -> FakeRun:
        given.update(arguments)
        if failing == "init":
            raise ConnectionError("cannot reach api.wandb.ai")
        return run

    module.init, module.Settings, module.Table = init, dict, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return run, given


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("init", "ConnectionError: cannot reach api.wandb.ai"),
        ("log", "RuntimeError: the connection broke"),
        ("finish", "TimeoutError: no answer"),
    ],
)
def test_a_failing_tracker_warns_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, message: str
) -> None:
    run, _ = install_wandb(monkeypatch, failing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log_three_steps(TrainConfig(output_dir=str(tmp_path), log_to="wandb"))
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
    assert run.logged == {"init": 0, "log": 1, "finish": 3}[failing]
    (warning,) = caught
    assert str(warning.message) == f"wandb failed and is switched off ({message}); training goes on"


def test_the_run_s_record_waits_for_a_file_system_that_stalls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "TRACKER_LIMIT_S", 0.05)
    write = metrics_module.JsonlLogger.log

    def stalls(*arguments: Any) -> None:
        time.sleep(0.3)
        write(*arguments)

    monkeypatch.setattr(metrics_module.JsonlLogger, "log", stalls)
    with Metrics(TrainConfig(output_dir=str(tmp_path)), {}, 2, enabled=True) as metrics:
        metrics.log({"loss": 1.5}, 1)
        metrics.log({"loss": 1.25}, 2)
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


@pytest.mark.parametrize("hanging", ["init", "log", "finish"])
def test_a_tracker_that_hangs_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hanging: str) -> None:
    run, _ = install_wandb(monkeypatch, "")
    over = threading.Event()
    owner = sys.modules["wandb"] if hanging == "init" else FakeRun
    monkeypatch.setattr(owner, hanging, lambda *_, **__: over.wait())
    monkeypatch.setattr(metrics_module, "TRACKER_LIMIT_S", 1.0)
    with pytest.warns(UserWarning, match=r"failed and is switched off \(TimeoutError: no answer in 1.0 s\)"):
        log_three_steps(TrainConfig(output_dir=str(tmp_path), log_to="wandb"))
    over.set()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
    assert run.logged == (3 if hanging == "finish" else 0)


def log_three_steps(config: TrainConfig) -> None:
    with Metrics(config, {}, 3, enabled=True) as metrics:
        for step in (1, 2, 3):
            metrics.log({"loss": 1.0}, step)


def test_a_tracker_lives_in_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some libraries keep the current run per thread, and begin another one in each."""
    run, _ = install_wandb(monkeypatch, "")
    threads: set[int] = set()
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: threads.add(threading.get_ident()) or run)
    monkeypatch.setattr(run, "log", lambda *_, **__: threads.add(threading.get_ident()), raising=False)
    monkeypatch.setattr(run, "finish", lambda: threads.add(threading.get_ident()), raising=False)
    log_three_steps(TrainConfig(output_dir=str(tmp_path), log_to="wandb"))
    assert len(threads - {threading.get_ident()}) == len(threads) == 1


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_three_steps(TrainConfig(output_dir=str(tmp_path), log_to="tensorboard"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 1.0)]


def test_answers_are_logged_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = install_wandb(monkeypatch, "")
    with Metrics(TrainConfig(output_dir=str(tmp_path), log_to="wandb,tensorboard"), {}, 3, enabled=True) as metrics:
        metrics.log_samples([{"prompt": "1+1?", "answer": "2"}], 3)
    assert records(tmp_path)[0]["samples"] == [{"prompt": "1+1?", "answer": "2"}]
    assert run.logged == 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert any("sample 1" in tag for tag in events.Tags()["tensors"])
    assert capsys.readouterr().out == "step 3: '1+1?' -> '2'\n"


def test_several_trackers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = install_wandb(monkeypatch, "log")
    with pytest.warns(UserWarning, match="wandb failed and is switched off"):
        log_three_steps(TrainConfig(output_dir=str(tmp_path), log_to="wandb, tensorboard"))
    assert run.logged == 1
    assert list((tmp_path / "tensorboard").glob("events.*")), "the others go on"
    assert len(records(tmp_path)) == 3


def test_every_tracker_has_its_class() -> None:
    assert tuple(LOGGERS) == TRACKERS


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboard")])
def test_a_missing_package_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    config = TrainConfig(output_dir=str(tmp_path), log_to=name)
    with pytest.warns(UserWarning, match=f"{name} failed and is switched off .*Error"):
        metrics = Metrics(config, {}, 1, enabled=True)
    with metrics:
        metrics.log({"loss": 1.0}, 1)
    assert len(records(tmp_path)) == 1


def test_what_wandb_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    _, given = install_wandb(monkeypatch, "")
    config = TrainConfig(output_dir=str(tmp_path / "a"), log_to="wandb", run_name="mine")
    (tmp_path / "a").mkdir()
    with warnings.catch_warnings(action="error"), Metrics(config, {"seed": 1}, 1, enabled=True):
        pass
    assert (given["project"], given["name"], given["dir"]) == ("fsdp_qlora", "mine", str(tmp_path / "a"))
    assert given["config"] == {"seed": 1}
    assert given["settings"]["init_timeout"] <= 60, "an unreachable server holds the run up no longer"


def test_a_full_disk_does_not_stop_training(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with Metrics(TrainConfig(output_dir=str(tmp_path)), {}, 2, enabled=True) as metrics:
        with pytest.warns(UserWarning, match="metrics.jsonl failed and is switched off .*No space left"):
            metrics.log({"loss": 1.0}, 1)
        metrics.log({"loss": 1.0}, 2)


def test_no_gpu_memory_on_the_cpu() -> None:
    assert memory_gib(torch.device("cpu")) == 0.0
