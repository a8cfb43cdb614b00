"""The tables of the README and of docs/settings.md are made from the code, and stale ones are noticed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from fsdp_qlora.cli import COMMANDS
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.models.aliases import ALIASES
from fsdp_qlora.settings import describe

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "update_readme.py"
SETTINGS = "<!-- flags:begin --><!-- flags:end -->\n"
PAGE = "# Title\n<!-- flags:begin -->\nold\n<!-- flags:end -->\ntext\n<!-- models:begin --><!-- models:end -->\nend\n"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update_readme", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Both pages with empty tables."""
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "settings.md").write_text(SETTINGS)
    return tmp_path


def texts(folder: Path) -> tuple[str, str]:
    return (folder / "README.md").read_text(), (folder / "docs" / "settings.md").read_text()


def test_writes_all_tables_and_keeps_the_rest(script: ModuleType, folder: Path) -> None:
    assert script.main([str(folder)]) == 0
    text, others = texts(folder)
    assert text.startswith("# Title\n<!-- flags:begin -->\n")
    assert "\n<!-- flags:end -->\ntext\n<!-- models:begin -->\n" in text
    assert text.endswith("<!-- models:end -->\nend\n")
    assert "old" not in text.split("<!-- flags:end -->")[0].splitlines()
    for setting in describe(TrainConfig):
        assert f"| `--{setting.name}` |" in text
    for name, alias in ALIASES.items():
        assert f"| `{name}` | {alias.repo or 'SmolLM2'}" in text
    assert "**LoRA**" in text
    assert "| `--quant_type` | `auto` (or `nf4`" in text
    for command in COMMANDS:
        assert f"### `fsdp-qlora {command.name}`" in (text if command.name == "train" else others)
    assert "| `--adapter` | required |" in others


def test_check_finds_stale_pages_and_changes_nothing(
    script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--check", str(folder)]) == 1
    assert capsys.readouterr().err.count("is stale; run: python scripts/update_readme.py") == 2
    assert texts(folder) == (PAGE, SETTINGS)
    script.main([str(folder)])
    fresh = texts(folder)
    assert script.main(["--check", str(folder)]) == 0
    script.main([str(folder)])
    assert texts(folder) == fresh


@pytest.mark.parametrize(
    "text",
    [
        "no markers\n",
        PAGE.replace("<!-- flags:end -->", ""),
        PAGE + "<!-- models:begin -->",
        "<!-- flags:end --><!-- flags:begin --><!-- models:begin --><!-- models:end -->",
    ],
)
def test_wrong_markers_are_named(
    script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (folder / "README.md").write_text(text)
    assert script.main([str(folder)]) == 2
    assert ":begin -->' and after it one line '" in capsys.readouterr().err
    assert texts(folder)[0] == text


def test_missing_page(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(tmp_path)]) == 2
    assert "No such file" in capsys.readouterr().err


def test_cells_stay_cells(script: ModuleType) -> None:
    lines = [line for line in script.flags_block(COMMANDS).splitlines() if line.startswith("| `--")]
    assert all(line.replace("\\|", "").count("|") == 4 for line in lines)
