"""The command line: fsdp-qlora COMMAND --name value ..., made from the settings dataclasses of config.py."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import fire
from fire.decorators import SetParseFn

from fsdp_qlora import __version__, config
from fsdp_qlora.errors import ConfigError, FsdpQloraError
from fsdp_qlora.settings import Setting, describe, show, suggest


@dataclass(frozen=True)
class Command:
    """One command: `module.run(settings)` is called with the settings read from the command line."""

    name: str
    summary: str
    module: str
    settings: type


COMMANDS = (
    Command("train", "Fine-tune a model; under torchrun on several GPUs.", "fsdp_qlora.trainer", config.TrainConfig),
    Command("generate", "Answer a prompt with a trained adapter.", "fsdp_qlora.generate", config.GenerateConfig),
)

_HELP = ("--help", "-h")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; ends the process with exit code 2 for wrong settings, 1 for other errors, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(arguments)
    except FsdpQloraError as error:
        # Errors that all ranks share are printed once; those of one rank are printed by that rank.
        if os.environ.get("RANK", "0") == "0" or getattr(error, "rank_local", False):
            print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


def _dispatch(arguments: list[str]) -> None:
    """Answer requests for help and version; hand everything else to the command through fire."""
    commands = {command.name: command for command in COMMANDS}
    if arguments and arguments[0] == "--version":
        print(f"fsdp-qlora {__version__}")
        return
    if arguments and arguments[0] == "help":
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in _HELP:
        print(overview())
        return
    name, *rest = arguments
    if name not in commands:
        hint = suggest(name, list(commands), f"commands are {', '.join(commands)}")
        raise ConfigError(f"{name}: unknown command; {hint}")
    if any(argument in _HELP for argument in rest):
        print(command_help(commands[name]))
        return
    fire.Fire(_component(commands[name]), command=_complete(commands[name], rest), name=f"fsdp-qlora {name}")


def _component(command: Command) -> object:
    """Make the function that fire calls: all flags arrive as raw strings, to be typed by the settings' own types."""

    def run(*positional: str, config: str | None = None, **overrides: str) -> None:
        leftover = [f"{word!r}: belongs to no --name; write --name value" for word in positional]
        _run(command, overrides, config, leftover)

    return SetParseFn(str)(run)


def _run(command: Command, overrides: dict[str, str], config_file: str | None, problems: list[str]) -> None:
    try:
        settings = config.parse(overrides, config_file, command.settings)
    except ConfigError as error:
        raise ConfigError("\n".join([*problems, str(error)])) from error
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        importlib.import_module(command.module).run(settings)
    except FsdpQloraError:
        if getattr(settings, "debug", False):
            traceback.print_exc()
        raise


def _complete(command: Command, arguments: Sequence[str]) -> list[str]:
    """Give every flag its value, so that fire guesses nothing: --flag is true, --noflag is false.

    Raises:
        ConfigError: a flag that needs a value has none.
    """
    kinds: dict[str, type] = {setting.name: setting.kind for setting in describe(command.settings)}
    complete, problems = [], []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        name = argument[2:].replace("-", "_")
        if not argument.startswith("--") or "=" in argument or not following.startswith("--"):
            complete.append(argument)
        elif kinds.get(name) is bool:
            complete.append(f"{argument}=true")
        elif name not in kinds and name.startswith("no") and kinds.get(name[2:]) is bool:
            complete.append(f"--{name[2:]}=false")
        elif name in kinds or name == "config":
            problems.append(f"{argument} has no value; write {argument} value")
        else:
            complete.append(f"{argument}=")
    if problems:
        raise ConfigError("\n".join(problems))
    return complete
