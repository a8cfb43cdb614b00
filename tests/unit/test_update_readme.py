"""The README's tables are made from the code, and stale ones are noticed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from fsdp_qlora.config import TrainConfig
from fsdp_qlora.models.aliases import ALIASES

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "update_readme.py"
PAGE = "# Title\n<!-- flags:begin -->\nold\n<!-- flags:end -->\ntext\n<!-- models:begin --><!-- models:end -->\nend\n"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update_readme", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_writes_both_tables_and_keeps_the_rest(script: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    assert script.main([str(page)]) == 0
    text = page.read_text()
    assert text.startswith("# Title\n<!-- flags:begin -->\n")
    assert "\n<!-- flags:end -->\ntext\n<!-- models:begin -->\n" in text
    assert text.endswith("<!-- models:end -->\nend\n")
    assert "old" not in text.split("<!-- flags:end -->")[0].splitlines()
    for name in TrainConfig.__dataclass_fields__:
        assert f"| `--{name}` |" in text
    for name, alias in ALIASES.items():
        assert f"| `{name}` | {alias.repo or 'SmolLM2'}" in text
    assert "**LoRA**" in text
    assert "| `--quant_type` | `nf4` (or `fp4`) |" in text
    assert "| `--adapter` | required |" in text


def test_check_finds_a_stale_page_and_changes_nothing(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    assert script.main(["--check", str(page)]) == 1
    assert "is stale; run: python scripts/update_readme.py" in capsys.readouterr().err
    assert page.read_text() == PAGE
    script.main([str(page)])
    fresh = page.read_text()
    assert script.main(["--check", str(page)]) == 0
    script.main([str(page)])
    assert page.read_text() == fresh


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
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    page = tmp_path / "README.md"
    page.write_text(text)
    assert script.main([str(page)]) == 2
    assert ":begin -->' and after it one line '" in capsys.readouterr().err
    assert page.read_text() == text


def test_missing_page(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(tmp_path / "README.md")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_cells_stay_cells(script: ModuleType) -> None:
    lines = [line for line in script.flags_block().splitlines() if line.startswith("| `--")]
    assert all(line.replace("\\|", "").count("|") == 4 for line in lines)
