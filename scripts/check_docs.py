"""Check README.md and docs/: links and anchors lead somewhere, pictures exist, and named flags and commands are real."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from fsdp_qlora.cli import COMMANDS
from fsdp_qlora.settings import describe

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z_0-9]+)(?![\w-])")
"""Flags with hyphens are of other programs."""

COMMAND = re.compile(r"(?:^|`)fsdp-qlora ([a-z]+)", re.MULTILINE)
PATH = re.compile(r"`((?:fsdp_qlora|tests|scripts|docs|launch)/[\w./-]*)`")

OTHER_FLAGS = {"nproc_per_node", "nnodes", "help", "config", "version", "outtype", "outfile", "signal"}
"""Flags of torchrun, of llama.cpp, of SLURM and of the command line itself."""


def pages(root: Path) -> list[Path]:
    """Return the pages to check."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def anchors(text: str) -> set[str]:
    """Return the anchors that headings get on GitHub."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def problems(path: Path, root: Path) -> Iterator[str]:
    """Yield what is wrong with a page."""
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for target in LINK.findall(prose):
        if re.match(r"[a-z]+:", target):
            continue  # another site
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        if not linked.is_relative_to(root) or not linked.exists():
            yield f"link to {target}: no such file"
        elif anchor and anchor not in anchors(linked.read_text(encoding="utf-8")):
            yield f"link to {target}: no such heading"
    for name in PATH.findall(text):
        if not (root / name).exists():
            yield f"{name}: no such file"
    known = {setting.name for command in COMMANDS for setting in describe(command.settings)} | OTHER_FLAGS
    ours = re.sub(r"^.*(?:pytest|scripts/|pip |lm_eval|sbatch|srun).*$", "", text, flags=re.MULTILINE)
    yield from (f"--{flag}: no such setting" for flag in sorted(set(FLAG.findall(ours)) - known))
    names = {command.name for command in COMMANDS} | {"help"}
    yield from (f"fsdp-qlora {name}: no such command" for name in sorted(set(COMMAND.findall(text)) - names))


def main(root: Path = ROOT) -> int:
    """Print all problems; return 1 if there are any."""
    found = [f"{path.relative_to(root)}: {problem}" for path in pages(root) for problem in problems(path, root)]
    print("\n".join(found) or f"{len(pages(root))} pages, no problem")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
